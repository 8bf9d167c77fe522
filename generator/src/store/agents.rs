//! What is remembered of each run of an agent, and the rules of its batch numbers.

use std::collections::BTreeMap;

use flow::{time::Timestamp, wire::Hello};

/// The most agent instances that are remembered. A run of an agent is forgotten a month after its last batch, so this
/// is thousands of agents that restart daily.
const MAX_INSTANCES: usize = 1 << 18;

/// How many are forgotten at once when there are as many: they are looked for among all.
const FORGET_AT_ONCE: usize = MAX_INSTANCES >> 7;

/// The most that are remembered of one node: each run without a spool is another, and whoever starts more is not to push out
/// the agents of others.
const MAX_INSTANCES_OF_A_NODE: usize = 1 << 10;

/// How many of a node are forgotten at once.
const FORGET_AT_ONCE_OF_A_NODE: usize = MAX_INSTANCES_OF_A_NODE >> 2;

/// The agent instances whose batches are in the ledger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Agents {
    by_instance: BTreeMap<String, Agent>,
    /// How many a node has.
    of_node: BTreeMap<String, usize>,
}

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
pub enum Standing {
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
        self.by_instance
            .get(instance)
            .map_or(0, |agent| agent.last_sequence)
    }

    /// Judges the number of a batch that arrived.
    #[must_use]
    pub fn standing(&self, instance: &str, sequence: u64) -> Standing {
        let last = self.last_sequence(instance);
        // Nothing is greater than the greatest number, and nothing follows it.
        let expected = last.saturating_add(1);
        if sequence <= last {
            Standing::Known
        } else if sequence == expected {
            Standing::Next
        } else if last == 0 {
            Standing::Late
        } else {
            Standing::Gap { expected }
        }
    }

    /// Makes room for an instance of a node if it is not known and the node has its share, or the table is full: forgets those,
    /// of the node or of all, that were unseen for the longest time, but for those that `keep` wants; returns their names.
    pub fn make_room_for(
        &mut self,
        instance: &str,
        node: &str,
        keep: impl Fn(&str) -> bool,
    ) -> Vec<String> {
        if self.by_instance.contains_key(instance) {
            return Vec::new();
        }
        let of_node = self.of_node.get(node).copied().unwrap_or(0);
        let (of_node, most) = if of_node >= MAX_INSTANCES_OF_A_NODE {
            (Some(node), FORGET_AT_ONCE_OF_A_NODE)
        } else if self.by_instance.len() >= MAX_INSTANCES {
            (None, FORGET_AT_ONCE)
        } else {
            return Vec::new();
        };
        let mut unseen: Vec<(Timestamp, &String)> = self
            .by_instance
            .iter()
            .filter(|(_, agent)| of_node.is_none_or(|node| agent.node == node))
            .filter(|(instance, _)| !keep(instance))
            .map(|(instance, agent)| (agent.last_seen, instance))
            .collect();
        if unseen.len() > most {
            unseen.select_nth_unstable(most);
            unseen.truncate(most);
        }
        let forgotten: Vec<String> = unseen.into_iter().map(|(_, name)| name.clone()).collect();
        for instance in &forgotten {
            if let Some(agent) = self.by_instance.remove(instance) {
                self.leave(&agent.node);
            }
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
        self.by_instance.get(instance)
    }

    /// All instances, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Agent)> {
        self.by_instance
            .iter()
            .map(|(instance, agent)| (instance.as_str(), agent))
    }

    /// Forgets the instances whose last batch came before `time`, but for those that `keep` wants; returns their names.
    pub fn forget_before(&mut self, time: Timestamp, keep: impl Fn(&str) -> bool) -> Vec<String> {
        let old = |instance: &String, agent: &mut Agent| agent.last_seen < time && !keep(instance);
        let forgotten: Vec<(String, Agent)> = self.by_instance.extract_if(.., old).collect();
        for (_, agent) in &forgotten {
            self.leave(&agent.node);
        }
        forgotten.into_iter().map(|(name, _)| name).collect()
    }

    pub(super) fn insert(&mut self, instance: String, agent: Agent) {
        *self.of_node.entry(agent.node.clone()).or_default() += 1;
        if let Some(old) = self.by_instance.insert(instance, agent) {
            self.leave(&old.node);
        }
    }

    /// A node has one fewer.
    fn leave(&mut self, node: &str) {
        if let Some(count) = self.of_node.get_mut(node) {
            *count -= 1;
            if *count == 0 {
                self.of_node.remove(node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(instance: &str) -> Hello {
        hello_of(instance, "node-1")
    }

    fn hello_of(instance: &str, node: &str) -> Hello {
        Hello {
            instance: instance.to_owned(),
            node: node.to_owned(),
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
        let gap = |expected| Standing::Gap { expected };
        for (instance, sequence, standing) in [
            ("new", 1, Standing::Next),
            ("new", 2, Standing::Late),
            ("new", 0, Standing::Known),
            ("seven", 1, Standing::Known),
            ("seven", 7, Standing::Known),
            ("seven", 8, Standing::Next),
            ("seven", 9, gap(8)),
            ("last", u64::MAX, Standing::Known),
        ] {
            assert_eq!(
                agents.standing(instance, sequence),
                standing,
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
        assert_eq!(agents.standing("gone", 1), Standing::Next);
    }

    #[test]
    fn a_full_table_forgets_who_was_unseen_for_the_longest_time() {
        let mut agents = Agents::default();
        let node = |number: usize| format!("node-{}", number % (MAX_INSTANCES >> 4));
        let make_room = |agents: &mut Agents, instance: &str, keep: &dyn Fn(&str) -> bool| {
            agents.make_room_for(instance, "node-1", keep)
        };
        for number in 0..MAX_INSTANCES {
            assert_eq!(make_room(&mut agents, "one more", &|_| false), [""; 0]);
            let seen = Timestamp::from_nanos(number as u64);
            let hello = hello_of(&number.to_string(), &node(number));
            agents.advance(&hello, 1, seen);
        }
        assert_eq!(make_room(&mut agents, "17", &|_| false), [""; 0]);
        assert_eq!(make_room(&mut agents, "one more", &|_| true), [""; 0]);
        let forgotten = make_room(&mut agents, "one more", &|name| name == "0");
        assert_eq!(forgotten.len(), FORGET_AT_ONCE);
        for number in 0..MAX_INSTANCES {
            let known = number == 0 || number > FORGET_AT_ONCE;
            let name = number.to_string();
            assert_eq!(agents.get(&name).is_some(), known, "{name}");
        }
    }

    #[test]
    fn made_up_instances_of_a_node_push_out_none_of_others() {
        let mut agents = Agents::default();
        agents.advance(&hello_of("away", "node-2"), 7, Timestamp::default());
        agents.advance(&hello_of("connected", "node-1"), 7, Timestamp::default());
        for number in 1..10 * MAX_INSTANCES_OF_A_NODE {
            let hello = hello(&number.to_string());
            agents.make_room_for(&hello.instance, &hello.node, |name| name == "connected");
            agents.advance(&hello, 1, Timestamp::from_nanos(number as u64));
            // Again, which is no other instance.
            agents.advance(&hello, 2, Timestamp::from_nanos(number as u64));
            assert!(agents.of_node["node-1"] <= MAX_INSTANCES_OF_A_NODE);
        }
        assert_eq!(agents.last_sequence("away"), 7);
        assert_eq!(agents.last_sequence("connected"), 7);
        let last = 10 * MAX_INSTANCES_OF_A_NODE - 1;
        assert_eq!(agents.last_sequence(&last.to_string()), 2);
        let count = agents.iter().filter(|(_, agent)| agent.node == "node-1");
        assert_eq!(count.count(), agents.of_node["node-1"]);
        agents.forget_before(Timestamp::from_nanos(u64::MAX), |_| false);
        assert_eq!(agents, Agents::default());
    }
}
