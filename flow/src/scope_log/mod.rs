//! The log of the modified Weave Scope probe.
//!
//! ```text
//! <probe> INFO: DATE TIME.micros [CONN] [eBPF] {hostname|timestamp|CPU|event|pid|comm|Src|Dst|SrcPort|DstPort|NetNS|Fd}
//! <probe> INFO: DATE TIME.micros [CONN] [conntrack] {hostname|MsgType|TCPState|Src|SrcPort|Dst|DstPort|Src|SrcPort|Dst|DstPort|CtID}
//! ```
//!
//! The time is in UTC, when the line was written; `timestamp` is the kernel's, when it happened. `Src` of the first kind is
//! the local end of the socket: of an accepted connection, the server. The second kind has the connection as the client sees
//! it, then as the answers come back: from the server itself, whatever virtual address the client called.
//!
//! [`frame`] takes off what container runtimes put around lines.

mod fields;
pub mod frame;

use std::net::SocketAddr;

use jiff::{civil::DateTime, tz::TimeZone};
use memchr::memmem::{self, Finder, FinderRev};

use self::fields::{Event, Fields, digits};
use crate::time::Timestamp;

/// What marks the lines that are about connections.
const MARK: &[u8] = b" [CONN] [";

/// What the probe's lines begin with, if nothing stands before it.
const PROBE: &[u8] = b"<probe>";

/// What stands before the time.
const LEVEL: &[u8] = b" INFO: ";

/// The latest time that a record can have, in seconds since the epoch.
const MAX_SECONDS: u64 = 18_000_000_000;

/// `YYYY/MM/DD hh:mm:ss`.
const SECONDS_LENGTH: usize = 19;

/// A connection that came about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection<'a> {
    /// When the line was written.
    pub time: Timestamp,
    /// The node whose probe saw it.
    pub hostname: &'a str,
    /// Who opened it.
    pub client: SocketAddr,
    /// The server itself, behind any translation; of a connection that was seen at its client, what the client called.
    pub server: SocketAddr,
    /// How it was seen.
    pub seen: Seen<'a>,
}

/// How a connection was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen<'a> {
    /// A process accepted it.
    Accepted(Socket<'a>),
    /// A process made it.
    Connected(Socket<'a>),
    /// The node translated or only tracked it.
    Tracked {
        /// The address that the client called.
        called: SocketAddr,
        /// The client as the server sees it: the node itself where it answers for others.
        masked: SocketAddr,
    },
}

/// The end that was observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket<'a> {
    /// The process.
    pub pid: u32,
    /// The thread's name.
    pub comm: &'a str,
    timestamp: &'a [u8],
    fd: &'a [u8],
}

impl Socket<'_> {
    /// When the kernel saw it, in nanoseconds of `CLOCK_MONOTONIC`, if the line says.
    #[must_use]
    pub fn kernel_ns(&self) -> Option<u64> {
        let text = str::from_utf8(self.timestamp).ok()?;
        text.parse().ok().filter(|ns| *ns > 0)
    }

    /// The file descriptor; the probe writes 0 if it does not know it.
    #[must_use]
    pub fn fd(&self) -> Option<u32> {
        let fd = digits(self.fd).and_then(|fd| u32::try_from(fd).ok());
        fd.filter(|fd| *fd > 0)
    }
}

/// Which connections are of interest, of those that sockets are seen to make. What the node tracked is in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// Those that were accepted.
    Servers,
    /// Those that were made, too: each connection between two processes of a node is then seen at both ends.
    Both,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where the field begins, in bytes from 0; 0 as well for the whole line.
    pub offset: usize,
    /// The field's name; `.` for the whole line.
    pub field: &'static str,
    /// What is wrong with it.
    pub message: String,
}

/// Parses lines.
#[derive(Debug)]
pub struct Parser {
    ends: Ends,
    mark: Finder<'static>,
    level: FinderRev<'static>,
    /// The last second that was read, as text and since the epoch: most lines of a log have that of the line before.
    known: Option<([u8; SECONDS_LENGTH], u64)>,
}

impl Parser {
    /// A parser for connections that are seen at these ends.
    #[must_use]
    pub fn new(ends: Ends) -> Self {
        Self {
            ends,
            mark: Finder::new(MARK),
            level: FinderRev::new(LEVEL),
            known: None,
        }
    }

    /// The connection that a line tells of; `None` for lines that tell of none that came about.
    ///
    /// # Errors
    /// If the line is about a connection and malformed.
    pub fn parse<'a>(&mut self, line: &'a [u8]) -> Result<Option<Connection<'a>>, Problem> {
        let Some(mark) = self.mark.find(line) else {
            return Ok(None);
        };
        self.parse_marked(line, mark)
    }

    /// As [`parse`](Self::parse), of a line that no line feed ends: it may have been cut before the mark.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), and if the line is the probe's and has no mark.
    pub fn parse_unended<'a>(&mut self, line: &'a [u8]) -> Result<Option<Connection<'a>>, Problem> {
        match self.mark.find(line) {
            Some(mark) => self.parse_marked(line, mark),
            None if memmem::find(line, PROBE).is_some() => Err(Problem {
                offset: 0,
                field: ".",
                message: "the log ends within the line".to_owned(),
            }),
            None => Ok(None),
        }
    }

    fn parse_marked<'a>(
        &mut self,
        line: &'a [u8],
        mark: usize,
    ) -> Result<Option<Connection<'a>>, Problem> {
        let body = mark + MARK.len();
        let whole = |message: &str| Problem {
            offset: 0,
            field: ".",
            message: message.to_owned(),
        };
        let text = line.trim_ascii_end();
        if text.last() != Some(&b'}') {
            return Err(whole("the line ends before the record does"));
        }
        let fields = |kind: &[u8]| {
            text[body..]
                .starts_with(kind)
                .then(|| Fields::new(line, body + kind.len(), text.len() - 1))
        };
        if let Some(fields) = fields(b"eBPF] {") {
            let fields = fields?;
            match fields.event()? {
                Event::Accept => {
                    let time = self.time(line, mark)?;
                    fields.accepted(time).map(Some)
                }
                Event::Connect if self.ends == Ends::Both => {
                    let time = self.time(line, mark)?;
                    fields.connected(time).map(Some)
                }
                Event::Connect | Event::Other => Ok(None),
            }
        } else if let Some(fields) = fields(b"conntrack] {") {
            let fields = fields?;
            if !fields.is_established() {
                return Ok(None);
            }
            let time = self.time(line, mark)?;
            fields.tracked(time).map(Some)
        } else {
            Err(whole(
                "neither `[eBPF] {` nor `[conntrack] {` after `[CONN]`",
            ))
        }
    }

    /// The time that stands before `end`.
    fn time(&mut self, line: &[u8], end: usize) -> Result<Timestamp, Problem> {
        let text = &line[..end];
        let start = self.level.rfind(text).map_or(0, |at| at + LEVEL.len());
        let text = &text[start..];
        let read = |known: &mut Option<_>| {
            let (text, fraction) = text.split_first_chunk::<SECONDS_LENGTH>()?;
            let seconds = match known {
                Some((same, seconds)) if same == text => *seconds,
                _ => known.insert((*text, seconds_of(text)?)).1,
            };
            let nanos = nanos_of(fraction)?;
            Some(Timestamp::from_nanos(seconds * 1_000_000_000 + nanos))
        };
        read(&mut self.known).ok_or_else(|| Problem {
            offset: start,
            field: "time",
            message: format!(
                "`{}` is not YYYY/MM/DD hh:mm:ss with a fraction",
                String::from_utf8_lossy(text)
            ),
        })
    }
}

fn seconds_of(text: &[u8; SECONDS_LENGTH]) -> Option<u64> {
    let part = |from: usize, to: usize| digits(&text[from..to]);
    let separators = [4, 7, 10, 13, 16].map(|at| text[at]);
    if separators != *b"// ::" {
        return None;
    }
    let time = DateTime::new(
        i16::try_from(part(0, 4)?).ok()?,
        i8::try_from(part(5, 7)?).ok()?,
        i8::try_from(part(8, 10)?).ok()?,
        i8::try_from(part(11, 13)?).ok()?,
        i8::try_from(part(14, 16)?).ok()?,
        i8::try_from(part(17, 19)?).ok()?,
        0,
    );
    let time = time.ok()?.to_zoned(TimeZone::UTC).ok()?;
    let seconds = u64::try_from(time.timestamp().as_second()).ok()?;
    (seconds < MAX_SECONDS).then_some(seconds)
}

/// Of a fraction with its point, or of nothing.
fn nanos_of(fraction: &[u8]) -> Option<u64> {
    let Some((point, fraction)) = fraction.split_first() else {
        return Some(0);
    };
    let missing = 9_u32.checked_sub(u32::try_from(fraction.len()).ok()?)?;
    (*point == b'.').then_some(digits(fraction)? * 10_u64.pow(missing))
}

#[cfg(test)]
mod tests;
