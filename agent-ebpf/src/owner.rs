//! Who runs now, and when.

use agent_common::types::{Comm, Owner};
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_ktime_get_ns,
    generated::bpf_get_current_comm,
};

/// Not known. A value and not an `Option`, whose absent payload the verifier would take for a read of what was never
/// written.
pub(crate) const NOBODY: Owner = Owner {
    cgroup: 0,
    socket: 0,
    pid: 0,
    padding: 0,
    comm: Comm::UNKNOWN,
};

/// The process that runs now; meant for what a system call does. `socket` is the socket that it does it with.
#[inline(always)]
pub(crate) fn current_owner(socket: u64) -> Owner {
    let mut owner = Owner {
        // SAFETY: the helper takes nothing and only reads the current task.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        socket,
        pid: (bpf_get_current_pid_tgid() >> 32) as u32,
        ..NOBODY
    };
    // SAFETY: the helper writes as many bytes as it is told, zeros if it fails.
    unsafe { bpf_get_current_comm((&raw mut owner.comm).cast(), size_of::<Comm>() as u32) };
    owner
}

/// `CLOCK_MONOTONIC` in nanoseconds. (Tracing programs may not read the cheaper clock of the last tick.)
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper takes nothing and has no effect.
    unsafe { bpf_ktime_get_ns() }
}
