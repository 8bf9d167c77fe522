//! `microshield link`: the log of the modified Weave Scope probe in, flow records out.

use std::{
    io::{self, Write},
    num::NonZeroUsize,
    path::PathBuf,
    thread::available_parallelism,
};

use super::{Failure, output::WholeFile, source::Source};
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

    /// Whose the addresses are: file=PATH (of `kubectl get namespaces,pods,services,endpointslices,nodes -A -o yaml`) or
    /// scope=FILE (of Weave Scope's `/api/report`)
    #[arg(long, value_name = "SRC", env = "MICROSHIELD_TOPOLOGY")]
    topology: Source,

    /// File to write, instead of standard output
    #[arg(short, long, value_name = "FILE", env = "MICROSHIELD_OUTPUT")]
    output: Option<PathBuf>,

    /// Write connections with one end outside the cluster too
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
    let (objects, now) = args.topology.load().map_err(Failure::input)?;
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
    let summary = match &args.output {
        Some(path) => {
            let mut file = WholeFile::create(path)?;
            let summary = link(args, &topology, options, &mut file)?;
            file.persist()?;
            summary
        }
        None => match link::link(&args.log, &topology, options, io::stdout().lock()) {
            // A reader that has seen enough and closed the pipe.
            Err(LinkError::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Ok(());
            }
            result => result.map_err(failure)?,
        },
    };
    report(&summary);
    Ok(())
}

fn link(
    args: &Args,
    topology: &Topology,
    options: Options,
    records: impl Write,
) -> Result<Summary, Failure> {
    link::link(&args.log, topology, options, records).map_err(failure)
}

fn failure(error: LinkError) -> Failure {
    match error {
        LinkError::Log(_) => Failure::input(error),
        LinkError::Write(_) => Failure::other(error),
    }
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
