//! The evaluator as judge of what is made here: everything that was seen is allowed, and nothing is written that is not needed
//! for it.

use proptest::prelude::*;

use super::{properties::any_options, *};
use crate::{
    evaluate::{Judge, Policies, World, connections},
    folder,
    samples::any_overlapping_records,
};

/// For each edge whether the policies allow it.
fn verdicts(edges: &[Edge], world: &World, policies: &[NetworkPolicy]) -> Vec<bool> {
    let policies = Policies::compile(policies).unwrap();
    let judge = Judge::new(world, &policies);
    let verdicts = edges.iter().map(|edge| judge.verdict_on_edge(edge));
    verdicts.map(|verdict| verdict.is_allowed()).collect()
}

/// The same for each connection that the edges stand for: of one that is denied at one address, as where IPv6 is left out,
/// rules are needed for the others all the same.
fn of_connections(edges: &[Edge], world: &World, policies: &[NetworkPolicy]) -> Vec<bool> {
    let policies = Policies::compile(policies).unwrap();
    let judge = Judge::new(world, &policies);
    let connections = edges.iter().flat_map(|edge| connections(world, edge));
    let verdicts = connections.map(|connection| judge.verdict(&connection));
    verdicts.map(|verdict| verdict.is_allowed()).collect()
}

/// Each time with one port less in one rule, or, where it has but one, without the rule: what was taken out, and the rest.
fn with_one_less(policies: &[NetworkPolicy]) -> Vec<(String, Vec<NetworkPolicy>)> {
    let mut fewer = Vec::new();
    for (place, policy) in policies.iter().enumerate() {
        let spec = policy.spec.as_ref().unwrap();
        for (index, rule) in spec.ingress.iter().flatten().enumerate() {
            for (port, _) in rule.ports.iter().flatten().enumerate() {
                let mut without = policies.to_vec();
                let rules = without[place].spec.as_mut().unwrap().ingress.as_mut();
                take_out(rules.unwrap(), index, port, |rule| &mut rule.ports);
                fewer.push((format!("{:?} in {policy:?}", rule), without));
            }
        }
        for (index, rule) in spec.egress.iter().flatten().enumerate() {
            for (port, _) in rule.ports.iter().flatten().enumerate() {
                let mut without = policies.to_vec();
                let rules = without[place].spec.as_mut().unwrap().egress.as_mut();
                take_out(rules.unwrap(), index, port, |rule| &mut rule.ports);
                fewer.push((format!("{:?} in {policy:?}", rule), without));
            }
        }
    }
    fewer
}

fn take_out<R>(
    rules: &mut Vec<R>,
    rule: usize,
    port: usize,
    ports: impl Fn(&mut R) -> &mut Option<Vec<NetworkPolicyPort>>,
) {
    let of_rule = ports(&mut rules[rule]).as_mut().unwrap();
    of_rule.remove(port);
    if of_rule.is_empty() {
        rules.remove(rule);
    }
}

/// A service that was called without anybody seeing which pod answered: pods that were not seen may need the rule.
fn is_of_unknown_pod(edge: &Edge) -> bool {
    let is_service = |end: &Endpoint| matches!(end, Endpoint::Service(_));
    is_service(&edge.client) || is_service(&edge.server)
}

/// A pod that called itself through its service, and came with its node's address: by that, a block lets it through.
fn is_masked(edge: &Edge) -> bool {
    edge.client == edge.server
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_flow_is_allowed(records in any_overlapping_records(), options in any_options()) {
        let edges = ledger(records).edges();
        let synthesis = synthesise(&edges, &options);
        let verdicts = verdicts(&edges, &World::of_edges(&edges), &synthesis.policies);
        for (edge, is_allowed) in edges.iter().zip(verdicts) {
            let (client, server) = (edge.client.to_string(), edge.server.to_string());
            let is_said = synthesis.notices.iter().any(|notice| {
                !matches!(notice.reason, Reason::ByAddress | Reason::Shared)
                    && (&notice.client, &notice.server) == (&client, &server)
                    && (notice.protocol, notice.port) == (edge.protocol, edge.port)
            });
            prop_assert!(is_allowed || is_said, "{edge:?}\n{:?}", synthesis.policies);
        }
    }

    /// The same records in another order make the same files, and writing them again changes nothing.
    #[test]
    fn generating_again_changes_nothing(
        (records, shuffled) in any_overlapping_records().prop_flat_map(|records| {
            (Just(records.clone()), Just(records).prop_shuffle())
        }),
        options in any_options(),
    ) {
        let files = |records: Vec<FlowRecord>| {
            let synthesis = synthesise(&ledger(records).edges(), &options);
            synthesis.files
        };
        let folder = tempfile::tempdir().unwrap();
        let first = folder::write(folder.path(), &files(records), &options.namespaces).unwrap();
        let again = folder::write(folder.path(), &files(shuffled), &options.namespaces).unwrap();
        prop_assert_eq!(&again.unchanged, &first.written);
        prop_assert!(again.written.is_empty() && again.removed.is_empty(), "{again:?}");
    }

    /// But for the rule for DNS, which stands in any case, and what Kubernetes allows without a rule. Blocks wider than an
    /// address are left aside: they may hold addresses of pods, which are given by labels all the same.
    #[test]
    fn without_any_rule_a_flow_is_blocked(records in any_overlapping_records(), options in any_options()) {
        let options = Options {
            allow_dns: false,
            own_node: OwnNode::Ignore,
            blocks: Blocks::default(),
            ..options
        };
        let mut edges = ledger(records).edges();
        edges.retain(|edge| !is_of_unknown_pod(edge) && !is_masked(edge));
        let world = World::of_edges(&edges);
        let policies = synthesise(&edges, &options).policies;
        let allowed = of_connections(&edges, &world, &policies);
        for (what, fewer) in with_one_less(&policies) {
            let allowed_still = of_connections(&edges, &world, &fewer);
            let is_blocked = allowed.iter().zip(allowed_still).any(|(before, after)| *before && !after);
            prop_assert!(
                is_blocked,
                "{what}\nis not needed for\n{}",
                edges.iter().map(|edge| format!("{edge:?}\n")).collect::<String>()
            );
        }
    }
}
