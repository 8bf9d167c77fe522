//! What the user must know besides the policies.

use std::fmt;

use flow::record::Protocol;
use serde::Serialize;

use crate::ledger::Edge;

/// For whoever makes policies from edges without any over UDP.
pub const UDP_IS_NOT_SEEN: &str = "no UDP was seen: \
     the policies stop UDP to their pods, but for queries to the cluster's DNS";

/// An edge for which a rule was left out, or given in another way than by labels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Notice {
    /// Why.
    pub reason: Reason,
    /// The client's name.
    pub client: String,
    /// The server's name.
    pub server: String,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The server's own port.
    pub port: u16,
    /// How many connections there were.
    pub count: u64,
}

/// Why an edge has no rule, or another one than expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// From the node of the server's pod.
    OwnNode,
    /// The pod is in its node's network.
    HostNetwork,
    /// The pod, or the service's selector, has no label that outlives a rollout.
    Unlabelled,
    /// The service has no selector, and its backends are not known.
    NoBackends,
    /// The namespace's name is not one that Kubernetes accepts.
    InvalidNamespace,
    /// Only the agent of one end has seen it, and that end could only be allowed by its address: it is not known whose it is,
    /// or that of a pod which has no label that outlives a rollout.
    Stranger,
    /// Seen less often than was asked for.
    Rare,
    /// Not seen since the time that was asked for.
    Old,
    /// An address of IPv6, which what is to enforce the policies does not know.
    Ipv6,
    /// The pod is allowed by its address because it has no label that outlives a rollout.
    ByAddress,
    /// One end is a node, or runs in the network of one, and is allowed by its address.
    NodeAddress,
    /// The pods of one end are selected by labels that pods of other workloads have too.
    Shared,
    /// The service of one end selects something else by the word of most nodes than by the newest.
    Disputed,
}

impl Notice {
    pub(super) fn new(edge: &Edge, reason: Reason) -> Self {
        Self {
            reason,
            client: edge.client.to_string(),
            server: edge.server.to_string(),
            protocol: edge.protocol,
            port: edge.port,
            count: edge.count(),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::OwnNode => "left out: Kubernetes lets a pod's own node reach it in any case",
            Self::HostNetwork => {
                "left out at one end: policies do not govern pods in their node's network"
            }
            Self::Unlabelled => {
                "left out at one end: the pods have no label that outlives a rollout"
            }
            Self::NoBackends => {
                "left out: the service has no selector, and its backends are not known"
            }
            Self::InvalidNamespace => "left out: not the name of a namespace",
            Self::Stranger => {
                "left out: only one end's agent saw it, and its end could be allowed by an address alone"
            }
            Self::Rare => "left out: seen less often than --min-count asks for",
            Self::Old => "left out: not seen since the time that --since gives",
            Self::Ipv6 => "left out at one end: Weave NPC knows no IPv6",
            Self::Shared => {
                "allowed for pods of other workloads too: no label tells them apart from the pods at one end"
            }
            Self::Disputed => {
                "allowed by what most nodes say that a service selects, though the newest word is another"
            }
            Self::NodeAddress => {
                "allowed by the address of a node: Cilium matches those only with policyCIDRMatchMode: nodes"
            }
            Self::ByAddress => {
                "allowed by address, which a restart changes and Cilium does not match: the pod has no label that outlives a rollout"
            }
        })
    }
}
