//! What became of a connection, and why.

use flow::record::{Direction, Protocol};

use super::{
    policies::{PolicyId, RuleId},
    world::End,
};

/// A connection to be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connection {
    /// The end that opens it.
    pub source: End,
    /// The end that accepts it, after the translation of service addresses.
    pub destination: End,
    /// The transport protocol.
    pub protocol: Protocol,
    /// The destination's own port.
    pub port: u16,
}

/// What policies say of a connection. It is allowed if both ends allow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// At the source.
    pub egress: Ruling,
    /// At the destination.
    pub ingress: Ruling,
}

/// What the policies for one direction say at one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ruling {
    /// Policies do not apply: the end is a node, a pod in its node's network, or outside of the cluster.
    NotGoverned,
    /// No policy selects the pod for this direction.
    NotIsolated,
    /// The source is the node on which the destination runs: no policy can keep it out.
    OwnNode,
    /// Policies isolate the pod, and this rule, the first of them that does, lets the connection through.
    Allowed(RuleId),
    /// These policies isolate the pod, and none has a rule for the connection.
    Denied(Vec<PolicyId>),
}

impl Ruling {
    /// Whether the connection passes this end.
    #[must_use]
    pub const fn is_allowed(&self) -> bool {
        !matches!(self, Self::Denied(_))
    }

    /// The rule that lets the connection through, if one is needed.
    #[must_use]
    pub const fn rule(&self) -> Option<RuleId> {
        match self {
            Self::Allowed(rule) => Some(*rule),
            _ => None,
        }
    }
}

impl Verdict {
    /// Whether the connection passes both ends.
    #[must_use]
    pub const fn is_allowed(&self) -> bool {
        self.egress.is_allowed() && self.ingress.is_allowed()
    }

    /// The directions that deny the connection, with the policies that isolate there and have no rule for it.
    pub fn denials(&self) -> impl Iterator<Item = (Direction, &[PolicyId])> {
        [
            (Direction::Egress, &self.egress),
            (Direction::Ingress, &self.ingress),
        ]
        .into_iter()
        .filter_map(|(direction, ruling)| match ruling {
            Ruling::Denied(policies) => Some((direction, policies.as_slice())),
            _ => None,
        })
    }
}
