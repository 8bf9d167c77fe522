//! What the commands read that judge: flow records, folders of policies, the cluster's objects.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::Args;
use flow::{record::Outcome, topology::file};

use super::{Failure, policy_args::namespace};
use crate::{
    evaluate::World,
    flows::{self, Input, OnBadLine},
    ledger::{Edge, Ledger},
    policy_files::{self, Folder},
};

/// How files are read.
#[derive(Debug, Args)]
pub(super) struct Reading {
    /// Where the cluster's objects come from, as `kubectl get namespaces,nodes,services,pods -A -o yaml` lists them: the
    /// labels of namespaces, the addresses and named ports of pods
    #[arg(long, value_name = "file=PATH", env = "MICROSHIELD_TOPOLOGY")]
    pub(super) topology: Option<TopologySource>,

    /// The namespace of policies that name none
    #[arg(
        long,
        value_name = "NAMESPACE",
        env = "MICROSHIELD_DEFAULT_NAMESPACE",
        value_parser = namespace
    )]
    default_namespace: Option<String>,

    /// Skip lines that are not flow records and objects that are not policies, and count them
    #[arg(long, env = "MICROSHIELD_KEEP_GOING")]
    keep_going: bool,

    /// Print the result as one JSON object
    #[arg(long, env = "MICROSHIELD_JSON")]
    pub(super) json: bool,
}

/// Where the cluster's objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TopologySource {
    /// A file.
    File(PathBuf),
}

/// The flow records of some files.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// The established connections.
    pub(super) edges: Vec<Edge>,
    /// How many attempts failed; they need not be allowed.
    pub(super) failed: u64,
    /// How many lines were skipped.
    pub(super) skipped: u64,
}

impl Reading {
    /// Reads flow records; what is skipped is said on standard error.
    pub(super) fn flows(&self, inputs: &[Input]) -> Result<Observed, Failure> {
        let on_bad_line = if self.keep_going {
            OnBadLine::Skip
        } else {
            OnBadLine::Refuse
        };
        let mut ledger = Ledger::default();
        let mut skipped = 0;
        for input in inputs {
            let summary = flows::read(input, on_bad_line, |record| {
                ledger.observe(record);
            })
            .map_err(Failure::input)?;
            for problem in &summary.problems {
                eprintln!("microshield: skipped: {problem}");
            }
            skipped += summary.skipped;
        }
        let failed = ledger
            .records()
            .filter(|record| record.outcome == Outcome::Failed)
            .fold(0_u64, |sum, record| sum.saturating_add(record.count));
        Ok(Observed {
            edges: ledger.edges(),
            failed,
            skipped,
        })
    }

    /// Reads a folder of policies; what is skipped is said on standard error.
    pub(super) fn policies(&self, folder: &Path) -> Result<Folder, Failure> {
        let options = policy_files::Options {
            keep_going: self.keep_going,
            namespace: self.default_namespace.as_deref(),
        };
        let folder = policy_files::read(folder, options).map_err(Failure::input)?;
        for problem in &folder.problems {
            eprintln!("microshield: skipped: {problem}");
        }
        Ok(folder)
    }

    /// The world of the edges, with what the topology says of it.
    pub(super) fn world(&self, edges: &[Edge]) -> Result<World, Failure> {
        let mut world = match &self.topology {
            None => World::default(),
            Some(TopologySource::File(path)) => {
                let loaded = file::load(path).map_err(Failure::input)?;
                for warning in &loaded.warnings {
                    eprintln!("microshield: {warning}");
                }
                World::of_objects(&loaded.objects)
            }
        };
        world.add_edges(edges);
        Ok(world)
    }
}

impl FromStr for TopologySource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("file", _)) => Err("file= needs a path".to_owned()),
            _ => Err(format!("unknown source `{text}`: expected file=PATH")),
        }
    }
}
