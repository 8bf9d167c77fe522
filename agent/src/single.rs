//! One agent a node.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

/// Held while this process captures below one cgroup root. Two agents would report every connection twice.
///
/// The lock is on the folder of the cgroup hierarchy itself: it is the same for every mount namespace, leaves no file
/// behind, and the kernel gives it back whatever ends the process.
#[derive(Debug)]
pub struct SingleInstance {
    _lock: Flock<File>,
}

/// Why the lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody has it.
    #[error(
        "another microshield-agent captures below {} already: stop that one first", .0.display()
    )]
    Taken(PathBuf),
    /// The folder cannot be opened or locked.
    #[error("{}", .path.display())]
    Io {
        /// The cgroup root.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl SingleInstance {
    /// Takes the lock, without waiting.
    ///
    /// # Errors
    /// If another agent has it, or the folder cannot be opened.
    pub fn lock(cgroup_root: &Path) -> Result<Self, LockError> {
        let failed = |source| LockError::Io {
            path: cgroup_root.to_owned(),
            source,
        };
        let folder = File::open(cgroup_root).map_err(failed)?;
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self { _lock: lock }),
            Err((_, nix::Error::EWOULDBLOCK)) => Err(LockError::Taken(cgroup_root.to_owned())),
            Err((_, error)) => Err(failed(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told() {
        let root = tempfile::tempdir().unwrap();
        let first = SingleInstance::lock(root.path()).unwrap();
        assert!(matches!(
            SingleInstance::lock(root.path()),
            Err(LockError::Taken(_))
        ));
        drop(first);
        SingleInstance::lock(root.path()).unwrap();
    }
}
