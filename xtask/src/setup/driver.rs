//! Is there an NVIDIA driver?

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// Files that the driver's kernel module makes, or that carry the driver into WSL and containers.
const TRACES: [&str; 3] = ["/proc/driver/nvidia/version", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1"];

/// Where distributions and container runtimes put `libcuda.so.1`.
const LIBRARY_FOLDERS: [&str; 6] = [
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/nvidia/lib64",
    "/run/opengl-driver/lib",
];

/// The first trace of an NVIDIA driver on this machine. Only looks at files, so it takes microseconds.
pub fn find() -> Option<PathBuf> {
    let variable = |name| env::var_os(name).unwrap_or_default();
    find_in(Path::new("/"), &variable("LD_LIBRARY_PATH"), &variable("PATH"))
}

fn find_in(root: &Path, library_path: &OsStr, path: &OsStr) -> Option<PathBuf> {
    let under = |path: &str| root.join(path.trim_start_matches('/'));
    let traces = TRACES.iter().map(|trace| under(trace));
    let folders = LIBRARY_FOLDERS.iter().map(|folder| under(folder)).chain(env::split_paths(library_path));
    let libraries = folders.map(|folder| folder.join("libcuda.so.1"));
    let programs = env::split_paths(path).map(|folder| folder.join("nvidia-smi"));
    traces.chain(libraries).chain(programs).find(|file| file.exists())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn every_trace_is_found() {
        let home = tempfile::tempdir().unwrap();
        let (root, own) = (home.path().join("root"), home.path().join("own"));
        fs::create_dir(&root).unwrap();
        let look = || find_in(&root, own.as_os_str(), own.as_os_str());
        assert_eq!(look(), None);
        let files = TRACES.iter().map(|trace| root.join(&trace[1..]));
        let libraries = LIBRARY_FOLDERS.iter().map(|folder| root.join(&folder[1..]).join("libcuda.so.1"));
        for file in files.chain(libraries).chain([own.join("libcuda.so.1"), own.join("nvidia-smi")]) {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, b"").unwrap();
            assert_eq!(look(), Some(file.clone()));
            fs::remove_file(&file).unwrap();
        }
    }
}
