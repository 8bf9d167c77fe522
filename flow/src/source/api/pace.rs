//! How patient to be.

use std::time::Duration;

/// How patient to be with an API server, or with Scope's app. The default is right for a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// How long it may take to begin a response. It gives itself a minute for a list.
    pub response: Duration,
    /// How long it may be silent in the middle of a list or report.
    pub silence: Duration,
    /// How long a watch may be silent after its first bookmark: who sends any sends one about every minute.
    pub bookmarks: Duration,
    /// How often to ask again for what is refused.
    pub refused: Duration,
    /// How often to say that it is away, while it is.
    pub remind: Duration,
    /// How often Scope's app is asked, where its answers are short.
    pub poll: Duration,
    /// How long it may take to answer in full.
    pub report: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            response: Duration::from_secs(70),
            silence: Duration::from_secs(60),
            bookmarks: Duration::from_secs(150),
            refused: Duration::from_secs(60),
            remind: Duration::from_secs(60),
            poll: Duration::from_secs(5),
            report: Duration::from_secs(120),
        }
    }
}
