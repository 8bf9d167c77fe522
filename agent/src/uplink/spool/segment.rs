//! One file of the spool.
//!
//! ```text
//! "msspool2"  resolve: 1 byte, `b`oth or `l`ocal
//! entry*      length of the message: u32, CRC-32 of all that follows and of the length: u32,
//!             connections in the batch: u64, the message
//! ```
//!
//! Numbers are little-endian. The message is a whole [`AgentMessage::Batch`](flow::wire::AgentMessage) in MessagePack whose
//! number is 0: the place in the file says which it will have.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use flow::wire::{MAX_MESSAGE_BYTES, Resolve};

const MAGIC: &[u8; 8] = b"msspool2";
pub(super) const HEADER_BYTES: u64 = 9;
const ENTRY_HEADER_BYTES: usize = 16;

/// The largest file that is read: what two full segments merge into, and one more message.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// A batch, without its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// How many connections its flows stand for.
    pub connections: u64,
    /// The encoded message.
    pub message: Vec<u8>,
}

/// What a file's bytes amount to.
#[derive(Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Who named the flows.
    pub resolve: Resolve,
    /// The entries up to the first that is not whole.
    pub entries: Vec<Entry>,
    /// Where that one begins: the length of what is good.
    pub good_bytes: u64,
}

impl Entry {
    /// How many bytes it takes in a file.
    pub(super) fn len(&self) -> u64 {
        (ENTRY_HEADER_BYTES + self.message.len()) as u64
    }

    pub(super) fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let Ok(length) = u32::try_from(self.message.len()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let mut bytes = Vec::with_capacity(ENTRY_HEADER_BYTES + self.message.len());
        bytes.extend(length.to_le_bytes());
        bytes.extend(checksum(length, self.connections, &self.message).to_le_bytes());
        bytes.extend(self.connections.to_le_bytes());
        bytes.extend(&self.message);
        Ok(bytes)
    }
}

/// Reads a file's bytes, whatever they are. `None` if they do not begin as a segment does.
#[must_use]
pub fn parse(bytes: &[u8]) -> Option<Parsed> {
    let (magic, rest) = bytes.split_first_chunk::<8>()?;
    let (resolve, mut rest) = rest.split_first()?;
    let resolve = match (magic, resolve) {
        (MAGIC, b'b') => Resolve::Both,
        (MAGIC, b'l') => Resolve::Local,
        _ => return None,
    };
    let mut entries = Vec::new();
    while let Some((entry, after)) = parse_entry(rest) {
        entries.push(entry);
        rest = after;
    }
    Some(Parsed {
        resolve,
        entries,
        good_bytes: (bytes.len() - rest.len()) as u64,
    })
}

fn parse_entry(bytes: &[u8]) -> Option<(Entry, &[u8])> {
    let (header, rest) = bytes.split_first_chunk::<ENTRY_HEADER_BYTES>()?;
    let (length, sum, connections) = fields(header);
    let length_of = usize::try_from(length).ok()?;
    if length_of > MAX_MESSAGE_BYTES {
        return None;
    }
    let (message, rest) = rest.split_at_checked(length_of)?;
    let entry = Entry {
        connections,
        message: message.to_vec(),
    };
    (checksum(length, connections, message) == sum).then_some((entry, rest))
}

fn fields(header: &[u8; ENTRY_HEADER_BYTES]) -> (u32, u32, u64) {
    let [a, b, c, d, e, f, g, h, connections @ ..] = *header;
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
        u64::from_le_bytes(connections),
    )
}

fn checksum(length: u32, connections: u64, message: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length.to_le_bytes());
    hasher.update(&connections.to_le_bytes());
    hasher.update(message);
    hasher.finalize()
}

/// Makes a file with nothing but its header.
pub(super) fn create(path: &Path, resolve: Resolve) -> io::Result<File> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    let mut header = MAGIC.to_vec();
    header.push(match resolve {
        Resolve::Both => b'b',
        Resolve::Local => b'l',
    });
    file.write_all(&header)?;
    Ok(file)
}

/// Appends at `end`, where the last entry ended. What a failure leaves behind it is cut off with the next success.
pub(super) fn append(file: &File, end: u64, entry: &Entry) -> io::Result<()> {
    let written = entry
        .to_bytes()
        .and_then(|bytes| file.write_all_at(&bytes, end));
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
    let mut header = [0; ENTRY_HEADER_BYTES];
    match file.read_exact_at(&mut header, offset) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let (length, sum, connections) = fields(&header);
    if length as usize > MAX_MESSAGE_BYTES {
        return Ok(None);
    }
    let mut message = vec![0; length as usize];
    match file.read_exact_at(&mut message, offset + ENTRY_HEADER_BYTES as u64) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let whole = checksum(length, connections, &message) == sum;
    Ok(whole.then_some(Entry {
        connections,
        message,
    }))
}
