//! The lab: real programs on a real kernel that look like a cluster to whoever watches the kernel.
//!
//! A node is a network namespace and a directory of cgroups, a pod is a network namespace and a cgroup named as kubelet
//! names it, a service address is the nftables rules that kube-proxy writes, and the cluster's objects are a file in
//! the form of `kubectl get namespaces,pods,services,endpointslices,nodes -A -o yaml`. Describe a [`Cluster`], hand it
//! to [`Lab::start`], and run programs in its [`Place`]s.
//!
//! Whatever a lab makes carries the process id of its maker in its name. It is removed when the [`Lab`] is dropped, on
//! SIGINT and SIGTERM (see [`signals::remove_labs_on_interrupt`]), and otherwise by the next lab that starts.
#![forbid(unsafe_code)]

mod agent;
pub mod apiserver;
pub mod bookinfo;
pub mod cgroup;
pub mod cluster;
mod container;
pub mod deployment;
mod generator;
pub mod image;
mod lab;
mod memory;
mod names;
mod network;
mod objects;
pub mod pace;
mod place;
mod process;
mod ranges;
mod real_api;
mod remains;
mod requirements;
mod rights;
pub mod scope_app;
mod seccomp;
mod services;
pub mod signals;
mod stream_client;
pub mod truth;

pub use agent::{Agent, AgentOptions, Capture, Hooks};
pub use cluster::Cluster;
pub use container::Container;
pub use generator::{Generator, GeneratorOptions, generate};
pub use lab::Lab;
pub use memory::Memory;
pub use place::{Calls, Place};
pub use process::{Process, binary, exit_code};
pub use real_api::{RealApi, assets};
pub use requirements::root_or_reason;
pub use rights::Rights;
pub use stream_client::StreamClient;
