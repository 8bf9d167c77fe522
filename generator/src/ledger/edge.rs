//! An edge: the connections from one client to one port of one server.

use std::{collections::BTreeSet, net::IpAddr};

use flow::{
    endpoint::Endpoint,
    record::{Protocol, Source},
    time::Timestamp,
};

/// The connections from one client to one port of one server, as both ends saw them.
#[derive(Clone, Debug, PartialEq)]
pub struct Edge {
    /// The end that opened the connections.
    pub client: Endpoint,
    /// The address that its traffic carried.
    pub client_address: IpAddr,
    /// The end that accepted them.
    pub server: Endpoint,
    /// The address that its traffic carried; for a service, the virtual one.
    pub server_address: IpAddr,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The server's own port.
    pub port: u16,
    /// How many connections were seen on the client's side.
    pub seen_by_client: u64,
    /// How many connections were seen on the server's side.
    pub seen_by_server: u64,
    /// When the first of them was seen.
    pub first_seen: Timestamp,
    /// When the last of them was seen.
    pub last_seen: Timestamp,
    /// Who saw them.
    pub sources: BTreeSet<Source>,
}

impl Edge {
    /// How many connections there were: each side may have missed some, so the larger of both counts.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.seen_by_client.max(self.seen_by_server)
    }
}
