//! One file of the spool, on disk. What its bytes mean is in [`flow::segment`].

use std::{
    fs::{File, OpenOptions},
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

/// Reads a whole file.
pub(super) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_FILE_BYTES)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Reads the entry at `offset`; `None` if there is no whole one.
pub(super) fn read_entry(file: &File, offset: u64) -> io::Result<Option<Entry>> {
    let mut head = [0; ENTRY_HEADER_BYTES];
    if !is_there(file.read_exact_at(&mut head, offset))? {
        return Ok(None);
    }
    let Some(length) = message_bytes(&head) else {
        return Ok(None);
    };
    let mut message = vec![0; length];
    let after = offset + ENTRY_HEADER_BYTES as u64;
    if !is_there(file.read_exact_at(&mut message, after))? {
        return Ok(None);
    }
    Ok(entry(&head, message))
}

/// An entry's bytes. None is too long: batches are cut to what a peer accepts.
pub(super) fn to_bytes(entry: &Entry) -> io::Result<Vec<u8>> {
    let bytes = entry.to_bytes();
    bytes.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Whether the file went so far.
fn is_there(read: io::Result<()>) -> io::Result<bool> {
    match read {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}
