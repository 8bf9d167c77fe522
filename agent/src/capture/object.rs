//! The embedded kernel object, and the layout of what it sends.

use agent_common::types::FlowEvent;
use aya::include_bytes_aligned;

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
pub(super) fn read_event(item: &[u8]) -> Option<FlowEvent> {
    if item.len() != size_of::<FlowEvent>() {
        return None;
    }
    // SAFETY: the length was checked and any bytes are a valid event (it is `aya::Pod`); the read does not need alignment.
    Some(unsafe { item.as_ptr().cast::<FlowEvent>().read_unaligned() })
}
