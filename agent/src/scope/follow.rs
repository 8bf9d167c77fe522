//! Follows the files of a log: as they grow, are truncated, renamed and replaced, and appear.
//!
//! Files are looked at once a drain. A file is held open, so what is written to one that was renamed or removed in the
//! meantime is read to its end; what is called by the old name now is another file. A file that is shorter than what was
//! read of it, or begins with something else, was truncated, and is read from its beginning.

use std::{
    collections::BTreeSet,
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    str::FromStr,
};

use super::{
    lines::{Lines, Text},
    position::Place,
    stdin::Stdin,
};

/// How much is read at once.
pub(super) const PIECE_BYTES: usize = 64 << 10;

/// How much is read in a drain: of lines of usual length, 20,000.
const MAX_BYTES: usize = 4 << 20;

/// By how many of its first bytes a file is known again, at most.
const HEAD_BYTES: usize = 256;

/// How many drains a file that is called by its name no longer is still read, after it last grew: kubelet renames it first,
/// and tells the runtime then.
const LINGER: u32 = 10;

/// After how many drains without any file that is said: one that is about to be made, or rotated, is there by then.
const MISSED: u32 = 10;

/// Files that are followed at once. Others wait until these are gone.
const MAX_FILES: usize = 256;

/// Where a log is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogSource {
    /// Standard input.
    Stdin,
    /// Files whose path matches this pattern.
    Files(String),
}

impl FromStr for LogSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" => Err("expected a path, a pattern or `-`".to_owned()),
            "-" => Ok(Self::Stdin),
            _ => match glob::Pattern::new(text) {
                Ok(_) => Ok(Self::Files(text.to_owned())),
                Err(_) if Path::new(text).exists() => Ok(Self::Files(text.to_owned())),
                Err(error) => Err(error.to_string()),
            },
        }
    }
}

/// Follows a log.
#[derive(Debug)]
pub(super) struct Follower {
    patterns: Vec<String>,
    stdin: Option<Stdin>,
    /// By age.
    tails: Vec<Tail>,
    /// How far files were read by an earlier process, of those that were not found yet.
    known: Vec<Place>,
    is_first: bool,
    buffer: Vec<u8>,
    /// Whether it was said that there are too many.
    is_crowded: bool,
    /// Files of which it was said that they cannot be opened, as long as they are there.
    refused: BTreeSet<PathBuf>,
    /// How many drains in a row there was no file to read.
    without: u32,
}

/// A file.
#[derive(Debug)]
struct Tail {
    path: PathBuf,
    file: File,
    device: u64,
    inode: u64,
    /// Its first bytes.
    head: Vec<u8>,
    lines: Lines,
    /// Whether everything in it was read: what comes is new.
    is_live: bool,
    /// For how many drains it has not been called by its name, and has not grown.
    gone: u32,
    is_named: bool,
    /// Whether it was said that it cannot be read.
    is_unreadable: bool,
}

impl Follower {
    /// Will follow these, from where an earlier process has left off.
    ///
    /// # Errors
    /// If there is no thread to be had for standard input.
    pub(super) fn new(sources: &[LogSource], known: Vec<Place>) -> io::Result<Self> {
        let mut patterns = Vec::new();
        let mut stdin = None;
        for source in sources {
            match source {
                LogSource::Stdin => stdin = Some(Stdin::new()?),
                LogSource::Files(pattern) => patterns.push(pattern.clone()),
            }
        }
        Ok(Self {
            patterns,
            stdin,
            tails: Vec::new(),
            known,
            is_first: true,
            buffer: vec![0; PIECE_BYTES],
            is_crowded: false,
            refused: BTreeSet::new(),
            without: 0,
        })
    }

    /// Hands out the lines that are new; `true` with those that were written since the last look. Reads to the end of older
    /// files before it begins with newer ones, and no more than it may in one drain. Returns the number of bytes.
    pub(super) fn read(&mut self, sink: &mut dyn FnMut(Text<'_>, bool)) -> usize {
        self.look();
        let mut room = MAX_BYTES;
        if let Some(stdin) = &mut self.stdin {
            stdin.read(&mut room, &mut |text| sink(text, false));
        }
        for tail in &mut self.tails {
            if room == 0 {
                // It has not been looked at, so it has not ended.
                tail.gone = 0;
                continue;
            }
            let read = tail.read(&mut self.buffer, &mut room, sink);
            let was_unreadable = std::mem::replace(&mut tail.is_unreadable, read.is_err());
            if let Err(error) = read
                && !was_unreadable
            {
                tracing::warn!(path = %tail.path.display(), %error, "cannot read the probe's log");
            }
        }
        self.tails.retain_mut(|tail| {
            let is_over = !tail.is_named && tail.is_live && tail.gone > LINGER;
            if is_over {
                tracing::debug!(path = %tail.path.display(), "a file of the probe's log is gone");
                tail.lines.finish(&mut |text| sink(text, true));
            }
            !is_over
        });
        MAX_BYTES - room
    }

    /// How far each file was read. Those of an earlier process stay until it is clear that they are gone.
    pub(super) fn places(&self) -> Vec<Place> {
        let tails = self.tails.iter().map(Tail::place);
        tails.chain(self.known.iter().copied()).collect()
    }

    /// Finds files that are new, and those that are gone.
    fn look(&mut self) {
        for tail in &mut self.tails {
            tail.is_named = false;
        }
        let mut new = Vec::new();
        let paths = self.paths();
        self.refused
            .retain(|path| paths.binary_search(path).is_ok());
        for path in paths {
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            if !metadata.is_file() {
                continue;
            }
            let same = |tail: &&mut Tail| tail.is(&metadata);
            match self.tails.iter_mut().find(same) {
                Some(tail) => {
                    tail.is_named = true;
                    tail.gone = 0;
                }
                None => new.push((metadata.modified().ok(), path)),
            }
        }
        for tail in &mut self.tails {
            tail.gone += u32::from(!tail.is_named);
        }
        new.sort();
        for (_, path) in new {
            self.open(path, true);
        }
        if std::mem::take(&mut self.is_first) {
            self.find_renamed();
        }
        self.miss();
    }

    /// Says once that there is nothing to follow; that there is something is said when it is opened.
    fn miss(&mut self) {
        if !self.tails.is_empty() || self.patterns.is_empty() {
            self.without = 0;
            return;
        }
        self.without = self.without.saturating_add(1);
        if self.without == MISSED {
            tracing::warn!(
                patterns = ?self.patterns,
                "there is no log of the probe to be read: is it elsewhere, or a link that leads to what is not mounted here?"
            );
        }
    }

    fn open(&mut self, path: PathBuf, is_named: bool) {
        if self.tails.len() >= MAX_FILES {
            if !std::mem::replace(&mut self.is_crowded, true) {
                tracing::warn!(
                    most = MAX_FILES,
                    "there are more files of the probe's log than are followed"
                );
            }
            return;
        }
        match Tail::open(path.clone(), is_named) {
            // The same file by another name.
            Ok(tail) if self.tails.iter().any(|known| known.is_same(&tail)) => {}
            Ok(mut tail) => {
                if let Some(at) = self.known.iter().position(|known| tail.matches(known)) {
                    let known = self.known.swap_remove(at);
                    tail.lines = Lines::at(known.offset);
                }
                tracing::info!(path = %path.display(), offset = tail.lines.taken(), "follows the probe's log");
                self.tails.push(tail);
            }
            // It may be gone again by now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                if !self.refused.contains(&path) {
                    tracing::warn!(path = %path.display(), %error, "cannot open the probe's log");
                    self.refused.insert(path);
                }
            }
        }
    }

    /// Finds the files that an earlier process was reading and that were renamed since. What was compressed is not read.
    fn find_renamed(&mut self) {
        let known = std::mem::take(&mut self.known);
        let folders = self.folders();
        let named = self.tails.len();
        for place in known {
            let found = folders.iter().find_map(|folder| find_inode(folder, &place));
            self.known.push(place);
            if let Some(path) = found {
                self.open(path, false);
            }
            let before = self.known.len();
            self.known.retain(|known| *known != place);
            if self.known.len() < before {
                tracing::warn!(
                    inode = place.inode,
                    "a file of the probe's log is gone: what was written to it after the last look is not known"
                );
            }
        }
        // They are older.
        self.tails.rotate_left(named);
    }

    fn paths(&self) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        for pattern in &self.patterns {
            let literal = Path::new(pattern);
            if literal.exists() {
                paths.push(literal.to_owned());
            } else if let Ok(found) = glob::glob(pattern) {
                // What cannot be read now may be later.
                paths.extend(found.flatten().filter(|path| !is_compressed(path)));
            }
        }
        paths.sort();
        paths.dedup();
        paths
    }

    /// Where renamed files are: beside those that have kept their names.
    fn folders(&self) -> Vec<PathBuf> {
        let literal = self
            .patterns
            .iter()
            .map(|pattern| Path::new(pattern.as_str()));
        let named = self.tails.iter().map(|tail| tail.path.as_path());
        let mut folders: Vec<PathBuf> = (named.chain(literal))
            .filter_map(|path| Some(path.parent()?.to_owned()))
            .collect();
        folders.sort();
        folders.dedup();
        folders
    }
}

impl Tail {
    fn open(path: PathBuf, is_named: bool) -> io::Result<Self> {
        let file = File::open(&path)?;
        let metadata = file.metadata()?;
        let head = head(&file, HEAD_BYTES)?;
        Ok(Self {
            path,
            file,
            device: metadata.dev(),
            inode: metadata.ino(),
            head,
            lines: Lines::at(0),
            is_live: false,
            gone: 0,
            is_named,
            is_unreadable: false,
        })
    }

    fn is(&self, metadata: &Metadata) -> bool {
        (self.device, self.inode) == (metadata.dev(), metadata.ino())
    }

    fn is_same(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }

    /// Whether an earlier process meant this file.
    fn matches(&self, known: &Place) -> bool {
        let head = usize::try_from(known.head_bytes).ok();
        (self.device, self.inode) == (known.device, known.inode)
            && head
                .and_then(|bytes| self.head.get(..bytes))
                .is_some_and(|head| crc32fast::hash(head) == known.head)
    }

    fn place(&self) -> Place {
        Place {
            device: self.device,
            inode: self.inode,
            head_bytes: self.head.len() as u64,
            head: crc32fast::hash(&self.head),
            offset: self.lines.settled(),
        }
    }

    fn read(
        &mut self,
        buffer: &mut [u8],
        room: &mut usize,
        sink: &mut dyn FnMut(Text<'_>, bool),
    ) -> io::Result<()> {
        let length = self.file.metadata()?.len();
        if length == self.lines.taken() {
            self.is_live = true;
            return Ok(());
        }
        let known = head(&self.file, self.head.len())?;
        if length < self.lines.taken() || known != self.head {
            tracing::info!(path = %self.path.display(), "the probe's log was truncated");
            self.lines = Lines::at(0);
            self.head.clear();
        }
        if self.head.len() < HEAD_BYTES {
            self.head = head(&self.file, HEAD_BYTES)?;
        }
        self.gone = 0;
        let is_live = self.is_live;
        while *room > 0 {
            let most = buffer.len().min(*room);
            let read = match self.file.read_at(&mut buffer[..most], self.lines.taken()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                read => read?,
            };
            if read == 0 {
                self.is_live = true;
                break;
            }
            *room -= read;
            (self.lines).take(&buffer[..read], &mut |text| sink(text, is_live));
        }
        Ok(())
    }
}

/// At most so many of a file's first bytes.
fn head(file: &File, most: usize) -> io::Result<Vec<u8>> {
    let mut head = vec![0; most];
    let mut length = 0;
    while length < most {
        match file.read_at(&mut head[length..], length as u64) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    head.truncate(length);
    Ok(head)
}

fn find_inode(folder: &Path, place: &Place) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    entries.flatten().find_map(|entry| {
        let path = entry.path();
        let metadata = fs::metadata(&path).ok()?;
        let is_it = (metadata.dev(), metadata.ino()) == (place.device, place.inode);
        (is_it && metadata.is_file() && !is_compressed(&path)).then_some(path)
    })
}

fn is_compressed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gz")
}

#[cfg(test)]
mod tests;
