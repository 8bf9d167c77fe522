//! `--stdout`: flow records as JSON lines.

use std::io::{self, BufWriter, Write as _};

use tokio::sync::mpsc;

use crate::collector::Report;

/// Prints every record until no more reports come, or nobody reads.
///
/// # Errors
/// If standard output cannot be written to; that its reader has gone is no error.
pub fn print(mut reports: mpsc::Receiver<Report>) -> io::Result<()> {
    while let Some(report) = reports.blocking_recv() {
        match write(&report) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
        if let Some(receipt) = report.receipt {
            receipt.handed_over();
        }
    }
    Ok(())
}

fn write(report: &Report) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for record in &report.records {
        serde_json::to_writer(&mut out, record)?;
        out.write_all(b"\n")?;
    }
    out.flush()
}
