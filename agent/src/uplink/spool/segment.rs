//! One file of the spool, on disk. What its bytes mean is in [`flow::segment`].
//!
//! What a disk does not give back is lost, and it is lost however often one asks. So a file that cannot be read ends where
//! that begins, as one ends that is torn.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

pub(super) use flow::segment::{Entry, HEADER_BYTES, parse};
use flow::{
    segment::{ENTRY_HEADER_BYTES, entry, header, message_bytes},
    wire::Resolve,
};

/// The largest file that is read: what two full segments merge into, and one more message.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The extension of a file that has no whole header yet: no segment's name ends so.
const UNFINISHED: &str = "tmp";

/// Makes a file with nothing but its header, which it has from the moment on at which it has its name.
pub(super) fn begin(path: &Path, resolve: Resolve) -> io::Result<File> {
    let unfinished = path.with_extension(UNFINISHED);
    let begun = create(&unfinished, resolve).and_then(|file| {
        fs::rename(&unfinished, path)?;
        Ok(file)
    });
    if begun.is_err()
        && let Err(error) = fs::remove_file(&unfinished)
    {
        tracing::debug!(%error, "the beginning of a segment stays");
    }
    begun
}

/// Makes a file with nothing but its header.
pub(super) fn create(path: &Path, resolve: Resolve) -> io::Result<File> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(&header(resolve))?;
    Ok(file)
}

/// Appends at `end`, where the last entry ended. What a failure leaves behind it is cut off with the next success.
pub(super) fn append(file: &File, end: u64, entry: &Entry) -> io::Result<()> {
    let written = to_bytes(entry).and_then(|bytes| file.write_all_at(&bytes, end));
    if written.is_err() {
        file.set_len(end)?;
    }
    written
}

/// Whether bytes that are no whole entry may be the beginning of one: the file ends before it does.
pub(super) fn is_beginning(bytes: &[u8]) -> bool {
    match bytes.split_first_chunk() {
        None => true,
        Some((head, rest)) => message_bytes(head).is_some_and(|length| rest.len() < length),
    }
}

/// Opens a file for reading; `None` if there is none that could be read.
///
/// # Errors
/// If that may be otherwise the next time.
pub(super) fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if is_final(&error) => {
            say(&error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Reads a whole file, as far as it can be read, and says whether that was all of it.
///
/// # Errors
/// If it cannot be opened, but may be the next time.
pub(super) fn read(path: &Path) -> io::Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::new();
    let Some(file) = open(path)? else {
        return Ok((bytes, false));
    };
    let read = file.take(MAX_FILE_BYTES).read_to_end(&mut bytes);
    if let Err(error) = &read {
        say(error);
    }
    Ok((bytes, read.is_ok()))
}

/// Reads the entry at `offset`; `None` if there is no whole one that can be read.
pub(super) fn read_entry(file: &File, offset: u64) -> Option<Entry> {
    let read = |bytes: &mut [u8], offset| match file.read_exact_at(bytes, offset) {
        Ok(()) => true,
        Err(error) => {
            if error.kind() != io::ErrorKind::UnexpectedEof {
                say(&error);
            }
            false
        }
    };
    let mut head = [0; ENTRY_HEADER_BYTES];
    if !read(&mut head, offset) {
        return None;
    }
    let mut message = vec![0; message_bytes(&head)?];
    if !read(&mut message, offset + ENTRY_HEADER_BYTES as u64) {
        return None;
    }
    entry(&head, message)
}

/// An entry's bytes. None is too long: batches are cut to what a peer accepts.
pub(super) fn to_bytes(entry: &Entry) -> io::Result<Vec<u8>> {
    let bytes = entry.to_bytes();
    bytes.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Whether the file is gone, or the disk does not give it back: nothing that passes, as having too many files open does.
fn is_final(error: &io::Error) -> bool {
    const OF_THE_DISK: [i32; 3] = [libc::EIO, libc::EUCLEAN, libc::EBADMSG];
    let is_of_the_disk = error.raw_os_error().map(|code| OF_THE_DISK.contains(&code));
    error.kind() == io::ErrorKind::NotFound || is_of_the_disk == Some(true)
}

/// What it costs is said by who had it read.
fn say(error: &io::Error) {
    tracing::error!(%error, "a segment of the spool cannot be read");
}
