//! The kernel's tables of sockets: `/proc/net/tcp` and `/proc/net/tcp6` (`get_tcp4_sock` in `net/ipv4/tcp_ipv4.c`, `get_tcp6_sock`
//! in `net/ipv6/tcp_ipv6.c`), and those of SCTP ([`sctp`]).

mod sctp;

use std::io::{self, BufRead, Read as _};

use agent_common::address::Address;

/// No line is longer: those of TCP over IPv6 have some 180 bytes, and an SCTP socket's has each address of both hosts.
const LONGEST_LINE: u64 = 4096;

/// A table: its file in `/proc/PID/net`, and what is made of a line of it.
pub(super) struct Table {
    pub(super) file: &'static str,
    /// Whether a kernel may do without it.
    pub(super) is_optional: bool,
    parse: fn(&[u8]) -> Option<Row>,
}

/// Those of TCP; a kernel without IPv6 lacks the second.
pub(super) const TCP: [Table; 2] = [
    Table {
        file: "tcp",
        is_optional: false,
        parse,
    },
    Table {
        file: "tcp6",
        is_optional: true,
        parse,
    },
];

/// Those of SCTP.
pub(super) const SCTP: [Table; 2] = [
    Table {
        file: "sctp/eps",
        is_optional: false,
        parse: sctp::socket,
    },
    Table {
        file: "sctp/assocs",
        is_optional: false,
        parse: sctp::association,
    },
];

/// A socket in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// The address of its own end.
    pub(super) local: Address,
    /// The port of its own end, in host byte order.
    pub(super) local_port: u16,
    /// The address of the other end.
    pub(super) remote: Address,
    /// The port of the other end, in host byte order.
    pub(super) remote_port: u16,
    /// As in `include/net/tcp_states.h`.
    pub(super) state: i32,
    /// Its inode number; 0 if no process has it open.
    pub(super) inode: u64,
}

impl Table {
    /// Reads it from its first line, a heading, to its end, and returns how many lines are not understood.
    ///
    /// # Errors
    /// If it cannot be read on.
    pub(super) fn read(
        &self,
        mut from: impl BufRead,
        mut each: impl FnMut(Row),
    ) -> io::Result<u64> {
        let mut unread = 0;
        let mut line = Vec::new();
        let mut is_heading = true;
        loop {
            line.clear();
            if from
                .by_ref()
                .take(LONGEST_LINE)
                .read_until(b'\n', &mut line)?
                == 0
            {
                return Ok(unread);
            }
            match (self.parse)(&line) {
                _ if is_heading => is_heading = false,
                Some(row) => each(row),
                None => unread += 1,
            }
        }
    }
}

/// `sl: local:port remote:port state tx:rx timer:when retransmits uid timeout inode …`; numbers are hexadecimal up to the
/// time.
fn parse(line: &[u8]) -> Option<Row> {
    let mut fields = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (local, local_port) = end(fields.nth(1)?)?;
    let (remote, remote_port) = end(fields.next()?)?;
    let state = fields.next().filter(|state| state.len() == 2)?;
    let state = i32::from_str_radix(state, 16).ok()?;
    let inode = fields.nth(5)?.parse().ok()?;
    Some(Row {
        local,
        local_port,
        remote,
        remote_port,
        state,
        inode,
    })
}

/// An address is printed as numbers of 32 bits, which the kernel reads from memory as they are: each is its four bytes in
/// network byte order as a number in the byte order of this machine.
fn end(text: &str) -> Option<(Address, u16)> {
    let (address, port) = text.split_once(':')?;
    let port = (port.len() == 4).then(|| u16::from_str_radix(port, 16).ok())??;
    let word = |index: usize| -> Option<u32> {
        let digits = address.get(8 * index..8 * index + 8)?;
        // `from_str_radix` takes a sign.
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        u32::from_str_radix(digits, 16).ok()
    };
    let address = match address.len() {
        8 => Address::from_v4(word(0)?),
        32 => Address::from_quarters([word(0)?, word(1)?, word(2)?, word(3)?]),
        _ => return None,
    };
    Some((address, port))
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use proptest::prelude::*;

    use super::*;

    const HEADING: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    fn rows(text: &[u8]) -> (Vec<Row>, u64) {
        let mut rows = Vec::new();
        let unread = TCP[0].read(text, |row| rows.push(row)).unwrap();
        (rows, unread)
    }

    /// Lines of a little-endian machine.
    #[cfg(target_endian = "little")]
    #[test]
    fn lines_of_real_tables() {
        let text = format!(
            "{HEADING}   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 22021 1 ffff8a1c 100 0 0 10 0\n   \
             1: 0B00F40A:A1B2 0C00F40A:01BB 01 00000000:00000000 02:000A7214 00000000  1000        0 31337 2 ffff8a1d 20 4 30 10 -1\n"
        );
        let mapped = |text: &str| Address::from(text.parse::<Ipv6Addr>().unwrap());
        let (found, unread) = rows(text.as_bytes());
        assert_eq!(unread, 0);
        assert_eq!(
            found,
            [
                Row {
                    local: mapped("::ffff:127.0.0.1"),
                    local_port: 8080,
                    remote: mapped("::ffff:0.0.0.0"),
                    remote_port: 0,
                    state: 10,
                    inode: 22021
                },
                Row {
                    local: mapped("::ffff:10.244.0.11"),
                    local_port: 0xa1b2,
                    remote: mapped("::ffff:10.244.0.12"),
                    remote_port: 443,
                    state: 1,
                    inode: 31337
                }
            ]
        );
        let text = format!(
            "{HEADING}   0: B80D0120000000000000000001000000:1F90 0000000000000000FFFF00000C00F40A:C350 08 00000000:00000001 00:00000000 00000000     0        0 0 1 x\n"
        );
        let (found, unread) = rows(text.as_bytes());
        assert_eq!(unread, 0);
        assert_eq!(found[0].local, mapped("2001:db8::1"));
        assert_eq!(found[0].remote, mapped("::ffff:10.244.0.12"));
        assert_eq!((found[0].state, found[0].inode), (8, 0));
    }

    /// As the kernel's `seq_printf` writes it.
    fn written(row: &Row, short: bool) -> String {
        let words = |address: &Address| -> String {
            let from = if short { 12 } else { 0 };
            Ipv6Addr::from(*address).octets()[from..]
                .chunks_exact(4)
                .map(|four| format!("{:08X}", u32::from_ne_bytes(four.try_into().unwrap())))
                .collect()
        };
        format!(
            "{:4}: {}:{:04X} {}:{:04X} {:02X} {:08X}:{:08X} {:02X}:{:08X} {:08X} {:5} {:8} {} 1 0000000000000000 20 4 30 10 -1\n",
            7,
            words(&row.local),
            row.local_port,
            words(&row.remote),
            row.remote_port,
            row.state,
            1,
            2,
            0,
            0,
            0,
            1000,
            0,
            row.inode
        )
    }

    fn any_row() -> impl Strategy<Value = (Row, bool)> {
        let address = |short: bool| {
            any::<[u8; 16]>().prop_map(move |bytes| match short {
                true => {
                    Address::from_v4(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
                }
                false => Address::from_bytes(bytes),
            })
        };
        any::<bool>().prop_flat_map(move |short| {
            (
                address(short),
                any::<u16>(),
                address(short),
                any::<u16>(),
                1..13_i32,
                any::<u64>(),
            )
                .prop_map(
                    move |(local, local_port, remote, remote_port, state, inode)| {
                        let row = Row {
                            local,
                            local_port,
                            remote,
                            remote_port,
                            state,
                            inode,
                        };
                        (row, short)
                    },
                )
        })
    }

    proptest! {
        #[test]
        fn what_the_kernel_writes_is_read(rows_written in proptest::collection::vec(any_row(), 0..40)) {
            let mut text = HEADING.to_owned();
            for (row, short) in &rows_written {
                text += &written(row, *short);
            }
            let (found, unread) = rows(text.as_bytes());
            prop_assert_eq!(unread, 0);
            prop_assert_eq!(found, rows_written.iter().map(|(row, _)| *row).collect::<Vec<_>>());
        }

        /// Each line is a row or is counted, whatever the bytes.
        #[test]
        fn no_bytes_are_too_strange(
            (row, short) in any_row(),
            mut changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            cut in any::<prop::sample::Index>(),
            noise in proptest::collection::vec(any::<u8>(), 0..9000),
        ) {
            let mut text = written(&row, short).into_bytes();
            for (index, byte) in changes.drain(..) {
                let at = index.index(text.len());
                text[at] = byte;
            }
            text.truncate(cut.index(text.len() + 1));
            let text = [HEADING.as_bytes(), &text, &noise].concat();
            let (found, unread) = rows(&text);
            let ends = text.iter().filter(|byte| **byte == b'\n').count() as u64;
            let lines = found.len() as u64 + unread + 1;
            // A line that is too long is taken for several.
            prop_assert!(lines >= ends && lines <= ends + 1 + text.len() as u64 / LONGEST_LINE);
        }
    }
}
