//! The heap of the C library.

/// Gives memory that was freed back to the system. glibc keeps freed blocks of less than 32 MB for itself: after weights
/// were brought into another layout, as much again as they are. A few milliseconds; elsewhere nothing.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn give_back() {
    unsafe extern "C" {
        fn malloc_trim(pad: usize) -> std::ffi::c_int;
    }
    // SAFETY: it may be called at any time from any thread (malloc_trim(3)), and touches no block in use.
    unsafe {
        malloc_trim(0);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn give_back() {}
