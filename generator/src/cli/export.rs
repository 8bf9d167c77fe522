//! `microshield export`: what the ledger holds, as flow records or as edges.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use super::{Failure, inputs, output, remote::Remote, report};
use crate::{ledger::Ledger, status::LossStatus, store::State, table};

/// Write what a ledger holds, also while `serve` runs on it
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder in which the ledger is kept
    #[arg(
        long,
        value_name = "DIR",
        env = "MICROSHIELD_DATA_DIR",
        required_unless_present_any = ["url", "from_cluster"]
    )]
    data_dir: Option<PathBuf>,

    #[command(flatten)]
    remote: Remote,

    /// File to write, instead of standard output
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Write connections, both ends joined, as a table; not flow records
    #[arg(long)]
    edges: bool,

    /// Write connections as JSON, one object a line
    #[arg(long, requires = "edges")]
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
            (ledger, losses.iter().map(LossStatus::from).collect())
        }
        None => (Ledger::default(), Vec::new()),
    };
    for loss in &losses {
        eprintln!("microshield: {loss}");
    }
    let form = match (args.edges, args.json) {
        (false, _) => Form::Records,
        (true, false) => Form::Table,
        (true, true) => Form::Edges,
    };
    match &args.output {
        Some(file) => output::to_file(file, |to| write(&ledger, form, to)),
        None => output::to_stdout(|to| write(&ledger, form, to)),
    }
}

/// How the ledger is written.
#[derive(Clone, Copy)]
enum Form {
    /// Flow records, one JSON object a line, in the order of their keys.
    Records,
    /// Edges, likewise, in the order of their names.
    Edges,
    /// Edges for people.
    Table,
}

fn write(ledger: &Ledger, form: Form, to: &mut dyn Write) -> io::Result<()> {
    match form {
        Form::Records => {
            for record in ledger.records() {
                serde_json::to_writer(&mut *to, &record)?;
                to.write_all(b"\n")?;
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
