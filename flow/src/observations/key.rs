//! What makes two observations the same one.

use std::net::{IpAddr, SocketAddr};

use crate::{
    endpoint::{Endpoint, Pod},
    record::{Direction, FlowRecord, Outcome, Protocol},
};

/// What stays the same over all observations that one entry of the ledger counts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObservationKey {
    /// The end that opened the connections.
    pub client: Identity,
    /// The end that accepted them.
    pub server: Identity,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The server's own port.
    pub port: u16,
    /// Which end was observed.
    pub direction: Direction,
    /// Whether the connections came about.
    pub outcome: Outcome,
}

/// What makes two endpoints the same one.
///
/// Names of a node and of a pod in its network are not enough for a policy, which must give their addresses: each
/// address that was seen is an endpoint of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// A pod with addresses of its own.
    Pod(PodId),
    /// A pod in its node's network, with the address that was seen.
    HostPod(PodId, IpAddr),
    /// A service.
    Service {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A node, with the address that was seen.
    Node {
        /// Its name.
        name: String,
        /// The address.
        address: IpAddr,
    },
    /// Any other address.
    External(IpAddr),
}

/// What makes two pods the same one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PodId {
    /// `metadata.uid`.
    Uid(String),
    /// Namespace and name, where the uid is not known.
    Name {
        /// `metadata.namespace`.
        namespace: String,
        /// `metadata.name`.
        name: String,
    },
}

impl ObservationKey {
    /// The key of a record.
    #[must_use]
    pub fn of(record: &FlowRecord) -> Self {
        Self {
            client: Identity::of(&record.src, client_address(record)),
            server: Identity::of(&record.dst, server_address(record)),
            protocol: record.protocol,
            port: record.tuple.dst_port,
            direction: record.direction,
            outcome: record.outcome,
        }
    }
}

impl Identity {
    /// The identity of an endpoint that was seen at this address.
    #[must_use]
    pub fn of(endpoint: &Endpoint, address: IpAddr) -> Self {
        match endpoint {
            Endpoint::Pod { pod, .. } if pod.host_network => Self::HostPod(PodId::of(pod), address),
            Endpoint::Pod { pod, .. } => Self::Pod(PodId::of(pod)),
            Endpoint::Service(service) => Self::Service {
                namespace: service.namespace.clone(),
                name: service.name.clone(),
            },
            Endpoint::Node(node) => Self::Node {
                name: node.name.clone(),
                address,
            },
            Endpoint::External(address) => Self::External(*address),
        }
    }
}

impl PodId {
    /// The identity of a pod.
    #[must_use]
    pub fn of(pod: &Pod) -> Self {
        if pod.uid.is_empty() {
            Self::Name {
                namespace: pod.namespace.clone(),
                name: pod.name.clone(),
            }
        } else {
            Self::Uid(pod.uid.clone())
        }
    }
}

/// The address that the client's traffic carries.
#[must_use]
pub fn client_address(record: &FlowRecord) -> IpAddr {
    match record.src {
        Endpoint::External(address) => address,
        _ => record.tuple.src_addr,
    }
}

/// The address that the server's traffic carries after translation: the one in the tuple, unless that is the virtual
/// one which the client called.
#[must_use]
pub fn server_address(record: &FlowRecord) -> IpAddr {
    let seen = record.tuple.dst_addr;
    if record.via.as_ref().map(SocketAddr::ip) == Some(seen) {
        translated(&record.dst, seen)
    } else if let Endpoint::External(address) = record.dst {
        address
    } else {
        seen
    }
}

/// The address that an endpoint's traffic carries when it was called at a virtual one.
#[must_use]
pub fn translated(endpoint: &Endpoint, called: IpAddr) -> IpAddr {
    let own: &[IpAddr] = match endpoint {
        Endpoint::External(address) => return *address,
        Endpoint::Pod { pod, .. } => &pod.addresses,
        Endpoint::Node(node) => &node.addresses,
        Endpoint::Service(_) => return called,
    };
    own.iter()
        .copied()
        .find(|address| address.is_ipv4() == called.is_ipv4())
        .unwrap_or(called)
}
