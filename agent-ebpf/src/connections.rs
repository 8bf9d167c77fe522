//! Single connections, told apart: what `--mode connections` adds.

use agent_common::{
    loss::Loss,
    types::{ConnectionEvent, FlowKey, Open, Owner, kind},
};
use aya_ebpf::bindings::{BPF_ANY, BPF_RB_NO_WAKEUP};

use crate::{
    maps::{CONNECTIONS, OPEN, count_flow, count_loss},
    owner::{NOBODY, current_owner, now_ns},
    socket::{Ends, Socket},
    tcp::IPPROTO_TCP,
};

/// Remembers who calls, and when.
#[inline(always)]
pub(crate) fn start(socket: &impl Socket, cgroup: u64) {
    let open = opened(&current_owner(0), cgroup, 0, kind::CONNECT_FAILED);
    if !remember(socket.id(), &open) {
        count_loss(Loss::ConnectOwnersFull);
    }
}

/// Reports that a connection was made or failed, or else counts it with the others of its flow.
#[inline(always)]
pub(crate) fn report(socket: &impl Socket, ends: &Ends, key: &FlowKey, owner: &Owner) {
    let id = socket.id();
    let now_ns = now_ns();
    let mut open = opened(owner, key.cgroup, now_ns, key.kind);
    if key.kind != kind::ACCEPTED {
        // SAFETY: the value is copied at once, and only this socket's own state changes touch it, one after the other.
        if let Some(started) = unsafe { OPEN.get(id) } {
            open.start_ns = started.start_ns;
            open.pid = started.pid;
            open.comm = started.comm;
        }
    }
    open.port = key.port;
    open.client_port = match key.kind {
        kind::ACCEPTED => ends.remote_port,
        kind::CONNECT_FAILED => socket.closed_port(ends),
        _ => ends.local_port,
    };
    if key.kind == kind::CONNECT_FAILED {
        let _removed = OPEN.remove(id);
    } else if !remember(id, &open) {
        count_loss(Loss::OpenFull);
    }
    let sent = send(key, &open, now_ns, None);
    if !sent {
        count_loss(Loss::ConnectionsAdded);
        count_flow(key, now_ns, || Owner {
            pid: open.pid,
            comm: open.comm,
            ..NOBODY
        });
    }
}

/// Reports the end of a connection whose beginning was seen.
#[inline(always)]
pub(crate) fn end(socket: &impl Socket) {
    let id = socket.id();
    // SAFETY: as in `report`.
    let Some(open) = unsafe { OPEN.get(id) }.copied() else {
        return;
    };
    let _removed = OPEN.remove(id);
    let Some(ends) = socket.ends() else {
        count_loss(Loss::SocketUnreadable);
        return;
    };
    let key = FlowKey {
        local: ends.local,
        remote: ends.remote,
        cgroup: open.cgroup,
        netns: socket.netns(),
        port: open.port,
        protocol: IPPROTO_TCP,
        kind: open.kind,
    };
    let sent = send(&key, &open, now_ns(), Some(socket.bytes()));
    if !sent {
        count_loss(Loss::ClosesLost);
    }
}

#[inline(always)]
fn opened(owner: &Owner, cgroup: u64, start_ns: u64, kind: u8) -> Open {
    Open {
        start_ns: if start_ns == 0 { now_ns() } else { start_ns },
        pid: owner.pid,
        padding: 0,
        comm: owner.comm,
        cgroup,
        port: 0,
        client_port: 0,
        kind,
        padding2: 0,
        padding3: 0,
    }
}

/// `false` if there is no room.
#[inline(always)]
fn remember(id: u64, open: &Open) -> bool {
    OPEN.insert(id, open, u64::from(BPF_ANY)).is_ok()
}

/// Writes an event into the ring buffer; `bytes` are known at the end of a connection. `false` if there is no room.
#[inline(always)]
fn send(key: &FlowKey, open: &Open, now_ns: u64, bytes: Option<(u64, u64)>) -> bool {
    let Some(mut entry) = CONNECTIONS.reserve(0) else {
        return false;
    };
    let event: *mut ConnectionEvent = entry.as_mut_ptr();
    let (bytes_sent, bytes_received) = bytes.unwrap_or((0, 0));
    // SAFETY: the entry has room for an event, and every field of it is written. In place, because the stack is small.
    unsafe {
        (&raw mut (*event).key).write(*key);
        (&raw mut (*event).now_ns).write(now_ns);
        (&raw mut (*event).start_ns).write(open.start_ns);
        (&raw mut (*event).bytes_sent).write(bytes_sent);
        (&raw mut (*event).bytes_received).write(bytes_received);
        (&raw mut (*event).pid).write(open.pid);
        (&raw mut (*event).client_port).write(open.client_port);
        (&raw mut (*event).closed).write(u8::from(bytes.is_some()));
        (&raw mut (*event).padding).write(0);
        (&raw mut (*event).comm).write(open.comm);
    }
    entry.submit(u64::from(BPF_RB_NO_WAKEUP));
    true
}
