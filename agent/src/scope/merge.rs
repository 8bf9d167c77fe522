//! What the kernel programs counted and what the log tells, made one.
//!
//! A drain's sightings wait for [`ROUNDS`] drains, so that the probe has written its lines about them, and leave with what
//! these say. A line that comes later is counted off all the same, and leaves as a record that counts nothing and says who
//! else saw it. A line for which nothing was counted is a connection that only the probe saw, unless it is of a time whose
//! counts are forgotten and at which everything was counted.
//!
//! **Nothing is counted twice.** A line is either set against a connection that was counted, each of which takes one line; or it
//! lies where everything was counted, and nobody knows the counts any more; or nothing near its time was counted for its flow.
//! The log is read before the kernel's counts are, so what a line tells of has been counted by then.
//!
//! What leaves keeps the order of the drains: the position of the log goes on with it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use flow::{
    record::{Direction, Outcome, Protocol},
    time::Timestamp,
    wire::Window,
};

use super::{
    account::{Accounts, Key, Lot, Place, When},
    coverage::{Coverage, Span},
    groups::{Groups, together},
    pair::{Paired, Pairs},
    queue::{Queue, ROUNDS},
    told::{Boot, Moment, Process, SAME_EVENT_NS, Told, Tracked},
};
use crate::{
    capture::{Clock, Event, Observation},
    resolve::Sighting,
};

/// Drains after which old counts are looked for.
const SWEEP: u64 = 16;

/// What the log tells of a sighting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FromLog {
    /// Whether nobody else saw it.
    pub is_alone: bool,
    /// The name that the host has for the probe, if it can be one.
    pub host: Option<Arc<str>>,
    /// The process, if the probe saw a socket.
    pub process: Option<Process>,
    /// The server behind the address that the client called, if the node translated it.
    pub backend: Option<SocketAddr>,
    /// Whether this was long enough ago for the cluster's objects to be known.
    pub is_old: bool,
}

/// A drain, as far as merging is concerned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    /// Counts drains, from 1.
    pub(super) number: u64,
    /// From the last drain to this one.
    pub(super) window: Window,
    /// Read after the drain.
    pub(super) clock: Clock,
    /// Whether everything was counted.
    pub(super) is_complete: bool,
    /// Whether there will be no other.
    pub(super) is_last: bool,
}

/// What became of lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Set against a connection that was counted.
    pub(super) merged: u64,
    /// Of a time at which everything was counted.
    pub(super) covered: u64,
    /// Of connections that only the probe saw.
    pub(super) alone: u64,
    /// Of connections that the node passes on.
    pub(super) passed_on: u64,
    /// Of connections that were only tracked, and that there was no room for.
    pub(super) left_out: u64,
}

/// Merges.
#[derive(Debug)]
pub(super) struct Merger {
    accounts: Accounts,
    coverage: Coverage,
    /// Of the last boot that was told of, if that is not this one.
    earlier: Coverage,
    queue: Queue,
    pairs: Pairs,
    /// When this process began to count.
    began_ns: u64,
    /// The end of the last drain's window.
    drained_ns: Option<u64>,
}

impl Merger {
    /// `counted` are the spans of this boot and of the one before in which everything was counted.
    pub(super) fn new([this, earlier]: [Vec<Span>; 2]) -> Self {
        Self {
            accounts: Accounts::default(),
            coverage: Coverage::new(this),
            earlier: Coverage::new(earlier),
            queue: Queue::default(),
            pairs: Pairs::default(),
            began_ns: 0,
            drained_ns: None,
        }
    }

    /// Takes in a drain, and lines that were read before it; returns the sightings that need not wait any longer. `is_here`
    /// says whether an address is of this node.
    pub(super) fn merge(
        &mut self,
        round: Round,
        sightings: Vec<Sighting>,
        told: Vec<Told>,
        is_here: &dyn Fn(IpAddr, Timestamp) -> bool,
    ) -> (Vec<Sighting>, Counts) {
        self.count(round, sightings);
        let mut counts = Counts::default();
        for (since, paired) in self.pairs.pair(round.number, told, round.is_last) {
            let mut groups = Groups::default();
            for paired in paired {
                self.place_socket(round, paired, &mut groups, &mut counts);
            }
            self.queue.add(since, groups.into_sightings());
        }
        counts.left_out = self.pairs.take_left_out();
        // No line about their sockets has come.
        let is_due = |since| round.is_last || round.number >= since + ROUNDS;
        for (since, tracked) in self.pairs.take(is_due) {
            let mut groups = Groups::default();
            self.place_tracked(round, tracked, is_here, &mut groups, &mut counts);
            self.queue.add(since, groups.into_sightings());
        }
        if self.accounts.is_full() || round.number.is_multiple_of(SWEEP) {
            self.accounts.forget_old(round.clock.monotonic_ns());
        }
        let released = self.queue.release(round.number, round.is_last);
        (released, counts)
    }

    /// The first drain of which something waits.
    pub(super) fn oldest(&self) -> Option<u64> {
        let oldest = [self.pairs.oldest(), self.queue.oldest()];
        oldest.into_iter().flatten().min()
    }

    /// When everything was counted, in this boot.
    pub(super) fn counted(&self) -> Vec<Span> {
        self.coverage.spans()
    }

    fn count(&mut self, round: Round, sightings: Vec<Sighting>) {
        let clock = &round.clock;
        let drained_ns = clock.monotonic_of(round.window.to);
        let from = self.drained_ns.unwrap_or_else(|| {
            // The search for what was open before has ended here.
            clock.monotonic_of(round.window.from)
        });
        let is_first = self.drained_ns.is_none();
        if is_first {
            self.began_ns = from;
        }
        if round.is_complete && drained_ns > from {
            self.coverage.add(Span {
                from,
                to: drained_ns,
            });
        }
        self.drained_ns = Some(drained_ns.max(from));
        for (index, sighting) in sightings.iter().enumerate() {
            let seen = &sighting.observation;
            let Some(key) = key_of(seen).filter(|_| seen.count > 0) else {
                continue;
            };
            let first_ns = clock.monotonic_of(seen.first_seen);
            let lot = Lot {
                // What was open at the start may have begun at any time before.
                first_ns: if is_first && first_ns <= from {
                    0
                } else {
                    first_ns
                },
                last_ns: clock.monotonic_of(seen.last_seen),
                left: seen.count,
                pid: seen.pid,
                sighting: Some(Place {
                    round: round.number,
                    index,
                }),
            };
            self.accounts.add(key, lot, sighting);
        }
        self.queue.push(round.number, sightings);
    }

    fn place_socket(
        &mut self,
        round: Round,
        Paired { socket, backend }: Paired,
        groups: &mut Groups,
        counts: &mut Counts,
    ) {
        let from_log = FromLog {
            is_alone: false,
            host: socket.at.host,
            process: Some(socket.process),
            backend,
            is_old: false,
        };
        let at = At {
            time: socket.at.time,
            boot: socket.at.boot,
        };
        if self.is_counted(&[socket.key], at, &from_log, groups, counts) {
            return;
        }
        if self.pairs.was_placed(&socket.key) {
            counts.merged += 1;
            return;
        }
        counts.alone += 1;
        groups.add_alone(socket.key, at.time, round.clock.now(), from_log);
    }

    fn place_tracked(
        &mut self,
        round: Round,
        tracked: Tracked,
        is_here: &dyn Fn(IpAddr, Timestamp) -> bool,
        groups: &mut Groups,
        counts: &mut Counts,
    ) {
        let Tracked {
            client,
            called,
            server,
            masked,
            at: Moment { host, time, boot },
        } = tracked;
        let from_log = FromLog {
            is_alone: false,
            host,
            process: None,
            backend: (called != server).then_some(server),
            is_old: false,
        };
        let keys = [
            Key {
                direction: Direction::Egress,
                local: client.ip(),
                remote: called.ip(),
                port: called.port(),
                client_port: client.port(),
            },
            Key {
                direction: Direction::Ingress,
                local: server.ip(),
                remote: masked.ip(),
                port: server.port(),
                client_port: masked.port(),
            },
        ];
        let at = At { time, boot };
        if self.is_counted(&keys, at, &from_log, groups, counts) {
            return;
        }
        // The probe lists at its start what has been open for long. Its time is no more than that of the line, so that it
        // cannot show that nobody has counted.
        if let Boot::This(when) = at.boot
            && self.coverage.contains(when.ns)
        {
            counts.covered += 1;
            return;
        }
        // A node sees those that its pods open, and those that come to its pods from elsewhere.
        let is_ours = is_here(client.ip(), time);
        let comes_in = !is_ours && is_here(server.ip(), time);
        if masked != client && !is_ours && !comes_in {
            // What comes by a node port, and goes on to another node in this one's name. That is what its server sees.
            counts.passed_on += 1;
            return;
        }
        let key = keys[usize::from(comes_in)];
        counts.alone += 1;
        groups.add_alone(key, at.time, round.clock.now(), from_log);
    }

    /// Sets a line against what was counted under one of these keys, or says that it was counted without being known.
    fn is_counted(
        &mut self,
        keys: &[Key],
        at: At,
        from_log: &FromLog,
        groups: &mut Groups,
        counts: &mut Counts,
    ) -> bool {
        let mut when = match at.boot {
            Boot::This(when) => when,
            Boot::Earlier(ns) => {
                let is_covered = ns.is_some_and(|ns| self.earlier.contains(ns));
                counts.covered += u64::from(is_covered);
                return is_covered;
            }
        };
        if when.ns <= self.began_ns {
            // What an earlier process counted. Its time decides: nothing of that is known any more.
            if self.coverage.contains(when.ns) {
                counts.covered += 1;
                return true;
            }
            // What nobody counted, but for those that were open at the start: what came later has lines of its own.
            when.early_ns = when.early_ns.min(SAME_EVENT_NS);
        }
        for key in keys {
            if self.take(key, when, at.time, from_log, groups) {
                counts.merged += 1;
                return true;
            }
        }
        let is_covered = self.accounts.has_forgotten(when) && self.coverage.contains(when.ns);
        counts.covered += u64::from(is_covered);
        is_covered
    }

    fn take(
        &mut self,
        key: &Key,
        when: When,
        time: Timestamp,
        from_log: &FromLog,
        groups: &mut Groups,
    ) -> bool {
        let pid = from_log.process.as_ref().map_or(0, |process| process.pid);
        let found = [*key, together(*key)]
            .into_iter()
            .find(|key| self.accounts.has(key, when));
        let Some(taken) = found.and_then(|key| self.accounts.take(&key, when, pid)) else {
            return false;
        };
        let queue = &mut self.queue;
        let is_waiting = (taken.sighting).is_some_and(|place| queue.share(place, from_log));
        if is_waiting {
            return true;
        }
        groups.add_late(*key, time, taken.like, from_log);
        true
    }
}

/// When a line's connection was.
#[derive(Clone, Copy)]
struct At {
    time: Timestamp,
    boot: Boot,
}

fn key_of(seen: &Observation) -> Option<Key> {
    let direction = match seen.event {
        Event::Connect(Outcome::Established) => Direction::Egress,
        Event::Accept => Direction::Ingress,
        Event::Connect(Outcome::Failed) => return None,
    };
    (seen.protocol == Protocol::Tcp).then_some(Key {
        direction,
        local: seen.local,
        remote: seen.remote,
        port: seen.port,
        client_port: seen.client_port,
    })
}

#[cfg(test)]
mod tests;
