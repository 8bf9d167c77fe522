//! What lies in the maps.

use crate::address::Address;

/// A thread's name with its final zero byte, and more of them up to the full length (`TASK_COMM_LEN`); empty if not known.
///
/// Words and no bytes, as [`Address`] is.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Comm([u64; 2]);

impl Comm {
    /// Not known.
    pub const UNKNOWN: Self = Self([0; 2]);

    /// Of as many of these bytes as there is room for.
    #[must_use]
    pub fn new(name: &[u8]) -> Self {
        let mut bytes = [0; size_of::<Self>()];
        let length = name.len().min(bytes.len() - 1);
        bytes[..length].copy_from_slice(&name[..length]);
        let (first, second) = bytes.split_at(size_of::<u64>());
        Self([first, second].map(|half| {
            let mut word = [0; size_of::<u64>()];
            word.copy_from_slice(half);
            u64::from_ne_bytes(word)
        }))
    }

    /// The name's bytes and the zeros behind them.
    #[must_use]
    pub fn bytes(&self) -> [u8; size_of::<Self>()] {
        let [first, second] = self.0.map(u64::to_ne_bytes);
        core::array::from_fn(|index| match index {
            0..8 => first[index],
            _ => second[index - 8],
        })
    }
}

/// What happened to a connection, and so at which end it was observed.
pub mod kind {
    /// A connect succeeded: observed at the client.
    pub const CONNECTED: u8 = 0;
    /// A connect was refused, timed out or was given up: observed at the client.
    pub const CONNECT_FAILED: u8 = 1;
    /// A connection was accepted by the kernel for a listener: observed at the server.
    pub const ACCEPTED: u8 = 2;
}

/// The IP protocol number of TCP.
pub const IPPROTO_TCP: u8 = 6;
/// The IP protocol number of UDP.
pub const IPPROTO_UDP: u8 = 17;

/// The key of a flow: everything about a connection that matters to a policy. The client's ephemeral port is no part of
/// it, so ten thousand equal connections are one entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The address of the socket's own end.
    pub local: Address,
    /// The address of the other end.
    pub remote: Address,
    /// Id of the cgroup (v2 hierarchy) that owns the socket's end; 0 if the kernel could not tell.
    pub cgroup: u64,
    /// Inode number of the socket's network namespace; 0 if the kernel could not tell.
    pub netns: u32,
    /// The server's port, in host byte order.
    pub port: u16,
    /// The IP protocol number.
    pub protocol: u8,
    /// One of [`kind`].
    pub kind: u8,
}

/// What is counted under a [`FlowKey`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowValue {
    /// How many connections. 0 while those that the entry's owner has begun are under way.
    pub count: u64,
    /// `CLOCK_MONOTONIC` in nanoseconds at the first connection; 0 while there is none.
    pub first_ns: u64,
    /// The same for the latest connection.
    pub last_ns: u64,
    /// Process id (thread group, initial pid namespace) of the socket's owner; 0 if not known.
    pub pid: u32,
    /// Zero.
    pub padding: u32,
    /// The owner's name, see [`Comm`].
    pub comm: Comm,
}

/// A flow that found no room in the map, sent through the ring buffer instead.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEvent {
    /// Its key.
    pub key: FlowKey,
    /// Its value, with a count of 1, or of 0 if it says whose connect is under way.
    pub value: FlowValue,
}

/// What is remembered of a connection from its beginning to its end, where each is told apart.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// `CLOCK_MONOTONIC` in nanoseconds when the handshake began at the client, or ended at the server.
    pub start_ns: u64,
    /// Process id of the owner, as in [`FlowValue`].
    pub pid: u32,
    /// Zero.
    pub padding: u32,
    /// The owner's name, likewise.
    pub comm: Comm,
    /// Id of the cgroup, as in [`FlowKey`].
    pub cgroup: u64,
    /// The server's port, in host byte order.
    pub port: u16,
    /// The client's, likewise. At the end a socket has none any more.
    pub client_port: u16,
    /// One of [`kind`].
    pub kind: u8,
    /// Zero.
    pub padding2: u8,
    /// Zero.
    pub padding3: u16,
}

/// Something that happened to a single connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionEvent {
    /// The key of its flow.
    pub key: FlowKey,
    /// `CLOCK_MONOTONIC` in nanoseconds when it happened.
    pub now_ns: u64,
    /// The same when the connection began, see [`Open`].
    pub start_ns: u64,
    /// Bytes sent, each once.
    pub bytes_sent: u64,
    /// Bytes received; the other's FIN is one, as the kernel counts it.
    pub bytes_received: u64,
    /// Process id of the owner, as in [`FlowValue`].
    pub pid: u32,
    /// The client's port, in host byte order.
    pub client_port: u16,
    /// 1 if the connection has ended; 0 if the flow's kind says what happened.
    pub closed: u8,
    /// Zero.
    pub padding: u8,
    /// The owner's name, as in [`FlowValue`].
    pub comm: Comm,
}

/// Who called `connect` or `listen`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Id of the process's cgroup in the v2 hierarchy.
    pub cgroup: u64,
    /// The socket's address in the kernel: tells listeners apart that follow each other on one port. 0 for a listener that
    /// `/proc` has told of.
    pub socket: u64,
    /// Process id (thread group, initial pid namespace).
    pub pid: u32,
    /// Zero.
    pub padding: u32,
    /// The thread's name.
    pub comm: Comm,
}

impl Owner {
    /// Whether another process that has the same socket open is its owner rather: pid 1 opens sockets for the services that it
    /// starts (systemd's socket activation).
    #[must_use]
    pub const fn gives_way(&self) -> bool {
        self.pid == 1
    }
}

/// Where a listener listens.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerKey {
    /// Its address; all zero bytes for a wildcard of either family.
    pub address: Address,
    /// Inode number of its network namespace; 0 if the kernel could not tell.
    pub netns: u32,
    /// Its port, in host byte order.
    pub port: u16,
    /// Zero.
    pub padding: u16,
}

/// A UDP socket and a peer of it, or an SCTP socket that serves and an association of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerKey {
    /// The peer's address.
    pub address: Address,
    /// The socket's cookie, which the kernel gives to no other.
    pub socket: u64,
    /// The peer's port, in host byte order.
    pub port: u16,
    /// 0 for a peer that datagrams came from or went to; 1 for one that the process has named, which may be known under
    /// another address behind a translation.
    pub named: u16,
    /// What the client of an SCTP association has chosen to tell it from others, see [`CallKey::tag`]; 0 for UDP.
    pub tag: u32,
}

/// What is known of a UDP socket's conversation with a peer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// `CLOCK_MONOTONIC` in nanoseconds of the first datagram.
    pub first_ns: u64,
    /// The same of the latest.
    pub last_ns: u64,
    /// Which end spoke first: [`kind::CONNECTED`] for the socket's own, the client, [`kind::ACCEPTED`] for the peer.
    pub kind: u8,
    /// 1 if the other end has spoken since.
    pub answered: u8,
    /// 1 if the socket was connected to the peer when it met it: it takes datagrams from nobody else.
    pub connected: u8,
    /// Zero.
    pub padding: [u8; 5],
}

impl Peer {
    /// Whether both ends have spoken, and for longer than an exchange takes. Connection tracking draws the line at the same two
    /// seconds (`nf_conntrack_udp_packet`).
    #[must_use]
    pub const fn is_stream(&self) -> bool {
        self.answered != 0 && self.last_ns.saturating_sub(self.first_ns) > 2_000_000_000
    }
}

/// What a UDP socket has been to peers that may not be known any more.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Roles {
    /// Its cookie, for those that find the socket and no packet of it.
    pub cookie: u64,
    /// 1 if somebody has spoken to it first.
    pub served: u32,
    /// 1 if it has spoken first while there was no room for peers.
    pub called: u32,
}

/// An SCTP association that is being made, as its client has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallKey {
    /// The socket's cookie, which the kernel gives to no other.
    pub socket: u64,
    /// The tag that the client has chosen for this association, as it lies in memory: what is sent to the client bears it.
    pub tag: u32,
    /// Zero.
    pub padding: u32,
}

/// What is remembered of an SCTP association until it is known what becomes of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Where its first packet went, with [`kind::CONNECTED`].
    pub key: FlowKey,
    /// `CLOCK_MONOTONIC` in nanoseconds when that was sent, or sent again.
    pub last_ns: u64,
    /// Process id of the caller, as in [`FlowValue`].
    pub pid: u32,
    /// 1 if it was sent again, and counted as one that failed.
    pub again: u32,
    /// The caller's name, likewise.
    pub comm: Comm,
}

/// One connection as one of its ends sees it: the key of what is counted already while what was open before is looked for.
/// No two sockets of a network namespace have it at the same time.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Connection {
    /// The address of the socket's own end.
    pub local: Address,
    /// The address of the other end.
    pub remote: Address,
    /// Inode number of the socket's network namespace; 0 if the kernel could not tell.
    pub netns: u32,
    /// The port of the socket's own end, in host byte order.
    pub local_port: u16,
    /// The port of the other end, in host byte order.
    pub remote_port: u16,
}

/// What to think of the datagrams of a UDP socket that is older than the programs which see them: of a conversation that was
/// under way then, the first datagram that is seen may be an answer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OlderSocket {
    /// `CLOCK_MONOTONIC` in nanoseconds until which a conversation may be one that was under way, see [`UDP_SILENCE_NS`].
    pub until_ns: u64,
    /// [`kind::ACCEPTED`] for a socket whose port the process has chosen, a server's; [`kind::CONNECTED`] for one whose port
    /// the kernel has.
    pub kind: u64,
}

/// After this silence whoever speaks first opens a UDP conversation anew. Connection tracking, which stands behind the
/// network plugins that enforce policies, sees it alike (`net.netfilter.nf_conntrack_udp_timeout_stream`).
pub const UDP_SILENCE_NS: u64 = 120_000_000_000;

/// What was found of sockets that are older than the hooks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenBefore {
    /// Files looked at, of all processes.
    pub files: u64,
    /// Listeners whose owner was remembered.
    pub listeners: u64,
    /// Connections counted.
    pub connections: u64,
    /// UDP sockets of whose datagrams it is known what to think.
    pub datagrams: u64,
}

/// State changes that matter, on one CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// How many there were. Before the other, because the kernel copies a value from its beginning: what happens meanwhile must
    /// not look as if it had not been seen.
    pub made: u64,
    /// How many of them the classic program has seen.
    pub seen: u64,
}

const _: () = assert!(size_of::<Changes>() == 16 && align_of::<Changes>() == 8);
const _: () = assert!(size_of::<Open>() == 48 && align_of::<Open>() == 8);
const _: () = assert!(size_of::<ConnectionEvent>() == 104 && align_of::<ConnectionEvent>() == 8);
const _: () = assert!(size_of::<PeerKey>() == 32 && align_of::<PeerKey>() == 8);
const _: () = assert!(size_of::<Peer>() == 24 && align_of::<Peer>() == 8);
const _: () = assert!(size_of::<CallKey>() == 16 && align_of::<CallKey>() == 8);
const _: () = assert!(size_of::<Call>() == 80 && align_of::<Call>() == 8);
const _: () = assert!(size_of::<Roles>() == 16 && align_of::<Roles>() == 8);
const _: () = assert!(size_of::<FlowKey>() == 48 && align_of::<FlowKey>() == 8);
const _: () = assert!(size_of::<FlowValue>() == 48 && align_of::<FlowValue>() == 8);
const _: () = assert!(size_of::<FlowEvent>() == 96 && align_of::<FlowEvent>() == 8);
const _: () = assert!(size_of::<Owner>() == 40 && align_of::<Owner>() == 8);
const _: () = assert!(size_of::<OlderSocket>() == 16 && align_of::<OlderSocket>() == 8);
const _: () = assert!(size_of::<Connection>() == 40 && align_of::<Connection>() == 8);
const _: () = assert!(size_of::<OpenBefore>() == 32 && align_of::<OpenBefore>() == 8);
const _: () = assert!(size_of::<ListenerKey>() == 24 && align_of::<ListenerKey>() == 8);

#[cfg(feature = "user")]
mod pod {
    #![expect(
        unsafe_code,
        reason = "aya::Pod is an unsafe marker: the types hold integers and bytes only, without hidden padding"
    )]
    use super::{
        Call, CallKey, Changes, Connection, ConnectionEvent, FlowEvent, FlowKey, FlowValue,
        ListenerKey, OpenBefore, Owner, Peer, PeerKey,
    };

    // SAFETY: repr(C), any bit pattern is valid, and the sizes asserted above leave no hidden padding.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for FlowValue {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for FlowEvent {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for Owner {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for ListenerKey {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for PeerKey {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for Peer {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for CallKey {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for Call {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for ConnectionEvent {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for Connection {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for OpenBefore {}
    // SAFETY: as for FlowKey.
    unsafe impl aya::Pod for Changes {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_and_ends_with_zeros() {
        for (name, wanted) in [
            (&b""[..], [0; 16]),
            (b"nginx", *b"nginx\0\0\0\0\0\0\0\0\0\0\0"),
            (b"exactly-fifteen-and-more", *b"exactly-fifteen\0"),
        ] {
            assert_eq!(Comm::new(name).bytes(), wanted);
        }
    }
}
