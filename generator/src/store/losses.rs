//! What was not seen, and is known not to have been seen.

use std::collections::BTreeMap;

use flow::{time::Timestamp, wire::Window};

/// The most pairs of node and reason that are told apart; a real cluster has a dozen reasons a node.
const MAX_KINDS: usize = 1 << 16;

/// The most reasons of one node that are: as many as a batch may have. So no node takes the room of all others.
const MAX_REASONS: usize = 64;

/// The reason under which a node's losses are counted once there are too many to tell apart; and the node, once there are too
/// many of all.
const OTHER: &str = "other";

/// Lost observations by node and reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Losses(BTreeMap<(String, String), Loss>);

/// Observations of one node lost for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// How many.
    pub count: u64,
    /// From the start of the first window with such a loss to the end of the last.
    pub window: Window,
}

impl Losses {
    /// Adds to the losses of a node; returns the node and reason under which they are counted.
    pub fn add(
        &mut self,
        node: &str,
        reason: &str,
        count: u64,
        window: Window,
    ) -> (String, String) {
        let mut kind = (node.to_owned(), reason.to_owned());
        if !self.0.contains_key(&kind) {
            if self.0.len() >= MAX_KINDS {
                kind = (OTHER.to_owned(), OTHER.to_owned());
            } else if self.reasons_of(node) >= MAX_REASONS {
                kind.1 = OTHER.to_owned();
            }
        }
        let loss = self
            .0
            .entry(kind.clone())
            .or_insert(Loss { count: 0, window });
        loss.count = loss.count.saturating_add(count);
        loss.window.from = loss.window.from.min(window.from);
        loss.window.to = loss.window.to.max(window.to);
        kind
    }

    /// Takes in what the store has, where it was told apart already.
    pub(super) fn restore(&mut self, kind: (String, String), loss: Loss) {
        self.0.insert(kind, loss);
    }

    fn reasons_of(&self, node: &str) -> usize {
        let reasons = self.0.range((node.to_owned(), String::new())..);
        reasons.take_while(|((it, _), _)| it == node).count()
    }

    /// The loss counted under a node and reason.
    #[must_use]
    pub fn get(&self, kind: &(String, String)) -> Option<&Loss> {
        self.0.get(kind)
    }

    /// All losses, by node and reason.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &Loss)> {
        self.0
            .iter()
            .map(|((node, reason), loss)| (node.as_str(), reason.as_str(), loss))
    }

    /// Forgets the losses of which the last window ended before `time`; returns node and reason of each.
    pub fn forget_before(&mut self, time: Timestamp) -> Vec<(String, String)> {
        self.0
            .extract_if(.., |_, loss| loss.window.to < time)
            .map(|(kind, _)| kind)
            .collect()
    }

    /// How many observations were lost in all.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0
            .values()
            .fold(0, |sum, loss| sum.saturating_add(loss.count))
    }

    /// Whether nothing was lost.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(from: u64, to: u64) -> Window {
        Window {
            from: Timestamp::from_nanos(from),
            to: Timestamp::from_nanos(to),
        }
    }

    #[test]
    fn equal_losses_are_added_up_over_all_their_windows() {
        let mut losses = Losses::default();
        losses.add("node-1", "ring_full", 2, window(5, 6));
        losses.add("node-1", "ring_full", u64::MAX, window(1, 2));
        losses.add("node-2", "ring_full", 1, window(3, 4));
        let all: Vec<_> = losses
            .iter()
            .map(|(node, _, loss)| (node, loss.count, loss.window))
            .collect();
        assert_eq!(
            all,
            [
                ("node-1", u64::MAX, window(1, 6)),
                ("node-2", 1, window(3, 4))
            ]
        );
        assert_eq!(losses.total(), u64::MAX);
    }

    #[test]
    fn made_up_reasons_of_a_node_leave_room_for_others() {
        let mut losses = Losses::default();
        for number in 0..MAX_KINDS {
            losses.add("node-1", &number.to_string(), 1, window(1, 1));
        }
        losses.add("node-0", "ring_full", 2, window(1, 1));
        losses.add("node-2", "ring_full", 3, window(1, 1));
        let mut of_node_1 = 0;
        for (node, reason, loss) in losses.iter() {
            match (node, reason) {
                ("node-1", OTHER) => assert_eq!(loss.count, (MAX_KINDS - MAX_REASONS) as u64),
                ("node-1", _) => of_node_1 += 1,
                ("node-0", "ring_full") => assert_eq!(loss.count, 2),
                ("node-2", "ring_full") => assert_eq!(loss.count, 3),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(of_node_1, MAX_REASONS);
        assert_eq!(losses.total(), MAX_KINDS as u64 + 5);
    }

    #[test]
    fn made_up_nodes_do_not_swell_it() {
        let mut losses = Losses::default();
        for number in 0..MAX_KINDS + 10 {
            losses.add(&number.to_string(), "ring_full", 1, window(1, 1));
        }
        assert_eq!(losses.iter().count(), MAX_KINDS + 1);
        let other = (OTHER.to_owned(), OTHER.to_owned());
        assert_eq!(losses.get(&other).unwrap().count, 10);
        assert_eq!(losses.total(), (MAX_KINDS + 10) as u64);
    }
}
