//! The embedded kernel object, and the layout of what it sends.

use aya::{Pod, include_bytes_aligned};

/// The kernel object that `cargo xtask build-ebpf` made; empty if this agent was built without it.
#[must_use]
pub fn embedded_object() -> &'static [u8] {
    include_bytes_aligned!(concat!(env!("OUT_DIR"), "/microshield.bpf.o"))
}

/// Whether the kernel object was there when this agent was built.
#[must_use]
pub fn is_built() -> bool {
    !embedded_object().is_empty()
}

/// The event in a ring buffer item; `None` if its size is not that of an event.
pub(super) fn read_event<E: Pod>(item: &[u8]) -> Option<E> {
    if item.len() != size_of::<E>() {
        return None;
    }
    // SAFETY: the length was checked and any bytes are a valid event (it is `Pod`); the read does not need alignment.
    Some(unsafe { item.as_ptr().cast::<E>().read_unaligned() })
}
