//! How far the log was read, on disk.
//!
//! The file says, as of one drain: how far each file of the log was read, and in which spans of time the kernel programs
//! counted everything. It is replaced when all that was read or counted up to that drain has been handed over: is in the
//! spool or, without one, acknowledged. Whoever starts again reads on from there, and knows of lines from before the end of
//! the last span that what they tell was counted.
//!
//! **What that is worth.** After an orderly end nothing is repeated and nothing skipped. An agent that is killed skips
//! nothing: what it had read or counted and not handed over is read again, and counted as what only the probe saw. With a
//! spool it repeats nothing either, unless it is killed between a batch's coming into the spool and the file's replacement,
//! which follows at once; without one, what was stored by the generator and not yet acknowledged is repeated. The file is not
//! synced: after a power failure it may be older than the spool.

use std::{
    collections::VecDeque,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::coverage::Span;

/// Drains that may wait to be handed over and be told apart. There are more only while the API server is away for long.
const MAX_WAITING: usize = 1_024;

/// The largest file that is read, in bytes; one with everything at its bounds is smaller.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The form of the file.
const VERSION: u32 = 1;

/// How far a file was read. A file is known again by device, inode and its first bytes, because inodes are given out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The device that it is on.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// How many of its first bytes there were to be known again by.
    pub head_bytes: u64,
    /// Their CRC-32.
    pub head: u32,
    /// Where to go on.
    pub offset: u64,
}

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    version: u32,
    /// `/proc/sys/kernel/random/boot_id`: the spans are of this boot's clock.
    pub boot: String,
    /// When everything was counted, in nanoseconds of `CLOCK_MONOTONIC`.
    pub counted: Vec<Span>,
    /// How far the log was read.
    pub files: Vec<Place>,
}

/// Why the position cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the position {}: {source}", path.display())]
pub struct PositionError {
    path: PathBuf,
    source: io::Error,
}

impl Position {
    /// A position.
    #[must_use]
    pub fn new(boot: String, counted: Vec<Span>, files: Vec<Place>) -> Self {
        Self {
            version: VERSION,
            boot,
            counted,
            files,
        }
    }

    /// What a file says; nothing if there is none, or if it is damaged, which a power failure can do.
    ///
    /// # Errors
    /// If there is one that cannot be read.
    pub fn read(path: &Path) -> Result<Self, PositionError> {
        let failed = |source| PositionError {
            path: path.to_owned(),
            source,
        };
        let bytes = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(failed(error)),
            Ok(file) if file.len() > MAX_FILE_BYTES => Vec::new(),
            Ok(_) => fs::read(path).map_err(failed)?,
        };
        match serde_json::from_slice::<Self>(&bytes) {
            Ok(position) if position.version == VERSION => Ok(position),
            _ => {
                tracing::error!(
                    path = %path.display(),
                    "this is no position of the probe's log: the log is read from its beginning, and connections may be counted twice"
                );
                Ok(Self::default())
            }
        }
    }

    /// Replaces a file at once and wholly, so that one who is killed leaves the old one or the new one.
    fn write(&self, path: &Path) -> io::Result<()> {
        let new = path.with_added_extension("new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(&new, path)
    }
}

/// Keeps the file. Copies keep the same one.
#[derive(Clone, Debug)]
pub struct Keeper(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    path: PathBuf,
    /// By drain, those that are not handed over.
    waiting: VecDeque<(u64, Position)>,
    failing: bool,
}

/// To be given back when everything up to a drain is handed over.
#[derive(Debug)]
pub struct Receipt {
    keeper: Keeper,
    round: u64,
}

impl Keeper {
    /// Will keep this file.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self(Arc::new(Mutex::new(State {
            path,
            waiting: VecDeque::new(),
            failing: false,
        })))
    }

    /// Takes in where things are after a drain.
    pub fn push(&self, round: u64, position: Position) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.push_back((round, position));
        if state.waiting.len() > MAX_WAITING {
            let mut number = 0;
            state.waiting.retain(|_| {
                number += 1;
                number % 2 == 0
            });
        }
    }

    /// For everything up to a drain.
    #[must_use]
    pub fn receipt(&self, round: u64) -> Receipt {
        Receipt {
            keeper: self.clone(),
            round,
        }
    }
}

impl Receipt {
    /// Writes the position.
    pub fn handed_over(self) {
        let mut state = (self.keeper.0.lock()).unwrap_or_else(PoisonError::into_inner);
        let mut newest = None;
        while (state.waiting.front()).is_some_and(|(round, _)| *round <= self.round) {
            newest = state.waiting.pop_front();
        }
        let Some((_, position)) = newest else {
            return;
        };
        match position.write(&state.path) {
            Ok(()) => state.failing = false,
            Err(error) => {
                if !state.failing {
                    tracing::warn!(
                        path = %state.path.display(),
                        %error,
                        "cannot keep the position of the probe's log"
                    );
                }
                state.failing = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(offset: u64) -> Position {
        let place = Place {
            device: 1,
            inode: 2,
            head_bytes: 3,
            head: 4,
            offset,
        };
        let span = Span {
            from: 5,
            to: offset,
        };
        Position::new("boot".to_owned(), vec![span], vec![place])
    }

    #[test]
    fn it_goes_on_when_everything_before_is_handed_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("position");
        assert_eq!(Position::read(&path).unwrap(), Position::default());
        let keeper = Keeper::new(path.clone());
        for round in 1..=4 {
            keeper.push(round, position(round * 10));
        }
        keeper.receipt(0).handed_over();
        assert!(!path.exists());
        keeper.receipt(3).handed_over();
        assert_eq!(Position::read(&path).unwrap(), position(30));
        keeper.receipt(2).handed_over();
        assert_eq!(Position::read(&path).unwrap(), position(30));
    }

    #[test]
    fn what_waits_for_long_is_thinned() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("position");
        let keeper = Keeper::new(path.clone());
        for round in 1..=10_000 {
            keeper.push(round, position(round));
        }
        assert!(keeper.0.lock().unwrap().waiting.len() <= MAX_WAITING);
        keeper.receipt(10_000).handed_over();
        assert_eq!(Position::read(&path).unwrap(), position(10_000));
    }

    #[test]
    fn a_damaged_file_is_none() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in [
            "",
            "{",
            r#"{"version":2,"boot":"","counted":[],"files":[]}"#,
        ] {
            fs::write(file.path(), text).unwrap();
            assert_eq!(Position::read(file.path()).unwrap(), Position::default());
        }
    }
}
