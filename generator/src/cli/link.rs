//! `microshield link`: the log of the modified Weave Scope probe in, flow records out.

use std::{num::NonZeroUsize, path::PathBuf, thread::available_parallelism};

use anyhow::anyhow;

use super::{
    Failure, output,
    source::{Kube, TopologyArgs},
};
use crate::{
    flows::{Input, OnBadLine},
    link::{self, LinkError, Options, Summary, Topology},
};

/// Make flow records of the log of the modified Weave Scope probe
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The probe's log; `-` is standard input
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_PROBE_LOG")]
    log: Input,

    #[command(flatten)]
    topology: TopologyArgs,

    #[command(flatten)]
    kube: Kube,

    /// File to write, instead of standard output
    #[arg(short, long, value_name = "FILE", env = "MICROSHIELD_LINK_OUTPUT")]
    output: Option<PathBuf>,

    /// Write connections with one end outside the cluster too: those that come from there, and those that are made to there
    #[arg(long, env = "MICROSHIELD_EXTERNAL")]
    external: bool,

    /// Skip malformed lines, and count them
    #[arg(long, env = "MICROSHIELD_KEEP_GOING")]
    keep_going: bool,

    /// How many threads read lines; as many as there are processors if not given
    #[arg(long, value_name = "N", env = "MICROSHIELD_THREADS")]
    threads: Option<NonZeroUsize>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let (objects, now) = args.topology.load(&args.kube)?.ok_or_else(|| {
        Failure::input(anyhow!(
            "--topology SRC is missing: kube, file=PATH, scope=URL or scope=PATH"
        ))
    })?;
    let topology = Topology::new(objects, now);
    let options = Options {
        on_bad_line: if args.keep_going {
            OnBadLine::Skip
        } else {
            OnBadLine::Refuse
        },
        external: args.external,
        threads: args
            .threads
            .or_else(|| available_parallelism().ok())
            .unwrap_or(NonZeroUsize::MIN),
    };
    let path = args.output.as_deref();
    let summary = output::to(path, |records| {
        link::link(&args.log, &topology, options, records).map_err(|error| match error {
            LinkError::Log(_) => Failure::input(error),
            LinkError::Write(error) => output::cannot_write(path, error),
        })
    })?;
    if let Some(summary) = summary {
        report(&summary);
    }
    Ok(())
}

fn report(summary: &Summary) {
    for problem in &summary.problems {
        eprintln!("microshield: skipped: {problem}");
    }
    let Summary {
        lines,
        records,
        outside,
        skipped,
        ..
    } = summary;
    eprintln!("microshield: {records} records of {lines} lines");
    if *skipped > 0 {
        eprintln!("microshield: {skipped} malformed lines were skipped");
    }
    if *outside > 0 {
        eprintln!(
            "microshield: {outside} connections have an end that the topology does not know and were left out; \
             --external writes those whose other end it knows"
        );
    }
}
