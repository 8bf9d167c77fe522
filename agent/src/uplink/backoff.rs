//! How long to wait before the next attempt.

use std::time::Duration;

use rand::Rng;

const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(30);

/// Exponential backoff with jitter: each wait is drawn between half and all of a bound that doubles, so that the agents of
/// a cluster do not come back in step after the generator was away.
#[derive(Debug)]
pub(super) struct Backoff {
    bound: Duration,
}

impl Backoff {
    pub(super) const fn new() -> Self {
        Self { bound: FIRST }
    }

    /// After a success.
    pub(super) fn reset(&mut self) {
        self.bound = FIRST;
    }

    /// The next wait.
    pub(super) fn next(&mut self, random: &mut impl Rng) -> Duration {
        let wait = random.random_range(self.bound / 2..=self.bound);
        self.bound = (self.bound * 2).min(LONGEST);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest_and_start_anew() {
        let mut random = rand::rng();
        let mut backoff = Backoff::new();
        let mut bound = FIRST;
        for _ in 0..20 {
            let wait = backoff.next(&mut random);
            assert!((bound / 2..=bound).contains(&wait), "{wait:?} of {bound:?}");
            bound = (bound * 2).min(LONGEST);
        }
        assert_eq!(bound, LONGEST);
        backoff.reset();
        assert!(backoff.next(&mut random) <= FIRST);
    }
}
