//! What several commands read: flow records, folders of policies, the cluster's objects.

use std::{
    collections::BTreeSet,
    io::BufReader,
    path::{Path, PathBuf},
};

use super::{Failure, policy_args::namespace, remote::Remote, source::TopologyArgs};
use crate::{
    evaluate::{BeyondFlows, Policies, World},
    flows::{self, Input, OnBadLine, Summary},
    ledger::{Edge, Ledger},
    policy_files::{self, Folder},
    status::{self, EXPORT_PATH},
    store::{self, State},
    table::printable,
};
use anyhow::{Context as _, anyhow};
use clap::Args;
use flow::{lost::Lost, record::Outcome};

/// Labels and names that are listed in a hint.
const MAX_LISTED: usize = 10;

/// How input is read and output is written.
#[derive(Debug, Args)]
pub(super) struct Reading {
    /// File of flow records, one JSON object a line; `-` is standard input; may be repeated
    #[arg(
        short = 'f',
        long = "flows",
        value_name = "FILE",
        env = "MICROSHIELD_FLOWS"
    )]
    pub(super) flows: Vec<Input>,

    #[command(flatten)]
    pub(super) remote: Remote,

    /// Folder of a ledger to read, also while `serve` runs on it
    #[arg(long, value_name = "DIR", env = "MICROSHIELD_DATA_DIR")]
    data_dir: Option<PathBuf>,

    /// Skip lines that are not flow records and objects that are not policies, and count them
    #[arg(long, env = "MICROSHIELD_KEEP_GOING")]
    keep_going: bool,

    /// Print the result as one JSON object
    #[arg(long, env = "MICROSHIELD_JSON")]
    pub(super) json: bool,
}

/// What policies are judged with, besides flow records.
#[derive(Debug, Args)]
pub(super) struct Judging {
    #[command(flatten)]
    pub(super) topology: TopologyArgs,

    /// The namespace of policies that name none
    #[arg(
        long,
        value_name = "NAMESPACE",
        env = "MICROSHIELD_DEFAULT_NAMESPACE",
        value_parser = namespace
    )]
    default_namespace: Option<String>,

    #[command(flatten)]
    pub(super) reading: Reading,
}

/// What flow records say.
#[derive(Debug, Default)]
pub(super) struct Observed {
    /// The established connections.
    pub(super) edges: Vec<Edge>,
    /// How many records there were; of a ledger, how many it keeps.
    pub(super) records: u64,
    /// How many attempts failed; they need not be allowed.
    pub(super) failed: u64,
    /// How many lines were skipped.
    pub(super) skipped: u64,
    /// What agents said that they lost; only a ledger knows.
    pub(super) losses: Vec<Lost>,
}

impl Observed {
    /// How many observations were lost in all.
    pub(super) fn lost(&self) -> u64 {
        let counts = self.losses.iter().map(|lost| lost.count);
        counts.fold(0, u64::saturating_add)
    }

    /// Adds what was said of one input.
    fn add(&mut self, summary: Summary) {
        for problem in &summary.problems {
            eprintln!("microshield: skipped: {problem}");
        }
        self.records += summary.records;
        self.skipped += summary.skipped;
        self.losses.extend(summary.losses);
    }
}

impl Reading {
    /// Says whether there is anything to read flow records from.
    pub(super) fn has_flows(&self) -> bool {
        !self.flows.is_empty() || self.remote.is_named() || self.data_dir.is_some()
    }

    /// Reads flow records; what is skipped is said on standard error.
    ///
    /// # Errors
    /// If neither files nor a ledger are given, or one cannot be read.
    pub(super) fn flows(&self) -> Result<Observed, Failure> {
        let mut observed = Observed::default();
        let ledger = match &self.data_dir {
            _ if !self.flows.is_empty() => self.files(&mut observed)?,
            _ if self.remote.is_named() => {
                let (ledger, summary) = read_generator(&self.remote)?;
                observed.add(summary);
                ledger
            }
            Some(directory) => {
                let State { ledger, losses, .. } = read_ledger(directory)?;
                observed.records = ledger.len() as u64;
                observed.losses = losses.iter().map(status::lost).collect();
                ledger
            }
            None => {
                return Err(Failure::input(anyhow!(
                    "flow records are missing: -f FILE, --from-cluster, --url URL, or --data-dir DIR"
                )));
            }
        };
        observed.failed = ledger
            .records()
            .filter(|record| record.outcome == Outcome::Failed)
            .fold(0_u64, |sum, record| sum.saturating_add(record.count));
        observed.edges = ledger.edges();
        Ok(observed)
    }

    fn files(&self, observed: &mut Observed) -> Result<Ledger, Failure> {
        let mut ledger = Ledger::default();
        for input in &self.flows {
            let summary = flows::read(input, self.on_bad_line(), |record| {
                ledger.observe(record);
            })
            .map_err(Failure::input)?;
            observed.add(summary);
        }
        Ok(ledger)
    }

    /// The world of the edges, with what a topology says of it.
    ///
    /// # Errors
    /// If the topology cannot be read.
    pub(super) fn world(&self, topology: &TopologyArgs, edges: &[Edge]) -> Result<World, Failure> {
        let mut world = match topology.load(self.remote.kube())? {
            None => World::default(),
            Some((objects, _)) => World::of_objects(&objects),
        };
        world.add_edges(edges);
        Ok(world)
    }

    fn on_bad_line(&self) -> OnBadLine {
        if self.keep_going {
            OnBadLine::Skip
        } else {
            OnBadLine::Refuse
        }
    }
}

impl Judging {
    /// Reads a folder of policies; what is skipped is said on standard error.
    ///
    /// # Errors
    /// If it cannot be read, or holds what is no policy unless that is skipped.
    pub(super) fn policies(&self, folder: &Path) -> Result<Folder, Failure> {
        let options = policy_files::Options {
            keep_going: self.reading.keep_going,
            namespace: self.default_namespace.as_deref(),
        };
        let folder = policy_files::read(folder, options).map_err(Failure::input)?;
        for problem in &folder.problems {
            eprintln!("microshield: skipped: {problem}");
        }
        Ok(folder)
    }

    /// The world of the edges, with what the topology says of it.
    ///
    /// # Errors
    /// If the topology cannot be read.
    pub(super) fn world(&self, edges: &[Edge]) -> Result<World, Failure> {
        self.reading.world(&self.topology, edges)
    }

    /// Says on standard error, and returns for programs, what the policies ask for that flow records do not tell. There is
    /// nothing to say where a topology tells it.
    pub(super) fn hints(&self, policies: &[&Policies]) -> Vec<String> {
        if self.topology.is_given() {
            return Vec::new();
        }
        let beyond: Vec<BeyondFlows<'_>> = policies
            .iter()
            .map(|policies| policies.beyond_flows())
            .collect();
        let labels = beyond.iter().flat_map(|beyond| &beyond.namespace_labels);
        let ports = beyond.iter().flat_map(|beyond| &beyond.port_names);
        let hints: Vec<String> = [
            hint(labels.copied().collect(), "namespaces", "labels"),
            hint(ports.copied().collect(), "ports of pods", "names"),
        ]
        .into_iter()
        .flatten()
        .collect();
        for hint in &hints {
            eprintln!("microshield: {hint}");
        }
        hints
    }
}

/// What is said where policies ask for these labels or names.
fn hint(asked_for: BTreeSet<&str>, of: &str, what: &str) -> Option<String> {
    let more = asked_for.len().checked_sub(MAX_LISTED);
    let mut listed: Vec<String> = asked_for
        .into_iter()
        .take(MAX_LISTED)
        .map(|name| format!("`{}`", printable(name)))
        .collect();
    if let Some(more @ 1..) = more {
        listed.push(format!("{more} more"));
    }
    (!listed.is_empty()).then(|| {
        format!(
            "policies ask for {what} of {of} that flow records do not tell, and are judged as if there were none of them: \
             {}; --topology SRC tells them",
            listed.join(", ")
        )
    })
}

/// Reads the whole ledger of a running generator.
///
/// # Errors
/// If it does not hand it out.
pub(super) fn read_generator(remote: &Remote) -> Result<(Ledger, Summary), Failure> {
    let answer = remote.get(EXPORT_PATH).map_err(Failure::input)?;
    let reader = BufReader::with_capacity(1 << 16, answer);
    let mut ledger = Ledger::default();
    let summary = flows::read_lines(reader, &remote.place(), OnBadLine::Refuse, |record| {
        ledger.observe(record);
    });
    Ok((ledger, summary.map_err(Failure::input)?))
}

/// Reads all that a ledger holds.
///
/// # Errors
/// If there is none, or it cannot be read.
pub(super) fn read_ledger(directory: &Path) -> Result<State, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
        .map_err(Failure::other)?;
    runtime
        .block_on(store::read(directory))
        .map_err(Failure::input)
}
