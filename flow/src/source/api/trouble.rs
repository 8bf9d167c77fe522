//! What goes wrong between the API server and us, and what to make of it.

use std::{fmt, io, time::Duration};

use kube::core::Status;

use crate::causes::in_full;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    List,
    Watch,
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::List => "list",
            Self::Watch => "watch",
        })
    }
}

/// Why a request did not do, or a response ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Trouble {
    /// 403. The account may not do this.
    #[error("{message}")]
    Forbidden { verb: Verb, message: String },
    /// 404. The API server does not have the kind.
    #[error("the API server does not have this kind")]
    Unserved,
    /// 401. The token has expired, or is none.
    #[error("the API server does not accept the credentials: {0}")]
    Unauthorized(String),
    /// 410. What was asked for is too long ago.
    #[error("{0}")]
    Expired(String),
    /// 429, 503 and whatever else the API server says.
    #[error("the API server says {code}: {message}")]
    Refused {
        code: u16,
        message: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// There was no response.
    #[error("the API server cannot be reached: {0}")]
    Unreachable(String),
    /// The response broke off.
    #[error("the connection to the API server was lost: {0}")]
    Lost(#[from] io::Error),
    /// Nothing came for so long that the connection must be dead.
    #[error("the API server has been silent for {0:?}")]
    Silent(Duration),
    /// A watch ended before it had said anything.
    #[error("the API server ended the watch at once")]
    Fruitless,
    /// More objects than this program has memory for.
    #[error("more than {0} objects")]
    TooMany(usize),
    /// An event that takes more memory than one may.
    #[error("an event of more than {0} bytes")]
    EventTooLong(usize),
    /// That was no API server.
    #[error("not what an API server says: {0}")]
    Malformed(String),
    /// A defect of this program.
    #[error("internal error: {0}")]
    Internal(#[from] tokio::task::JoinError),
}

impl Trouble {
    pub(super) fn of_status(verb: Verb, status: Status) -> Self {
        let Status {
            code,
            message,
            details,
            ..
        } = status;
        match code {
            401 => Self::Unauthorized(message),
            403 => Self::Forbidden { verb, message },
            404 => Self::Unserved,
            410 => Self::Expired(message),
            _ => Self::Refused {
                code,
                message,
                retry_after: details
                    .map(|details| details.retry_after_seconds)
                    .filter(|seconds| *seconds > 0)
                    .map(|seconds| Duration::from_secs(seconds.into())),
            },
        }
    }

    pub(super) fn of_request(verb: Verb, error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::of_status(verb, *status),
            error => Self::Unreachable(in_full(&error)),
        }
    }

    /// Whether waiting for it to pass would be waiting for an administrator.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Forbidden { .. } | Self::Unserved)
    }

    /// Whether another client may do better: with the credentials and the address that are right by now, over a connection
    /// that is not dead.
    pub(super) fn may_be_the_client(&self) -> bool {
        matches!(
            self,
            Self::Unauthorized(_) | Self::Unreachable(_) | Self::Silent(_)
        )
    }

    /// Whether it is part of the daily life of a connection: worth a word only if the next attempt fails, too.
    pub(super) fn is_ordinary(&self) -> bool {
        matches!(self, Self::Expired(_) | Self::Lost(_) | Self::Silent(_))
    }
}
