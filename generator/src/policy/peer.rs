//! Whom a rule lets through.

use std::{fmt, net::IpAddr, sync::Arc};

use flow::endpoint::{Endpoint, Labels};
use ipnet::IpNet;

use super::{
    cluster::Cluster, labels::stable, notice::Reason, options::Granularity, target::pod_labels,
};
use crate::syntax::is_dns_label;

/// The other end of a rule. The order is that of the rules in a policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Peer {
    /// Pods of a namespace, by labels; never without labels.
    Pods {
        namespace: Arc<str>,
        labels: Arc<Labels>,
    },
    /// Addresses.
    Block(IpNet),
}

/// The peers that stand for an end of an edge.
#[derive(Clone, Debug)]
pub(super) enum Peers {
    /// Pods by labels, or the backends of a service.
    These(Vec<Peer>),
    /// The addresses that the traffic may have carried, of a pod that has no labels to select it by.
    Unlabelled,
    /// The address that the traffic carried, of a node or of a pod in its network.
    Address,
    /// The address that the traffic carried, from outside of the cluster: it may be merged with others.
    External,
}

impl Peers {
    pub(super) fn of(
        cluster: &Cluster<'_>,
        endpoint: &Endpoint,
        granularity: Granularity,
    ) -> Result<Self, Reason> {
        let pods = |namespace: &str, labels| {
            if is_dns_label(namespace) {
                Ok(Self::These(vec![Peer::Pods {
                    namespace: namespace.into(),
                    labels: Arc::new(labels),
                }]))
            } else {
                Err(Reason::InvalidNamespace)
            }
        };
        match endpoint {
            Endpoint::Pod { pod, service } if !pod.host_network => {
                let of_service =
                    matches!(granularity, Granularity::Namespace | Granularity::Service)
                        .then(|| cluster.service_of(pod, service.as_ref()))
                        .flatten()
                        .map(|(_, selector)| selector);
                match of_service.or_else(|| pod_labels(cluster, pod, granularity)) {
                    Some(labels) => pods(&pod.namespace, labels),
                    // An empty selector would let the whole namespace through.
                    None => Ok(Self::Unlabelled),
                }
            }
            Endpoint::Service(service) if service.selector.is_empty() => {
                if service.backends.is_empty() {
                    return Err(Reason::NoBackends);
                }
                let backends = service.backends.iter().copied();
                Ok(Self::These(backends.map(Peer::address).collect()))
            }
            Endpoint::Service(service) => {
                let selector = stable(&service.selector);
                if selector.is_empty() {
                    return Err(Reason::Unlabelled);
                }
                // Selectors do not match pods in their node's network, so these are given by their addresses.
                let hosts = cluster.host_addresses_of(service).into_iter();
                let mut peers = pods(&service.namespace, selector)?;
                if let Self::These(peers) = &mut peers {
                    peers.extend(hosts.map(Peer::address));
                }
                Ok(peers)
            }
            Endpoint::Pod { .. } | Endpoint::Node(_) => Ok(Self::Address),
            Endpoint::External(_) => Ok(Self::External),
        }
    }
}

impl Peer {
    /// A single address. IPv4 spoken on an IPv6 socket is IPv4 to the network.
    pub(super) fn address(address: IpAddr) -> Self {
        Self::Block(address.to_canonical().into())
    }
}

/// `namespace: key=value,key=value` or the block; a block of one address is written as the address.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pods { namespace, labels } => {
                let pairs: Vec<String> = labels
                    .iter()
                    .map(|(key, value)| format!("{key}={value}"))
                    .collect();
                write!(f, "{namespace}: {}", pairs.join(","))
            }
            Self::Block(block) if block.prefix_len() == block.max_prefix_len() => {
                block.addr().fmt(f)
            }
            Self::Block(block) => block.fmt(f),
        }
    }
}
