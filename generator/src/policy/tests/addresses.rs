//! Peers that only addresses can name, and the proof that all of these are allowed.

use super::*;
use crate::{
    evaluate::{Policies, Proof, World, prove},
    samples::dual_stack,
};

/// What the policies without the lines that contain `without` do to the edges.
fn proof(edges: &[Edge], options: &Options, without: &str) -> Proof {
    let mut policies = synthesise(edges, options).policies;
    for policy in &mut policies {
        let spec = policy.spec.as_mut().unwrap();
        for rules in spec.ingress.iter_mut() {
            rules.retain(|rule| !peer(rule.from.as_ref().unwrap()).contains(without));
        }
        for rules in spec.egress.iter_mut() {
            rules.retain(|rule| !peer(rule.to.as_ref().unwrap()).contains(without));
        }
    }
    prove(
        edges,
        &Policies::compile(&policies).unwrap(),
        &World::of_edges(edges),
    )
}

#[test]
fn a_pod_without_labels_is_allowed_at_all_its_addresses() {
    let web = dual_stack(web(), &["10.0.0.1", "2001:db8::1"]);
    let bare = dual_stack(
        unlabelled("bank", "bare", "node-2"),
        &["10.0.0.5", "2001:db8::5"],
    );
    // The records of one pod are one edge, whatever its address, and that of the newest stays.
    let mut records = [
        at(
            ("10.0.0.1", "10.0.0.5"),
            record(Egress, web.clone(), bare.clone(), 80, 1),
        ),
        at(
            ("2001:db8::1", "2001:db8::5"),
            record(Egress, web.clone(), bare.clone(), 80, 1),
        ),
    ];
    let options = options("shop", Granularity::Service);
    for newest in [0, 1] {
        let time = Timestamp::from_nanos(200_000_000_000 + newest as u64);
        (records[newest].timestamp, records[newest].last_seen) = (time, time);
        check(
            records.clone(),
            &[
                "policy-web {app=web}",
                "policy-web > 10.0.0.5/32 80/TCP",
                "policy-web > 2001:db8::5/128 80/TCP",
                "ByAddress: shop/web-node-1 -> bank/bare-node-2-unlabelled:80",
            ],
        );
        let edges = ledger(records.clone()).edges();
        assert_eq!(proof(&edges, &options, "nothing").denied, []);
        assert_eq!(proof(&edges, &options, "10.0.0.5").denied.len(), 1);
        assert_eq!(proof(&edges, &options, "2001:db8::5").denied.len(), 1);
    }
    // One end has no address of the other family.
    let single = record(Egress, dual_stack(db(), &["10.0.0.2"]), bare, 80, 1);
    check(
        [at(("10.0.0.2", "10.0.0.5"), single)],
        &[
            "policy-db {app=db}",
            "policy-db > 10.0.0.5/32 80/TCP",
            "ByAddress: shop/db-node-2 -> bank/bare-node-2-unlabelled:80",
        ],
    );
}

#[test]
fn a_service_stands_for_its_pods_in_their_nodes_network_too() {
    let host = |node: &str, addresses: &[&str]| {
        let Endpoint::Pod { pod, service } = host_pod("kube-system", "api", node) else {
            panic!("a pod");
        };
        let mut pod = (*pod).clone();
        pod.addresses = addresses.iter().map(|text| address(text)).collect();
        Endpoint::Pod {
            pod: pod.into(),
            service,
        }
    };
    let away = Endpoint::External(address("192.0.2.1"));
    let known = host("node-1", &["192.168.0.1"]);
    // Of this one no address is known but the one that was seen.
    let seen = host("node-2", &[]);
    let api = Endpoint::Service(service("kube-system", "api"));
    let records = [
        record(Ingress, web(), api.clone(), 443, 1),
        at(
            ("192.168.0.7", "192.0.2.1"),
            record(Ingress, known, away.clone(), 80, 1),
        ),
        at(
            ("192.168.0.2", "192.0.2.1"),
            record(Ingress, seen, away, 80, 1),
        ),
    ];
    check(
        records.clone(),
        &[
            "policy-web {app=web}",
            "policy-web > {kube-system}{app=api} 443/TCP",
            "policy-web > 192.168.0.1/32 443/TCP",
            "policy-web > 192.168.0.2/32 443/TCP",
            "NodeAddress: shop/web-node-1 -> service kube-system/api:443",
        ],
    );
    let edges = ledger(records).edges();
    let options = options("shop", Granularity::Service);
    assert_eq!(proof(&edges, &options, "nothing").denied, []);
    assert_eq!(proof(&edges, &options, "192.168.0.1").denied.len(), 1);
    assert_eq!(proof(&edges, &options, "192.168.0.2").denied.len(), 1);
    // Selectors do not match them, so the rule for DNS does not lead there either.
    let mut dns = (*service("kube-system", "dns")).clone();
    dns.selector = labels(&[("k8s-app", "kube-dns")]);
    let mut server = with_labels("coredns-1", &[("k8s-app", "kube-dns")]);
    server.namespace = "kube-system".to_owned();
    server.host_network = true;
    server.addresses = vec![address("192.168.0.3")];
    let query = record(Ingress, web(), Endpoint::Service(dns.into()), 53, 1);
    let other = record(
        Ingress,
        bare(server),
        Endpoint::External(address("192.0.2.1")),
        80,
        1,
    );
    let options = Options {
        allow_dns: true,
        ..options
    };
    check_with(
        [query.clone(), other.clone()],
        &options,
        &[
            "policy-web {app=web}",
            "policy-web > {}{k8s-app=kube-dns} 53/TCP 53/UDP",
            "policy-web > {kube-system}{k8s-app=kube-dns} 53/TCP",
            "policy-web > 192.168.0.3/32 53/TCP",
            "NodeAddress: shop/web-node-1 -> service kube-system/dns:53",
        ],
    );
    assert_eq!(
        proof(&ledger([query, other]).edges(), &options, "nothing").denied,
        []
    );
}

/// It comes to itself with its node's address then, by which others are allowed.
#[test]
fn a_pod_that_called_itself_does_not_have_its_nodes_address() {
    let db = served("shop", "db", "node-1");
    let (node_at, db_at) = ("192.168.0.1", "10.0.0.2");
    let own = Endpoint::Service(service("shop", "db"));
    let api = Endpoint::Service(service("kube-system", "api"));
    let records = [
        at(
            (node_at, db_at),
            record(Ingress, node("node-1"), db.clone(), 443, 1),
        ),
        at((db_at, "10.96.0.1"), record(Egress, db, own, 443, 1)),
        at(("10.0.0.1", "10.96.0.2"), record(Egress, web(), api, 80, 1)),
        at(
            (node_at, "10.0.0.1"),
            record(
                Egress,
                host_pod("kube-system", "api", "node-1"),
                web(),
                80,
                1,
            ),
        ),
    ];
    let edges = ledger(records).edges();
    assert!(edges.iter().any(|edge| edge.client == edge.server));
    let options = options("shop", Granularity::Service);
    assert_eq!(proof(&edges, &options, "nothing").denied, []);
}
