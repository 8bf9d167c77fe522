//! `/proc/net/sctp/eps` and `/proc/net/sctp/assocs` (`net/sctp/proc.c`).

use std::net::{IpAddr, Ipv6Addr};

use agent_common::{
    address::Address,
    tcp::{CLOSE, ESTABLISHED, LISTEN},
};

use super::Row;

/// `ENDPT SOCK STY SST HBKT LPORT UID INODE LADDRS`: a socket that has a port. Its state is one of TCP's. Of one that listens it
/// matters on which port, and not on which of the host's addresses.
pub(super) fn socket(line: &[u8]) -> Option<Row> {
    let mut fields = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let state: i32 = fields.nth(3)?.parse().ok()?;
    let local_port = fields.nth(1)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(Row {
        local: Address::UNSPECIFIED,
        local_port,
        remote: Address::UNSPECIFIED,
        remote_port: 0,
        state: if state == LISTEN { LISTEN } else { CLOSE },
        inode,
    })
}

/// `ASSOC SOCK STY SST ST HBKT ASSOC-ID TX_QUEUE RX_QUEUE UID INODE LPORT RPORT LADDRS <-> RADDRS HBINT …`, with a star before the
/// peer's address that is used.
pub(super) fn association(line: &[u8]) -> Option<Row> {
    /// `SCTP_STATE_ESTABLISHED` and `SCTP_STATE_SHUTDOWN_PENDING` of `include/net/sctp/constants.h`: data may still go either way.
    const OPEN: [u8; 2] = [3, 4];
    let mut fields = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let state: u8 = fields.nth(4)?.parse().ok()?;
    let inode = fields.nth(5)?.parse().ok()?;
    let local_port = fields.next()?.parse().ok()?;
    let remote_port = fields.next()?.parse().ok()?;
    let locals: Vec<IpAddr> = fields
        .by_ref()
        .take_while(|field| *field != "<->")
        .map_while(|field| address(field).map(|(address, _)| address))
        .collect();
    let remotes: Vec<(IpAddr, bool)> = fields.map_while(address).collect();
    let used = remotes.iter().find(|(_, is_used)| *is_used);
    let (remote, _) = *used.or(remotes.first())?;
    let local = *locals
        .iter()
        .find(|local| is_like(**local, remote))
        .or(locals.first())?;
    Some(Row {
        local: mapped(local),
        local_port,
        remote: mapped(remote),
        remote_port,
        state: if OPEN.contains(&state) {
            ESTABLISHED
        } else {
            CLOSE
        },
        inode,
    })
}

/// An address, and whether it is the one that is used. Numbers follow the last one.
fn address(field: &str) -> Option<(IpAddr, bool)> {
    let (address, is_used) = match field.strip_prefix('*') {
        Some(address) => (address, true),
        None => (field, false),
    };
    Some((address.parse().ok()?, is_used))
}

/// Whether one can speak from this address to that.
fn is_like(local: IpAddr, remote: IpAddr) -> bool {
    match (local, remote) {
        (IpAddr::V4(_), IpAddr::V4(_)) => true,
        (IpAddr::V6(local), IpAddr::V6(remote)) => {
            local.is_unicast_link_local() == remote.is_unicast_link_local()
        }
        _ => false,
    }
}

fn mapped(address: IpAddr) -> Address {
    let address: Ipv6Addr = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    };
    address.into()
}

#[cfg(test)]
mod tests {
    use super::{super::SCTP, *};

    const SOCKETS: &str = " ENDPT     SOCK   STY SST HBKT LPORT   UID INODE LADDRS\n";
    const ASSOCIATIONS: &str = " ASSOC     SOCK   STY SST ST HBKT ASSOC-ID TX_QUEUE RX_QUEUE UID INODE LPORT RPORT LADDRS <-> RADDRS HBINT INS OUTS MAXRT T1X T2X RTXC wmema wmemq sndbuf rcvbuf\n";

    fn row(local: &str, local_port: u16, remote: &str, remote_port: u16, open: bool) -> Row {
        let address = |text: &str| mapped(text.parse().unwrap());
        Row {
            local: address(local),
            local_port,
            remote: address(remote),
            remote_port,
            state: if open { ESTABLISHED } else { CLOSE },
            inode: 188_897,
        }
    }

    #[test]
    fn lines_of_real_tables() {
        let sockets = "       0        0 2   10  45   3868      0 22021 0.0.0.0 \n       0        0 0   1   45   40000  1000 22022 10.0.0.1 10.0.0.2 \n";
        let mut rows = Vec::new();
        let text = format!("{SOCKETS}{sockets}");
        assert_eq!(
            SCTP[0].read(text.as_bytes(), |row| rows.push(row)).unwrap(),
            0
        );
        let found: Vec<_> = rows
            .iter()
            .map(|row| (row.local, row.local_port, row.state, row.inode))
            .collect();
        assert_eq!(
            found,
            [
                (Address::UNSPECIFIED, 3868, LISTEN, 22021),
                (Address::UNSPECIFIED, 40_000, CLOSE, 22022)
            ]
        );
        let lines = [
            // Of one socket, of one that has several addresses, of one that is being made, and of IPv6.
            "   0        0 2   1   3  0      60        0      496       0 188897 12345 54321  127.0.0.1 <-> *127.0.0.2     30000 65535 65535   10    0    0        0        1        0   212992   212992\n",
            "   0        0 1   7   4  0       5        0        0       0 188897 2020   1202  fd00:0000:0000:0000:0000:0000:0000:0001 194.0.137.234 <-> 93.95.48.82 *93.95.48.90        7500     2    10   10    0    2        9        1        0   212992   212992\n",
            "   0        0 2   7   1  0       6        0        0       0 188897 2020   1202  10.0.0.1 <-> *10.0.0.2        7500     2    10   10    0    2        9        1        0   212992   212992\n",
            "   0        0 2   1   3  0       7        0        0       0 188897 3868   4000  10.0.0.1 fe80:0000:0000:0000:0000:0000:0000:0009 fd00:0000:0000:0000:0000:0000:0000:0001 <-> *fd00:0000:0000:0000:0000:0000:0000:0002 \t   30000    10    10   10    0    0        0        1        0   212992   212992\n",
        ];
        let text = format!("{ASSOCIATIONS}{}", lines.concat());
        let mut rows = Vec::new();
        assert_eq!(
            SCTP[1].read(text.as_bytes(), |row| rows.push(row)).unwrap(),
            0
        );
        assert_eq!(
            rows,
            [
                row("127.0.0.1", 12_345, "127.0.0.2", 54_321, true),
                row("194.0.137.234", 2020, "93.95.48.90", 1202, true),
                row("10.0.0.1", 2020, "10.0.0.2", 1202, false),
                row("fd00::1", 3868, "fd00::2", 4000, true),
            ]
        );
    }

    #[test]
    fn what_is_no_line_is_counted() {
        for line in [
            "\n",
            "0 0 2 1\n",
            "0 0 2 1 3 0 60 0 496 0 188897 12345 54321\n",
            "0 0 2 1 3 0 60 0 496 0 188897 12345 54321 <-> *10.0.0.1\n",
            "0 0 2 1 3 0 60 0 496 0 188897 12345 54321 10.0.0.1 <-> 30000\n",
            "0 0 2 1 3 0 60 0 496 0 188897 123456 54321 10.0.0.1 <-> *10.0.0.2\n",
        ] {
            let text = format!("{ASSOCIATIONS}{line}");
            assert_eq!(SCTP[1].read(text.as_bytes(), |_| ()).unwrap(), 1, "{line}");
        }
        let text = format!("{SOCKETS}0 0 2 10 45\n");
        assert_eq!(SCTP[0].read(text.as_bytes(), |_| ()).unwrap(), 1);
    }
}
