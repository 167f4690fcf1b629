fn main() {
    // Where LibTorch lies, as controlgen-core found it: binaries look for it there.
    if let Ok(lib) = std::env::var("DEP_CONTROLGEN_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
}
