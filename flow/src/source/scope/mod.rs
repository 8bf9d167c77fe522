//! Weave Scope as a source: its app's report is asked for again and again. So the whole system runs where Scope is the only one
//! that may talk to the Kubernetes API.
//!
//! The app keeps what its probes have sent in the last 15 seconds, and merges it for every question: a question costs it
//! more than its answer costs us. So one is asked for no more often than every few seconds, and where reports are so large that
//! reading one takes long, less often than that. MessagePack is asked for, which is a quarter shorter than JSON and takes less time
//! to read, and compressed: a report repeats itself so much that a seventh of it is left.

mod fetch;
mod follow;
mod trouble;
mod url;

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc};

use tokio::task::JoinSet;

pub use self::url::ReportUrl;
use self::{
    fetch::{Answer, Client},
    follow::Follower,
    trouble::Trouble,
};
use super::{
    Options, SourceError,
    api::Kind,
    once::{LoadError, Warnings},
    view::{Knowledge, Shared},
};
use crate::{
    topology::{Objects, scope::Report},
    transport::TlsError,
};

/// What a report tells of.
const KINDS: [Kind; 4] = [Kind::Pods, Kind::Services, Kind::Nodes, Kind::Namespaces];

/// Where Scope's report is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReportAt {
    /// In a file, read again when it changes.
    File(PathBuf),
    /// At the app.
    App(ReportUrl),
}

impl FromStr for ReportAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("scope= needs a URL or a path".to_owned());
        }
        // A path with a colon can be written `./a://b`.
        match text.contains("://") {
            true => text.parse().map(Self::App),
            false => Ok(Self::File(text.into())),
        }
    }
}

impl fmt::Display for ReportAt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::App(url) => url.fmt(f),
        }
    }
}

/// Starts to ask.
pub(super) fn start(
    url: &ReportUrl,
    options: &Options,
    shared: &Shared,
    tasks: &mut JoinSet<()>,
) -> Result<(), TlsError> {
    let client = Client::new(url.clone(), options.pace)?;
    tracing::info!(%url, "reading the cluster's objects from Weave Scope");
    say(shared, Knowledge::Awaited);
    let follower = Follower::new(client, options, shared.clone());
    tasks.spawn(follower.run());
    tasks.spawn(remind(
        options.pace.remind,
        shared.clone(),
        Arc::new(url.clone()),
    ));
    Ok(())
}

/// Asks once.
pub(super) async fn load(
    url: &ReportUrl,
    options: &Options,
) -> Result<(Objects, Warnings), LoadError> {
    let mut client = Client::new(url.clone(), options.pace).map_err(SourceError::from)?;
    let report = match client.ask().await {
        Ok(Answer::Report(report)) if !report.objects.pods.is_empty() => Ok(report),
        Ok(Answer::Report(_) | Answer::Unchanged) => Err(Trouble::NoPods),
        Err(trouble) => Err(trouble),
    };
    let Report { objects, warnings } = report.map_err(|trouble| LoadError::Refused {
        at: url.to_string(),
        message: trouble.to_string(),
    })?;
    Ok((objects, warnings))
}

/// All kinds are known alike.
fn say(shared: &Shared, knowledge: Knowledge) {
    shared.set_all_knowledge(KINDS.map(|kind| (kind, knowledge)));
}

/// Says how old the knowledge in use is, while it is not current.
async fn remind(every: std::time::Duration, shared: Shared, url: Arc<ReportUrl>) {
    let view = shared.view();
    loop {
        tokio::time::sleep(every).await;
        if let Some(since) = view.stale_since() {
            let age = super::age(since);
            tracing::warn!(%url, ?age, "Scope is not heard: names go on as they were known then");
        }
    }
}
