//! An end of a pair, with its address apart.

use std::net::IpAddr;

use flow::observations::{Identity, PodId};

/// An [`Identity`] whose address can be replaced by the one that the other side saw.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum End<'a> {
    Pod(&'a PodId),
    HostPod(&'a PodId, IpAddr),
    Service { namespace: &'a str, name: &'a str },
    Node { name: &'a str, address: IpAddr },
    External(IpAddr),
}

impl End<'_> {
    /// The same end where it is known at another address. Pods with addresses of their own and services are the same at
    /// each of them.
    pub(super) fn at(self, address: IpAddr) -> Self {
        match self {
            Self::HostPod(pod, _) => Self::HostPod(pod, address),
            Self::Node { name, .. } => Self::Node { name, address },
            Self::Pod(_) | Self::Service { .. } | Self::External(_) => self,
        }
    }
}

impl<'a> From<&'a Identity> for End<'a> {
    fn from(identity: &'a Identity) -> Self {
        match identity {
            Identity::Pod(pod) => Self::Pod(pod),
            Identity::HostPod(pod, address) => Self::HostPod(pod, *address),
            Identity::Service { namespace, name } => Self::Service { namespace, name },
            Identity::Node { name, address } => Self::Node {
                name,
                address: *address,
            },
            Identity::External(address) => Self::External(*address),
        }
    }
}
