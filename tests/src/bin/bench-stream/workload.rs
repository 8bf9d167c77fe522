//! A cluster whose pods call each other, and what its nodes' agents see of it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
};

use flow::{
    endpoint::{Endpoint, Labels, Node, Pod, Service, Workload},
    record::{Direction, FlowRecord, Outcome, Process, Protocol, Source, Tuple},
    time::Timestamp,
    wire::{Batch, MAX_BATCH_FLOWS, Window},
};

/// Pods of a node.
const PODS: usize = 20;

/// When everything happens, in seconds since the Unix epoch. Nothing else in a batch has these eight bytes.
pub(crate) const MOMENT: u64 = 1_700_000_000;

/// The records of each node, in the order in which its agent reports them.
pub(crate) struct Cluster {
    nodes: Vec<Vec<FlowRecord>>,
}

impl Cluster {
    /// With so many edges between pods of different nodes. The client's node sees each leave to a service, the server's sees
    /// it arrive.
    pub(crate) fn new(nodes: usize, edges: usize) -> Self {
        let pods = nodes * PODS;
        let ends: Vec<End> = (0..pods).map(End::new).collect();
        let mut cluster = Self {
            nodes: vec![Vec::new(); nodes],
        };
        for edge in 0..edges {
            let (node, call) = (edge % nodes, edge / nodes);
            let client = node * PODS + call % PODS;
            let step = call / PODS;
            let server = (client * 7 + 13 + step * 31) % pods;
            let port = 8_080 + (step / pods) as u16;
            cluster.nodes[node].push(record(
                &ends[client],
                &ends[server],
                port,
                Direction::Egress,
            ));
            let arrival = record(&ends[client], &ends[server], port, Direction::Ingress);
            cluster.nodes[server / PODS].push(arrival);
        }
        cluster
    }

    pub(crate) fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// What one agent reports, without numbers.
    pub(crate) fn batches(&self, node: usize) -> Vec<Batch> {
        let moment = Timestamp::from_nanos(MOMENT * 1_000_000_000);
        let flows = self.nodes[node].chunks(MAX_BATCH_FLOWS);
        flows
            .map(|flows| Batch {
                sequence: 0,
                window: Window {
                    from: moment,
                    to: moment,
                },
                flows: flows.to_vec(),
                losses: BTreeMap::new(),
                health: None,
            })
            .collect()
    }
}

/// A pod, as the two sides name it.
struct End {
    address: IpAddr,
    node: String,
    process: Process,
    client: Endpoint,
    server: Endpoint,
}

impl End {
    fn new(number: usize) -> Self {
        let service = number / 2;
        let name = format!("service-{service}");
        let namespace = format!("team-{}", service % 50);
        let node = format!("node-{}", number / PODS);
        let labels: Labels = [
            ("app.kubernetes.io/name".to_owned(), name.clone()),
            ("app.kubernetes.io/part-of".to_owned(), namespace.clone()),
            ("pod-template-hash".to_owned(), "5f495f9cf8".to_owned()),
        ]
        .into();
        let address = IpAddr::from(Ipv4Addr::from(0x0a00_0001 + number as u32));
        let pod = Arc::new(Pod {
            uid: format!("6f0c7d2e-8f5b-4a51-9d6e-{number:012}"),
            labels: Arc::new(labels),
            namespace: namespace.clone(),
            name: format!("{name}-5f495f9cf8-{number:05}"),
            workload: Some(Arc::new(Workload {
                kind: "Deployment".to_owned(),
                name: name.clone(),
            })),
            node: Some(node.as_str().into()),
            host_network: false,
            addresses: vec![address],
            services: vec![name.clone()].into(),
        });
        let selector: Labels = [("app.kubernetes.io/name".to_owned(), name.clone())].into();
        let service = Arc::new(Service {
            uid: format!("0b1f62aa-3c4d-4e7f-8a9b-{service:012}"),
            labels: selector.clone(),
            namespace,
            name,
            selector,
            backends: Vec::new(),
        });
        let client = if number.is_multiple_of(PODS) {
            // One of them is a process of the node itself.
            Endpoint::Node(Arc::new(Node {
                name: node.clone(),
                addresses: vec![address],
            }))
        } else {
            Endpoint::Pod {
                pod: Arc::clone(&pod),
                service: Some(Arc::clone(&service)),
            }
        };
        let server = Endpoint::Pod {
            pod,
            service: Some(service),
        };
        let process = Process {
            pid: 1_000 + number as u32,
            comm: "server".to_owned(),
            fd: None,
            container: Some(format!("{number:064x}")),
        };
        Self {
            address,
            node,
            process,
            client,
            server,
        }
    }
}

fn record(client: &End, server: &End, port: u16, direction: Direction) -> FlowRecord {
    let moment = Timestamp::from_nanos(MOMENT * 1_000_000_000);
    let (observer, via) = match direction {
        Direction::Egress => {
            let service = Ipv4Addr::new(172, 20, 0, 1).into();
            (client, Some(SocketAddr::new(service, 80)))
        }
        Direction::Ingress => (server, None),
    };
    FlowRecord {
        timestamp: moment,
        hostname: observer.node.clone(),
        tuple: Tuple {
            src_addr: client.address,
            src_port: 0,
            dst_addr: server.address,
            dst_port: port,
        },
        src: client.client.clone(),
        dst: server.server.clone(),
        protocol: Protocol::Tcp,
        direction,
        outcome: Outcome::Established,
        count: 3,
        first_seen: moment,
        last_seen: moment,
        process: Some(observer.process.clone()),
        sources: [Source::Ebpf].into(),
        via,
        connection: None,
    }
}
