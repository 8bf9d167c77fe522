//! `--stdout`: flow records as JSON lines.

use std::io::{self, BufWriter, Write as _};

use flow::lost::Lost;
use tokio::sync::mpsc;

use crate::{collector::Report, metrics::Meter};

/// Prints every record, and what this node lost, until no more reports come, or nobody reads. Either is counted.
///
/// # Errors
/// If standard output cannot be written to; that its reader has gone is no error.
pub fn print(reports: mpsc::Receiver<Report>, node: &str, meter: &Meter) -> io::Result<()> {
    print_to(reports, node, meter, || io::stdout().lock())
}

fn print_to<W: io::Write>(
    mut reports: mpsc::Receiver<Report>,
    node: &str,
    meter: &Meter,
    output: impl Fn() -> W,
) -> io::Result<()> {
    while let Some(report) = reports.blocking_recv() {
        for (reason, count) in &report.losses {
            meter.lose(reason, *count);
        }
        match write(&report, node, output()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
        meter.add(Meter::count(&report));
        if let Some(receipt) = report.receipt {
            receipt.handed_over();
        }
    }
    Ok(())
}

fn write(report: &Report, node: &str, output: impl io::Write) -> io::Result<()> {
    let mut out = BufWriter::new(output);
    for record in &report.records {
        serde_json::to_writer(&mut out, record)?;
        out.write_all(b"\n")?;
    }
    for (reason, count) in &report.losses {
        let lost = Lost {
            node: node.to_owned(),
            reason: reason.clone(),
            count: *count,
        };
        lost.write_line(&mut out)?;
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use flow::{time::Timestamp, wire::Window};
    use serde_json::json;

    use super::*;
    use crate::capture::Losses;

    #[test]
    fn what_is_printed_and_what_is_lost_is_counted() {
        let (sender, reports) = mpsc::channel(2);
        let at = Timestamp::from_nanos(1);
        let record = json!({
            "timestamp": 7.0, "hostname": "vm", "src": {"pod": {}}, "dst": {"pod": {}}, "count": 5,
            "tuple": {"src_addr": "10.0.0.1", "src_port": 0, "dst_addr": "10.0.0.2", "dst_port": 80},
        });
        let losses = Losses::from([("flows_and_ring_full".to_owned(), 7)]);
        let report = Report {
            window: Window { from: at, to: at },
            records: vec![serde_json::from_value(record).unwrap()],
            losses,
            receipt: None,
        };
        sender.blocking_send(report).unwrap();
        drop(sender);
        let meter = Meter::default();
        let (mut reader, writer) = io::pipe().unwrap();
        print_to(reports, "vm", &meter, || &writer).unwrap();
        drop(writer);
        let mut printed = String::new();
        reader.read_to_string(&mut printed).unwrap();
        let lost = printed.lines().nth(1).map(str::as_bytes);
        let lost = lost.and_then(Lost::parse_line).unwrap();
        assert_eq!(
            lost.to_string(),
            "node vm: 7 observations lost: flows_and_ring_full"
        );
        assert_eq!(meter.lost("flows_and_ring_full"), 7);
        assert_eq!((meter.drains(), meter.connections()), (1, 5));
    }
}
