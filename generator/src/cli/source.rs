//! Where the cluster's objects come from.

use std::{path::PathBuf, str::FromStr, time::SystemTime};

use flow::{
    time::Timestamp,
    topology::{
        Objects,
        file::{self, FileError},
        scope,
    },
};

/// `SRC` on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A file as `kubectl get -o yaml` writes it.
    File(PathBuf),
    /// A report of Weave Scope, in JSON or MessagePack.
    Scope(PathBuf),
}

impl Source {
    /// Reads the objects, and says when. What is wrong with single ones goes to standard error.
    ///
    /// # Errors
    /// If there is nothing that could be read.
    pub(super) fn load(&self) -> Result<(Objects, Timestamp), FileError> {
        let loaded = match self {
            Self::File(path) => file::load(path)?,
            Self::Scope(path) => scope::load(path)?,
        };
        for warning in &loaded.warnings {
            eprintln!("microshield: {warning}");
        }
        Ok((loaded.objects, Timestamp::from(SystemTime::now())))
    }
}

impl FromStr for Source {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((_, "")) => Err("the path is missing"),
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(("scope", path)) => Ok(Self::Scope(path.into())),
            _ => Err("a source is file=PATH or scope=FILE"),
        }
    }
}
