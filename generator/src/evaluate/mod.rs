//! Judges what NetworkPolicies of networking.k8s.io/v1 allow.
//!
//! A [`World`] says who is in the cluster, [`Policies`] are checked as the API server does and prepared, a [`Judge`]
//! brings both together and gives for each [`Connection`] a [`Verdict`] with its reason.
//!
//! [`prove`] judges all edges of a ledger, and all pairs of endpoints.
//!
//! The semantics are those of the [API reference]. Where it leaves something open:
//!
//! * Judged is the connection, not the packet: answers belong to what they answer.
//! * Policies neither apply to pods in their node's network, nor do selectors match them: they are their node's
//!   address, which only an `ipBlock` can name, and no named port leads to them.
//! * The node on which a pod runs, with the pods in that node's network, always reaches it. The way back is not said to be
//!   open, and network plugins do differ there, so a pod needs a rule to reach its node.
//! * A pod that reaches itself through a service needs a rule, as with the plugins that do not except it.
//! * IPv4 written as IPv6 (`::ffff:192.0.2.1`) is IPv4.
//!
//! [API reference]: https://kubernetes.io/docs/reference/kubernetes-api/policy-resources/network-policy-v1/

mod block;
mod diff;
mod error;
mod field;
mod groups;
mod judge;
mod policies;
mod ports;
mod proof;
mod reach;
mod selector;
mod symbolic;
mod verdict;
mod world;

pub use self::{
    diff::{Change, Diff, Effect, diff},
    error::{InvalidPolicy, Problem},
    judge::{Judge, connections},
    policies::{BeyondFlows, Compiler, Policies, Policy, PolicyId, RuleId},
    ports::NamedPort,
    proof::{Denial, Denied, NeverSeen, PortRange, Proof, RuleName, Unused, denials, prove},
    symbolic::Symbolic,
    verdict::{Connection, Ruling, Verdict},
    world::{End, NAMESPACE_NAME, Node, NodeId, Pod, PodId, World, known_as},
};

#[cfg(test)]
mod tests;
