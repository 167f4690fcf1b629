//! Tells the linker, and the build scripts of dependents, where LibTorch lies.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Set by torch-sys, whichever way it found LibTorch; absent with `doc-only`.
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
        println!("cargo:libtorch_lib={lib}");
    }
}
