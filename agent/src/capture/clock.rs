//! From the kernel's monotonic clock to the time of day.

use std::time::{Duration, SystemTime};

use flow::time::Timestamp;
use nix::time::{ClockId, clock_gettime};

/// One reading of the clocks. The kernel programs stamp with `CLOCK_MONOTONIC`, which never jumps; the time of day is
/// laid over it anew at each drain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    monotonic_ns: u64,
    /// How long the machine has slept since its boot: so far is `CLOCK_BOOTTIME` ahead.
    slept_ns: u64,
    now: Timestamp,
}

/// `CLOCK_MONOTONIC` in nanoseconds, as the kernel programs read it.
pub(super) fn monotonic_ns() -> nix::Result<u64> {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

fn nanoseconds(clock: ClockId) -> nix::Result<u64> {
    let time = Duration::from(clock_gettime(clock)?);
    Ok(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

impl Clock {
    pub(crate) fn read() -> nix::Result<Self> {
        // In this order: what passes between two readings must not look like sleep.
        let boot_ns = nanoseconds(ClockId::CLOCK_BOOTTIME)?;
        let monotonic_ns = monotonic_ns()?;
        Ok(Self {
            monotonic_ns,
            slept_ns: boot_ns.saturating_sub(monotonic_ns),
            now: Timestamp::from(SystemTime::now()),
        })
    }

    /// What was read, or is to be taken for it.
    #[cfg(test)]
    pub(crate) fn new(monotonic_ns: u64, now: Timestamp) -> Self {
        Self {
            monotonic_ns,
            slept_ns: 0,
            now,
        }
    }

    /// The same of a machine that has slept so long.
    #[cfg(test)]
    pub(crate) fn after_sleep(self, slept_ns: u64) -> Self {
        Self { slept_ns, ..self }
    }

    /// `CLOCK_MONOTONIC` in nanoseconds at this reading.
    pub(crate) fn monotonic_ns(&self) -> u64 {
        self.monotonic_ns
    }

    /// How long the machine has slept since its boot, in nanoseconds.
    pub(crate) fn slept_ns(&self) -> u64 {
        self.slept_ns
    }

    /// When the system was started.
    pub(crate) fn booted(&self) -> Timestamp {
        let ago_ns = self.monotonic_ns.saturating_add(self.slept_ns);
        self.now.saturating_sub(Duration::from_nanos(ago_ns))
    }

    /// The time of day of this reading.
    pub(crate) fn now(&self) -> Timestamp {
        self.now
    }

    /// Nanoseconds of `CLOCK_MONOTONIC` at a time of day.
    pub(crate) fn monotonic_of(&self, time: Timestamp) -> u64 {
        let (time, now) = (time.as_nanos(), self.now.as_nanos());
        if time > now {
            self.monotonic_ns.saturating_add(time - now)
        } else {
            self.monotonic_ns.saturating_sub(now - time)
        }
    }

    /// The time of day at `monotonic_ns` nanoseconds of `CLOCK_MONOTONIC`, if the machine has not slept since; else it is
    /// earlier, by [`Self::slept_ns`] at most.
    pub(crate) fn at(&self, monotonic_ns: u64) -> Timestamp {
        // A program may have run after this reading: such a time lies in the future of it by microseconds.
        if monotonic_ns > self.monotonic_ns {
            self.now
                .saturating_add(Duration::from_nanos(monotonic_ns - self.monotonic_ns))
        } else {
            self.now
                .saturating_sub(Duration::from_nanos(self.monotonic_ns - monotonic_ns))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_keeps_its_distance_from_the_reading() {
        let clock = Clock::new(5_000, Timestamp::from_nanos(1_000_000));
        assert_eq!(clock.at(4_000), Timestamp::from_nanos(999_000));
        assert_eq!(clock.at(5_500), Timestamp::from_nanos(1_000_500));
        for monotonic_ns in [4_000, 5_000, 5_500] {
            assert_eq!(clock.monotonic_of(clock.at(monotonic_ns)), monotonic_ns);
        }
    }

    /// `CLOCK_MONOTONIC` stands still while the machine sleeps, the time of day does not.
    #[test]
    fn what_was_stamped_before_a_suspend_stays_in_its_window() {
        const HOUR: u64 = 3_600_000_000_000;
        let drained = Clock::new(5_000, Timestamp::from_nanos(HOUR));
        // Stamped, drained in vain because the machine slept for an hour, and drained.
        let after = Clock::new(7_000, Timestamp::from_nanos(2 * HOUR + 2_000));
        let dated = after.at(6_000);
        assert!(drained.now() <= dated && dated <= after.now());
        // What came after it is dated right.
        assert_eq!(after.at(6_500), Timestamp::from_nanos(2 * HOUR + 1_500));
    }
}
