//! MicroShield's kernel programs.
//!
//! They observe and never change what happens to a packet or a call: tracepoints, whose return value the kernel ignores,
//! programs at a cgroup, which let everything go on, and iterators that the agent runs when it starts.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// `AtomicU64` has no `fetch_add` on this target, although its instruction set has the atomic addition itself.
#![cfg_attr(
    target_arch = "bpf",
    feature(core_intrinsics),
    expect(internal_features, reason = "the only way to that instruction")
)]
#![cfg_attr(
    target_arch = "bpf",
    expect(
        clippy::needless_borrows_for_generic_args,
        reason = "a program's stack has 512 bytes: keys and values are lent, not moved"
    )
)]

#[cfg(target_arch = "bpf")]
mod before;
#[cfg(target_arch = "bpf")]
mod connections;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod owner;
#[cfg(target_arch = "bpf")]
mod packet;
#[cfg(target_arch = "bpf")]
mod sctp;
#[cfg(target_arch = "bpf")]
mod sibling;
#[cfg(target_arch = "bpf")]
mod socket;
#[cfg(target_arch = "bpf")]
mod tcp;
#[cfg(target_arch = "bpf")]
mod udp;

/// The kernel checks this licence before it lends GPL-only helpers (`bpf_probe_read_kernel`).
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses a program from which this endless loop can be reached.
    loop {}
}

/// On any other target there is nothing to run: the crate is built for it only so that the whole workspace compiles.
#[cfg(not(target_arch = "bpf"))]
fn main() {}
