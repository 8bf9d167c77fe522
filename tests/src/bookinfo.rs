//! Istio's bookinfo on two nodes, with traffic: what the demonstration shows.
//!
//! sleep → productpage → details and reviews → ratings, each through a service whose port is not the pod's. The nodes'
//! kubelets probe their pods by address. `sleep` is behind no service, `reviews` has a replica on each node, and
//! productpage reaches reviews over IPv6.

use std::net::IpAddr;

use anyhow::Result;

use crate::{cluster::Cluster, lab::Lab, process::Process};

/// Its namespace.
pub const NAMESPACE: &str = "bookinfo";

/// The port that all its pods with a service listen on.
const POD_PORT: u16 = 9080;

/// The port of its services.
const SERVICE_PORT: u16 = 80;

/// Milliseconds between two requests of `sleep`.
const REQUEST_INTERVAL: &str = "50";

/// Milliseconds between two probes of a pod.
const PROBE_INTERVAL: &str = "500";

/// A pod's key, its node, its application and what it calls: services by name, with the family's index.
type Role = (
    &'static str,
    &'static str,
    &'static str,
    &'static [(&'static str, usize)],
);

/// Callers after those whom they call.
const ROLES: [Role; 5] = [
    ("ratings", "node-2", "ratings", &[]),
    ("details", "node-2", "details", &[]),
    ("reviews-a", "node-1", "reviews", &[("ratings", 0)]),
    ("reviews-b", "node-2", "reviews", &[("ratings", 0)]),
    (
        "productpage",
        "node-1",
        "productpage",
        &[("details", 0), ("reviews", 1)],
    ),
];

/// Adds two nodes, six pods and four services to an empty cluster.
#[must_use]
pub fn cluster(mut cluster: Cluster) -> Cluster {
    cluster.node("node-1");
    cluster.node("node-2");
    for (key, node, app, _) in ROLES {
        cluster
            .pod(NAMESPACE, key)
            .on(node)
            .label("app", app)
            .label("version", "v1")
            .deployment(&format!("{app}-v1"))
            .port("http", POD_PORT);
    }
    cluster
        .pod(NAMESPACE, "sleep")
        .on("node-1")
        .label("app", "sleep")
        .deployment("sleep");
    for app in ["productpage", "details", "reviews"] {
        cluster
            .service(NAMESPACE, app)
            .select("app", app)
            .port("http", SERVICE_PORT, POD_PORT);
    }
    // A target port may be a name, too.
    cluster
        .service(NAMESPACE, "ratings")
        .select("app", "ratings")
        .port("http", SERVICE_PORT, "http");
    cluster
}

/// Starts every program of it; traffic flows until they are dropped.
///
/// # Errors
/// If one does not come up.
pub fn start(lab: &Lab) -> Result<Vec<Process>> {
    let mut programs = Vec::new();
    for (key, _, _, calls) in ROLES {
        let mut args = vec!["--tcp".to_owned(), POD_PORT.to_string()];
        for (service, family) in calls {
            args.extend(["--call".to_owned(), service_url(lab, service, *family)]);
        }
        programs.push(lab.pod(&format!("{NAMESPACE}/{key}"))?.serve(args)?);
    }
    for node in &lab.cluster().nodes {
        let probed = lab
            .cluster()
            .pods
            .iter()
            .filter(|pod| pod.node == node.name);
        let targets = probed
            .filter(|pod| !pod.ports.is_empty())
            .map(|pod| url(lab.cluster().addresses(pod)[0], POD_PORT));
        let args = forever(PROBE_INTERVAL).into_iter().chain(targets);
        programs.push(lab.node(&node.name).start("call", args)?);
    }
    let args = forever(REQUEST_INTERVAL)
        .into_iter()
        .chain([service_url(lab, "productpage", 0)]);
    let sleep = lab.pod(&format!("{NAMESPACE}/sleep"))?;
    programs.push(sleep.start("call", args)?);
    // Dropped from the front: no call is left without its server.
    programs.reverse();
    Ok(programs)
}

fn forever(interval: &str) -> Vec<String> {
    ["--forever", "--interval", interval]
        .map(str::to_owned)
        .into()
}

fn service_url(lab: &Lab, name: &str, family: usize) -> String {
    let mut services = lab.cluster().services.iter();
    let address = services
        .find(|service| service.name == name)
        .map_or(IpAddr::from([0, 0, 0, 0]), |service| {
            service.addresses()[family]
        });
    url(address, SERVICE_PORT)
}

fn url(address: IpAddr, port: u16) -> String {
    format!("tcp://{}", std::net::SocketAddr::new(address, port))
}
