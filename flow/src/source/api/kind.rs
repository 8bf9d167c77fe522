//! The kinds of objects that are read.

use std::fmt;

use crate::{
    time::Timestamp,
    topology::{Index, Objects},
};

/// A kind of object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Pods.
    Pods,
    /// Services.
    Services,
    /// Endpoint slices.
    EndpointSlices,
    /// Nodes.
    Nodes,
    /// Namespaces.
    Namespaces,
}

/// Which objects are of use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All.
    Everything,
    /// What it takes to name both ends of a flow. The labels of namespaces are not needed for that.
    BothEnds,
    /// What it takes to name the ends of flows that are on the node of this name: the node and its pods.
    OneNode(String),
}

impl Scope {
    /// The kinds that are read.
    #[must_use]
    pub fn kinds(&self) -> &'static [Kind] {
        use Kind::{EndpointSlices, Namespaces, Nodes, Pods, Services};
        match self {
            Self::Everything => &[Pods, Services, EndpointSlices, Nodes, Namespaces],
            Self::BothEnds => &[Pods, Services, EndpointSlices, Nodes],
            Self::OneNode(_) => &[Pods, Nodes],
        }
    }

    /// Which of a kind's objects are read.
    pub(super) fn field_selector(&self, kind: Kind) -> Option<String> {
        match (self, kind) {
            (Self::OneNode(node), Kind::Pods) => Some(format!("spec.nodeName={node}")),
            (Self::OneNode(node), _) => Some(format!("metadata.name={node}")),
            (Self::Everything | Self::BothEnds, _) => None,
        }
    }
}

impl Kind {
    /// The name of the resource in URLs and RBAC rules.
    #[must_use]
    pub const fn resource(self) -> &'static str {
        match self {
            Self::Pods => "pods",
            Self::Services => "services",
            Self::EndpointSlices => "endpointslices",
            Self::Nodes => "nodes",
            Self::Namespaces => "namespaces",
        }
    }

    /// The API group in RBAC rules.
    #[must_use]
    pub const fn group(self) -> &'static str {
        match self {
            Self::EndpointSlices => "discovery.k8s.io",
            _ => "",
        }
    }

    /// The URL's path for all namespaces.
    #[must_use]
    pub const fn path(self) -> &'static str {
        match self {
            Self::Pods => "/api/v1/pods",
            Self::Services => "/api/v1/services",
            Self::EndpointSlices => "/apis/discovery.k8s.io/v1/endpointslices",
            Self::Nodes => "/api/v1/nodes",
            Self::Namespaces => "/api/v1/namespaces",
        }
    }

    /// How many objects of this kind an index holds.
    pub(super) fn held(self, index: &Index) -> usize {
        let held = index.held();
        match self {
            Self::Pods => held.pods,
            Self::Services => held.services,
            Self::EndpointSlices => held.endpoint_slices,
            Self::Nodes => held.nodes,
            Self::Namespaces => held.namespaces,
        }
    }

    /// The objects of this kind are now those among `objects`.
    pub(super) fn replace(self, index: &mut Index, objects: Objects, now: Timestamp) {
        match self {
            Self::Pods => index.replace_pods(objects.pods, now),
            Self::Services => index.replace_services(objects.services, now),
            Self::EndpointSlices => index.replace_endpoint_slices(objects.endpoint_slices, now),
            Self::Nodes => index.replace_nodes(objects.nodes, now),
            Self::Namespaces => index.replace_namespaces(objects.namespaces),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.resource())
    }
}
