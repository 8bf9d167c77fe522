//! What the kernel counted, in the agent's own terms.

use std::net::{IpAddr, Ipv6Addr};

use agent_common::{
    sctp::IPPROTO_SCTP,
    types::{self, FlowKey, FlowValue, IPPROTO_UDP, kind},
};
use flow::{
    record::{Connection, ConnectionEvent, Outcome, Protocol},
    time::Timestamp,
};

use super::Clock;

/// What the kernel counted under one key in one window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// What happened.
    pub event: Event,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The address of the observed socket's own end.
    pub local: IpAddr,
    /// The address of the other end.
    pub remote: IpAddr,
    /// The server's port, as the observed socket has it.
    pub port: u16,
    /// Id of the cgroup of the socket's owner; 0 if not known.
    pub cgroup: u64,
    /// Inode number of the network namespace; 0 if not known.
    pub netns: u32,
    /// Process id of the owner; 0 if not known.
    pub pid: u32,
    /// Name of the owner; empty if not known.
    pub comm: String,
    /// The client's port, where connections are told apart; else 0.
    pub client_port: u16,
    /// What happened to a single connection, where they are told apart.
    pub connection: Option<Connection>,
    /// How many connections.
    pub count: u64,
    /// When the first of them was counted.
    pub first_seen: Timestamp,
    /// When the last of them was counted.
    pub last_seen: Timestamp,
}

/// At which end a connection was observed, and how it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A connect ended, at the client.
    Connect(Outcome),
    /// An accept, at the server.
    Accept,
}

/// What lies under one key of the map.
pub(super) fn observation(key: &FlowKey, value: &FlowValue, clock: &Clock) -> Observation {
    let name = value.comm.bytes();
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Observation {
        event: match key.kind {
            kind::ACCEPTED => Event::Accept,
            kind::CONNECT_FAILED => Event::Connect(Outcome::Failed),
            _ => Event::Connect(Outcome::Established),
        },
        protocol: match key.protocol {
            IPPROTO_UDP => Protocol::Udp,
            IPPROTO_SCTP => Protocol::Sctp,
            _ => Protocol::Tcp,
        },
        local: Ipv6Addr::from(key.local).to_canonical(),
        remote: Ipv6Addr::from(key.remote).to_canonical(),
        port: key.port,
        cgroup: key.cgroup,
        netns: key.netns,
        client_port: 0,
        connection: None,
        pid: value.pid,
        comm: String::from_utf8_lossy(name).into_owned(),
        count: value.count,
        // CPUs that race for a new entry may leave an earlier time as the later one.
        first_seen: clock.at(value.first_ns.min(value.last_ns)),
        last_seen: clock.at(value.first_ns.max(value.last_ns)),
    }
}

/// A single connection, in the form of a flow of one; of none when it has ended, because it was counted before.
pub(super) fn single(event: &types::ConnectionEvent, clock: &Clock) -> Observation {
    let value = FlowValue {
        count: u64::from(event.closed == 0),
        first_ns: event.now_ns,
        last_ns: event.now_ns,
        pid: event.pid,
        padding: 0,
        comm: event.comm,
    };
    let what = match (event.closed, event.key.kind) {
        (0, kind::ACCEPTED) => ConnectionEvent::Accept,
        (0, _) => ConnectionEvent::Connect,
        _ => ConnectionEvent::Close,
    };
    Observation {
        client_port: event.client_port,
        connection: Some(Connection {
            event: what,
            duration_ns: event.now_ns.saturating_sub(event.start_ns),
            bytes_sent: event.bytes_sent,
            bytes_received: event.bytes_received,
        }),
        ..observation(&event.key, &value, clock)
    }
}
