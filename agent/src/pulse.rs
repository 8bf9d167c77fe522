//! Whether capturing goes on.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// A drain takes milliseconds and comes once a second. One that waits longer than this hangs, or who takes the results
/// does.
const LONGEST: Duration = Duration::from_secs(10);

/// When the kernel's maps were drained last. Copies are the same pulse.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<Mutex<Option<Instant>>>);

impl Pulse {
    /// The maps have been drained.
    pub fn beat(&self) {
        self.set(Some(Instant::now()));
    }

    /// They are not drained any more.
    pub fn stop(&self) {
        self.set(None);
    }

    /// Whether they were drained lately.
    #[must_use]
    pub fn is_beating(&self) -> bool {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|last| last.elapsed() < LONGEST)
    }

    fn set(&self, last: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = last;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_beats_from_the_first_drain_to_the_last() {
        let pulse = Pulse::default();
        assert!(!pulse.is_beating());
        let same = pulse.clone();
        same.beat();
        assert!(pulse.is_beating());
        pulse.set(Instant::now().checked_sub(LONGEST));
        assert!(!pulse.is_beating());
        pulse.beat();
        same.stop();
        assert!(!pulse.is_beating());
    }
}
