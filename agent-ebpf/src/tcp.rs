//! TCP connections, by the state changes of their sockets.

pub(crate) use agent_common::types::IPPROTO_TCP;
use agent_common::{
    address::Address,
    loss::Loss,
    sctp::IPPROTO_SCTP,
    tcp::{Transition, classify, classify_all},
    types::{Connection, FlowKey, ListenerKey, Owner, kind},
};
use aya_ebpf::{
    EbpfContext,
    bindings::BPF_ANY,
    macros::{btf_tracepoint, raw_tracepoint, tracepoint},
    programs::{BtfTracePointContext, RawTracePointContext, TracePointContext},
};
use aya_log_ebpf::debug;

use crate::{
    connections,
    maps::{
        CONNECT_OWNERS, CROSSED, LISTENERS, announce_flow, count_change, count_flow, count_loss,
        count_seen_change, witness,
    },
    owner::{NOBODY, current_owner, now_ns},
    socket::{Ends, RecordedSocket, Socket, TypedSocket},
};

const TCP: u16 = IPPROTO_TCP as u16;
const SCTP: u16 = IPPROTO_SCTP as u16;

/// Sits on the tracepoint `inet_sock_set_state` (`inet_sk_set_state` in `net/ipv4/af_inet.c`) as a BTF tracepoint: since
/// 5.5, needs the kernel's BTF; since 5.15 a socket's cgroup is typed, which this program counts on.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub(crate) fn inet_sock_set_state_btf(ctx: BtfTracePointContext) -> i32 {
    typed::<false>(&ctx);
    0
}

/// The same, telling connections apart.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub(crate) fn connections_btf(ctx: BtfTracePointContext) -> i32 {
    typed::<true>(&ctx);
    0
}

/// The same as a classic tracepoint, `sock:inet_sock_set_state`: since 4.16, with this layout since 5.6. Works without BTF;
/// then network namespace and socket cgroup are not known.
#[tracepoint(category = "sock", name = "inet_sock_set_state")]
pub(crate) fn inet_sock_set_state_classic(ctx: TracePointContext) -> u32 {
    recorded::<false>(&ctx);
    0
}

/// The same, telling connections apart.
#[tracepoint(category = "sock", name = "inet_sock_set_state")]
pub(crate) fn connections_classic(ctx: TracePointContext) -> u32 {
    recorded::<true>(&ctx);
    0
}

/// Beside the classic program, counts what that one ought to see. The kernel leaves a classic tracepoint's programs out while
/// anything of BPF is at work on the CPU, another program or a reading of a map (`trace_call_bpf`, `bpf_prog_active`), as a
/// softirq may find it; how often, it says since 6.7 only. A raw tracepoint, since 4.17, is not left out; since 6.1 where it is
/// running itself, and then the kernel counts that.
#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
pub(crate) fn state_changes(ctx: RawTracePointContext) -> i32 {
    change::<false>(&ctx);
    0
}

/// The same beside the program that tells connections apart.
#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
pub(crate) fn state_changes_apart(ctx: RawTracePointContext) -> i32 {
    change::<true>(&ctx);
    0
}

#[inline(always)]
fn change<const APART: bool>(ctx: &RawTracePointContext) {
    if meaning::<APART>(ctx.arg(1), ctx.arg(2)).is_some() {
        count_change();
    }
}

#[inline(always)]
fn typed<const APART: bool>(ctx: &BtfTracePointContext) {
    if let Some(transition) = meaning::<APART>(ctx.arg(1), ctx.arg(2)) {
        let socket = TypedSocket::new(ctx);
        observe::<APART>(&socket, transition);
        if transition == Transition::ListenStarted {
            log_listener(ctx);
        }
    }
}

#[inline(always)]
fn recorded<const APART: bool>(ctx: &TracePointContext) {
    let (old, new) = RecordedSocket::states(ctx);
    if let Some(transition) = meaning::<APART>(old, new) {
        count_seen_change();
        let socket = RecordedSocket::new(ctx);
        observe::<APART>(&socket, transition);
        if transition == Transition::ListenStarted {
            log_listener(ctx);
        }
    }
}

/// The end of a connection matters only where connections are told apart.
#[inline(always)]
fn meaning<const APART: bool>(old: i32, new: i32) -> Option<Transition> {
    if APART {
        classify_all(old, new)
    } else {
        classify(old, new)
    }
}

/// For people who debug a capture; a function of its own, because a message's buffer is large and the stack is not.
#[inline(never)]
fn log_listener(ctx: &impl EbpfContext) {
    debug!(ctx, "process {} listens", ctx.tgid());
}

/// SCTP's associations are seen by their packets (`sctp`). Its sockets have states of TCP for something similar; that one
/// listens is told in the process that has it listen.
#[inline(always)]
fn observe<const APART: bool>(socket: &impl Socket, transition: Transition) {
    match socket.protocol() {
        Some(TCP) => {}
        Some(SCTP) if transition == Transition::ListenStarted => {
            socket.keep_owner(&mut current_owner(socket.id()));
            return;
        }
        // MPTCP (262) among them, whose subflows are TCP sockets that report themselves.
        _ => return,
    }
    match transition {
        Transition::ConnectStarted => start_connect::<APART>(socket),
        Transition::Connected => finish_connect::<APART>(socket, kind::CONNECTED),
        Transition::ConnectFailed => finish_connect::<APART>(socket, kind::CONNECT_FAILED),
        Transition::ListenStarted => remember_listener(socket),
        Transition::ListenEnded => forget_listener(socket),
        Transition::Crossed => cross(socket),
        Transition::Answered | Transition::Unanswered | Transition::ClosedEarly => {
            end_handshake::<APART>(socket, transition);
        }
        Transition::Ended => connections::end(socket),
    }
}

/// Of a socket that goes through the states of one that was called. What its server has closed early was accepted: only then
/// has a process a socket of a handshake that is not completed.
#[inline(always)]
fn end_handshake<const APART: bool>(socket: &impl Socket, transition: Transition) {
    if !has_crossed(socket) {
        if transition != Transition::Unanswered {
            accept::<APART>(socket);
        }
        return;
    }
    let kind = if transition == Transition::Answered {
        kind::CONNECTED
    } else {
        kind::CONNECT_FAILED
    };
    finish_connect::<APART>(socket, kind);
}

/// The flow's entry is made or found before it is known how the call ends: then the task is anybody, and now it is the
/// caller. An entry with a count of 0 says whose connects are under way.
///
/// Addresses are chosen before this state is set (`tcp_v4_connect`, `tcp_v6_connect`), the local port after.
#[inline(always)]
fn start_connect<const APART: bool>(socket: &impl Socket) {
    let Some(ends) = socket.ends() else {
        count_loss(Loss::SocketUnreadable);
        return;
    };
    let cgroup = socket.cgroup();
    if APART {
        connections::start(socket, cgroup);
    }
    if cgroup == 0 && !socket.is_typed() {
        remember_caller(socket);
        return;
    }
    if APART {
        return;
    }
    let key = flow_key(socket, &ends, cgroup, ends.remote_port, kind::CONNECTED);
    announce_flow(&key, || current_owner(socket.id()));
}

/// Without the kernel's types nothing leads from the socket to its cgroup, so there is no key yet.
#[inline(always)]
fn remember_caller(socket: &impl Socket) {
    let owner = current_owner(socket.id());
    if CONNECT_OWNERS
        .insert(owner.socket, &owner, u64::from(BPF_ANY))
        .is_err()
    {
        count_loss(Loss::ConnectOwnersFull);
    }
}

#[inline(always)]
fn finish_connect<const APART: bool>(socket: &impl Socket, kind: u8) {
    let mut cgroup = socket.cgroup();
    let mut owner = NOBODY;
    if cgroup == 0 && !socket.is_typed() {
        owner = take_caller(socket);
        cgroup = owner.cgroup;
    }
    let Some(ends) = socket.ends() else {
        count_loss(Loss::SocketUnreadable);
        return;
    };
    if kind == kind::CONNECTED {
        witness(|| connection(socket, &ends));
    }
    let key = flow_key(socket, &ends, cgroup, ends.remote_port, kind);
    if APART {
        connections::report(socket, &ends, &key, &owner);
        return;
    }
    count_flow(&key, now_ns(), || owner);
}

#[inline(always)]
fn take_caller(socket: &impl Socket) -> Owner {
    let id = socket.id();
    // SAFETY: only this socket's own state changes touch the entry, and they follow one another.
    let Some(owner) = unsafe { CONNECT_OWNERS.get(id) }.copied() else {
        return NOBODY;
    };
    // Kernels from 5.11 to 6.6 may refuse when a softirq interrupts the map's own work. The entry then stays until the
    // socket's memory is another one's, whose connect replaces it.
    let _removed = CONNECT_OWNERS.remove(id);
    owner
}

#[inline(always)]
fn cross(socket: &impl Socket) {
    if CROSSED.insert(socket.id(), 1, u64::from(BPF_ANY)).is_err() {
        count_loss(Loss::CrossedFull);
    }
}

/// Whether this socket has called, although it goes through the states of one that was called.
#[inline(always)]
fn has_crossed(socket: &impl Socket) -> bool {
    let id = socket.id();
    if !socket.may_be_somebody_s() || CROSSED.get_ptr(id).is_none() {
        return false;
    }
    let _removed = CROSSED.remove(id);
    true
}

#[inline(always)]
fn accept<const APART: bool>(socket: &impl Socket) {
    let Some(ends) = socket.ends() else {
        count_loss(Loss::SocketUnreadable);
        return;
    };
    witness(|| connection(socket, &ends));
    let mut cgroup = socket.cgroup();
    if cgroup == 0 && !socket.is_typed() {
        // Without the kernel's types only the listener's own call tells.
        cgroup = listener(socket, &ends).cgroup;
    }
    let key = flow_key(socket, &ends, cgroup, ends.local_port, kind::ACCEPTED);
    if APART {
        let owner = listener(socket, &ends);
        connections::report(socket, &ends, &key, &owner);
        return;
    }
    count_flow(&key, now_ns(), || listener(socket, &ends));
}

#[inline(always)]
fn remember_listener(socket: &impl Socket) {
    let Some(ends) = socket.ends() else {
        count_loss(Loss::SocketUnreadable);
        return;
    };
    let owner = current_owner(socket.id());
    if LISTENERS
        .insert(
            listener_key(socket, &ends, ends.local.unwildcard()),
            &owner,
            u64::from(BPF_ANY),
        )
        .is_err()
    {
        count_loss(Loss::ListenersFull);
    }
}

#[inline(always)]
fn forget_listener(socket: &impl Socket) {
    let Some(mut ends) = socket.ends() else {
        return;
    };
    ends.local_port = socket.closed_port(&ends);
    let key = listener_key(socket, &ends, ends.local.unwildcard());
    // SAFETY: the value is copied at once; a torn read can only come from a listener that replaced this one, and then
    // the sockets differ or the entry goes a moment early, which costs pid and name of some flows.
    let current = unsafe { LISTENERS.get(key) }.map(|owner| owner.socket);
    // What `/proc` told has no socket.
    if current.is_some_and(|current| current == socket.id() || current == 0) {
        // As above: what stays is replaced by the next listener there.
        let _removed = LISTENERS.remove(key);
    }
}

/// Who listens where this accepted socket arrived: on its address, or on every address.
///
/// Without the kernel's types all namespaces look alike, and every pod may listen on every address: then only an exact
/// address tells.
#[inline(always)]
pub(crate) fn listener(socket: &impl Socket, ends: &Ends) -> Owner {
    // SAFETY: the value is copied at once, and a listener's entry is written whole before anything is accepted.
    unsafe {
        let exact = LISTENERS.get(listener_key(socket, ends, ends.local));
        if exact.is_none() && socket.netns() != 0 {
            LISTENERS.get(listener_key(socket, ends, Address::UNSPECIFIED))
        } else {
            exact
        }
    }
    .copied()
    .unwrap_or(NOBODY)
}

#[inline(always)]
pub(crate) fn listener_key(socket: &impl Socket, ends: &Ends, address: Address) -> ListenerKey {
    ListenerKey {
        address,
        netns: socket.netns(),
        port: ends.local_port,
        padding: 0,
    }
}

#[inline(always)]
pub(crate) fn connection(socket: &impl Socket, ends: &Ends) -> Connection {
    Connection {
        local: ends.local,
        remote: ends.remote,
        netns: socket.netns(),
        local_port: ends.local_port,
        remote_port: ends.remote_port,
    }
}

#[inline(always)]
pub(crate) fn flow_key(
    socket: &impl Socket,
    ends: &Ends,
    cgroup: u64,
    port: u16,
    kind: u8,
) -> FlowKey {
    FlowKey {
        local: ends.local,
        remote: ends.remote,
        cgroup,
        netns: socket.netns(),
        port,
        protocol: IPPROTO_TCP,
        kind,
    }
}
