//! Turning gradients on for a part of the work.

use std::marker::PhantomData;

use tch::NoGradGuard;

/// Whether this thread records gradients now: whether what is computed from a leaf that requires them requires them too.
///
/// It costs some nanoseconds. To ask a result's `requires_grad` instead would mislead: a view of a leaf says yes even
/// under a guard.
pub fn is_recording() -> bool {
    crate::sys::is_recording()
}

/// Records gradients on this thread until it is dropped; then whatever held before holds again, after a panic too.
///
/// The rule of these crates: gradients are asked for. Searches and samplers run under [`tch::no_grad_guard`], and
/// what needs a gradient asks for this guard for just as long. A new thread starts with gradients on.
///
/// Guards are to be dropped in the reverse order of their making, which scopes do by themselves. Dropped in another
/// order, by `drop` or inside a structure, the last one dropped decides: it restores what held when it was made.
/// The guard belongs to its thread and cannot be sent to another:
///
/// ```compile_fail,E0277
/// fn send<T: Send>() {}
/// send::<controlgen_core::EnableGrad>();
/// ```
///
/// ```
/// let _inference = tch::no_grad_guard();
/// let x = tch::Tensor::ones([2], tch::kind::FLOAT_CPU).set_requires_grad(true);
/// assert!(!(&x * 2.0).requires_grad());
/// {
///     let _gradients = controlgen_core::EnableGrad::new();
///     assert!((&x * 2.0).requires_grad());
/// }
/// assert!(!(&x * 2.0).requires_grad());
/// ```
#[must_use = "gradients are recorded for as long as the guard lives: bind it to a name, not to `_`"]
pub struct EnableGrad {
    _before: NoGradGuard,
    _this_thread: PhantomData<*const ()>,
}

impl EnableGrad {
    /// Records gradients from now on.
    pub fn new() -> Self {
        // tch's guard restores, when dropped, the mode in which it was made. One made here is kept to restore what
        // holds now; one made inside `with_grad` turns gradients on when it is dropped, which is at once. tch has a
        // closure for this, but a panic inside it would leave the mode as it is.
        let before = tch::no_grad_guard();
        drop(tch::with_grad(tch::no_grad_guard));
        Self { _before: before, _this_thread: PhantomData }
    }
}

impl Default for EnableGrad {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Tensor, kind::FLOAT_CPU};

    fn recording() -> bool {
        let recorded = (Tensor::ones([1], FLOAT_CPU).set_requires_grad(true) * 2.0).requires_grad();
        assert_eq!(is_recording(), recorded);
        recorded
    }

    #[test]
    fn it_turns_gradients_on_and_restores() {
        assert!(recording(), "a new thread starts with gradients on");
        {
            let _on = EnableGrad::new();
            assert!(recording());
        }
        assert!(recording(), "they were on before");
        let _off = tch::no_grad_guard();
        {
            let _on = EnableGrad::new();
            assert!(recording());
            {
                let _off = tch::no_grad_guard();
                assert!(!recording());
                let _on = EnableGrad::new();
                assert!(recording());
            }
            assert!(recording());
        }
        assert!(!recording());
    }

    #[test]
    fn it_restores_after_a_panic() {
        let _off = tch::no_grad_guard();
        let panicked = std::panic::catch_unwind(|| {
            let _on = EnableGrad::new();
            assert!(!recording(), "this panics");
        });
        assert!(panicked.is_err());
        assert!(!recording());
    }

    #[test]
    fn another_thread_is_another_mode() {
        let _off = tch::no_grad_guard();
        let _on = EnableGrad::new();
        std::thread::spawn(|| {
            let _off = tch::no_grad_guard();
            assert!(!recording());
        })
        .join()
        .unwrap();
        assert!(recording());
    }

    #[test]
    fn out_of_order_the_last_dropped_decides() {
        let off = tch::no_grad_guard(); // restores: on
        let on = EnableGrad::new(); // restores: off
        drop(off);
        assert!(recording());
        drop(on);
        assert!(!recording(), "as documented");
    }
}
