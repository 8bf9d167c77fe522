use flow::topology::{Change, Object, Phase, Pod};

use super::*;
use crate::{identity::ContainerRef, scope::Process as Told};

fn second(second: u64) -> Timestamp {
    Timestamp::from_nanos(second * 1_000_000_000)
}

/// Two pods on this node, of which the second is in its network, and one on another.
fn index() -> Index {
    let mut index = Index::default();
    for (name, address, node) in [
        ("web", [10, 0, 0, 1], "node-1"),
        ("host", [192, 168, 0, 1], "node-1"),
        ("api", [10, 0, 9, 9], "node-2"),
    ] {
        let pod = running(name, address, node);
        index.apply(Change::Upsert(Object::Pod(pod)), second(1));
    }
    index
}

fn running(name: &str, address: [u8; 4], node: &str) -> Pod {
    Pod {
        identity: flow::endpoint::Pod {
            uid: name.to_owned(),
            namespace: "shop".to_owned(),
            name: name.to_owned(),
            labels: Arc::default(),
            workload: None,
            node: Some(node.into()),
            host_network: name == "host",
            addresses: vec![address.into()],
            services: Arc::default(),
        },
        static_uid: None,
        ports: Arc::default(),
        phase: Phase::Running,
        started: Some(second(1)),
    }
}

/// A call of `web`, and what the log says of it.
fn sighting(pid: u32, log: Option<FromLog>) -> Sighting {
    let local = [10, 0, 0, 1].into();
    Sighting {
        observation: Observation {
            event: Event::Connect(Outcome::Established),
            protocol: Protocol::Tcp,
            local,
            remote: [10, 96, 0, 1].into(),
            port: 80,
            cgroup: 0,
            netns: 0,
            pid,
            comm: "own".to_owned(),
            client_port: 0,
            connection: None,
            count: 1,
            first_seen: second(100),
            last_seen: second(100),
        },
        owner: None,
        log: log.map(Box::new),
        round: 0,
    }
}

fn log(is_alone: bool) -> FromLog {
    FromLog {
        is_alone,
        host: Some("node-7".into()),
        process: Some(Told {
            pid: 8,
            comm: "told".to_owned(),
            fd: Some(3),
        }),
        backend: None,
        is_old: false,
    }
}

fn record(sighting: &Sighting) -> FlowRecord {
    record_for(Resolve::Both, sighting)
}

fn record_for(resolve: Resolve, sighting: &Sighting) -> FlowRecord {
    let resolver = Resolver::new("node-1".to_owned(), resolve, false);
    resolver.name(sighting, &index()).record.unwrap()
}

#[test]
fn sources_are_who_saw_it() {
    for (told, sources, host) in [
        (None, vec![Source::Ebpf], "node-1"),
        (
            Some(log(false)),
            vec![Source::Ebpf, Source::Scope],
            "node-1",
        ),
        (Some(log(true)), vec![Source::Scope], "node-7"),
    ] {
        let record = record(&sighting(8, told));
        assert_eq!(record.sources, BTreeSet::from_iter(sources));
        assert_eq!(record.hostname, host);
        assert_eq!(record.src.to_string(), "shop/web");
    }
}

#[test]
fn each_adds_what_the_other_lacks() {
    let process = |pid| record(&sighting(pid, Some(log(false)))).process.unwrap();
    let own = process(7);
    assert_eq!((own.pid, own.comm.as_str(), own.fd), (7, "own", None));
    let same = process(8);
    assert_eq!((same.comm.as_str(), same.fd), ("own", Some(3)));
    let told = process(0);
    assert_eq!(
        (told.pid, told.comm.as_str(), told.fd),
        (8, "told", Some(3))
    );
}

#[test]
fn the_server_behind_an_address_is_who_the_node_says() {
    let mut told = log(false);
    told.backend = Some(SocketAddr::from(([10, 0, 9, 9], 8080)));
    let sighting = sighting(8, Some(told));
    let named = record(&sighting);
    assert_eq!(named.dst.to_string(), "shop/api");
    assert_eq!(named.tuple.dst_port, 8080);
    assert_eq!(named.tuple.dst_addr, IpAddr::from([10, 96, 0, 1]));
    let via = Some(SocketAddr::from(([10, 96, 0, 1], 80)));
    assert_eq!(named.via, via);
    // Where somebody else names the server, its address is what that goes by.
    let mut later = record_for(Resolve::Local, &sighting);
    assert_eq!(later.tuple.dst_addr, IpAddr::from([10, 0, 9, 9]));
    index().name_ends(&mut later);
    assert_eq!(later.dst.to_string(), "shop/api");
    assert_eq!((later.tuple.dst_port, later.via), (8080, via));
}

/// Some network plugins give out the last address of a node's range.
#[test]
fn to_everybody_is_what_no_pod_has_the_address_of() {
    let node = flow::topology::Node {
        identity: Arc::new(Node {
            name: "node-2".to_owned(),
            addresses: Vec::new(),
        }),
        interfaces: Vec::new(),
        pod_cidrs: vec!["10.0.9.0/24".parse().unwrap()],
        created: None,
    };
    let mut index = index();
    index.apply(Change::Upsert(Object::Node(node)), second(1));
    let mut sighting = sighting(7, None);
    sighting.observation.protocol = Protocol::Udp;
    sighting.observation.remote = [10, 0, 9, 255].into();
    let resolver = Resolver::new("node-1".to_owned(), Resolve::Both, true);
    let named = resolver.name(&sighting, &index);
    assert_eq!(named.record, Err(Skipped::Loopback));
    assert!(named.may_change, "the pod may be a young one");

    let mut last = running("last", [10, 0, 9, 255], "node-2");
    last.started = Some(second(90));
    index.apply(Change::Upsert(Object::Pod(last)), second(90));
    let record = resolver.name(&sighting, &index).record.unwrap();
    assert_eq!(record.dst.to_string(), "shop/last");
    sighting.observation.last_seen = second(10);
    let named = resolver.name(&sighting, &index);
    assert_eq!(named.record, Err(Skipped::Loopback), "before it was there");
}

/// What a process's id says counts as long as the address does not say otherwise.
#[test]
fn another_process_may_have_the_id_by_now() {
    let container = |uid: &str| {
        Owner::ContainerOfProcess(ContainerRef {
            pod_uid: uid.to_owned(),
            container: Some(format!("{uid}-container")),
        })
    };
    let (web, node) = ([10, 0, 0, 1], [192, 168, 0, 1]);
    for (owner, local, name, container) in [
        (container("web"), web, "shop/web", Some("web-container")),
        (container("host"), web, "shop/web", None),
        (container("unknown"), web, "shop/web", None),
        (Owner::HostProcess, web, "shop/web", None),
        (container("host"), node, "shop/host", Some("host-container")),
        (container("web"), node, "192.168.0.1", None),
        (Owner::HostProcess, node, "node node-1", None),
    ] {
        let mut sighting = sighting(7, None);
        sighting.observation.local = local.into();
        sighting.owner = Some(owner.clone());
        let resolver = Resolver::new("node-1".to_owned(), Resolve::Both, true);
        let record = resolver.name(&sighting, &index()).record.unwrap();
        assert_eq!(record.src.to_string(), name, "{owner:?}");
        let process = record.process.unwrap();
        assert_eq!(process.container.as_deref(), container, "{owner:?}");
    }
}
