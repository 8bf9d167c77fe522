//! Which addresses a cluster has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The ranges that a cluster's addresses are from, by the cluster's number. Each has IPv4 first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ranges(pub(crate) u16);

impl Ranges {
    /// `10.244.NODE.HOST` and `fd00:10:244:NODE::HOST` for number 0. Sixteen numbers share an octet.
    pub(crate) fn pod(self, node: u8, host: u8) -> [IpAddr; 2] {
        let [octet, block] = self.octets();
        [
            Ipv4Addr::new(10, octet.wrapping_add(244), block | node, host).into(),
            Ipv6Addr::new(
                0xfd00,
                0x10,
                0x244 + self.0,
                node.into(),
                0,
                0,
                0,
                host.into(),
            )
            .into(),
        ]
    }

    /// `10.96.0.HOST` and `fd00:96::HOST` for number 0.
    pub(crate) fn service(self, host: u8) -> [IpAddr; 2] {
        let [octet, block] = self.octets();
        [
            Ipv4Addr::new(10, octet + 96, block, host).into(),
            Ipv6Addr::new(0xfd00, 0x96, self.0, 0, 0, 0, 0, host.into()).into(),
        ]
    }

    /// `172.16.0.HOST` and `fd00:50::HOST` for number 0: the network between the nodes.
    pub(crate) fn fabric(self, host: u8) -> [IpAddr; 2] {
        let [high, low] = (self.0 & 1023).to_be_bytes();
        [
            Ipv4Addr::new(172, 16 + high, low, host).into(),
            Ipv6Addr::new(0xfd00, 0x50, self.0, 0, 0, 0, 0, host.into()).into(),
        ]
    }

    /// At most 63, and a multiple of 16.
    fn octets(self) -> [u8; 2] {
        let number = self.0 & 1023;
        [(number >> 4) as u8, (number << 4) as u8]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_clusters_share_an_address() {
        let mut seen = BTreeSet::new();
        for number in 0..1024 {
            let ranges = Ranges(number);
            for node in 0..16 {
                for host in [0, 255] {
                    assert!(
                        ranges
                            .pod(node, host)
                            .into_iter()
                            .all(|address| seen.insert(address))
                    );
                }
            }
            for host in [0, 255] {
                let others = [ranges.service(host), ranges.fabric(host)].concat();
                assert!(others.into_iter().all(|address| seen.insert(address)));
            }
        }
    }

    #[test]
    fn number_zero_has_the_usual_ranges() {
        let text = |[v4, v6]: [IpAddr; 2]| format!("{v4} {v6}");
        assert_eq!(text(Ranges(0).pod(1, 10)), "10.244.1.10 fd00:10:244:1::a");
        assert_eq!(text(Ranges(0).service(10)), "10.96.0.10 fd00:96::a");
        assert_eq!(text(Ranges(0).fabric(11)), "172.16.0.11 fd00:50::b");
    }
}
