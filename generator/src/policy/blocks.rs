//! External addresses, merged into blocks.
//!
//! Addresses are only merged with others that may be reached on the same ports, so a block opens no port of an address that
//! was seen on other ports only.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    num::NonZeroUsize,
};

use ipnet::IpNet;

use super::options::Blocks;

/// Merges addresses that are given with what may be reached there. Returns the block that each address is in.
pub(super) fn merge<P: Ord>(
    addresses: BTreeMap<IpAddr, P>,
    options: &Blocks,
) -> BTreeMap<IpAddr, IpNet> {
    let mut groups = BTreeMap::<(bool, P), BTreeSet<IpAddr>>::new();
    for (address, ports) in addresses {
        let group = groups.entry((address.is_ipv4(), ports)).or_default();
        group.insert(address);
    }
    let mut merged = BTreeMap::new();
    for ((is_ipv4, _), addresses) in groups {
        let max_prefix = if is_ipv4 {
            options.max_prefix4
        } else {
            options.max_prefix6
        };
        for block in cover(&addresses, max_prefix, options.group) {
            let inside = addresses.iter().filter(|address| block.contains(*address));
            merged.extend(inside.map(|address| (*address, block)));
        }
    }
    merged
}

/// Disjoint blocks that hold all addresses, which are of one version; at most `most` of them. The closest are merged first.
fn cover(addresses: &BTreeSet<IpAddr>, max_prefix: u8, most: Option<NonZeroUsize>) -> Vec<IpNet> {
    let mut blocks: Vec<IpNet> = Vec::new();
    for address in addresses {
        let block = shortened(IpNet::from(*address), max_prefix);
        if blocks.last() != Some(&block) {
            blocks.push(block);
        }
    }
    // Merging the two neighbours that have the longest prefix in common takes nothing else into their common block, and
    // leaves what it has in common with its neighbours as it was: so where to part the blocks can be told at once, and that
    // is where neighbours have the shortest prefixes in common.
    let most = most.map_or(usize::MAX, NonZeroUsize::get);
    let mut gaps: Vec<usize> = (1..blocks.len()).collect();
    gaps.sort_by_key(|gap| join(blocks[gap - 1], blocks[*gap]).prefix_len());
    gaps.truncate(most - 1);
    gaps.sort_unstable();
    let starts = [0].into_iter().chain(gaps.iter().copied());
    let ends = gaps.iter().copied().chain([blocks.len()]);
    let parts = starts
        .zip(ends)
        .filter_map(|(start, end)| blocks.get(start..end));
    parts
        .filter_map(|part| Some(join(*part.first()?, *part.last()?)))
        .collect()
}

/// The smallest block that holds both.
fn join(one: IpNet, other: IpNet) -> IpNet {
    let mut block = one;
    while !block.contains(&other) {
        match block.supernet() {
            Some(larger) => block = larger,
            None => break,
        }
    }
    block
}

fn shortened(block: IpNet, max_prefix: u8) -> IpNet {
    match IpNet::new(block.addr(), max_prefix.min(block.prefix_len())) {
        Ok(block) => block.trunc(),
        Err(_) => block,
    }
}

/// How many addresses a block holds; of all of IPv6 one less.
pub(super) fn size(block: IpNet) -> u128 {
    let free = u32::from(block.max_prefix_len() - block.prefix_len());
    1_u128.checked_shl(free).unwrap_or(u128::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(addresses: &[&str], options: Blocks, expected: &[&str]) {
        let addresses = addresses.iter().map(|text| (text.parse().unwrap(), ()));
        let merged = merge(addresses.collect(), &options);
        let blocks: BTreeSet<IpNet> = merged.values().copied().collect();
        let blocks: Vec<String> = blocks.iter().map(ToString::to_string).collect();
        assert_eq!(blocks, expected);
    }

    fn grouped(most: usize) -> Blocks {
        Blocks {
            group: NonZeroUsize::new(most),
            ..Blocks::default()
        }
    }

    #[test]
    fn nothing_is_merged_unasked() {
        let neighbours = ["192.0.2.0", "192.0.2.1", "2001:db8::1"];
        let expected = ["192.0.2.0/32", "192.0.2.1/32", "2001:db8::1/128"];
        check(&neighbours, Blocks::default(), &expected);
    }

    #[test]
    fn prefixes_are_cut_for_each_version() {
        let options = Blocks {
            max_prefix4: 24,
            max_prefix6: 64,
            group: None,
        };
        check(
            &[
                "192.0.2.1",
                "192.0.2.200",
                "192.0.3.1",
                "2001:db8::1",
                "2001:db8::2:1",
            ],
            options,
            &["192.0.2.0/24", "192.0.3.0/24", "2001:db8::/64"],
        );
    }

    #[test]
    fn the_closest_are_merged_first() {
        let addresses = ["192.0.2.0", "192.0.2.1", "192.0.2.7", "198.51.100.4"];
        check(
            &addresses,
            grouped(3),
            &["192.0.2.0/31", "192.0.2.7/32", "198.51.100.4/32"],
        );
        check(&addresses, grouped(2), &["192.0.2.0/29", "198.51.100.4/32"]);
        check(&addresses, grouped(1), &["192.0.0.0/5"]);
        check(&["::", "ffff::"], grouped(1), &["::/0"]);
    }

    #[test]
    fn other_ports_are_not_opened() {
        let addresses = [("192.0.2.0", 1), ("192.0.2.1", 2), ("192.0.2.3", 1)];
        let addresses = addresses.map(|(address, ports)| (address.parse().unwrap(), ports));
        let merged = merge(addresses.into(), &grouped(1));
        let blocks = merged.values().map(ToString::to_string);
        let expected = ["192.0.2.0/30", "192.0.2.1/32", "192.0.2.0/30"];
        assert_eq!(blocks.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_block_holds_the_addresses_of_its_free_bits() {
        let size = |block: &str| size(block.parse().unwrap());
        assert_eq!(size("192.0.2.0/32"), 1);
        assert_eq!(size("192.0.0.0/5"), 1 << 27);
        assert_eq!(size("2001:db8::/64"), 1 << 64);
        assert_eq!(size("::/0"), u128::MAX);
    }

    fn any_address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|bits| IpAddr::from(bits.to_be_bytes())),
            any::<u8>().prop_map(|last| IpAddr::from([192, 0, 2, last])),
            (0..4_u8, any::<u8>()).prop_map(|(net, last)| {
                let mut bytes = [0; 16];
                (bytes[3], bytes[15]) = (net, last);
                IpAddr::from(bytes)
            }),
        ]
    }

    proptest! {
        #[test]
        fn every_address_is_in_its_block_and_no_block_is_wider_than_asked(
            addresses in prop::collection::btree_map(any_address(), 0..3_u8, 0..30),
            max_prefix4 in 0..=32_u8,
            max_prefix6 in 0..=128_u8,
            most in prop::option::of(1..6_usize),
        ) {
            let options = Blocks { max_prefix4, max_prefix6, group: most.and_then(NonZeroUsize::new) };
            let merged = merge(addresses.clone(), &options);
            prop_assert_eq!(merged.len(), addresses.len());
            let mut groups = BTreeMap::<_, BTreeSet<IpNet>>::new();
            for (address, block) in &merged {
                prop_assert!(block.contains(address));
                prop_assert_eq!(block.trunc(), *block);
                let max = if address.is_ipv4() { max_prefix4 } else { max_prefix6 };
                prop_assert!(block.prefix_len() <= max);
                if most.is_none() {
                    prop_assert_eq!(block.prefix_len(), max);
                }
                groups.entry((address.is_ipv4(), addresses[address])).or_default().insert(*block);
            }
            for blocks in groups.values() {
                prop_assert!(blocks.len() <= most.unwrap_or(usize::MAX));
                for block in blocks {
                    let disjoint = blocks.iter().all(|other| other == block || !other.contains(block));
                    prop_assert!(disjoint);
                }
            }
        }
    }
}
