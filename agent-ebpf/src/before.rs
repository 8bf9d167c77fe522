//! Sockets that are older than the hooks, found once when the agent starts.
//!
//! The iterator `task_file` (`kernel/bpf/task_iter.c`, since 5.8) runs a program for every open file of every process of
//! the agent's process id namespace, in whatever network namespace: its sockets are there with their owners, and no namespace need be entered. What it finds
//! is counted as the hooks count; what they have counted is in [`crate::maps::is_first_witness`]'s map, so that nothing is
//! counted twice, however often the agent runs the program.
//!
//! Connections that nobody has accepted yet are in no file: they are found in their listener's queue.

use agent_common::{
    insert::Inserted,
    loss::Loss,
    sctp::IPPROTO_SCTP,
    tcp::{LISTEN, is_open},
    types::{FlowEvent, IPPROTO_UDP, OlderSocket, Owner, UDP_SILENCE_NS, kind},
};
use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST, file},
    cty::c_void,
    helpers::{bpf_probe_read_kernel, bpf_sock_from_file},
};

use crate::{
    maps::{
        BINDERS, LISTENERS, OPEN_BEFORE, OPEN_SCRATCH, OpenScratch, UDP_OLDER, count_event,
        count_loss, is_first_witness, keep,
    },
    owner::now_ns,
    socket::{FoundSocket, Socket as _, follow, offsets, read_typed},
    tcp::{IPPROTO_TCP, connection, flow_key, listener, listener_key},
};

offsets!(
    FILE_INODE,
    FILE_PRIVATE,
    INODE_SUPER,
    SUPER_MAGIC,
    SOCKET_SK,
    TASK_TGID,
    TASK_COMM,
    ACCEPT_QUEUE,
    REQUEST_NEXT,
    REQUEST_SK,
);

/// `SOCKFS_MAGIC` of `include/uapi/linux/magic.h`.
const SOCKFS_MAGIC: u64 = 0x534f_434b;

/// `IPPROTO_MPTCP`. Processes hold the MPTCP socket, which has the ends of its first subflow; the hooks count the subflow.
const IPPROTO_MPTCP: u16 = 262;

/// Rounds of either of two loops, one in the other: together they reach the largest queue that `net.core.somaxconn` allows.
/// The verifier follows every round, and that of 6.1 forks at whatever a round may do, so a round does nothing but call
/// [`count_one_queued`].
const ROUNDS: u32 = 256;

/// `struct bpf_iter__task_file`, with the addresses that it holds; 0 in the last call of an iteration.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct TaskFile {
    _meta: u64,
    task: u64,
    _fd: u32,
    file: u64,
}

/// Remembers the owners of listeners.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn open_listeners(ctx: *const TaskFile) -> i32 {
    // SAFETY: the kernel calls the program with its context.
    if let Some((socket, task)) = unsafe { socket_of(ctx) }
        && is_tcp(&socket)
        && socket.state() == Some(LISTEN)
    {
        remember_owner(&socket, task);
    }
    0
}

/// Counts connections.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn open_connections(ctx: *const TaskFile) -> i32 {
    // SAFETY: the kernel calls the program with its context.
    let Some((socket, task)) = (unsafe { socket_of(ctx) }) else {
        return 0;
    };
    if !is_tcp(&socket) {
        return 0;
    }
    match socket.state() {
        Some(LISTEN) => {
            let mut request = follow::<u64>(socket.id(), &ACCEPT_QUEUE).unwrap_or(0);
            for _ in 0..ROUNDS {
                if request == 0 {
                    break;
                }
                request = count_queued(request, task);
            }
        }
        Some(state) if is_open(state) => {
            count_open(socket.id(), task);
        }
        _ => {}
    }
    0
}

/// Tells the UDP programs what to think of the datagrams of sockets that are older than they are: whose port its process has
/// chosen is a server's. Nothing is counted here, as a socket that is connected may never have sent anything. Whoever has an SCTP
/// socket listen is remembered too.
///
/// What is kept with a socket is kept by the kernel's own pointer to it, and not by its address, so `bpf_sock_from_file` is
/// needed, and that iterators may keep something (both since 5.11). Where the kernel lacks them this program is missing.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task_file")]
extern "C" fn open_datagrams(ctx: *const TaskFile) -> i32 {
    // SAFETY: the kernel calls the program with its context.
    let Some((socket, task)) = (unsafe { socket_of(ctx) }) else {
        return 0;
    };
    const UDP: u16 = IPPROTO_UDP as u16;
    const SCTP: u16 = IPPROTO_SCTP as u16;
    let is_udp = match socket.protocol() {
        Some(UDP) => true,
        Some(SCTP) if socket.state() == Some(LISTEN) => false,
        _ => return 0,
    };
    if !socket.is_inet() || socket.local_port() == 0 {
        return 0;
    }
    // SAFETY: the verifier knows what the context's pointers point to, and sees that each is checked.
    let sock: *mut c_void = unsafe {
        let file = (&raw const (*ctx).file).read_volatile() as *mut file;
        if file.is_null() {
            return 0;
        }
        let socket = bpf_sock_from_file(file);
        if socket.is_null() {
            return 0;
        }
        read_typed(socket.cast::<u8>(), &SOCKET_SK)
    };
    if sock.is_null() {
        return 0;
    }
    // SAFETY: checked.
    unsafe {
        if is_udp {
            remember_datagrams(&socket, sock, task);
        } else {
            remember_listener(&socket, sock, task);
        }
    }
    0
}

/// Remembers who has an SCTP socket listen.
///
/// # Safety
/// `sock` is the kernel's own pointer to the socket.
#[inline(always)]
unsafe fn remember_listener(socket: &FoundSocket, sock: *mut c_void, task: u64) {
    let mut owner = found_owner(socket, task);
    // SAFETY: the caller's.
    unsafe { keep_owner(sock, &mut owner) };
}

/// Keeps the process that has the socket open, unless it is known who has bound it or has it listen, or another has it open
/// too: see [`Owner::gives_way`].
///
/// # Safety
/// `sock` is the kernel's own pointer to the socket.
#[inline(always)]
unsafe fn keep_owner(sock: *mut c_void, owner: &mut Owner) {
    // SAFETY: the caller's. What is kept stays as long as its socket, which the file holds.
    unsafe {
        if let Some(kept) = keep(&BINDERS, sock, owner)
            && (*kept).gives_way()
        {
            *kept = *owner;
        }
    }
}

/// # Safety
/// `sock` is the kernel's own pointer to the socket.
#[inline(always)]
unsafe fn remember_datagrams(socket: &FoundSocket, sock: *mut c_void, task: u64) {
    let Some(scratch) = OPEN_SCRATCH.get_ptr_mut(0) else {
        return;
    };
    // SAFETY: the agent runs one iterator at a time, and nobody else uses it.
    let scratch = unsafe { &mut *scratch };
    let kind = if socket.is_bound_by_its_process() {
        kind::ACCEPTED
    } else {
        kind::CONNECTED
    };
    scratch.older = OlderSocket {
        until_ns: now_ns() + UDP_SILENCE_NS,
        kind: u64::from(kind),
    };
    scratch.owner = found_owner(socket, task);
    // SAFETY: the caller's.
    unsafe {
        keep(&UDP_OLDER, sock, &mut scratch.older);
        keep_owner(sock, &mut scratch.owner);
    }
    if let Some(found) = OPEN_BEFORE.get_ptr_mut(0) {
        // SAFETY: as in `socket_of`.
        unsafe { (*found).datagrams += 1 };
    }
}

/// The socket behind the file that the iterator is at, and the process that has it open.
#[inline(always)]
unsafe fn socket_of(ctx: *const TaskFile) -> Option<(FoundSocket, u64)> {
    // As numbers and not as the typed pointers that plain loads would give: those cannot be handed to global functions.
    // SAFETY: the helper checks the address.
    let TaskFile { task, file, .. } = unsafe { bpf_probe_read_kernel(ctx) }.ok()?;
    if task == 0 || file == 0 {
        return None;
    }
    if let Some(found) = OPEN_BEFORE.get_ptr_mut(0) {
        // SAFETY: the agent runs one iterator at a time, and reads when it has ended.
        unsafe { (*found).files += 1 };
    }
    let inode = follow::<u64>(file, &FILE_INODE)?;
    let file_system = follow::<u64>(inode, &INODE_SUPER)?;
    if follow::<u64>(file_system, &SUPER_MAGIC)? != SOCKFS_MAGIC {
        return None;
    }
    let socket = follow::<u64>(file, &FILE_PRIVATE)?;
    let sock = follow::<u64>(socket, &SOCKET_SK)?;
    (sock != 0).then(|| (FoundSocket::new(sock), task))
}

#[inline(always)]
fn is_tcp(socket: &FoundSocket) -> bool {
    const TCP: u16 = IPPROTO_TCP as u16;
    matches!(socket.protocol(), Some(TCP | IPPROTO_MPTCP)) && socket.is_inet()
}

/// Where several processes have a listener, its owner is the first of them in the order of their ids, the oldest, that does not
/// give way to others ([`Owner::gives_way`]).
#[inline(always)]
fn remember_owner(socket: &FoundSocket, task: u64) {
    let Some(ends) = socket.ends() else {
        count_loss(Loss::SocketUnreadable);
        return;
    };
    let owner = found_owner(socket, task);
    let key = listener_key(socket, &ends, ends.local.unwildcard());
    // SAFETY: the value is copied at once; what the hooks write meanwhile is of a listener that is younger.
    let present =
        unsafe { LISTENERS.get(&key) }.map(|present| (present.socket, present.gives_way()));
    let flags = match present {
        None => BPF_NOEXIST,
        Some((same, true)) if same == owner.socket => BPF_ANY,
        Some(_) => return,
    };
    match Inserted::from(LISTENERS.insert(&key, &owner, u64::from(flags))) {
        Inserted::New => {
            if present.is_none()
                && let Some(found) = OPEN_BEFORE.get_ptr_mut(0)
            {
                // SAFETY: as in `socket_of`.
                unsafe { (*found).listeners += 1 };
            }
        }
        // A hook has remembered a younger one since it was looked for.
        Inserted::Present => {}
        Inserted::NoRoom => count_loss(Loss::ListenersFull),
    }
}

#[inline(always)]
fn set_first(event: &mut FlowEvent, now: u64) {
    (event.value.first_ns, event.value.last_ns) = (now, now);
    event.value.count = 1;
    event.value.padding = 0;
}

/// The process that has the socket open.
#[inline(always)]
fn found_owner(socket: &FoundSocket, task: u64) -> Owner {
    Owner {
        cgroup: socket.cgroup(),
        socket: socket.id(),
        pid: follow(task, &TASK_TGID).unwrap_or(0),
        padding: 0,
        comm: follow(task, &TASK_COMM).unwrap_or_default(),
    }
}

/// Counts the connections in a listener's queue from `request` on, and returns where to go on; 0 at the end.
///
/// The queue may change meanwhile: what is read then is another request or the queue's end. The agent runs the program
/// more than once.
///
/// A function that the verifier looks at for itself, whatever it is called with (a global one), as are [`count_one_queued`]
/// and [`count_open`]: one inlined into the other's rounds would be followed anew in each.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn count_queued(request: u64, task: u64) -> u64 {
    let mut request = request;
    for _ in 0..ROUNDS {
        if request == 0 {
            break;
        }
        request = count_one_queued(request, task);
    }
    request
}

/// Counts the connection of a request, and returns the next request.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn count_one_queued(request: u64, task: u64) -> u64 {
    if let Some(sock) = follow::<u64>(request, &REQUEST_SK) {
        count_open(sock, task);
    }
    follow(request, &REQUEST_NEXT).unwrap_or(0)
}

/// Counts the connection of a socket, unless it is counted.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn count_open(sock: u64, task: u64) -> u64 {
    let socket = FoundSocket::new(sock);
    if !socket.state().is_some_and(is_open) {
        return 0;
    }
    let Some(ends) = socket.ends() else {
        count_loss(Loss::OpenBefore);
        return 0;
    };
    let Some(scratch) = OPEN_SCRATCH.get_ptr_mut(0) else {
        count_loss(Loss::OpenBefore);
        return 0;
    };
    // SAFETY: the agent runs one iterator at a time, and nobody else uses it.
    let OpenScratch {
        connection: place,
        event,
        ..
    } = unsafe { &mut *scratch };
    *place = connection(&socket, &ends);
    if !is_first_witness(place) {
        return 0;
    }
    let listener = listener(&socket, &ends);
    let accepted = is_accepted(&socket, &listener);
    let (kind, port) = if accepted {
        (kind::ACCEPTED, ends.local_port)
    } else {
        (kind::CONNECTED, ends.remote_port)
    };
    event.key = flow_key(&socket, &ends, socket.cgroup(), port, kind);
    (event.value.pid, event.value.comm) = if accepted && listener.pid != 0 {
        (listener.pid, listener.comm)
    } else {
        (
            follow(task, &TASK_TGID).unwrap_or(0),
            follow(task, &TASK_COMM).unwrap_or_default(),
        )
    };
    set_first(event, now_ns());
    count_event(event);
    if let Some(found) = OPEN_BEFORE.get_ptr_mut(0) {
        // SAFETY: as in `socket_of`.
        unsafe { (*found).connections += 1 };
    }
    1
}

/// Whether a socket came from a listener, which it tells even when the listener is gone. Only a listener whose queue has no
/// length leaves no trace in it, as do those of MPTCP: there, that somebody listens on its port has to do.
#[inline(always)]
fn is_accepted(socket: &FoundSocket, listener: &Owner) -> bool {
    socket.backlog().is_some_and(|length| length > 0)
        || (listener.socket != 0 && FoundSocket::new(listener.socket).backlog() == Some(0))
}
