//! The maps, and how the programs write to them.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use agent_common::{
    insert::Inserted,
    loss::{LOSSES as LOSS_COUNT, Loss},
    types::{
        Call, CallKey, Changes, Connection, ConnectionEvent, FlowEvent, FlowKey, FlowValue,
        ListenerKey, OlderSocket, Open, OpenBefore, Owner, Peer, PeerKey, Roles,
    },
};
use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_RB_NO_WAKEUP, BPF_SK_STORAGE_GET_F_CREATE,
    },
    btf_maps::{Array, ArrayOfMaps, HashMap, PerCpuArray, RingBuf, SkStorage},
    cty::c_void,
    helpers::bpf_sk_storage_get,
    macros::btf_map,
};

/// Default capacity of each generation; the agent sets another with `--map-entries`.
const FLOW_ENTRIES: usize = 65_536;

type FlowMap = HashMap<FlowKey, FlowValue, FLOW_ENTRIES>;

/// Flow → counts, first generation. Written by the programs while it is the active one, read and emptied by the agent
/// while it is not. Preallocated, because the programs also run in softirqs. When full, the flow goes to [`OVERFLOW`].
#[btf_map]
static FLOWS_A: FlowMap = FlowMap::new();

/// The second generation of [`FLOWS_A`].
#[btf_map]
static FLOWS_B: FlowMap = FlowMap::new();

/// 0 → the active generation. The agent swaps it; the kernel lets such an update return only after every program that
/// may still hold the old map has ended (`maybe_wait_bpf_programs` in `kernel/bpf/syscall.c`, since 4.20), so the agent
/// then owns the old generation alone.
#[btf_map]
static ACTIVE_FLOWS: ArrayOfMaps<FlowMap, 1> = ArrayOfMaps::new();

/// Flows that found no room in the active map. Written by the programs, read by the agent at each drain; 1 MiB holds
/// about ten thousand. When full, [`Loss::FlowsAndRingFull`] is counted.
#[btf_map]
static OVERFLOW: RingBuf<FlowEvent, { 1 << 20 }> = RingBuf::new();

/// Socket → the process that called `connect`, from the call until it succeeds or fails. Only the programs use it, and only
/// where nothing leads from a socket to its cgroup; elsewhere it has one entry. The size bounds the connects that are under way
/// at once. When full, [`Loss::ConnectOwnersFull`] is counted and the flow lacks cgroup, pid and name.
#[btf_map]
pub(crate) static CONNECT_OWNERS: HashMap<u64, Owner, 65_536> = HashMap::new();

/// Socket → the connection that it is an end of, where connections are told apart. Only the programs use it; the size bounds
/// the connections that are open at once. When full, [`Loss::OpenFull`] is counted and the end of a connection not reported;
/// of one that is only begun, [`Loss::ConnectOwnersFull`].
#[btf_map]
pub(crate) static OPEN: HashMap<u64, Open, FLOW_ENTRIES> = HashMap::new();

/// What happened to single connections, where they are told apart. Written by the programs, read by the agent every 50 ms.
/// When full, connections are counted in the active map instead, and [`Loss::ConnectionsAdded`] or [`Loss::ClosesLost`].
#[btf_map]
pub(crate) static CONNECTIONS: RingBuf<ConnectionEvent, { 1 << 20 }> = RingBuf::new();

/// Sockets whose `connect` has met one from the other end, until the handshake ends. Only the programs use it. A 64th as large
/// as the map of flows, which is more than are ever under way at once. When full, [`Loss::CrossedFull`] is counted, and the
/// connection as one that was accepted.
#[btf_map]
pub(crate) static CROSSED: HashMap<u64, u8, { FLOW_ENTRIES / 64 }> = HashMap::new();

/// Listening address → the process that called `listen`. Only the programs use it. When full,
/// [`Loss::ListenersFull`] is counted and accepted flows lack pid and name.
#[btf_map]
pub(crate) static LISTENERS: HashMap<ListenerKey, Owner, 16_384> = HashMap::new();

/// Socket and peer → their conversation; an SCTP socket that serves and an association → that it is counted. Written by the
/// programs for packets; the agent removes what is idle before there is no room
/// (`agent::capture::peers`), and makes it four times as large as the map of flows. Few nodes have so many peers, so the
/// memory for one, 128 bytes, is taken when it is met: programs for packets may do that, while those for tracepoints can
/// deadlock the kernel by it before 6.1. When full, [`Loss::UdpPeersFull`] is counted and the datagram passes unseen.
#[btf_map]
pub(crate) static PEERS: HashMap<
    PeerKey,
    Peer,
    { 4 * FLOW_ENTRIES },
    { BPF_F_NO_PREALLOC as usize },
> = HashMap::new();

/// SCTP socket and tag → the association that it is making. Written by the programs for packets, which remove what has come
/// about or was refused; the agent removes what was never answered. A quarter as large as the map of flows, as few wait for an
/// answer at a time; its memory is taken when it is needed, as in [`PEERS`]. When full, [`Loss::SctpCallsFull`] is counted.
#[btf_map]
pub(crate) static SCTP_CALLS: HashMap<CallKey, Call, 16_384, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();

/// 0 → `CLOCK_MONOTONIC` in nanoseconds until which a peer that is not in [`PEERS`] may have spoken before all the same: there was no
/// room for it, or the agent has made haste to make some. Written by both.
#[btf_map]
pub(crate) static PEERS_LACK_ROOM: Array<u64, 1> = Array::new();

/// UDP socket → what it has been to its peers. Only the programs use it; an entry lives in its socket, and goes with it. Without
/// memory for an entry the socket counts as a new one, and [`Loss::SocketStorage`] is counted.
#[btf_map]
pub(crate) static UDP_ROLES: SkStorage<Roles> = SkStorage::new();

/// UDP socket → the process that bound it; SCTP socket that listens → the process that has it listen. Only the programs use it;
/// an entry lives in its socket, and goes with it. Without memory for it pid and name are missing, see [`keep`].
#[btf_map]
pub(crate) static BINDERS: SkStorage<Owner> = SkStorage::new();

type WitnessedMap = HashMap<Connection, u8, 65_536>;

/// The connections that are counted already, by the hooks or by the iterator; the value says nothing. Only while the agent
/// starts and looks for those that are older than the hooks: then it lets go of the map. Written by the programs; read by
/// the agent where there can be no iterator. The agent makes it large enough for all sockets that there are and
/// [`agent_common::types::Connection`]s of some seconds more. When full, [`Loss::WitnessedFull`] or [`Loss::OpenBefore`]
/// is counted.
#[btf_map]
static WITNESSED: WitnessedMap = WitnessedMap::new();

/// 0 → [`WITNESSED`] while what is older is looked for, else nothing. The agent empties it.
#[btf_map]
static ACTIVE_WITNESSED: ArrayOfMaps<WitnessedMap, 1> = ArrayOfMaps::new();

/// 0 → what the iterators have found. Written by them, one at a time; read by the agent.
#[btf_map]
pub(crate) static OPEN_BEFORE: Array<OpenBefore, 1> = Array::new();

/// 0 → the socket that an iterator is at: too large for its stack. Only the iterators use it, one at a time.
#[btf_map]
pub(crate) static OPEN_SCRATCH: Array<OpenScratch, 1> = Array::new();

#[repr(C)]
pub(crate) struct OpenScratch {
    pub(crate) connection: Connection,
    pub(crate) event: FlowEvent,
    pub(crate) owner: Owner,
    pub(crate) older: OlderSocket,
}

/// UDP socket that is older than the programs → what to think of its datagrams at first. Written by the iterator, read by the
/// UDP programs; an entry lives in its socket, and goes with it. Without memory for it the socket counts as a young one, see
/// [`keep`].
#[btf_map]
pub(crate) static UDP_OLDER: SkStorage<OlderSocket> = SkStorage::new();

/// [`Loss`] → how often, per CPU. Written by the programs, read by the agent at each drain.
#[btf_map]
static LOSSES: PerCpuArray<u64, { LOSS_COUNT as usize }> = PerCpuArray::new();

/// 0 → the state changes that matter, per CPU. Written by the classic program and by the one that counts beside it, read by the
/// agent at each drain.
#[btf_map]
static CHANGES: PerCpuArray<Changes, 1> = PerCpuArray::new();

/// Counts a state change that matters.
#[inline(always)]
pub(crate) fn count_change() {
    if let Some(changes) = CHANGES.get_ptr_mut(0) {
        // SAFETY: as in `count_loss`.
        unsafe {
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*changes).made, 1);
        }
    }
}

/// Counts one that the classic program sees.
#[inline(always)]
pub(crate) fn count_seen_change() {
    if let Some(changes) = CHANGES.get_ptr_mut(0) {
        // SAFETY: as in `count_loss`.
        unsafe {
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*changes).seen, 1);
        }
    }
}

/// Adds one connection to the active generation.
///
/// `owner` is asked only when the flow is new: an entry keeps the owner that it was made with.
#[inline(always)]
pub(crate) fn count_flow(key: &FlowKey, now_ns: u64, owner: impl FnOnce() -> Owner) {
    let Some(flows) = ACTIVE_FLOWS.get(0) else {
        count_loss(Loss::NoActiveMap);
        return;
    };
    if add_to_entry(flows, key, now_ns) {
        return;
    }
    let owner = owner();
    let value = FlowValue {
        count: 1,
        first_ns: now_ns,
        last_ns: now_ns,
        pid: owner.pid,
        padding: 0,
        comm: owner.comm,
    };
    insert_flow(flows, key, &value);
}

/// As [`count_flow`], for one that lies in memory already.
#[inline(always)]
pub(crate) fn count_event(event: &FlowEvent) {
    let Some(flows) = ACTIVE_FLOWS.get(0) else {
        count_loss(Loss::NoActiveMap);
        return;
    };
    if !add_to_entry(flows, &event.key, event.value.last_ns) {
        insert_flow(flows, &event.key, &event.value);
    }
}

#[inline(always)]
fn insert_flow(flows: &FlowMap, key: &FlowKey, value: &FlowValue) {
    if flows.insert(key, value, u64::from(BPF_NOEXIST)).is_ok() {
        return;
    }
    // Either another CPU has made the entry in the meantime, or there is no room for it, see `Inserted`.
    if add_to_entry(flows, key, value.last_ns) {
        return;
    }
    if !overflow(key, value) {
        count_loss(Loss::FlowsAndRingFull);
    }
}

/// Makes sure that the active generation has an entry that names the owner of what is about to happen, with a count of 0
/// if it is new. `owner` is asked only when nobody is named yet.
#[inline(always)]
pub(crate) fn announce_flow(key: &FlowKey, owner: impl FnOnce() -> Owner) {
    let Some(flows) = ACTIVE_FLOWS.get(0) else {
        count_loss(Loss::NoActiveMap);
        return;
    };
    if let Some(value) = flows.get_ptr_mut(key) {
        // SAFETY: the entry stays in place, see `add_to_entry`. CPUs that race name equal owners: those of one flow.
        unsafe {
            if (*value).pid == 0 {
                let owner = owner();
                (*value).comm = owner.comm;
                (&raw mut (*value).pid).write_volatile(owner.pid);
            }
        }
        return;
    }
    let owner = owner();
    let value = FlowValue {
        count: 0,
        first_ns: 0,
        last_ns: 0,
        pid: owner.pid,
        padding: 0,
        comm: owner.comm,
    };
    if flows.insert(key, &value, u64::from(BPF_NOEXIST)).is_ok() || flows.get_ptr(key).is_some() {
        return;
    }
    if !overflow(key, &value) {
        count_loss(Loss::ConnectOwnersFull);
    }
}

/// Sends what found no room in the map through the ring buffer; `false` if there is none either.
#[inline(always)]
fn overflow(key: &FlowKey, value: &FlowValue) -> bool {
    let Some(mut entry) = OVERFLOW.reserve(0) else {
        return false;
    };
    let event: *mut FlowEvent = entry.as_mut_ptr();
    // SAFETY: the entry has room for an event, and both fields of it are written. In place, because the stack is small.
    unsafe {
        (&raw mut (*event).key).write(*key);
        (&raw mut (*event).value).write(*value);
    }
    // The agent looks by itself.
    entry.submit(u64::from(BPF_RB_NO_WAKEUP));
    true
}

#[inline(always)]
fn add_to_entry(flows: &FlowMap, key: &FlowKey, now_ns: u64) -> bool {
    let Some(value) = flows.get_ptr_mut(key) else {
        return false;
    };
    // SAFETY: the entry stays in place while this program runs: only the agent deletes from a generation, and only after
    // the kernel has waited for all programs that may use it. `count` is 8-aligned in a map value.
    unsafe {
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*value).count, 1);
    }
    // SAFETY: as above. CPUs race for the later of two times that are microseconds apart; the agent puts them in order.
    unsafe {
        (&raw mut (*value).last_ns).write_volatile(now_ns);
        if (*value).first_ns == 0 {
            (&raw mut (*value).first_ns).write_volatile(now_ns);
        }
    }
    true
}

/// Remembers that the hooks count this connection, if it matters: the kernel calls them before it stores the new state, so
/// a socket that is seen in that state is one that they have counted, or older than they are.
#[inline(always)]
pub(crate) fn witness(connection: impl FnOnce() -> Connection) {
    if let Some(witnessed) = ACTIVE_WITNESSED.get(0)
        && witnessed
            .insert(&connection(), &0, u64::from(BPF_ANY))
            .is_err()
    {
        count_loss(Loss::WitnessedFull);
    }
}

/// Whether this connection has not been counted; from now on it is.
#[inline(always)]
pub(crate) fn is_first_witness(connection: &Connection) -> bool {
    let Some(witnessed) = ACTIVE_WITNESSED.get(0) else {
        return false;
    };
    match Inserted::from(witnessed.insert(connection, &0, u64::from(BPF_NOEXIST))) {
        Inserted::New => true,
        Inserted::Present => false,
        Inserted::NoRoom => {
            count_loss(Loss::OpenBefore);
            false
        }
    }
}

/// Keeps something with a socket, unless there is something already, and returns what there is. `None` where the kernel has no
/// memory for it; that is counted.
///
/// # Safety
/// `socket` is a pointer that the verifier knows as one to a socket.
#[inline(always)]
pub(crate) unsafe fn keep<T>(
    map: &'static SkStorage<T>,
    socket: *mut c_void,
    new: &mut T,
) -> Option<*mut T> {
    // SAFETY: the caller's; map and value are of the types that the helper wants.
    let kept = unsafe {
        bpf_sk_storage_get(
            core::ptr::from_ref(map).cast_mut().cast(),
            socket,
            core::ptr::from_mut(new).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        )
        .cast::<T>()
    };
    if kept.is_null() {
        count_loss(Loss::SocketStorage);
        return None;
    }
    Some(kept)
}

/// Counts a loss.
#[inline(always)]
pub(crate) fn count_loss(loss: Loss) {
    if let Some(counter) = LOSSES.get_ptr_mut(loss as u32) {
        // SAFETY: the pointer was just checked. The value is this CPU's own, but a softirq may run another program between
        // reading and writing it.
        unsafe {
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1);
        }
    }
}
