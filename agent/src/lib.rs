//! MicroShield's node agent.
//!
//! [`capture`] drains what the kernel programs counted, [`identity`] and [`resolve`] name both ends, [`hold`] keeps
//! what cannot be named yet, [`scope`] adds what the log of the Scope probe tells, [`collector`] does so once a second, and
//! [`uplink`] or [`stdout`] take the result away. [`proc_sockets`] finds sockets that are older than the agent, where the kernel's
//! iterators cannot. [`plugin`] gives Weave Scope what it cannot see. [`runtime`] puts them together, [`check`] says what
//! would come of it.
#![deny(unsafe_code)]

pub mod args;
pub mod capabilities;
#[expect(
    unsafe_code,
    reason = "the kernel boundary: one system call that aya lacks, and reading what the ring buffer holds"
)]
pub mod capture;
pub mod check;
pub mod collector;
pub mod hold;
pub mod identity;
pub mod metrics;
pub mod plugin;
pub mod proc_sockets;
pub mod pulse;
pub mod resolve;
pub mod runtime;
pub mod scope;
pub mod single;
pub mod stdout;
pub mod uplink;
