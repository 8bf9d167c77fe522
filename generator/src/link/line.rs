//! Lines of the probe's log.
//!
//! ```text
//! <probe> INFO: DATE TIME.micros [CONN] [eBPF] {hostname|timestamp|CPU|event|pid|comm|Src|Dst|SrcPort|DstPort|NetNS|Fd}
//! <probe> INFO: DATE TIME.micros [CONN] [conntrack] {hostname|MsgType|TCPState|Src|SrcPort|Dst|DstPort|Src|SrcPort|Dst|DstPort|CtID}
//! ```
//!
//! The time is in UTC. `Src` of the first kind is the local end of the socket: of an accepted connection, the server. The
//! second kind has the connection as the client sees it, then as the answers come back: from the server itself, whatever
//! virtual address the client called.

use std::{
    net::{IpAddr, SocketAddr},
    str,
};

use flow::time::Timestamp;
use jiff::{civil::DateTime, tz::TimeZone};
use memchr::{
    memchr,
    memmem::{self, Finder, FinderRev},
};

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
pub(super) struct Connection<'a> {
    pub(super) time: Timestamp,
    /// The node whose probe saw it.
    pub(super) hostname: &'a str,
    pub(super) client: SocketAddr,
    /// The server itself, behind any translation.
    pub(super) server: SocketAddr,
    pub(super) seen: Seen<'a>,
}

/// How a connection was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen<'a> {
    /// A process accepted it.
    Accepted { pid: u32, comm: &'a str },
    /// The node translated or only tracked it; the address that the client called.
    Tracked { called: SocketAddr },
}

/// What is wrong with a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Problem {
    /// Where the field begins, in bytes from 0; 0 as well for the whole line.
    pub(super) offset: usize,
    /// The field's name; `.` for the whole line.
    pub(super) field: &'static str,
    pub(super) message: String,
}

/// Parses lines.
#[derive(Debug)]
pub(super) struct Parser {
    mark: Finder<'static>,
    level: FinderRev<'static>,
    /// Most lines of a log have the second of the line before.
    text: [u8; SECONDS_LENGTH],
    seconds: u64,
}

impl Parser {
    pub(super) fn new() -> Self {
        Self {
            mark: Finder::new(MARK),
            level: FinderRev::new(LEVEL),
            text: [0; SECONDS_LENGTH],
            seconds: 0,
        }
    }

    /// The connection that a line tells of; `None` for lines that tell of none that came about.
    pub(super) fn parse<'a>(&mut self, line: &'a [u8]) -> Result<Option<Connection<'a>>, Problem> {
        let Some(mark) = self.mark.find(line) else {
            return Ok(None);
        };
        self.parse_marked(line, mark)
    }

    /// As [`parse`](Self::parse), of a line that no line feed ends: it may have been cut before the mark.
    pub(super) fn parse_unended<'a>(
        &mut self,
        line: &'a [u8],
    ) -> Result<Option<Connection<'a>>, Problem> {
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
            if !fields.is_accept()? {
                return Ok(None);
            }
            let time = self.time(line, mark)?;
            fields.accepted(time).map(Some)
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
        let read = |text: &[u8], known: &mut Self| {
            let (seconds, fraction) = text.split_at_checked(SECONDS_LENGTH)?;
            if seconds != known.text {
                known.seconds = seconds_of(seconds)?;
                known.text.copy_from_slice(seconds);
            }
            let nanos = nanos_of(fraction)?;
            Some(Timestamp::from_nanos(known.seconds * 1_000_000_000 + nanos))
        };
        read(text, self).ok_or_else(|| Problem {
            offset: start,
            field: "time",
            message: format!(
                "`{}` is not YYYY/MM/DD hh:mm:ss with a fraction",
                String::from_utf8_lossy(text)
            ),
        })
    }
}

/// The text between the braces, in parts.
struct Fields<'a> {
    line: &'a [u8],
    /// Begin and end of each. The sixth of an eBPF record, the name of a thread, may hold anything.
    parts: [(usize, usize); FIELDS],
}

/// Both kinds have as many.
const FIELDS: usize = 12;
const COMM: usize = 5;

impl<'a> Fields<'a> {
    fn new(line: &'a [u8], start: usize, end: usize) -> Result<Self, Problem> {
        let mut parts = [(0, 0); FIELDS];
        let missing = || Problem {
            offset: 0,
            field: ".",
            message: format!("less than {FIELDS} fields"),
        };
        let mut from = start;
        for part in &mut parts[..COMM] {
            let length = memchr(b'|', &line[from..end]).ok_or_else(missing)?;
            *part = (from, from + length);
            from += length + 1;
        }
        let mut to = end;
        for part in parts[COMM + 1..].iter_mut().rev() {
            let bar = line[from..to].iter().rposition(|byte| *byte == b'|');
            let bar = from + bar.ok_or_else(missing)?;
            *part = (bar + 1, to);
            to = bar;
        }
        parts[COMM] = (from, to);
        Ok(Self { line, parts })
    }

    fn bytes(&self, field: usize) -> &'a [u8] {
        let (from, to) = self.parts[field];
        &self.line[from..to]
    }

    fn wrong(&self, field: usize, name: &'static str, expected: &str) -> Problem {
        let value = String::from_utf8_lossy(self.bytes(field));
        Problem {
            offset: self.parts[field].0,
            field: name,
            message: format!("`{value}` is not {expected}"),
        }
    }

    fn text(&self, field: usize, name: &'static str) -> Result<&'a str, Problem> {
        str::from_utf8(self.bytes(field))
            .ok()
            .ok_or_else(|| self.wrong(field, name, "UTF-8"))
    }

    fn is_accept(&self) -> Result<bool, Problem> {
        match self.bytes(3) {
            b"Accept" => Ok(true),
            b"Connect" | b"Close" | b"FdInstall" => Ok(false),
            _ => Err(self.wrong(3, "event", "Accept, Connect or Close")),
        }
    }

    /// Each connection is told of once in this state, or once at the probe's start. A message of its end says nothing
    /// about how it began.
    fn is_established(&self) -> bool {
        self.bytes(2) == b"ESTABLISHED" && self.bytes(1) != b"DESTROY"
    }

    fn accepted(&self, time: Timestamp) -> Result<Connection<'a>, Problem> {
        let server = self.end((6, "Src"), (8, "SrcPort"))?;
        let client = self.end((7, "Dst"), (9, "DstPort"))?;
        if server.port() == 0 {
            return Err(self.wrong(8, "SrcPort", "the port of a server"));
        }
        let pid = self
            .number(4)
            .ok_or_else(|| self.wrong(4, "pid", "a process id"))?;
        Ok(Connection {
            time,
            hostname: self.text(0, "hostname")?,
            client,
            server,
            seen: Seen::Accepted {
                pid,
                comm: self.text(COMM, "comm")?,
            },
        })
    }

    fn tracked(&self, time: Timestamp) -> Result<Connection<'a>, Problem> {
        let client = self.end((3, "Orig.Src"), (4, "Orig.SrcPort"))?;
        let called = self.end((5, "Orig.Dst"), (6, "Orig.DstPort"))?;
        let server = self.end((7, "Reply.Src"), (8, "Reply.SrcPort"))?;
        if server.port() == 0 {
            return Err(self.wrong(8, "Reply.SrcPort", "the port of a server"));
        }
        Ok(Connection {
            time,
            hostname: self.text(0, "hostname")?,
            client,
            server,
            seen: Seen::Tracked { called },
        })
    }

    fn end(
        &self,
        (address, address_name): (usize, &'static str),
        (port, port_name): (usize, &'static str),
    ) -> Result<SocketAddr, Problem> {
        let text = self.text(address, address_name)?;
        let ip: IpAddr = text
            .parse()
            .ok()
            .ok_or_else(|| self.wrong(address, address_name, "an address"))?;
        let number = self
            .number(port)
            .and_then(|port| u16::try_from(port).ok())
            .ok_or_else(|| self.wrong(port, port_name, "a port"))?;
        Ok(SocketAddr::new(ip.to_canonical(), number))
    }

    fn number(&self, field: usize) -> Option<u32> {
        digits(self.bytes(field)).and_then(|number| u32::try_from(number).ok())
    }
}

fn seconds_of(text: &[u8]) -> Option<u64> {
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

/// At most ten, at least one.
fn digits(text: &[u8]) -> Option<u64> {
    if !(1..=10).contains(&text.len()) {
        return None;
    }
    text.iter().try_fold(0, |number, byte| {
        byte.is_ascii_digit()
            .then(|| number * 10 + u64::from(byte - b'0'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCEPT: &str = "<probe> INFO: 2022/08/18 03:24:11.696728 [CONN] [eBPF] \
                          {node-1|841375817545|2|Accept|10556|app|10.0.1.112|10.0.1.224|80|59650|0|0}";
    const TRACKED: &str = "<probe> INFO: 2022/08/18 03:24:12.5 [CONN] [conntrack] \
                           {node-1|UPDATE|ESTABLISHED|10.0.1.7|40000|10.96.0.12|80|10.0.0.9|8079|10.0.1.7|40000|77}";

    fn parse(line: &str) -> Result<Option<Connection<'_>>, Problem> {
        Parser::new().parse(line.as_bytes())
    }

    #[test]
    fn an_accepted_connection_was_opened_by_the_remote_end() {
        let expected = Connection {
            time: Timestamp::from_nanos(1_660_793_051_696_728_000),
            hostname: "node-1",
            client: "10.0.1.224:59650".parse().unwrap(),
            server: "10.0.1.112:80".parse().unwrap(),
            seen: Seen::Accepted {
                pid: 10556,
                comm: "app",
            },
        };
        assert_eq!(parse(ACCEPT), Ok(Some(expected)));
        // As `kubectl logs --prefix` prints it.
        let prefixed = format!("[pod/weave-scope-agent-nf4gv/agent] {ACCEPT}\r\n");
        assert_eq!(parse(&prefixed), Ok(Some(expected)));
    }

    #[test]
    fn a_thread_may_have_any_name() {
        for name in ["a|b", "|", "}", "x} [CONN] [", ""] {
            let line = ACCEPT.replace("|app|", &format!("|{name}|"));
            let connection = parse(&line).unwrap().unwrap();
            assert!(
                matches!(connection.seen, Seen::Accepted { comm, .. } if comm == name),
                "{connection:?}"
            );
        }
    }

    #[test]
    fn answers_tell_which_server_is_behind_a_service() {
        let expected = Connection {
            time: Timestamp::from_nanos(1_660_793_052_500_000_000),
            hostname: "node-1",
            client: "10.0.1.7:40000".parse().unwrap(),
            server: "10.0.0.9:8079".parse().unwrap(),
            seen: Seen::Tracked {
                called: "10.96.0.12:80".parse().unwrap(),
            },
        };
        assert_eq!(parse(TRACKED), Ok(Some(expected)));
    }

    #[test]
    fn lines_of_no_new_connection_are_passed_over() {
        for line in [
            "",
            "<probe> INFO: 2022/08/18 03:24:11.696356 publishing to: 10.0.0.1:4040",
            &ACCEPT.replace("Accept", "Connect"),
            &ACCEPT.replace("Accept", "Close"),
            &TRACKED.replace("ESTABLISHED", "SYN_SENT"),
            &TRACKED.replace("UPDATE", "DESTROY"),
        ] {
            assert_eq!(parse(line), Ok(None), "{line}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (line, part, replacement, field, message) in [
            (
                ACCEPT,
                "|80|",
                "|eighty|",
                "SrcPort",
                "`eighty` is not a port",
            ),
            (
                ACCEPT,
                "|80|",
                "|0|",
                "SrcPort",
                "`0` is not the port of a server",
            ),
            (
                ACCEPT,
                "|59650|",
                "|99999|",
                "DstPort",
                "`99999` is not a port",
            ),
            (ACCEPT, "|59650|", "||", "DstPort", "`` is not a port"),
            (
                ACCEPT,
                "10.0.1.112",
                "10.0.1",
                "Src",
                "`10.0.1` is not an address",
            ),
            (
                ACCEPT,
                "10.0.1.224",
                "::g",
                "Dst",
                "`::g` is not an address",
            ),
            (ACCEPT, "10556", "-1", "pid", "`-1` is not a process id"),
            (
                ACCEPT,
                "10556",
                "4294967296",
                "pid",
                "`4294967296` is not a process id",
            ),
            (
                ACCEPT,
                "Accept",
                "Excuse",
                "event",
                "`Excuse` is not Accept, Connect or Close",
            ),
            (
                ACCEPT,
                "2022/08/18",
                "2022/02/30",
                "time",
                "`2022/02/30 03:24:11.696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
            ),
            (
                ACCEPT,
                "11.696728",
                "11,696728",
                "time",
                "`2022/08/18 03:24:11,696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
            ),
            (
                ACCEPT,
                "2022",
                "2922",
                "time",
                "`2922/08/18 03:24:11.696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
            ),
            (
                ACCEPT,
                "2022",
                "1922",
                "time",
                "`1922/08/18 03:24:11.696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
            ),
            (
                ACCEPT,
                "2022",
                "22",
                "time",
                "`22/08/18 03:24:11.696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
            ),
            (ACCEPT, "|0|0}", "}", ".", "less than 12 fields"),
            (
                ACCEPT,
                "|0|0}",
                "|0|0",
                ".",
                "the line ends before the record does",
            ),
            (
                ACCEPT,
                "eBPF",
                "ebpf",
                ".",
                "neither `[eBPF] {` nor `[conntrack] {` after `[CONN]`",
            ),
            (
                TRACKED,
                "10.0.0.9",
                "nine",
                "Reply.Src",
                "`nine` is not an address",
            ),
            (
                TRACKED,
                "|80|",
                "|80x|",
                "Orig.DstPort",
                "`80x` is not a port",
            ),
            (
                TRACKED,
                "|8079|",
                "|0|",
                "Reply.SrcPort",
                "`0` is not the port of a server",
            ),
            (TRACKED, "|77}", "}", ".", "less than 12 fields"),
        ] {
            let broken = line.replacen(part, replacement, 1);
            assert_ne!(broken, line);
            let problem = parse(&broken).unwrap_err();
            assert_eq!((problem.field, problem.message.as_str()), (field, message));
            if field != "." {
                let value = message.split('`').nth(1).unwrap();
                assert!(broken[problem.offset..].starts_with(value), "{problem:?}");
            }
        }
    }

    #[test]
    fn a_line_cut_anywhere_is_refused_or_tells_of_nothing() {
        for line in [ACCEPT, TRACKED] {
            for end in 0..line.len() {
                let cut = &line[..end];
                match parse(cut) {
                    Ok(None) => assert!(!cut.contains(" [CONN] ["), "{end}"),
                    Ok(Some(connection)) => panic!("{connection:?}"),
                    Err(problem) => assert_eq!(problem.field, "."),
                }
                let at_the_end = Parser::new().parse_unended(cut.as_bytes());
                assert_eq!(at_the_end.is_err(), end >= "<probe>".len(), "{end}");
            }
        }
    }

    #[test]
    fn the_kept_second_is_not_mistaken_for_another() {
        let mut parser = Parser::new();
        let later = ACCEPT.replace("03:24:11", "03:24:12");
        let mut seconds = |line: &str| {
            let connection = parser.parse(line.as_bytes()).unwrap().unwrap();
            connection.time.as_nanos() / 1_000_000_000
        };
        let times = [ACCEPT, &later, ACCEPT, ACCEPT].map(&mut seconds);
        assert_eq!(
            times,
            [1_660_793_051, 1_660_793_052, 1_660_793_051, 1_660_793_051]
        );
        let broken = ACCEPT.replace("03:24:11", "03:61:11");
        assert!(parser.parse(broken.as_bytes()).is_err());
        assert!(parser.parse(broken.as_bytes()).is_err());
    }
}
