//! What several tests make their cases of.

use flow::{
    record::{Direction, Outcome, Protocol},
    time::Timestamp,
};

use super::account::Key;
use crate::{
    capture::{Event, Observation},
    resolve::Sighting,
};

pub(super) const SECOND: u64 = 1_000_000_000;

/// The flow of one client and one server, of connections that were counted together.
pub(super) fn key(port: u16) -> Key {
    Key {
        direction: Direction::Egress,
        local: [10, 0, 0, 1].into(),
        remote: [10, 0, 0, 2].into(),
        port,
        client_port: 0,
    }
}

/// Connections of that flow.
pub(super) fn sighting(port: u16, count: u64) -> Sighting {
    Sighting {
        observation: Observation {
            event: Event::Connect(Outcome::Established),
            protocol: Protocol::Tcp,
            local: key(port).local,
            remote: key(port).remote,
            port,
            cgroup: 3,
            netns: 0,
            client_port: 0,
            connection: None,
            pid: 7,
            comm: "app".to_owned(),
            count,
            first_seen: Timestamp::default(),
            last_seen: Timestamp::default(),
        },
        owner: None,
        log: None,
        round: 0,
    }
}
