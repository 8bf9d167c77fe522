//! Service addresses: the rules that kube-proxy's nftables mode writes, cut to what the lab's services use.

use std::{fmt::Write as _, net::IpAddr};

use crate::cluster::{Cluster, Node, Service, ServicePort};

/// The ruleset of a node.
///
/// A service address is translated for pods (`prerouting`) and for the node's own processes (`output`), with a backend
/// chosen at random for each connection. The source is masqueraded where the reply would not come back through here
/// otherwise: a pod that reached itself, a caller that is not a pod, and whatever came in by a node port. Apart from
/// kube-proxy's own work, the chain `outside` does the CNI's: pods leave the cluster with their node's address.
pub(crate) fn ruleset(cluster: &Cluster, node: &Node) -> String {
    let mut text = String::new();
    for (family, index) in [("ip", 0), ("ip6", 1)] {
        // Formatting into a string cannot fail.
        let _infallible = family_table(&mut text, cluster, node, family, index);
    }
    text
}

fn family_table(
    text: &mut String,
    cluster: &Cluster,
    node: &Node,
    family: &str,
    index: usize,
) -> std::fmt::Result {
    let mut addresses = Vec::new();
    let mut node_ports = Vec::new();
    let mut without_endpoints = Vec::new();
    let mut chains = String::new();
    let cluster_cidr = &cluster.pod_cidrs()[index];
    for (service, port) in ports(cluster) {
        let chain = chain_name(service, port);
        let protocol = port.protocol.to_lowercase();
        let key = format!(
            "{} . {protocol} . {}",
            service.addresses()[index],
            port.port
        );
        let endpoints = endpoints(cluster, service, port, index);
        if endpoints.is_empty() {
            without_endpoints.push(key);
            continue;
        }
        addresses.push(format!("{key} : goto service-{chain}"));
        if let Some(number) = port.node_port {
            node_ports.push(format!("{protocol} . {number} : goto external-{chain}"));
            writeln!(
                chains,
                "chain external-{chain} {{ jump mark-for-masquerade; goto service-{chain}; }}"
            )?;
        }
        let choices: Vec<String> = (0..endpoints.len())
            .map(|choice| format!("{choice} : goto endpoint-{chain}-{choice}"))
            .collect();
        writeln!(
            chains,
            "chain service-{chain} {{ {family} saddr != {cluster_cidr} jump mark-for-masquerade; \
             numgen random mod {} vmap {{ {} }}; }}",
            endpoints.len(),
            choices.join(", "),
        )?;
        for (choice, (address, target)) in endpoints.iter().enumerate() {
            let to = match address {
                IpAddr::V4(_) => format!("{address}:{target}"),
                IpAddr::V6(_) => format!("[{address}]:{target}"),
            };
            writeln!(
                chains,
                "chain endpoint-{chain}-{choice} {{ {family} saddr {address} jump mark-for-masquerade; \
                 meta l4proto {protocol} dnat to {to}; }}"
            )?;
        }
    }
    let address = if index == 0 { "ipv4_addr" } else { "ipv6_addr" };
    let own_pods = &node.pod_cidrs()[index];
    write!(
        text,
        "table {family} kube-proxy {{
        map service-ips {{ type {address} . inet_proto . inet_service : verdict; {addresses} }}
        map service-nodeports {{ type inet_proto . inet_service : verdict; {node_ports} }}
        set no-endpoints {{ type {address} . inet_proto . inet_service; {without_endpoints} }}
        chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}
        {chains}
        chain services {{
            {family} daddr . meta l4proto . th dport vmap @service-ips
            fib daddr type local {family} daddr != {loopback} meta l4proto . th dport vmap @service-nodeports
        }}
        chain prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
        chain output {{ type nat hook output priority -100; jump services; }}
        chain postrouting {{
            type nat hook postrouting priority srcnat;
            meta mark & 0x4000 == 0x4000 masquerade fully-random
            jump outside
        }}
        chain outside {{ {family} saddr {own_pods} {family} daddr != {cluster_cidr} oifname eth0 masquerade; }}
        chain refuse {{ {family} daddr . meta l4proto . th dport @no-endpoints reject; }}
        chain forward {{ type filter hook forward priority filter; jump refuse; }}
        chain filter-output {{ type filter hook output priority filter; jump refuse; }}
        }}\n",
        addresses = elements(&addresses),
        node_ports = elements(&node_ports),
        without_endpoints = elements(&without_endpoints),
        loopback = ["127.0.0.0/8", "::1"][index],
    )
}

fn ports(cluster: &Cluster) -> impl Iterator<Item = (&Service, &ServicePort)> {
    cluster
        .services
        .iter()
        .flat_map(|service| service.ports.iter().map(move |port| (service, port)))
}

fn endpoints(
    cluster: &Cluster,
    service: &Service,
    port: &ServicePort,
    index: usize,
) -> Vec<(IpAddr, u16)> {
    cluster
        .backends(service)
        .filter_map(|pod| Some((cluster.addresses(pod)[index], port.target.at(pod)?)))
        .collect()
}

fn chain_name(service: &Service, port: &ServicePort) -> String {
    format!("{}-{}-{}", service.namespace, service.name, port.name)
}

/// nft has no way to write an empty list of elements.
fn elements(list: &[String]) -> String {
    if list.is_empty() {
        String::new()
    } else {
        format!("elements = {{ {} }}", list.join(", "))
    }
}
