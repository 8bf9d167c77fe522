//! Where the cluster's objects come from, and how the index is kept current.
//!
//! Behind the feature `source`: other than the rest of this crate it reads the clock, does I/O and starts tasks.

mod api;
mod feed;
mod file;
mod once;
mod scope;
mod view;

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::{Duration, SystemTime},
};

use tokio::task::JoinSet;

use self::view::Shared;
pub use self::{
    api::{Access, ConnectError, Kind, Pace, Scope, client},
    once::{LoadError, Warnings, load},
    scope::{ReportAt, ReportUrl},
    view::{Knowledge, View},
};
use crate::{
    time::Timestamp,
    topology::{file as file_topology, file::FileError, scope as report},
    transport::TlsError,
};

/// How often the index forgets what ended long ago.
const EXPIRE_EVERY: Duration = Duration::from_secs(10);

/// Where the cluster's objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The Kubernetes API.
    Kube,
    /// A file as [`crate::topology::file`] reads it, read again when it changes.
    File(PathBuf),
    /// Weave Scope's report, as [`crate::topology::scope`] reads it, asked for again and again.
    Scope(ReportAt),
}

impl Source {
    /// If it is an app of Scope, its certificate must come from the authorities in this file, instead of the system's.
    #[must_use]
    pub fn scope_ca(mut self, ca: Option<&Path>) -> Self {
        if let Self::Scope(ReportAt::App(url)) = &mut self {
            url.set_ca(ca.map(Path::to_owned));
        }
        self
    }
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "kube" => Ok(Self::Kube),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("file", _)) => Err("file= needs a path".to_owned()),
            Some(("scope", at)) => at.parse().map(Self::Scope),
            _ => Err(format!(
                "unknown source `{text}`: expected kube, file=PATH, scope=URL or scope=PATH"
            )),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kube => f.write_str("kube"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Scope(at) => write!(f, "scope={at}"),
        }
    }
}

/// What to read of the Kubernetes API, and how. A file and Scope's report are read whole.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to reach and convince the API server.
    pub access: Access,
    /// Which objects are of use.
    pub scope: Scope,
    /// Lists are asked for at a time drawn from this span, so that programs that are started at once in a whole cluster, or
    /// lose their watches at once, do not ask in step.
    pub jitter: Duration,
    /// How patient to be with the API server.
    pub pace: Pace,
}

/// Why there can be no topology.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not known how to reach the API server.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// What Scope's certificate must come from cannot be read.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// An index that is kept current until this is dropped.
#[derive(Debug)]
pub struct Topology {
    view: View,
    _tasks: JoinSet<()>,
}

impl Topology {
    /// Begins to read. A file is in the index when this returns; the Kubernetes API and Scope are waited for in the background: see
    /// [`View::is_ready`].
    ///
    /// # Errors
    /// If the file cannot be read, or if the configuration does not say how to reach an API server. That the API server
    /// cannot be reached is no error: it is tried again for as long as it takes.
    pub async fn start(source: &Source, options: Options) -> Result<Self, SourceError> {
        let (shared, view) = view::new();
        let mut tasks = JoinSet::new();
        match source {
            Source::File(path) => {
                tasks.spawn(file::start(path, file_topology::load, &shared)?);
            }
            Source::Scope(ReportAt::File(path)) => {
                tasks.spawn(file::start(path, report::load, &shared)?);
            }
            Source::Scope(ReportAt::App(url)) => scope::start(url, &options, &shared, &mut tasks)?,
            Source::Kube => api::start(options, &shared, &mut tasks).await?,
        }
        tasks.spawn(expire(shared));
        Ok(Self {
            view,
            _tasks: tasks,
        })
    }

    /// What is known. It stays usable, and stays as it is, when the topology is dropped.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }
}

async fn expire(shared: Shared) {
    loop {
        tokio::time::sleep(EXPIRE_EVERY).await;
        shared.write().expire(now());
    }
}

/// How long ago this was, in whole seconds.
fn age(since: Timestamp) -> Duration {
    let nanos = now().as_nanos().saturating_sub(since.as_nanos());
    Duration::from_secs(Duration::from_nanos(nanos).as_secs())
}

fn now() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read_as_they_are_written() {
        let scope = |at: &str| Source::Scope(at.parse().unwrap());
        for source in [
            Source::Kube,
            Source::File("/a=b".into()),
            scope("report.json"),
            scope("http://app:4040/api/report"),
        ] {
            assert_eq!(source.to_string().parse(), Ok(source));
        }
        for bad in [
            "",
            "file",
            "file=",
            "kubernetes",
            "kube=",
            "http=x",
            "scope",
            "scope=",
            "scope=ws://x/y",
        ] {
            assert!(bad.parse::<Source>().is_err(), "{bad}");
        }
    }
}
