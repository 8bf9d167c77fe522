//! What a generation did, for people and for programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    net::IpAddr,
    path::Path,
};

use flow::{
    lost::Lost,
    record::{Direction, Protocol, Source},
    time::Timestamp,
};
use serde::{Serialize, Serializer};

use super::{inputs::Observed, proof};
use crate::{
    evaluate::Proof,
    folder::Changes,
    ledger::Edge,
    policy::{Evidence, Notice, OneSided, Plan, Reason, UDP_IS_NOT_SEEN, Unwatched},
    table,
};

/// Notices of one reason that are listed for people.
const MAX_LISTED: usize = 10;

/// What a generation did.
pub(super) struct Report<'a> {
    pub(super) observed: &'a Observed,
    pub(super) connections: &'a [&'a Edge],
    pub(super) folder: &'a Path,
    pub(super) changes: &'a Changes,
    pub(super) plan: &'a Plan<'a>,
    pub(super) chosen: &'a [bool],
    pub(super) proof: &'a Proof,
}

#[derive(Serialize)]
struct Json<'a> {
    records: u64,
    skipped: u64,
    losses: &'a [Lost],
    #[serde(serialize_with = "connections")]
    connections: &'a [&'a Edge],
    #[serde(serialize_with = "policies")]
    policies: &'a Report<'a>,
    folder: &'a Path,
    changes: &'a Changes,
    notices: &'a [Notice],
    one_sided: Vec<OneSided>,
    unwatched: Vec<Unwatched>,
    added_addresses: u128,
    proof: &'a Proof,
}

/// A policy and what speaks for it, as programs get it.
#[derive(Serialize)]
struct Policy<'a> {
    namespace: &'a str,
    name: &'a str,
    /// How many pods it governs, of those that were seen.
    pods: usize,
    /// How long before the end of what is known something was seen of it that had not been seen before.
    quiet_seconds: f64,
    rules: Vec<RuleJson<'a>>,
}

#[derive(Serialize)]
struct RuleJson<'a> {
    direction: Direction,
    /// `null` for what the rule for DNS covers.
    peer: Option<String>,
    protocol: Protocol,
    port: u16,
    #[serde(flatten)]
    evidence: &'a Evidence,
}

/// An edge, as programs get it.
#[derive(Serialize)]
pub(super) struct Connection<'a> {
    client: String,
    client_address: IpAddr,
    server: String,
    server_address: IpAddr,
    protocol: Protocol,
    port: u16,
    count: u64,
    seen_by_client: u64,
    seen_by_server: u64,
    first_seen: Timestamp,
    last_seen: Timestamp,
    sources: &'a BTreeSet<Source>,
}

impl Report<'_> {
    /// One JSON object on one line.
    pub(super) fn write_json(&self, to: &mut dyn Write) -> io::Result<()> {
        let json = Json {
            records: self.observed.records,
            skipped: self.observed.skipped,
            losses: &self.observed.losses,
            connections: self.connections,
            policies: self,
            folder: self.folder,
            changes: self.changes,
            notices: &self.plan.notices,
            one_sided: self.plan.one_sided(self.chosen),
            unwatched: self.plan.unwatched(self.chosen),
            added_addresses: self.plan.added_addresses(self.chosen),
            proof: self.proof,
        };
        serde_json::to_writer(&mut *to, &json)?;
        to.write_all(b"\n")
    }

    /// The table of connections and a summary.
    pub(super) fn write_text(&self, to: &mut dyn Write) -> io::Result<()> {
        let connections = self.connections.iter().copied();
        table::write_connections(connections, to)?;
        writeln!(to)?;
        self.write_summary(to)
    }

    /// What became of the folder, and what must be known of the policies.
    pub(super) fn write_summary(&self, to: &mut dyn Write) -> io::Result<()> {
        for lost in &self.observed.losses {
            let line = table::printable(&lost.to_string());
            writeln!(to, "{line}: connections may be missing")?;
        }
        match self.observed.skipped {
            0 => {}
            1 => writeln!(to, "1 line that is not a flow record was skipped")?,
            many => writeln!(to, "{many} lines that are not flow records were skipped")?,
        }
        let Changes {
            written,
            unchanged,
            removed,
            kept,
        } = self.changes;
        writeln!(
            to,
            "{}: {} written, {} unchanged, {} removed",
            self.folder.display(),
            files(written.len()),
            unchanged.len(),
            removed.len(),
        )?;
        let udp = |edge: &&Edge| edge.protocol == Protocol::Udp;
        if !self.connections.iter().any(udp) {
            writeln!(to, "{UDP_IS_NOT_SEEN}")?;
        }
        for (what, names) in [("written", written), ("removed", removed), ("kept", kept)] {
            for name in names {
                writeln!(to, "  {what}: {}", table::printable(name))?;
            }
        }
        if !removed.is_empty() {
            writeln!(
                to,
                "  policies that were applied stay in force: delete those that were removed here in the cluster, too"
            )?;
        }
        self.write_unwatched(to)?;
        self.write_one_sided(to)?;
        match self.plan.added_addresses(self.chosen) {
            0 => {}
            added => writeln!(
                to,
                "merging external addresses lets {added} through that were not seen"
            )?,
        }
        self.write_notices(to)?;
        write!(to, "{}", proof::text(self.proof))
    }

    fn write_unwatched(&self, to: &mut dyn Write) -> io::Result<()> {
        let unwatched = self.plan.unwatched(self.chosen);
        if unwatched.is_empty() {
            return Ok(());
        }
        writeln!(
            to,
            "of the pods of these policies only the other ends' agents told: is an agent on their nodes? What else they call, \
             or who else calls them, is not known"
        )?;
        for policy in unwatched.iter().take(MAX_LISTED) {
            writeln!(to, "  {}/{}", policy.namespace, policy.policy)?;
        }
        write_more(to, unwatched.len())
    }

    /// A policy that closes a direction of which nothing was seen may be meant; it must not come as a surprise.
    fn write_one_sided(&self, to: &mut dyn Write) -> io::Result<()> {
        let one_sided = self.plan.one_sided(self.chosen);
        for (direction, word) in [
            (Direction::Ingress, "inbound"),
            (Direction::Egress, "outbound"),
        ] {
            let these: Vec<&OneSided> = one_sided
                .iter()
                .filter(|policy| policy.direction == direction)
                .collect();
            let Some(first) = these.first() else {
                continue;
            };
            let what = if first.closed {
                "and none is allowed (--policy-types observed leaves them alone)"
            } else {
                "and they stay as open as they are"
            };
            writeln!(
                to,
                "no {word} connection is chosen for these policies, {what}"
            )?;
            for policy in these.iter().take(MAX_LISTED) {
                writeln!(to, "  {}/{}", policy.namespace, policy.policy)?;
            }
            write_more(to, these.len())?;
        }
        Ok(())
    }

    fn write_notices(&self, to: &mut dyn Write) -> io::Result<()> {
        let mut by_reason = BTreeMap::<Reason, Vec<&Notice>>::new();
        for notice in &self.plan.notices {
            by_reason.entry(notice.reason).or_default().push(notice);
        }
        for (reason, notices) in by_reason {
            writeln!(to, "{reason}")?;
            for notice in notices.iter().take(MAX_LISTED) {
                let Notice {
                    client,
                    server,
                    port,
                    protocol,
                    count,
                    ..
                } = notice;
                let ends = table::printable(&format!("{client} -> {server}"));
                writeln!(to, "  {ends} {port}/{protocol}, {count} times")?;
            }
            write_more(to, notices.len())?;
        }
        Ok(())
    }
}

impl<'a> From<&'a Edge> for Connection<'a> {
    fn from(edge: &'a Edge) -> Self {
        Self {
            client: edge.client.to_string(),
            client_address: edge.client_address,
            server: edge.server.to_string(),
            server_address: edge.server_address,
            protocol: edge.protocol,
            port: edge.port,
            count: edge.count(),
            seen_by_client: edge.seen_by_client,
            seen_by_server: edge.seen_by_server,
            first_seen: edge.first_seen,
            last_seen: edge.last_seen,
            sources: &edge.sources,
        }
    }
}

fn connections<S: Serializer>(edges: &&[&Edge], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(edges.iter().map(|edge| Connection::from(*edge)))
}

fn policies<S: Serializer>(report: &&Report<'_>, serializer: S) -> Result<S::Ok, S::Error> {
    let plan = report.plan;
    let drafts = plan.policies().iter().enumerate();
    let policies = drafts.filter_map(|(index, draft)| {
        let rules: Vec<RuleJson<'_>> = plan
            .rules_of(index, report.chosen)
            .map(|rule| RuleJson {
                direction: rule.direction,
                peer: rule.peer(),
                protocol: rule.protocol,
                port: rule.port,
                evidence: &rule.evidence,
            })
            .collect();
        (!rules.is_empty()).then(|| Policy {
            namespace: draft.namespace(),
            name: &draft.name,
            pods: draft.pods,
            quiet_seconds: plan.quiet(draft).as_secs_f64(),
            rules,
        })
    });
    serializer.collect_seq(policies)
}

fn files(count: usize) -> String {
    match count {
        1 => "1 file".to_owned(),
        _ => format!("{count} files"),
    }
}

fn write_more(to: &mut dyn Write, all: usize) -> io::Result<()> {
    match all.checked_sub(MAX_LISTED) {
        Some(more @ 1..) => writeln!(to, "  and {more} more, which --json lists"),
        _ => Ok(()),
    }
}
