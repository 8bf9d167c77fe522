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
    collections::{HashMap, HashSet, VecDeque},
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
    told::{Boot, Moment, Process, SAME_EVENT_NS, Socket, Told, Tracked},
};
use crate::{
    capture::{Clock, Event, Observation},
    resolve::Sighting,
};

/// How many drains a sighting waits for its lines. The probe writes them within some hundred milliseconds.
const ROUNDS: u64 = 2;

/// Sightings, and connections that were only tracked, that may wait; what comes when there are as many waits for nothing.
const MAX_WAITING: usize = 65_536;

/// Clients that are remembered twice over, to know what was tracked for one whose own line was read.
const MAX_CLIENTS: usize = 16_384;

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

/// How old a connection is whose pods the API has told of.
const OLD_NS: u64 = 60_000_000_000;

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
}

/// Merges.
#[derive(Debug)]
pub(super) struct Merger {
    accounts: Accounts,
    coverage: Coverage,
    /// Of the last boot that was told of, if that is not this one.
    earlier: Coverage,
    batches: VecDeque<Batch>,
    waiting: usize,
    tracked: HashMap<SocketAddr, (u64, Tracked)>,
    /// The clients of lines about sockets, lately and before.
    clients: [HashSet<SocketAddr>; 2],
    /// When this process began to count.
    began_ns: u64,
    /// The end of the last drain's window.
    drained_ns: Option<u64>,
}

/// What came of one drain.
#[derive(Debug)]
struct Batch {
    round: u64,
    seen: Vec<Seen>,
    /// What only the log tells, and what it tells late.
    told: Vec<Sighting>,
}

/// A sighting of the kernel programs.
#[derive(Debug)]
struct Seen {
    sighting: Sighting,
    /// Lines that were set against it, by the server that they name.
    shares: Vec<(FromLog, u64)>,
}

/// Connections that become one record.
#[derive(PartialEq, Eq, Hash)]
struct Group {
    key: Key,
    backend: Option<SocketAddr>,
    is_late: bool,
    /// Addresses change hands.
    second: u64,
}

impl Merger {
    /// `counted` are the spans of this boot and of the one before in which everything was counted.
    pub(super) fn new([this, earlier]: [Vec<Span>; 2]) -> Self {
        Self {
            accounts: Accounts::default(),
            coverage: Coverage::new(this),
            earlier: Coverage::new(earlier),
            batches: VecDeque::new(),
            waiting: 0,
            tracked: HashMap::new(),
            clients: Default::default(),
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
        let mut groups = HashMap::new();
        let told = self.pair_tracked(round, told);
        for socket in told {
            self.place_socket(round, socket, &mut groups, &mut counts);
        }
        for (since, tracked) in self.due_tracked(round) {
            // Those of one drain leave with it.
            let mut groups = HashMap::new();
            self.place_tracked(round, tracked, is_here, &mut groups, &mut counts);
            self.leave(since, groups);
        }
        self.leave(round.number, groups);
        if self.accounts.is_full() || round.number.is_multiple_of(SWEEP) {
            self.accounts.forget_old(round.clock.monotonic_ns());
        }
        (self.release(round), counts)
    }

    /// The first drain of which something waits.
    pub(super) fn oldest(&self) -> Option<u64> {
        let tracked = self.tracked.values().map(|(round, _)| *round).min();
        let batch = self.batches.front().map(|batch| batch.round);
        tracked.into_iter().chain(batch).min()
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
        self.waiting += sightings.len();
        let seen = sightings.into_iter().map(|sighting| Seen {
            sighting,
            shares: Vec::new(),
        });
        self.batches.push_back(Batch {
            round: round.number,
            seen: seen.collect(),
            told: Vec::new(),
        });
    }

    /// Sets apart what was only tracked; the others are told which server is behind the address that they called. What was
    /// tracked comes shortly before the line about the socket, or shortly after it.
    fn pair_tracked(&mut self, round: Round, told: Vec<Told>) -> Vec<(Socket, Option<SocketAddr>)> {
        let mut sockets = Vec::with_capacity(told.len());
        for told in told {
            match told {
                Told::Socket(socket) => sockets.push((socket, None)),
                Told::Tracked(tracked) if self.knows(tracked.client) => {}
                Told::Tracked(tracked) => {
                    if self.tracked.len() < MAX_WAITING {
                        self.tracked.insert(tracked.client, (round.number, tracked));
                    }
                }
            }
        }
        for (socket, backend) in &mut sockets {
            let Key {
                direction,
                local,
                remote,
                port,
                client_port,
            } = socket.key;
            let (client, server) = match direction {
                Direction::Egress => (local, remote),
                Direction::Ingress => (remote, local),
            };
            let client = SocketAddr::new(client, client_port);
            let server = SocketAddr::new(server, port);
            self.remember(client);
            // Both ends of one connection may be here: the first of their lines must leave it to the other.
            if let Some((_, tracked)) = self.tracked.get(&client)
                && direction == Direction::Egress
                && tracked.called == server
                && tracked.server != server
            {
                *backend = Some(tracked.server);
            }
        }
        for (socket, _) in &sockets {
            let client = match socket.key.direction {
                Direction::Egress => socket.key.local,
                Direction::Ingress => socket.key.remote,
            };
            let client = SocketAddr::new(client, socket.key.client_port);
            self.tracked.remove(&client);
        }
        sockets
    }

    fn knows(&self, client: SocketAddr) -> bool {
        self.clients.iter().any(|known| known.contains(&client))
    }

    fn remember(&mut self, client: SocketAddr) {
        if self.clients[0].len() >= MAX_CLIENTS {
            self.clients.swap(0, 1);
            self.clients[0].clear();
        }
        self.clients[0].insert(client);
    }

    fn place_socket(
        &mut self,
        round: Round,
        (socket, backend): (Socket, Option<SocketAddr>),
        groups: &mut HashMap<Group, Sighting>,
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
        alone(round, socket.key, at, from_log, groups, counts);
    }

    /// Connections that were tracked and of which no socket's line has come.
    fn due_tracked(&mut self, round: Round) -> Vec<(u64, Tracked)> {
        let is_due = |since: u64| round.is_last || round.number >= since + ROUNDS;
        let due = self.tracked.extract_if(|_, (since, _)| is_due(*since));
        let mut due: Vec<(u64, Tracked)> = due.map(|(_, tracked)| tracked).collect();
        due.sort_by_key(|(since, tracked)| (*since, tracked.at.time));
        due
    }

    fn place_tracked(
        &mut self,
        round: Round,
        tracked: Tracked,
        is_here: &dyn Fn(IpAddr, Timestamp) -> bool,
        groups: &mut HashMap<Group, Sighting>,
        counts: &mut Counts,
    ) {
        let Tracked {
            client,
            called,
            server,
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
                remote: client.ip(),
                port: server.port(),
                client_port: client.port(),
            },
        ];
        let at = At { time, boot };
        if self.is_counted(&keys, at, &from_log, groups, counts) {
            return;
        }
        // A node sees those that its pods open, and those that come to its pods from elsewhere.
        let comes_in = is_here(server.ip(), time) && !is_here(client.ip(), time);
        let key = keys[usize::from(comes_in)];
        alone(round, key, at, from_log, groups, counts);
    }

    /// Sets a line against what was counted under one of these keys, or says that it was counted without being known.
    fn is_counted(
        &mut self,
        keys: &[Key],
        at: At,
        from_log: &FromLog,
        groups: &mut HashMap<Group, Sighting>,
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
        groups: &mut HashMap<Group, Sighting>,
    ) -> bool {
        let pid = from_log.process.as_ref().map_or(0, |process| process.pid);
        let together = Key {
            client_port: 0,
            ..*key
        };
        let key = [*key, together]
            .into_iter()
            .find(|key| self.accounts.has(key, when));
        let Some(taken) = key.and_then(|key| self.accounts.take(&key, when, pid)) else {
            return false;
        };
        let batches = &mut self.batches;
        let waiting = taken.sighting.and_then(|place| {
            let first = batches.front()?.round;
            let batch = batches.get_mut(usize::try_from(place.round.checked_sub(first)?).ok()?)?;
            batch.seen.get_mut(place.index)
        });
        match waiting {
            Some(seen) => seen.share(from_log),
            None => {
                let group = Group {
                    key: together,
                    backend: None,
                    is_late: true,
                    second: 0,
                };
                let late = groups.entry(group).or_insert_with(|| {
                    let mut late = taken.like.clone();
                    late.observation.count = 0;
                    late.observation.connection = None;
                    late.observation.client_port = 0;
                    late.observation.first_seen = time;
                    late.observation.last_seen = time;
                    late.log = Some(Box::new(FromLog {
                        // What was called is what was reported, and stays.
                        backend: None,
                        ..from_log.clone()
                    }));
                    late
                });
                widen(late, time);
            }
        }
        true
    }

    /// Puts what was made of lines where it leaves with the sightings of its drain.
    fn leave(&mut self, round: u64, groups: HashMap<Group, Sighting>) {
        if groups.is_empty() {
            return;
        }
        let first = self.batches.front().map_or(round, |batch| batch.round);
        let index = usize::try_from(round.saturating_sub(first)).unwrap_or(0);
        let index = index.min(self.batches.len().saturating_sub(1));
        if let Some(batch) = self.batches.get_mut(index) {
            self.waiting += groups.len();
            let before = batch.told.len();
            batch.told.extend(groups.into_values());
            let new = &mut batch.told[before..];
            new.sort_by_key(|sighting| sighting.observation.last_seen);
            for sighting in new {
                sighting.round = batch.round;
            }
        }
    }

    fn release(&mut self, round: Round) -> Vec<Sighting> {
        let mut released = Vec::new();
        while let Some(batch) = self.batches.front() {
            let waits = round.number < batch.round + ROUNDS && self.waiting <= MAX_WAITING;
            if waits && !round.is_last {
                break;
            }
            let Some(batch) = self.batches.pop_front() else {
                break;
            };
            self.waiting -= batch.seen.len() + batch.told.len();
            for seen in batch.seen {
                seen.leave(&mut released);
            }
            released.extend(batch.told);
        }
        released
    }
}

/// When a line's connection was.
#[derive(Clone, Copy)]
struct At {
    time: Timestamp,
    boot: Boot,
}

impl Seen {
    fn share(&mut self, from_log: &FromLog) {
        let same = |(known, _): &&mut (FromLog, u64)| known.backend == from_log.backend;
        match self.shares.iter_mut().find(same) {
            Some((_, count)) => *count += 1,
            None => self.shares.push((from_log.clone(), 1)),
        }
    }

    /// One sighting for each server that lines name, and one for the rest.
    fn leave(mut self, released: &mut Vec<Sighting>) {
        for (from_log, count) in self.shares {
            let mut part = self.sighting.clone();
            let all = self.sighting.observation.count;
            part.log = Some(Box::new(from_log));
            if part.log.as_ref().is_some_and(|log| log.backend.is_none()) {
                self.sighting = part;
                continue;
            }
            part.observation.count = count.min(all);
            self.sighting.observation.count = all.saturating_sub(count);
            released.push(part);
            if self.sighting.observation.count == 0 {
                return;
            }
        }
        released.push(self.sighting);
    }
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

/// Adds a connection that only the probe saw.
fn alone(
    round: Round,
    key: Key,
    at: At,
    from_log: FromLog,
    groups: &mut HashMap<Group, Sighting>,
    counts: &mut Counts,
) {
    counts.alone += 1;
    let group = Group {
        key: Key {
            client_port: 0,
            ..key
        },
        backend: from_log.backend,
        is_late: false,
        second: at.time.as_nanos() / 1_000_000_000,
    };
    let sighting = groups.entry(group).or_insert_with(|| {
        let process = from_log.process.clone();
        let age = (round.clock.now().as_nanos()).saturating_sub(at.time.as_nanos());
        Sighting {
            observation: Observation {
                event: match key.direction {
                    Direction::Egress => Event::Connect(Outcome::Established),
                    Direction::Ingress => Event::Accept,
                },
                protocol: Protocol::Tcp,
                local: key.local,
                remote: key.remote,
                port: key.port,
                cgroup: 0,
                netns: 0,
                pid: process.as_ref().map_or(0, |process| process.pid),
                comm: process.map_or_else(String::new, |process| process.comm),
                client_port: 0,
                connection: None,
                count: 0,
                first_seen: at.time,
                last_seen: at.time,
            },
            owner: None,
            log: Some(Box::new(FromLog {
                is_alone: true,
                is_old: age > OLD_NS,
                ..from_log
            })),
            round: round.number,
        }
    });
    sighting.observation.count += 1;
    widen(sighting, at.time);
}

fn widen(sighting: &mut Sighting, time: Timestamp) {
    let seen = &mut sighting.observation;
    seen.first_seen = seen.first_seen.min(time);
    seen.last_seen = seen.last_seen.max(time);
}

#[cfg(test)]
mod tests;
