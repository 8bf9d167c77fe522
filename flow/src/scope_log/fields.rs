//! The fields of a record.

use std::{
    net::{IpAddr, SocketAddr},
    str,
};

use memchr::memchr;

use super::{Connection, Problem, Seen, Socket};
use crate::time::Timestamp;

/// What happened to a socket.
pub(super) enum Event {
    Accept,
    Connect,
    /// Nothing that begins a connection.
    Other,
}

/// The text between the braces, in parts.
pub(super) struct Fields<'a> {
    line: &'a [u8],
    /// Begin and end of each. The sixth of an eBPF record, the name of a thread, may hold anything.
    parts: [(usize, usize); FIELDS],
}

/// Both kinds have as many.
const FIELDS: usize = 12;
const COMM: usize = 5;

impl<'a> Fields<'a> {
    pub(super) fn new(line: &'a [u8], start: usize, end: usize) -> Result<Self, Problem> {
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

    pub(super) fn event(&self) -> Result<Event, Problem> {
        match self.bytes(3) {
            b"Accept" => Ok(Event::Accept),
            b"Connect" => Ok(Event::Connect),
            b"Close" | b"FdInstall" => Ok(Event::Other),
            _ => Err(self.wrong(3, "event", "Accept, Connect or Close")),
        }
    }

    /// Each connection is told of once in this state, or once at the probe's start. A message of its end says nothing
    /// about how it began.
    pub(super) fn is_established(&self) -> bool {
        self.bytes(2) == b"ESTABLISHED" && self.bytes(1) != b"DESTROY"
    }

    pub(super) fn accepted(&self, time: Timestamp) -> Result<Connection<'a>, Problem> {
        let server = self.end((6, "Src"), (8, "SrcPort"))?;
        let client = self.end((7, "Dst"), (9, "DstPort"))?;
        if server.port() == 0 {
            return Err(self.wrong(8, "SrcPort", "the port of a server"));
        }
        self.seen(time, client, server, Seen::Accepted)
    }

    pub(super) fn connected(&self, time: Timestamp) -> Result<Connection<'a>, Problem> {
        let client = self.end((6, "Src"), (8, "SrcPort"))?;
        let server = self.end((7, "Dst"), (9, "DstPort"))?;
        if server.port() == 0 {
            return Err(self.wrong(9, "DstPort", "the port of a server"));
        }
        self.seen(time, client, server, Seen::Connected)
    }

    fn seen(
        &self,
        time: Timestamp,
        client: SocketAddr,
        server: SocketAddr,
        seen: fn(Socket<'a>) -> Seen<'a>,
    ) -> Result<Connection<'a>, Problem> {
        let pid = self
            .number(4)
            .ok_or_else(|| self.wrong(4, "pid", "a process id"))?;
        Ok(Connection {
            time,
            hostname: self.text(0, "hostname")?,
            client,
            server,
            seen: seen(Socket {
                pid,
                comm: self.text(COMM, "comm")?,
                timestamp: self.bytes(1),
                fd: self.bytes(11),
            }),
        })
    }

    pub(super) fn tracked(&self, time: Timestamp) -> Result<Connection<'a>, Problem> {
        let client = self.end((3, "Orig.Src"), (4, "Orig.SrcPort"))?;
        let called = self.end((5, "Orig.Dst"), (6, "Orig.DstPort"))?;
        let server = self.end((7, "Reply.Src"), (8, "Reply.SrcPort"))?;
        let masked = self.end((9, "Reply.Dst"), (10, "Reply.DstPort"))?;
        if server.port() == 0 {
            return Err(self.wrong(8, "Reply.SrcPort", "the port of a server"));
        }
        Ok(Connection {
            time,
            hostname: self.text(0, "hostname")?,
            client,
            server,
            seen: Seen::Tracked { called, masked },
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

/// At most ten, at least one.
pub(super) fn digits(text: &[u8]) -> Option<u64> {
    if !(1..=10).contains(&text.len()) {
        return None;
    }
    text.iter().try_fold(0, |number, byte| {
        byte.is_ascii_digit()
            .then(|| number * 10 + u64::from(byte - b'0'))
    })
}
