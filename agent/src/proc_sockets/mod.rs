//! Sockets that are older than the agent, from `/proc`: for kernels without the iterators of `agent-ebpf`, and for SCTP, whose
//! associations are in no file of a process.
//!
//! [`table`] reads the kernel's tables of sockets, [`processes`] what there is to know of processes, and [`Walk`] puts them
//! together: each network namespace is looked at through any process that is in it, and the owner of a socket is found
//! by its inode number among the open files of all processes. Sockets that wait in a listener's queue have no inode
//! number: their owner is the listener's.

mod processes;
mod progress;
mod table;
mod walk;

use agent_common::address::Address;

pub use self::{
    processes::{CgroupIds, Process},
    progress::Progress,
    walk::{Transport, Walk},
};

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Sockets that listen.
    pub listeners: Vec<Listener>,
    /// Connections that are open at their own end.
    pub connections: Vec<Connection>,
    /// Sockets that a process has open which lets nobody look into it.
    pub ownerless: usize,
    /// Namespaces that could not be looked into although they are there, and lines that are not understood.
    pub unread: u64,
    /// Connections that there was no room for.
    pub left_out: u64,
}

/// A socket that listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Inode number of its network namespace.
    pub netns: u32,
    /// Its address; [`Address::UNSPECIFIED`] for a wildcard of either family.
    pub address: Address,
    /// Its port.
    pub port: u16,
    /// Who has it open.
    pub owner: Option<Process>,
}

/// A connection, at one of its ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The key under which the hooks would have it.
    pub ends: agent_common::types::Connection,
    /// Whether somebody listens on the own end's port, so that the other end is the client.
    pub accepted: bool,
    /// Who listens, if it was accepted, or else who has it open.
    pub owner: Option<Process>,
}
