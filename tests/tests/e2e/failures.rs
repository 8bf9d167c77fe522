//! Connections that do not come about.

use std::{collections::BTreeSet, fs};

use anyhow::{Result, ensure};
use flow::record::Direction;
use lab::{Agent, AgentOptions, Calls, Cluster, Hooks, Lab, truth::Edge};

use crate::{HOOKS, Test, expect};

pub(crate) fn tests() -> Vec<Test> {
    HOOKS
        .into_iter()
        .map(|hooks| {
            Test::new(
                format!("failures::no_rule_comes_of_them[{hooks}]"),
                move || no_rule_comes_of_them(hooks),
            )
        })
        .collect()
}

/// What is done with a packet to the server's port on its way through the node.
const CASES: [(&str, u16, &str, Calls); 4] = [
    ("refused", 8001, "accept", Calls { refused: 1, ..NONE }),
    (
        "filtered",
        8002,
        "drop",
        Calls {
            timed_out: 1,
            ..NONE
        },
    ),
    (
        "rejected with a reset by a firewall",
        8003,
        "reject with tcp reset",
        Calls { refused: 1, ..NONE },
    ),
    (
        "prohibited",
        8004,
        "reject with icmpx type admin-prohibited",
        Calls { failed: 1, ..NONE },
    ),
];

const NONE: Calls = Calls {
    answered: 0,
    refused: 0,
    timed_out: 0,
    reset: 0,
    failed: 0,
};

/// What comes about: a call that is answered, and one that the server resets once it is established. For the kernel that
/// is a connection at both ends, and a policy that forbade it would change what the client sees.
const ESTABLISHED: [u16; 2] = [8000, 8005];

/// Each is reported as failed by its client; the policies that come of all of it allow what was established.
fn no_rule_comes_of_them(hooks: Hooks) -> Result<()> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("shop", "client").label("app", "client");
    cluster.pod("shop", "server").label("app", "server");
    let lab = Lab::start(cluster)?;
    let address = lab.cluster().addresses(lab.spec("shop/server")?)[0];
    let rules: String = CASES
        .iter()
        .map(|(_, port, verdict, _)| format!("tcp dport {port} {verdict}\n"))
        .collect();
    lab.node("node-1").nft(&format!(
        "table inet firewall {{ chain forward {{ type filter hook forward priority filter;\n{rules}}}\n}}"
    ))?;
    let _server =
        lab.pod("shop/server")?
            .serve(["--tcp", "8000,8002,8003,8004", "--reset", "8005"])?;

    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
    let client = lab.pod("shop/client")?;
    client.call_all([format!("tcp://{address}:8000")])?;
    for (name, port, _, wanted) in CASES {
        let calls = client.call(["--timeout", "300", &format!("tcp://{address}:{port}")])?;
        ensure!(calls == wanted, "{name}: {calls:?}");
    }
    let calls = client.call([format!("tcp://{address}:8005")])?;
    let wanted = Calls { reset: 1, ..NONE };
    ensure!(calls == wanted, "reset once it was established: {calls:?}");
    let capture = agent.stop()?;

    let flows = lab.folder().join("flows.json");
    let lines: Result<Vec<String>, _> = capture.records.iter().map(serde_json::to_string).collect();
    fs::write(&flows, lines?.join("\n") + "\n")?;
    let server = |port| format!("shop/server TCP {port}");
    let mut edges: Vec<_> = CASES
        .iter()
        .map(|(_, port, _, _)| (Edge::failed("shop/client", &server(*port)), 1))
        .collect();
    for direction in [Direction::Egress, Direction::Ingress] {
        for port in ESTABLISHED {
            edges.push((Edge::new(direction, "shop/client", &server(port)), 1));
        }
    }
    expect(&[capture], edges.into_iter().collect())?;

    let folder = lab.folder().join("policies");
    lab::generate(&flows, "shop", "svc", &folder)?;
    let mut ports = BTreeSet::new();
    for entry in fs::read_dir(&folder)? {
        let text = fs::read_to_string(entry?.path())?;
        let numbers = text.lines().filter_map(|line| line.split_once("port: "));
        ports.extend(numbers.map(|(_, number)| number.trim().to_owned()));
    }
    ensure!(
        ports == ["53", "8000", "8005"].map(str::to_owned).into(),
        "ports in the policies: {ports:?}"
    );
    Ok(())
}
