//! Who held something (an address, a port of the nodes) when.

use std::{collections::HashMap, hash::Hash, time::Duration};

use smallvec::SmallVec;

use crate::time::Timestamp;

/// How far a flow's time may lie outside the span of a holder and still mean it, if nobody else held the thing then: the
/// clocks of nodes and API server differ a little, and connections are torn down while a pod is being deleted.
pub const GRACE: Duration = Duration::from_secs(5);

const FOREVER: Timestamp = Timestamp::from_nanos(u64::MAX);

/// A span in which somebody held something: `from <= time < to`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span<O> {
    pub(super) owner: O,
    pub(super) from: Timestamp,
    pub(super) to: Timestamp,
    /// The earliest that the end may have been; later than `to` never. An end is often learnt later than it happened.
    pub(super) surely_to: Timestamp,
}

impl<O> Span<O> {
    pub(super) fn is_open(&self) -> bool {
        self.to == FOREVER
    }

    pub(super) fn contains(&self, at: Timestamp) -> bool {
        self.from <= at && at < self.to
    }
}

/// When something ended, as far as that is known.
#[derive(Clone, Copy, Debug)]
pub(super) struct End {
    pub(super) earliest: Timestamp,
    pub(super) latest: Timestamp,
}

impl End {
    pub(super) fn at(time: Timestamp) -> Self {
        Self {
            earliest: time,
            latest: time,
        }
    }

    /// As an object's status tells it, in whole seconds rounded down; `now` it is over.
    pub(super) fn told(second: Timestamp, now: Timestamp) -> Self {
        Self::at(second.saturating_add(Duration::from_secs(1)).min(now))
    }
}

/// Spans by the thing held.
///
/// Spans of different owners may overlap: what the API says is not always possible at once.
#[derive(Debug)]
pub(super) struct History<K, O> {
    /// Most keys have one holder ever: it stands in the map itself.
    spans: HashMap<K, SmallVec<[Span<O>; 1]>>,
}

impl<K, O> Default for History<K, O> {
    fn default() -> Self {
        Self {
            spans: HashMap::new(),
        }
    }
}

impl<K: Eq + Hash, O: Copy + Eq> History<K, O> {
    /// All spans of a key, in the order in which they were learnt.
    pub(super) fn of(&self, key: &K) -> &[Span<O>] {
        self.spans.get(key).map_or(&[], SmallVec::as_slice)
    }

    /// From `from` on `owner` holds `key`. Nothing happens if it holds it already.
    pub(super) fn hold(&mut self, key: K, owner: O, from: Timestamp) {
        let spans = self.spans.entry(key).or_default();
        if !spans
            .iter()
            .any(|span| span.is_open() && span.owner == owner)
        {
            spans.push(Span {
                owner,
                from,
                to: FOREVER,
                surely_to: FOREVER,
            });
        }
    }

    /// `owner` gave `key` up. Says whether it held it.
    pub(super) fn release(&mut self, key: &K, owner: O, end: End) -> bool {
        let spans = self.spans.get_mut(key).into_iter().flatten();
        let open = spans
            .into_iter()
            .find(|span| span.is_open() && span.owner == owner);
        let Some(span) = open else { return false };
        span.to = end.latest.max(span.from);
        span.surely_to = end.earliest.clamp(span.from, span.to);
        true
    }

    /// Forgets the oldest span in which `owner` held `key`, if it has ended.
    pub(super) fn forget(&mut self, key: &K, owner: O) {
        let Some(spans) = self.spans.get_mut(key) else {
            return;
        };
        let ended = |span: &Span<O>| span.owner == owner && !span.is_open();
        if let Some(i) = spans.iter().position(ended) {
            spans.remove(i);
        }
        if spans.is_empty() {
            self.spans.remove(key);
        } else {
            spans.shrink_to_fit();
        }
    }
}

/// Of these spans the one that `at` means:
///
/// 1. of those that contain it the one that began last (of several such the one learnt last);
/// 2. else the one that ended last before it, if that is less than [`GRACE`] ago;
/// 3. else the one that begins first after it, if that is at most [`GRACE`] later.
pub(super) fn pick<O: Copy>(
    spans: impl Iterator<Item = Span<O>> + Clone,
    at: Timestamp,
) -> Option<Span<O>> {
    let inside = spans
        .clone()
        .filter(|span| span.contains(at))
        .max_by_key(|span| span.from);
    if inside.is_some() {
        return inside;
    }
    let before = spans
        .clone()
        .filter(|span| span.to <= at && at < span.to.saturating_add(GRACE))
        .max_by_key(|span| span.to);
    if before.is_some() {
        return before;
    }
    spans
        .filter(|span| at < span.from && span.from <= at.saturating_add(GRACE))
        .min_by_key(|span| span.from)
}
