//! Opening LibTorch's CUDA library at run time.
//!
//! The linker drops libtorch_cuda because no symbol of it is used, and a binary that did need it would not start
//! where it is absent. So it is opened here: with its symbols global, and before LibTorch is first asked about CUDA,
//! since it looks for its CUDA half once.

use std::sync::OnceLock;

/// Opens libtorch_cuda, once for the process; says why not where it cannot be.
pub(crate) fn open_cuda() -> Result<(), String> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(open).clone()
}

#[cfg(target_os = "linux")]
fn open() -> Result<(), String> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LAZY, RTLD_NOW};

    // SAFETY: loading a library runs its initialisers. libcuda is NVIDIA's driver interface, libtorch_cuda the other
    // half of the LibTorch that is already running in this process; both are made to be loaded so.
    unsafe {
        if Library::open(Some("libcuda.so.1"), RTLD_LAZY).is_err() {
            return Err("there is no NVIDIA driver (libcuda.so.1)".into());
        }
        let beside = libtorch_folder().map(|folder| folder.join("libtorch_cuda.so"));
        let path = beside.filter(|path| path.exists()).unwrap_or_else(|| "libtorch_cuda.so".into());
        let library = Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL)
            .map_err(|error| format!("LibTorch's CUDA library cannot be opened: {error}"))?;
        // It must stay for the life of the process.
        std::mem::forget(library);
    }
    Ok(())
}

/// The folder of the libtorch_cpu that is running.
#[cfg(target_os = "linux")]
fn libtorch_folder() -> Option<std::path::PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let line = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    let path = std::path::Path::new(&line[line.find('/')?..]);
    path.parent().map(std::path::Path::to_owned)
}

#[cfg(not(target_os = "linux"))]
fn open() -> Result<(), String> {
    Err("CUDA is opened at run time on Linux only".into())
}
