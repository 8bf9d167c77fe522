//! `microshield diff`: what changes in what is reachable?

use std::path::PathBuf;

use serde::Serialize;

use super::{Failure, inputs::Judging, output::print, proof::listing};
use crate::{
    evaluate::{Change, Diff, Effect, NamedPort, PortRange, Symbolic, diff},
    table::printable,
};

/// Changes that are listed for people.
const MAX_LISTED: usize = 1000;

/// Say what changes in what is reachable when one folder of policies takes the place of another
///
/// Compared is what the policies allow, not their text, between the endpoints in files of flow records and in the cluster's
/// objects. Without either, endpoints are made up: for each selector in the policies pods with just the labels that it
/// needs, for each block the addresses at its ends. Exits with 1 if something changes, with 0 if nothing does.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder of policies, given twice: first the one before, then the one after; or both at once, as BEFORE:AFTER
    #[arg(
        short,
        long,
        value_name = "FOLDER",
        env = "MICROSHIELD_DIFF_POLICIES",
        value_delimiter = ':',
        required = true
    )]
    policies: Vec<PathBuf>,

    #[command(flatten)]
    judging: Judging,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    diff: Diff,
    /// The numbers of named ports, where the endpoints are made up.
    named_ports: Vec<NamedPort>,
    /// What the endpoints lack that the policies ask for.
    hints: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let [before, after] = args.policies.as_slice() else {
        return Err(Failure::input(anyhow::anyhow!(
            "two folders to compare: -p BEFORE -p AFTER"
        )));
    };
    let before = args.judging.policies(before)?.policies;
    let after = args.judging.policies(after)?.policies;
    let report = if !args.judging.reading.has_flows() && !args.judging.topology.is_given() {
        let Symbolic { world, ports } = Symbolic::new(&[&before, &after]);
        Report {
            diff: diff(&world, &before, &after),
            named_ports: ports,
            hints: Vec::new(),
        }
    } else {
        let edges = if args.judging.reading.has_flows() {
            args.judging.reading.flows()?.edges
        } else {
            Vec::new()
        };
        let world = args.judging.world(&edges)?;
        Report {
            diff: diff(&world, &before, &after),
            named_ports: Vec::new(),
            hints: args.judging.hints(&[&before, &after]),
        }
    };
    print(&if args.judging.reading.json {
        serde_json::to_string(&report).map_err(Failure::other)? + "\n"
    } else {
        report.text()
    })?;
    if report.diff.changes.is_empty() {
        Ok(())
    } else {
        Err(Failure::Answered)
    }
}

impl Report {
    fn text(&self) -> String {
        let Diff {
            pairs,
            opened,
            closed,
            changes,
        } = &self.diff;
        let mut text = String::new();
        for change in changes.iter().take(MAX_LISTED) {
            text.push_str(&printable(&self.line(change)));
            text.push('\n');
        }
        if let Some(more @ 1..) = changes.len().checked_sub(MAX_LISTED) {
            text.push_str(&format!("and {more} more, which --json lists\n"));
        }
        text.push_str(&format!(
            "opened: {opened}, closed: {closed}; pairs of endpoints: {pairs}\n"
        ));
        text
    }

    fn line(&self, change: &Change) -> String {
        let sign = match change.effect {
            Effect::Opened => '+',
            Effect::Closed => '-',
        };
        let reason = match (change.effect, &change.rule) {
            (Effect::Opened, Some(rule)) => rule.to_string(),
            (Effect::Opened, None) => "no policy restricts it any longer".to_owned(),
            (Effect::Closed, Some(rule)) => format!("{}, as {rule} had", listing(&change.denials)),
            (Effect::Closed, None) => listing(&change.denials),
        };
        let ports: Vec<String> = change.ports.iter().map(|port| self.port(port)).collect();
        let ports = match ports.as_slice() {
            [sctp_tcp_udp @ .., _] if sctp_tcp_udp.len() == 2 && is_everything(&change.ports) => {
                "any port".to_owned()
            }
            ports => ports.join(" "),
        };
        format!(
            "{sign} {} -> {} {ports}: {reason}",
            change.source, change.destination
        )
    }

    fn port(&self, range: &PortRange) -> String {
        let named = self.named_ports.iter().find(|named| {
            named.protocol == range.protocol
                && range.port == named.port
                && range.end_port == named.port
        });
        match named {
            Some(named) => format!("{}/{}", named.name, named.protocol),
            None => range.to_string(),
        }
    }
}

fn is_everything(ports: &[PortRange]) -> bool {
    ports
        .iter()
        .all(|range| range.port == 1 && range.end_port == u16::MAX)
}
