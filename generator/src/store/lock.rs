//! One process at a time owns a data directory.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    path::Path,
};

use super::StoreError;

const FILE_NAME: &str = "lock";

/// The exclusive right to write a data directory, given back when dropped or when the process ends, however it ends.
///
/// The lock is `flock(2)` on a file of its own: a lock on the database would hinder readers.
#[derive(Debug)]
pub(super) struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    /// Creates the directory if need be and takes the lock.
    pub(super) fn take(directory: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Directory {
            path: directory.to_owned(),
            source,
        };
        fs::create_dir_all(directory).map_err(failed)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(directory.join(FILE_NAME))
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(StoreError::InUse {
                    path: directory.to_owned(),
                    pid: holder(&mut file),
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        name_holder(&mut file).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

/// Writes this process's id into the file, for the message that a second process gets.
fn name_holder(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// The id that the holder wrote, if it has come to that yet.
fn holder(file: &mut File) -> Option<u32> {
    const LONGEST_PID: u64 = 16;
    let mut text = String::new();
    file.take(LONGEST_PID).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_holds_it_and_a_dropped_lock_is_free() {
        let directory = tempfile::tempdir().unwrap();
        let first = DirectoryLock::take(directory.path()).unwrap();
        let refusal = DirectoryLock::take(directory.path()).unwrap_err();
        assert!(
            refusal
                .to_string()
                .ends_with(&format!("(process {})", std::process::id())),
            "{refusal}"
        );
        drop(first);
        DirectoryLock::take(directory.path()).unwrap();
    }
}
