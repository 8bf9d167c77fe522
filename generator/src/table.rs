//! Edges as a table for people.

use std::net::IpAddr;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use flow::{endpoint::Endpoint, time::Timestamp};

use crate::ledger::Edge;

/// The edges as a table with one line each, in their order, without colours or lines that depend on a terminal.
#[must_use]
pub fn connections<'a>(edges: impl IntoIterator<Item = &'a Edge>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(["CLIENT", "SERVER", "PORT", "COUNT", "SEEN BY", "LAST SEEN"]);
    for edge in edges {
        table.add_row([
            Cell::new(end(&edge.client, edge.client_address)),
            Cell::new(end(&edge.server, edge.server_address)),
            Cell::new(format_args!("{}/{}", edge.port, edge.protocol)),
            Cell::new(edge.count()).set_alignment(CellAlignment::Right),
            Cell::new(seen_by(edge)),
            Cell::new(time(edge.last_seen)),
        ]);
    }
    if let Some(column) = table.column_mut(0) {
        column.set_padding((0, 1));
    }
    table.trim_fmt()
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

/// Which sides saw the connections: `client`, `server` or `both`.
#[must_use]
pub fn seen_by(edge: &Edge) -> &'static str {
    match (edge.seen_by_client, edge.seen_by_server) {
        (_, 0) => "client",
        (0, _) => "server",
        _ => "both",
    }
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
