//! What a running generator says of itself, for people and machines.

use flow::{lost::Lost, time::Timestamp, wire::Health};
use serde::{Deserialize, Serialize};

use crate::store::Loss;

/// The path of the generator's status.
pub const STATUS_PATH: &str = "/v1/status";

/// The path of the whole ledger.
pub const EXPORT_PATH: &str = "/v1/export";

/// How the generator is, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The generator's version.
    pub version: String,
    /// When this was so.
    pub now: Timestamp,
    /// When it started.
    pub started: Timestamp,
    /// The ledger.
    pub ledger: LedgerStatus,
    /// Requests of agents that wait.
    pub queue: QueueStatus,
    /// The cluster's objects, if the generator follows them.
    pub topology: Option<TopologyStatus>,
    /// Agents of which a batch was stored, or which are connected; by node.
    pub agents: Vec<AgentStatus>,
    /// What was lost, by node and reason, since the ledger began.
    pub losses: Vec<Lost>,
}

/// How large the ledger is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerStatus {
    /// Observations: an edge that both ends' agents saw has two.
    pub observations: u64,
    /// Connections between two ends and a port, those that both sides name alike counted once.
    #[serde(default)]
    pub edges: u64,
    /// What they take in memory, about.
    pub bytes: u64,
    /// What the database takes on disk.
    pub database_bytes: u64,
}

/// What waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStatus {
    /// Requests.
    pub requests: u64,
    /// KiB of them that are taken of the room there is.
    pub kib: u64,
}

/// How current the cluster's objects are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopologyStatus {
    /// Whether they are known at all.
    pub ready: bool,
    /// For how many seconds they have not been current.
    pub stale_seconds: u64,
}

/// An agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Its node.
    pub node: String,
    /// Its instance.
    pub instance: String,
    /// Its version.
    pub version: String,
    /// Whether it is connected.
    pub connected: bool,
    /// The last batch of it that is stored; 0 if none is.
    pub last_sequence: u64,
    /// When that came.
    pub last_seen: Option<Timestamp>,
    /// The end of the last window that it reported: how far behind it is.
    pub reported_until: Option<Timestamp>,
    /// Observations of its node that were lost.
    pub lost: u64,
    /// What it said that it captures, and how; of one that is connected.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// How far its clock was ahead of the generator's when it connected.
    #[serde(default)]
    pub clock_ahead_seconds: Option<f64>,
    /// How it was when it made its last batch.
    #[serde(default)]
    pub health: Option<Health>,
}

/// A row of what the ledger says was lost.
pub(crate) fn lost((node, reason, loss): (&str, &str, &Loss)) -> Lost {
    Lost {
        node: node.to_owned(),
        reason: reason.to_owned(),
        count: loss.count,
    }
}
