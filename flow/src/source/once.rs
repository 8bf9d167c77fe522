//! The cluster's objects as they are now, for a program that asks once.

use super::{Options, ReportAt, Source, SourceError, api, scope};
use crate::topology::{
    Objects,
    file::{self, Loaded},
    scope as report,
};

/// What is wrong with single objects, or that some may not be read.
pub type Warnings = Vec<String>;

/// Why there are no objects.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The source cannot be used.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The Kubernetes API or Scope's app did not give them.
    #[error("{at}: {message}")]
    Refused {
        /// Which.
        at: String,
        /// What it said, or why it said nothing.
        message: String,
    },
}

/// Reads all objects of a source that are in scope.
///
/// # Errors
/// If it cannot be asked, or does not tell of the pods. Kinds that the API server does not let us list are missing, and a
/// warning says so.
pub async fn load(source: &Source, options: &Options) -> Result<(Objects, Warnings), LoadError> {
    let of_file = |Loaded {
                       objects, warnings, ..
                   }| (objects, warnings);
    match source {
        Source::File(path) => Ok(of_file(file::load(path).map_err(SourceError::from)?)),
        Source::Scope(ReportAt::File(path)) => {
            Ok(of_file(report::load(path).map_err(SourceError::from)?))
        }
        Source::Scope(ReportAt::App(url)) => scope::load(url, options).await,
        Source::Kube => api::load(options).await,
    }
}
