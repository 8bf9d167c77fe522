//! When the kernel programs counted everything.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// The most spans that are known; each loss begins a new one. What lay in the oldest counts as not covered then: what only
/// the log tells of it is counted.
const MAX_SPANS: usize = 64;

/// A span of time, in nanoseconds of `CLOCK_MONOTONIC`. It has its end in it, and not its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Its beginning.
    pub from: u64,
    /// Its end.
    pub to: u64,
}

/// Spans in which everything was counted.
#[derive(Clone, Debug, Default)]
pub(super) struct Coverage {
    spans: VecDeque<Span>,
}

impl Coverage {
    pub(super) fn new(spans: Vec<Span>) -> Self {
        Self {
            spans: spans.into(),
        }
    }

    /// Adds a drain's window, after those before.
    pub(super) fn add(&mut self, window: Span) {
        match self.spans.back_mut() {
            Some(last) if last.to == window.from => last.to = window.to,
            _ => self.spans.push_back(window),
        }
        if self.spans.len() > MAX_SPANS {
            self.spans.pop_front();
        }
    }

    pub(super) fn contains(&self, ns: u64) -> bool {
        self.spans
            .iter()
            .any(|span| span.from < ns && ns <= span.to)
    }

    pub(super) fn spans(&self) -> Vec<Span> {
        self.spans.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_in_a_row_are_one_span() {
        let mut coverage = Coverage::default();
        for (from, to) in [(10, 20), (20, 30), (40, 50)] {
            coverage.add(Span { from, to });
        }
        assert_eq!(
            coverage.spans(),
            [Span { from: 10, to: 30 }, Span { from: 40, to: 50 }]
        );
        let inside = [10, 11, 20, 30, 31, 40, 50].map(|ns| coverage.contains(ns));
        assert_eq!(inside, [false, true, true, true, false, false, true]);
    }

    #[test]
    fn there_are_only_so_many() {
        let mut coverage = Coverage::default();
        for number in 0..1_000 {
            coverage.add(Span {
                from: number * 10,
                to: number * 10 + 5,
            });
        }
        assert_eq!(coverage.spans().len(), MAX_SPANS);
        assert!(coverage.contains(9_995) && !coverage.contains(5));
    }
}
