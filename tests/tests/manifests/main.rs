//! The manifests in `deploy/`: every field is one that Kubernetes knows, names that refer to each other agree, rights are
//! the least, and the programs accept the command lines. And what the documentation says of all that.
#![expect(
    clippy::unwrap_used,
    reason = "a panic is a test's answer, and clippy makes its exception for test functions only"
)]

mod beside_scope;
mod chart;
mod command_lines;
mod dockerfile;
mod documents;
mod kustomization;
mod load;
mod local_resolve;
mod monitor;
mod mtls;
mod network;
mod references;
mod rights;
