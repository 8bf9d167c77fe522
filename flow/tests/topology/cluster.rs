//! What the recorded cluster does not show.

use std::{path::Path, sync::Arc};

use flow::{
    endpoint::Endpoint,
    record::Protocol,
    time::Timestamp,
    topology::{Change, Index, Object, ObjectKey, Objects, Phase, Pod, RETENTION, file},
};

fn objects(yaml: &str) -> Objects {
    let loaded = file::parse(Path::new("inline"), yaml.as_bytes()).unwrap();
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    loaded.objects
}

/// A pod in the namespace `shop`; `name` is its uid, too.
fn pod(name: &str, address: &str, started: u64) -> Pod {
    let yaml = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, uid: {name}, labels: {{app: a}}}}, \
         spec: {{nodeName: node-1}}, status: {{phase: Running, podIP: {address}}}}}"
    );
    let mut pod = objects(&yaml).pods.remove(0);
    pod.started = Some(at(started as f64));
    pod
}

fn at(seconds: f64) -> Timestamp {
    Timestamp::from_nanos(((10_000.0 + seconds) * 1e9) as u64)
}

fn upsert(pod: Pod) -> Change {
    Change::Upsert(Object::Pod(pod))
}

fn delete(uid: &str) -> Change {
    Change::Delete {
        key: ObjectKey::Pod {
            uid: uid.to_owned(),
        },
        ended: None,
    }
}

fn holder(index: &Index, address: &str, seconds: f64) -> String {
    let endpoint = index.resolve_client(address.parse().unwrap(), at(seconds));
    endpoint.to_string()
}

fn call(index: &Index, address: &str, port: u16) -> String {
    let server = index.resolve(address.parse().unwrap(), Protocol::Tcp, port, at(50.0));
    format!("{}:{}", server.endpoint, server.port)
}

#[test]
fn an_address_is_a_pods_from_start_to_end() {
    let mut index = Index::default();
    index.apply(upsert(pod("first", "10.0.0.1", 100)), at(103.0));
    index.apply(delete("first"), at(200.0));
    index.apply(upsert(pod("second", "10.0.0.1", 199)), at(201.0));
    for (seconds, expected) in [
        (94.9, "10.0.0.1"),
        // Clocks differ a little.
        (95.1, "shop/first"),
        // Before the event arrived.
        (100.1, "shop/first"),
        (199.9, "shop/first"),
        (200.0, "shop/second"),
        (200.5, "shop/second"),
    ] {
        assert_eq!(holder(&index, "10.0.0.1", seconds), expected, "{seconds}");
    }
}

#[test]
fn a_pod_that_is_gone_stays_known_for_ten_minutes() {
    let mut index = Index::default();
    index.apply(upsert(pod("first", "10.0.0.1", 100)), at(103.0));
    index.apply(delete("first"), at(200.0));
    index.expire(at(200.0).saturating_add(RETENTION));
    assert!(index.pod_by_uid("first").is_some());
    assert_eq!(holder(&index, "10.0.0.1", 199.0), "shop/first");
    // Connections are torn down while the pod is being deleted.
    assert_eq!(holder(&index, "10.0.0.1", 204.9), "shop/first");
    assert_eq!(holder(&index, "10.0.0.1", 205.0), "10.0.0.1");

    index.expire(at(200.1).saturating_add(RETENTION));
    assert!(index.pod_by_uid("first").is_none());
    assert_eq!(holder(&index, "10.0.0.1", 199.0), "10.0.0.1");
}

#[test]
fn a_pod_that_comes_back_is_not_forgotten() {
    let mut index = Index::default();
    let first = pod("first", "10.0.0.1", 100);
    index.apply(upsert(first.clone()), at(103.0));
    index.apply(delete("first"), at(200.0));
    // A list from a cache of the API server that lags behind.
    index.replace_pods(vec![first], at(201.0));
    index.expire(at(300.0).saturating_add(RETENTION));
    assert!(index.pod_by_uid("first").is_some());
    assert_eq!(holder(&index, "10.0.0.1", 250.0), "shop/first");
    index.apply(delete("first"), at(1000.0));
    index.expire(at(1000.1).saturating_add(RETENTION));
    assert!(index.pod_by_uid("first").is_none());
}

#[test]
fn a_relist_ends_what_it_does_not_name() {
    let mut index = Index::default();
    index.replace_pods(
        vec![pod("first", "10.0.0.1", 100), pod("other", "10.0.0.2", 100)],
        at(110.0),
    );
    // The watch was away for some minutes, in which another pod took the address.
    index.replace_pods(
        vec![
            pod("other", "10.0.0.2", 100),
            pod("second", "10.0.0.1", 300),
        ],
        at(400.0),
    );
    assert_eq!(holder(&index, "10.0.0.1", 299.0), "shop/first");
    assert_eq!(holder(&index, "10.0.0.1", 301.0), "shop/second");
    assert_eq!(holder(&index, "10.0.0.2", 399.0), "shop/other");
    assert!(index.pod_by_uid("first").is_some());
    assert_eq!(index.counts().pods, 2);
}

#[test]
fn of_two_living_pods_at_one_address_the_one_learnt_last_has_it() {
    let mut index = Index::default();
    index.apply(upsert(pod("first", "10.0.0.1", 100)), at(103.0));
    // It waited for its volumes until the first one had given the address up, of which nobody has told yet.
    index.apply(upsert(pod("second", "10.0.0.1", 120)), at(200.0));
    assert_eq!(holder(&index, "10.0.0.1", 150.0), "shop/first");
    assert_eq!(holder(&index, "10.0.0.1", 200.0), "shop/second");
    index.apply(delete("first"), at(210.0));
    assert_eq!(holder(&index, "10.0.0.1", 205.0), "shop/second");
    assert_eq!(holder(&index, "10.0.0.1", 220.0), "shop/second");
}

#[test]
fn a_pod_may_change_its_address() {
    let mut index = Index::default();
    index.apply(upsert(pod("first", "10.0.0.1", 100)), at(103.0));
    index.apply(upsert(pod("first", "10.0.0.2", 100)), at(200.0));
    assert_eq!(holder(&index, "10.0.0.1", 150.0), "shop/first");
    assert_eq!(holder(&index, "10.0.0.1", 210.0), "10.0.0.1");
    assert_eq!(holder(&index, "10.0.0.2", 150.0), "10.0.0.2");
    assert_eq!(holder(&index, "10.0.0.2", 200.0), "shop/first");
}

#[test]
fn a_finished_pod_had_its_address_until_its_last_container_ended() {
    let finished = |ended| Pod {
        phase: Phase::Finished { at: ended },
        ..pod("job", "10.0.0.1", 100)
    };
    // Seen to finish.
    let mut index = Index::default();
    index.apply(upsert(pod("job", "10.0.0.1", 100)), at(101.0));
    index.apply(upsert(finished(Some(at(150.0)))), at(152.0));
    assert_eq!(holder(&index, "10.0.0.1", 150.9), "shop/job");
    index.apply(upsert(pod("next", "10.0.0.1", 151)), at(153.0));
    assert_eq!(holder(&index, "10.0.0.1", 151.0), "shop/next");
    assert_eq!(index.pod_by_uid("job").unwrap().name, "job");
    index.expire(at(160.0).saturating_add(RETENTION));
    assert!(index.pod_by_uid("job").is_some(), "not deleted");

    // First heard of when it had finished, with and without the time.
    let mut index = Index::default();
    index.replace_pods(vec![finished(Some(at(150.0)))], at(300.0));
    assert_eq!(holder(&index, "10.0.0.1", 149.0), "shop/job");
    assert_eq!(holder(&index, "10.0.0.1", 160.0), "10.0.0.1");
    let mut index = Index::default();
    index.replace_pods(vec![finished(None)], at(300.0));
    assert_eq!(holder(&index, "10.0.0.1", 149.0), "10.0.0.1");
    assert!(index.pod_by_uid("job").is_some());
}

#[test]
fn named_target_ports_may_differ_between_pods() {
    let service = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: a}, ports: [{port: 80, targetPort: http}]}
";
    let with_port = |name: &str, address: &str, number: u16| {
        let yaml = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, namespace: shop, uid: {name}, labels: {{app: a}}}}, \
             spec: {{containers: [{{name: c, ports: [{{name: http, containerPort: {number}}}, \
             {{name: http, containerPort: 1, protocol: UDP}}]}}]}}, status: {{podIP: {address}}}}}"
        );
        objects(&yaml).pods.remove(0)
    };
    let mut index = Index::default();
    index.replace(objects(service), at(0.0));
    assert_eq!(
        call(&index, "10.96.0.1", 80),
        "service shop/web:80",
        "no pod"
    );
    index.apply(upsert(with_port("a", "10.0.0.1", 9000)), at(1.0));
    assert_eq!(call(&index, "10.96.0.1", 80), "service shop/web:9000");
    index.apply(upsert(with_port("b", "10.0.0.2", 8000)), at(1.0));
    assert_eq!(
        call(&index, "10.96.0.1", 80),
        "service shop/web:8000",
        "a tie"
    );
    index.apply(upsert(with_port("c", "10.0.0.3", 9000)), at(1.0));
    assert_eq!(call(&index, "10.96.0.1", 80), "service shop/web:9000");

    // Each pod's own port leads to the service.
    for (uid, port, found) in [("b", 8000, true), ("b", 9000, false), ("a", 9000, true)] {
        let pod = index.pod_by_uid(uid).unwrap();
        assert_eq!(*pod.services, ["web"]);
        // A second service, first by name, leads nowhere that matters.
        let mut index = Index::default();
        let other = service.replace("web", "any").replace("http", "1");
        index.replace(objects(&format!("{service}---{other}")), at(0.0));
        index.apply(upsert(with_port("a", "10.0.0.1", 9000)), at(1.0));
        index.apply(upsert(with_port("b", "10.0.0.2", 8000)), at(1.0));
        let Endpoint::Pod { service, .. } = index.pod_endpoint(&pod, Protocol::Tcp, Some(port))
        else {
            panic!("not a pod");
        };
        let expected = if found { "web" } else { "any" };
        assert_eq!(service.unwrap().name, expected, "{uid}:{port}");
        let Endpoint::Pod { service, .. } = index.pod_endpoint(&pod, Protocol::Tcp, None) else {
            panic!("not a pod");
        };
        assert_eq!(service.unwrap().name, "any");
    }

    // A pod that has finished backs nothing.
    for uid in ["a", "c"] {
        let mut done = with_port(uid, "10.0.0.1", 9000);
        done.phase = Phase::Finished { at: None };
        index.apply(upsert(done), at(2.0));
    }
    assert_eq!(call(&index, "10.96.0.1", 80), "service shop/web:8000");
    index.apply(delete("b"), at(3.0));
    assert_eq!(call(&index, "10.96.0.1", 80), "service shop/web:80");
}

#[test]
fn nodes_forward_host_ports_and_own_their_interfaces() {
    let mut index = Index::default();
    index.replace(
        objects(
            "
apiVersion: v1
kind: Node
metadata:
  name: node-1
  annotations: {projectcalico.org/IPv4VXLANTunnelAddr: 10.1.7.0, projectcalico.org/IPv4Address: 192.168.0.1/24}
spec: {podCIDR: 10.0.0.0/24}
status:
  addresses:
  - {type: InternalIP, address: 192.168.0.1}
  - {type: Hostname, address: node-1}
---
apiVersion: v1
kind: Pod
metadata: {name: ingress, namespace: edge, uid: ingress}
spec:
  nodeName: node-1
  containers:
  - name: c
    ports:
    - {containerPort: 8080, hostPort: 80}
    - {containerPort: 9090, hostPort: 90, hostIP: 127.0.0.1}
status: {phase: Running, podIP: 10.0.0.9}
---
apiVersion: v1
kind: Service
metadata: {name: balanced, namespace: edge}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.1
  externalIPs: [192.168.0.1]
  ports: [{port: 443, targetPort: 8443}]
status:
  loadBalancer:
    ingress: [{ip: 203.0.113.1, ipMode: VIP}, {ip: 203.0.113.2, ipMode: Proxy}, {hostname: lb.example.com}]
",
        ),
        at(0.0),
    );
    for (address, port, expected) in [
        ("192.168.0.1", 80, "edge/ingress:8080"),
        ("192.168.0.1", 90, "node node-1:90"),
        ("192.168.0.1", 443, "service edge/balanced:8443"),
        ("192.168.0.1", 22, "node node-1:22"),
        ("10.1.7.0", 22, "node node-1:22"),
        ("10.0.0.1", 22, "node node-1:22"),
        ("10.0.0.1", 80, "edge/ingress:8080"),
        ("10.0.0.9", 8080, "edge/ingress:8080"),
        ("203.0.113.1", 443, "service edge/balanced:8443"),
        ("203.0.113.2", 443, "203.0.113.2:443"),
    ] {
        assert_eq!(call(&index, address, port), expected, "{address}:{port}");
    }
    let server = index.resolve("192.168.0.1".parse().unwrap(), Protocol::Tcp, 80, at(1.0));
    assert!(server.virtual_address);

    // A node that is gone is known as long as flows may mean it.
    index.replace_nodes(Vec::new(), at(100.0));
    assert_eq!(holder(&index, "192.168.0.1", 99.0), "node node-1");
    assert_eq!(holder(&index, "192.168.0.1", 120.0), "192.168.0.1");
    assert!(index.node("node-1").is_some());
    index.expire(at(101.0).saturating_add(RETENTION));
    assert!(index.node("node-1").is_none());
}

#[test]
fn an_api_server_outside_of_the_cluster_is_known_as_such() {
    let mut index = Index::default();
    let objects = objects(
        "
apiVersion: v1
kind: Service
metadata: {name: kubernetes, namespace: default}
spec: {clusterIP: 10.96.0.1, ports: [{name: https, port: 443, targetPort: 6443}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kubernetes, namespace: default, labels: {kubernetes.io/service-name: kubernetes}}
addressType: IPv4
endpoints: [{addresses: [172.31.0.5]}, {addresses: [192.168.0.1]}]
ports: [{name: https, port: 6443}]
---
apiVersion: v1
kind: Node
metadata: {name: node-1}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}]}
",
    );
    index.replace(objects, at(1.0));
    let api = "service default/kubernetes";
    for (address, port, expected) in [
        ("10.96.0.1", 443, format!("{api}:6443")),
        ("172.31.0.5", 6443, format!("{api}:6443")),
        // Seen by its node's agent, too: that names the node.
        ("192.168.0.1", 6443, "node node-1:6443".to_owned()),
        ("172.31.0.6", 6443, "172.31.0.6:6443".to_owned()),
        ("172.31.0.5", 22, "172.31.0.5:22".to_owned()),
    ] {
        assert_eq!(call(&index, address, port), expected);
    }
    // It calls webhooks.
    assert_eq!(holder(&index, "172.31.0.5", 1.0), api);
}

#[test]
fn the_mirror_of_a_static_pod_is_found_by_the_uid_in_its_cgroup() {
    let mut index = Index::default();
    index.replace(
        objects(
            "
apiVersion: v1
kind: Pod
metadata:
  name: etcd-master
  namespace: kube-system
  uid: 6a1f0f0e-0000-4000-8000-000000000001
  annotations: {kubernetes.io/config.hash: 9f86d081884c7d65, kubernetes.io/config.mirror: 9f86d081884c7d65}
  ownerReferences: [{apiVersion: v1, kind: Node, name: master, controller: true}]
spec: {hostNetwork: true, nodeName: master}
status: {phase: Running, podIP: 192.168.0.1}
",
        ),
        at(0.0),
    );
    let found = index.pod_by_uid("9f86d081884c7d65").unwrap();
    assert_eq!(found.name, "etcd-master");
    assert_eq!(found.workload, None);
    assert!(matches!(
        index.pod_endpoint(&found, Protocol::Tcp, Some(2379)),
        Endpoint::Pod { service: None, .. }
    ));
    index.apply(delete(&found.uid), at(1.0));
    index.expire(at(2.0).saturating_add(RETENTION));
    assert_eq!(index.pod_by_uid("9f86d081884c7d65"), None);
}

#[test]
fn a_service_that_comes_back_selects_again() {
    let service = objects(
        "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.1, selector: {app: a, tier: web}, ports: [{port: 80, targetPort: 8080}]}
",
    )
    .services
    .remove(0);
    let mut selected = pod("first", "10.0.0.1", 0);
    let label = |pod: &mut Pod, value: &str| {
        let labels = Arc::make_mut(&mut pod.identity.labels);
        labels.insert("tier".to_owned(), value.to_owned());
    };
    label(&mut selected, "web");
    let services = |index: &Index| index.pod_by_uid("first").unwrap().services.clone();
    let key = ObjectKey::Service {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
    };

    let mut index = Index::default();
    index.apply(upsert(selected.clone()), at(1.0));
    assert!(services(&index).is_empty());
    index.apply(Change::Upsert(Object::Service(service.clone())), at(2.0));
    assert_eq!(*services(&index), ["web"]);
    index.apply(Change::Delete { key, ended: None }, at(3.0));
    assert!(services(&index).is_empty());
    index.apply(Change::Upsert(Object::Service(service.clone())), at(4.0));
    assert_eq!(*services(&index), ["web"]);
    index.expire(at(5.0).saturating_add(RETENTION));
    assert_eq!(*services(&index), ["web"]);
    assert_eq!(index.counts().services, 1);

    let mut moved = service.clone();
    let selector = &mut Arc::make_mut(&mut moved.identity).selector;
    selector.insert("tier".to_owned(), "db".to_owned());
    index.apply(Change::Upsert(Object::Service(moved)), at(6.0));
    assert!(services(&index).is_empty());
    label(&mut selected, "db");
    index.apply(upsert(selected), at(7.0));
    assert_eq!(*services(&index), ["web"]);
    index.replace_services(Vec::new(), at(8.0));
    assert!(services(&index).is_empty());
}

#[test]
fn an_end_that_is_learnt_late_takes_nothing_from_the_next_holder() {
    // The watch is away from 120 to 150; the second pod speaks from 122 on.
    for ended in [None, Some(at(120.0))] {
        let mut index = Index::default();
        index.apply(upsert(pod("first", "10.0.0.1", 100)), at(103.0));
        let key = ObjectKey::Pod {
            uid: "first".to_owned(),
        };
        let gone = Change::Delete { key, ended };
        index.apply_late(gone, at(119.0), at(150.0));
        let born = upsert(pod("second", "10.0.0.1", 121));
        index.apply_late(born, at(119.0), at(150.0));
        assert_eq!(holder(&index, "10.0.0.1", 120.5), "shop/first");
        assert_eq!(holder(&index, "10.0.0.1", 122.0), "shop/second");
        assert_eq!(holder(&index, "10.0.0.1", 151.0), "shop/second");
    }
    // So it is whichever of both is told first.
    let mut index = Index::default();
    index.apply(upsert(pod("first", "10.0.0.1", 100)), at(103.0));
    let born = upsert(pod("second", "10.0.0.1", 121));
    index.apply_late(born, at(119.0), at(150.0));
    index.apply_late(delete("first"), at(119.0), at(150.0));
    assert_eq!(holder(&index, "10.0.0.1", 120.5), "shop/first");
    assert_eq!(holder(&index, "10.0.0.1", 122.0), "shop/second");
}
