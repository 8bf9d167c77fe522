//! bpf(2), for what aya has no call for.

use std::io;

/// Of `enum bpf_cmd`.
#[derive(Clone, Copy)]
#[repr(i64)]
pub(super) enum Command {
    DeleteElement = 3,
    LookUpBatch = 24,
    LookUpAndDeleteBatch = 25,
    DeleteBatch = 27,
}

/// Asks the kernel, which reads `attr` and writes its answers where that points to, and into `attr` itself.
///
/// # Errors
/// What the kernel says.
///
/// # Safety
/// `attr` has the layout of the command's member of `union bpf_attr`, and its pointers are null or valid for what the command
/// reads and writes there.
pub(super) unsafe fn call<A>(command: Command, attr: &mut A) -> io::Result<()> {
    // SAFETY: the caller's; the kernel reads as many bytes of `attr` as it is told, and checks descriptors.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            std::ptr::from_mut(attr),
            size_of::<A>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
