//! `microshield explain`: which connections asked for which rule of a policy?

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::Duration,
};

use anyhow::anyhow;
use flow::{endpoint::Endpoint, record::Direction};
use serde::Serialize;

use super::{Failure, inputs::Judging, output::print, report::Connection};
use crate::{
    evaluate::{End, Judge, PodId, PolicyId, connections},
    ledger::Edge,
    policy::{Evidence, SeenBy},
    table::{self, printable},
};

/// Say for each rule of a policy which connections in files of flow records need it
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Folder of policies, ours or of other hands
    #[arg(short, long, value_name = "FOLDER", env = "MICROSHIELD_POLICIES")]
    policies: PathBuf,

    /// The policy
    #[arg(value_name = "NAMESPACE/NAME", env = "MICROSHIELD_POLICY")]
    policy: String,

    #[command(flatten)]
    judging: Judging,
}

#[derive(Serialize)]
struct Explanation<'a> {
    policy: String,
    /// How many of the known pods the policy selects.
    pods: usize,
    /// How long before the end of what is known something was seen of these pods that had not been seen before. The longer,
    /// the likelier that nothing is missing.
    quiet_seconds: Option<f64>,
    ingress: Option<Vec<Rule<'a>>>,
    egress: Option<Vec<Rule<'a>>>,
    /// What the endpoints lack that the policies ask for.
    hints: Vec<String>,
}

/// The edges that a rule lets through, in their order.
#[derive(Default, Serialize)]
struct Rule<'a> {
    #[serde(flatten)]
    evidence: Option<Evidence>,
    #[serde(serialize_with = "connections_of")]
    flows: Vec<&'a Edge>,
    /// The pods of the policy that took part.
    #[serde(skip)]
    pods: BTreeSet<PodId>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let folder = args.judging.policies(&args.policies)?;
    let policies = &folder.policies;
    let policy = args
        .policy
        .split_once('/')
        .and_then(|(namespace, name)| policies.find(namespace, name))
        .ok_or_else(|| {
            let folder = args.policies.display();
            Failure::input(anyhow!(
                "{folder}: no policy {} (NAMESPACE/NAME)",
                args.policy
            ))
        })?;
    let observed = args.judging.reading.flows()?;
    let world = args.judging.world(&observed.edges)?;
    let judge = Judge::new(&world, policies);
    let hints = args.judging.hints(&[policies]);
    let explanation = Explanation {
        hints,
        ..Explanation::new(&judge, policy, &observed.edges)
    };
    print(&if args.judging.reading.json {
        serde_json::to_string(&explanation).map_err(Failure::other)? + "\n"
    } else {
        explanation.text()
    })
}

impl<'a> Explanation<'a> {
    fn new(judge: &Judge<'_>, policy: PolicyId, edges: &'a [Edge]) -> Self {
        let mut rules = BTreeMap::<Direction, Vec<Rule<'a>>>::new();
        let of = judge.policies().get(policy);
        for direction in [Direction::Ingress, Direction::Egress] {
            if let Some(count) = of.rules_for(direction) {
                rules.insert(direction, (0..count).map(|_| Rule::default()).collect());
            }
        }
        let selected: BTreeSet<PodId> = judge.selected(policy).collect();
        let mut newest = None;
        for edge in edges {
            for connection in connections(judge.world(), edge) {
                for (direction, rules) in &mut rules {
                    let (end, inside) = match direction {
                        Direction::Ingress => (&edge.server, connection.destination),
                        Direction::Egress => (&edge.client, connection.source),
                    };
                    let pod = match inside {
                        End::Pod(pod, _) => Some(pod).filter(|pod| selected.contains(pod)),
                        End::Node(..) | End::External(_) => None,
                    };
                    if pod.is_some() {
                        newest = newest.max(Some(edge.first_seen));
                    }
                    // Of a service it is not known which pod took part.
                    let pod = pod.filter(|_| matches!(end, Endpoint::Pod { .. }));
                    for rule in judge.rules(&connection, *direction) {
                        if rule.policy == policy {
                            rules[rule.index].add(edge, pod);
                        }
                    }
                }
            }
        }
        for rule in rules.values_mut().flatten() {
            rule.weigh(selected.len());
        }
        let until = edges.iter().map(|edge| edge.last_seen).max();
        let quiet = until.zip(newest).map(|(until, newest)| {
            let nanos = until.as_nanos().saturating_sub(newest.as_nanos());
            Duration::from_micros(nanos / 1_000)
        });
        Self {
            policy: of.to_string(),
            pods: selected.len(),
            quiet_seconds: quiet.map(|quiet| quiet.as_secs_f64()),
            ingress: rules.remove(&Direction::Ingress),
            egress: rules.remove(&Direction::Egress),
            hints: Vec::new(),
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{} selects {} of the known pods", self.policy, self.pods);
        if let Some(quiet) = self.quiet_seconds {
            let quiet = table::rounded(Duration::from_secs_f64(quiet));
            text.push_str(&format!(", nothing new was seen of them for {quiet}"));
        }
        text.push('\n');
        for (direction, rules) in [
            (Direction::Ingress, &self.ingress),
            (Direction::Egress, &self.egress),
        ] {
            match rules.as_deref() {
                None => text.push_str(&format!("{direction}: not concerned\n")),
                Some([]) => text.push_str(&format!("{direction}: denied, without a rule\n")),
                Some(rules) => {
                    for (i, rule) in rules.iter().enumerate() {
                        text.push_str(&format!("{direction}[{i}]: {}", rule.text()));
                    }
                }
            }
        }
        text
    }
}

impl<'a> Rule<'a> {
    /// Edges come in their order; several connections of one edge may need the rule.
    fn add(&mut self, edge: &'a Edge, pod: Option<PodId>) {
        self.pods.extend(pod);
        if self
            .flows
            .last()
            .is_none_or(|last| !std::ptr::eq(*last, edge))
        {
            self.flows.push(edge);
        }
    }

    /// Adds up what speaks for the rule, of that many pods that the policy selects.
    fn weigh(&mut self, of_pods: usize) {
        let single = |edge: &&Edge| Evidence {
            count: edge.count(),
            first_seen: edge.first_seen,
            last_seen: edge.last_seen,
            seen_by: SeenBy::of(edge),
            pods: self.pods.len(),
            of_pods,
        };
        let sum = self.flows.iter().map(single).reduce(|sum, one| Evidence {
            count: sum.count.saturating_add(one.count),
            first_seen: sum.first_seen.min(one.first_seen),
            last_seen: sum.last_seen.max(one.last_seen),
            seen_by: sum.seen_by.and(one.seen_by),
            ..sum
        });
        self.evidence = sum;
    }

    fn text(&self) -> String {
        let Some(evidence) = self.evidence else {
            return "no flow asked for it\n".to_owned();
        };
        let mut text = format!(
            "flows: {}, connections: {}, from {} to {}, seen by {}",
            self.flows.len(),
            evidence.count,
            table::time(evidence.first_seen),
            table::time(evidence.last_seen),
            evidence.seen_by.name(),
        );
        if evidence.pods > 0 {
            let Evidence { pods, of_pods, .. } = evidence;
            text.push_str(&format!(", by {pods} of {of_pods} pods"));
        }
        text.push('\n');
        for edge in &self.flows {
            let line = format!(
                "{} ({}) -> {} ({}) {}/{}: {} times from {} to {}, seen by {}",
                edge.client,
                edge.client_address,
                edge.server,
                edge.server_address,
                edge.port,
                edge.protocol,
                edge.count(),
                table::time(edge.first_seen),
                table::time(edge.last_seen),
                SeenBy::of(edge).name(),
            );
            text.push_str(&format!("  {}\n", printable(&line)));
        }
        text
    }
}

fn connections_of<S: serde::Serializer>(edges: &[&Edge], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(edges.iter().map(|edge| Connection::from(*edge)))
}
