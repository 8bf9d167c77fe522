//! What the name of a file says of the batches in it.
//!
//! `FIRST-LAST.waiting`: they have no numbers yet, so segments may be merged. `FIRST-LAST.BASE.INSTANCE.sending`: under
//! that instance they have the numbers from BASE on, because some of them may be in a ledger. With `BASE+DONE` the first
//! DONE have none: they were acknowledged under another instance, and BASE is the number of the one that follows them. A
//! rename is one step for the file system: there is no moment at which a batch has half a number.
//!
//! FIRST and LAST are the segments that the file stands for, more than one where they were merged. A file whose segments
//! are part of another's is left over from a merge that was cut short.

/// The segments that a file stands for, and the numbers of its batches.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) numbers: Option<Numbers>,
}

/// The numbers of a segment's batches.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Numbers {
    /// The instance within which they count.
    pub(super) instance: String,
    /// The number of the first that has one.
    pub(super) base: u64,
    /// How many before it have none: they were acknowledged under another instance.
    pub(super) done: u64,
}

impl Numbers {
    /// The number of the batch that comes after so many of the segment.
    pub(super) const fn after(&self, entries: u64) -> u64 {
        self.base.saturating_add(entries.saturating_sub(self.done))
    }

    /// How many of the segment come before the batch that would have the number after this one.
    pub(super) const fn upto(&self, sequence: u64) -> u64 {
        let numbered = sequence.saturating_add(1).saturating_sub(self.base);
        self.done.saturating_add(numbered)
    }
}

impl Name {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let (first, last) = parts.next()?.split_once('-')?;
        let hex = |text: &str| {
            (text.len() == 16)
                .then(|| u64::from_str_radix(text, 16).ok())
                .flatten()
        };
        let (first, last) = (hex(first)?, hex(last)?);
        let numbers = match (parts.next()?, parts.next(), parts.next(), parts.next()) {
            ("waiting", None, None, None) => None,
            (base, Some(instance), Some("sending"), None) => {
                let (base, done) = base.split_once('+').unwrap_or((base, "0"));
                Some(Numbers {
                    instance: (!instance.is_empty()).then(|| instance.to_owned())?,
                    base: base.parse().ok().filter(|base| *base > 0)?,
                    done: done.parse().ok()?,
                })
            }
            _ => return None,
        };
        (first <= last).then_some(Self {
            first,
            last,
            numbers,
        })
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}-{:016x}.", self.first, self.last)?;
        match &self.numbers {
            None => f.write_str("waiting"),
            Some(Numbers {
                instance,
                base,
                done: 0,
            }) => write!(f, "{base}.{instance}.sending"),
            Some(Numbers {
                instance,
                base,
                done,
            }) => write!(f, "{base}+{done}.{instance}.sending"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let sending = |done| {
            Some(Numbers {
                instance: "6f0c-1".to_owned(),
                base: 17,
                done,
            })
        };
        for numbers in [None, sending(0), sending(4)] {
            let name = Name {
                first: 3,
                last: 0xff,
                numbers,
            };
            assert_eq!(Name::parse(&name.to_string()), Some(name));
        }
    }

    #[test]
    fn other_files_are_not_taken_for_segments() {
        for other in [
            "lock",
            "merge.tmp",
            "1-2.waiting",
            "0000000000000002-0000000000000001.waiting",
            "0000000000000001-0000000000000001.0.x.sending",
            "0000000000000001-0000000000000001.1..sending",
            "0000000000000001-0000000000000001.1+.x.sending",
            "0000000000000001-0000000000000001.1+2+3.x.sending",
            "0000000000000001-0000000000000001.1.x.y.sending",
            "0000000000000001-0000000000000001.waiting.bak",
        ] {
            assert_eq!(Name::parse(other), None, "{other}");
        }
    }
}
