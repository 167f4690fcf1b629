fn main() {
    // Set by controlgen-core, whichever way LibTorch was found.
    if let Ok(lib) = std::env::var("DEP_CONTROLGEN_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
}
