//! What the user decides.

use std::{collections::BTreeSet, num::NonZeroUsize, time::Duration};

use flow::time::Timestamp;

/// How policies are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The namespaces whose pods get policies.
    pub namespaces: Namespaces,
    /// Which pods share a policy.
    pub granularity: Granularity,
    /// Whether every policy allows queries to the cluster's DNS, seen or not.
    pub allow_dns: bool,
    /// Whether what reaches a pod from its own node gets a rule.
    pub own_node: OwnNode,
    /// Which directions a policy closes to all that its rules do not allow.
    pub policy_types: PolicyTypes,
    /// How ports are written.
    pub ports: PortForm,
    /// What is to enforce the policies.
    pub enforcer: Enforcer,
    /// How far external addresses are merged.
    pub blocks: Blocks,
    /// Connections that were seen fewer times get no rule.
    pub min_count: u64,
    /// Connections that were not seen since get no rule.
    pub since: Option<Since>,
}

impl Options {
    /// Exactly what was seen, per service, for any enforcer that keeps to the API; and DNS.
    #[must_use]
    pub fn new(namespaces: Namespaces) -> Self {
        Self {
            namespaces,
            granularity: Granularity::default(),
            allow_dns: true,
            own_node: OwnNode::default(),
            policy_types: PolicyTypes::default(),
            ports: PortForm::default(),
            enforcer: Enforcer::default(),
            blocks: Blocks::default(),
            min_count: 1,
            since: None,
        }
    }
}

/// A choice of namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespaces {
    /// Every namespace.
    All,
    /// Every namespace but these.
    AllBut(BTreeSet<String>),
    /// These.
    Only(BTreeSet<String>),
}

impl Namespaces {
    /// Whether a namespace is chosen.
    #[must_use]
    pub fn contains(&self, namespace: &str) -> bool {
        match self {
            Self::All => true,
            Self::AllBut(names) => !names.contains(namespace),
            Self::Only(names) => names.contains(namespace),
        }
    }

    /// Whether exactly one is chosen by name.
    #[must_use]
    pub fn is_single(&self) -> bool {
        matches!(self, Self::Only(names) if names.len() == 1)
    }
}

/// Which pods share a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Granularity {
    /// All pods of a namespace.
    #[value(name = "ns")]
    Namespace,
    /// The pods of a service; pods without one as in `workload`.
    #[default]
    #[value(name = "svc")]
    Service,
    /// The pods of a controller: a Deployment, a StatefulSet, a DaemonSet, a CronJob.
    Workload,
    /// Pods with the same labels; each pod of a StatefulSet by itself.
    Pod,
}

/// Whether what reaches a pod from its own node gets a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OwnNode {
    /// No rule: Kubernetes lets a pod's own node reach it in any case.
    #[default]
    Ignore,
    /// A rule for the node's address, for network plugins that want one.
    Allow,
}

/// Which directions a policy closes to all that its rules do not allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PolicyTypes {
    /// Both: where no connection was seen in a direction, none is allowed.
    #[default]
    Both,
    /// Those in which a connection was seen: the others stay as open as they are.
    Observed,
}

/// How ports are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum PortForm {
    /// Each by itself.
    #[default]
    Exact,
    /// Runs of ports, all of which were seen, as ranges. Kubernetes knows these since 1.22.
    Ranges,
}

/// What is to enforce the policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Enforcer {
    /// A network plugin that keeps to the API.
    #[default]
    #[value(name = "k8s")]
    Kubernetes,
    /// Weave Net's controller: IPv4 only, and it does not know ranges of ports. It has to be one that knows peers with selectors of
    /// namespaces and pods together, as 2.6 does.
    #[value(name = "weave-npc")]
    WeaveNpc,
}

/// How far external addresses are merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// The length of the longest prefix that a block of IPv4 addresses may have: 32 gives each address by itself.
    pub max_prefix4: u8,
    /// The same of IPv6: 128 gives each address by itself.
    pub max_prefix6: u8,
    /// The most blocks of either version for the same ports of one policy in one direction.
    pub group: Option<NonZeroUsize>,
}

impl Default for Blocks {
    fn default() -> Self {
        Self {
            max_prefix4: 32,
            max_prefix6: 128,
            group: None,
        }
    }
}

/// A point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// This one.
    At(Timestamp),
    /// So long before the newest observation.
    Last(Duration),
}
