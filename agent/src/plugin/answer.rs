//! The answer: recent flows as a report of Scope.
//!
//! What Scope merges it with, it merges by node and key, and of two values of one key the later one stays. So all that this
//! agent knows better has the time of the answer; what only fills in for nodes that Scope does not know bears a time long past,
//! and Scope's own word stands.
//!
//! Endpoints have Scope's ids, `;ADDRESS;PORT`. A client's port is 0, because connections are counted by flow. Each
//! agent says of the endpoints of its own node which host and process they are of; of the others no more than what the cluster's
//! objects say. Where several processes of one address speak to others, Scope could show but one of them, so none is named.
//!
//! Which connections the current policies allow is not said: the agent does not know them (`microshield audit` does).

mod form;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use self::form::{Column, MetadataTemplate, Node, Plugin, Report, TableTemplate};
use super::recent::{Flow, Seen};
use flow::{
    endpoint::{Endpoint, Pod},
    record::{Direction, Outcome},
    time::Timestamp,
};
use jiff::Timestamp as Time;

/// The version of the protocol.
pub const API_VERSION: &str = "1";

/// The most rows of the table of flows.
const MAX_ROWS: usize = 100;

/// Before the keys of the table's cells. Scope's app takes every key that begins like this for a cell.
const TABLE: &str = "microshield_flows_";

/// Where the app looks for how many rows were left out.
const TABLE_LEFT_OUT: &str = "table_truncation_count_microshield_flows_";

/// Whose answer it is.
#[derive(Clone, Debug)]
pub struct Who {
    /// The plugin's id.
    pub id: String,
    /// This host as Scope calls it.
    pub host: String,
}

/// What is shown of a pod, container or process: key, label, type.
const SHOWN: [(&str, &str, &str); 5] = [
    ("microshield_workload", "Workload", ""),
    ("microshield_services", "Services", ""),
    ("microshield_protocols", "Protocols seen", ""),
    ("microshield_connections", "# Connections seen", "number"),
    ("microshield_failed", "# Attempts that failed", "number"),
];

const COLUMNS: [(&str, &str, &str); 7] = [
    ("client", "Client", ""),
    ("server", "Server", ""),
    ("port", "Port", ""),
    ("count", "Connections", "number"),
    ("outcome", "Outcome", ""),
    ("seen", "Seen at", ""),
    ("last", "Last", "datetime"),
];

/// Makes the answer. It has at most two endpoints a flow, and some nodes for this node's ends.
#[must_use]
pub fn render(seen: &Seen, who: &Who, now: Timestamp) -> Vec<u8> {
    let now = rfc3339(now);
    let mut writer = Writer {
        report: Report::default(),
        host: &who.host,
        now: &now,
    };
    for flow in &seen.flows {
        writer.endpoints(flow);
        writer.owners(flow);
    }
    writer.processes_of_endpoints(&seen.flows);
    writer.host(seen);
    let mut report = writer.report;
    for topology in [&mut report.process, &mut report.container, &mut report.pod] {
        topology.metadata_templates = shown(&SHOWN);
    }
    report.plugins.push(Plugin {
        id: &who.id,
        label: "MicroShield",
        description: "Connections seen by eBPF: UDP, IPv6, failed attempts and short-lived ones too",
        interfaces: ["reporter"],
        api_version: API_VERSION,
    });
    // Nothing in it can fail to be JSON.
    serde_json::to_vec(&report).unwrap_or_default()
}

struct Writer<'a> {
    report: Report<'a>,
    host: &'a str,
    now: &'a str,
}

impl<'a> Writer<'a> {
    /// Both ends, and the edge between them.
    fn endpoints(&mut self, flow: &Flow) {
        // A service's address is no endpoint: who answered is seen by the server's own node.
        if matches!(flow.dst, Endpoint::Service(_)) {
            return;
        }
        let client = self.endpoint_id(flow.client, 0);
        let server = self.endpoint_id(flow.server, flow.port);
        let is_local = flow.direction == Direction::Egress;
        self.endpoint(&client, &flow.src, is_local, flow)
            .adjacency
            .insert(server.clone());
        self.endpoint(&server, &flow.dst, !is_local, flow);
    }

    fn endpoint(&mut self, id: &str, end: &Endpoint, is_local: bool, flow: &Flow) -> &mut Node<'a> {
        let (host, now) = (host_id(self.host), self.now);
        let nodes = &mut self.report.endpoint.nodes;
        let node = nodes
            .entry(id.to_owned())
            .or_insert_with(|| Node::new(id.to_owned(), "endpoint"));
        match (is_local, end) {
            (true, _) => node.set("host_node_id", host, now),
            (false, Endpoint::Pod { pod, .. }) => {
                if let Some(name) = &pod.node {
                    node.fill("host_node_id", host_id(name));
                }
            }
            (false, Endpoint::Node(other)) => node.fill("host_node_id", host_id(&other.name)),
            // The Internet.
            (false, Endpoint::External(_) | Endpoint::Service(_)) => {}
        }
        if let Endpoint::Pod { pod, service } = end {
            if let Some(workload) = &pod.workload {
                let name = format!("{} {}/{}", workload.kind, pod.namespace, workload.name);
                node.set("microshield_workload", name, now);
            }
            if let Some(service) = service {
                let name = format!("{}/{}", service.namespace, service.name);
                node.set("microshield_service", name, now);
            }
        }
        node.add_name("microshield_protocol", flow.protocol.name(), now);
        node.add_name("microshield_outcome", outcome(flow.outcome), now);
        node
    }

    /// Loopback is every host's own.
    fn endpoint_id(&self, address: IpAddr, port: u16) -> String {
        match address.is_loopback() {
            true => format!("{};{address};{port}", self.host),
            false => format!(";{address};{port}"),
        }
    }

    /// Process, container and pod of this node's end.
    fn owners(&mut self, flow: &Flow) {
        let (end, address) = flow.local();
        let (host, now) = (host_id(self.host), self.now);
        let pod_id = match end {
            Endpoint::Pod { pod, .. } if !is_static(pod) => Some(format!("{};<pod>", pod.uid)),
            _ => None,
        };
        if let (Endpoint::Pod { pod, .. }, Some(id)) = (end, &pod_id) {
            let node = self.report.pod.node(id, "pod");
            node.fill("kubernetes_name", pod.name.clone());
            node.fill("kubernetes_namespace", pod.namespace.clone());
            if !pod.host_network {
                let first = pod.addresses.first().unwrap_or(&address);
                node.fill("kubernetes_ip", first.to_string());
            }
            if let Some(workload) = &pod.workload {
                let name = format!("{} {}", workload.kind, workload.name);
                node.set("microshield_workload", name, now);
            }
            if !pod.services.is_empty() {
                node.set("microshield_services", pod.services.join(", "), now);
            }
            node.count(flow, now);
        }
        for process in &flow.processes {
            let container_id = process
                .container
                .as_ref()
                .map(|id| format!("{id};<container>"));
            if let (Some(id), Some(container)) = (&container_id, &process.container) {
                let node = self.report.container.node(id, "container");
                node.set("host_node_id", host.clone(), now);
                node.fill("docker_container_id", container.clone());
                let short = container.get(..12).unwrap_or(container);
                node.fill("docker_container_name", short.to_owned());
                node.parent("host", &host);
                if let Some(pod) = &pod_id {
                    node.parent("pod", pod);
                }
            }
            if process.pid != 0 {
                let id = format!("{};{}", self.host, process.pid);
                let node = self.report.process.node(&id, "process");
                node.set("host_node_id", host.clone(), now);
                node.fill("pid", process.pid.to_string());
                node.fill("name", process.comm.clone());
                node.parent("host", &host);
                if let Some(container) = &container_id {
                    node.parent("container", container);
                }
            }
        }
        // Of a flow of several processes it is not known who made how many of the connections.
        if let [process] = &flow.processes[..] {
            if let Some(id) = &process.container {
                let id = format!("{id};<container>");
                self.report
                    .container
                    .node(&id, "container")
                    .count(flow, now);
            }
            if process.pid != 0 {
                let id = format!("{};{}", self.host, process.pid);
                self.report.process.node(&id, "process").count(flow, now);
            }
        }
    }

    /// An endpoint of this node is of a process if all that was seen of it is of this process.
    fn processes_of_endpoints(&mut self, flows: &[Flow]) {
        let mut pids = BTreeMap::<String, BTreeSet<u32>>::new();
        for flow in flows {
            let id = match flow.direction {
                Direction::Egress => self.endpoint_id(flow.client, 0),
                Direction::Ingress => self.endpoint_id(flow.server, flow.port),
            };
            let known = pids.entry(id).or_default();
            known.extend(flow.processes.iter().map(|process| process.pid));
        }
        for (id, pids) in pids {
            let mut pids = pids.into_iter();
            if let (Some(pid), None) = (pids.next(), pids.next())
                && pid != 0
                && let Some(node) = self.report.endpoint.nodes.get_mut(&id)
            {
                node.set("pid", pid.to_string(), self.now);
            }
        }
    }

    /// This host, with a table of its flows: those with the most connections first.
    fn host(&mut self, seen: &Seen) {
        let (host, now) = (host_id(self.host), self.now);
        let node = self.report.host.node(&host, "host");
        node.set("host_node_id", host.clone(), now);
        node.fill("host_name", self.host.to_owned());
        node.parent("host", &host);
        node.set("microshield_flows", seen.flows.len().to_string(), now);
        node.set("microshield_left_out", seen.left_out.to_string(), now);
        let mut rows: Vec<&Flow> = seen.flows.iter().collect();
        rows.sort_by_key(|flow| std::cmp::Reverse(flow.count));
        for (number, flow) in rows.iter().take(MAX_ROWS).enumerate() {
            let cells = [
                flow.src.to_string(),
                flow.dst.to_string(),
                format!("{}/{}", flow.port, flow.protocol),
                flow.count.to_string(),
                outcome(flow.outcome).to_owned(),
                seen_at(flow.direction).to_owned(),
                rfc3339(flow.last_seen),
            ];
            for ((column, _, _), value) in COLUMNS.iter().zip(cells) {
                node.set(&format!("{TABLE}{number:03}___{column}"), value, now);
            }
        }
        let left_out = rows.len().saturating_sub(MAX_ROWS);
        node.set(TABLE_LEFT_OUT, left_out.to_string(), now);
        let topology = &mut self.report.host;
        topology.metadata_templates = shown(&[
            ("microshield_flows", "# Flows seen by MicroShield", "number"),
            ("microshield_left_out", "# Connections left out", "number"),
        ]);
        let columns = COLUMNS.map(|(id, label, data_type)| Column {
            id,
            label,
            data_type,
        });
        topology.table_templates.insert(
            TABLE,
            TableTemplate {
                id: TABLE,
                label: "MicroShield flows",
                prefix: TABLE,
                form: "multicolumn-table",
                columns: columns.into(),
                fixed_rows: BTreeMap::new(),
            },
        );
    }
}

fn shown(
    keys: &[(&'static str, &'static str, &'static str)],
) -> BTreeMap<&'static str, MetadataTemplate> {
    let templates = keys
        .iter()
        .zip(0_u8..)
        .map(|((id, label, data_type), number)| {
            let template = MetadataTemplate {
                id,
                label,
                data_type,
                // After Scope's own.
                priority: 40.0 + f64::from(number),
                from: "latest",
            };
            (*id, template)
        });
    templates.collect()
}

/// Scope knows a static pod by the hash of its manifest, not by the uid that the API has for its mirror. Nobody owns such a pod
/// but its node, after which kubelet names it.
fn is_static(pod: &Pod) -> bool {
    let node = pod.node.as_deref().unwrap_or_default();
    let rest = pod.name.strip_suffix(node);
    pod.workload.is_none() && !node.is_empty() && rest.is_some_and(|rest| rest.ends_with('-'))
}

fn host_id(name: &str) -> String {
    format!("{name};<host>")
}

fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Established => "established",
        Outcome::Failed => "failed",
    }
}

fn seen_at(direction: Direction) -> &'static str {
    match direction {
        Direction::Egress => "client",
        Direction::Ingress => "server",
    }
}

fn rfc3339(time: Timestamp) -> String {
    let nanos = i128::from(time.as_nanos());
    Time::from_nanosecond(nanos).unwrap_or_default().to_string()
}

#[cfg(test)]
mod tests;
