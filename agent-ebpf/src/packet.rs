//! Packets of a socket, as they leave it and before they are queued to it: which protocol's they are, where they come from and go,
//! and whose the socket is.

use agent_common::{
    address::Address,
    sctp::IPPROTO_SCTP,
    types::{FlowKey, IPPROTO_UDP, Owner},
};
use aya_ebpf::{
    bindings::bpf_sock,
    btf_maps::SkStorage,
    helpers::{
        bpf_get_current_task, bpf_get_socket_cookie, bpf_sk_fullsock, bpf_sk_storage_get,
        bpf_skb_cgroup_id,
    },
    macros::cgroup_skb,
    programs::SkBuffContext,
};

use crate::{
    before::{TASK_COMM, TASK_TGID},
    maps::BINDERS,
    owner::NOBODY,
    sctp,
    socket::follow,
    udp,
};

/// What a cgroup program returns to let a packet or a call go on. No other value is returned by any.
pub(crate) const GO_ON: i32 = 1;
/// An IPv4 and a UDP header.
const SHORTEST: usize = 28;

/// Sits on packets that leave a socket (`ip_finish_output`, `ip6_finish_output`; since 4.10, with the helpers used here
/// since 5.9). Every packet of every socket below the cgroup comes by, so TCP's are let go before anything else is done.
#[cgroup_skb(egress)]
pub(crate) fn packet_egress(ctx: SkBuffContext) -> i32 {
    match protocol(&ctx) {
        IPPROTO_UDP => udp::sent(&ctx),
        IPPROTO_SCTP => sctp::sent(&ctx),
        _ => {}
    }
    GO_ON
}

/// Sits on packets that a socket is about to queue (`sk_filter_trim_cap`), whether or not anybody asks who sent them.
#[cgroup_skb(ingress)]
pub(crate) fn packet_ingress(ctx: SkBuffContext) -> i32 {
    match protocol(&ctx) {
        IPPROTO_UDP => udp::received(&ctx),
        IPPROTO_SCTP => sctp::received(&ctx),
        _ => {}
    }
    GO_ON
}

/// One end of a packet's way; the port is in host byte order.
#[derive(Clone, Copy)]
pub(crate) struct End {
    pub(crate) address: Address,
    pub(crate) port: u16,
}

/// Where a packet comes from and where it goes.
pub(crate) struct Packet {
    pub(crate) source: End,
    pub(crate) destination: End,
}

impl Packet {
    /// Reads both ends from the headers; `None` if it does not go from one host to another.
    #[inline(always)]
    pub(crate) fn read(ctx: &SkBuffContext) -> Option<Self> {
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

/// The key of a flow of the socket that this packet belongs to. `port` is the server's.
#[inline(always)]
pub(crate) fn flow_key(
    ctx: &SkBuffContext,
    local: &End,
    remote: &End,
    port: u16,
    protocol: u8,
    kind: u8,
) -> FlowKey {
    FlowKey {
        local: local.address,
        remote: remote.address,
        // SAFETY: the helper takes the context of this program, whose socket is the one that sends or receives.
        cgroup: unsafe { bpf_skb_cgroup_id(ctx.skb.skb) },
        netns: 0,
        port,
        protocol,
        kind,
    }
}

/// Who sends this packet: it leaves in the process that does. Programs for packets may ask for the task since 5.8, but for
/// its number and name only since 6.10, so these are read from it. Without the kernel's types it is whoever has bound the
/// socket, if anybody has.
#[inline(always)]
pub(crate) fn sender(ctx: &SkBuffContext) -> Owner {
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

/// Who has bound the socket that this packet belongs to, or has it listen.
#[inline(always)]
pub(crate) fn binder(ctx: &SkBuffContext) -> Owner {
    stored(ctx, &BINDERS).unwrap_or(NOBODY)
}

/// What is kept with the socket that this packet belongs to.
#[inline(always)]
pub(crate) fn stored<T: Copy>(ctx: &SkBuffContext, map: &'static SkStorage<T>) -> Option<T> {
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

/// The kernel's number for the socket; it is never given to another.
#[inline(always)]
pub(crate) fn cookie(ctx: &SkBuffContext) -> u64 {
    // SAFETY: the helper takes the context of this program.
    unsafe { bpf_get_socket_cookie(ctx.skb.skb.cast()) }
}

/// The socket that this packet belongs to.
#[inline(always)]
pub(crate) fn socket(ctx: &SkBuffContext) -> Option<*mut bpf_sock> {
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

/// Which protocol's packet it is; 0 if that is not known. Extension headers of IPv6 are not followed.
#[inline(always)]
fn protocol(ctx: &SkBuffContext) -> u8 {
    let (data, end) = bounds(ctx);
    if data + SHORTEST > end {
        return 0;
    }
    // SAFETY: these bytes are there.
    let (first, protocol4, protocol6): (u8, u8, u8) =
        unsafe { (at(data, 0), at(data, 9), at(data, 6)) };
    match first >> 4 {
        4 => protocol4,
        6 => protocol6,
        _ => 0,
    }
}

/// Where the transport header begins, in bytes from the network header; `None` in the later pieces of a packet, which a socket
/// sends only if it makes the network header itself.
#[inline(always)]
pub(crate) fn transport_offset(ctx: &SkBuffContext) -> Option<u32> {
    let (data, end) = bounds(ctx);
    if data + SHORTEST > end {
        return None;
    }
    // SAFETY: these bytes are there.
    let (first, piece): (u8, u16) = unsafe { (at(data, 0), at(data, 6)) };
    match first >> 4 {
        4 if u16::from_be(piece) & 0x1fff == 0 => Some(u32::from(first & 0xf) * 4),
        6 => Some(40),
        _ => None,
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
