//! Watching a long run, and stopping it.
//!
//! A run that may take long takes an [`Observer`] and a [`CancelToken`], and makes a [`Ticker`] of them.
//! After each unit of work it calls [`Ticker::advance`] and obeys the answer. There are two ways to stop it,
//! and it does not matter to the run which was used:
//!
//! * the observer answers [`Flow::Stop`]: for decisions that depend on the progress (a time limit), on the
//!   run's own thread;
//! * someone cancels the token: from any thread, at any time (Ctrl-C, a closed connection).
//!
//! A run that was stopped returns what it has done so far: the tokens up to there, the last image estimate.
//! That is a result, not an error; it says in its own terms that it is unfinished.
//!
//! ```
//! use controlgen_core::progress::{CancelToken, Flow, Observer, Progress, Ticker};
//!
//! fn squares(n: u64, observer: &mut dyn Observer, cancel: &CancelToken) -> Vec<u64> {
//!     let mut ticker = Ticker::new("squares", Some(n), observer, cancel);
//!     let mut found = Vec::new();
//!     for i in 0..n {
//!         found.push(i * i);
//!         if ticker.advance(1) == Flow::Stop {
//!             break;
//!         }
//!     }
//!     found
//! }
//!
//! let mut five = |p: &Progress| if p.done < 5 { Flow::Continue } else { Flow::Stop };
//! assert_eq!(squares(100, &mut five, &CancelToken::new()).len(), 5);
//!
//! let cancel = CancelToken::new();
//! cancel.cancel();
//! assert_eq!(squares(100, &mut (), &cancel).len(), 1);
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Units of work done.
    pub done: u64,
    /// Units of work in all, where that is known: at most so many for a text, which may end earlier.
    pub total: Option<u64>,
    /// What a unit is, in the plural: `tokens`, `steps`, `bytes`.
    pub unit: &'static str,
    /// Time since the run began.
    pub elapsed: Duration,
}

impl Progress {
    /// Units a second so far; 0 before any time has passed.
    #[must_use]
    pub fn rate(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.done as f64 / seconds } else { 0.0 }
    }
}

/// Whether a run goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a run that ignores `Stop` cannot be stopped"]
pub enum Flow {
    /// Go on.
    Continue,
    /// Stop here, and return what there is.
    Stop,
}

/// Someone who is told how far a run is, after every unit of work, and may stop it.
///
/// Every closure `FnMut(&Progress) -> Flow` is one; so are `()`, which watches nothing, and a
/// [`CancelToken`].
pub trait Observer {
    /// Called on the run's thread: what it takes, the run takes.
    fn step(&mut self, progress: &Progress) -> Flow;
}

impl<F: FnMut(&Progress) -> Flow> Observer for F {
    fn step(&mut self, progress: &Progress) -> Flow {
        self(progress)
    }
}

impl Observer for () {
    fn step(&mut self, _progress: &Progress) -> Flow {
        Flow::Continue
    }
}

/// A switch that stops a run from another thread. Its clones are the same switch, and it stays thrown.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A switch that has not been thrown.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Throws it: runs that hold it stop after the unit of work they are at.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it has been thrown.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Observer for CancelToken {
    fn step(&mut self, _progress: &Progress) -> Flow {
        if self.is_cancelled() { Flow::Stop } else { Flow::Continue }
    }
}

/// A run's own count, which tells the observer and asks the token.
pub struct Ticker<'a> {
    observer: &'a mut dyn Observer,
    cancel: &'a CancelToken,
    began: Instant,
    done: u64,
    total: Option<u64>,
    unit: &'static str,
}

impl<'a> Ticker<'a> {
    /// Begins at 0 of `total` units, now.
    pub fn new(
        unit: &'static str,
        total: Option<u64>,
        observer: &'a mut dyn Observer,
        cancel: &'a CancelToken,
    ) -> Self {
        Self { observer, cancel, began: Instant::now(), done: 0, total, unit }
    }

    /// How far the run is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress { done: self.done, total: self.total, unit: self.unit, elapsed: self.began.elapsed() }
    }

    /// Counts `units` more, tells the observer, and says whether to go on.
    ///
    /// The observer is told even if the token was cancelled, so that it sees the last unit.
    pub fn advance(&mut self, units: u64) -> Flow {
        self.done = self.done.saturating_add(units);
        let flow = self.observer.step(&self.progress());
        if self.cancel.is_cancelled() { Flow::Stop } else { flow }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_one_switch_across_threads() {
        fn assert_send_sync<T: Send + Sync + 'static>() {}
        assert_send_sync::<CancelToken>();
        let token = CancelToken::new();
        let other = token.clone();
        std::thread::spawn(move || other.cancel()).join().unwrap();
        assert!(token.is_cancelled());
        assert!(!CancelToken::new().is_cancelled());
    }

    #[test]
    fn the_observer_sees_every_unit_even_the_last() {
        let cancel = CancelToken::new();
        let mut seen = Vec::new();
        let mut observer = |p: &Progress| {
            seen.push((p.done, p.total, p.unit));
            if p.done == 5 {
                cancel.cancel();
            }
            Flow::Continue
        };
        let mut ticker = Ticker::new("tokens", Some(9), &mut observer, &cancel);
        assert_eq!(ticker.advance(2), Flow::Continue);
        assert_eq!(ticker.advance(3), Flow::Stop);
        assert_eq!(ticker.progress().done, 5);
        assert_eq!(seen, [(2, Some(9), "tokens"), (5, Some(9), "tokens")]);
    }

    #[test]
    fn a_token_is_an_observer() {
        let (mut watched, never) = (CancelToken::new(), CancelToken::new());
        let handle = watched.clone();
        let mut ticker = Ticker::new("steps", None, &mut watched, &never);
        assert_eq!(ticker.advance(1), Flow::Continue);
        handle.cancel();
        assert_eq!(ticker.advance(1), Flow::Stop);
    }

    #[test]
    fn rate_is_units_over_seconds() {
        let progress = Progress { done: 6, total: None, unit: "steps", elapsed: Duration::from_millis(1500) };
        assert_eq!(progress.rate(), 4.0);
        assert_eq!(Progress { elapsed: Duration::ZERO, ..progress }.rate(), 0.0);
    }
}
