//! One process at a time owns a data directory.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::StoreError;

const FILE_NAME: &str = "lock";

/// The exclusive right to write a data directory, given back when dropped or when the process ends, however it ends.
///
/// The lock is `flock(2)` on a file of its own: a lock on the database would hinder readers.
#[derive(Debug)]
pub(super) struct DirectoryLock {
    directory: PathBuf,
    _file: File,
}

impl DirectoryLock {
    /// Creates the directory if need be, for nobody but its user, and takes the lock.
    pub(super) fn take(directory: &Path) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Directory {
            path: directory.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed)?;
        let mut file = create(&directory.join(FILE_NAME)).map_err(failed)?;
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
        Ok(Self {
            directory: directory.to_owned(),
            _file: file,
        })
    }

    /// Creates a file of the directory, if there is none, that nobody but its user can read. SQLite would let everybody, and
    /// gives the rights of a database to the files beside it.
    pub(super) fn create_beside(&self, name: &str) -> Result<(), StoreError> {
        let created = create(&self.directory.join(name));
        created.map(drop).map_err(|source| StoreError::Directory {
            path: self.directory.clone(),
            source,
        })
    }
}

/// Opens a file, which is created, for nobody but its user, if it does not exist.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
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
