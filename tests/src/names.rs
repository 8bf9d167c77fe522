//! Names that nobody chose, made from others so that they are the same every time.

/// A name for something that has none, in the form of a UID.
pub(crate) fn uid(of: &str) -> String {
    let high = hash(of);
    let low = hash(&format!("{of}."));
    format!(
        "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xffff,
        high & 0xfff,
        low >> 52,
        low & 0xffff_ffff_ffff,
    )
}

/// Lower-case letters and digits as Kubernetes makes names of: no vowels, nothing that looks like something else.
pub(crate) fn letters(of: &str, count: usize) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut rest = hash(of);
    (0..count)
        .map(|_| {
            let letter = ALPHABET[(rest % ALPHABET.len() as u64) as usize];
            rest /= ALPHABET.len() as u64;
            char::from(letter)
        })
        .collect()
}

/// FNV-1a: short, and the same in every version of the compiler.
pub(crate) fn hash(of: &str) -> u64 {
    of.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_has_the_form_of_one() {
        let uid = uid("pod shop/web");
        let lengths: Vec<usize> = uid.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12], "{uid}");
        assert!(
            uid.chars().all(|c| c == '-' || c.is_ascii_hexdigit()),
            "{uid}"
        );
    }

    #[test]
    fn a_name_never_changes() {
        assert_eq!(letters("bookinfo/reviews-v1", 10), "7qrrlg2k8p");
    }
}
