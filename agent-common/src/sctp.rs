//! What an SCTP packet says about an association that is being made (RFC 9260).
//!
//! Four packets make one: the client's INIT, the server's INIT ACK, and with what that has brought the client's COOKIE ECHO and
//! the server's COOKIE ACK. Each end chooses a tag for the association, which the other sends back in every packet. What is of
//! interest is the first chunk of a packet, unless it authenticates the next (RFC 4895).

/// `IPPROTO_SCTP`.
pub const IPPROTO_SCTP: u8 = 132;

/// Where the first chunk begins, in bytes from the beginning of the packet.
pub const FIRST_CHUNK: u32 = 12;

/// The ports, the tag and the checksum that a packet begins with, and the beginning of its first chunk; as they lie in memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// The port that it is sent from, in network byte order.
    pub source: u16,
    /// The port that it is sent to, likewise.
    pub destination: u16,
    /// The tag that the end which it is sent to has chosen.
    pub tag: u32,
    /// The checksum, which is not looked at.
    pub checksum: u32,
    /// The first chunk.
    pub chunk: ChunkHead,
}

/// How a chunk begins.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkHead {
    /// What it is.
    pub kind: u8,
    /// Depends on the kind.
    pub flags: u8,
    /// Its length in bytes with this head and without what fills the last word, in network byte order.
    pub length: u16,
}

/// A chunk by which associations are made, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// A client calls; its tag follows the chunk's head.
    Init,
    /// The receiver ends an association, or has none of it.
    Abort,
    /// The server has made the association: the client has proven that it gets what is sent to its address.
    CookieAck,
    /// The next chunk is authenticated; it begins so many bytes after this one.
    Auth(u32),
}

impl ChunkHead {
    /// What the chunk is; `None` if it is of no interest or shorter than one of its kind.
    #[inline(always)]
    #[must_use]
    pub const fn chunk(self) -> Option<Chunk> {
        const INIT: u8 = 1;
        const ABORT: u8 = 6;
        const COOKIE_ACK: u8 = 11;
        const AUTH: u8 = 15;
        let length = u16::from_be(self.length);
        match (self.kind, length) {
            (INIT, 20..) => Some(Chunk::Init),
            (ABORT, 4..) => Some(Chunk::Abort),
            (COOKIE_ACK, 4) => Some(Chunk::CookieAck),
            // Key, algorithm and what it gives.
            (AUTH, 8..) => Some(Chunk::Auth((length as u32 + 3) & !3)),
            _ => None,
        }
    }
}

const _: () = assert!(size_of::<Head>() == 16 && align_of::<Head>() == 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_as_long_as_it_must_be() {
        for (kind, length, wanted) in [
            (1, 20, Some(Chunk::Init)),
            (1, 60, Some(Chunk::Init)),
            (1, 19, None),
            (2, 20, None),
            (6, 4, Some(Chunk::Abort)),
            (6, 3, None),
            (10, 200, None),
            (11, 4, Some(Chunk::CookieAck)),
            (11, 5, None),
            (11, 0, None),
            (15, 7, None),
            (15, 8, Some(Chunk::Auth(8))),
            (15, 29, Some(Chunk::Auth(32))),
            (15, 0xffff, Some(Chunk::Auth(0x1_0000))),
            (0, 4, None),
        ] {
            let head = ChunkHead {
                kind,
                flags: 0,
                length: u16::to_be(length),
            };
            assert_eq!(head.chunk(), wanted, "{kind}, {length}");
        }
    }
}
