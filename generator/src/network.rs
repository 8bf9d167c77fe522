//! Whose addresses are one's.

use std::net::{IpAddr, Ipv6Addr};

/// The bits of an IPv6 address that say its network: the rest one machine may choose as it likes, as often as it likes (RFC
/// 4291, section 2.5.1).
const NETWORK_BITS: u32 = 64;

/// The first address of those that one machine may have as well, so that what each address has a share of one network
/// has one share of, too: itself where it is of IPv4, also in the form of IPv6.
pub(crate) fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let host_bits = u128::MAX >> NETWORK_BITS;
            Ipv6Addr::from_bits(address.to_bits() & !host_bits).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_network_is_one_and_each_ipv4_address_another() {
        for (address, expected) in [
            ("10.0.0.1", "10.0.0.1"),
            ("::ffff:10.0.0.1", "10.0.0.1"),
            ("2001:db8:0:1:ffff::1", "2001:db8:0:1::"),
            ("2001:db8:0:2::1", "2001:db8:0:2::"),
        ] {
            let network = network(address.parse().unwrap());
            assert_eq!(network, expected.parse::<IpAddr>().unwrap(), "{address}");
        }
    }
}
