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
    types::{IPPROTO_UDP, OlderSocket, Owner, Peer, PeerKey, Roles, UDP_SILENCE_NS, kind},
};
use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::bpf_get_socket_cookie,
    macros::{cgroup_sock, cgroup_sock_addr},
    programs::{SkBuffContext, SockAddrContext, SockContext},
};

use crate::{
    maps::{BINDERS, PEERS, PEERS_LACK_ROOM, UDP_OLDER, UDP_ROLES, count_flow, count_loss, keep},
    owner::{current_owner, now_ns},
    packet::{End, GO_ON, Packet, binder, cookie, flow_key, sender, socket, stored},
    sibling,
};

/// `PACKET_BROADCAST` and `PACKET_MULTICAST` (`include/uapi/linux/if_packet.h`), of a frame that has arrived.
const TO_MANY: core::ops::RangeInclusive<u32> = 1..=2;

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

/// A datagram leaves: to a peer that has spoken before it is an answer, else this end is the client.
///
/// A function of its own, so that the program saves and reserves next to nothing for packets of TCP.
#[inline(never)]
pub(crate) fn sent(ctx: &SkBuffContext) {
    let Some(Packet {
        source: local,
        destination: remote,
    }) = Packet::read(ctx)
    else {
        return;
    };
    let (local, remote) = (&local, &remote);
    let now = now_ns();
    let key = peer_key(cookie(ctx), remote, 0);
    if is_known(&key, now, kind::CONNECTED) {
        return;
    }
    let Some(socket) = udp_socket(ctx) else {
        return;
    };
    let older = older_kind(ctx, now);
    let is_answer = older == Some(kind::ACCEPTED);
    let goes_on = !is_answer && socket.is_connected && goes_on_for_another(ctx, local, remote, now);
    let peer = if is_answer || goes_on {
        new_peer(now, kind::ACCEPTED, true, goes_on)
    } else {
        new_peer(now, kind::CONNECTED, false, socket.is_connected)
    };
    match meet(&key, &peer) {
        Inserted::New => {
            if peer.connected == 0 {
                // Answers come from this very address. What is not there need not be removed.
                let _removed = PEERS.remove(&PeerKey { named: 1, ..key });
            }
            if goes_on {
                // A server's, also when this peer is forgotten.
                may_serve(ctx);
                return;
            }
            if is_answer {
                doubt(remote, local);
                count(ctx, local, remote, kind::ACCEPTED, now, binder);
            } else if room_lacks(now) && !may_call(ctx) {
                count_loss(Loss::UdpPeersFull);
            } else {
                count(ctx, local, remote, kind::CONNECTED, now, sender);
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
pub(crate) fn received(ctx: &SkBuffContext) {
    // SAFETY: the verifier checks the access to the context.
    let to = unsafe { (&raw const (*ctx.skb.skb).pkt_type).read_volatile() };
    if TO_MANY.contains(&to) {
        return;
    }
    let Some(Packet {
        source: remote,
        destination: local,
    }) = Packet::read(ctx)
    else {
        return;
    };
    let (local, remote) = (&local, &remote);
    let now = now_ns();
    let key = peer_key(cookie(ctx), remote, 0);
    if is_known(&key, now, kind::ACCEPTED)
        || is_known(&PeerKey { named: 1, ..key }, now, kind::ACCEPTED)
    {
        return;
    }
    let Some(socket) = udp_socket(ctx) else {
        return;
    };
    let older = older_kind(ctx, now);
    if older.is_none() && socket.is_connected {
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
            doubt(local, remote);
            // The task is anybody, and not the one that has sent the first.
            count(ctx, local, remote, kind::CONNECTED, now, binder);
        }
        Inserted::New => {
            if older.is_some() {
                doubt(remote, local);
            }
            let serves = may_serve(ctx);
            if room_lacks(now) && !serves {
                count_loss(Loss::UdpPeersFull);
            } else {
                count(ctx, local, remote, kind::ACCEPTED, now, binder);
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
    // SAFETY: the program's own socket.
    unsafe { keep(&BINDERS, ctx.sock.cast(), &mut owner) };
}

/// The kind of a socket that is older than this program, and still so young a find that a conversation may be one that was
/// under way.
#[inline(always)]
fn older_kind(ctx: &SkBuffContext, now: u64) -> Option<u8> {
    let older: OlderSocket = stored(ctx, &UDP_OLDER)?;
    (now < older.until_ns).then_some(older.kind as u8)
}

/// What a datagram's socket says of itself.
struct UdpSocket {
    /// Whether the process has connected it, so that a datagram comes from where it wanted one from: whoever speaks first then, it
    /// is no client of this end.
    is_connected: bool,
}

/// The socket that this datagram belongs to; `None` if it is none of UDP's, such as a raw one, to which all datagrams of its
/// namespace are shown.
#[inline(always)]
fn udp_socket(ctx: &SkBuffContext) -> Option<UdpSocket> {
    /// `SOCK_DGRAM` of `include/linux/net.h`.
    const DATAGRAMS: u32 = 2;
    let socket = socket(ctx)?;
    // SAFETY: checked, and the verifier checks the accesses.
    let (kind, protocol, state) = unsafe {
        (
            (&raw const (*socket).type_).read_volatile(),
            (&raw const (*socket).protocol).read_volatile(),
            (&raw const (*socket).state).read_volatile(),
        )
    };
    // UDP has two of TCP's states (`__ip4_datagram_connect`).
    (kind == DATAGRAMS && protocol == u32::from(IPPROTO_UDP)).then_some(UdpSocket {
        is_connected: state == ESTABLISHED.cast_unsigned(),
    })
}

/// Whether this peer has spoken to another socket on the port of this one, see [`sibling`]: that one's conversation is counted.
#[inline(always)]
fn goes_on_for_another(ctx: &SkBuffContext, local: &End, remote: &End, now: u64) -> bool {
    sibling::cookie_of_the_asked(ctx, local)
        .is_some_and(|cookie| is_known(&peer_key(cookie, remote, 0), now, kind::CONNECTED))
}

/// Counts a conversation of an older socket as one that may be the other way round, if its client's port is one that servers
/// have, or the server's own: those of peers among themselves, such as of NTP.
#[inline(always)]
fn doubt(client: &End, server: &End) {
    /// Below it only who is privileged may bind (`net.ipv4.ip_unprivileged_port_start`).
    const UNPRIVILEGED: u16 = 1_024;
    if client.port < UNPRIVILEGED || client.port == server.port {
        count_loss(Loss::UdpDirectionGuessed);
    }
}

#[inline(always)]
fn count(
    ctx: &SkBuffContext,
    local: &End,
    remote: &End,
    kind: u8,
    now: u64,
    owner: fn(&SkBuffContext) -> Owner,
) {
    let server = if kind == kind::CONNECTED {
        remote
    } else {
        local
    };
    let key = flow_key(ctx, local, remote, server.port, IPPROTO_UDP, kind);
    count_flow(&key, now, || owner(ctx));
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
pub(crate) fn new_peer(now: u64, kind: u8, is_answered: bool, is_connected: bool) -> Peer {
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
pub(crate) fn meet(key: &PeerKey, peer: &Peer) -> Inserted {
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
        cookie: cookie(ctx),
        served: 0,
        called: 0,
    };
    // SAFETY: the packet's own socket.
    unsafe { keep(&UDP_ROLES, socket.cast(), &mut new) }
}

#[inline(always)]
fn peer_key(socket: u64, remote: &End, named: u16) -> PeerKey {
    PeerKey {
        address: remote.address,
        socket,
        port: remote.port,
        named,
        tag: 0,
    }
}
