//! What is fed, and what must come of it.

use std::collections::BTreeMap;

use agent::collector::Report;
use anyhow::Result;
use flow::{record::FlowRecord, time::Timestamp, wire::Window};
use serde_json::json;

/// Ports from here on are edges that all drains share.
const SHARED: u16 = 60_000;
/// How many of them there are.
const EDGES: u64 = 40;

/// Connections by server port.
pub(crate) type Counts = BTreeMap<u16, u64>;

/// Drain `number`, from 1: one connection to a port of its own, by which it is recognised, and some to shared ones. It is
/// one batch, so it is in a ledger wholly or not at all.
pub(crate) fn report(number: u64) -> Result<Report> {
    let moment = Timestamp::from_nanos((1_000_000 + number) * 1_000_000_000);
    Ok(Report {
        window: Window {
            from: moment,
            to: moment,
        },
        records: counts(number)
            .into_iter()
            .map(|(port, count)| record(port, count, 1_000_000 + number))
            .collect::<Result<_>>()?,
        losses: BTreeMap::new(),
        receipt: None,
    })
}

fn counts(number: u64) -> Counts {
    let own = u16::try_from(number).unwrap_or(SHARED - 1);
    let shared = (0..number % 7).map(|step| {
        let edge = (number * 11 + step * 3) % EDGES;
        (
            SHARED + u16::try_from(edge).unwrap_or(0),
            number % 5 + step + 1,
        )
    });
    shared.chain([(own, 1)]).collect()
}

pub(crate) fn record(port: u16, count: u64, second: u64) -> Result<FlowRecord> {
    Ok(serde_json::from_value(json!({
        "timestamp": second, "hostname": "node-1", "count": count, "direction": "egress", "sources": ["ebpf"],
        "tuple": {"src_addr": "10.0.1.2", "src_port": 0, "dst_addr": "10.0.2.3", "dst_port": port},
        "src": {"pod": {"id": "1;<pod>", "namespace": "shop", "name": "web-1", "labels": {"app": "web"}}, "service": {}},
        "dst": {"pod": {"id": "2;<pod>", "namespace": "shop", "name": "db-1", "labels": {"app": "db"}}, "service": {}},
    }))?)
}

/// Compares a ledger with what was fed: every drain that was `taken` is in it, any other that is in it was `fed`, and the
/// counts are those of the drains that are in it, each once.
pub(crate) fn check(ledger: &Counts, taken: &[u64], fed: u64) -> Result<()> {
    let mut expected = Counts::new();
    for number in 1..=fed {
        let own = u16::try_from(number)?;
        let is_in = ledger.contains_key(&own);
        anyhow::ensure!(is_in || !taken.contains(&number), "drain {number} is lost");
        if is_in {
            for (port, count) in counts(number) {
                *expected.entry(port).or_default() += count;
            }
        }
    }
    for port in ledger.keys().chain(expected.keys()) {
        let (has, should) = (ledger.get(port), expected.get(port));
        anyhow::ensure!(has == should, "port {port}: {has:?}, not {should:?}");
    }
    Ok(())
}
