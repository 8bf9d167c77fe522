//! `microshield export`: what the ledger holds, as flow records or as edges.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use anyhow::anyhow;
use flow::lost::Lost;

use super::{Failure, inputs, output, remote::Remote, report};
use crate::{ledger::Ledger, status, store::State, table};

/// Write what a ledger holds, also while `serve` runs on it
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder in which the ledger is kept
    #[arg(long, value_name = "DIR", env = "MICROSHIELD_DATA_DIR")]
    data_dir: Option<PathBuf>,

    #[command(flatten)]
    remote: Remote,

    /// File to write, instead of standard output
    #[arg(short, long, value_name = "FILE", env = "MICROSHIELD_EXPORT_OUTPUT")]
    output: Option<PathBuf>,

    /// Write connections, both ends joined, as a table; not flow records
    #[arg(long, env = "MICROSHIELD_EXPORT_EDGES")]
    edges: bool,

    /// Write connections as JSON, one object a line
    #[arg(long, requires = "edges", env = "MICROSHIELD_EXPORT_JSON")]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let (ledger, losses) = match &args.data_dir {
        _ if args.remote.is_named() => {
            let (ledger, summary) = inputs::read_generator(&args.remote)?;
            (ledger, summary.losses)
        }
        Some(directory) => {
            let State { ledger, losses, .. } = inputs::read_ledger(directory)?;
            (ledger, losses.iter().map(status::lost).collect())
        }
        None => {
            return Err(Failure::input(anyhow!(
                "a ledger is missing: --from-cluster, --url URL, or --data-dir DIR"
            )));
        }
    };
    for loss in &losses {
        eprintln!("microshield: {loss}");
    }
    let form = match (args.edges, args.json) {
        (false, _) => Form::Records,
        (true, false) => Form::Table,
        (true, true) => Form::Edges,
    };
    let path = args.output.as_deref();
    output::to(path, |to| {
        let written = write(&ledger, &losses, form, to);
        written.map_err(|error| output::cannot_write(path, error))
    })?;
    Ok(())
}

/// How the ledger is written.
#[derive(Clone, Copy)]
enum Form {
    /// Flow records, one JSON object a line, in the order of their keys; then what was lost, likewise.
    Records,
    /// Edges, likewise, in the order of their names.
    Edges,
    /// Edges for people.
    Table,
}

fn write(ledger: &Ledger, losses: &[Lost], form: Form, to: &mut dyn Write) -> io::Result<()> {
    match form {
        Form::Records => {
            for record in ledger.records() {
                serde_json::to_writer(&mut *to, &record)?;
                to.write_all(b"\n")?;
            }
            for lost in losses {
                lost.write_line(&mut *to)?;
            }
        }
        Form::Edges => {
            for edge in &ledger.edges() {
                serde_json::to_writer(&mut *to, &report::Connection::from(edge))?;
                to.write_all(b"\n")?;
            }
        }
        Form::Table => table::write_connections(&ledger.edges(), to)?,
    }
    Ok(())
}
