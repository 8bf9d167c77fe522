//! Records of what only the probe saw, and of what it tells late.

use std::{collections::HashMap, net::SocketAddr};

use flow::{
    record::{Direction, Outcome, Protocol},
    time::Timestamp,
};

use super::{account::Key, merge::FromLog};
use crate::{
    capture::{Event, Observation},
    resolve::Sighting,
};

/// How old a connection is whose pods the API has told of.
const OLD_NS: u64 = 60_000_000_000;

/// Sightings that are made of the lines of one drain.
#[derive(Debug, Default)]
pub(super) struct Groups(HashMap<Group, Sighting>);

/// What lines have in common that become one sighting.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Group {
    key: Key,
    backend: Option<SocketAddr>,
    is_late: bool,
    /// Addresses change hands.
    second: u64,
}

impl Groups {
    /// Adds a connection that only the probe saw.
    pub(super) fn add_alone(
        &mut self,
        key: Key,
        time: Timestamp,
        now: Timestamp,
        from_log: FromLog,
    ) {
        let group = Group {
            key: together(key),
            backend: from_log.backend,
            is_late: false,
            second: time.as_nanos() / 1_000_000_000,
        };
        let sighting = self.0.entry(group).or_insert_with(|| {
            let process = from_log.process.clone();
            let age = now.as_nanos().saturating_sub(time.as_nanos());
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
                    first_seen: time,
                    last_seen: time,
                },
                owner: None,
                log: Some(Box::new(FromLog {
                    is_alone: true,
                    is_old: age > OLD_NS,
                    ..from_log
                })),
                // It leaves with the drain that it is given to.
                round: 0,
            }
        });
        sighting.observation.count += 1;
        widen(sighting, time);
    }

    /// Adds that the probe saw a connection, too, that has been reported as one `like` this.
    pub(super) fn add_late(
        &mut self,
        key: Key,
        time: Timestamp,
        like: &Sighting,
        from_log: &FromLog,
    ) {
        let group = Group {
            key: together(key),
            backend: None,
            is_late: true,
            second: 0,
        };
        let late = self.0.entry(group).or_insert_with(|| {
            let mut late = like.clone();
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

    pub(super) fn into_sightings(self) -> impl Iterator<Item = Sighting> {
        self.0.into_values()
    }
}

/// Whatever the client's port.
pub(super) fn together(key: Key) -> Key {
    Key {
        client_port: 0,
        ..key
    }
}

fn widen(sighting: &mut Sighting, time: Timestamp) {
    let seen = &mut sighting.observation;
    seen.first_seen = seen.first_seen.min(time);
    seen.last_seen = seen.last_seen.max(time);
}
