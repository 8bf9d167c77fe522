//! Who is where: every connection is seen once from each side, and joined to one edge.

use std::{fs, net::IpAddr, path::PathBuf};

use anyhow::{Result, ensure};
use flow::record::Direction::{Egress, Ingress};
use generator::ledger::Ledger;
use lab::{
    Agent, AgentOptions, Cluster, Generator, GeneratorOptions, Hooks, Lab,
    apiserver::ApiServer,
    scope_app::{self, ScopeApp},
    truth::Edge,
};
use tokio::runtime::Runtime;

use crate::{HOOKS, Test, expect};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for hooks in HOOKS {
        tests.push(Test::new(
            format!("pairs::each_edge_once_from_each_side[{hooks}]"),
            move || each_edge_once_from_each_side(hooks, Names::File),
        ));
        tests.push(Test::new(
            format!("pairs::masqueraded_pods_of_the_node_s_network[{hooks}]"),
            move || masqueraded_pods_of_the_node_s_network(hooks),
        ));
    }
    // Names do not depend on the hooks.
    for (names, title) in [
        (Names::Api, "the API"),
        (
            Names::ApiAndGenerator,
            "the API, the other end by the generator",
        ),
        (Names::Scope, "Scope"),
        (
            Names::ScopeAndGenerator,
            "Scope, the other end by the generator",
        ),
    ] {
        tests.push(Test::new(
            format!("pairs::each_edge_once_from_each_side[names from {title}]"),
            move || each_edge_once_from_each_side(Hooks::Btf, names),
        ));
    }
    tests
}

/// Where names come from. They are the same each time.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    /// The lab's file.
    File,
    /// An API server that has what is in the file.
    Api,
    /// The same, but agents ask for no more than their own node and its pods.
    ApiAndGenerator,
    /// A report of Weave Scope that has what is in the file, as far as Scope knows it.
    Scope,
    /// The same, and the generator names the other end.
    ScopeAndGenerator,
}

impl Names {
    fn by_generator(self) -> bool {
        matches!(self, Self::ApiAndGenerator | Self::ScopeAndGenerator)
    }

    /// Scope knows one address of each pod and service.
    fn knows(self, target: &str) -> bool {
        !matches!(self, Self::Scope | Self::ScopeAndGenerator) || !target.contains('[')
    }
}

/// A way to reach a server, and how either side names the other.
struct Case {
    /// Where the call comes from: a pod, or a node's own process.
    client: &'static str,
    /// What is called.
    target: fn(&Lab) -> Result<String>,
    /// How often.
    count: u64,
    /// What the client's agent says the server is.
    called: &'static str,
    /// What the server's agent says the client is.
    caller: &'static str,
    /// The server.
    server: &'static str,
}

const CASES: [Case; 6] = [
    Case {
        client: "shop/near",
        target: |lab| pod(lab, "shop/web", 0),
        count: 2,
        called: "shop/web TCP 8080",
        caller: "shop/near",
        server: "shop/web TCP 8080",
    },
    Case {
        client: "shop/far",
        target: |lab| pod(lab, "shop/web", 1),
        count: 3,
        called: "shop/web TCP 8080",
        caller: "shop/far",
        server: "shop/web TCP 8080",
    },
    Case {
        client: "shop/near",
        target: |lab| service(lab, 0),
        count: 4,
        called: "service shop/api TCP 9090",
        caller: "shop/near",
        server: "shop/web TCP 9090",
    },
    Case {
        client: "shop/far",
        target: |lab| service(lab, 1),
        count: 5,
        called: "service shop/api TCP 9090",
        caller: "shop/far",
        server: "shop/web TCP 9090",
    },
    // Masked on its way back to itself: the server's side cannot know.
    Case {
        client: "shop/web",
        target: |lab| service(lab, 0),
        count: 6,
        called: "service shop/api TCP 9090",
        caller: "node node-1",
        server: "shop/web TCP 9090",
    },
    Case {
        client: "node node-1",
        target: |lab| pod(lab, "shop/web", 0),
        count: 7,
        called: "shop/web TCP 8080",
        caller: "node node-1",
        server: "shop/web TCP 8080",
    },
];

fn each_edge_once_from_each_side(hooks: Hooks, names: Names) -> Result<()> {
    let lab = Lab::start(cluster())?;
    let api = Api::start(&lab)?;
    let scope = format!("scope={}", api.scope.url());
    let generator_options = match names {
        Names::ScopeAndGenerator => GeneratorOptions::default().arg("--topology", &scope),
        _ => GeneratorOptions::default().kube(&api.kubeconfig),
    };
    let generator = names
        .by_generator()
        .then(|| Generator::start(&lab, &generator_options))
        .transpose()?;
    let _server = lab.pod("shop/web")?.serve(["--tcp", "8080,9090"])?;
    let mut agents = Vec::new();
    for node in ["node-1", "node-2"] {
        let options = match &generator {
            None => AgentOptions::stdout(node),
            Some(generator) => AgentOptions::streaming(node, generator).arg("--resolve", "local"),
        };
        let options = match names {
            Names::File => options,
            Names::Api | Names::ApiAndGenerator => options.kube(&api.kubeconfig),
            Names::Scope | Names::ScopeAndGenerator => options.topology(&scope),
        };
        agents.push(Agent::start(&lab, &options.hooks(hooks))?);
    }
    // Agents wait up to five seconds before they ask the API: what they see until then waits for its names.
    let mut wanted = Vec::new();
    let mut cases = Vec::new();
    for case in &CASES {
        let target = (case.target)(&lab)?;
        if names.knows(&target) {
            cases.push((case, target));
        }
    }
    for (case, target) in &cases {
        let place = match case.client.strip_prefix("node ") {
            Some(node) => lab.node(node),
            None => lab.pod(case.client)?,
        };
        place.call_all(["--count", &case.count.to_string(), target])?;
        wanted.push((Edge::new(Egress, case.client, case.called), case.count));
        wanted.push((Edge::new(Ingress, case.caller, case.server), case.count));
    }
    let mut captures = Vec::new();
    for mut agent in agents {
        if names != Names::File {
            let is_known = |line: &str| line.contains("the cluster's objects are known");
            agent.process().wait_stderr(is_known)?;
        }
        captures.push(agent.stop()?);
    }
    if let Some(mut generator) = generator {
        generator.stop()?;
        captures[0].records = generator.export()?;
    }
    expect(&captures, wanted.into_iter().collect())?;

    let mut ledger = Ledger::default();
    for record in captures.into_iter().flat_map(|capture| capture.records) {
        ledger.observe(record);
    }
    let mut joined: Vec<_> = ledger
        .edges()
        .iter()
        .map(|edge| {
            let server = format!("{} {} {}", edge.server, edge.protocol, edge.port);
            let counts = (edge.seen_by_client, edge.seen_by_server);
            (edge.client.to_string(), server, counts)
        })
        .collect();
    joined.sort();
    let mut once: Vec<_> = cases
        .iter()
        .map(|(case, _)| {
            let counts = (case.count, case.count);
            (case.client.to_owned(), case.server.to_owned(), counts)
        })
        .collect();
    once.sort();
    ensure!(joined == once, "joined: {joined:#?}\nreally: {once:#?}");
    Ok(())
}

/// An API server that has the lab's objects, and an app of Scope that has their report.
struct Api {
    kubeconfig: PathBuf,
    scope: ScopeApp,
    _server: ApiServer,
    _runtime: Runtime,
}

impl Api {
    fn start(lab: &Lab) -> Result<Self> {
        let runtime = Runtime::new()?;
        let server = runtime.block_on(ApiServer::start())?;
        server.put_all(&serde_yaml::from_str(&fs::read_to_string(lab.topology())?)?)?;
        let kubeconfig = lab.folder().join("kubeconfig");
        server.write_kubeconfig(&kubeconfig, None)?;
        let scope = runtime.block_on(ScopeApp::start())?;
        scope.report_value(&scope_app::report_of(lab)?)?;
        Ok(Self {
            kubeconfig,
            scope,
            _server: server,
            _runtime: runtime,
        })
    }
}

/// Two pods in their nodes' networks call a service, one from its backend's node and one from the other. The server sees
/// neither's own address: kube-proxy gives what does not come from the pods' range the address of the device that it
/// leaves by, which is the bridge's on the same node, and a tunnel's on the other.
fn masqueraded_pods_of_the_node_s_network(hooks: Hooks) -> Result<()> {
    const CALLS: [(&str, &str, u64); 2] =
        [("shop/beside", "node-1", 2), ("shop/abroad", "node-2", 3)];
    let mut cluster = cluster();
    for (pod, node, _) in CALLS {
        let key = pod.trim_start_matches("shop/");
        cluster.pod("shop", key).on(node).host_network();
    }
    let lab = Lab::start(cluster)?;
    let gateways: Vec<IpAddr> = lab
        .cluster()
        .nodes
        .iter()
        .map(|node| node.gateway()[0])
        .collect();
    // The lab routes between nodes without a tunnel; this gives the packets the address that one would have.
    lab.node("node-2").nft(&format!(
        "table ip tunnel {{ chain postrouting {{ type nat hook postrouting priority 90;\n\
         ip saddr {} ip daddr {} oifname eth0 snat to {}\n}}\n}}",
        lab.cluster().nodes[1].addresses()[0],
        lab.cluster().pod_cidrs()[0],
        gateways[1],
    ))?;
    let _server = lab.pod("shop/web")?.serve(["--tcp", "9090"])?;
    let agents = ["node-1", "node-2"]
        .map(|node| Agent::start(&lab, &AgentOptions::stdout(node).hooks(hooks)));
    let target = service(&lab, 0)?;
    for (pod, _, count) in CALLS {
        lab.pod(pod)?
            .call_all(["--count", &count.to_string(), &target])?;
    }
    let mut captures = Vec::new();
    for agent in agents {
        captures.push(agent?.stop()?);
    }
    let mut ledger = Ledger::default();
    for record in captures.into_iter().flat_map(|capture| capture.records) {
        if record.direction == Ingress {
            let seen = record.tuple.src_addr;
            ensure!(gateways.contains(&seen), "not masqueraded: {record:?}");
        }
        ledger.observe(record);
    }
    let mut joined: Vec<_> = ledger
        .edges()
        .iter()
        .map(|edge| {
            let ends = format!("{} {} {}", edge.client, edge.server, edge.port);
            let counts = (edge.seen_by_client, edge.seen_by_server);
            (ends, edge.client_address, counts)
        })
        .collect();
    joined.sort();
    let mut once: Vec<_> = std::iter::zip(CALLS, gateways)
        .map(|((pod, _, count), seen)| (format!("{pod} shop/web 9090"), seen, (count, count)))
        .collect();
    once.sort();
    ensure!(joined == once, "joined: {joined:#?}\nreally: {once:#?}");
    Ok(())
}

/// `web` and `near` are on the same node, `far` is on another; `web` alone is behind the service `api`.
fn cluster() -> Cluster {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.node("node-2");
    cluster.pod("shop", "web").label("app", "web");
    cluster.pod("shop", "near");
    cluster.pod("shop", "far").on("node-2");
    cluster
        .service("shop", "api")
        .select("app", "web")
        .port("api", 80, 9090);
    cluster
}

fn pod(lab: &Lab, path: &str, family: usize) -> Result<String> {
    let address = lab.cluster().addresses(lab.spec(path)?)[family];
    Ok(format!(
        "tcp://{}",
        std::net::SocketAddr::new(address, 8080)
    ))
}

fn service(lab: &Lab, family: usize) -> Result<String> {
    let address = lab.cluster().services[0].addresses()[family];
    Ok(format!("tcp://{}", std::net::SocketAddr::new(address, 80)))
}
