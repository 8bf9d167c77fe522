//! From a report's nodes, in whatever order they come, to the cluster's objects.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{Report, document::Kind, node::Node as ReportNode};
use crate::{
    endpoint::{self, Labels, Workload},
    record::Protocol,
    time::Timestamp,
    topology::{
        Common,
        file::MAX_WARNINGS,
        objects::{
            EndpointSlice, Namespace, Node, Objects, Phase, Pod, Service, ServicePort, TargetPort,
        },
        service::most_common,
        workload::cron_job,
    },
};

/// Labels are keys of this prefix in a node's `latest`.
const LABEL_PREFIX: &str = "kubernetes_labels_";

/// The most translated addresses that are remembered. There is one for every port of a service that is in use, and one for every
/// connection that leaves a node under the node's own address.
const MAX_TRANSLATIONS: usize = 200_000;

/// How pods name the controllers that are their parents, the topmost first.
const CONTROLLERS: [(Kind, &str, &str); 5] = [
    (Kind::Deployment, "deployment", "Deployment"),
    (Kind::StatefulSet, "stateful_set", "StatefulSet"),
    (Kind::DaemonSet, "daemon_set", "DaemonSet"),
    (Kind::CronJob, "cron_job", "CronJob"),
    (Kind::Job, "job", "Job"),
];

/// What the nodes that were read so far say.
#[derive(Debug, Default)]
pub(super) struct Draft {
    pods: Vec<DraftPod>,
    services: Vec<Service>,
    namespaces: Vec<Namespace>,
    /// Names of controllers, by kind and id.
    controllers: HashMap<(Kind, String), String>,
    /// Names of hosts, with the addresses of their interfaces.
    hosts: BTreeMap<String, Vec<IpAddr>>,
    /// The hosts of pods by the pods' uids, as their containers say it.
    hosts_of_pods: HashMap<String, Arc<str>>,
    /// Addresses and ports that connections were made to, and where they went.
    translations: HashMap<(IpAddr, u16), BTreeSet<(IpAddr, u16)>>,
    translated: usize,
    common: Common,
    warnings: Vec<String>,
    /// How many warnings were left out.
    unsaid: usize,
    last: Option<String>,
    nodes: usize,
    most: usize,
}

/// A pod whose parents may not have been read yet.
#[derive(Debug)]
struct DraftPod {
    pod: Pod,
    controller: Option<(Kind, String)>,
    services: Vec<String>,
}

impl Draft {
    /// Takes no more than `most` nodes.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            ..Self::default()
        }
    }

    /// After which node, for a message.
    pub(super) fn last_read(&self) -> String {
        match &self.last {
            Some(id) => format!(", after node `{id}`"),
            None => String::new(),
        }
    }

    /// Takes a node, or what is wrong with it.
    ///
    /// # Errors
    /// If there are too many.
    pub(super) fn take(
        &mut self,
        kind: Kind,
        id: &str,
        node: Result<&ReportNode, String>,
    ) -> Result<(), String> {
        self.nodes += 1;
        if self.nodes > self.most {
            return Err(format!("more than {} nodes", self.most));
        }
        let last = self.last.get_or_insert_default();
        last.clear();
        last.push_str(id);
        if let Err(problem) = node.and_then(|node| self.add(kind, id, node)) {
            if self.warnings.len() < MAX_WARNINGS {
                self.warnings.push(format!("node `{id}`: {problem}"));
            } else {
                self.unsaid += 1;
            }
        }
        Ok(())
    }

    fn add(&mut self, kind: Kind, id: &str, node: &ReportNode) -> Result<(), String> {
        match kind {
            Kind::Pod => {
                let pod = self.pod(id, node)?;
                self.pods.push(pod);
            }
            Kind::Service => self.services.push(service(id, node)?),
            Kind::Namespace => self.namespaces.push(Namespace {
                name: node.required("kubernetes_name")?.to_owned(),
                labels: labels(node),
            }),
            Kind::Host => {
                let networks = node.networks();
                let own = networks
                    .filter_map(|network| network.split('/').next()?.parse::<IpAddr>().ok());
                let own = own.filter(|address| !address.is_loopback());
                self.hosts
                    .entry(first_part(id).to_owned())
                    .or_default()
                    .extend(own);
            }
            Kind::Container => {
                let host = node.latest("host_node_id").or(node.parent("host"));
                if let (Some(pod), Some(host)) = (node.parent("pod"), host) {
                    let host = Arc::from(first_part(host));
                    self.hosts_of_pods.insert(first_part(pod).to_owned(), host);
                }
            }
            Kind::Endpoint => {
                if let Some(real) = node.latest("copy_of") {
                    self.translation(id, real);
                }
            }
            Kind::Deployment | Kind::StatefulSet | Kind::DaemonSet | Kind::CronJob | Kind::Job => {
                let name = node.required("kubernetes_name")?.to_owned();
                self.controllers.insert((kind, id.to_owned()), name);
            }
        }
        Ok(())
    }

    fn pod(&mut self, id: &str, node: &ReportNode) -> Result<DraftPod, String> {
        let phase = match node.latest("kubernetes_state") {
            Some("Succeeded" | "Failed") => Phase::Finished { at: None },
            Some("Pending") => Phase::Pending,
            _ => Phase::Running,
        };
        let mut controllers = CONTROLLERS.iter();
        let controller = controllers
            .find_map(|(kind, parent, _)| Some((*kind, node.parent(parent)?.to_owned())));
        let mut pod = Pod {
            identity: endpoint::Pod {
                uid: first_part(id).to_owned(),
                namespace: node.required("kubernetes_namespace")?.to_owned(),
                name: node.required("kubernetes_name")?.to_owned(),
                labels: Arc::new(labels(node)),
                workload: None,
                node: node.parent("host").map(first_part).map(Arc::from),
                host_network: node.latest("kubernetes_is_in_host_network") == Some("true"),
                addresses: address(node)?.into_iter().collect(),
                services: Arc::default(),
            },
            static_uid: None,
            ports: Arc::default(),
            phase,
            started: created(node)?,
        };
        self.common.share(&mut pod);
        Ok(DraftPod {
            pod,
            controller,
            services: node.parents("service").to_vec(),
        })
    }

    fn translation(&mut self, id: &str, real: &str) {
        let (Some(called), Some(real)) = (address_and_port(id), address_and_port(real)) else {
            return;
        };
        if self.translated < MAX_TRANSLATIONS
            && self.translations.entry(called).or_default().insert(real)
        {
            self.translated += 1;
        }
    }

    /// What the whole report says.
    pub(super) fn finish(mut self) -> Report {
        let mut members = HashMap::<String, Vec<IpAddr>>::new();
        let mut pods = Vec::with_capacity(self.pods.len());
        for draft in std::mem::take(&mut self.pods) {
            let mut pod = draft.pod;
            let identity = &mut pod.identity;
            identity.workload = draft
                .controller
                .and_then(|controller| self.workload(&controller))
                .map(Arc::new);
            if identity.node.is_none() {
                identity.node = self.hosts_of_pods.get(&identity.uid).cloned();
            }
            self.common.share(&mut pod);
            for service in draft.services {
                let members = members.entry(first_part(&service).to_owned()).or_default();
                members.extend(&pod.identity.addresses);
            }
            pods.push(pod);
        }
        set_apart_host_pods(&mut pods);
        pods.sort_unstable_by(|a, b| a.identity.uid.cmp(&b.identity.uid));

        self.lead_ports_to_pods(&pods);
        let slices = self.services.iter().filter_map(|service| {
            let identity = &service.identity;
            let members = members.remove(&identity.uid)?;
            slice(identity, members)
        });
        let endpoint_slices = slices.collect();
        let nodes = self.nodes(&pods);
        let (mut services, mut namespaces) = (self.services, self.namespaces);
        services.sort_unstable_by(|a, b| a.identity.uid.cmp(&b.identity.uid));
        namespaces.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut warnings = self.warnings;
        if self.unsaid > 0 {
            warnings.push(format!("{} more malformed nodes", self.unsaid));
        }
        let mut objects = Objects {
            namespaces,
            nodes,
            services,
            endpoint_slices,
            pods,
        };
        objects
            .endpoint_slices
            .sort_unstable_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        Report { objects, warnings }
    }

    fn workload(&self, controller: &(Kind, String)) -> Option<Workload> {
        let name = self.controllers.get(controller)?;
        let (kind, name) = match controller.0 {
            // Of a CronJob's Jobs only those that are running have it for a parent.
            Kind::Job => match cron_job(name) {
                Some(cron_job) => ("CronJob", cron_job),
                None => ("Job", name.as_str()),
            },
            kind => {
                let mut known = CONTROLLERS.iter();
                (known.find(|known| known.0 == kind)?.2, name.as_str())
            }
        };
        Some(Workload {
            kind: kind.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Services' ports lead where connections to them were seen to go. Scope's tracker sees TCP only.
    fn lead_ports_to_pods(&mut self, pods: &[Pod]) {
        if self.translations.is_empty() {
            return;
        }
        let pods: HashSet<IpAddr> = pods
            .iter()
            .flat_map(|pod| pod.identity.addresses.iter().copied())
            .collect();
        for service in &mut self.services {
            let ports = service.ports.iter_mut();
            for port in ports.filter(|port| port.protocol == Protocol::Tcp) {
                let mut seen = BTreeMap::<u16, usize>::new();
                for address in &service.cluster_addresses {
                    let went = self.translations.get(&(*address, port.port));
                    let went = went.into_iter().flatten();
                    for (_, number) in went.filter(|(address, _)| pods.contains(address)) {
                        *seen.entry(*number).or_default() += 1;
                    }
                }
                if let Some(number) = most_common(&seen) {
                    port.target = TargetPort::Number(number);
                }
            }
        }
    }

    /// The nodes, with the addresses of the pods in their networks and of their own interfaces. An address in use by pods in a
    /// node's network stands for its node if nothing tells the node's name.
    fn nodes(&mut self, pods: &[Pod]) -> Vec<Node> {
        let mut addresses: BTreeMap<String, Vec<IpAddr>> = self
            .hosts
            .keys()
            .map(|name| (name.clone(), Vec::new()))
            .collect();
        let identities = pods.iter().map(|pod| &pod.identity);
        for pod in identities.filter(|pod| pod.host_network) {
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
        let mut holders = HashMap::<IpAddr, usize>::new();
        for interfaces in self.hosts.values_mut() {
            interfaces.sort_unstable();
            interfaces.dedup();
            for address in &*interfaces {
                *holders.entry(*address).or_default() += 1;
            }
        }
        let nodes = addresses.into_iter().map(|(name, mut addresses)| {
            addresses.sort_unstable();
            let mut interfaces = self.hosts.remove(&name).unwrap_or_default();
            // The bridges of container engines have the same address on every node.
            interfaces.retain(|own| holders[own] == 1 && !addresses.contains(own));
            Node {
                identity: Arc::new(endpoint::Node { name, addresses }),
                interfaces,
                pod_cidrs: Vec::new(),
                created: None,
            }
        });
        nodes.collect()
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

/// The endpoints of a service of which the probe did not say whom it selects: the pods that have it for a parent.
fn slice(service: &endpoint::Service, mut members: Vec<IpAddr>) -> Option<EndpointSlice> {
    if !service.selector.is_empty() {
        return None;
    }
    members.sort_unstable();
    members.dedup();
    Some(EndpointSlice {
        namespace: service.namespace.clone(),
        name: service.name.clone(),
        service: Some(service.name.clone()),
        endpoints: u32::try_from(members.len()).unwrap_or(u32::MAX),
        addresses: members,
        ports: Vec::new(),
    })
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
            uid: first_part(id).to_owned(),
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
        // Where it leads the service does not say.
        target: TargetPort::Number(port),
        node_port,
    })
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

/// What stands before the first `;` of an id: `UID;<kind>`, `NAME;<host>`.
fn first_part(id: &str) -> &str {
    id.split(';').next().unwrap_or_default()
}

/// Of an endpoint's id, `SCOPE;ADDRESS;PORT`.
fn address_and_port(id: &str) -> Option<(IpAddr, u16)> {
    let mut parts = id.split(';');
    let (_scope, address, port) = (parts.next()?, parts.next()?, parts.next()?);
    let address = address.parse::<IpAddr>().ok()?.to_canonical();
    Some((address, port.parse().ok()?))
}
