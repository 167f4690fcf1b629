//! LibTorch's gradient mode, which tch sets but does not tell.

/// Whether this thread records gradients.
pub(crate) fn is_recording() -> bool {
    // SAFETY: the function has no preconditions. It sets a flag of this thread and gives what it was; the second call
    // puts that back, and nothing runs on this thread in between.
    unsafe {
        let before = torch_sys::at_grad_set_enabled(0);
        torch_sys::at_grad_set_enabled(before);
        before != 0
    }
}
