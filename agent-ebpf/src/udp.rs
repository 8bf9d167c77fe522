//! UDP conversations, by the first datagram that a socket exchanges with a peer.
//!
//! UDP has no state changes. The end that speaks first is the client, so each socket's peers are remembered in [`PEERS`],
//! and a conversation is counted when a peer is new, by the end that its first datagram came from. The datagrams themselves
//! are looked at, as they leave a socket and before they are queued to one, because nothing else tells the truth:
//!
//! * `connect` of a datagram socket sends nothing. Resolvers connect to every address that a name has, to see which source
//!   address the kernel would choose (RFC 6724, in glibc, musl and Go), and Go even does it with port 53.
//! * The hooks of `sendmsg` do not run for connected sockets, those of `recvmsg` only where the caller asks who has sent, and
//!   neither knows whether a datagram goes to one host or to many.
//!
//! One thing the packets do not tell: where rules of the socket's own network namespace translate the destination, as a
//! node's do for its own processes, answers come from an address that nothing was sent to. A connected socket knows it, and
//! takes datagrams from nobody else; of one that is not connected, what its process names in `sendmsg` is remembered too, until
//! a datagram leaves to that very address.
//!
//! Where there is no room for a peer, it is not known later who has spoken first. What such a socket says to those who called
//! it, or hears from those that it called, is then a loss, and no conversation the other way round. A socket that does both can
//! still be mistaken then, in a window that says what it lost.

use agent_common::{
    address::Address,
    insert::Inserted,
    loss::Loss,
    tcp::ESTABLISHED,
    types::{FlowKey, OlderSocket, Owner, Peer, PeerKey, Roles, UDP_SILENCE_NS, kind},
};
use aya_ebpf::{
    bindings::{BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::{
        bpf_get_current_task, bpf_get_socket_cookie, bpf_sk_fullsock, bpf_sk_storage_get,
        bpf_skb_cgroup_id,
    },
    macros::{cgroup_skb, cgroup_sock, cgroup_sock_addr},
    programs::{SkBuffContext, SockAddrContext, SockContext},
};

use crate::{
    before::{TASK_COMM, TASK_TGID},
    maps::{PEERS, PEERS_LACK_ROOM, UDP_BINDERS, UDP_OLDER, UDP_ROLES, count_flow, count_loss},
    owner::{NOBODY, current_owner, now_ns},
    socket::follow,
};

pub(crate) const IPPROTO_UDP: u8 = 17;
/// `PACKET_BROADCAST` and `PACKET_MULTICAST` (`include/uapi/linux/if_packet.h`), of a frame that has arrived.
const TO_MANY: core::ops::RangeInclusive<u32> = 1..=2;
/// [`kind::CONNECTED`] of a datagram that arrives: the task is anybody, and not the one that has sent the first.
const CONNECTED_BEFORE: u8 = 0x80;
/// An IPv4 and a UDP header.
const SHORTEST: usize = 28;
/// What a cgroup program returns to let a packet or a call go on. No other value is returned here.
const GO_ON: i32 = 1;

/// Sits on datagrams that leave a socket (`ip_finish_output`, `ip6_finish_output`; since 4.10, with the helpers used here
/// since 5.2). Every packet of every socket below the cgroup comes by, so TCP's are let go before anything else is done.
#[cgroup_skb(egress)]
pub(crate) fn udp_egress(ctx: SkBuffContext) -> i32 {
    if is_datagram(&ctx) {
        sent(&ctx);
    }
    GO_ON
}

/// Sits on datagrams that a socket is about to queue (`sk_filter_trim_cap`), whether or not anybody asks who sent them.
#[cgroup_skb(ingress)]
pub(crate) fn udp_ingress(ctx: SkBuffContext) -> i32 {
    if is_datagram(&ctx) {
        received(&ctx);
    }
    GO_ON
}

/// Sits on `sendmsg` of an unconnected socket to an IPv4 address (`udp_sendmsg`, since 4.18).
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn udp_sendmsg4(ctx: SockAddrContext) -> i32 {
    name_peer4(&ctx);
    GO_ON
}

/// The same for IPv6 (`udpv6_sendmsg`).
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn udp_sendmsg6(ctx: SockAddrContext) -> i32 {
    name_peer6(&ctx);
    GO_ON
}

/// Sits at the end of `bind` (`__inet_bind`, since 4.17), in the process that calls it.
#[cgroup_sock(post_bind4)]
pub(crate) fn udp_bind4(ctx: SockContext) -> i32 {
    remember_binder(&ctx);
    GO_ON
}

/// The same for IPv6 (`__inet6_bind`).
#[cgroup_sock(post_bind6)]
pub(crate) fn udp_bind6(ctx: SockContext) -> i32 {
    remember_binder(&ctx);
    GO_ON
}

/// One end of a datagram's way; the port is in host byte order.
#[derive(Clone, Copy)]
struct End {
    address: Address,
    port: u16,
}

struct Datagram {
    source: End,
    destination: End,
}

/// Where a packet begins and ends: it begins with the network header, and has the headers in its linear part, because the
/// kernel has parsed them (`__cgroup_bpf_run_filter_skb`).
#[inline(always)]
fn bounds(ctx: &SkBuffContext) -> (usize, usize) {
    // SAFETY: the verifier checks the accesses to the context, and knows these two as the bounds of the packet.
    unsafe {
        (
            (&raw const (*ctx.skb.skb).data).read_volatile() as usize,
            (&raw const (*ctx.skb.skb).data_end).read_volatile() as usize,
        )
    }
}

/// Whether the packet is UDP's. Extension headers of IPv6 before UDP's are not followed.
#[inline(always)]
fn is_datagram(ctx: &SkBuffContext) -> bool {
    let (data, end) = bounds(ctx);
    if data + SHORTEST > end {
        return false;
    }
    // SAFETY: these bytes are there.
    let (first, protocol4, protocol6): (u8, u8, u8) =
        unsafe { (at(data, 0), at(data, 9), at(data, 6)) };
    match first >> 4 {
        4 => protocol4 == IPPROTO_UDP,
        6 => protocol6 == IPPROTO_UDP,
        _ => false,
    }
}

impl Datagram {
    /// Reads both ends from the headers; `None` if it does not go from one host to another.
    #[inline(always)]
    fn read(ctx: &SkBuffContext) -> Option<Self> {
        let (data, end) = bounds(ctx);
        if data + SHORTEST > end {
            return None;
        }
        // SAFETY: this byte is there.
        let first: u8 = unsafe { at(data, 0) };
        let (source, destination, ports) = match first >> 4 {
            4 => {
                // SAFETY: within the shortest packet. Addresses are copied as they are, in network byte order.
                let (source, destination) = unsafe { (at(data, 12), at(data, 16)) };
                let ports = data + usize::from(first & 0xf) * 4;
                (
                    Address::from_v4(source),
                    Address::from_v4(destination),
                    ports,
                )
            }
            6 if data + 48 <= end => {
                // SAFETY: within the 48 bytes.
                let (source, destination) = unsafe { (at(data, 8), at(data, 24)) };
                (source, destination, data + 40)
            }
            _ => return None,
        };
        if ports + 4 > end || destination.is_to_many() || destination.is_loopback() {
            return None;
        }
        // SAFETY: four bytes are there, as was just checked.
        let (from, to): (u16, u16) = unsafe { (at(ports, 0), at(ports, 2)) };
        Some(Self {
            source: End {
                address: source,
                port: u16::from_be(from),
            },
            destination: End {
                address: destination,
                port: u16::from_be(to),
            },
        })
    }
}

/// A datagram leaves: to a peer that has spoken before it is an answer, else this end is the client.
///
/// A function of its own, so that the program saves and reserves next to nothing for packets of TCP.
#[inline(never)]
fn sent(ctx: &SkBuffContext) {
    let Some(Datagram {
        source: local,
        destination: remote,
    }) = Datagram::read(ctx)
    else {
        return;
    };
    let (local, remote) = (&local, &remote);
    let now = now_ns();
    let key = peer_key(cookie(ctx), remote, 0);
    if is_known(&key, now, kind::CONNECTED) {
        return;
    }
    let is_answer = older_kind(ctx, now) == Some(kind::ACCEPTED);
    let peer = if is_answer {
        new_peer(now, kind::ACCEPTED, true, false)
    } else {
        new_peer(now, kind::CONNECTED, false, is_connected(ctx))
    };
    match meet(&key, &peer) {
        Inserted::New => {
            if peer.connected == 0 {
                // Answers come from this very address. What is not there need not be removed.
                let _removed = PEERS.remove(&PeerKey { named: 1, ..key });
            }
            if is_answer {
                count(ctx, local, remote, local.port, kind::ACCEPTED, now);
            } else if room_lacks(now) && !may_call(ctx) {
                count_loss(Loss::UdpPeersFull);
            } else {
                count(ctx, local, remote, remote.port, kind::CONNECTED, now);
            }
        }
        Inserted::Present => {}
        Inserted::NoRoom => {
            no_room(Loss::UdpPeersFull, now);
            may_call(ctx);
        }
    }
}

/// A datagram arrives: from a peer that was spoken to before it is an answer, else this end is the server.
#[inline(never)]
fn received(ctx: &SkBuffContext) {
    // SAFETY: the verifier checks the access to the context.
    let to = unsafe { (&raw const (*ctx.skb.skb).pkt_type).read_volatile() };
    if TO_MANY.contains(&to) {
        return;
    }
    let Some(Datagram {
        source: remote,
        destination: local,
    }) = Datagram::read(ctx)
    else {
        return;
    };
    let (local, remote) = (&local, &remote);
    let now = now_ns();
    let socket = cookie(ctx);
    let key = peer_key(socket, remote, 0);
    if is_known(&key, now, kind::ACCEPTED)
        || is_known(&PeerKey { named: 1, ..key }, now, kind::ACCEPTED)
    {
        return;
    }
    let older = older_kind(ctx, now);
    if older.is_none() && is_connected(ctx) {
        return;
    }
    let is_answer = older == Some(kind::CONNECTED);
    let kind = if is_answer {
        kind::CONNECTED
    } else {
        kind::ACCEPTED
    };
    match meet(&key, &new_peer(now, kind, is_answer, false)) {
        Inserted::New if is_answer => {
            count(ctx, local, remote, remote.port, CONNECTED_BEFORE, now);
        }
        Inserted::New => {
            let serves = may_serve(ctx);
            if room_lacks(now) && !serves {
                count_loss(Loss::UdpPeersFull);
            } else {
                count(ctx, local, remote, local.port, kind::ACCEPTED, now);
            }
        }
        Inserted::Present => {}
        Inserted::NoRoom => {
            no_room(Loss::UdpPeersFull, now);
            may_serve(ctx);
        }
    }
}

#[inline(always)]
fn name_peer4(ctx: &SockAddrContext) {
    // SAFETY: the verifier checks the access to the context. The address is in network byte order.
    let address = unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() };
    name_peer(ctx, Address::from_v4(address));
}

#[inline(always)]
fn name_peer6(ctx: &SockAddrContext) {
    // SAFETY: as above. Word by word, because kernels before 5.3 take no wider reads.
    let quarters = unsafe {
        [
            (&raw const (*ctx.sock_addr).user_ip6[0]).read_volatile(),
            (&raw const (*ctx.sock_addr).user_ip6[1]).read_volatile(),
            (&raw const (*ctx.sock_addr).user_ip6[2]).read_volatile(),
            (&raw const (*ctx.sock_addr).user_ip6[3]).read_volatile(),
        ]
    };
    name_peer(ctx, Address::from_quarters(quarters));
}

/// Remembers that a process has named this address, to which its datagrams may never go under that name.
#[inline(always)]
fn name_peer(ctx: &SockAddrContext, address: Address) {
    if address.is_to_many() {
        return;
    }
    // SAFETY: the verifier checks the access to the context. The port is in network byte order.
    let port = unsafe { (&raw const (*ctx.sock_addr).user_port).read_volatile() };
    let remote = End {
        address,
        port: u16::from_be(port as u16),
    };
    // SAFETY: the helper takes the context of this program.
    let socket = unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) };
    let now = now_ns();
    let key = peer_key(socket, &remote, 0);
    let named = PeerKey { named: 1, ..key };
    if !is_known(&key, now, kind::CONNECTED)
        && !is_known(&named, now, kind::CONNECTED)
        && meet(&named, &new_peer(now, kind::CONNECTED, false, false)) == Inserted::NoRoom
    {
        no_room(Loss::UdpNamesFull, now);
    }
}

#[inline(always)]
fn remember_binder(ctx: &SockContext) {
    // SAFETY: the verifier checks the access to the context.
    let protocol = unsafe { (&raw const (*ctx.sock).protocol).read_volatile() };
    if protocol != u32::from(IPPROTO_UDP) {
        return;
    }
    let mut owner = current_owner(0);
    // SAFETY: map, socket and value are of the types that the helper wants. A socket has room for it as long as there is
    // memory; what is missing then is pid and name.
    unsafe {
        bpf_sk_storage_get(
            (&raw const UDP_BINDERS).cast_mut().cast(),
            ctx.sock.cast(),
            (&raw mut owner).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        );
    }
}

/// Who sends this datagram: it leaves in the process that does. Programs for packets may ask for the task since 5.8, but for
/// its number and name only since 6.10, so these are read from it. Without the kernel's types it is whoever has bound the
/// socket, if anybody has.
#[inline(always)]
fn sender(ctx: &SkBuffContext) -> Owner {
    if TASK_TGID.load() == 0 || TASK_COMM.load() == 0 {
        return binder(ctx);
    }
    // SAFETY: the helper takes nothing, and the result is a number here.
    let task = unsafe { bpf_get_current_task() };
    Owner {
        pid: follow(task, &TASK_TGID).unwrap_or(0),
        comm: follow(task, &TASK_COMM).unwrap_or_default(),
        ..NOBODY
    }
}

/// Who has bound the socket that this datagram belongs to.
#[inline(always)]
fn binder(ctx: &SkBuffContext) -> Owner {
    stored(ctx, &UDP_BINDERS).unwrap_or(NOBODY)
}

/// The kind of a socket that is older than this program, and still so young a find that a conversation may be one that was
/// under way.
#[inline(always)]
fn older_kind(ctx: &SkBuffContext, now: u64) -> Option<u8> {
    let older: OlderSocket = stored(ctx, &UDP_OLDER)?;
    (now < older.until_ns).then_some(older.kind as u8)
}

/// Whether the process has connected the socket, so that this datagram comes from where it wanted one from: whoever speaks
/// first then, it is no client of this end.
#[inline(always)]
fn is_connected(ctx: &SkBuffContext) -> bool {
    let Some(socket) = socket(ctx) else {
        return false;
    };
    // SAFETY: checked, and the verifier checks the access. UDP has two of TCP's states (`__ip4_datagram_connect`).
    let state = unsafe { (&raw const (*socket).state).read_volatile() };
    state == ESTABLISHED.cast_unsigned()
}

/// What is kept with the socket that this datagram belongs to.
#[inline(always)]
fn stored<T: Copy>(ctx: &SkBuffContext, map: &'static SkStorage<T>) -> Option<T> {
    let socket = socket(ctx)?;
    // SAFETY: the verifier sees that the socket is checked before it is used, and that the value is.
    unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(map).cast_mut().cast(),
            socket.cast(),
            core::ptr::null_mut(),
            0,
        )
        .cast::<T>()
        .as_ref()
        .copied()
    }
}

#[inline(always)]
fn count(ctx: &SkBuffContext, local: &End, remote: &End, port: u16, kind: u8, now: u64) {
    let key = FlowKey {
        local: local.address,
        remote: remote.address,
        // SAFETY: the helper takes the context of this program, whose socket is the one that sends or receives.
        cgroup: unsafe { bpf_skb_cgroup_id(ctx.skb.skb) },
        netns: 0,
        port,
        protocol: IPPROTO_UDP,
        kind: kind & !CONNECTED_BEFORE,
    };
    count_flow(&key, now, || {
        if kind == kind::CONNECTED {
            sender(ctx)
        } else {
            binder(ctx)
        }
    });
}

/// Whether this peer is known; it stays so for a while then. `speaker` is the end that speaks, as [`Peer::kind`] names it.
#[inline(always)]
fn is_known(key: &PeerKey, now: u64, speaker: u8) -> bool {
    let Some(peer) = PEERS.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: an entry that the agent deletes at this moment may be another's when this is written: it is a time in any case,
    // and at worst an idle peer stays known for longer, or not as long.
    unsafe {
        (&raw mut (*peer).last_ns).write_volatile(now);
        if (&raw const (*peer).kind).read_volatile() != speaker {
            (&raw mut (*peer).answered).write_volatile(1);
        }
    }
    true
}

#[inline(always)]
fn new_peer(now: u64, kind: u8, is_answered: bool, is_connected: bool) -> Peer {
    Peer {
        first_ns: now,
        last_ns: now,
        kind,
        answered: u8::from(is_answered),
        connected: u8::from(is_connected),
        padding: [0; 5],
    }
}

/// Remembers a peer; it is new to one CPU only, whichever asks first.
#[inline(always)]
fn meet(key: &PeerKey, peer: &Peer) -> Inserted {
    PEERS.insert(key, peer, u64::from(BPF_NOEXIST)).into()
}

/// Counts that there is no room for a peer, and remembers it for as long as the peer would have been known.
#[inline(always)]
fn no_room(loss: Loss, now: u64) {
    count_loss(loss);
    if let Some(until_ns) = PEERS_LACK_ROOM.get_ptr_mut(0) {
        // SAFETY: the entry of an array stays. CPUs that race, and the agent, write nearly the same.
        unsafe { until_ns.write_volatile(now + UDP_SILENCE_NS) };
    }
}

/// Whether a peer that is not known may be one that there was no room for.
#[inline(always)]
fn room_lacks(now: u64) -> bool {
    PEERS_LACK_ROOM
        .get_ptr(0)
        // SAFETY: as in `no_room`.
        .is_some_and(|until_ns| now < unsafe { until_ns.read_volatile() })
}

/// Whether what this socket says to a peer that is not known cannot be an answer; it counts as one that calls then. To be asked
/// only where room lacks.
#[inline(always)]
fn may_call(ctx: &SkBuffContext) -> bool {
    let Some(roles) = roles(ctx) else {
        return true;
    };
    // SAFETY: storage lives as long as its socket. Nobody takes back what is written here.
    unsafe {
        let served = (&raw const (*roles).served).read_volatile() != 0;
        if !served {
            (&raw mut (*roles).called).write_volatile(1);
        }
        !served
    }
}

/// Whether what a peer that is not known says to this socket cannot be an answer; it counts as one that serves then.
#[inline(always)]
fn may_serve(ctx: &SkBuffContext) -> bool {
    let Some(roles) = roles(ctx) else {
        return true;
    };
    // SAFETY: as in `may_call`.
    unsafe {
        let called = (&raw const (*roles).called).read_volatile() != 0;
        if !called {
            (&raw mut (*roles).served).write_volatile(1);
        }
        !called
    }
}

/// What the socket of this datagram has been, to be changed.
#[inline(always)]
fn roles(ctx: &SkBuffContext) -> Option<*mut Roles> {
    let socket = socket(ctx)?;
    let mut new = Roles {
        served: 0,
        called: 0,
    };
    // SAFETY: map, socket and value are of the types that the helper wants; what it returns is checked before it is used.
    let roles = unsafe {
        bpf_sk_storage_get(
            (&raw const UDP_ROLES).cast_mut().cast(),
            socket.cast(),
            (&raw mut new).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
        .cast::<Roles>()
    };
    (!roles.is_null()).then_some(roles)
}

#[inline(always)]
fn peer_key(socket: u64, remote: &End, named: u16) -> PeerKey {
    PeerKey {
        address: remote.address,
        socket,
        port: remote.port,
        named,
        padding: 0,
    }
}

/// The kernel's number for the socket; it is never given to another.
#[inline(always)]
fn cookie(ctx: &SkBuffContext) -> u64 {
    // SAFETY: the helper takes the context of this program.
    unsafe { bpf_get_socket_cookie(ctx.skb.skb.cast()) }
}

/// The socket that this datagram belongs to.
#[inline(always)]
fn socket(ctx: &SkBuffContext) -> Option<*mut bpf_sock> {
    // SAFETY: the verifier checks the access to the context, and that what comes of it is checked before it is used.
    unsafe {
        let socket = (&raw const (*ctx.skb.skb).__bindgen_anon_2.sk).read_volatile();
        if socket.is_null() {
            return None;
        }
        let socket = bpf_sk_fullsock(socket);
        (!socket.is_null()).then_some(socket)
    }
}

/// Reads at a byte offset into a packet.
///
/// # Safety
/// As many bytes must be there, checked in a way that the verifier follows.
#[inline(always)]
unsafe fn at<T: Copy>(data: usize, offset: usize) -> T {
    // SAFETY: the caller's. Packets are not aligned.
    unsafe { ((data + offset) as *const T).read_unaligned() }
}
