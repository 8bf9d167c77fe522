//! `microshield explain`: which connections asked for which rule of a policy?

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::anyhow;
use flow::record::Direction;
use serde::Serialize;

use super::{Failure, inputs::Reading, output::print, report::Connection};
use crate::{
    evaluate::{Judge, PolicyId, connections},
    flows::Input,
    ledger::Edge,
    table::{self, printable},
};

/// Say for each rule of a policy which connections in files of flow records need it
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// File of flow records, one JSON object a line; `-` is standard input; may be repeated
    #[arg(
        short = 'f',
        long = "flows",
        value_name = "FILE",
        env = "MICROSHIELD_FLOWS",
        required = true
    )]
    flows: Vec<Input>,

    /// Folder of policies, ours or of other hands
    #[arg(short, long, value_name = "FOLDER", env = "MICROSHIELD_POLICIES")]
    policies: PathBuf,

    /// The policy
    #[arg(value_name = "NAMESPACE/NAME", env = "MICROSHIELD_POLICY")]
    policy: String,

    #[command(flatten)]
    reading: Reading,
}

#[derive(Serialize)]
struct Explanation<'a> {
    policy: String,
    /// How many of the known pods the policy selects.
    pods: usize,
    ingress: Option<Vec<Rule<'a>>>,
    egress: Option<Vec<Rule<'a>>>,
}

/// The edges that a rule lets through, in their order.
#[derive(Default, Serialize)]
struct Rule<'a> {
    #[serde(serialize_with = "connections_of")]
    flows: Vec<&'a Edge>,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let folder = args.reading.policies(&args.policies)?;
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
    let observed = args.reading.flows(&args.flows)?;
    let world = args.reading.world(&observed.edges)?;
    let judge = Judge::new(&world, policies);
    let explanation = Explanation::new(&judge, policy, &observed.edges);
    print(&if args.reading.json {
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
        for edge in edges {
            for connection in connections(judge.world(), edge) {
                for (direction, rules) in &mut rules {
                    for rule in judge.rules(&connection, *direction) {
                        if rule.policy == policy {
                            rules[rule.index].add(edge);
                        }
                    }
                }
            }
        }
        Self {
            policy: of.to_string(),
            pods: judge.selected(policy).count(),
            ingress: rules.remove(&Direction::Ingress),
            egress: rules.remove(&Direction::Egress),
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{} selects {} of the known pods\n", self.policy, self.pods);
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
    fn add(&mut self, edge: &'a Edge) {
        if self
            .flows
            .last()
            .is_none_or(|last| !std::ptr::eq(*last, edge))
        {
            self.flows.push(edge);
        }
    }

    fn text(&self) -> String {
        let first = self.flows.iter().map(|edge| edge.first_seen).min();
        let last = self.flows.iter().map(|edge| edge.last_seen).max();
        let (Some(first), Some(last)) = (first, last) else {
            return "no flow asked for it\n".to_owned();
        };
        let count = self
            .flows
            .iter()
            .fold(0_u64, |sum, edge| sum.saturating_add(edge.count()));
        let mut text = format!(
            "flows: {}, connections: {count}, from {} to {}\n",
            self.flows.len(),
            table::time(first),
            table::time(last),
        );
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
                table::seen_by(edge),
            );
            text.push_str(&format!("  {}\n", printable(&line)));
        }
        text
    }
}

fn connections_of<S: serde::Serializer>(edges: &[&Edge], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(edges.iter().map(|edge| Connection::from(*edge)))
}
