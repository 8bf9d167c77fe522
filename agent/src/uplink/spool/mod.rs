//! Batches on disk, until they are acknowledged.
//!
//! Every batch is appended to the spool before it is sent, so an agent that is killed goes on where it was: each batch
//! keeps the instance and number under which it may have been sent, and none is sent to a ledger under two that could have
//! it under both. Batches that were never sent have no number yet; while they wait they may be merged. Numbers are given to
//! what is in files only, so those of an instance are without a gap, whenever an agent is killed.
//!
//! **What survives.** An agent that is killed at any moment loses no batch that was appended; what it was appending at that
//! moment is cut off, and is no loss, because nobody was told that it is kept. A power failure costs at
//! most what the kernel had not written back of the segment that was being appended to: a segment is synced when it is
//! full and when it is merged, the folder before a segment's first batch is sent. So numbers are never given twice, also
//! after a power failure, and what was acknowledged and comes back is recognised by the ledger. The two leave the same
//! behind, so the lock says since which start of the kernel the spool is in use.
//!
//! **When it is full** the oldest segments that have no numbers yet are merged: equal edges are added up. If that makes
//! them no smaller, the oldest is dropped; its connections, and the losses that it told of, are counted as lost.

mod merge;
mod name;
mod segment;
mod sending;

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use flow::wire::Resolve;

use self::{
    name::{Name, Numbers},
    sending::Cursor,
};
use super::new_instance;
use crate::capture::Losses;
pub use flow::segment::{Entry, Parsed, parse};

/// The fewest bytes that a spool may be given.
pub const MIN_SPOOL_BYTES: u64 = 256 << 10;

/// A segment is full at this size, or at a sixteenth of the spool.
const MAX_SEGMENT_BYTES: u64 = 1 << 20;

/// Two segments are merged if they have at most so many times the bytes of a full one together: that bounds the memory
/// for it.
const MERGE_AT_MOST: u64 = 4;

/// The reason under which connections are counted that were dropped because the spool was full.
const SPOOL_FULL: &str = "spool_full";

/// The reason under which connections are counted that were in the part of a file which has become unreadable: its bytes are
/// not those that were written, or the disk does not give them back. Of a file that an earlier process left nobody knows how
/// many they were: it counts as one.
const SPOOL_CUT: &str = "spool_cut";

/// Where the kernel says by which name this start of it goes: a UUID and a line feed.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Why the spool cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The system said no.
    #[error("spool: cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another agent has it.
    #[error("spool {} is in use by another process", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
}

/// The folder of batches.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    limit: u64,
    segment_limit: u64,
    /// How this process names flows.
    resolve: Resolve,
    /// By age.
    segments: VecDeque<Segment>,
    /// The last segment, if it is open for appending.
    tail: Option<File>,
    next_id: u64,
    /// Under which this process sends, and the last number that it has given.
    instance: String,
    last_sequence: u64,
    /// The instance whose turn it is: only its batches are given out and acknowledged.
    turn: String,
    cursor: Option<Cursor>,
    /// Whether a power failure leaves all segments the names that they have.
    is_synced: bool,
    bytes: u64,
    lost: Lost,
    lock: File,
}

/// What went since it was last asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Lost {
    /// What the spool has lost.
    pub(super) here: Losses,
    /// What the batches that it has lost told of: it was counted before, where it arose.
    pub(super) before: Losses,
}

#[derive(Debug)]
struct Segment {
    name: Name,
    /// What its batches are to have instead of the numbers in its name, before they are sent again.
    anew: Option<Numbers>,
    resolve: Resolve,
    entries: u64,
    /// Of those, how many are acknowledged.
    acknowledged: u64,
    connections: u64,
    bytes: u64,
    /// The segment with which it was merged in vain.
    barren_with: Option<u64>,
}

impl Segment {
    fn numbers(&self) -> Option<&Numbers> {
        self.anew.as_ref().or(self.name.numbers.as_ref())
    }

    /// Whether its batches have numbers within this instance.
    fn is_of(&self, instance: &str) -> bool {
        self.numbers()
            .is_some_and(|numbers| numbers.instance == instance)
    }
}

impl Spool {
    /// Opens a folder, which is created if it does not exist, for at most `limit` bytes; `resolve` is how the batches are
    /// named that will be appended.
    ///
    /// # Errors
    /// If the folder cannot be used, or is in use.
    pub fn open(directory: &Path, limit: u64, resolve: Resolve) -> Result<Self, SpoolError> {
        // Unknown is as good as another: what is torn counts.
        let boot = fs::read(BOOT_ID).unwrap_or_default();
        Self::open_since(&boot, directory, limit, resolve)
    }

    /// Opens a folder under this start of the kernel.
    fn open_since(
        boot: &[u8],
        directory: &Path,
        limit: u64,
        resolve: Resolve,
    ) -> Result<Self, SpoolError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed("create", directory))?;
        let lock = lock(directory)?;
        let is_same_boot = !boot.is_empty() && says(&lock, boot);
        let mut names = Vec::new();
        for entry in fs::read_dir(directory).map_err(failed("read", directory))? {
            let entry = entry.map_err(failed("read", directory))?;
            if let Some(name) = entry.file_name().to_str().and_then(Name::parse) {
                names.push(name);
            }
        }
        // By their first; of those with the same first, who stands for more comes first.
        names.sort_by_key(|name| (name.first, std::cmp::Reverse(name.last)));
        let mut spool = Self {
            directory: directory.to_owned(),
            limit: limit.max(MIN_SPOOL_BYTES),
            segment_limit: (limit.max(MIN_SPOOL_BYTES) / 16).min(MAX_SEGMENT_BYTES),
            resolve,
            segments: VecDeque::new(),
            tail: None,
            next_id: 0,
            instance: new_instance(),
            last_sequence: 0,
            turn: String::new(),
            cursor: None,
            // The process before may have been killed just after it had changed one.
            is_synced: false,
            bytes: 0,
            lost: Lost::default(),
            lock,
        };
        let newest = names.last().cloned();
        for name in names {
            let known = spool.segments.back();
            if known.is_some_and(|known| name.last <= known.name.last) {
                spool.remove_file(&name)?;
            } else {
                spool.next_id = name.last + 1;
                let was_appended_to = is_same_boot && newest.as_ref() == Some(&name);
                spool.load(name, was_appended_to)?;
            }
        }
        // Last, so that an agent that is killed before takes nothing for whole.
        if !is_same_boot && let Err(error) = say(&spool.lock, boot) {
            tracing::debug!(%error, "the lock does not say since when the spool is in use");
        }
        Ok(spool)
    }

    /// Takes a segment over from an earlier process. What is torn is cut off: it is lost, unless it is no more than the
    /// beginning of what that process was about to append when it was killed.
    fn load(&mut self, name: Name, was_appended_to: bool) -> Result<(), SpoolError> {
        let path = self.path(&name);
        let (bytes, is_whole) = segment::read(&path).map_err(failed("read", &path))?;
        let Some(parsed) = parse(&bytes) else {
            tracing::error!(path = %path.display(), "no segment of a spool, or none that can be read: removed");
            self.lose(SPOOL_CUT, 1);
            return self.remove_file(&name);
        };
        let torn = bytes.len() as u64 - parsed.good_bytes;
        if !is_whole || torn > 0 {
            let rest = &bytes[bytes.len() - usize::try_from(torn).unwrap_or(0)..];
            if is_whole && was_appended_to && segment::is_beginning(rest) {
                tracing::info!(path = %path.display(), bytes = torn, "a batch that was not written to its end is left out");
            } else {
                tracing::error!(
                    path = %path.display(),
                    at = parsed.good_bytes,
                    bytes = bytes.len(),
                    "the end of a segment is torn: cut off"
                );
                self.lose(SPOOL_CUT, 1);
            }
            let file = OpenOptions::new().write(true).open(&path);
            // Nothing is appended to it, so what is behind the good bytes does no harm.
            if let Err(error) = file.and_then(|file| file.set_len(parsed.good_bytes)) {
                tracing::warn!(path = %path.display(), %error, "the end of a segment stays");
            }
        }
        let done = name.numbers.as_ref().map_or(0, |numbers| numbers.done);
        if parsed.entries.len() as u64 <= done {
            return self.remove_file(&name);
        }
        self.bytes += parsed.good_bytes;
        self.segments.push_back(Segment {
            name,
            anew: None,
            resolve: parsed.resolve,
            entries: parsed.entries.len() as u64,
            acknowledged: done,
            connections: connections(&parsed.entries),
            bytes: parsed.good_bytes,
            barren_with: None,
        });
        Ok(())
    }

    /// Appends a batch whose message has no number yet. If there is no room, the oldest make some; what that costs is
    /// told by [`Spool::take_losses`].
    ///
    /// # Errors
    /// If it cannot be written: the batch is not in the spool.
    pub(super) fn append(&mut self, entry: &Entry) -> Result<(), SpoolError> {
        let full = |segment: &Segment| {
            segment.bytes + entry.len() > self.segment_limit && segment.entries > 0
        };
        if self.tail.is_some() && self.segments.back().is_some_and(full) {
            self.close_tail()?;
        }
        self.make_room(entry.len())?;
        if self.tail.is_none() {
            self.begin_segment()?;
        }
        let directory = &self.directory;
        let (Some(file), Some(segment)) = (&self.tail, self.segments.back_mut()) else {
            return Ok(());
        };
        if let Err(source) = segment::append(file, segment.bytes, entry) {
            let path = directory.join(segment.name.to_string());
            // If all of it is delivered, its room may be what the disk lacks.
            if let Err(error) = self.close_tail() {
                tracing::debug!(%error, "a segment is closed");
            }
            return Err(failed("append to", &path)(source));
        }
        segment.bytes += entry.len();
        segment.entries += 1;
        segment.connections = segment.connections.saturating_add(entry.connections);
        self.bytes += entry.len();
        if segment.is_of(&self.instance) {
            self.last_sequence += 1;
        }
        Ok(())
    }

    fn begin_segment(&mut self) -> Result<(), SpoolError> {
        let name = Name {
            first: self.next_id,
            last: self.next_id,
            numbers: None,
        };
        let path = self.path(&name);
        self.tail = Some(segment::begin(&path, self.resolve).map_err(failed("create", &path))?);
        self.next_id += 1;
        self.bytes += segment::HEADER_BYTES;
        self.segments.push_back(Segment {
            name,
            anew: None,
            resolve: self.resolve,
            entries: 0,
            acknowledged: 0,
            connections: 0,
            bytes: segment::HEADER_BYTES,
            barren_with: None,
        });
        Ok(())
    }

    fn close_tail(&mut self) -> Result<(), SpoolError> {
        let Some(file) = self.tail.take() else {
            return Ok(());
        };
        let last = self.segments.len() - 1;
        let needed = |segment: &Segment| segment.acknowledged < segment.entries;
        if self.segments.back().is_some_and(needed) {
            return file.sync_data().map_err(failed("sync", &self.directory));
        }
        // It was only kept to be appended to.
        self.discard(last);
        Ok(())
    }

    /// Forgets the batches up to this number of the instance whose turn it is.
    pub(super) fn acknowledge(&mut self, sequence: u64) {
        let mut position = 0;
        while let Some(segment) = self.segments.get_mut(position) {
            let numbers = segment.numbers();
            let Some(numbers) = numbers.filter(|numbers| numbers.instance == self.turn) else {
                break;
            };
            let upto = numbers.upto(sequence).min(segment.entries);
            segment.acknowledged = segment.acknowledged.max(upto);
            // What an earlier process has sent is not sent again if the ledger has it.
            let (first, acknowledged) = (segment.name.first, segment.acknowledged);
            self.cursor
                .take_if(|cursor| cursor.segment == first && cursor.entry < acknowledged);
            if !self.discard_if_acknowledged(position) {
                position += 1;
            }
        }
    }

    /// Discards a segment of which nothing is needed any more, and says whether it has. The one that is appended to stays
    /// until it is full.
    fn discard_if_acknowledged(&mut self, position: usize) -> bool {
        let is_open = self.tail.is_some() && position + 1 == self.segments.len();
        let is_needed = |segment: &Segment| segment.acknowledged < segment.entries;
        if is_open || self.segments.get(position).is_none_or(is_needed) {
            return false;
        }
        self.discard(position);
        true
    }

    /// Removes a segment that is acknowledged. If its file stays, the next process delivers it again, and the ledger knows it.
    fn discard(&mut self, position: usize) {
        if let Some(segment) = self.forget(position)
            && let Err(error) = self.remove_file(&segment.name)
        {
            tracing::warn!(%error, "a segment of the spool stays though all of it is delivered");
        }
    }

    fn forget(&mut self, position: usize) -> Option<Segment> {
        let segment = self.segments.remove(position)?;
        self.bytes -= segment.bytes;
        let first = segment.name.first;
        if self
            .cursor
            .as_ref()
            .is_some_and(|cursor| cursor.segment == first)
        {
            self.cursor = None;
        }
        Some(segment)
    }

    /// The number of the first batch of the instance whose turn it is that is not acknowledged, or that will be the next.
    pub(super) fn first_unacknowledged(&self) -> u64 {
        let front = self.segments.front();
        match front.and_then(|front| Some((front, front.numbers()?))) {
            Some((front, numbers)) => numbers.after(front.acknowledged),
            None => self.last_sequence + 1,
        }
    }

    /// The last number that was given, if the instance whose turn it is is this process's own. Of another's it is not known:
    /// a power failure may have taken the end of a file that was sent.
    pub(super) fn last_given(&self) -> Option<u64> {
        (self.turn == self.instance).then_some(self.last_sequence)
    }

    /// What was lost since this was last asked.
    pub(super) fn take_losses(&mut self) -> Lost {
        std::mem::take(&mut self.lost)
    }

    /// How many bytes the files have.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many batches wait for their acknowledgement.
    #[must_use]
    pub fn batches(&self) -> u64 {
        let left = |segment: &Segment| segment.entries - segment.acknowledged;
        self.segments.iter().map(left).sum()
    }

    /// Writes what the kernel may still hold back.
    ///
    /// # Errors
    /// If that fails.
    pub(super) fn sync(&mut self) -> Result<(), SpoolError> {
        self.close_tail()
    }

    fn lose(&mut self, reason: &str, count: u64) {
        add(&mut self.lost.here, reason, count);
    }

    fn path(&self, name: &Name) -> PathBuf {
        self.directory.join(name.to_string())
    }

    fn remove_file(&self, name: &Name) -> Result<(), SpoolError> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(failed("remove", &path)),
        }
    }

    fn sync_directory(&self) -> Result<(), SpoolError> {
        File::open(&self.directory)
            .and_then(|folder| folder.sync_all())
            .map_err(failed("sync", &self.directory))
    }
}

fn connections(entries: &[Entry]) -> u64 {
    let counts = entries.iter().map(|entry| entry.connections);
    counts.fold(0, u64::saturating_add)
}

fn add(losses: &mut Losses, reason: &str, count: u64) {
    let sum = losses.entry(reason.to_owned()).or_default();
    *sum = sum.saturating_add(count);
}

fn lock(directory: &Path) -> Result<File, SpoolError> {
    let path = directory.join("lock");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(failed("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(SpoolError::InUse {
            path: directory.to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
    }
}

/// Whether a file has these bytes and no others.
fn says(file: &File, bytes: &[u8]) -> bool {
    let mut there = vec![0; bytes.len() + 1];
    let read = file.read_at(&mut there, 0);
    read.is_ok_and(|read| &there[..read] == bytes)
}

/// Has a file say nothing else. Cut short, it says what no kernel does.
fn say(file: &File, bytes: &[u8]) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all_at(bytes, 0)
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> SpoolError + 'a {
    move |source| SpoolError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
