//! What goes wrong between Scope's app and us.

use std::{io, time::Duration};

use crate::topology::scope::ReportError;

/// Why there was no report of use.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// There was no answer.
    #[error("Scope cannot be reached: {0}")]
    Unreachable(String),
    /// 401 or 403.
    #[error("Scope's app lets only those in who show a password ({0})")]
    Unauthorized(u16),
    /// 404.
    #[error("there is no report (404): the app answers at /api/report")]
    NotThere,
    /// Any other answer than a report.
    #[error("Scope says {code}")]
    Refused {
        code: u16,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The answer broke off.
    #[error("the connection to Scope was lost: {0}")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Nothing came for so long that the connection must be dead.
    #[error("Scope has been silent for {0:?}")]
    Silent(Duration),
    /// It comes, but too slowly to be of use.
    #[error("the report has not ended after {0:?}")]
    TooSlow(Duration),
    /// It is none, or too large.
    #[error("not a report of Weave Scope: {0}")]
    Malformed(#[from] ReportError),
    /// It is compressed in another way than was asked for.
    #[error("the report is encoded as {0}")]
    Encoding(String),
    /// An app that was started a moment ago, or one whose probes do not read the cluster.
    #[error("the report has no pods: no probe that reads the cluster has reported to this app yet")]
    NoPods,
    /// A defect of this program.
    #[error("internal error: {0}")]
    Internal(#[from] tokio::task::JoinError),
}

impl Trouble {
    pub(super) fn unreachable(error: impl std::fmt::Display) -> Self {
        Self::Unreachable(error.to_string())
    }

    pub(super) fn timed_out(after: Duration) -> Self {
        Self::unreachable(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no connection within {after:?}"),
        ))
    }

    /// Whether it is part of the daily life of a connection: worth a word only if the next attempt fails, too.
    pub(super) fn is_ordinary(&self) -> bool {
        matches!(self, Self::Lost(_) | Self::Silent(_) | Self::NoPods)
    }
}
