//! What became of a new entry of a map.

/// The kernel's answer to an update with `BPF_NOEXIST`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// The entry is new.
    New,
    /// It is there already, made before or by another CPU at the same moment: nothing is lost.
    Present,
    /// The map is full (`E2BIG`) or has no memory (`ENOMEM`), or, with kernels from 5.11 to 6.6, it is at work under this very
    /// program (`EBUSY`).
    NoRoom,
}

impl From<Result<(), i32>> for Inserted {
    fn from(result: Result<(), i32>) -> Self {
        /// `EEXIST`.
        const EXISTS: i32 = -17;
        match result {
            Ok(()) => Self::New,
            Err(EXISTS) => Self::Present,
            Err(_) => Self::NoRoom,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_another_has_made_is_no_loss() {
        for (result, wanted) in [
            (Ok(()), Inserted::New),
            (Err(-17), Inserted::Present),
            (Err(-7), Inserted::NoRoom),
            (Err(-12), Inserted::NoRoom),
            (Err(-16), Inserted::NoRoom),
        ] {
            assert_eq!(Inserted::from(result), wanted);
        }
    }
}
