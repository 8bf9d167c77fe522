//! `microshield generate`: flow records in, a folder of policies out.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use anyhow::anyhow;
use flow::lost::Lost;

use super::{
    Failure, PolicyArgs,
    ask::{self, Talk},
    inputs::{Observed, Reading},
    output,
    report::Report,
    source::TopologyArgs,
};
use crate::{
    evaluate::{Policies, prove},
    flows::Input,
    folder,
    ledger::Edge,
    policy::{self, Namespaces, Plan, Reason},
    table,
};

/// Losses that are listed.
const MAX_LISTED: usize = 10;

/// Write policies that allow the connections in files of flow records, or in a ledger
///
/// With --json the panel talks on standard error.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder for the policies; what other hands put there stays
    #[arg(short, long, value_name = "FOLDER", env = "MICROSHIELD_OUTPUT")]
    output: Option<PathBuf>,

    /// Allow all connections of the chosen namespaces, without asking; without it, the panel asks
    #[arg(short, long, env = "MICROSHIELD_ALL")]
    all: bool,

    /// Write nothing as long as observations were lost, which a ledger tells, or lines of a file were skipped: policies
    /// may lack rules for them
    #[arg(long, env = "MICROSHIELD_STRICT")]
    strict: bool,

    // With it the proof tells of all pods, and not only of those with flows.
    #[command(flatten)]
    topology: TopologyArgs,

    #[command(flatten)]
    reading: Reading,

    #[command(flatten)]
    policy: PolicyArgs,
}

pub(super) fn run(args: Args) -> Result<(), Failure> {
    if args.all {
        // Before anything is read: wrong usage is to be told at once.
        args.policy.options()?;
        if args.output.is_none() {
            return Err(Failure::input(anyhow!(
                "--output FOLDER is missing: where are the policies to be written?"
            )));
        }
    } else if args.reading.flows.contains(&Input::Stdin) {
        return Err(Failure::input(anyhow!(
            "-f - needs -a: the panel reads its commands from standard input"
        )));
    }
    let observed = args.reading.flows()?;
    if args.strict {
        refuse_losses(&observed)?;
    }
    let edges = observed.edges.as_slice();
    let world = args.reading.world(&args.topology, edges)?;

    let Args {
        output: folder,
        all,
        mut policy,
        reading: Reading { json, .. },
        ..
    } = args;
    let mut talk = Talk::new(json);
    let folder = match folder {
        Some(folder) if all => folder,
        folder => ask::for_missing(&mut talk, &mut policy, folder, &known_namespaces(edges))?,
    };
    let options = policy.options()?;
    let connections = chosen(edges, &options.namespaces)?;
    let plan = policy::plan(edges, &options);
    if plan.rules().is_empty() {
        return Err(nothing_left(&connections, &plan));
    }
    let chosen = if all {
        plan.all()
    } else {
        match ask::for_selection(&mut talk, &plan)? {
            Some(chosen) => chosen,
            None => return Ok(()),
        }
    };
    let policies = Policies::compile(plan.manifests(&chosen)).map_err(Failure::other)?;
    let proof = prove(edges, &policies, &world);
    let files = plan.files(&chosen).map_err(Failure::other)?;
    let changes = folder::write(&folder, &files, &options.namespaces).map_err(Failure::other)?;
    drop(files);

    let report = Report {
        observed: &observed,
        connections: &connections,
        folder: &folder,
        changes: &changes,
        plan: &plan,
        chosen: &chosen,
        proof: &proof,
    };
    output::to_stdout(|to| match (json, all) {
        (true, _) => report.write_json(to),
        (false, true) => report.write_text(to),
        // The panel has shown the connections.
        (false, false) => report.write_summary(to),
    })
}

fn namespaces_of(edge: &Edge) -> impl Iterator<Item = &str> {
    [&edge.client, &edge.server]
        .into_iter()
        .filter_map(|end| end.namespace())
}

fn known_namespaces(edges: &[Edge]) -> BTreeSet<&str> {
    edges.iter().flat_map(namespaces_of).collect()
}

/// The edges with an end in the chosen namespaces. That there is none is a failure, and the folder stays as it is: a
/// mistyped namespace must not empty it.
fn chosen<'a>(edges: &'a [Edge], namespaces: &Namespaces) -> Result<Vec<&'a Edge>, Failure> {
    let chosen: Vec<&Edge> = edges
        .iter()
        .filter(|edge| namespaces_of(edge).any(|namespace| namespaces.contains(namespace)))
        .collect();
    if chosen.is_empty() {
        let known: Vec<&str> = known_namespaces(edges).into_iter().collect();
        let known = match known.len() {
            0 => "none at all".to_owned(),
            _ => format!("only of {}", known.join(", ")),
        };
        return Err(Failure::other(anyhow!(
            "no connection of the chosen namespaces in the flow records, {known}"
        )));
    }
    Ok(chosen)
}

/// Connections that all are left out empty no folder either: a filter that is too narrow is likelier than that all policies
/// are to go, and to apply none would open everything.
fn nothing_left(connections: &[&Edge], plan: &Plan<'_>) -> Failure {
    let mut by_reason = BTreeMap::<Reason, usize>::new();
    for notice in &plan.notices {
        *by_reason.entry(notice.reason).or_default() += 1;
    }
    let reasons: Vec<String> = by_reason
        .iter()
        .map(|(reason, count)| format!("; {count} {reason}"))
        .collect();
    Failure::other(anyhow!(
        "nothing was written, because no rule comes of the connections of the chosen namespaces ({}){}",
        connections.len(),
        reasons.concat(),
    ))
}

/// For whoever wants no policies that may lack something.
fn refuse_losses(observed: &Observed) -> Result<(), Failure> {
    let mut lines: Vec<String> = observed
        .losses
        .iter()
        .take(MAX_LISTED)
        .map(Lost::to_string)
        .collect();
    if let Some(more @ 1..) = observed.losses.len().checked_sub(MAX_LISTED) {
        lines.push(format!("and {more} more"));
    }
    let what = match (observed.lost(), observed.skipped) {
        (0, 0) => return Ok(()),
        (0, 1) => "1 line was skipped".to_owned(),
        // Of a ledger, which has no lines.
        (lost @ 1.., _) => format!("{lost} observations were lost"),
        (0, skipped) => format!("{skipped} lines were skipped"),
    };
    let lines: Vec<String> = lines
        .iter()
        .map(|line| format!("\n  {}", table::printable(line)))
        .collect();
    Err(Failure::other(anyhow!(
        "--strict: {what}, and policies may lack rules for them{}",
        lines.concat()
    )))
}
