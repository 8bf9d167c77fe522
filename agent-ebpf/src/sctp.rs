//! SCTP associations, by the packets that make them (`agent_common::sctp`).
//!
//! The sender of an INIT is the client. Whose it is, and where it went, is remembered in [`SCTP_CALLS`] under the tag that the client
//! has chosen: every answer bears it, and so is known whatever address it comes from. An association counts at its client when a COOKIE
//! ACK arrives, at its server when the first one leaves. Nobody gets one who does not receive what is sent to the address that he
//! names, and what a kernel that refuses an INIT or a cookie sends is none.
//!
//! Where both ends call at the same time, each sends an INIT and a COOKIE ACK: each is a client, and if its socket listens a server.
//!
//! Stacks in user space that send through raw sockets exchange the same packets, and are seen like the kernel's own.

use agent_common::{
    insert::Inserted,
    loss::Loss,
    sctp::{Chunk, ChunkHead, FIRST_CHUNK, Head, IPPROTO_SCTP},
    tcp::LISTEN,
    types::{Call, CallKey, Connection, Owner, PeerKey, kind},
};
use aya_ebpf::{bindings::BPF_NOEXIST, programs::SkBuffContext};

use crate::{
    maps::{SCTP_CALLS, count_flow, count_loss, witness},
    owner::{NOBODY, now_ns},
    packet::{End, Packet, binder, cookie, flow_key, sender, socket, transport_offset},
    udp::{meet, new_peer},
};

/// `SOCK_RAW` of `include/linux/net.h`.
const RAW: u32 = 3;

/// What a packet is about.
struct Message {
    chunk: Chunk,
    /// The client's tag: of an INIT its own, else the one that the packet bears.
    tag: u32,
}

/// A packet leaves.
#[inline(never)]
pub(crate) fn sent(ctx: &SkBuffContext) {
    let Some(Message { chunk, tag }) = Message::read(ctx) else {
        return;
    };
    let Some(Packet {
        source,
        destination,
    }) = Packet::read(ctx)
    else {
        return;
    };
    match chunk {
        Chunk::Init => call(ctx, tag, &source, &destination),
        Chunk::CookieAck => accept(ctx, tag, &source, &destination),
        _ => {}
    }
}

/// A packet arrives.
#[inline(never)]
pub(crate) fn received(ctx: &SkBuffContext) {
    let Some(Message { chunk, tag }) = Message::read(ctx) else {
        return;
    };
    match chunk {
        Chunk::CookieAck => end_call(ctx, tag, kind::CONNECTED),
        Chunk::Abort => end_call(ctx, tag, kind::CONNECT_FAILED),
        _ => {}
    }
}

impl Message {
    #[inline(always)]
    fn read(ctx: &SkBuffContext) -> Option<Self> {
        let start = transport_offset(ctx)?;
        let head: Head = load(ctx, start)?;
        let mut at = start + FIRST_CHUNK;
        let mut chunk = head.chunk.chunk()?;
        if let Chunk::Auth(length) = chunk {
            at += length;
            chunk = load::<ChunkHead>(ctx, at)?.chunk()?;
        }
        let tag = match chunk {
            Chunk::Init => load(ctx, at + size_of::<ChunkHead>() as u32)?,
            _ => head.tag,
        };
        Some(Self { chunk, tag })
    }
}

/// A first INIT leaves in the process that calls `connect` or `sendmsg`. One that is sent again has had no answer for the time that
/// the stack waits, three seconds as a rule, and counts as an attempt that failed, once.
#[inline(always)]
fn call(ctx: &SkBuffContext, tag: u32, local: &End, remote: &End) {
    let now = now_ns();
    let key = call_key(ctx, tag);
    if let Some(call) = SCTP_CALLS.get_ptr_mut(&key) {
        // SAFETY: an entry that is removed at this moment may be another's when this is written: a time in any case, and the
        // other fields are read only.
        let again = unsafe {
            (&raw mut (*call).last_ns).write_volatile(now);
            (&raw mut (*call).again).replace(1)
        };
        if again == 0 {
            // SAFETY: as above.
            let call = unsafe { *call };
            count_failed(&call, now);
        }
        // To a peer with several addresses it goes to another of them.
        // SAFETY: as above; one association's INITs are sent one after the other.
        unsafe {
            (&raw mut (*call).key.remote).write(remote.address);
            (&raw mut (*call).key.port).write_volatile(remote.port);
        }
        return;
    }
    let Owner { pid, comm, .. } = sender(ctx);
    let call = Call {
        key: flow_key(
            ctx,
            local,
            remote,
            remote.port,
            IPPROTO_SCTP,
            kind::CONNECTED,
        ),
        last_ns: now,
        pid,
        again: 0,
        comm,
    };
    if Inserted::from(SCTP_CALLS.insert(&key, &call, u64::from(BPF_NOEXIST))) == Inserted::NoRoom {
        count_loss(Loss::SctpCallsFull);
    }
}

/// The answer to an INIT or to the cookie that followed it.
#[inline(always)]
fn end_call(ctx: &SkBuffContext, tag: u32, kind: u8) {
    let key = call_key(ctx, tag);
    // SAFETY: the value is copied at once; the packets of one association come one after the other.
    let Some(call) = unsafe { SCTP_CALLS.get(&key) }.copied() else {
        return;
    };
    // What stays where the kernel refuses is removed by the agent, see `tcp::take_caller`.
    let _removed = SCTP_CALLS.remove(&key);
    let now = now_ns();
    if kind == kind::CONNECTED {
        if let Some(packet) = Packet::read(ctx) {
            remember(&packet.destination, &packet.source);
        }
        count_flow(&call.key, now, || caller(&call));
    } else if call.again == 0 {
        count_failed(&call, now);
    }
}

#[inline(always)]
fn count_failed(call: &Call, now: u64) {
    let mut key = call.key;
    key.kind = kind::CONNECT_FAILED;
    count_flow(&key, now, || caller(call));
}

/// A COOKIE ACK leaves. A lost one is sent again, with the same tag; by then the socket may be another, which `accept` has given the
/// association to.
#[inline(always)]
fn accept(ctx: &SkBuffContext, tag: u32, local: &End, remote: &End) {
    let Some((is_raw, port)) = serves(ctx, local) else {
        return;
    };
    let now = now_ns();
    let peer = PeerKey {
        address: remote.address,
        socket: cookie(ctx),
        port: remote.port,
        named: 0,
        tag,
    };
    // Without room it is counted all the same: at worst twice, if the packet is sent again.
    if meet(&peer, &new_peer(now, kind::ACCEPTED, true, false)) == Inserted::Present {
        return;
    }
    remember(local, remote);
    let key = flow_key(ctx, local, remote, port, IPPROTO_SCTP, kind::ACCEPTED);
    count_flow(&key, now, || if is_raw { sender(ctx) } else { binder(ctx) });
}

/// Whether the socket is one that associations are made for, and not one that has its association: whether it is raw, and its own
/// port. What a node translates for its own processes leaves from the port that was called, which the packet has.
#[inline(always)]
fn serves(ctx: &SkBuffContext, local: &End) -> Option<(bool, u16)> {
    let socket = socket(ctx)?;
    // SAFETY: checked, and the verifier checks the accesses. The port is in host byte order; that of a raw socket is its protocol.
    let (kind, state, port) = unsafe {
        (
            (&raw const (*socket).type_).read_volatile(),
            (&raw const (*socket).state).read_volatile(),
            (&raw const (*socket).src_port).read_volatile(),
        )
    };
    match kind {
        RAW => Some((true, local.port)),
        _ if state == LISTEN.cast_unsigned() => Some((false, port as u16)),
        _ => None,
    }
}

/// Tells who looks for older associations that this one is counted. From here nothing leads to the network namespace.
#[inline(always)]
fn remember(local: &End, remote: &End) {
    witness(|| Connection {
        local: local.address,
        remote: remote.address,
        netns: 0,
        local_port: local.port,
        remote_port: remote.port,
    });
}

#[inline(always)]
fn caller(call: &Call) -> Owner {
    Owner {
        pid: call.pid,
        comm: call.comm,
        ..NOBODY
    }
}

#[inline(always)]
fn call_key(ctx: &SkBuffContext, tag: u32) -> CallKey {
    CallKey {
        socket: cookie(ctx),
        tag,
        padding: 0,
    }
}

/// Copies bytes of the packet; `None` if it has not so many.
#[inline(always)]
fn load<T>(ctx: &SkBuffContext, offset: u32) -> Option<T> {
    ctx.load(offset as usize).ok()
}
