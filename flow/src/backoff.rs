//! How long to wait before the next attempt.

use std::time::Duration;

use rand::Rng;

const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(30);

/// Exponential backoff with jitter: each wait is drawn between half and all of a bound that doubles from half a second to
/// half a minute, so that the agents of a cluster do not come back in step after a server was away.
#[derive(Debug)]
pub struct Backoff {
    bound: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { bound: FIRST }
    }
}

impl Backoff {
    /// After a success.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// The next wait.
    pub fn next(&mut self, random: &mut impl Rng) -> Duration {
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
        let mut backoff = Backoff::default();
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

    /// Who has lost the same generator in the same moment does not come back in the same.
    #[test]
    fn no_two_wait_alike() {
        let mut random = rand::rng();
        let waits: std::collections::BTreeSet<Duration> = (0..100)
            .map(|_| Backoff::default().next(&mut random))
            .collect();
        assert!(waits.len() > 90, "{waits:?}");
        let spread = *waits.last().unwrap() - *waits.first().unwrap();
        assert!(spread > FIRST / 4, "{spread:?}");
    }
}
