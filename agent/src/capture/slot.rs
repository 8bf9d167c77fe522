//! Places of arrays of maps.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use super::bpf::{self, Command};

/// The member of `union bpf_attr` for single elements.
#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Empties the place at `index` of an array of maps, which aya has no call for. When this returns no program uses the map
/// any more that was there (`maybe_wait_bpf_programs` in `kernel/bpf/syscall.c`, since 4.20).
///
/// # Errors
/// What the kernel says.
pub(super) fn clear(map: BorrowedFd<'_>, index: u32) -> io::Result<()> {
    let mut attr = ElementAttr {
        map_fd: map.as_raw_fd().cast_unsigned(),
        padding: 0,
        key: std::ptr::from_ref(&index) as u64,
        value: 0,
        flags: 0,
    };
    // SAFETY: `attr` has the layout of the union's member, and its key is an index.
    unsafe { bpf::call(Command::DeleteElement, &mut attr) }
}

const _: () = assert!(size_of::<ElementAttr>() == 32);
