//! Records as text: what [`FlowRecord`](flow::record::FlowRecord) gives as JSON, without making one for each line.

use std::net::SocketAddr;

use flow::{
    record::Direction,
    scope_log::{Connection, Seen},
    time::Timestamp,
};

use super::names::{Name, Names};

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rendered {
    Record,
    /// Loopback: it never leaves its pod or node.
    Loopback,
    /// An end is not known.
    Outside,
    /// Seen where it was made, and to be told of by who accepts it or by a node that tracks it; or by no pod.
    Accepted,
}

/// Appends the record of a connection, and a line feed. With `external`, one end may be unknown.
pub(super) fn render(
    connection: &Connection<'_>,
    names: &mut Names<'_>,
    external: bool,
    text: &mut Vec<u8>,
) -> serde_json::Result<Rendered> {
    let Connection {
        time,
        hostname,
        client,
        server,
        seen,
    } = connection;
    if client.ip().is_loopback() || server.ip().is_loopback() {
        return Ok(Rendered::Loopback);
    }
    if matches!(seen, Seen::Connected(_)) && names.is_virtual(*server, *time) {
        return Ok(Rendered::Accepted);
    }
    let (src, dst) = names.both(client.ip(), (server.ip(), server.port()), *time)?;
    let unknown = [src, dst].iter().filter(|name| !name.is_known).count();
    if matches!(seen, Seen::Connected(_)) && (dst.is_known || !src.is_known) {
        return Ok(Rendered::Accepted);
    }
    if unknown > usize::from(external) {
        return Ok(Rendered::Outside);
    }

    let called = match seen {
        Seen::Accepted(_) | Seen::Connected(_) => server,
        Seen::Tracked { called, .. } => called,
    };
    let put = |text: &mut Vec<u8>, part: &str| text.extend_from_slice(part.as_bytes());
    put(text, "{\"timestamp\":");
    seconds(text, *time);
    put(text, ",\"hostname\":");
    serde_json::to_writer(&mut *text, hostname)?;
    put(text, ",\"tuple\":{\"src_addr\":\"");
    put(text, &src.address);
    put(text, "\",\"src_port\":");
    decimal(text, u64::from(client.port()));
    put(text, ",\"dst_addr\":\"");
    if called.ip() == server.ip() {
        put(text, &dst.address);
    } else {
        put(text, &called.ip().to_string());
    }
    put(text, "\",\"dst_port\":");
    decimal(text, u64::from(server.port()));
    put(text, "},\"src\":");
    put(text, &src.json);
    put(text, ",\"dst\":");
    put(text, &dst.json);
    put(text, ",\"protocol\":\"TCP\",\"direction\":\"");
    put(
        text,
        match direction(hostname, seen, src, dst) {
            Direction::Egress => "egress",
            Direction::Ingress => "ingress",
        },
    );
    put(
        text,
        "\",\"outcome\":\"established\",\"count\":1,\"first_seen\":",
    );
    seconds(text, *time);
    put(text, ",\"last_seen\":");
    seconds(text, *time);
    if let Seen::Accepted(socket) | Seen::Connected(socket) = seen {
        put(text, ",\"process\":{\"pid\":");
        decimal(text, u64::from(socket.pid));
        put(text, ",\"comm\":");
        serde_json::to_writer(&mut *text, socket.comm)?;
        put(text, "}");
    }
    put(text, ",\"sources\":[\"scope\"]");
    if called != server {
        via(text, called)?;
    }
    put(text, "}\n");
    Ok(Rendered::Record)
}

/// A node that tracks connections sees those that its pods open, and those that come to its pods from elsewhere. Nobody's
/// address is elsewhere, even where it is not known on which node the pods are.
fn direction(hostname: &str, seen: &Seen<'_>, src: &Name, dst: &Name) -> Direction {
    let is_here = |name: &Name| name.node.as_deref() == Some(hostname);
    match seen {
        Seen::Accepted(_) => Direction::Ingress,
        Seen::Connected(_) => Direction::Egress,
        Seen::Tracked { .. } if !src.is_known => Direction::Ingress,
        Seen::Tracked { .. } if is_here(dst) && !is_here(src) => Direction::Ingress,
        Seen::Tracked { .. } => Direction::Egress,
    }
}

fn via(text: &mut Vec<u8>, called: &SocketAddr) -> serde_json::Result<()> {
    text.extend_from_slice(b",\"via\":");
    serde_json::to_writer(&mut *text, called)
}

/// As [`Timestamp`] is written: whole microseconds, without zeros at the end but for the first after the point.
fn seconds(text: &mut Vec<u8>, time: Timestamp) {
    let micros = time.as_nanos() / 1_000;
    decimal(text, micros / 1_000_000);
    text.push(b'.');
    let mut fraction = micros % 1_000_000;
    let mut unit = 100_000;
    loop {
        text.push(digit(fraction / unit));
        fraction %= unit;
        unit /= 10;
        if fraction == 0 {
            break;
        }
    }
}

fn decimal(text: &mut Vec<u8>, mut number: u64) {
    let start = text.len();
    loop {
        text.push(digit(number % 10));
        number /= 10;
        if number == 0 {
            break;
        }
    }
    text[start..].reverse();
}

/// Of a number below ten.
fn digit(number: u64) -> u8 {
    b"0123456789"[(number % 10) as usize]
}
