//! What was really done, and what agents say about it, in a form that can be compared.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use flow::{
    lost::Lost,
    record::{Direction, FlowRecord, Outcome},
};

/// What the records of one connection have in common, whoever saw it and whenever.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Edge {
    /// The client: `namespace/name` of a pod, `node NAME`, or an address.
    pub client: String,
    /// The server, likewise, with its own port: `bookinfo/details-v1-… TCP 9080`.
    pub server: String,
    /// Which end was observed.
    pub direction: Direction,
    /// Whether the connection came about.
    pub outcome: Outcome,
}

impl Edge {
    /// A connection that came about.
    #[must_use]
    pub fn new(direction: Direction, client: &str, server: &str) -> Self {
        Self {
            client: client.to_owned(),
            server: server.to_owned(),
            direction,
            outcome: Outcome::Established,
        }
    }

    /// A connection that did not, as its client saw it.
    #[must_use]
    pub fn failed(client: &str, server: &str) -> Self {
        Self {
            outcome: Outcome::Failed,
            ..Self::new(Direction::Egress, client, server)
        }
    }
}

/// How many connections there were, by edge.
#[must_use]
pub fn edges<'a>(records: impl IntoIterator<Item = &'a FlowRecord>) -> BTreeMap<Edge, u64> {
    let mut edges = BTreeMap::new();
    for record in records {
        let edge = Edge {
            client: record.src.to_string(),
            server: format!(
                "{} {} {}",
                record.dst, record.protocol, record.tuple.dst_port
            ),
            direction: record.direction,
            outcome: record.outcome,
        };
        *edges.entry(edge).or_default() += record.count;
    }
    edges
}

/// The records among the lines of a program's output, without what they say was lost.
///
/// # Errors
/// If a line is neither.
pub fn records<'a>(lines: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<FlowRecord>> {
    lines
        .into_iter()
        .filter(|line| !line.is_empty() && Lost::parse_line(line).is_none())
        .map(|line| {
            serde_json::from_slice(line).with_context(|| String::from_utf8_lossy(line).into_owned())
        })
        .collect()
}
