//! Edges as a table for people.

use std::{
    io::{self, Write},
    iter,
    net::IpAddr,
    time::Duration,
};

use flow::{endpoint::Endpoint, time::Timestamp};

use crate::{ledger::Edge, policy::SeenBy};

const COLUMNS: [&str; 6] = ["CLIENT", "SERVER", "PORT", "COUNT", "SEEN BY", "LAST SEEN"];

/// The edges as a table with one line each, in their order, without colours or lines that depend on a terminal. A large
/// cluster's is longer than what it is made of, so no line but one is in memory.
///
/// # Errors
/// If it cannot be written.
pub fn write_connections<'a>(
    edges: impl IntoIterator<Item = &'a Edge> + Clone,
    to: &mut dyn Write,
) -> io::Result<()> {
    let mut widths = COLUMNS.map(str::len);
    for edge in edges.clone() {
        for (width, cell) in widths.iter_mut().zip(cells(edge)) {
            *width = cell.chars().count().max(*width);
        }
    }
    let header = COLUMNS.map(str::to_owned);
    let mut line = String::new();
    for row in [header].into_iter().chain(edges.into_iter().map(cells)) {
        line.clear();
        for (place, (cell, width)) in row.iter().zip(widths).enumerate() {
            let gap = if place == 0 { "" } else { "  " };
            let padding = width - cell.chars().count();
            let (before, after) = if COLUMNS[place] == "COUNT" {
                (padding, 0)
            } else {
                (0, padding)
            };
            line.push_str(gap);
            line.extend(iter::repeat_n(' ', before));
            line.push_str(cell);
            line.extend(iter::repeat_n(' ', after));
        }
        writeln!(to, "{}", line.trim_end())?;
    }
    Ok(())
}

fn cells(edge: &Edge) -> [String; COLUMNS.len()] {
    [
        end(&edge.client, edge.client_address),
        end(&edge.server, edge.server_address),
        format!("{}/{}", edge.port, edge.protocol),
        edge.count().to_string(),
        SeenBy::of(edge).name().to_owned(),
        time(edge.last_seen),
    ]
}

fn end(endpoint: &Endpoint, address: IpAddr) -> String {
    let name = match endpoint {
        Endpoint::Node(_) => format!("{endpoint} ({address})"),
        _ => endpoint.to_string(),
    };
    printable(&name)
}

/// Names come from the network: what is none for Kubernetes must not control a terminal.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// In UTC, to the second.
#[must_use]
pub fn time(time: Timestamp) -> String {
    let seconds = i64::try_from(time.as_nanos() / 1_000_000_000).unwrap_or(i64::MAX);
    match jiff::Timestamp::from_second(seconds) {
        Ok(time) => time.to_string(),
        // After the year 9999, which no record can hold.
        Err(_) => seconds.to_string(),
    }
}

/// The largest unit of which there is at least one, rounded down: `7d`, `23h`, `5m`, `0s`.
#[must_use]
pub fn rounded(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let units = [(24 * 60 * 60, 'd'), (60 * 60, 'h'), (60, 'm')];
    let unit = units.into_iter().find(|(length, _)| seconds >= *length);
    let (length, name) = unit.unwrap_or((1, 's'));
    format!("{}{name}", seconds / length)
}
