//! How things are, as far as the ledger and the connections tell it.

use std::collections::BTreeMap;

use super::sessions::Sessions;
use crate::{
    status::{self, AgentStatus, LedgerStatus, Status},
    store::State,
};

/// What is known of the ledger, of the agents and of what was lost.
pub(super) fn status(state: &State, sessions: &Sessions) -> Status {
    let mut lost = BTreeMap::<&str, u64>::new();
    let mut losses = Vec::new();
    for (node, reason, loss) in state.losses.iter() {
        let sum = lost.entry(node).or_default();
        *sum = sum.saturating_add(loss.count);
        losses.push(status::lost((node, reason, loss)));
    }
    let mut agents: Vec<AgentStatus> = state
        .agents
        .iter()
        .map(|(instance, agent)| AgentStatus {
            node: agent.node.clone(),
            instance: instance.to_owned(),
            version: agent.version.clone(),
            last_sequence: agent.last_sequence,
            last_seen: Some(agent.last_seen),
            lost: lost.get(agent.node.as_str()).copied().unwrap_or(0),
            ..AgentStatus::default()
        })
        .collect();
    // They are in the order of their instances.
    let stored = agents.len();
    for (instance, connected) in sessions.iter() {
        let found =
            agents[..stored].binary_search_by(|agent| agent.instance.as_str().cmp(instance));
        match found {
            Ok(place) => connected.describe(&mut agents[place]),
            Err(_) => {
                let mut agent = connected.status(instance);
                agent.lost = lost.get(agent.node.as_str()).copied().unwrap_or(0);
                agents.push(agent);
            }
        }
    }
    agents.sort_by(|one, other| {
        (&one.node, one.last_seen, &one.instance).cmp(&(
            &other.node,
            other.last_seen,
            &other.instance,
        ))
    });
    Status {
        ledger: LedgerStatus {
            observations: state.ledger.len() as u64,
            edges: state.ledger.count_edges() as u64,
            bytes: state.ledger.bytes() as u64,
            database_bytes: 0,
        },
        agents,
        losses,
        ..Status::default()
    }
}
