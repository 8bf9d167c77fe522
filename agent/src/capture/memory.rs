//! The memory that is needed for a moment only.

/// More flows than this are many for a drain: a megabyte, and several as records.
const MANY: usize = 4_096;

/// Drains after one of many flows until what they took is free: named, sent and acknowledged.
const UNTIL_SENT: u32 = 5;

/// Gives free memory back to the system. glibc keeps what was freed below its last allocation; other allocators give it back by
/// themselves.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the function may be called at any time; it takes the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Gives back what drains of many flows took, in the drains that follow.
#[derive(Debug, Default)]
pub(super) struct Ebb {
    drains: u32,
}

impl Ebb {
    /// To be called once a drain.
    pub(super) fn drained(&mut self, flows: usize) {
        if self.drains > 0 {
            self.drains -= 1;
            give_back();
        }
        if flows > MANY {
            self.drains = UNTIL_SENT;
        }
    }
}
