//! `microshield export`: what the ledger holds, as flow records or as edges.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use super::{Failure, inputs, output, report};
use crate::{ledger::Ledger, table};

/// Write what a ledger holds, also while `serve` runs on it
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder in which the ledger is kept
    #[arg(long, value_name = "DIR", env = "MICROSHIELD_DATA_DIR")]
    data_dir: PathBuf,

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
    let state = inputs::read_ledger(&args.data_dir)?;
    for (node, reason, loss) in state.losses.iter() {
        eprintln!(
            "microshield: node {node}: {} observations lost: {reason}",
            loss.count
        );
    }
    let form = match (args.edges, args.json) {
        (false, _) => Form::Records,
        (true, false) => Form::Table,
        (true, true) => Form::Edges,
    };
    match &args.output {
        Some(file) => output::to_file(file, |to| write(&state.ledger, form, to)),
        None => output::to_stdout(|to| write(&state.ledger, form, to)),
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
                serde_json::to_writer(&mut *to, record)?;
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
