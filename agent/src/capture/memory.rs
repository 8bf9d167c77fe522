//! The memory that reading the kernel's types took.

/// Gives free memory back to the system. The kernel's types are megabytes that are read once, at start, and glibc keeps what
/// was freed below its last allocation; other allocators give it back by themselves.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the function may be called at any time; it takes the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
