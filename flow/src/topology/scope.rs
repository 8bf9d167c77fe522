//! The cluster's objects from a report of Weave Scope, in JSON: what its app answers to `GET /api/report`.
//!
//! A report knows less than the API: no target ports, no endpoints, one address a pod, and selectors only if the probe is
//! the one that MicroShield modified. What it says is taken as it is; nothing is guessed from names or port numbers.

mod document;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    path::Path,
    sync::Arc,
};

use self::document::{Node as ReportNode, Report};
use super::{
    file::{self, FileError, Loaded, MAX_WARNINGS},
    objects::{Namespace, Node, Objects, Phase, Pod, Service, ServicePort, TargetPort},
};
use crate::{
    endpoint::{self, Labels, Workload},
    record::Protocol,
    time::Timestamp,
};

/// Labels are keys of this prefix in a node's `latest`.
const LABEL_PREFIX: &str = "kubernetes_labels_";

/// Reads a file.
///
/// # Errors
/// If it cannot be read or is no report. Nodes of the report that say too little are warnings.
pub fn load(path: &Path) -> Result<Loaded, FileError> {
    parse(path, &file::read(path)?)
}

/// Reads the text of a report; `path` is only for messages.
///
/// # Errors
/// If it is no report.
pub fn parse(path: &Path, text: &[u8]) -> Result<Loaded, FileError> {
    if text.trim_ascii().is_empty() {
        return Err(FileError::Empty {
            path: path.to_owned(),
        });
    }
    let report: Report = serde_json::from_slice(text).map_err(|error| FileError::Malformed {
        path: path.to_owned(),
        line: error.line(),
        column: error.column(),
        message: error.to_string(),
    })?;
    let mut reader = Reader {
        report: &report,
        warnings: Vec::new(),
        unsaid: 0,
    };
    let objects = reader.objects();
    let mut warnings: Vec<String> = reader
        .warnings
        .iter()
        .map(|warning| format!("{}: {warning}", path.display()))
        .collect();
    if reader.unsaid > 0 {
        let unsaid = reader.unsaid;
        warnings.push(format!("{}: {unsaid} more malformed nodes", path.display()));
    }
    Ok(Loaded {
        objects,
        skipped: BTreeMap::new(),
        warnings,
    })
}

struct Reader<'a> {
    report: &'a Report,
    warnings: Vec<String>,
    /// How many warnings were left out.
    unsaid: usize,
}

impl Reader<'_> {
    fn objects(&mut self) -> Objects {
        let report = self.report;
        let mut pods: Vec<Pod> = report
            .pods
            .nodes
            .iter()
            .filter_map(|(id, node)| {
                let pod = self.pod(id, node);
                self.keep(id, pod)
            })
            .collect();
        set_apart_host_pods(&mut pods);
        let services = report
            .services
            .nodes
            .iter()
            .filter_map(|(id, node)| {
                let service = service(id, node);
                self.keep(id, service)
            })
            .collect();
        let namespaces = report.namespaces.nodes.values().filter_map(|node| {
            Some(Namespace {
                name: node.latest("kubernetes_name")?.to_owned(),
                labels: labels(node),
            })
        });
        Objects {
            namespaces: namespaces.collect(),
            nodes: nodes(report, &pods),
            services,
            endpoint_slices: Vec::new(),
            pods,
        }
    }

    fn keep<T>(&mut self, id: &str, object: Result<T, String>) -> Option<T> {
        match object {
            Ok(object) => return Some(object),
            Err(_) if self.warnings.len() >= MAX_WARNINGS => self.unsaid += 1,
            Err(problem) => self.warnings.push(format!("node `{id}`: {problem}")),
        }
        None
    }

    fn pod(&self, id: &str, node: &ReportNode) -> Result<Pod, String> {
        let phase = match node.latest("kubernetes_state") {
            Some("Succeeded" | "Failed") => Phase::Finished { at: None },
            Some("Pending") => Phase::Pending,
            _ => Phase::Running,
        };
        Ok(Pod {
            identity: endpoint::Pod {
                uid: uid(id),
                namespace: node.required("kubernetes_namespace")?.to_owned(),
                name: node.required("kubernetes_name")?.to_owned(),
                labels: Arc::new(labels(node)),
                workload: self.workload(node).map(Arc::new),
                node: node.parent("host").map(uid).map(Arc::from),
                host_network: node.latest("kubernetes_is_in_host_network") == Some("true"),
                addresses: address(node)?.into_iter().collect(),
                services: Arc::default(),
            },
            static_uid: None,
            ports: Arc::default(),
            phase,
            started: created(node)?,
        })
    }

    /// The controller of a pod, the topmost first.
    fn workload(&self, pod: &ReportNode) -> Option<Workload> {
        let report = self.report;
        let controllers = [
            ("Deployment", "deployment", &report.deployments),
            ("StatefulSet", "stateful_set", &report.stateful_sets),
            ("DaemonSet", "daemon_set", &report.daemon_sets),
            ("CronJob", "cron_job", &report.cron_jobs),
            ("Job", "job", &report.jobs),
        ];
        controllers.into_iter().find_map(|(kind, parent, known)| {
            let controller = known.nodes.get(pod.parent(parent)?)?;
            Some(Workload {
                kind: kind.to_owned(),
                name: controller.latest("kubernetes_name")?.to_owned(),
            })
        })
    }
}

/// Two living pods cannot have one address each for themselves. Where the report does not say which of them is the later
/// one, they are in their node's network.
fn set_apart_host_pods(pods: &mut [Pod]) {
    let mut once = HashSet::new();
    let mut shared = HashSet::new();
    let undated =
        |pod: &&Pod| !matches!(pod.phase, Phase::Finished { .. }) && pod.started.is_none();
    for address in pods
        .iter()
        .filter(undated)
        .flat_map(|pod| &pod.identity.addresses)
    {
        if !once.insert(*address) {
            shared.insert(*address);
        }
    }
    for pod in pods.iter_mut().filter(|pod| undated(&&**pod)) {
        let identity = &mut pod.identity;
        identity.host_network |= identity.addresses.iter().any(|own| shared.contains(own));
    }
}

fn service(id: &str, node: &ReportNode) -> Result<Service, String> {
    let mut selector = Labels::new();
    let text = node.latest("kubernetes_selector").unwrap_or_default();
    for pair in text.split(',').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| format!("kubernetes_selector: `{pair}` has no `=`"))?;
        selector.insert(key.to_owned(), value.to_owned());
    }
    let ports = node.latest("kubernetes_ports").unwrap_or_default();
    Ok(Service {
        identity: Arc::new(endpoint::Service {
            uid: uid(id),
            namespace: node.required("kubernetes_namespace")?.to_owned(),
            name: node.required("kubernetes_name")?.to_owned(),
            labels: labels(node),
            selector,
            backends: Vec::new(),
        }),
        cluster_addresses: address(node)?.into_iter().collect(),
        external_addresses: Vec::new(),
        ports: ports
            .split(',')
            .filter(|port| !port.is_empty())
            .map(service_port)
            .collect::<Result<_, _>>()?,
        created: created(node)?,
    })
}

/// `PORT/PROTOCOL` or `PORT:NODEPORT/PROTOCOL`.
fn service_port(text: &str) -> Result<ServicePort, String> {
    let wrong = || format!("kubernetes_ports: `{text}` is not PORT[:NODEPORT]/PROTOCOL");
    let (numbers, protocol) = text.split_once('/').ok_or_else(wrong)?;
    let protocol = match protocol {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        _ => return Err(wrong()),
    };
    let number = |text: &str| {
        text.parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(wrong)
    };
    let (port, node_port) = match numbers.split_once(':') {
        Some((port, node_port)) => (number(port)?, Some(number(node_port)?)),
        None => (number(numbers)?, None),
    };
    Ok(ServicePort {
        name: String::new(),
        protocol,
        port,
        // Where it leads the report does not say.
        target: TargetPort::Number(port),
        node_port,
    })
}

/// The nodes, with the addresses of the pods in their networks and of their own interfaces. An address in use by pods in a
/// node's network stands for its node if nothing tells the node's name.
fn nodes(report: &Report, pods: &[Pod]) -> Vec<Node> {
    let mut addresses = BTreeMap::<String, Vec<IpAddr>>::new();
    for id in report.hosts.nodes.keys() {
        addresses.entry(uid(id)).or_default();
    }
    for pod in pods
        .iter()
        .map(|pod| &pod.identity)
        .filter(|pod| pod.host_network)
    {
        for address in &pod.addresses {
            let name = match &pod.node {
                Some(node) => node.to_string(),
                None => address.to_string(),
            };
            let known = addresses.entry(name).or_default();
            if !known.contains(address) {
                known.push(*address);
            }
        }
    }
    let mut interfaces = BTreeMap::<String, Vec<IpAddr>>::new();
    let mut holders = HashMap::<IpAddr, usize>::new();
    for (id, host) in &report.hosts.nodes {
        // An interface's address with the length of its network's prefix.
        let networks = host.sets("local_networks");
        let own = networks.filter_map(|network| network.split('/').next()?.parse::<IpAddr>().ok());
        for address in own.filter(|address| !address.is_loopback()) {
            *holders.entry(address).or_default() += 1;
            interfaces.entry(uid(id)).or_default().push(address);
        }
    }
    addresses
        .into_iter()
        .map(|(name, addresses)| {
            let mut interfaces = interfaces.remove(&name).unwrap_or_default();
            // The bridges of container engines have the same address on every node.
            interfaces.retain(|own| holders[own] == 1 && !addresses.contains(own));
            Node {
                identity: Arc::new(endpoint::Node { name, addresses }),
                interfaces,
                pod_cidrs: Vec::new(),
                created: None,
            }
        })
        .collect()
}

fn labels(node: &ReportNode) -> Labels {
    node.all_latest()
        .filter_map(|(key, value)| {
            let label = key.strip_prefix(LABEL_PREFIX)?;
            Some((label.to_owned(), value.to_owned()))
        })
        .collect()
}

/// `None` for a pod that has none yet, and for a headless service.
fn address(node: &ReportNode) -> Result<Option<IpAddr>, String> {
    match node.latest("kubernetes_ip") {
        None | Some("" | "None") => Ok(None),
        Some(text) => match text.parse::<IpAddr>() {
            Ok(address) => Ok(Some(address.to_canonical())),
            Err(_) => Err(format!("kubernetes_ip: `{text}` is not an address")),
        },
    }
}

fn created(node: &ReportNode) -> Result<Option<Timestamp>, String> {
    let Some(text) = node.latest("kubernetes_created") else {
        return Ok(None);
    };
    match text.parse::<k8s_openapi::jiff::Timestamp>() {
        Ok(time) => Ok(u64::try_from(time.as_nanosecond())
            .ok()
            .map(Timestamp::from_nanos)),
        Err(_) => Err(format!("kubernetes_created: `{text}` is not a time")),
    }
}

/// The first part of `UID;<kind>`.
fn uid(id: &str) -> String {
    id.split(';').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests;
