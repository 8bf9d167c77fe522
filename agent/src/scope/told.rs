//! What a line tells, and when that was.
//!
//! A line has two times. The kernel's, in `CLOCK_MONOTONIC`, is the one by which the kernel programs count too, so between a
//! line and a count of one boot there is no difference of clocks. The other is when the line was written, by the clock of who
//! wrote it. It tells boots apart; and it is all there is of what the node tracked. Where the machine has slept since, it is
//! also what dates a line that was found in the log: the kernel's clock stands still meanwhile, so what it stamped lies that much
//! further back.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use flow::{
    record::Direction,
    scope_log::{Connection, Seen},
    time::Timestamp,
};

use super::account::{Key, When};
use crate::{args::NodeName, capture::Clock};

/// How far the kernel's times of a connect may lie apart: both programs take theirs in the same change of the socket's state.
/// The smaller, the rarer is it taken for another of its flow, one of which was made while nobody counted.
pub(super) const SAME_EVENT_NS: u64 = 100_000_000;

/// How long after the handshake, which the kernel programs count, a process may accept what the probe sees then. As much
/// earlier if need be: where lines come in another order, an older one may find only newer counts.
pub(super) const BACKLOG_NS: u64 = 60_000_000_000;

/// How far the log's clock may be from ours where it is all there is.
const CLOCKS_NS: u64 = 120_000_000_000;

/// A line whose time is earlier than this before the boot is of an earlier boot, if nothing else speaks for this one.
const BOOT_NS: u64 = 900_000_000_000;

/// The longest name of a thread (`TASK_COMM_LEN` in the kernel, less its end).
const MAX_COMM: usize = 15;

/// The longest name of a host (`HOST_NAME_MAX` is less).
const MAX_HOST: usize = 253;

/// What a line tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// A process made or accepted a connection.
    Socket(Socket),
    /// The node tracked one.
    Tracked(Tracked),
}

/// A connection as its socket has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Socket {
    /// With the client's port.
    pub(super) key: Key,
    pub(super) process: Process,
    pub(super) at: Moment,
}

/// A connection as the node tracked it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tracked {
    pub(super) client: SocketAddr,
    pub(super) called: SocketAddr,
    pub(super) server: SocketAddr,
    /// The client as the server sees it.
    pub(super) masked: SocketAddr,
    pub(super) at: Moment,
}

/// The process that the probe saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// The thread's name.
    pub comm: String,
    /// The socket's file descriptor, if known.
    pub fd: Option<u32>,
}

/// When something was, and on which host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    /// The host's name, if it can be one.
    pub(super) host: Option<Arc<str>>,
    /// By our clock if it was since the boot, and as far as a clock that stands still in sleep can tell; else by the log's.
    pub(super) time: Timestamp,
    pub(super) boot: Boot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Boot {
    This(When),
    /// With the kernel's time, if known.
    Earlier(Option<u64>),
}

/// Reads what lines tell.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// The line before's: most are of one host.
    hostname: String,
    host: Option<Arc<str>>,
}

impl Reader {
    /// `is_live` if the line was written since the log was last looked at.
    pub(super) fn read(
        &mut self,
        connection: &Connection<'_>,
        clock: &Clock,
        is_live: bool,
    ) -> Told {
        let Connection { client, server, .. } = *connection;
        let (direction, socket) = match connection.seen {
            Seen::Connected(socket) => (Direction::Egress, socket),
            Seen::Accepted(socket) => (Direction::Ingress, socket),
            Seen::Tracked { called, masked } => {
                return Told::Tracked(Tracked {
                    client,
                    called,
                    server,
                    masked,
                    at: self.moment(connection, None, clock, is_live),
                });
            }
        };
        let (local, remote) = match direction {
            Direction::Egress => (client.ip(), server.ip()),
            Direction::Ingress => (server.ip(), client.ip()),
        };
        let kernel = socket.kernel_ns().map(|ns| (ns, direction));
        Told::Socket(Socket {
            key: Key {
                direction,
                local,
                remote,
                port: server.port(),
                client_port: client.port(),
            },
            process: Process {
                pid: socket.pid,
                comm: cut(socket.comm, MAX_COMM).to_owned(),
                fd: socket.fd(),
            },
            at: self.moment(connection, kernel, clock, is_live),
        })
    }

    fn moment(
        &mut self,
        connection: &Connection<'_>,
        kernel: Option<(u64, Direction)>,
        clock: &Clock,
        is_live: bool,
    ) -> Moment {
        let hostname = cut(connection.hostname, MAX_HOST);
        if self.hostname != hostname {
            hostname.clone_into(&mut self.hostname);
            let is_name = hostname.parse::<NodeName>().is_ok();
            self.host = is_name.then(|| hostname.into());
        }
        let boot = boot(connection.time, kernel, clock, is_live);
        Moment {
            host: self.host.clone(),
            time: match boot {
                Boot::This(when) if is_live => clock.at(when.ns),
                Boot::This(when) => dated(connection.time, when.ns, clock),
                Boot::Earlier(_) => connection.time,
            },
            boot,
        }
    }
}

/// The time of day at which the kernel's clock showed `ns`: the written one, between the times at which all sleep since the boot
/// had come before and at which it was still to come. Without sleep these are the same, whatever the log's clock says.
fn dated(written: Timestamp, ns: u64, clock: &Clock) -> Timestamp {
    let latest = clock.at(ns);
    let earliest = latest.saturating_sub(Duration::from_nanos(clock.slept_ns()));
    written.clamp(earliest, latest)
}

fn boot(
    written: Timestamp,
    kernel: Option<(u64, Direction)>,
    clock: &Clock,
    is_live: bool,
) -> Boot {
    let (now_ns, now) = (clock.monotonic_ns(), clock.now().as_nanos());
    let booted = clock.booted().as_nanos();
    if !is_live && written.as_nanos() < booted.saturating_sub(BOOT_NS) {
        return Boot::Earlier(kernel.map(|(ns, _)| ns));
    }
    Boot::This(match kernel {
        Some((ns, direction)) if ns <= now_ns.saturating_add(SAME_EVENT_NS) => When {
            ns,
            early_ns: near_ns(direction),
            late_ns: near_ns(direction),
            is_delayed: direction == Direction::Ingress,
        },
        // A clock that runs for longer than this boot is an earlier boot's.
        Some((ns, _)) if !is_live => return Boot::Earlier(Some(ns)),
        _ => {
            let age = now.saturating_sub(written.as_nanos());
            let is_near = age < CLOCKS_NS && written.as_nanos() < now.saturating_add(CLOCKS_NS);
            When {
                // What was written just now was not long ago, whatever clock its writer has.
                ns: if is_live && !is_near {
                    now_ns
                } else {
                    now_ns.saturating_sub(age)
                },
                early_ns: CLOCKS_NS,
                late_ns: CLOCKS_NS,
                is_delayed: false,
            }
        }
    })
}

fn near_ns(direction: Direction) -> u64 {
    match direction {
        Direction::Egress => SAME_EVENT_NS,
        Direction::Ingress => BACKLOG_NS,
    }
}

/// At most so many bytes of a text.
fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}

#[cfg(test)]
mod tests {
    use flow::scope_log::{Ends, Parser};

    use super::*;

    const SECOND: u64 = 1_000_000_000;
    /// 2022-08-18 03:24:11.
    const NOON: u64 = 1_660_793_051 * SECOND;

    /// A clock that has run for 1,000 seconds when it is `now` seconds after the line was written.
    fn clock(now: i64) -> Clock {
        let nanos = NOON.saturating_add_signed(now * 1_000_000_000);
        Clock::new(1_000 * SECOND, Timestamp::from_nanos(nanos))
    }

    fn told(record: &str, now: i64, is_live: bool) -> Told {
        told_at(record, &clock(now), is_live)
    }

    fn told_at(record: &str, clock: &Clock, is_live: bool) -> Told {
        let line = format!("<probe> INFO: 2022/08/18 03:24:11.0 [CONN] {record}");
        let mut parser = Parser::new(Ends::Both);
        let connection = parser.parse(line.as_bytes()).unwrap().unwrap();
        Reader::default().read(&connection, clock, is_live)
    }

    fn boot_of(record: &str, now: i64, is_live: bool) -> Boot {
        match told(record, now, is_live) {
            Told::Socket(socket) => socket.at.boot,
            Told::Tracked(tracked) => tracked.at.boot,
        }
    }

    fn connect(kernel_s: u64) -> String {
        let ns = kernel_s * SECOND;
        format!("[eBPF] {{node-1|{ns}|0|Connect|7|app|10.0.0.1|10.0.0.2|4000|80|0|0}}")
    }

    #[test]
    fn the_kernel_s_time_counts_whatever_the_log_s_clock_says() {
        // Seconds late, minutes late, and of a clock that is minutes ahead or hours behind.
        for (now, is_live) in [(1, true), (300, false), (-300, false), (90_000, true)] {
            let Boot::This(when) = boot_of(&connect(990), now, is_live) else {
                panic!("{now}");
            };
            assert_eq!((when.ns, when.late_ns), (990 * SECOND, SAME_EVENT_NS));
        }
    }

    #[test]
    fn lines_of_an_earlier_boot_are_told_from_this_one_s() {
        let earlier = Boot::Earlier(Some(990 * SECOND));
        assert_eq!(boot_of(&connect(990), 5_000, false), earlier);
        let longer = Boot::Earlier(Some(2_000 * SECOND));
        assert_eq!(boot_of(&connect(2_000), 10, false), longer);
    }

    #[test]
    fn lines_from_before_a_sleep_are_dated_when_they_were_written() {
        const HOUR: i64 = 3_600;
        // What the kernel stamped ten seconds before its clock's now, or did not stamp, read so many seconds after it was
        // written, on a machine that has slept so long: how long after it was written it is dated.
        for (kernel_s, now, slept, is_live, wanted) in [
            (990, HOUR + 10, HOUR, false, 0),
            (0, HOUR + 10, HOUR, false, 0),
            // No earlier than the boot.
            (0, HOUR + 1_010, HOUR, false, 10),
            // The sleep came before.
            (990, 10, HOUR, false, 0),
            // The log's clock is behind, and ahead.
            (990, HOUR + 500, HOUR, false, 490),
            (990, -300, HOUR, false, -310),
            (990, 300, 0, false, 290),
            // It was written just now.
            (990, HOUR, HOUR, true, HOUR - 10),
        ] {
            let clock = clock(now).after_sleep(slept.unsigned_abs() * SECOND);
            let Told::Socket(socket) = told_at(&connect(kernel_s), &clock, is_live) else {
                panic!("no socket");
            };
            let Boot::This(when) = socket.at.boot else {
                panic!("another boot: {kernel_s} {now}");
            };
            if kernel_s > 0 {
                assert_eq!(when.ns, kernel_s * SECOND);
            }
            let dated = NOON.saturating_add_signed(wanted * 1_000_000_000);
            assert_eq!(socket.at.time, Timestamp::from_nanos(dated), "{now}");
        }
        // Before the boot, which is an hour and 1,000 seconds ago.
        let clock = clock(3 * HOUR).after_sleep(3_600 * SECOND);
        let Told::Socket(socket) = told_at(&connect(990), &clock, false) else {
            panic!("no socket");
        };
        assert_eq!(socket.at.boot, Boot::Earlier(Some(990 * SECOND)));
    }

    #[test]
    fn what_has_no_kernel_time_is_where_its_line_was_written() {
        let tracked = "[conntrack] {n|NEW|ESTABLISHED|10.0.0.1|4000|10.96.0.1|80|10.0.0.2|8080|10.0.0.1|4000|7}";
        for (now, is_live, wanted) in [
            (10, false, 990),
            (10, true, 990),
            (-10, false, 1_000),
            (500, false, 500),
            (5_000, true, 1_000),
        ] {
            let Boot::This(when) = boot_of(tracked, now, is_live) else {
                panic!("{now}");
            };
            assert_eq!((when.ns, when.late_ns), (wanted * SECOND, CLOCKS_NS));
        }
        let unknown = connect(0);
        assert!(
            matches!(boot_of(&unknown, 10, false), Boot::This(when) if when.ns == 990 * SECOND)
        );
    }

    #[test]
    fn names_are_cut_to_what_there_can_be() {
        let long = connect(990).replace("|app|", &format!("|{}|", "é".repeat(99)));
        let Told::Socket(socket) = told(&long, 1, true) else {
            panic!("no socket");
        };
        assert_eq!(socket.process.comm, "é".repeat(7));
        assert_eq!(socket.at.host.as_deref(), Some("node-1"));
    }
}
