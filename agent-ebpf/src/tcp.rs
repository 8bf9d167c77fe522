//! TCP connections, by the state changes of their sockets.

use agent_common::{
    loss::Loss,
    tcp::{Transition, classify},
    types::{FlowKey, ListenerKey, Owner, kind},
};
use aya_ebpf::{
    EbpfContext,
    bindings::BPF_ANY,
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_ns,
    },
    macros::{btf_tracepoint, tracepoint},
    programs::{BtfTracePointContext, TracePointContext},
};
use aya_log_ebpf::debug;

use crate::{
    maps::{CONNECT_OWNERS, LISTENERS, count_flow, count_loss},
    socket::{Ends, RecordedSocket, Socket, TypedSocket},
};

/// `IPPROTO_TCP`. The tracepoint also fires for SCTP, and for MPTCP (262), whose subflows are TCP sockets that report
/// themselves.
const IPPROTO_TCP: u8 = 6;

/// Sits on the tracepoint `inet_sock_set_state` (`inet_sk_set_state` in `net/ipv4/af_inet.c`) as a BTF tracepoint: since
/// 5.5, needs the kernel's BTF; since 5.15 a socket's cgroup is typed, which this program counts on.
#[btf_tracepoint(function = "inet_sock_set_state")]
pub(crate) fn inet_sock_set_state_btf(ctx: BtfTracePointContext) -> i32 {
    if let Some(transition) = classify(ctx.arg(1), ctx.arg(2)) {
        let socket = TypedSocket::new(&ctx);
        observe(&socket, transition);
        if transition == Transition::ListenStarted {
            log_listener(&ctx);
        }
    }
    0
}

/// The same as a classic tracepoint, `sock:inet_sock_set_state`: since 4.16, with this layout since 5.6. Works without BTF;
/// then network namespace and socket cgroup are not known.
#[tracepoint(category = "sock", name = "inet_sock_set_state")]
pub(crate) fn inet_sock_set_state_classic(ctx: TracePointContext) -> u32 {
    let (old, new) = RecordedSocket::states(&ctx);
    if let Some(transition) = classify(old, new) {
        let socket = RecordedSocket::new(&ctx);
        observe(&socket, transition);
        if transition == Transition::ListenStarted {
            log_listener(&ctx);
        }
    }
    0
}

/// For people who debug a capture; a function of its own, because a message's buffer is large and the stack is not.
#[inline(never)]
fn log_listener(ctx: &impl EbpfContext) {
    debug!(ctx, "process {} listens", ctx.tgid());
}

#[inline(always)]
fn observe(socket: &impl Socket, transition: Transition) {
    if socket.protocol() != Some(u16::from(IPPROTO_TCP)) {
        return;
    }
    match transition {
        Transition::ConnectStarted => remember_connect(socket),
        Transition::Connected => finish_connect(socket, kind::CONNECTED),
        Transition::ConnectFailed => finish_connect(socket, kind::CONNECT_FAILED),
        Transition::ListenStarted => remember_listener(socket),
        Transition::ListenEnded => forget_listener(socket),
        Transition::Accepted => accept(socket),
    }
}

#[inline(always)]
fn remember_connect(socket: &impl Socket) {
    let owner = current_owner(socket);
    if CONNECT_OWNERS
        .insert(owner.socket, &owner, u64::from(BPF_ANY))
        .is_err()
    {
        count_loss(Loss::ConnectOwnersFull);
    }
}

#[inline(always)]
fn finish_connect(socket: &impl Socket, kind: u8) {
    let id = socket.id();
    // SAFETY: only this socket's own state changes touch the entry, and they follow one another.
    let owner = unsafe { CONNECT_OWNERS.get(id) }.copied();
    if owner.is_some() {
        // Kernels from 5.11 to 6.6 may refuse when a softirq interrupts the map's own work. The entry then stays until the
        // socket's memory is another one's, whose connect replaces it.
        let _removed = CONNECT_OWNERS.remove(id);
    }
    let Some(ends) = socket.ends() else {
        count_loss(Loss::SocketUnreadable);
        return;
    };
    let cgroup = match owner {
        Some(owner) => owner.cgroup,
        None => socket.cgroup(),
    };
    let key = flow_key(socket, &ends, cgroup, ends.remote_port, kind);
    count_flow(&key, now_ns(), || owner);
}

#[inline(always)]
fn accept(socket: &impl Socket) {
    let Some(ends) = socket.ends() else {
        count_loss(Loss::SocketUnreadable);
        return;
    };
    let mut cgroup = socket.cgroup();
    if cgroup == 0 {
        // Without the kernel's BTF only the listener's own call tells.
        cgroup = listener(socket, &ends).map_or(0, |owner| owner.cgroup);
    }
    let key = flow_key(socket, &ends, cgroup, ends.local_port, kind::ACCEPTED);
    count_flow(&key, now_ns(), || listener(socket, &ends));
}

#[inline(always)]
fn remember_listener(socket: &impl Socket) {
    let Some(ends) = socket.ends() else {
        count_loss(Loss::SocketUnreadable);
        return;
    };
    let owner = current_owner(socket);
    if LISTENERS
        .insert(
            listener_key(socket, &ends, unwildcard(ends.local)),
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
    let Some(ends) = socket.ends() else {
        return;
    };
    let key = listener_key(socket, &ends, unwildcard(ends.local));
    // SAFETY: the value is copied at once; a torn read can only come from a listener that replaced this one, and then
    // the sockets differ or the entry goes a moment early, which costs pid and name of some flows.
    let current = unsafe { LISTENERS.get(key) }.map(|owner| owner.socket);
    if current == Some(socket.id()) {
        // As above: what stays is replaced by the next listener there.
        let _removed = LISTENERS.remove(key);
    }
}

/// Who listens where this accepted socket arrived: on its address, or on every address.
///
/// Without the kernel's types all namespaces look alike, and every pod may listen on every address: then only an exact
/// address tells.
#[inline(always)]
fn listener(socket: &impl Socket, ends: &Ends) -> Option<Owner> {
    // SAFETY: the value is copied at once, and a listener's entry is written whole before anything is accepted.
    unsafe {
        let exact = LISTENERS.get(listener_key(socket, ends, ends.local));
        if exact.is_none() && socket.netns() != 0 {
            LISTENERS.get(listener_key(socket, ends, [0; 16]))
        } else {
            exact
        }
    }
    .copied()
}

#[inline(always)]
fn listener_key(socket: &impl Socket, ends: &Ends, address: [u8; 16]) -> ListenerKey {
    ListenerKey {
        address,
        netns: socket.netns(),
        port: ends.local_port,
        padding: 0,
    }
}

/// The IPv4 wildcard is kept under the same key as the IPv6 one, which may serve both.
#[inline(always)]
fn unwildcard(address: [u8; 16]) -> [u8; 16] {
    if address == agent_common::types::v4_mapped([0; 4]) {
        return [0; 16];
    }
    address
}

#[inline(always)]
fn flow_key(socket: &impl Socket, ends: &Ends, cgroup: u64, port: u16, kind: u8) -> FlowKey {
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

/// The process that runs now; meant for state changes that a system call makes.
#[inline(always)]
fn current_owner(socket: &impl Socket) -> Owner {
    Owner {
        // SAFETY: the helper takes nothing and only reads the current task.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        socket: socket.id(),
        pid: (bpf_get_current_pid_tgid() >> 32) as u32,
        padding: 0,
        comm: bpf_get_current_comm().unwrap_or_default(),
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing and has no effect.
    unsafe { bpf_ktime_get_ns() }
}
