//! How the programs start, say how they are, and end.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{
    Agent, AgentOptions, Cluster, Container, Generator, GeneratorOptions, Lab, Process, Rights,
    binary,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{HOOKS, Test};

/// How long a program may take until it captures.
const START: Duration = Duration::from_secs(2);

/// How long it may take to end.
const FAREWELL: Duration = Duration::from_secs(5);

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = vec![
        Test::new("manners::ready_when_it_can_name", ready_when_it_can_name),
        Test::new("manners::ends_while_nobody_listens", nobody_listens),
        Test::new("manners::ends_while_nobody_greets", nobody_greets),
        Test::new(
            "manners::ends_while_nobody_acknowledges",
            nobody_acknowledges,
        ),
        Test::new(
            "manners::ends_while_nobody_knows_the_name",
            nobody_knows_the_name,
        ),
        Test::new("manners::the_generator_ends_in_time", the_generator_ends),
        Test::new("manners::logs_for_programs", logs_for_programs),
        Test::new("manners::logs_as_the_environment_says", logs_by_environment),
        Test::alone("manners::a_node_that_sleeps", a_node_that_sleeps),
        Test::new("manners::a_token_is_told_to_nobody", tokens),
        Test::new("manners::check_as_root", check_as_root),
        Test::new("manners::check_as_nobody", check_as_nobody),
        Test::new(
            "manners::check_with_the_manifests_rights",
            check_in_a_container,
        ),
    ];
    for hooks in HOOKS {
        tests.push(Test::alone(
            format!("manners::starts_in_time[{hooks}]"),
            move || {
                let lab = lab()?;
                // Whatever else this machine does must not count: of three starts the best, without the time in which the
                // agent could have run and another program did.
                let mut best = Duration::MAX;
                for _ in 0..3 {
                    let begin = Instant::now();
                    let mut agent =
                        Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
                    let took = begin.elapsed();
                    best = best.min(took.saturating_sub(waited(agent.process())?));
                    agent.stop()?;
                }
                ensure!(best < START, "{best:?}");
                Ok(())
            },
        ));
    }
    tests
}

fn lab() -> Result<Lab> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("shop", "client");
    cluster.pod("shop", "server");
    Lab::start(cluster)
}

/// How long a program's first thread could have run and did not: the second number of `/proc/PID/schedstat`.
fn waited(program: &Process) -> Result<Duration> {
    let file = format!("/proc/{}/schedstat", program.pid());
    let text = std::fs::read_to_string(&file).with_context(|| file.clone())?;
    let nanoseconds = text.split(' ').nth(1).with_context(|| file.clone())?;
    Ok(Duration::from_nanos(nanoseconds.parse()?))
}

/// `HTTP/1.1 STATUS …` and the body.
fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.split(' ').nth(1).context("no status")?.parse()?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no body")?;
    Ok((status, body.to_owned()))
}

/// Starts an agent that answers, and says where.
fn answering(lab: &Lab, options: AgentOptions) -> Result<(Agent, SocketAddr)> {
    let mut agent = Agent::spawn(lab, &options.arg("--metrics", "127.0.0.1:0"))?;
    let line = agent
        .process()
        .wait_stderr(|line| line.contains("metrics address="))?;
    let (_, rest) = line.split_once("address=").context("no address")?;
    let address = rest.split(' ').next().unwrap_or_default().parse()?;
    Ok((agent, address))
}

/// Neither a token that the generator takes nor one that it refuses is in what the agent says, however much it is asked to
/// say, nor where it is asked, nor in its command line and environment.
fn tokens() -> Result<()> {
    const GOOD: &str = "the-token-that-the-generator-takes";
    const BAD: &str = "the-token-that-it-does-not-take";
    let lab = lab()?;
    let file = |name: &str, token: &str| -> Result<String> {
        let file = lab.folder().join(name);
        std::fs::write(&file, token)?;
        Ok(file.display().to_string())
    };
    let (good, bad) = (file("good", GOOD)?, file("bad", BAD)?);
    let options = GeneratorOptions::default().arg("--token-file", &good);
    let generator = Generator::start(&lab, &options)?;
    for (token, said) in [
        (&bad, "not connected to the generator"),
        (&good, "connected to the generator url="),
    ] {
        let options = AgentOptions::streaming("node-1", &generator)
            .arg("--token-file", token)
            .arg("--log", "trace,tungstenite::handshake::client=trace");
        let (mut agent, address) = answering(&lab, options)?;
        agent
            .process()
            .wait_stderr(|line| line.contains(said) && line.contains("agent::uplink"))?;
        let process = Path::new("/proc").join(agent.process().pid().to_string());
        let mut told = agent.process().stderr();
        for file in ["cmdline", "environ"] {
            let bytes = std::fs::read(process.join(file))?;
            told.push(String::from_utf8_lossy(&bytes).into_owned());
        }
        let (status, metrics) = get(address, "/metrics")?;
        ensure!(
            status == 200 && metrics.contains("microshield_agent_"),
            "{status} {metrics}"
        );
        told.push(metrics);
        agent.stop()?;
        for secret in [GOOD, BAD] {
            let line = told.iter().find(|line| line.contains(secret));
            ensure!(line.is_none(), "{line:?}");
        }
    }
    Ok(())
}

/// As long as the cluster's objects are not known the agent captures, but does not say that it is ready.
fn ready_when_it_can_name() -> Result<()> {
    let lab = lab()?;
    let (agent, address) = answering(&lab, AgentOptions::stdout("node-1"))?;
    let deadline = Instant::now() + START;
    while get(address, "/readyz")? != (200, "ready\n".to_owned()) {
        ensure!(Instant::now() < deadline, "{:?}", get(address, "/readyz")?);
        std::thread::sleep(Duration::from_millis(20));
    }
    agent.stop()?;

    // Nobody listens there.
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let kubeconfig = lab.folder().join("kubeconfig");
    let config = format!(
        "{{apiVersion: v1, kind: Config, current-context: here, \
         clusters: [{{name: here, cluster: {{server: 'http://{closed}'}}}}], \
         users: [{{name: me, user: {{}}}}], \
         contexts: [{{name: here, context: {{cluster: here, user: me}}}}]}}"
    );
    std::fs::write(&kubeconfig, config)?;
    let (mut agent, address) = answering(&lab, AgentOptions::stdout("node-1").kube(&kubeconfig))?;
    // It drains meanwhile.
    std::thread::sleep(START);
    let (status, body) = get(address, "/readyz")?;
    ensure!(
        status == 503 && body.contains("objects are not known"),
        "{status} {body}"
    );
    ensure!(get(address, "/healthz")?.0 == 200);
    ended_in_time(agent.process())
}

/// Asks a program to end: it does in time, and well. Returns the line in which an agent sums up.
fn ended_in_time(program: &mut Process) -> Result<()> {
    let asked = Instant::now();
    let status = program.stop(Signal::SIGTERM)?;
    let took = asked.elapsed();
    let log = program.stderr().join("\n");
    ensure!(
        status.success() && took < FAREWELL,
        "{status} after {took:?}\n{log}"
    );
    Ok(())
}

/// Makes one connection, waits until it is drained, and ends an agent that cannot deliver it.
fn end_with_a_connection(lab: &Lab, mut agent: Agent, sum: &str) -> Result<()> {
    call(lab)?;
    ended_in_time(agent.process())?;
    let log = agent.process().stderr().join("\n");
    ensure!(log.contains(sum), "no `{sum}`:\n{log}");
    Ok(())
}

/// One connection, which is seen at both ends.
fn call(lab: &Lab) -> Result<()> {
    let address = lab.cluster().addresses(lab.spec("shop/server")?)[0];
    let _server = lab.pod("shop/server")?.serve(["--tcp", "7000"])?;
    lab.pod("shop/client")?
        .call_all([format!("tcp://{address}:7000")])?;
    Ok(())
}

fn nobody_listens() -> Result<()> {
    let lab = lab()?;
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let url = format!("ws://{closed}/agents");
    let agent = Agent::start(&lab, &AgentOptions::to("node-1", &url))?;
    end_with_a_connection(&lab, agent, "undelivered=2")?;
    // With a spool nothing is lost by it.
    let spool = lab.folder().join("spool");
    let options = AgentOptions::to("node-1", &url).arg("--spool", &spool.display().to_string());
    let agent = Agent::start(&lab, &options)?;
    end_with_a_connection(&lab, agent, "undelivered=0 spooled_batches=1")
}

/// The connection comes about, and nothing comes through it.
fn nobody_greets() -> Result<()> {
    let lab = lab()?;
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let url = format!("ws://{}/agents", silent.local_addr()?);
    let agent = Agent::start(&lab, &AgentOptions::to("node-1", &url))?;
    end_with_a_connection(&lab, agent, "undelivered=2")
}

/// The generator is there, and then it hangs.
fn nobody_acknowledges() -> Result<()> {
    let lab = lab()?;
    let mut generator = Generator::start(&lab, &GeneratorOptions::default())?;
    let mut agent = Agent::start(&lab, &AgentOptions::streaming("node-1", &generator))?;
    agent
        .process()
        .wait_stderr(|line| line.contains("connected to the generator"))?;
    generator.process().signal(Signal::SIGSTOP)?;
    let ended = end_with_a_connection(&lab, agent, "undelivered=2");
    generator.process().signal(Signal::SIGCONT)?;
    ended
}

/// Looking up a name takes as long as its servers are silent, and cannot be called off.
fn nobody_knows_the_name() -> Result<()> {
    let lab = lab()?;
    // An address of its own, where another server of this machine would not listen.
    let silent = UdpSocket::bind((Ipv4Addr::new(127, 53, 77, 1), 53))?;
    let resolver = lab.folder().join("resolv.conf");
    std::fs::write(&resolver, "nameserver 127.53.77.1\n")?;
    let container = Container::of_program(&binary("microshield-agent")?, Rights::of_agent()?)
        .file(lab.folder())
        .file_at("/etc/resolv.conf", &resolver)
        .in_the_machine_s_network();
    std::fs::create_dir_all(lab.cgroup_root("node-1"))?;
    let mut agent = container.start(
        &lab,
        [
            "--generator=ws://generator.nowhere.example:8765/agents".to_owned(),
            "--node-name=node-1".to_owned(),
            format!("--topology=file={}", lab.topology().display()),
            format!("--cgroup-root={}", lab.cgroup_root("node-1").display()),
        ],
    )?;
    agent.wait_stderr(|line| line.contains("capturing"))?;
    silent.set_read_timeout(Some(Duration::from_secs(5)))?;
    silent.recv(&mut [0; 512]).context("no question came")?;
    ended_in_time(&mut agent)
}

fn the_generator_ends() -> Result<()> {
    let lab = lab()?;
    let mut generator = Generator::start(&lab, &GeneratorOptions::default())?;
    let mut agent = Agent::start(&lab, &AgentOptions::streaming("node-1", &generator))?;
    agent
        .process()
        .wait_stderr(|line| line.contains("connected to the generator"))?;
    // One that hangs does not keep it.
    agent.process().signal(Signal::SIGSTOP)?;
    let ended = ended_in_time(generator.process());
    agent.process().signal(Signal::SIGCONT)?;
    ended
}

/// Each line is an object with its level, its message and its fields.
fn logs_for_programs() -> Result<()> {
    let lab = lab()?;
    let options = AgentOptions::stdout("node-1").arg("--log-format", "json");
    let mut agent = Agent::start(&lab, &options.arg("--log-level", "info"))?;
    ended_in_time(agent.process())?;
    let lines = objects(agent.process())?;
    let said = |message: &str| lines.iter().find(|line| line["message"] == message);
    let capturing = said("capturing").context("capturing")?;
    ensure!(
        capturing["level"] == "INFO" && capturing["node"] == "node-1",
        "{capturing}"
    );

    let options = GeneratorOptions::default().arg("--log-format", "json");
    let mut generator = Generator::start(&lab, &options)?;
    generator.stop()?;
    let lines = objects(generator.process())?;
    let listening = lines.iter().find(|line| line["message"] == "listening");
    ensure!(
        listening.is_some_and(|line| line["target"] != Value::Null),
        "{lines:?}"
    );
    Ok(())
}

/// No flag says it: `MICROSHIELD_LOG` how much, `MICROSHIELD_LOG_FORMAT` how.
fn logs_by_environment() -> Result<()> {
    let lab = lab()?;
    let generator = Generator::start(&lab, &GeneratorOptions::default())?;
    std::fs::create_dir_all(lab.cgroup_root("node-1"))?;
    let logged = |variables: [&str; 2]| -> Result<Vec<String>> {
        let program = binary("microshield-agent")?.display().to_string();
        let words = [
            program,
            format!("--generator={}", generator.agents_url()),
            "--node-name=node-1".to_owned(),
            format!("--topology=file={}", lab.topology().display()),
            format!("--cgroup-root={}", lab.cgroup_root("node-1").display()),
        ];
        let words = variables.into_iter().map(str::to_owned).chain(words);
        let mut agent = lab.host().exec(Path::new("env"), words)?;
        // What it says at first, when it is connected, and at last is all there is: nothing happens.
        std::thread::sleep(START);
        ended_in_time(&mut agent)?;
        Ok(agent.stderr())
    };
    let errors = logged(["MICROSHIELD_LOG=error", "MICROSHIELD_LOG_FORMAT=text"])?;
    ensure!(errors.is_empty(), "{errors:?}");
    let lines = logged(["MICROSHIELD_LOG=info", "MICROSHIELD_LOG_FORMAT=json"])?;
    let lines: Vec<Value> = lines
        .iter()
        .map(|line| serde_json::from_str(line).with_context(|| line.clone()))
        .collect::<Result<_>>()?;
    ensure!(
        lines.iter().any(|line| line["message"] == "capturing"),
        "{lines:?}"
    );
    ensure!(
        lines.iter().all(|line| line["level"] == "INFO"),
        "{lines:?}"
    );
    Ok(())
}

/// How long a node sleeps: longer than any wait of the agent but those for the generator, which sleeps as well.
const SLEEP: Duration = Duration::from_secs(7);

/// Agent and generator are stopped, while the kernel programs go on. Afterwards nothing is missing, and nothing that happened
/// meanwhile is lost.
///
/// In a real suspend `CLOCK_MONOTONIC` stands still too; that no test here can bring about, see `agent::capture::clock`.
fn a_node_that_sleeps() -> Result<()> {
    let lab = lab()?;
    let mut generator = Generator::start(&lab, &GeneratorOptions::default())?;
    let (mut agent, address) = answering(&lab, AgentOptions::streaming("node-1", &generator))?;
    agent
        .process()
        .wait_stderr(|line| line.contains("connected to the generator url="))?;
    call(&lab)?;
    for program in [agent.process(), generator.process()] {
        program.signal(Signal::SIGSTOP)?;
    }
    call(&lab)?;
    std::thread::sleep(SLEEP);
    for program in [generator.process(), agent.process()] {
        program.signal(Signal::SIGCONT)?;
    }
    let deadline = Instant::now() + START;
    while get(address, "/readyz")?.0 != 200 {
        ensure!(Instant::now() < deadline, "{:?}", get(address, "/readyz")?);
        std::thread::sleep(Duration::from_millis(20));
    }
    call(&lab)?;
    let capture = agent.stop()?;
    ensure!(capture.losses.is_empty(), "{:?}", capture.losses);
    generator.stop()?;
    let counts: Vec<u64> = generator
        .export()?
        .iter()
        .map(|record| record.count)
        .collect();
    ensure!(counts == [3, 3], "{counts:?}");
    Ok(())
}

fn objects(program: &mut Process) -> Result<Vec<Value>> {
    let lines = program.stderr();
    lines
        .iter()
        .map(|line| serde_json::from_str(line).with_context(|| line.clone()))
        .collect()
}

/// The rows by what they are about: state and text.
fn findings(report: &str) -> Result<Vec<(String, String, String)>> {
    let report: Value = serde_json::from_str(report).with_context(|| report.to_owned())?;
    let findings = report["findings"].as_array().context("findings")?;
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    Ok(findings
        .iter()
        .map(|row| (text(&row["what"]), text(&row["state"]), text(&row["found"])))
        .collect())
}

fn state<'a>(findings: &'a [(String, String, String)], what: &str) -> Result<&'a str> {
    let found = findings.iter().find(|(name, _, _)| name == what);
    Ok(&found.with_context(|| what.to_owned())?.1)
}

/// Beside a running agent: neither minds the other.
fn check_as_root() -> Result<()> {
    let lab = lab()?;
    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1"))?;
    let mut check = lab.host().exec(&binary("microshield-agent")?, ["check"])?;
    let status = check.wait(Duration::from_secs(10))?;
    let table = check.stdout();
    ensure!(status.success(), "{status}\n{}", table.join("\n"));
    ensure!(
        table
            .last()
            .is_some_and(|last| last == "This node can be captured, by btf hooks."),
        "{table:?}"
    );
    call(&lab)?;
    let capture = agent.stop()?;
    ensure!(capture.losses.is_empty(), "{:?}", capture.losses);
    ensure!(
        capture
            .records
            .iter()
            .map(|record| record.count)
            .sum::<u64>()
            == 2
    );
    Ok(())
}

/// Without rights it says what can be said.
fn check_as_nobody() -> Result<()> {
    let folder = tempfile::tempdir()?;
    // The folder that the program is built in may be for its owner only.
    let program = folder.path().join("microshield-agent");
    std::fs::copy(binary("microshield-agent")?, &program)?;
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open)?;
    let mut command = Command::new(program);
    std::os::unix::process::CommandExt::uid(&mut command, 65_534);
    let output = command.args(["check", "--json"]).output()?;
    let report = String::from_utf8(output.stdout)?;
    ensure!(
        output.status.code() == Some(1),
        "{}\n{report}",
        output.status
    );
    let findings = findings(&report)?;
    for capability in ["CAP_BPF", "CAP_PERFMON"] {
        ensure!(state(&findings, capability)? == "missing", "{report}");
    }
    ensure!(state(&findings, "CAP_NET_ADMIN")? == "limited", "{report}");
    ensure!(state(&findings, "kernel")? == "ok", "{report}");
    ensure!(state(&findings, "hooks")? == "missing", "{report}");
    Ok(())
}

fn check_in_a_container() -> Result<()> {
    let lab = lab()?;
    let rights = Rights::of_agent()?;
    let container = Container::of_program(&binary("microshield-agent")?, rights);
    let mut check = container.start(&lab, ["check", "--json"])?;
    let status = check.wait(Duration::from_secs(10))?;
    let report = check.stdout().join("\n");
    ensure!(
        status.success(),
        "{status}\n{report}{}",
        check.stderr().join("\n")
    );
    let findings = findings(&report)?;
    for what in [
        "kernel types",
        "cgroup v2",
        "tracefs",
        "CAP_BPF",
        "CAP_PERFMON",
        "CAP_NET_ADMIN",
        "CAP_SYS_PTRACE",
        "hooks: btf",
        "hooks: classic",
        "UDP",
        "open before",
        "memory",
    ] {
        ensure!(state(&findings, what)? == "ok", "{what}: {report}");
    }
    Ok(())
}
