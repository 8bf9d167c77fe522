//! Address ranges, and whose they are.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;

/// The nodes' address ranges.
///
/// A cluster has thousands of ranges but few prefix lengths, so a lookup is one hash lookup for each length.
#[derive(Debug, Default)]
pub(super) struct Ranges<O> {
    owners: HashMap<IpNet, O>,
    ipv4_lengths: BTreeMap<u8, usize>,
    ipv6_lengths: BTreeMap<u8, usize>,
}

impl<O: Copy + Eq> Ranges<O> {
    /// Whose the narrowest range is that contains `address`.
    pub(super) fn owner(&self, address: IpAddr) -> Option<O> {
        let lengths = match address {
            IpAddr::V4(_) => &self.ipv4_lengths,
            IpAddr::V6(_) => &self.ipv6_lengths,
        };
        lengths.keys().rev().find_map(|length| {
            let range = IpNet::new(address, *length).ok()?.trunc();
            self.owners.get(&range).copied()
        })
    }

    /// Whether `address` is the last one of an IPv4 range, which is everybody in it.
    pub(super) fn ends_at(&self, address: IpAddr) -> bool {
        address.is_ipv4()
            && self.ipv4_lengths.keys().any(|&length| {
                // A range of one or two addresses has none for everybody (RFC 3021).
                IpNet::new(address, length).is_ok_and(|range| {
                    length < 31
                        && range.broadcast() == address
                        && self.owners.contains_key(&range.trunc())
                })
            })
    }

    /// Gives a range to `owner`; it is taken from whoever had it.
    pub(super) fn insert(&mut self, range: IpNet, owner: O) {
        if self.owners.insert(range, owner).is_none() {
            *self.lengths(range).entry(range.prefix_len()).or_default() += 1;
        }
    }

    /// Takes a range from `owner`, if it still has it.
    pub(super) fn remove(&mut self, range: IpNet, owner: O) {
        if self.owners.get(&range) != Some(&owner) {
            return;
        }
        self.owners.remove(&range);
        let lengths = self.lengths(range);
        if let Some(count) = lengths.get_mut(&range.prefix_len()) {
            *count -= 1;
            if *count == 0 {
                lengths.remove(&range.prefix_len());
            }
        }
    }

    fn lengths(&mut self, range: IpNet) -> &mut BTreeMap<u8, usize> {
        match range {
            IpNet::V4(_) => &mut self.ipv4_lengths,
            IpNet::V6(_) => &mut self.ipv6_lengths,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_range_wins() {
        let mut ranges = Ranges::default();
        let wide: IpNet = "10.0.0.0/8".parse().unwrap();
        let narrow: IpNet = "10.244.1.0/24".parse().unwrap();
        ranges.insert(wide, 1);
        ranges.insert(narrow, 2);
        ranges.insert("fd00:10:244:1::/64".parse().unwrap(), 3);
        let owner = |ranges: &Ranges<i32>, text: &str| ranges.owner(text.parse().unwrap());
        assert_eq!(owner(&ranges, "10.244.1.9"), Some(2));
        assert_eq!(owner(&ranges, "10.244.2.9"), Some(1));
        assert_eq!(owner(&ranges, "fd00:10:244:1::9"), Some(3));
        assert_eq!(owner(&ranges, "11.0.0.1"), None);
        let everybody = |text: &str| ranges.ends_at(text.parse().unwrap());
        assert!(everybody("10.244.1.255"));
        assert!(!everybody("10.244.1.254"));
        assert!(!everybody("11.0.0.255"));
        assert!(!everybody("fd00:10:244:1:ffff:ffff:ffff:ffff"));

        ranges.remove(narrow, 1);
        assert_eq!(owner(&ranges, "10.244.1.9"), Some(2), "not the owner's");
        ranges.remove(narrow, 2);
        assert_eq!(owner(&ranges, "10.244.1.9"), Some(1));
        ranges.remove(wide, 1);
        assert_eq!(owner(&ranges, "10.244.1.9"), None);
    }
}
