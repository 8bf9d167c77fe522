//! Policies from edges: what was seen is allowed, and nothing else.
//!
//! [`plan`] finds for each end of each edge the policy that governs it (its *target*) and gives that policy a rule with the
//! other end (its *peer*). Of these rules all or some can be chosen; [`Plan::files`] renders one file a policy.
//!
//! Everything here is pure, and the result depends on the edges alone: not on their order, on a clock or on a hash seed.

mod blocks;
mod build;
mod cluster;
mod ends;
mod evidence;
mod labels;
mod manifest;
mod minimal;
mod name;
mod notice;
mod options;
mod peer;
mod plan;
mod target;
mod yaml;

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::NetworkPolicy;

pub use self::{
    build::plan,
    evidence::{Evidence, SeenBy},
    manifest::{MANAGED_BY, MANAGED_BY_LABEL, render},
    notice::{Notice, Reason, UDP_IS_NOT_SEEN},
    options::{
        Blocks, Enforcer, Granularity, Namespaces, Options, OwnNode, PolicyTypes, PortForm, Since,
    },
    plan::{Connection, Draft, OneSided, Plan, Rule},
};
use crate::ledger::Edge;

/// What [`synthesise`] made of the edges.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Synthesis {
    /// The policies, sorted by namespace and name.
    pub policies: Vec<NetworkPolicy>,
    /// Edges of the chosen namespaces for which a rule was left out, or given in another way than by labels.
    pub notices: Vec<Notice>,
}

/// The policies that allow the edges of the chosen namespaces.
///
/// Each pod or service of these namespaces that is an end of an edge gets a policy. An edge between two of them becomes
/// an egress rule at the client and an ingress rule at the server.
#[must_use]
pub fn synthesise(edges: &[Edge], options: &Options) -> Synthesis {
    let plan = plan(edges, options);
    let policies = plan.manifests(&plan.all()).collect();
    Synthesis {
        policies,
        notices: plan.notices,
    }
}

impl Synthesis {
    /// One file a policy: name and text, as [`Plan::files`] gives them.
    ///
    /// # Errors
    /// If a policy cannot be expressed in JSON; none made here cannot.
    pub fn files(&self, namespaces: &Namespaces) -> serde_json::Result<BTreeMap<String, String>> {
        let prefixed = !namespaces.is_single();
        self.policies
            .iter()
            .map(|policy| Ok((manifest::file_name(policy, prefixed), render(policy)?)))
            .collect()
    }
}

#[cfg(test)]
mod tests;
