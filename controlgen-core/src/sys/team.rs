//! The threads that LibTorch computes on, for kernels of our own.

use std::arch::is_x86_feature_detected;
use std::ffi::c_void;
use std::sync::OnceLock;

/// The OpenMP runtime that LibTorch itself runs on, in a program that LibTorch is linked to. In a plug-in whose
/// symbols are its own, none is found, or the program's.
pub(super) struct Team {
    parallel: unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, u32, u32),
    thread: unsafe extern "C" fn() -> i32,
    threads: unsafe extern "C" fn() -> i32,
}

/// Whether the processor has the instructions that the kernels are written in.
pub(super) fn supported() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// The team, where there is one and the processor has the instructions.
pub(super) fn team() -> Option<&'static Team> {
    static FOUND: OnceLock<Option<Team>> = OnceLock::new();
    let find = || {
        if !supported() {
            return None;
        }
        let this = libloading::os::unix::Library::this();
        // SAFETY: the types are those of GNU's and LLVM's OpenMP runtimes, which LibTorch depends on and which
        // stay loaded for the life of the process.
        unsafe {
            Some(Team {
                parallel: *this.get(b"GOMP_parallel\0").ok()?,
                thread: *this.get(b"omp_get_thread_num\0").ok()?,
                threads: *this.get(b"omp_get_num_threads\0").ok()?,
            })
        }
    };
    FOUND.get_or_init(find).as_ref()
}

impl Team {
    /// Calls `part` with 0 … n − 1 and n, each on a thread of its own, this one among them, and waits for all; n is at
    /// most `threads`. What it does must be safe to do on several threads at once, and it must not panic: there is no
    /// unwinding through the runtime.
    ///
    /// The team is always the whole one, of which some may have nothing to do: GNU's runtime ends the threads that
    /// a smaller team leaves over, and makes new ones for the next larger one.
    pub(super) fn run<F: Fn(usize, usize)>(&self, threads: usize, part: F) {
        if threads <= 1 || tch::get_num_threads() == 1 {
            return part(0, 1);
        }
        let mut shared = (self, threads, part);
        // SAFETY: `on_thread` reads `shared`, which outlives the call, as that returns when every thread is done.
        unsafe { (self.parallel)(on_thread::<F>, (&raw mut shared).cast(), 0, 0) }
    }
}

/// One thread's part.
extern "C" fn on_thread<F: Fn(usize, usize)>(shared: *mut c_void) {
    // SAFETY: `run` passes a pointer to this tuple, which nothing writes while the team runs.
    unsafe {
        let (team, threads, part) = &*shared.cast_const().cast::<(&Team, usize, F)>();
        let count = usize::try_from((team.threads)()).unwrap_or(1).clamp(1, *threads);
        let this = usize::try_from((team.thread)()).unwrap_or(0);
        if this < count {
            part(this, count);
        }
    }
}
