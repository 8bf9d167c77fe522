//! Reading and emptying hash maps in a few system calls.
//!
//! aya goes key by key, three system calls an entry. The batch calls (since 5.6 for hash maps, `kernel/bpf/hashtab.c`) take
//! thousands of entries at a time.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use aya::Pod;

use super::bpf::{self, Command};

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
pub(super) fn take_all<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    taken: &mut Vec<(K, V)>,
) -> io::Result<()> {
    walk(Command::LookUpAndDeleteBatch, map, |entries| {
        taken.extend(entries);
        Ok(())
    })
}

/// Shows `visit` every entry that is there from the beginning to the end; others may write meanwhile.
///
/// # Errors
/// What the kernel says.
pub(super) fn look_through<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    mut visit: impl FnMut(K, V),
) -> io::Result<()> {
    walk(Command::LookUpBatch, map, |entries| {
        entries.for_each(|(key, value)| visit(key, value));
        Ok(())
    })
}

/// Deletes the entries of which this is true, and returns how many. Others may write meanwhile. It holds the entries of one
/// call at a time: the walk goes from bucket to bucket, so what is deleted behind it does not disturb it.
///
/// # Errors
/// What the kernel says. Some of the entries are deleted then.
pub(super) fn delete_where<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    mut is_due: impl FnMut(&V) -> bool,
) -> io::Result<usize> {
    let (mut keys, mut deleted) = (Vec::new(), 0);
    walk(Command::LookUpBatch, map, |entries| {
        keys.clear();
        keys.extend(
            entries
                .filter(|(_, value)| is_due(value))
                .map(|(key, _): (K, V)| key),
        );
        deleted += keys.len();
        delete(map, &keys)
    })?;
    Ok(deleted)
}

/// Deletes these keys; one that is not there is passed over.
fn delete<K: Pod>(map: BorrowedFd<'_>, mut keys: &[K]) -> io::Result<()> {
    while !keys.is_empty() {
        let mut attr = BatchAttr {
            in_batch: 0,
            out_batch: 0,
            keys: keys.as_ptr() as u64,
            values: 0,
            count: u32::try_from(keys.len()).unwrap_or(u32::MAX),
            map_fd: map.as_raw_fd().cast_unsigned(),
            elem_flags: 0,
            flags: 0,
        };
        let result = call(Command::DeleteBatch, &mut attr);
        let deleted = (attr.count as usize).min(keys.len());
        keys = &keys[deleted..];
        match result {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && !keys.is_empty() => {
                keys = &keys[1..];
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn walk<K: Pod, V: Pod>(
    command: Command,
    map: BorrowedFd<'_>,
    mut take: impl FnMut(std::iter::Zip<std::vec::IntoIter<K>, std::vec::IntoIter<V>>) -> io::Result<()>,
) -> io::Result<()> {
    let mut capacity = FIRST_CAPACITY;
    // The position in the map, opaque to user space; a hash map uses 4 bytes of it.
    let mut position: Option<u64> = None;
    loop {
        let mut keys = Vec::<K>::with_capacity(capacity);
        let mut values = Vec::<V>::with_capacity(capacity);
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
        let finished = match call(command, &mut attr) {
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
        take(keys.into_iter().zip(values))?;
        if finished {
            return Ok(());
        }
        position = Some(next);
    }
}

fn call(command: Command, attr: &mut BatchAttr) -> io::Result<()> {
    // SAFETY: `attr` has the layout of the union's `batch` member, and its pointers are null or valid for `count` elements of the
    // map's key and value size.
    unsafe { bpf::call(command, attr) }
}

const _: () = assert!(size_of::<BatchAttr>() == 56);
