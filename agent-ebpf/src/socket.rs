//! Reading a socket: through the BTF tracepoint's typed pointer, or from the classic tracepoint's record.

use agent_common::{address::Address, types::Owner};
use aya_ebpf::{
    Global,
    helpers::{bpf_probe_read_kernel, bpf_skc_to_tcp_sock},
    programs::{BtfTracePointContext, TracePointContext},
};

use crate::maps::{BINDERS, keep};

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// Offsets from the running kernel's BTF, see `agent_common::offset`; 0 means "not known".
macro_rules! offsets {
    ($($name:ident),* $(,)?) => {
        $(
            #[unsafe(no_mangle)]
            pub(crate) static $name: aya_ebpf::Global<u32> = aya_ebpf::Global::new(0);
        )*
    };
}
pub(crate) use offsets;

offsets!(
    SK_FAMILY,
    SK_LOCAL_V4,
    SK_REMOTE_V4,
    SK_LOCAL_V6,
    SK_REMOTE_V6,
    SK_LOCAL_PORT,
    SK_REMOTE_PORT,
    SK_PROTOCOL,
    SK_SOCKET,
    SK_NET,
    NET_INUM,
    SK_CGROUP,
    SK_CGROUP_TAGGED,
    CGROUP_KN,
    KN_ID,
    TCP_OWN_PORT,
    TCP_BYTES_SENT,
    TCP_BYTES_AGAIN,
    TCP_BYTES_RECEIVED,
    SK_STATE,
    SK_MAX_BACKLOG,
    SK_USERLOCKS_BIT,
    TRACING_KEEPS,
);

/// The two ends of a socket. Ports are in host byte order.
pub(crate) struct Ends {
    pub(crate) local: Address,
    pub(crate) remote: Address,
    pub(crate) local_port: u16,
    pub(crate) remote_port: u16,
}

/// A socket that changes its state.
pub(crate) trait Socket {
    /// Its address in the kernel.
    fn id(&self) -> u64;
    /// Its IP protocol number.
    fn protocol(&self) -> Option<u16>;
    /// Its ends; `None` if they cannot be read or are no IP addresses.
    fn ends(&self) -> Option<Ends>;
    /// The port of its own end at the change to CLOSE: one that the kernel had chosen is given back before
    /// (`tcp_set_state`), so `ends` may lack it.
    fn closed_port(&self, ends: &Ends) -> u16 {
        ends.local_port
    }
    /// Inode number of its network namespace; 0 if not known.
    fn netns(&self) -> u32;
    /// Id of the cgroup that it was made in; 0 if not known. An accepted socket has its listener's
    /// (`cgroup_sk_clone`).
    fn cgroup(&self) -> u64;
    /// Whether the kernel's types are known, so that what leads to its namespace and cgroup always is.
    fn is_typed(&self) -> bool;
    /// How many bytes it has sent and received; 0 where not known.
    fn bytes(&self) -> (u64, u64);
    /// Keeps with it who has it listen, where the kernel lets a program do that.
    fn keep_owner(&self, owner: &mut Owner);
    /// Whether a process may have it already: what a listener has made is nobody's before it is accepted.
    fn may_be_somebody_s(&self) -> bool;
}

/// The `struct sock *` that the BTF tracepoint gives. The verifier knows its type and lets the program read fields
/// directly, at offsets that it must see as constants.
pub(crate) struct TypedSocket(*const u8);

impl TypedSocket {
    pub(crate) fn new(ctx: &BtfTracePointContext) -> Self {
        Self(ctx.arg(0))
    }

    #[inline(always)]
    fn read<T: Copy>(&self, offset: &Global<u32>) -> T {
        // SAFETY: the verifier checks that the kernel's type has a field of this size at this offset, and makes a read
        // through a stale pointer yield zero instead of a fault.
        unsafe { read_typed(self.0, offset) }
    }
}

#[inline(always)]
pub(crate) unsafe fn read_typed<T: Copy>(base: *const u8, offset: &Global<u32>) -> T {
    // SAFETY: the caller's. Volatile, so that no two reads are merged into one that no field matches.
    unsafe { base.add(offset.load() as usize).cast::<T>().read_volatile() }
}

impl Socket for TypedSocket {
    #[inline(always)]
    fn id(&self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    fn protocol(&self) -> Option<u16> {
        Some(self.read(&SK_PROTOCOL))
    }

    #[inline(always)]
    fn ends(&self) -> Option<Ends> {
        let (local, remote) = match self.read::<u16>(&SK_FAMILY) {
            AF_INET => (
                Address::from_v4(self.read(&SK_LOCAL_V4)),
                Address::from_v4(self.read(&SK_REMOTE_V4)),
            ),
            AF_INET6 => (self.read_v6(&SK_LOCAL_V6), self.read_v6(&SK_REMOTE_V6)),
            _ => return None,
        };
        Some(Ends {
            local,
            remote,
            local_port: self.read(&SK_LOCAL_PORT),
            remote_port: u16::from_be(self.read(&SK_REMOTE_PORT)),
        })
    }

    #[inline(always)]
    fn closed_port(&self, ends: &Ends) -> u16 {
        let Some(tcp) = self.tcp() else {
            return ends.local_port;
        };
        // SAFETY: as in `read`.
        u16::from_be(unsafe { read_typed(tcp, &TCP_OWN_PORT) })
    }

    #[inline(always)]
    fn netns(&self) -> u32 {
        let net: *const u8 = self.read(&SK_NET);
        // SAFETY: as in `read`: the verifier knows `net` as a `struct net *`.
        unsafe { read_typed(net, &NET_INUM) }
    }

    #[inline(always)]
    fn cgroup(&self) -> u64 {
        let cgroup: *const u8 = self.read(&SK_CGROUP);
        // SAFETY: as in `read`: the verifier follows the types from the socket on.
        unsafe {
            let node: *const u8 = read_typed(cgroup, &CGROUP_KN);
            read_typed(node, &KN_ID)
        }
    }

    #[inline(always)]
    fn is_typed(&self) -> bool {
        true
    }

    #[inline(always)]
    fn bytes(&self) -> (u64, u64) {
        let Some(tcp) = self.tcp() else {
            return (0, 0);
        };
        // SAFETY: as in `read`.
        unsafe {
            let sent: u64 = read_typed(tcp, &TCP_BYTES_SENT);
            let again: u64 = read_typed(tcp, &TCP_BYTES_AGAIN);
            (
                sent.wrapping_sub(again),
                read_typed(tcp, &TCP_BYTES_RECEIVED),
            )
        }
    }

    /// Tracing programs may since 5.11 (`bpf_sk_storage_get_tracing`). Before, the verifier never gets to the call.
    #[inline(always)]
    fn keep_owner(&self, owner: &mut Owner) {
        if TRACING_KEEPS.load() == 0 {
            return;
        }
        // SAFETY: the tracepoint's own pointer.
        unsafe { keep(&BINDERS, self.0.cast_mut().cast(), owner) };
    }

    #[inline(always)]
    fn may_be_somebody_s(&self) -> bool {
        self.read::<u64>(&SK_SOCKET) != 0
    }
}

impl TypedSocket {
    /// The same pointer with the type that has the fields of TCP.
    #[inline(always)]
    fn tcp(&self) -> Option<*const u8> {
        // SAFETY: the helper takes any socket and gives null for what is none of TCP.
        let tcp = unsafe { bpf_skc_to_tcp_sock(self.0.cast_mut().cast()) };
        (!tcp.is_null()).then_some(tcp.cast::<u8>())
    }

    #[inline(always)]
    fn read_v6(&self, offset: &Global<u32>) -> Address {
        // SAFETY: as in `read`; in two words, because 8 bytes are the most that one instruction reads.
        let words: [u64; 2] = unsafe {
            let base = self.0.add(offset.load() as usize).cast::<u64>();
            [base.read_volatile(), base.add(1).read_volatile()]
        };
        Address::from_words(words)
    }
}

/// The record of the classic tracepoint `sock:inet_sock_set_state` (`include/trace/events/sock.h`). Its layout is part of
/// the kernel's interface and has not changed since protocol became 16 bits wide in 5.6; the agent compares it with the
/// `format` file before it attaches.
pub(crate) struct RecordedSocket<'a> {
    ctx: &'a TracePointContext,
    sock: u64,
}

/// Byte offsets in that record.
mod record {
    pub(super) const SKADDR: usize = 8;
    pub(super) const OLD_STATE: usize = 16;
    pub(super) const NEW_STATE: usize = 20;
    pub(super) const SPORT: usize = 24;
    pub(super) const DPORT: usize = 26;
    pub(super) const FAMILY: usize = 28;
    pub(super) const PROTOCOL: usize = 30;
    pub(super) const SADDR_V6: usize = 40;
    pub(super) const DADDR_V6: usize = 56;
}

impl<'a> RecordedSocket<'a> {
    pub(crate) fn new(ctx: &'a TracePointContext) -> Self {
        let mut this = Self { ctx, sock: 0 };
        this.sock = this.read(record::SKADDR);
        this
    }

    /// The states before and after.
    #[inline(always)]
    pub(crate) fn states(ctx: &TracePointContext) -> (i32, i32) {
        let this = RecordedSocket { ctx, sock: 0 };
        (this.read(record::OLD_STATE), this.read(record::NEW_STATE))
    }

    #[inline(always)]
    fn read<T: Copy>(&self, offset: usize) -> T {
        use aya_ebpf::EbpfContext as _;
        // SAFETY: the record is the program's context; the verifier checks the access against the tracepoint's size.
        unsafe {
            self.ctx
                .as_ptr()
                .cast::<u8>()
                .add(offset)
                .cast::<T>()
                .read_volatile()
        }
    }

    #[inline(always)]
    fn read_v6(&self, offset: usize) -> Address {
        Address::from_words([self.read(offset), self.read(offset + 8)])
    }
}

impl Socket for RecordedSocket<'_> {
    #[inline(always)]
    fn id(&self) -> u64 {
        self.sock
    }

    #[inline(always)]
    fn protocol(&self) -> Option<u16> {
        Some(self.read(record::PROTOCOL))
    }

    #[inline(always)]
    fn ends(&self) -> Option<Ends> {
        // The record has the IPv6 form of both families: an IPv4 address comes mapped.
        match self.read::<u16>(record::FAMILY) {
            AF_INET | AF_INET6 => Some(Ends {
                local: self.read_v6(record::SADDR_V6),
                remote: self.read_v6(record::DADDR_V6),
                local_port: self.read(record::SPORT),
                remote_port: self.read(record::DPORT),
            }),
            _ => None,
        }
    }

    #[inline(always)]
    fn netns(&self) -> u32 {
        FoundSocket(self.sock).netns()
    }

    #[inline(always)]
    fn cgroup(&self) -> u64 {
        FoundSocket(self.sock).cgroup()
    }

    #[inline(always)]
    fn is_typed(&self) -> bool {
        false
    }

    #[inline(always)]
    fn bytes(&self) -> (u64, u64) {
        FoundSocket(self.sock).bytes()
    }

    #[inline(always)]
    fn keep_owner(&self, _owner: &mut Owner) {}

    #[inline(always)]
    fn may_be_somebody_s(&self) -> bool {
        true
    }
}

/// A socket at an address in the kernel, which nobody vouches for: every read may fail.
pub(crate) struct FoundSocket(u64);

impl FoundSocket {
    pub(crate) fn new(sock: u64) -> Self {
        Self(sock)
    }

    /// Its state, as in `include/net/tcp_states.h`.
    #[inline(always)]
    pub(crate) fn state(&self) -> Option<i32> {
        follow::<u8>(self.0, &SK_STATE).map(i32::from)
    }

    /// Whether it is of IPv4 or IPv6.
    #[inline(always)]
    pub(crate) fn is_inet(&self) -> bool {
        matches!(follow(self.0, &SK_FAMILY), Some(AF_INET | AF_INET6))
    }

    /// The port of its own end; 0 if it has none yet.
    #[inline(always)]
    pub(crate) fn local_port(&self) -> u16 {
        follow(self.0, &SK_LOCAL_PORT).unwrap_or(0)
    }

    /// Whether its process has chosen its port, and not the kernel.
    #[inline(always)]
    pub(crate) fn is_bound_by_its_process(&self) -> bool {
        /// `SOCK_BINDPORT_LOCK` of `include/net/sock.h`.
        const BINDPORT: u8 = 8;
        let bit = SK_USERLOCKS_BIT.load();
        // SAFETY: the helper checks the address and fails on a bad one.
        let byte =
            unsafe { bpf_probe_read_kernel(self.0.wrapping_add(u64::from(bit / 8)) as *const u8) };
        let shift = if cfg!(target_endian = "little") {
            bit % 8
        } else {
            4 - bit % 8
        };
        byte.is_ok_and(|byte| (byte >> shift) & BINDPORT != 0)
    }

    /// How many connections may wait in its queue to be accepted: `listen` sets it, and a socket inherits it from the
    /// listener that it is cloned from (`sk_clone_lock` in `net/core/sock.c`). One that connected has 0.
    #[inline(always)]
    pub(crate) fn backlog(&self) -> Option<u32> {
        follow(self.0, &SK_MAX_BACKLOG)
    }
}

impl Socket for FoundSocket {
    #[inline(always)]
    fn id(&self) -> u64 {
        self.0
    }

    #[inline(always)]
    fn protocol(&self) -> Option<u16> {
        follow(self.0, &SK_PROTOCOL)
    }

    #[inline(always)]
    fn ends(&self) -> Option<Ends> {
        let (local, remote) = match follow::<u16>(self.0, &SK_FAMILY)? {
            AF_INET => (
                Address::from_v4(follow(self.0, &SK_LOCAL_V4)?),
                Address::from_v4(follow(self.0, &SK_REMOTE_V4)?),
            ),
            AF_INET6 => (
                follow(self.0, &SK_LOCAL_V6)?,
                follow(self.0, &SK_REMOTE_V6)?,
            ),
            _ => return None,
        };
        Some(Ends {
            local,
            remote,
            local_port: follow(self.0, &SK_LOCAL_PORT)?,
            remote_port: u16::from_be(follow(self.0, &SK_REMOTE_PORT)?),
        })
    }

    #[inline(always)]
    fn netns(&self) -> u32 {
        if SK_NET.load() == 0 || NET_INUM.load() == 0 {
            return 0;
        }
        follow::<u64>(self.0, &SK_NET)
            .and_then(|net| follow(net, &NET_INUM))
            .unwrap_or(0)
    }

    #[inline(always)]
    fn cgroup(&self) -> u64 {
        let cgroup = if SK_CGROUP.load() != 0 {
            follow::<u64>(self.0, &SK_CGROUP)
        } else if SK_CGROUP_TAGGED.load() != 0 {
            // Bit 0 set: the union holds net_cls data and no pointer. Bit 1: `no_refcnt`.
            follow::<u64>(self.0, &SK_CGROUP_TAGGED)
                .filter(|value| value & 1 == 0)
                .map(|value| value & !3)
        } else {
            None
        };
        cgroup
            .and_then(|cgroup| follow::<u64>(cgroup, &CGROUP_KN))
            .and_then(|node| follow(node, &KN_ID))
            .unwrap_or(0)
    }

    #[inline(always)]
    fn is_typed(&self) -> bool {
        false
    }

    #[inline(always)]
    fn bytes(&self) -> (u64, u64) {
        if TCP_BYTES_SENT.load() == 0 || TCP_BYTES_RECEIVED.load() == 0 {
            return (0, 0);
        }
        let read = |field| follow::<u64>(self.0, field).unwrap_or(0);
        (
            read(&TCP_BYTES_SENT).wrapping_sub(read(&TCP_BYTES_AGAIN)),
            read(&TCP_BYTES_RECEIVED),
        )
    }

    #[inline(always)]
    fn keep_owner(&self, _owner: &mut Owner) {}

    #[inline(always)]
    fn may_be_somebody_s(&self) -> bool {
        true
    }
}

/// Reads the field at `offset` of the kernel object at `base`.
#[inline(always)]
pub(crate) fn follow<T>(base: u64, offset: &Global<u32>) -> Option<T> {
    let address = base.wrapping_add(u64::from(offset.load()));
    // SAFETY: the helper checks the address and fails on a bad one.
    unsafe { bpf_probe_read_kernel(address as *const T) }.ok()
}
