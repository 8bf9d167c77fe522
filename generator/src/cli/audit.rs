//! `microshield audit`: would a folder of policies let through what was seen?

use std::{fmt::Write as _, net::IpAddr, path::PathBuf};

use anyhow::anyhow;
use flow::endpoint::Endpoint;
use serde::Serialize;

use super::{Failure, inputs::Judging, output::print, report::Connection};
use crate::{
    evaluate::{Denial, Judge, Policies, Verdict, denials, known_as},
    ledger::Edge,
    table::printable,
};

/// Say which of the connections in files of flow records a folder of policies would block
///
/// Exits with 1 if a connection would be blocked, with 0 if none.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder of policies, ours or of other hands
    #[arg(short, long, value_name = "FOLDER", env = "MICROSHIELD_POLICIES")]
    policies: PathBuf,

    #[command(flatten)]
    judging: Judging,
}

#[derive(Serialize)]
struct Audit<'a> {
    policies: usize,
    skipped_objects: usize,
    skipped_lines: u64,
    failed_attempts: u64,
    hints: Vec<String>,
    allowed: usize,
    blocked: Vec<Blocked<'a>>,
}

#[derive(Serialize)]
struct Blocked<'a> {
    #[serde(flatten)]
    connection: Connection<'a>,
    denials: Vec<Denial>,
    #[serde(skip)]
    sentence: String,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let folder = args.judging.policies(&args.policies)?;
    let observed = args.judging.reading.flows()?;
    let policies = &folder.policies;
    // That nothing is blocked would be no answer.
    if policies.is_empty() {
        return Err(Failure::input(anyhow!(
            "{}: no policy in it (folders in it are not looked into)",
            args.policies.display()
        )));
    }
    if observed.records == 0 {
        return Err(Failure::input(anyhow!("no flow record was read")));
    }
    let world = args.judging.world(&observed.edges)?;
    let judge = Judge::new(&world, policies);
    let hints = args.judging.hints(&[policies]);

    let mut blocked = Vec::new();
    for edge in &observed.edges {
        let verdict = judge.verdict_on_edge(edge);
        if !verdict.is_allowed() {
            blocked.push(Blocked {
                connection: edge.into(),
                denials: denials(&verdict, policies),
                sentence: sentence(edge, &verdict, policies),
            });
        }
    }
    let audit = Audit {
        policies: policies.len(),
        skipped_objects: folder.skipped,
        skipped_lines: observed.skipped,
        failed_attempts: observed.failed,
        hints,
        allowed: observed.edges.len() - blocked.len(),
        blocked,
    };
    print(&if args.judging.reading.json {
        serde_json::to_string(&audit).map_err(Failure::other)? + "\n"
    } else {
        audit.text()
    })?;
    if audit.blocked.is_empty() {
        Ok(())
    } else {
        Err(Failure::Answered)
    }
}

impl Audit<'_> {
    fn text(&self) -> String {
        let mut text = String::new();
        for blocked in &self.blocked {
            text.push_str(&blocked.sentence);
            text.push('\n');
        }
        text.push_str(&format!(
            "flows: {} judged, {} allowed, {} would be blocked; failed attempts, not judged: {}; policies: {}",
            self.allowed + self.blocked.len(),
            self.allowed,
            self.blocked.len(),
            self.failed_attempts,
            self.policies,
        ));
        for (count, what) in [
            (self.skipped_lines, "lines"),
            (self.skipped_objects as u64, "objects"),
        ] {
            if count > 0 {
                text.push_str(&format!("; {what} skipped: {count}"));
            }
        }
        text.push('\n');
        text
    }
}

/// In the manner of Weave's network policy controller, which logs what it blocks.
fn sentence(edge: &Edge, verdict: &Verdict, policies: &Policies) -> String {
    let mut text = format!(
        "{} connection from {} to {} would be blocked: ",
        edge.protocol,
        end(&edge.client, edge.client_address),
        socket(&edge.server, edge.server_address, edge.port),
    );
    for (i, (direction, isolating)) in verdict.denials().enumerate() {
        let names: Vec<&str> = isolating
            .iter()
            .map(|policy| policies.get(*policy).name.as_str())
            .collect();
        let and = if i > 0 { ", and " } else { "" };
        // Writing to a string does not fail.
        if write!(
            text,
            "{and}{direction} of {} has no rule for it",
            listing(&names)
        )
        .is_err()
        {
            break;
        }
    }
    printable(&text)
}

fn end(endpoint: &Endpoint, address: IpAddr) -> String {
    match endpoint {
        Endpoint::Pod { pod, service } => {
            let name = known_as(pod, service.as_deref());
            format!("{}/{name} ({address})", pod.namespace)
        }
        Endpoint::External(_) => address.to_string(),
        Endpoint::Service(_) | Endpoint::Node(_) => format!("{endpoint} ({address})"),
    }
}

fn socket(endpoint: &Endpoint, address: IpAddr, port: u16) -> String {
    match (endpoint, address) {
        (Endpoint::External(_), IpAddr::V6(_)) => format!("[{address}]:{port}"),
        _ => format!("{}:{port}", end(endpoint, address)),
    }
}

/// `a`, `a and b`, `a, b and c`.
fn listing(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [name] => (*name).to_owned(),
        [names @ .., last] => format!("{} and {last}", names.join(", ")),
    }
}
