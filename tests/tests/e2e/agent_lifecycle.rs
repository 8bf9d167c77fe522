//! The agent's coming and going.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::programs::loaded_programs;
use flow::record::{Direction, FlowRecord};
use lab::{
    Agent, AgentOptions, Cluster, Generator, GeneratorOptions, Hooks, Lab, binary,
    truth::{self, Edge},
};
use nix::sys::signal::Signal;

use crate::{HOOKS, Test, expect};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = vec![
        Test::new("agent::the_second_says_so", the_second_says_so),
        Test::new(
            "agent::wrong_usage_and_input_exit_with_2",
            wrong_usage_and_input,
        ),
    ];
    tests.push(Test::new(
        "agent::the_topology_is_reloaded_when_it_changes",
        the_topology_is_reloaded,
    ));
    tests.push(Test::new(
        "agent::a_generator_that_moves_is_found",
        a_generator_that_moves,
    ));
    for hooks in HOOKS {
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGKILL] {
            tests.push(Test::new(
                format!("agent::no_program_stays_after[{signal},{hooks}]"),
                move || no_program_stays(signal, hooks),
            ));
        }
    }
    tests
}

fn one_node() -> Cluster {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("shop", "web");
    cluster
}

fn no_program_stays(signal: Signal, hooks: Hooks) -> Result<()> {
    let lab = Lab::start(one_node())?;
    let mut agent = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
    let own = programs_of(agent.process().pid())?;
    ensure!(
        !own.is_empty(),
        "the agent holds no program, or this test does not see it"
    );
    ensure!(
        still_loaded(&own)? == own,
        "programs of the agent are not loaded"
    );
    let status = agent.process().stop(signal)?;
    ensure!(
        status.success() == (signal != Signal::SIGKILL),
        "{signal}: {status}"
    );
    // The kernel frees programs a grace period after their last user is gone.
    let deadline = Instant::now() + Duration::from_secs(5);
    while !still_loaded(&own)?.is_empty() {
        ensure!(
            Instant::now() < deadline,
            "still loaded: {:?}",
            still_loaded(&own)?
        );
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn the_second_says_so() -> Result<()> {
    let lab = Lab::start(one_node())?;
    let options = AgentOptions::stdout("node-1");
    let _first = Agent::start(&lab, &options)?;
    let mut second = Agent::spawn(&lab, &options)?;
    let status = second.process().wait(Duration::from_secs(10))?;
    let log = second.process().stderr().join("\n");
    ensure!(status.code() == Some(1), "{status}\n{log}");
    ensure!(log.contains("another microshield-agent captures"), "{log}");
    Ok(())
}

/// The agent starts with a file that lacks the server's pod and the service; both get their names once the whole file
/// has been there for a second. One that cannot be read, in between, changes nothing.
fn the_topology_is_reloaded() -> Result<()> {
    let mut cluster = one_node();
    cluster.pod("shop", "client");
    cluster
        .service("shop", "front")
        .select("app", "web")
        .port("http", 80, 8080);
    cluster.pods[0].label("app", "web");
    let lab = Lab::start(cluster)?;
    let _server = lab.pod("shop/web")?.serve(["--tcp", "8080"])?;
    let pod = lab.cluster().addresses(&lab.cluster().pods[0])[0];
    let service = lab.cluster().services[0].addresses()[0];
    let targets = [format!("tcp://{pod}:8080"), format!("tcp://{service}:80")];

    let whole = fs::read_to_string(lab.topology())?;
    let mut list: serde_yaml::Value = serde_yaml::from_str(&whole)?;
    let items = list["items"].as_sequence_mut().context("items")?;
    items.retain(|item| match item["kind"].as_str() {
        Some("Pod") => item["metadata"]["name"] != "web",
        Some("Service" | "EndpointSlice") => false,
        _ => true,
    });
    fs::write(lab.topology(), serde_yaml::to_string(&list)?)?;

    let mut agent = Agent::start(&lab, &AgentOptions::stdout("node-1"))?;
    let client = lab.pod("shop/client")?;
    client.call_all(&targets)?;
    // They are named when they are drained, which is to be before the file changes: two calls, seen from both sides.
    let drained = |agent: &mut Agent| -> Result<u64> {
        let lines = agent.process().stdout();
        let counts = lines.iter().map(|line| serde_json::from_str(line));
        counts
            .map(|record| Ok(record.map(|record: FlowRecord| record.count)?))
            .sum()
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while drained(&mut agent)? < 4 {
        ensure!(Instant::now() < deadline, "the calls were not drained");
        thread::sleep(Duration::from_millis(20));
    }
    fs::write(lab.topology(), "items: [{kind: Pod")?;
    agent
        .process()
        .wait_stderr(|line| line.contains("what was known before stays in use"))?;
    fs::write(lab.topology(), &whole)?;
    let loaded = |log: &[String]| {
        let times = log.iter().filter(|line| line.contains("topology loaded"));
        times.count()
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    while loaded(&agent.process().stderr()) < 2 {
        let log = agent.process().stderr().join("\n");
        ensure!(Instant::now() < deadline, "not loaded again: {log}");
        thread::sleep(Duration::from_millis(20));
    }
    client.call_all(&targets)?;
    let capture = agent.stop()?;

    let edge = |direction, client: &str, server: &str| (Edge::new(direction, client, server), 1);
    let client_name = "shop/client";
    // From afar, an address of a node's pod range that no pod has is the node's.
    let mut wanted: BTreeMap<Edge, u64> = [
        edge(Direction::Egress, client_name, "node node-1 TCP 8080"),
        edge(Direction::Egress, client_name, &format!("{service} TCP 80")),
        edge(Direction::Egress, client_name, "shop/web TCP 8080"),
        edge(
            Direction::Egress,
            client_name,
            "service shop/front TCP 8080",
        ),
    ]
    .into();
    let server = |name: &str| {
        Edge::new(
            Direction::Ingress,
            "shop/client",
            &format!("{name} TCP 8080"),
        )
    };
    // The pod itself is known to be one by its cgroup, but not which.
    let address = lab.cluster().addresses(lab.spec("shop/web")?)[0];
    wanted.insert(server(&address.to_string()), 2);
    wanted.insert(server("shop/web"), 2);
    expect(&[capture], wanted)
}

/// The generator's name leads to another address than it did when the agent started.
fn a_generator_that_moves() -> Result<()> {
    let lab = Lab::start(one_node())?;
    let mut generator = Generator::start(&lab, &GeneratorOptions::default())?;
    let url = generator.agents_url();
    let hosts = lab.folder().join("hosts");
    // Nobody is there.
    fs::write(&hosts, "127.0.0.77 generator.test\n")?;
    // Names come from a file of this agent's own.
    let own_hosts = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
    let words = [
        "--mount",
        "sh",
        "-c",
        own_hosts,
        &hosts.display().to_string(),
        &binary("microshield-agent")?.display().to_string(),
        "--node-name=node-1",
        &format!("--topology=file={}", lab.topology().display()),
        &format!("--cgroup-root={}", lab.cgroup_root("node-1").display()),
        &format!("--generator={}", url.replace("127.0.0.1", "generator.test")),
    ];
    fs::create_dir_all(lab.cgroup_root("node-1"))?;
    let mut agent = lab.host().exec(Path::new("unshare"), words)?;
    agent.wait_stderr(|line| line.contains("not connected to the generator"))?;
    let web = lab.pod("shop/web")?;
    let _server = web.serve(["--tcp", "8080"])?;
    let [address, _] = lab.cluster().addresses(lab.spec("shop/web")?);
    lab.node("node-1")
        .call_all(["--count", "3", &format!("tcp://{address}:8080")])?;
    fs::write(&hosts, "127.0.0.1 generator.test\n")?;
    agent
        .wait_stderr(|line| line.contains("connected to the generator") && !line.contains("not"))?;
    let status = agent.stop(Signal::SIGTERM)?;
    ensure!(status.success(), "{status}: {}", agent.stderr().join("\n"));
    generator.stop()?;
    let wanted = [Direction::Egress, Direction::Ingress]
        .map(|direction| (Edge::new(direction, "node node-1", "shop/web TCP 8080"), 3));
    let seen = truth::edges(&generator.export()?);
    ensure!(seen == wanted.into(), "{seen:?}");
    Ok(())
}

/// Every message names what is wrong.
fn wrong_usage_and_input() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let broken = folder.path().join("broken.yaml");
    fs::write(&broken, "items: [{kind: Pod")?;
    let broken = format!("file={}", broken.display());
    let missing = format!("file={}/missing.yaml", folder.path().display());
    let right = folder.path().join("right.yaml");
    fs::write(
        &right,
        "{apiVersion: v1, kind: Node, metadata: {name: node-1}}",
    )?;
    let right = format!("file={}", right.display());
    for (args, named) in [
        (vec!["--stdout", "--topology", &missing], "missing.yaml"),
        (vec!["--stdout", "--topology", &broken], "broken.yaml"),
        (vec!["--stdout", "--topology", "etcd=here"], "etcd=here"),
        (vec!["--stdout"], "--topology"),
        (vec!["--topology", &missing], "--stdout"),
        (
            vec!["--stdout", "--topology", &missing, "--hooks", "kprobe"],
            "kprobe",
        ),
        (
            vec!["--generator", "ftp://here", "--topology", &missing],
            "ftp://here",
        ),
        (
            vec![
                "--stdout",
                "--topology",
                &right,
                "--node-name=node-1",
                "--cgroup-root=/no/such/folder",
            ],
            "/no/such/folder",
        ),
        (vec!["--no-such-flag"], "--no-such-flag"),
    ] {
        let output = Command::new(lab::binary("microshield-agent")?)
            .args(&args)
            .output()?;
        let message = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(2) && message.contains(named),
            "{args:?}: {}, {message}",
            output.status
        );
    }
    Ok(())
}

/// The kernel's numbers of the programs that a process holds open.
fn programs_of(pid: u32) -> Result<BTreeSet<u32>> {
    let folder = format!("/proc/{pid}/fdinfo");
    let mut programs = BTreeSet::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
        // A descriptor may be closed while the folder is read.
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        let id = info.lines().find_map(|line| line.strip_prefix("prog_id:"));
        programs.extend(id.and_then(|id| id.trim().parse::<u32>().ok()));
    }
    Ok(programs)
}

fn still_loaded(programs: &BTreeSet<u32>) -> Result<BTreeSet<u32>> {
    // One that is freed while the kernel is asked for it is as good as gone.
    let loaded = loaded_programs()
        .flatten()
        .map(|program| program.id())
        .collect();
    Ok(programs.intersection(&loaded).copied().collect())
}
