//! Types and decisions that the kernel programs and the agent share.
//!
//! Everything that crosses the kernel boundary is `repr(C)`, made of integers and byte arrays only, with its padding
//! named. Logic that can be tested on the host lives here and not in the BPF binary.
#![no_std]

pub mod address;
pub mod insert;
pub mod loss;
pub mod offset;
pub mod sctp;
pub mod tcp;
pub mod types;

/// Names of the kernel programs and maps, as the agent looks them up in the object.
pub mod name {
    /// The BTF tracepoint programs: the one that counts connections by flow, and the one that tells them apart.
    pub const STATE_BTF: [&str; 2] = ["inet_sock_set_state_btf", "connections_btf"];
    /// The classic tracepoint programs, likewise.
    pub const STATE_CLASSIC: [&str; 2] = ["inet_sock_set_state_classic", "connections_classic"];
    /// The programs that count the state changes which the classic ones ought to see, likewise.
    pub const STATE_CHANGES: [&str; 2] = ["state_changes", "state_changes_apart"];
    /// The programs that see packets of UDP and SCTP: those that arrive, and those that leave.
    pub const PACKET_INGRESS: &str = "packet_ingress";
    /// See [`PACKET_INGRESS`].
    pub const PACKET_EGRESS: &str = "packet_egress";
    /// The programs that see the addresses that processes send datagrams to from sockets that are not connected.
    pub const UDP_ADDRESS: [&str; 2] = ["udp_sendmsg4", "udp_sendmsg6"];
    /// The programs that see who binds a UDP socket.
    pub const UDP_BIND: [&str; 2] = ["udp_bind4", "udp_bind6"];
    /// The two generations of the map of flows.
    pub const FLOWS: [&str; 2] = ["FLOWS_A", "FLOWS_B"];
    /// The array of one map that says which generation is written to.
    pub const ACTIVE_FLOWS: &str = "ACTIVE_FLOWS";
    /// The ring buffer for what found no room.
    pub const OVERFLOW: &str = "OVERFLOW";
    /// UDP sockets' peers.
    pub const PEERS: &str = "PEERS";
    /// SCTP associations that are being made, by the client's socket.
    pub const SCTP_CALLS: &str = "SCTP_CALLS";
    /// Until when peers may have been forgotten for want of room.
    pub const PEERS_LACK_ROOM: &str = "PEERS_LACK_ROOM";
    /// Open connections by socket.
    pub const OPEN: &str = "OPEN";
    /// The ring buffer of what happens to single connections.
    pub const CONNECTIONS: &str = "CONNECTIONS";
    /// Connecting processes by socket.
    pub const CONNECT_OWNERS: &str = "CONNECT_OWNERS";
    /// Listening processes by address.
    pub const LISTENERS: &str = "LISTENERS";
    /// Calls that have met one from the other end, by socket.
    pub const CROSSED: &str = "CROSSED";
    /// The loss counters.
    pub const LOSSES: &str = "LOSSES";
    /// How many state changes there were, and how many the classic programs have seen.
    pub const CHANGES: &str = "CHANGES";
    /// The iterator over listeners that are older than the hooks.
    pub const OPEN_LISTENERS: &str = "open_listeners";
    /// The iterator over connections that are older than the hooks.
    pub const OPEN_CONNECTIONS: &str = "open_connections";
    /// The iterator over UDP sockets that are older than the programs which see their datagrams.
    pub const OPEN_DATAGRAMS: &str = "open_datagrams";
    /// Connections that are counted, while those that are older are looked for.
    pub const WITNESSED: &str = "WITNESSED";
    /// The array of one map that says whether they are looked for.
    pub const ACTIVE_WITNESSED: &str = "ACTIVE_WITNESSED";
    /// What was found of what is older.
    pub const OPEN_BEFORE: &str = "OPEN_BEFORE";
}
