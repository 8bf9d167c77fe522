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
mod variants;
mod yaml;

pub use self::{
    build::plan,
    evidence::{Evidence, SeenBy},
    manifest::{MANAGED_BY, MANAGED_BY_LABEL, render},
    notice::{Notice, Reason, UDP_IS_NOT_SEEN},
    options::{
        Blocks, Enforcer, Granularity, Namespaces, Options, OwnNode, PolicyTypes, PortForm, Since,
    },
    plan::{Connection, Draft, OneSided, Plan, Rule, Unwatched},
};
#[cfg(test)]
mod tests;
