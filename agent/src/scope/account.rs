//! Connections that the kernel programs counted, until lines of the log are set against them.
//!
//! The kernel programs count by flow and do not keep the client's port, so a line is not looked for but counted off: each
//! takes one from a count of its flow that lies near its time. A connect has one time, so that is the nearest count, in whatever
//! order lines come. An accept comes after what was counted, by any delay, so that is the oldest: of a server that is always
//! late, the nearest would leave the first connections over, and in the end the last lines. Which of several equal connections
//! a line takes makes no difference to any sum.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
};

use flow::record::Direction;

use crate::resolve::Sighting;

/// How long counts are kept, in nanoseconds: how late a line may come and still be told from one that the kernel programs
/// did not count. Later ones count as counted if everything was counted at their time.
const KEPT_NS: u64 = 600_000_000_000;

/// The most counts that are kept; each takes 56 bytes. When there are more the oldest go, as if more time had passed.
const MAX_LOTS: usize = 65_536;

/// The most flows; each takes half a KiB.
const MAX_ACCOUNTS: usize = 16_384;

/// Counts of a flow that are kept apart, the newest; those before are added up.
const FINE: usize = 4;

/// Over at most so many nanoseconds.
const COARSE_NS: u64 = 10_000_000_000;

/// A flow as a socket has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) direction: Direction,
    pub(super) local: IpAddr,
    pub(super) remote: IpAddr,
    /// The server's.
    pub(super) port: u16,
    /// 0 where connections from many ports were counted together.
    pub(super) client_port: u16,
}

/// A time, and how far from it what belongs to it may have been counted; in nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct When {
    pub(super) ns: u64,
    /// How much later than this time.
    pub(super) early_ns: u64,
    /// How much earlier.
    pub(super) late_ns: u64,
    /// Whether it comes after what was counted, as far as can be told.
    pub(super) is_delayed: bool,
}

/// Connections of a flow that were counted in one drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lot {
    pub(super) first_ns: u64,
    pub(super) last_ns: u64,
    /// Those that no line was set against.
    pub(super) left: u64,
    pub(super) pid: u32,
    /// Which sighting it is; absent once several lots are one.
    pub(super) sighting: Option<Place>,
}

/// A sighting: its drain, and its place among those of the drain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) round: u64,
    pub(super) index: usize,
}

/// Where a line belongs.
#[derive(Debug, PartialEq)]
pub(super) struct Taken<'a> {
    pub(super) sighting: Option<Place>,
    /// The flow's last sighting.
    pub(super) like: &'a Sighting,
}

/// The counts by flow.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    by_key: HashMap<Key, Account>,
    lots: usize,
    /// What was counted before may be forgotten.
    horizon_ns: u64,
}

#[derive(Debug)]
struct Account {
    like: Sighting,
    /// By age.
    lots: VecDeque<Lot>,
}

impl Accounts {
    pub(super) fn add(&mut self, key: Key, lot: Lot, like: &Sighting) {
        let account = self.by_key.entry(key).or_insert_with(|| Account {
            like: like.clone(),
            lots: VecDeque::new(),
        });
        account.like.clone_from(like);
        account.lots.push_back(lot);
        self.lots += 1;
        self.lots -= account.settle();
    }

    /// Whether [`take`](Self::take) finds one.
    pub(super) fn has(&self, key: &Key, when: When) -> bool {
        let account = self.by_key.get(key);
        account.is_some_and(|account| account.lots.iter().any(|lot| lot.fits(when)))
    }

    /// Takes one connection of a flow that was counted near a time; of several that are as near the named process's.
    pub(super) fn take(&mut self, key: &Key, when: When, pid: u32) -> Option<Taken<'_>> {
        let account = self.by_key.get_mut(key)?;
        let fitting = account.lots.iter().enumerate();
        let found = fitting
            .filter(|(_, lot)| lot.fits(when))
            .min_by_key(|(place, lot)| {
                let distance = lot.distance(when);
                let is_other = pid == 0 || lot.pid != pid;
                if when.is_delayed && lot.first_ns <= when.ns {
                    (false, 0, is_other, *place)
                } else {
                    (when.is_delayed, distance, is_other, *place)
                }
            });
        let found = found.map(|(place, _)| place);
        let lot = account.lots.get_mut(found?)?;
        lot.left -= 1;
        Some(Taken {
            sighting: lot.sighting,
            like: &account.like,
        })
    }

    /// Whether what was counted at a time may be forgotten.
    pub(super) fn has_forgotten(&self, when: When) -> bool {
        when.ns.saturating_sub(when.late_ns) < self.horizon_ns
    }

    /// Forgets what is older than it need be.
    pub(super) fn forget_old(&mut self, now_ns: u64) {
        let mut kept_ns = KEPT_NS;
        loop {
            let horizon = now_ns.saturating_sub(kept_ns).max(self.horizon_ns);
            self.horizon_ns = horizon;
            self.by_key.retain(|_, account| {
                account.lots.retain(|lot| lot.last_ns >= horizon);
                !account.lots.is_empty()
            });
            let lots = self.by_key.values().map(|account| account.lots.len());
            self.lots = lots.sum();
            if !self.is_full() || kept_ns == 0 {
                return;
            }
            kept_ns /= 2;
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.lots > MAX_LOTS || self.by_key.len() > MAX_ACCOUNTS
    }
}

impl Lot {
    fn fits(&self, when: When) -> bool {
        self.left > 0
            && self.first_ns <= when.ns.saturating_add(when.early_ns)
            && when.ns <= self.last_ns.saturating_add(when.late_ns)
    }

    fn distance(&self, when: When) -> u64 {
        let before = self.first_ns.saturating_sub(when.ns);
        before.max(when.ns.saturating_sub(self.last_ns))
    }
}

impl Account {
    /// Adds the count that is new no longer to the one before, if that is near. Returns how many fewer there are.
    fn settle(&mut self) -> usize {
        let Some(at) = self.lots.len().checked_sub(FINE + 1) else {
            return 0;
        };
        let new = self.lots[at];
        if new.left == 0 {
            self.lots.remove(at);
            return 1;
        }
        let Some(old) = at
            .checked_sub(1)
            .and_then(|before| self.lots.get_mut(before))
        else {
            return 0;
        };
        if old.pid != new.pid || new.last_ns.saturating_sub(old.first_ns) > COARSE_NS {
            return 0;
        }
        old.first_ns = old.first_ns.min(new.first_ns);
        old.last_ns = old.last_ns.max(new.last_ns);
        old.left += new.left;
        old.sighting = None;
        self.lots.remove(at);
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scope::samples::{SECOND, key, sighting};

    fn lot(second: u64, left: u64, pid: u32) -> Lot {
        Lot {
            first_ns: second * SECOND,
            last_ns: second * SECOND + SECOND / 2,
            left,
            pid,
            sighting: Some(Place {
                round: second,
                index: 0,
            }),
        }
    }

    fn at(second: u64) -> When {
        When {
            ns: second * SECOND,
            early_ns: SECOND,
            late_ns: 5 * SECOND,
            is_delayed: false,
        }
    }

    fn after(second: u64) -> When {
        When {
            is_delayed: true,
            ..at(second)
        }
    }

    fn round(taken: Option<Taken<'_>>) -> Option<u64> {
        Some(taken?.sighting?.round)
    }

    #[test]
    fn a_connect_takes_the_nearest_count_and_an_accept_the_oldest() {
        for (when, wanted) in [
            (at as fn(u64) -> When, [Some(12), Some(12), Some(10), None]),
            (after, [Some(10), Some(12), Some(12), None]),
        ] {
            let mut accounts = Accounts::default();
            for (second, count) in [(10, 1), (12, 2), (30, 1)] {
                accounts.add(key(80), lot(second, count, 7), &sighting(80, count));
            }
            assert_eq!(round(accounts.take(&key(81), when(12), 7)), None);
            let taken = [0; 4].map(|_| round(accounts.take(&key(80), when(12), 7)));
            assert_eq!(taken, wanted);
            assert_eq!(
                round(accounts.take(&key(80), when(28), 7)),
                None,
                "too early"
            );
            assert_eq!(round(accounts.take(&key(80), when(29), 7)), Some(30));
        }
    }

    #[test]
    fn of_counts_as_near_a_process_s_own_comes_first() {
        let mut accounts = Accounts::default();
        for (index, pid) in [(0, 7), (1, 8)] {
            let mut lot = lot(10, 1, pid);
            lot.sighting = Some(Place { round: 10, index });
            accounts.add(key(80), lot, &sighting(80, 1));
        }
        let mut take = |pid| {
            let taken = accounts.take(&key(80), at(10), pid)?;
            Some(taken.sighting?.index)
        };
        assert_eq!([take(8), take(8), take(8)], [Some(1), Some(0), None]);
    }

    #[test]
    fn what_is_older_is_added_up_and_no_count_is_lost() {
        let mut accounts = Accounts::default();
        for second in 0..300 {
            accounts.add(key(80), lot(second, 2, 7), &sighting(80, 2));
        }
        assert!(accounts.lots < 300 / 8, "{}", accounts.lots);
        for second in 0..300 {
            for _ in 0..2 {
                assert!(accounts.take(&key(80), after(second + 3), 7).is_some());
            }
        }
        assert_eq!(accounts.take(&key(80), at(299), 7), None);
    }

    #[test]
    fn it_grows_no_larger_than_it_may() {
        let mut accounts = Accounts::default();
        for second in 0..200 {
            for port in 1..400 {
                accounts.add(key(port), lot(second, 1, second as u32), &sighting(port, 1));
            }
            if accounts.is_full() {
                accounts.forget_old(second * SECOND);
            }
            assert!(accounts.lots <= MAX_LOTS);
        }
        assert!(accounts.has_forgotten(at(1)) && !accounts.has_forgotten(at(199)));
        accounts.forget_old(10_000 * SECOND);
        assert_eq!((accounts.lots, accounts.by_key.len()), (0, 0));
    }
}
