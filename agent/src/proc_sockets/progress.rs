//! When it is time to say how far one is.

use std::time::{Duration, Instant};

/// From one message to the next; who is done sooner says nothing.
const INTERVAL: Duration = Duration::from_secs(2);

/// A clock that strikes every two seconds.
#[derive(Debug)]
pub struct Progress {
    next: Instant,
}

impl Progress {
    /// Starts now.
    #[must_use]
    pub fn start() -> Self {
        Self {
            next: Instant::now() + INTERVAL,
        }
    }

    /// Whether a message is due.
    pub fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let due = now >= self.next;
        if due {
            self.next = now + INTERVAL;
        }
        due
    }
}
