//! The index against a model that keeps everything in flat lists and looks at all of it for every question.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use flow::{
    endpoint::{self, Endpoint, Labels},
    record::Protocol,
    time::Timestamp,
    topology::{
        Change, ContainerPort, GRACE, Index, Node, Object, ObjectKey, Objects, Phase, Pod,
        RETENTION, Service, ServicePort, TargetPort,
    },
};
use proptest::prelude::*;

const FOREVER: Timestamp = Timestamp::from_nanos(u64::MAX);

/// Something that happens.
#[derive(Clone, Debug)]
enum Step {
    Pod(Pod),
    /// With when it ended, if that is told.
    DeletePod(usize, Option<Timestamp>),
    Service(Service),
    DeleteService(usize),
    Relist {
        pods: Vec<Pod>,
        services: Vec<Service>,
    },
    Expire,
}

/// Who held what when, as far as the model has heard.
#[derive(Clone, Debug)]
struct Claim {
    address: IpAddr,
    owner: Owner,
    from: Timestamp,
    to: Timestamp,
    surely_to: Timestamp,
    /// When the end was learnt.
    learnt: Timestamp,
}

#[derive(Clone, Debug, PartialEq)]
enum Owner {
    Pod(String),
    Service(String),
    Node,
}

/// A version of a service.
#[derive(Clone, Debug)]
struct Version {
    name: String,
    from: Timestamp,
    ports: Vec<ServicePort>,
}

#[derive(Default)]
struct Model {
    now: Timestamp,
    /// When it was last known what there was.
    since: Timestamp,
    /// Living and ended pods by uid; the second is the time of the end.
    pods: BTreeMap<String, (Pod, Option<Timestamp>)>,
    services: BTreeMap<String, (Service, Option<Timestamp>)>,
    versions: Vec<Version>,
    claims: Vec<Claim>,
}

impl Model {
    fn step(&mut self, step: Step) {
        match step {
            Step::Pod(pod) => self.pod(pod, false),
            Step::DeletePod(i, ended) => self.delete_pod(&pod_name(i), ended),
            Step::Service(service) => self.service(service, false),
            Step::DeleteService(i) => self.delete_service(&service_name(i)),
            Step::Relist { mut pods, services } => {
                self.since = self.now;
                let listed: Vec<_> = services.iter().map(|s| s.identity.name.clone()).collect();
                for service in services {
                    self.service(service, true);
                }
                for name in self.services.keys().cloned().collect::<Vec<_>>() {
                    if !listed.contains(&name) {
                        self.delete_service(&name);
                    }
                }
                let listed: Vec<_> = pods.iter().map(|pod| pod.identity.uid.clone()).collect();
                pods.sort_by_key(|pod| !matches!(pod.phase, Phase::Finished { .. }));
                for pod in pods {
                    self.pod(pod, true);
                }
                for uid in self.pods.keys().cloned().collect::<Vec<_>>() {
                    if !listed.contains(&uid) {
                        self.delete_pod(&uid, None);
                    }
                }
            }
            Step::Expire => self.expire(),
        }
    }

    fn expire(&mut self) {
        let now = self.now;
        let due = |ended: Timestamp| ended.saturating_add(RETENTION) < now;
        self.claims
            .retain(|claim| claim.to == FOREVER || !due(claim.learnt));
        let is_known = |ended: Option<Timestamp>| !ended.is_some_and(due);
        self.pods.retain(|_, (_, ended)| is_known(*ended));
        self.services.retain(|_, (_, ended)| is_known(*ended));
        let services = &self.services;
        self.versions
            .retain(|version| services.contains_key(&version.name));
        // A version is forgotten when the one that replaced it is old.
        let versions = self.versions.clone();
        let mut i = 0;
        self.versions.retain(|version| {
            let rest = &versions[i + 1..];
            i += 1;
            let next = rest.iter().find(|next| next.name == version.name);
            !next.is_some_and(|next| due(next.from))
        });
    }

    fn pod(&mut self, pod: Pod, by_list: bool) {
        let owner = Owner::Pod(pod.identity.uid.clone());
        let before = self.pods.get(&pod.identity.uid);
        let before = before.filter(|(_, ended)| ended.is_none()).cloned();
        let was_finished = before
            .as_ref()
            .is_some_and(|(before, _)| matches!(before.phase, Phase::Finished { .. }));
        let wanted: Vec<IpAddr> = match pod.phase {
            _ if pod.identity.host_network => Vec::new(),
            Phase::Finished { at } if was_finished || at.is_none() => Vec::new(),
            _ => pod.identity.addresses.clone(),
        };
        // An address that it gets instead of another it has since now.
        let open = |claim: &Claim| claim.owner == owner && claim.to == FOREVER;
        let is_new = !self.claims.iter().any(open);
        self.claim(&owner, &wanted, pod.started, is_new, by_list);
        if let Phase::Finished { at: Some(at) } = pod.phase {
            self.release(&owner, &[], Some(at));
        }
        self.pods.insert(pod.identity.uid.clone(), (pod, None));
    }

    fn delete_pod(&mut self, uid: &str, told: Option<Timestamp>) {
        let now = self.now;
        if let Some((_, ended @ None)) = self.pods.get_mut(uid) {
            *ended = Some(now);
            self.release(&Owner::Pod(uid.to_owned()), &[], told);
        }
    }

    fn service(&mut self, service: Service, by_list: bool) {
        let name = service.identity.name.clone();
        let owner = Owner::Service(name.clone());
        let before = self.services.get(&name);
        let is_new = before.is_none_or(|(_, ended)| ended.is_some());
        let (addresses, created) = (&service.cluster_addresses, service.created);
        self.claim(&owner, addresses, created, is_new, by_list);
        let last = self.versions.iter().rfind(|version| version.name == name);
        let unnamed = |ports: &[ServicePort]| -> Vec<ServicePort> {
            let mut ports = ports.to_vec();
            ports.iter_mut().for_each(|port| port.name.clear());
            ports
        };
        if last.map(|last| unnamed(&last.ports)) != Some(unnamed(&service.ports)) {
            self.versions.push(Version {
                name: name.clone(),
                from: self.now,
                ports: service.ports.clone(),
            });
        }
        self.services.insert(name, (service, None));
    }

    fn delete_service(&mut self, name: &str) {
        let now = self.now;
        if let Some((_, ended @ None)) = self.services.get_mut(name) {
            *ended = Some(now);
            self.release(&Owner::Service(name.to_owned()), &[], None);
        }
    }

    fn claim(
        &mut self,
        owner: &Owner,
        wanted: &[IpAddr],
        started: Option<Timestamp>,
        is_new: bool,
        by_list: bool,
    ) {
        let open = |claim: &&Claim| claim.owner == *owner && claim.to == FOREVER;
        let held: Vec<IpAddr> = self.claims.iter().filter(open).map(|c| c.address).collect();
        self.release(owner, wanted, None);
        for address in wanted.iter().filter(|address| !held.contains(address)) {
            let mut from = match started {
                _ if !is_new => self.since,
                Some(started) => started,
                None if by_list => Timestamp::default(),
                None => self.since,
            };
            for other in &self.claims {
                let is_same_kind =
                    matches!(other.owner, Owner::Pod(_)) == matches!(owner, Owner::Pod(_));
                if other.address == *address && is_same_kind && other.owner != Owner::Node {
                    if other.to != FOREVER {
                        from = from.max(other.surely_to);
                    } else if !by_list {
                        from = from.max(self.since);
                    }
                }
            }
            self.claims.push(Claim {
                address: *address,
                owner: owner.clone(),
                from: from.min(self.now),
                to: FOREVER,
                surely_to: FOREVER,
                learnt: FOREVER,
            });
        }
    }

    fn release(&mut self, owner: &Owner, except: &[IpAddr], told: Option<Timestamp>) {
        let told = told.map(|told| told.saturating_add(Duration::from_secs(1)).min(self.now));
        for claim in &mut self.claims {
            if claim.owner == *owner && claim.to == FOREVER && !except.contains(&claim.address) {
                claim.to = told.unwrap_or(self.now).max(claim.from);
                claim.surely_to = told.unwrap_or(self.since).clamp(claim.from, claim.to);
                claim.learnt = self.now;
            }
        }
    }

    fn owner(&self, address: IpAddr, at: Timestamp, of: impl Fn(&Owner) -> bool) -> Option<&Owner> {
        let claims = || {
            let all = self.claims.iter();
            all.filter(|claim| claim.address == address && of(&claim.owner))
        };
        let inside = claims().filter(|claim| claim.from <= at && at < claim.to);
        let before = claims().filter(|c| c.to <= at && at < c.to.saturating_add(GRACE));
        let after = claims().filter(|c| at < c.from && c.from <= at.saturating_add(GRACE));
        inside
            .max_by_key(|claim| claim.from)
            .or(before.max_by_key(|claim| claim.to))
            .or(after.min_by_key(|claim| claim.from))
            .map(|claim| &claim.owner)
    }

    /// The target of a port of a service at a time.
    fn target(&self, name: &str, port: u16, at: Timestamp) -> Option<u16> {
        let versions: Vec<_> = self.versions.iter().filter(|v| v.name == name).collect();
        let version = versions.iter().rfind(|version| version.from <= at);
        let version = version.or(versions.first())?;
        let port = version.ports.iter().find(|known| known.port == port)?;
        let wanted = match &port.target {
            TargetPort::Number(number) => return Some(*number),
            TargetPort::Name(name) => name,
        };
        let mut counts: BTreeMap<u16, usize> = BTreeMap::new();
        for (pod, ended) in self.pods.values() {
            let backs = ended.is_none() && !matches!(pod.phase, Phase::Finished { .. });
            if backs && self.services_of(pod).contains(&name.to_owned()) {
                for known in pod.ports.iter().filter(|known| known.name == *wanted) {
                    *counts.entry(known.port).or_default() += 1;
                }
            }
        }
        let most = counts.values().max().copied();
        let lowest = counts.iter().find(|(_, count)| Some(**count) == most);
        Some(lowest.map_or(port.port, |(number, _)| *number))
    }

    /// The living services that select a living pod.
    fn services_of(&self, pod: &Pod) -> Vec<String> {
        let living = self.services.values().filter(|(_, ended)| ended.is_none());
        let selecting = living
            .map(|(service, _)| &service.identity)
            .filter(|service| {
                let selector = &service.selector;
                let labels = &pod.identity.labels;
                service.namespace == pod.identity.namespace
                    && !selector.is_empty()
                    && selector
                        .iter()
                        .all(|pair| labels.iter().any(|label| label == pair))
            });
        selecting.map(|service| service.name.clone()).collect()
    }

    fn client(&self, address: IpAddr, at: Timestamp) -> String {
        match self.owner(address, at, |owner| matches!(owner, Owner::Pod(_))) {
            Some(Owner::Pod(uid)) => format!("shop/{uid}"),
            _ => self.node_or_external(address),
        }
    }

    fn server(&self, address: IpAddr, port: u16, at: Timestamp) -> String {
        let has_port = |owner: &Owner| match owner {
            Owner::Service(name) => self.target(name, port, at).is_some(),
            _ => false,
        };
        let is_pod = |owner: &Owner| matches!(owner, Owner::Pod(_));
        let is_service = |owner: &Owner| matches!(owner, Owner::Service(_));
        let owner = self
            .owner(address, at, has_port)
            .or(self.owner(address, at, is_pod))
            .or(self.owner(address, at, is_service));
        match owner {
            Some(Owner::Service(name)) => {
                let target = self.target(name, port, at).unwrap_or(port);
                format!("service shop/{name}:{target}")
            }
            Some(Owner::Pod(uid)) => format!("shop/{uid}:{port}"),
            _ => format!("{}:{port}", self.node_or_external(address)),
        }
    }

    fn node_or_external(&self, address: IpAddr) -> String {
        match address {
            IpAddr::V4(ip) if ip.octets()[..3] == [10, 0, 0] => "node node-1".to_owned(),
            other => other.to_string(),
        }
    }
}

fn pod_name(i: usize) -> String {
    format!("pod-{i}")
}

fn service_name(i: usize) -> String {
    format!("service-{i}")
}

fn at(millis: u64) -> Timestamp {
    Timestamp::from_nanos((1_700_000_000_000 + millis) * 1_000_000)
}

fn node() -> Node {
    Node {
        identity: Arc::new(endpoint::Node {
            name: "node-1".to_owned(),
            addresses: Vec::new(),
        }),
        interfaces: Vec::new(),
        pod_cidrs: vec!["10.0.0.0/24".parse().unwrap()],
        created: None,
    }
}

/// Four addresses in the node's range, and one outside.
fn address() -> impl Strategy<Value = IpAddr> {
    (1..6_u8).prop_map(|i| if i == 5 { [10, 9, 9, 9] } else { [10, 0, 0, i] }.into())
}

fn labels() -> impl Strategy<Value = Labels> {
    prop::collection::btree_map("[ab]", "[xy]", 0..3)
}

/// A time near those of the history, in milliseconds; it grows by up to ten minutes at a step.
fn moment() -> impl Strategy<Value = u64> {
    prop_oneof![0..20_000_u64, 0..2_000_000_u64]
}

fn pod() -> impl Strategy<Value = Pod> {
    let phase = prop_oneof![
        4 => Just(Phase::Running),
        1 => Just(Phase::Pending),
        1 => prop::option::of(moment().prop_map(at)).prop_map(|at| Phase::Finished { at }),
    ];
    let addresses = prop::collection::btree_set(address(), 0..3);
    let ports = prop::collection::btree_map("[hg]", 1000..1003_u16, 0..3);
    let started = prop::option::of(moment().prop_map(at));
    (
        0..5_usize,
        labels(),
        addresses,
        prop::bool::weighted(0.1),
        phase,
        ports,
        started,
    )
        .prop_map(
            |(i, labels, addresses, host_network, phase, ports, started)| Pod {
                identity: endpoint::Pod {
                    uid: pod_name(i),
                    namespace: "shop".to_owned(),
                    name: pod_name(i),
                    labels: labels.into(),
                    workload: None,
                    node: Some("node-1".into()),
                    host_network,
                    addresses: addresses.into_iter().collect(),
                    services: Arc::default(),
                },
                static_uid: None,
                ports: ports
                    .into_iter()
                    .map(|(name, port)| ContainerPort {
                        name,
                        protocol: Protocol::Tcp,
                        port,
                        host_port: None,
                    })
                    .collect(),
                phase,
                started,
            },
        )
}

fn service() -> impl Strategy<Value = Service> {
    let target = prop_oneof![
        (1000..1003_u16).prop_map(TargetPort::Number),
        "[hg]".prop_map(TargetPort::Name),
    ];
    let ports = prop::collection::btree_map(80..82_u16, target, 0..3);
    let addresses = prop::collection::btree_set(address(), 0..2);
    let created = prop::option::of(moment().prop_map(at));
    (0..3_usize, labels(), addresses, ports, created)
        .prop_map(|(i, selector, addresses, ports, created)| Service {
            identity: Arc::new(endpoint::Service {
                uid: service_name(i),
                namespace: "shop".to_owned(),
                name: service_name(i),
                labels: Labels::new(),
                selector,
                backends: Vec::new(),
            }),
            cluster_addresses: addresses.into_iter().collect(),
            external_addresses: Vec::new(),
            ports: ports
                .into_iter()
                .map(|(port, target)| ServicePort {
                    name: String::new(),
                    protocol: Protocol::Tcp,
                    port,
                    // Without a selector the name of a target port means nothing.
                    target,
                    node_port: None,
                })
                .collect(),
            created,
        })
        .prop_filter("a named port needs pods", |service| {
            let is_number = |port: &ServicePort| matches!(port.target, TargetPort::Number(_));
            !service.identity.selector.is_empty() || service.ports.iter().all(is_number)
        })
}

/// How long ago something may have happened that is learnt now, in milliseconds.
fn late() -> impl Strategy<Value = u64> {
    prop_oneof![2 => Just(0_u64), 1 => 0..60_000_u64]
}

fn step() -> impl Strategy<Value = Step> {
    let pods = prop::collection::vec(pod(), 0..5).prop_map(|mut pods| {
        pods.sort_by(|a, b| a.identity.uid.cmp(&b.identity.uid));
        pods.dedup_by(|a, b| a.identity.uid == b.identity.uid);
        pods
    });
    let services = prop::collection::vec(service(), 0..3).prop_map(|mut services| {
        services.sort_by(|a, b| a.identity.uid.cmp(&b.identity.uid));
        services.dedup_by(|a, b| a.identity.uid == b.identity.uid);
        services
    });
    prop_oneof![
        8 => pod().prop_map(Step::Pod),
        4 => (0..5_usize, prop::option::of(moment().prop_map(at)))
            .prop_map(|(i, ended)| Step::DeletePod(i, ended)),
        4 => service().prop_map(Step::Service),
        2 => (0..3_usize).prop_map(Step::DeleteService),
        1 => (pods, services).prop_map(|(pods, services)| Step::Relist { pods, services }),
        2 => Just(Step::Expire),
    ]
}

fn apply(index: &mut Index, step: Step, since: Timestamp, now: Timestamp) {
    match step {
        Step::Pod(pod) => index.apply_late(Change::Upsert(Object::Pod(pod)), since, now),
        Step::DeletePod(i, ended) => {
            let key = ObjectKey::Pod { uid: pod_name(i) };
            index.apply_late(Change::Delete { key, ended }, since, now);
        }
        Step::Service(service) => {
            index.apply_late(Change::Upsert(Object::Service(service)), since, now);
        }
        Step::DeleteService(i) => {
            let (namespace, name) = ("shop".to_owned(), service_name(i));
            let key = ObjectKey::Service { namespace, name };
            index.apply_late(Change::Delete { key, ended: None }, since, now);
        }
        Step::Relist { pods, services } => {
            let objects = Objects {
                nodes: vec![node()],
                pods,
                services,
                ..Objects::default()
            };
            index.replace(objects, now);
        }
        Step::Expire => index.expire(now),
    }
}

fn ask(index: &Index, address: IpAddr, port: u16, at: Timestamp) -> (String, String) {
    let server = index.resolve(address, Protocol::Tcp, port, at);
    let client = index.resolve_client(address, at);
    (
        client.to_string(),
        format!("{}:{}", server.endpoint, server.port),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn the_index_answers_as_the_model(
        history in prop::collection::vec(
            (prop_oneof![3 => 0..3_000_u64, 1 => 0..400_000_u64], late(), step()),
            1..40,
        ),
        questions in prop::collection::vec((address(), 79..82_u16, moment()), 30),
    ) {
        let mut index = Index::default();
        index.apply(Change::Upsert(Object::Node(node())), at(0));
        let mut model = Model::default();
        let mut millis = 0;
        for (later, late, step) in history {
            millis += later;
            let since = at(millis.saturating_sub(late));
            (model.now, model.since) = (at(millis), since);
            model.step(step.clone());
            apply(&mut index, step, since, at(millis));
        }

        let mut asked = Vec::new();
        for (address, port, moment) in questions {
            asked.push((address, port, at(moment)));
            asked.push((address, port, at(millis.saturating_sub(moment))));
        }
        // The moments at which something begins or ends.
        for claim in &model.claims {
            for edge in [claim.from, claim.surely_to, claim.to, claim.to.saturating_add(GRACE)] {
                asked.push((claim.address, 80, edge));
                let before = edge.saturating_sub(Duration::from_nanos(1));
                asked.push((claim.address, 80, before));
            }
        }
        for (address, port, time) in asked {
            let expected = (model.client(address, time), model.server(address, port, time));
            prop_assert_eq!(ask(&index, address, port, time), expected, "{} {:?}", address, time);
        }
        for i in 0..5 {
            let known = index.pod_by_uid(&pod_name(i));
            let expected = model.pods.get(&pod_name(i));
            prop_assert_eq!(known.is_some(), expected.is_some());
            let (Some(known), Some((pod, ended))) = (known, expected) else { continue };
            if ended.is_some() {
                continue;
            }
            let services = model.services_of(pod);
            prop_assert_eq!(&*known.services, &services);
            for port in 1000..1003 {
                let leads_here = |name: &&String| {
                    let (service, _) = &model.services[*name];
                    service.ports.iter().any(|known| match &known.target {
                        TargetPort::Number(number) => *number == port,
                        TargetPort::Name(name) => {
                            pod.ports.iter().any(|own| own.name == *name && own.port == port)
                        }
                    })
                };
                let expected = services.iter().find(leads_here).or(services.first());
                let Endpoint::Pod { service, .. } = index.pod_endpoint(&known, Protocol::Tcp, Some(port))
                else {
                    panic!("not a pod");
                };
                prop_assert_eq!(service.map(|service| service.name.clone()), expected.cloned());
            }
        }
    }
}
