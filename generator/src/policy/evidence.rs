//! What speaks for a rule.

use std::collections::BTreeSet;

use flow::time::Timestamp;
use serde::Serialize;

use super::ends::PodIndex;
use crate::ledger::Edge;

/// What was seen of the connections that a rule is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Evidence {
    /// How many connections there were.
    pub count: u64,
    /// When the first of them was seen.
    pub first_seen: Timestamp,
    /// When the last of them was seen.
    pub last_seen: Timestamp,
    /// On which side they were seen.
    pub seen_by: SeenBy,
    /// How many pods of those that the policy governs took part; 0 where it is not known which did.
    pub pods: usize,
    /// How many pods that the policy governs were seen in any connection.
    pub of_pods: usize,
}

/// On which side connections were seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SeenBy {
    /// On the client's alone.
    Client,
    /// On the server's alone.
    Server,
    /// On both.
    Both,
}

impl SeenBy {
    /// Of an edge. Each was seen on a side.
    #[must_use]
    pub fn of(edge: &Edge) -> Self {
        match (edge.seen_by_client, edge.seen_by_server) {
            (_, 0) => Self::Client,
            (0, _) => Self::Server,
            _ => Self::Both,
        }
    }

    /// Of connections seen here and there.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        if self == other { self } else { Self::Both }
    }

    /// `client`, `server` or `both`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Both => "both",
        }
    }
}

/// Evidence while it is gathered.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    sum: Option<Evidence>,
    pods: BTreeSet<PodIndex>,
}

impl Gathered {
    /// Adds an edge, and the pod that is its end inside.
    pub(super) fn add(&mut self, edge: &Edge, inside: Option<PodIndex>) {
        self.pods.extend(inside);
        let own = Evidence {
            count: edge.count(),
            first_seen: edge.first_seen,
            last_seen: edge.last_seen,
            seen_by: SeenBy::of(edge),
            pods: 0,
            of_pods: 0,
        };
        self.sum = Some(match self.sum {
            None => own,
            Some(sum) => Evidence {
                count: sum.count.saturating_add(own.count),
                first_seen: sum.first_seen.min(own.first_seen),
                last_seen: sum.last_seen.max(own.last_seen),
                seen_by: sum.seen_by.and(own.seen_by),
                ..own
            },
        });
    }

    /// Adds what was gathered elsewhere.
    pub(super) fn join(&mut self, other: Self) {
        self.pods.extend(other.pods);
        self.sum = match (self.sum, other.sum) {
            (Some(sum), Some(other)) => Some(Evidence {
                count: sum.count.saturating_add(other.count),
                first_seen: sum.first_seen.min(other.first_seen),
                last_seen: sum.last_seen.max(other.last_seen),
                seen_by: sum.seen_by.and(other.seen_by),
                ..sum
            }),
            (one, other) => one.or(other),
        };
    }

    /// The evidence, if there is some, for that many pods.
    pub(super) fn of(self, of_pods: usize) -> Option<Evidence> {
        Some(Evidence {
            pods: self.pods.len(),
            of_pods,
            ..self.sum?
        })
    }
}
