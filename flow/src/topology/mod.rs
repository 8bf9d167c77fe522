//! The cluster's objects, and the index that answers (address, time) → endpoint.
//!
//! [`Objects`] come from a [`file`], from a report of Weave [`scope`] or, one [`Change`] at a time, from the Kubernetes API.
//! The [`Index`] takes them with the time at which they were learnt; nothing here reads a clock.

pub mod file;
pub mod scope;

mod common;
mod convert;
mod history;
mod index;
mod naming;
mod objects;
mod pod;
mod ranges;
mod resolve;
mod selection;
mod service;
mod slices;
mod store;
mod update;
mod workload;

pub use common::Common;
pub use convert::FieldError;
#[cfg(feature = "source")]
pub(crate) use convert::end_of_pod;
pub use history::GRACE;
pub use index::{Counts, Index, RETENTION};
pub use objects::{
    Change, ContainerPort, EndpointSlice, Namespace, Node, Object, ObjectKey, Objects, Phase, Pod,
    Service, ServicePort, SlicePort, TargetPort,
};
pub use resolve::Server;
