//! Types and decisions that the kernel programs and the agent share.
//!
//! Everything that crosses the kernel boundary is `repr(C)`, made of integers and byte arrays only, with its padding
//! named. Logic that can be tested on the host lives here and not in the BPF binary.
#![no_std]

pub mod loss;
pub mod offset;
pub mod tcp;
pub mod types;

/// Names of the kernel programs and maps, as the agent looks them up in the object.
pub mod name {
    /// The BTF tracepoint program.
    pub const STATE_BTF: &str = "inet_sock_set_state_btf";
    /// The classic tracepoint program.
    pub const STATE_CLASSIC: &str = "inet_sock_set_state_classic";
    /// The two generations of the map of flows.
    pub const FLOWS: [&str; 2] = ["FLOWS_A", "FLOWS_B"];
    /// The array of one map that says which generation is written to.
    pub const ACTIVE_FLOWS: &str = "ACTIVE_FLOWS";
    /// The ring buffer for what found no room.
    pub const OVERFLOW: &str = "OVERFLOW";
    /// Connecting processes by socket.
    pub const CONNECT_OWNERS: &str = "CONNECT_OWNERS";
    /// Listening processes by address.
    pub const LISTENERS: &str = "LISTENERS";
    /// The loss counters.
    pub const LOSSES: &str = "LOSSES";
}
