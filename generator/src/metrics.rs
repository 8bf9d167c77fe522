//! What a running generator counts, in the form that Prometheus reads.
//!
//! Counters are kept as things happen; everything else is made of a [`Status`] when it is asked for.

use std::{fmt, sync::atomic::AtomicU64};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::status::Status;

/// What has happened since the start. Copies count together.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    /// Flow records that were stored.
    pub flows: Counter,
    /// Batches that were stored.
    pub batches: Counter,
    /// Batches that came again after they had been stored.
    pub repeated: Counter,
    /// Transactions.
    pub commits: Counter,
    /// Transactions that failed.
    pub failures: Counter,
    /// Requests without a token that is valid for them.
    pub denied: Counter,
    /// Connections that were ended because of what the peer did.
    pub refused: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfNode {
    node: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfLoss {
    node: String,
    reason: String,
}

/// The text of `/metrics`.
///
/// # Errors
/// None in practice: it is written into memory.
pub fn text(meter: &Meter, status: &Status) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("microshield");
    for (name, help, counter) in [
        (
            "flows_stored",
            "Flow records that were stored",
            &meter.flows,
        ),
        ("batches_stored", "Batches that were stored", &meter.batches),
        (
            "batches_repeated",
            "Batches that came again after they had been stored",
            &meter.repeated,
        ),
        ("commits", "Transactions of the store", &meter.commits),
        (
            "commit_failures",
            "Transactions of the store that failed",
            &meter.failures,
        ),
        (
            "requests_denied",
            "Requests without a token that is valid for them",
            &meter.denied,
        ),
        (
            "connections_refused",
            "Connections that were ended because of what the peer did",
            &meter.refused,
        ),
    ] {
        registry.register(name, help, counter.clone());
    }
    let mut gauge = |name, help, value: u64| {
        let gauge: Gauge = Gauge::default();
        gauge.set(signed(value));
        registry.register(name, help, gauge);
    };
    gauge(
        "ledger_observations",
        "Observations in the ledger: an edge that both ends' agents saw has two",
        status.ledger.observations,
    );
    gauge(
        "ledger_edges",
        "Connections between two ends and a port, those that both sides name alike counted once",
        status.ledger.edges,
    );
    gauge(
        "ledger_bytes",
        "Memory that the ledger takes, about",
        status.ledger.bytes,
    );
    gauge(
        "database_bytes",
        "Disk space that the database takes",
        status.ledger.database_bytes,
    );
    gauge(
        "queue_requests",
        "Requests of agents that wait for the keeper of the ledger",
        status.queue.requests,
    );
    gauge(
        "queue_kib",
        "KiB of messages that wait for the keeper of the ledger",
        status.queue.kib,
    );
    gauge(
        "agents_connected",
        "Agents that are connected",
        status.agents.iter().filter(|agent| agent.connected).count() as u64,
    );
    gauge(
        "start_time_seconds",
        "When the generator started, in seconds since the Unix epoch",
        status.started.as_nanos() / 1_000_000_000,
    );
    if let Some(topology) = &status.topology {
        gauge(
            "topology_ready",
            "Whether the cluster's objects are known",
            u64::from(topology.ready),
        );
        gauge(
            "topology_stale_seconds",
            "For how long the cluster's objects have not been current",
            topology.stale_seconds,
        );
    }
    let heard = Family::<OfNode, Gauge>::default();
    let lag = Family::<OfNode, Gauge>::default();
    let connected = Family::<OfNode, Gauge>::default();
    let pending = Family::<OfNode, Gauge>::default();
    let spooled = Family::<OfNode, Gauge>::default();
    let stale = Family::<OfNode, Gauge>::default();
    let ahead = Family::<OfNode, Gauge<f64, AtomicU64>>::default();
    for agent in &status.agents {
        let node = OfNode {
            node: agent.node.clone(),
        };
        // Earlier runs of a node's agent are among them: the latest of each counts.
        let raise = |family: &Family<OfNode, Gauge>, value: i64| {
            let gauge = family.get_or_create(&node);
            gauge.set(gauge.get().max(value));
        };
        raise(&connected, i64::from(agent.connected));
        if let Some(seen) = agent.last_seen {
            raise(&heard, signed(seen.as_nanos() / 1_000_000_000));
        }
        if let (Some(until), true) = (agent.reported_until, agent.connected) {
            let behind = status.now.as_nanos().saturating_sub(until.as_nanos());
            raise(&lag, signed(behind / 1_000_000_000));
        }
        if let Some(health) = &agent.health {
            raise(&pending, signed(health.pending));
            raise(&spooled, signed(health.spool_bytes));
            raise(&stale, signed(health.watch_stale_seconds));
        }
        if let Some(seconds) = agent.clock_ahead_seconds {
            ahead.get_or_create(&node).set(seconds);
        }
    }
    registry.register(
        "agent_connected",
        "Whether the node's agent is connected",
        connected,
    );
    registry.register(
        "agent_last_heard_seconds",
        "When the last batch of the node's agent came, in seconds since the Unix epoch",
        heard,
    );
    registry.register(
        "agent_lag_seconds",
        "How long ago the last window ended that the node's agent has reported",
        lag,
    );
    registry.register(
        "agent_pending_flows",
        "Flows that waited in the memory of the node's agent when it made its last batch",
        pending,
    );
    registry.register(
        "agent_spool_bytes",
        "What the agent's spool took then",
        spooled,
    );
    registry.register(
        "agent_watch_stale_seconds",
        "For how long the agent's view of the cluster's objects had not been current then",
        stale,
    );
    registry.register(
        "agent_clock_ahead_seconds",
        "How far the agent's clock was ahead of the generator's when it connected",
        ahead,
    );
    let losses = Family::<OfLoss, Counter>::default();
    for loss in &status.losses {
        let kind = OfLoss {
            node: loss.node.clone(),
            reason: loss.reason.clone(),
        };
        losses.get_or_create(&kind).inc_by(loss.count);
    }
    registry.register(
        "observations_lost",
        "Observations that were lost, by node and reason",
        losses,
    );
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
