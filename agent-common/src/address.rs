//! Addresses, as both sides of the kernel boundary have them.

use core::net::Ipv6Addr;

/// An IPv6 address; an IPv4 address is `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2), whether an IPv4 or a dual-stack socket spoke it.
///
/// In memory it is the sixteen bytes of the address in network byte order. Two words and no array of bytes: the kernel's
/// instruction set has no vectors, and of sixteen bytes the compiler moves each by itself, through places on the stack of
/// eight bytes each.
#[repr(transparent)]
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address([u64; 2]);

impl Address {
    /// `::`, which also stands for `0.0.0.0` where a socket takes what comes to either.
    pub const UNSPECIFIED: Self = Self([0; 2]);

    /// Of eight bytes at a time as they lie in memory.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: [u64; 2]) -> Self {
        Self(words)
    }

    /// Of four bytes at a time as they lie in memory.
    #[inline(always)]
    #[must_use]
    pub const fn from_quarters(quarters: [u32; 4]) -> Self {
        let [a, b, c, d] = quarters;
        Self([joined(a, b), joined(c, d)])
    }

    /// Of the sixteen bytes.
    #[inline(always)]
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        Self([
            u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            u64::from_ne_bytes([i, j, k, l, m, n, o, p]),
        ])
    }

    /// Of an IPv4 address's four bytes as they lie in memory.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4(address: u32) -> Self {
        Self([0, joined(V4_PREFIX, address)])
    }

    /// Four bytes at a time, as they lie in memory.
    #[inline(always)]
    #[must_use]
    pub const fn quarters(self) -> [u32; 4] {
        let [high, low] = self.0;
        let [[a, b], [c, d]] = [split(high), split(low)];
        [a, b, c, d]
    }

    /// The IPv4 address, if it is one, as a number: `10.0.0.1` is `0x0a00_0001`.
    #[inline(always)]
    #[must_use]
    pub const fn v4(self) -> Option<u32> {
        let low = u64::from_be(self.0[1]);
        if self.0[0] == 0 && low >> 32 == 0xffff {
            Some(low as u32)
        } else {
            None
        }
    }

    /// Whether it is a multicast group's, or everybody's on the link.
    #[inline(always)]
    #[must_use]
    pub const fn is_to_many(self) -> bool {
        match self.v4() {
            Some(v4) => v4 >> 28 == 0xe || v4 == u32::MAX,
            None => u64::from_be(self.0[0]) >> 56 == 0xff,
        }
    }

    /// Whether it never leaves its network namespace.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(self) -> bool {
        match self.v4() {
            Some(v4) => v4 >> 24 == 127,
            None => self.0[0] == 0 && u64::from_be(self.0[1]) == 1,
        }
    }

    /// Itself, but `::` for `0.0.0.0`: under one key, because a socket on the former may serve both.
    #[inline(always)]
    #[must_use]
    pub const fn unwildcard(self) -> Self {
        match self.v4() {
            Some(0) => Self::UNSPECIFIED,
            _ => self,
        }
    }
}

/// The first two of the last eight bytes of an IPv4 address are zero, the next two are not.
const V4_PREFIX: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// Two words, one after the other in memory, as one.
#[inline(always)]
const fn joined(first: u32, second: u32) -> u64 {
    let (first, second) = (first as u64, second as u64);
    if cfg!(target_endian = "little") {
        second << 32 | first
    } else {
        first << 32 | second
    }
}

/// The opposite of [`joined`].
#[inline(always)]
const fn split(word: u64) -> [u32; 2] {
    if cfg!(target_endian = "little") {
        [word as u32, (word >> 32) as u32]
    } else {
        [(word >> 32) as u32, word as u32]
    }
}

impl From<Ipv6Addr> for Address {
    fn from(address: Ipv6Addr) -> Self {
        Self::from_bytes(address.octets())
    }
}

impl From<Address> for Ipv6Addr {
    fn from(Address([high, low]): Address) -> Self {
        let number = u128::from(u64::from_be(high)) << 64 | u128::from(u64::from_be(low));
        Self::from_bits(number)
    }
}

impl core::fmt::Debug for Address {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Debug::fmt(&Ipv6Addr::from(*self), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        Address::from(text.parse::<Ipv6Addr>().unwrap())
    }

    fn part<const N: usize>(bytes: &[u8; 16], from: usize) -> [u8; N] {
        core::array::from_fn(|index| bytes[from + index])
    }

    #[test]
    fn is_made_of_what_lies_in_memory() {
        let bytes: [u8; 16] = core::array::from_fn(|index| 0xa0 + index as u8);
        let wanted = Address::from(Ipv6Addr::from(bytes));
        assert_eq!(Address::from_bytes(bytes), wanted);
        assert_eq!(
            Address::from_words([0, 8].map(|from| u64::from_ne_bytes(part(&bytes, from)))),
            wanted
        );
        assert_eq!(
            Address::from_quarters(
                [0, 4, 8, 12].map(|from| u32::from_ne_bytes(part(&bytes, from)))
            ),
            wanted
        );
        assert_eq!(Ipv6Addr::from(wanted).octets(), bytes);
        let v4 = u32::from_ne_bytes([10, 0, 0, 1]);
        assert_eq!(Address::from_v4(v4), address("::ffff:10.0.0.1"));
        assert_eq!(Address::from_v4(v4).v4(), Some(0x0a00_0001));
    }

    #[test]
    fn who_is_meant() {
        // Is of IPv4, is to many, is loopback.
        for (text, of_v4, to_many, loopback) in [
            ("::ffff:10.0.0.1", true, false, false),
            ("::ffff:127.3.2.1", true, false, true),
            ("::ffff:224.0.0.1", true, true, false),
            ("::ffff:239.255.255.250", true, true, false),
            ("::ffff:240.0.0.1", true, false, false),
            ("::ffff:255.255.255.255", true, true, false),
            ("::ffff:0.0.0.0", true, false, false),
            ("::1", false, false, true),
            ("::2", false, false, false),
            ("::", false, false, false),
            ("ff02::1", false, true, false),
            ("fe80::1", false, false, false),
            ("::fffe:127.0.0.1", false, false, false),
            ("1::ffff:127.0.0.1", false, false, false),
            ("1::1", false, false, false),
        ] {
            let address = address(text);
            assert_eq!(address.v4().is_some(), of_v4, "{text}");
            assert_eq!(address.is_to_many(), to_many, "{text}");
            assert_eq!(address.is_loopback(), loopback, "{text}");
            let unwildcard = if text == "::ffff:0.0.0.0" {
                Address::UNSPECIFIED
            } else {
                address
            };
            assert_eq!(address.unwildcard(), unwildcard, "{text}");
        }
    }
}
