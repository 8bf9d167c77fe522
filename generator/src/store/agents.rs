//! What is remembered of each run of an agent, and the rules of its batch numbers.

use std::collections::BTreeMap;

use flow::{time::Timestamp, wire::Hello};

/// The most agent instances that are remembered. A run of an agent is forgotten a month after its last batch, so this
/// is thousands of agents that restart daily.
const MAX_INSTANCES: usize = 1 << 18;

/// How many are forgotten at once when there are as many: they are looked for among all.
const FORGET_AT_ONCE: usize = MAX_INSTANCES >> 7;

/// The agent instances whose batches are in the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agents(BTreeMap<String, Agent>);

/// One run of an agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// The node that it says it is on.
    pub node: String,
    /// Its version.
    pub version: String,
    /// The last batch that is in the ledger; all before it are too.
    pub last_sequence: u64,
    /// When that batch came.
    pub last_seen: Timestamp,
}

/// What a batch's number says about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It is the one that follows the last.
    Next,
    /// It is in the ledger already: its acknowledgement was lost.
    Known,
    /// It is the first of an instance that is not known, but not the first that the instance has numbered. An agent throws
    /// away what was acknowledged: whoever did that was another ledger, and nothing can be counted twice in this one.
    Late,
    /// Batches before it are missing.
    Gap {
        /// The number that should have come.
        expected: u64,
    },
}

impl Agents {
    /// The last batch of the instance that is in the ledger; 0 if none is.
    #[must_use]
    pub fn last_sequence(&self, instance: &str) -> u64 {
        self.0.get(instance).map_or(0, |agent| agent.last_sequence)
    }

    /// Judges the number of a batch that arrived.
    #[must_use]
    pub fn turn(&self, instance: &str, sequence: u64) -> Turn {
        let last = self.last_sequence(instance);
        // Nothing is greater than the greatest number, and nothing follows it.
        let expected = last.saturating_add(1);
        if sequence <= last {
            Turn::Known
        } else if sequence == expected {
            Turn::Next
        } else if last == 0 {
            Turn::Late
        } else {
            Turn::Gap { expected }
        }
    }

    /// Makes room for the instance if it is not known and the table is full: forgets those that were unseen for the
    /// longest time, but for those that `keep` wants; returns their names.
    pub fn make_room_for(&mut self, instance: &str, keep: impl Fn(&str) -> bool) -> Vec<String> {
        if self.0.len() < MAX_INSTANCES || self.0.contains_key(instance) {
            return Vec::new();
        }
        let mut unseen: Vec<(Timestamp, &String)> = self
            .0
            .iter()
            .filter(|(instance, _)| !keep(instance))
            .map(|(instance, agent)| (agent.last_seen, instance))
            .collect();
        if unseen.len() > FORGET_AT_ONCE {
            unseen.select_nth_unstable(FORGET_AT_ONCE);
            unseen.truncate(FORGET_AT_ONCE);
        }
        let forgotten: Vec<String> = unseen.into_iter().map(|(_, name)| name.clone()).collect();
        for instance in &forgotten {
            self.0.remove(instance);
        }
        forgotten
    }

    /// Remembers that batch `sequence` is in the ledger.
    pub fn advance(&mut self, hello: &Hello, sequence: u64, now: Timestamp) {
        self.insert(
            hello.instance.clone(),
            Agent {
                node: hello.node.clone(),
                version: hello.version.clone(),
                last_sequence: sequence,
                last_seen: now,
            },
        );
    }

    /// The instance, if a batch of it is in the ledger.
    #[must_use]
    pub fn get(&self, instance: &str) -> Option<&Agent> {
        self.0.get(instance)
    }

    /// All instances, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Agent)> {
        self.0
            .iter()
            .map(|(instance, agent)| (instance.as_str(), agent))
    }

    /// Forgets the instances whose last batch came before `time`, but for those that `keep` wants; returns their names.
    pub fn forget_before(&mut self, time: Timestamp, keep: impl Fn(&str) -> bool) -> Vec<String> {
        self.0
            .extract_if(.., |instance, agent| {
                agent.last_seen < time && !keep(instance)
            })
            .map(|(instance, _)| instance)
            .collect()
    }

    pub(super) fn insert(&mut self, instance: String, agent: Agent) {
        self.0.insert(instance, agent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(instance: &str) -> Hello {
        Hello {
            instance: instance.to_owned(),
            node: "node-1".to_owned(),
            version: "1".to_owned(),
            resolve: flow::wire::Resolve::Both,
            capabilities: Vec::new(),
            clock: None,
        }
    }

    #[test]
    fn a_batch_is_next_known_or_after_a_gap() {
        let mut agents = Agents::default();
        agents.advance(&hello("seven"), 7, Timestamp::default());
        agents.advance(&hello("last"), u64::MAX, Timestamp::default());
        let gap = |expected| Turn::Gap { expected };
        for (instance, sequence, turn) in [
            ("new", 1, Turn::Next),
            ("new", 2, Turn::Late),
            ("new", 0, Turn::Known),
            ("seven", 1, Turn::Known),
            ("seven", 7, Turn::Known),
            ("seven", 8, Turn::Next),
            ("seven", 9, gap(8)),
            ("last", u64::MAX, Turn::Known),
        ] {
            assert_eq!(
                agents.turn(instance, sequence),
                turn,
                "{instance} {sequence}"
            );
        }
    }

    #[test]
    fn an_instance_is_forgotten_when_unseen_and_unwanted() {
        let mut agents = Agents::default();
        for (instance, seen) in [("connected", 1), ("gone", 1), ("recent", 9)] {
            agents.advance(&hello(instance), 1, Timestamp::from_nanos(seen));
        }
        let gone = agents.forget_before(Timestamp::from_nanos(5), |name| name == "connected");
        assert_eq!(gone, ["gone"]);
        let left: Vec<&str> = agents.iter().map(|(instance, _)| instance).collect();
        assert_eq!(left, ["connected", "recent"]);
        assert_eq!(agents.turn("gone", 1), Turn::Next);
    }

    #[test]
    fn a_full_table_forgets_who_was_unseen_for_the_longest_time() {
        let mut agents = Agents::default();
        for number in 0..MAX_INSTANCES {
            assert_eq!(agents.make_room_for("one more", |_| false), [""; 0]);
            let seen = Timestamp::from_nanos(number as u64);
            agents.advance(&hello(&number.to_string()), 1, seen);
        }
        assert_eq!(agents.make_room_for("17", |_| false), [""; 0]);
        assert_eq!(agents.make_room_for("one more", |_| true), [""; 0]);
        let forgotten = agents.make_room_for("one more", |name| name == "0");
        assert_eq!(forgotten.len(), FORGET_AT_ONCE);
        for number in 0..MAX_INSTANCES {
            let known = number == 0 || number > FORGET_AT_ONCE;
            let name = number.to_string();
            assert_eq!(agents.get(&name).is_some(), known, "{name}");
        }
    }
}
