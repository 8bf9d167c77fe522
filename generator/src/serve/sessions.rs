//! Who is connected, and what is known of each connection.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use flow::{time::Timestamp, wire::Health};
use tracing::warn;

use super::vet::MAX_AHEAD;
use crate::{
    ingest::{Refusal, Session},
    status::AgentStatus,
};

/// The last connection of each instance.
#[derive(Debug, Default)]
pub(super) struct Sessions(HashMap<String, Connected>);

/// A connection that was let in.
#[derive(Debug)]
pub(super) struct Connected {
    session: Weak<Session>,
    node: String,
    version: String,
    /// The end of the last window that it has reported.
    reported_until: Option<Timestamp>,
    /// How it was when it made its last batch.
    health: Option<Health>,
    clock_ahead: Option<f64>,
    capabilities: Vec<String>,
}

impl Connected {
    /// Says what is known of the connection.
    pub(super) fn describe(&self, agent: &mut AgentStatus) {
        agent.connected = true;
        agent.reported_until = self.reported_until;
        agent.health = self.health;
        agent.clock_ahead_seconds = self.clock_ahead;
        agent.capabilities.clone_from(&self.capabilities);
    }

    /// The status of an instance of which there is no batch in the ledger.
    pub(super) fn status(&self, instance: &str) -> AgentStatus {
        let mut agent = AgentStatus {
            node: self.node.clone(),
            instance: instance.to_owned(),
            version: self.version.clone(),
            ..AgentStatus::default()
        };
        self.describe(&mut agent);
        agent
    }
}

impl Sessions {
    /// Lets a session in, of an instance that the ledger may know as one of the node `stored`. The older connection of an
    /// instance makes way for the newer: its agent has given it up.
    ///
    /// # Errors
    /// Why it is not let in, which takes a token that proves its node.
    pub(super) fn join(
        &mut self,
        session: &Arc<Session>,
        stored: Option<&str>,
    ) -> Result<(), Refusal> {
        self.0
            .retain(|_, connected| connected.session.strong_count() > 0);
        let hello = &session.hello;
        if session.is_node_proven {
            let connected = self.0.get(&hello.instance).map(|other| other.node.as_str());
            if let Some(node) = connected.or(stored)
                && node != hello.node
            {
                let reason = format!("instance {} is of node {node}", hello.instance);
                return Err(Refusal::policy(reason));
            }
        }
        warn_of_clock(session);
        let connected = Connected {
            session: Arc::downgrade(session),
            node: hello.node.clone(),
            version: hello.version.clone(),
            reported_until: None,
            health: None,
            clock_ahead: session.clock_ahead,
            capabilities: hello.capabilities.clone(),
        };
        let older = self.0.insert(hello.instance.clone(), connected);
        if let Some(older) = older.and_then(|older| older.session.upgrade()) {
            older.refuse(Refusal::policy("the same instance has connected again"));
        }
        Ok(())
    }

    /// Whether an instance is connected.
    pub(super) fn has(&self, instance: &str) -> bool {
        self.0
            .get(instance)
            .is_some_and(|connected| connected.session.strong_count() > 0)
    }

    /// Those that are connected, by their instances.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &Connected)> {
        self.0
            .iter()
            .filter(|(_, connected)| connected.session.strong_count() > 0)
            .map(|(instance, connected)| (instance.as_str(), connected))
    }

    /// Notes up to when an instance has reported, and how it was then.
    pub(super) fn report(&mut self, instance: &str, until: Timestamp, health: Option<Health>) {
        if let Some(connected) = self.0.get_mut(instance) {
            connected.reported_until = connected.reported_until.max(Some(until));
            connected.health = health.or(connected.health);
        }
    }

    /// The last moment that any of them has reported.
    pub(super) fn reported_until(&self) -> Option<Timestamp> {
        let reported = self.0.values();
        reported
            .filter_map(|connected| connected.reported_until)
            .max()
    }
}

/// Says it of an agent whose clock is out.
fn warn_of_clock(session: &Session) {
    let hello = &session.hello;
    if let Some(ahead) = session.clock_ahead
        && is_out(ahead)
    {
        warn!(
            node = hello.node,
            instance = hello.instance,
            ahead_seconds = ahead.round(),
            "the agent's clock differs from this one: times, --since and --retain are wrong for what it sees"
        );
    }
}

fn is_out(ahead_seconds: f64) -> bool {
    ahead_seconds.abs() > MAX_AHEAD.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_may_be_out_by_a_minute() {
        for (ahead, out) in [
            (0.0, false),
            (-59.0, false),
            (61.0, true),
            (-172_800.0, true),
        ] {
            assert_eq!(is_out(ahead), out, "{ahead}");
        }
    }
}
