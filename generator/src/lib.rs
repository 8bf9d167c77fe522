//! MicroShield's central generator.
//!
//! * [`auth`]: who may report, and who may read;
//! * [`ingest`]: agents connect and bring batches of flow records;
//! * [`flows`]: reads files of flow records;
//! * [`link`]: makes flow records of the log of the modified Weave Scope probe;
//! * [`ledger`]: observations of both ends of each connection, joined into edges;
//! * [`store`]: the ledger on disk;
//! * [`policy`]: edges to NetworkPolicies, and these to YAML;
//! * [`evaluate`]: what policies allow, and why;
//! * [`folder`]: writes the files, beside those of other hands;
//! * [`panel`]: people choose what to allow;
//! * [`table`]: edges for people;
//! * [`policy_files`]: reads folders of policies;
//! * [`syntax`]: what the API server accepts as names, labels and ports;
//! * [`serve`]: the running generator, which ties these together;
//! * [`status`], [`metrics`]: how it is, and what it has done;
//! * [`cli`]: the command `microshield`.
//!
//! Ledger, policy and evaluation are pure: they take values and return values, know no clock and no task.
#![forbid(unsafe_code)]

pub mod auth;
pub mod cli;
pub mod evaluate;
pub mod flows;
pub mod folder;
pub mod ingest;
mod label_index;
pub mod ledger;
pub mod link;
pub mod metrics;
mod network;
pub mod panel;
pub mod policy;
pub mod policy_files;
pub mod serve;
pub mod status;
pub mod store;
pub mod syntax;
pub mod table;

#[cfg(test)]
mod samples;
