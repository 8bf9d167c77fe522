//! From pieces of a file to the probe's lines.

use flow::scope_log::frame::{Assembler, MAX_FRAME_BYTES};
use memchr::memchr;

/// What stands in a log.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Text<'a> {
    /// A line that may be about a connection.
    Line(&'a [u8]),
    /// A line that is too long to be.
    TooLong,
}

/// Puts lines together over the borders of pieces.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// The beginning of a line whose end is not there yet.
    rest: Vec<u8>,
    /// Whether the rest of this line is of no use, because it is too long.
    is_skipping: bool,
    assembler: Assembler,
    /// Bytes taken in.
    taken: u64,
    /// Bytes up to the end of the last line that needs nothing of what follows.
    settled: u64,
}

impl Lines {
    /// That goes on at an offset.
    pub(super) fn at(offset: u64) -> Self {
        Self {
            taken: offset,
            settled: offset,
            ..Self::default()
        }
    }

    /// Takes in the next piece, and hands out the lines that end in it.
    pub(super) fn take(&mut self, mut piece: &[u8], sink: &mut dyn FnMut(Text<'_>)) {
        while let Some(end) = memchr(b'\n', piece) {
            let (line, next) = (&piece[..end], &piece[end + 1..]);
            self.taken += end as u64 + 1;
            if std::mem::take(&mut self.is_skipping) || self.rest.len() + end > MAX_FRAME_BYTES {
                sink(Text::TooLong);
                self.rest.clear();
            } else if self.rest.is_empty() {
                push(&mut self.assembler, line, sink);
            } else {
                self.rest.extend_from_slice(line);
                push(&mut self.assembler, &self.rest, sink);
                self.rest.clear();
            }
            if !self.assembler.is_open() {
                self.settled = self.taken;
            }
            piece = next;
        }
        self.taken += piece.len() as u64;
        if self.is_skipping || self.rest.len() + piece.len() > MAX_FRAME_BYTES {
            self.is_skipping = true;
            self.rest = Vec::new();
        } else {
            self.rest.extend_from_slice(piece);
        }
    }

    /// Hands out what no line feed ends, because nothing follows.
    pub(super) fn finish(&mut self, sink: &mut dyn FnMut(Text<'_>)) {
        if !self.rest.is_empty() {
            push(&mut self.assembler, &self.rest, sink);
            self.rest.clear();
        }
        self.settled = self.taken;
    }

    /// Bytes taken in.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Where to go on, if everything that was handed out until now is to be the end.
    pub(super) fn settled(&self) -> u64 {
        self.settled
    }
}

fn push(assembler: &mut Assembler, line: &[u8], sink: &mut dyn FnMut(Text<'_>)) {
    match assembler.push(line) {
        Ok(None) => {}
        Ok(Some(text)) => sink(Text::Line(&text)),
        Err(_too_long) => sink(Text::TooLong),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(lines: &mut Lines, pieces: &[&[u8]]) -> Vec<String> {
        let mut all = Vec::new();
        for piece in pieces {
            lines.take(piece, &mut |text| {
                all.push(match text {
                    Text::Line(line) => String::from_utf8_lossy(line).into_owned(),
                    Text::TooLong => "too long".to_owned(),
                });
            });
        }
        all
    }

    proptest! {
        #[test]
        fn it_makes_no_difference_where_pieces_end(cuts in prop::collection::vec(0..200_usize, 0..9)) {
            let text = b"x\n <probe> [CONN] [a\n\n2022-08-18T03:24:11.696728Z stderr P  [CON\n\
                2022-08-18T03:24:11.696728Z stderr F N] [b\n [CONN] [c\n";
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.sort_unstable();
            let mut pieces = Vec::new();
            let mut start = 0;
            for cut in cuts.into_iter().chain([text.len()]) {
                pieces.push(&text[start..cut]);
                start = cut;
            }
            let mut lines = Lines::at(7);
            prop_assert_eq!(
                all(&mut lines, &pieces),
                [" <probe> [CONN] [a", " [CONN] [b", " [CONN] [c"]
            );
            prop_assert_eq!(lines.settled(), 7 + text.len() as u64);
        }
    }

    #[test]
    fn what_has_not_ended_is_not_settled() {
        let mut lines = Lines::at(0);
        all(&mut lines, &[b"a\nb"]);
        assert_eq!((lines.taken(), lines.settled()), (3, 2));
        let split = b"\n2022-08-18T03:24:11.696728Z stderr P x\n";
        all(&mut lines, &[split]);
        assert_eq!(lines.settled(), 4, "the end of a split line is to come");
        let mut last = Vec::new();
        all(
            &mut lines,
            &[b"2022-08-18T03:24:11.696728Z stderr F  [CONN] [y"],
        );
        lines.finish(&mut |text| last.push(format!("{text:?}")));
        assert_eq!(last.len(), 1);
        assert_eq!(lines.settled(), lines.taken());
    }

    #[test]
    fn a_line_without_end_takes_no_more_room_than_it_may() {
        let mut lines = Lines::at(0);
        let piece = vec![b'x'; 100_000];
        for _ in 0..20 {
            all(&mut lines, &[&piece]);
            assert!(lines.rest.len() <= MAX_FRAME_BYTES);
        }
        assert_eq!(
            all(&mut lines, &[b"\n [CONN] [z\n"]),
            ["too long", " [CONN] [z"]
        );
    }
}
