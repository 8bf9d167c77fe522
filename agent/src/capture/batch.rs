//! Reading and emptying a map of flows in a few system calls.
//!
//! aya goes key by key, three system calls an entry. `BPF_MAP_LOOKUP_AND_DELETE_BATCH` (since 5.6 for hash maps,
//! `kernel/bpf/hashtab.c`) takes thousands of entries a call.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use agent_common::types::{FlowKey, FlowValue};

/// `BPF_MAP_LOOKUP_AND_DELETE_BATCH` of `enum bpf_cmd`.
const LOOKUP_AND_DELETE_BATCH: libc::c_long = 25;

/// Entries per call at first. A single hash bucket must fit, so it grows if the kernel says that one does not.
const FIRST_CAPACITY: usize = 4_096;

/// No bucket of a map of at most a few million entries comes near this.
const LARGEST_CAPACITY: usize = 1 << 22;

/// The `batch` member of `union bpf_attr`.
#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Moves all entries of the map behind `map`, which nobody else may be writing to, to the end of `taken`.
///
/// # Errors
/// What the kernel says. What was taken before is in `taken`, the rest still in the map.
pub(super) fn take_all(
    map: BorrowedFd<'_>,
    taken: &mut Vec<(FlowKey, FlowValue)>,
) -> io::Result<()> {
    let mut capacity = FIRST_CAPACITY;
    // The position in the map, opaque to user space; a hash map uses 4 bytes of it.
    let mut position: Option<u64> = None;
    loop {
        let mut keys = Vec::<FlowKey>::with_capacity(capacity);
        let mut values = Vec::<FlowValue>::with_capacity(capacity);
        let mut next = 0_u64;
        let mut attr = BatchAttr {
            in_batch: position
                .as_ref()
                .map_or(0, |at| std::ptr::from_ref(at) as u64),
            out_batch: &raw mut next as u64,
            keys: keys.spare_capacity_mut().as_mut_ptr() as u64,
            values: values.spare_capacity_mut().as_mut_ptr() as u64,
            count: u32::try_from(capacity).unwrap_or(u32::MAX),
            map_fd: map.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        let finished = match lookup_and_delete(&mut attr) {
            Ok(()) => false,
            // The kernel has come to the end of the map; `count` entries were taken on the way.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // The next bucket has more entries than there is room for; nothing was taken.
            Err(error)
                if error.raw_os_error() == Some(libc::ENOSPC) && capacity < LARGEST_CAPACITY =>
            {
                capacity *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let count = (attr.count as usize).min(capacity);
        // SAFETY: the kernel has written `count` keys and values, which is no more than the capacity.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        taken.extend(keys.into_iter().zip(values));
        if finished {
            return Ok(());
        }
        position = Some(next);
    }
}

fn lookup_and_delete(attr: &mut BatchAttr) -> io::Result<()> {
    // SAFETY: `attr` has the layout of the union's `batch` member, its pointers are valid for `count` elements of the
    // map's key and value size, and the kernel checks the descriptor.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            LOOKUP_AND_DELETE_BATCH,
            std::ptr::from_mut(attr),
            size_of::<BatchAttr>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const _: () = assert!(size_of::<BatchAttr>() == 56);
