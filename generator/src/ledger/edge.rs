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
    /// Whether the observer's word of what a service of its ends selects is newer than that of all who say what stands here,
    /// which are more.
    pub is_disputed: bool,
}

impl Edge {
    /// How many connections there were: each side may have missed some, so the larger of both counts.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.seen_by_client.max(self.seen_by_server)
    }

    /// Whether only the agent of an end has seen it that could not tell whose end that is: a pod that was gone before anybody
    /// told of it, or an address that nobody else has seen there. What it says would open the other end to an address by its
    /// word alone.
    #[must_use]
    pub fn is_by_a_stranger(&self) -> bool {
        let is_stranger = |end: &Endpoint| matches!(end, Endpoint::External(_));
        is_stranger(&self.client) && self.seen_by_server == 0
            || is_stranger(&self.server) && self.seen_by_client == 0
    }

    /// The addresses, client's and server's, that its connections may have carried: those of the newest, and where an end
    /// is a pod with further addresses, these. Records of one pod are added up whatever its address, so of a pod with
    /// addresses of both families it is not known which of them the older connections carried. Each address of either end
    /// is in at least one pair, and both of a pair are of one family unless just so they were seen.
    #[must_use]
    pub fn addresses(&self) -> Vec<(IpAddr, IpAddr)> {
        let seen = (
            self.client_address.to_canonical(),
            self.server_address.to_canonical(),
        );
        let mut pairs = vec![seen];
        let has_further = |end, seen| {
            let mut addresses = own_addresses(end).iter();
            addresses.any(|address| address.to_canonical() != seen)
        };
        if !has_further(&self.client, seen.0) && !has_further(&self.server, seen.1) {
            return pairs;
        }
        let clients = with_further(&self.client, seen.0);
        let servers = with_further(&self.server, seen.1);
        for is_ipv4 in [true, false] {
            let of_family = |addresses: &BTreeSet<IpAddr>| -> Vec<IpAddr> {
                let of_family = addresses
                    .iter()
                    .filter(|address| address.is_ipv4() == is_ipv4);
                of_family.copied().collect()
            };
            let (clients, servers) = (of_family(&clients), of_family(&servers));
            let most = clients.len().max(servers.len());
            let clients = clients.into_iter().cycle();
            let servers = servers.into_iter().cycle();
            let others = clients.zip(servers).take(most);
            pairs.extend(others.filter(|pair| *pair != seen));
        }
        pairs
    }
}

/// The known addresses of a pod that has addresses of its own.
fn own_addresses(endpoint: &Endpoint) -> &[IpAddr] {
    match endpoint {
        Endpoint::Pod { pod, .. } if !pod.host_network => &pod.addresses,
        _ => &[],
    }
}

fn with_further(endpoint: &Endpoint, seen: IpAddr) -> BTreeSet<IpAddr> {
    own_addresses(endpoint)
        .iter()
        .map(IpAddr::to_canonical)
        .chain([seen])
        .collect()
}
