//! The bytes of one file of an agent's spool.
//!
//! ```text
//! "msspool2"  resolve: 1 byte, `b`oth or `l`ocal
//! entry*      length of the message: u32, CRC-32 of all that follows and of the length: u32,
//!             connections in the batch: u64, the message
//! ```
//!
//! Numbers are little-endian. The message is a whole [`AgentMessage::Batch`](crate::wire::AgentMessage) in MessagePack whose
//! number is 0: the place in the file says which it will have.

use crate::wire::{MAX_MESSAGE_BYTES, Resolve};

const MAGIC: &[u8; 8] = b"msspool2";

/// What a file begins with, in bytes.
pub const HEADER_BYTES: u64 = 9;

/// What comes before an entry's message, in bytes.
pub const ENTRY_HEADER_BYTES: usize = 16;

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
    #[must_use]
    #[expect(
        clippy::len_without_is_empty,
        reason = "an entry has a header, so it is never empty"
    )]
    pub fn len(&self) -> u64 {
        (ENTRY_HEADER_BYTES + self.message.len()) as u64
    }

    /// Its bytes; `None` if its message is longer than any may be.
    #[must_use]
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        let length = u32::try_from(self.message.len()).ok()?;
        let mut bytes = Vec::with_capacity(ENTRY_HEADER_BYTES + self.message.len());
        bytes.extend(length.to_le_bytes());
        bytes.extend(checksum(length, self.connections, &self.message).to_le_bytes());
        bytes.extend(self.connections.to_le_bytes());
        bytes.extend(&self.message);
        Some(bytes)
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

/// The header of a file.
#[must_use]
pub fn header(resolve: Resolve) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.push(match resolve {
        Resolve::Both => b'b',
        Resolve::Local => b'l',
    });
    header
}

/// How long the message is that comes after an entry's header; `None` if none is so long.
#[must_use]
pub fn message_bytes(header: &[u8; ENTRY_HEADER_BYTES]) -> Option<usize> {
    let (length, _, _) = fields(header);
    usize::try_from(length)
        .ok()
        .filter(|&length| length <= MAX_MESSAGE_BYTES)
}

/// The entry of a header and its message, if the checksum is theirs.
#[must_use]
pub fn entry(header: &[u8; ENTRY_HEADER_BYTES], message: Vec<u8>) -> Option<Entry> {
    let (length, sum, connections) = fields(header);
    (checksum(length, connections, &message) == sum).then_some(Entry {
        connections,
        message,
    })
}

fn parse_entry(bytes: &[u8]) -> Option<(Entry, &[u8])> {
    let (header, rest) = bytes.split_first_chunk::<ENTRY_HEADER_BYTES>()?;
    let (message, rest) = rest.split_at_checked(message_bytes(header)?)?;
    Some((entry(header, message.to_vec())?, rest))
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
