//! Beside the Scope probe: what its log tells and what the agent sees are one, and count once.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, OpenOptions},
    io::Write as _,
    net::IpAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use flow::record::{Direction, FlowRecord, Source};
use lab::{
    Agent, AgentOptions, Cluster, Generator, GeneratorOptions, Lab, Process, binary,
    truth::{self, Edge},
};
use nix::sys::signal::Signal;

use crate::{Test, expect};

/// How long an agent may take to report what stands in the log.
const PATIENCE: Duration = Duration::from_secs(30);

/// Longer than a sighting waits for its lines, and its record for being printed.
const SETTLED: Duration = Duration::from_secs(5);

/// An hour.
const HOUR: i64 = 3_600;

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for form in [Form::Cri, Form::Docker, Form::Plain] {
        tests.push(Test::new(
            format!("scope_log::a_recorded_log[{form:?}]"),
            move || a_recorded_log(form),
        ));
    }
    tests.push(Test::new("scope_log::on_standard_input", on_standard_input));
    for (form, ahead, clock) in [
        ("cri", 0, "its clock is ours"),
        ("docker", -HOUR, "its clock is an hour behind"),
        ("plain", HOUR, "its clock is an hour ahead"),
    ] {
        tests.push(Test::new(
            format!("scope_log::merged_edges_are_the_truth[{form}, {clock}]"),
            move || merged_edges_are_the_truth(form, ahead),
        ));
    }
    tests.push(Test::new("scope_log::a_log_that_comes_late", || {
        a_log_that_comes_late()
    }));
    tests.push(Test::new("scope_log::none_to_be_read", none_to_be_read));
    tests.push(Test::new("scope_log::either_source_is_missing", || {
        either_source_is_missing()
    }));
    tests
}

/// That there is no log is said, and why, each once; and that there is one.
fn none_to_be_read() -> Result<()> {
    let lab = Lab::start(two_pods())?;
    let folder = lab.folder().join("pod");
    fs::create_dir(&folder)?;
    // A file of which not even root can read the first byte, and one that is not mounted here.
    symlink("/proc/self/mem", folder.join("0.log"))?;
    symlink("/nowhere/1.log", folder.join("1.log"))?;
    let options = AgentOptions::stdout("node-1")
        .arg("--scope-log", &folder.join("*.log").display().to_string());
    let mut agent = Agent::start(&lab, &options)?;
    let said = |agent: &mut Agent, words: &str| {
        let lines = agent.process().stderr();
        lines.iter().filter(|line| line.contains(words)).count()
    };
    const NONE: &str = "there is no log of the probe";
    let start = Instant::now();
    while said(&mut agent, NONE) == 0 {
        ensure!(start.elapsed() < PATIENCE, "nothing is said");
        thread::sleep(Duration::from_millis(100));
    }
    thread::sleep(SETTLED);
    for (words, times) in [(NONE, 1), ("cannot open the probe's log", 1)] {
        let said = said(&mut agent, words);
        ensure!(said == times, "`{words}` is said {said} times");
    }
    fs::write(folder.join("2.log"), "")?;
    let start = Instant::now();
    while said(&mut agent, "follows the probe's log") == 0 {
        ensure!(start.elapsed() < PATIENCE, "the log is not followed");
        thread::sleep(Duration::from_millis(100));
    }
    agent.stop()?;
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Cri,
    Docker,
    Plain,
}

impl Form {
    /// A line as a runtime writes it; every seventh is split.
    fn frame(self, number: usize, line: &str) -> String {
        const TIME: &str = "2022-08-18T03:24:11.696728123Z";
        let cut = if number.is_multiple_of(7) { 40 } else { 0 };
        let (start, end) = line.split_at(cut);
        let json = |text: &str| {
            let entry = serde_json::json!({"log": text, "stream": "stderr", "time": TIME});
            format!("{entry}\n")
        };
        match self {
            Self::Plain => format!("{line}\n"),
            Self::Cri if cut > 0 => {
                format!("{TIME} stderr P {start}\n{TIME} stderr F {end}\n")
            }
            Self::Cri => format!("{TIME} stderr F {line}\n"),
            Self::Docker if cut > 0 => json(start) + &json(&format!("{end}\n")),
            Self::Docker => json(&format!("{line}\n")),
        }
    }
}

/// What stays the same over all connections of a flow in the recorded log.
type Flow = (bool, IpAddr, IpAddr, u16);

/// The log of a real probe, through a rotation and a restart of the agent.
fn a_recorded_log(form: Form) -> Result<()> {
    let text = fs::read_to_string(fixture())?;
    let lines: Vec<&str> = text.lines().collect();
    let framed: String = (lines.iter().enumerate())
        .map(|(number, line)| form.frame(number, line))
        .collect();
    let wanted = recorded(&lines)?;

    let lab = Lab::start(two_pods())?;
    let folder = lab.folder().join("pod");
    fs::create_dir(&folder)?;
    let log = folder.join("0.log");
    let append = |text: &str| -> Result<()> {
        let file = OpenOptions::new().append(true).create(true).open(&log);
        Ok(file?.write_all(text.as_bytes())?)
    };
    let options = AgentOptions::stdout("node-1")
        .arg(
            "--scope-log",
            &lab.folder().join("*/*.log").display().to_string(),
        )
        .arg(
            "--scope-position",
            &lab.folder().join("position").display().to_string(),
        );
    // Pieces end anywhere.
    let piece = |part: usize| {
        let at = |part: usize| framed.floor_char_boundary(framed.len() * part / 8);
        &framed[at(part)..at(part + 1)]
    };

    append(piece(0))?;
    let mut agent = Agent::start(&lab, &options)?;
    append(piece(1))?;
    wait_for_records(agent.process(), 1)?;
    append(piece(2))?;
    let whole = piece(3).rfind('\n').map_or(0, |end| end + 1);
    append(&piece(3)[..whole])?;
    fs::rename(&log, folder.join("0.log.2022"))?;
    append(&piece(3)[whole..])?;
    append(piece(4))?;
    let mut records = agent.stop()?.records;
    append(piece(5))?;
    let mut agent = Agent::start(&lab, &options)?;
    append(piece(6))?;
    append(piece(7))?;
    let before: u64 = records.iter().map(|record| record.count).sum();
    let all: u64 = wanted.values().sum();
    wait_for_records(agent.process(), all - before)?;
    records.extend(agent.stop()?.records);

    let mut seen: BTreeMap<Flow, u64> = BTreeMap::new();
    for record in &records {
        ensure!(
            record.sources == BTreeSet::from([Source::Scope]),
            "nobody else was there: {record:?}"
        );
        let tuple = record.tuple;
        let flow = (
            record.direction == Direction::Ingress,
            tuple.src_addr,
            tuple.dst_addr,
            tuple.dst_port,
        );
        *seen.entry(flow).or_default() += record.count;
    }
    let different = wanted
        .keys()
        .chain(seen.keys())
        .find(|flow| wanted.get(flow) != seen.get(flow));
    ensure!(
        seen == wanted,
        "{} flows, not {}; {:?}: {:?}, not {:?}",
        seen.len(),
        wanted.len(),
        different,
        different.map(|flow| seen.get(flow)),
        different.map(|flow| wanted.get(flow))
    );
    Ok(())
}

/// The same log through a pipe, with lines in it that are about no connection or not as the probe writes them.
fn on_standard_input() -> Result<()> {
    let text = fs::read_to_string(fixture())?;
    let lines: Vec<&str> = text.lines().collect();
    let wanted: u64 = recorded(&lines)?.values().sum();
    let lab = Lab::start(two_pods())?;
    let mut framed = String::new();
    for (number, line) in lines.iter().enumerate() {
        framed += &Form::Cri.frame(number, line);
        if number % 1_000 == 0 {
            framed += "<probe> INFO: 2022/08/18 03:24:11.7 something else\n";
            framed += &format!("{}\n", line.split_at(line.len() - 9).0);
        }
    }
    let pipe = lab.folder().join("pipe");
    ensure!(Command::new("mkfifo").arg(&pipe).status()?.success());
    // Never ends, as that of a probe that goes on.
    let mut writer = OpenOptions::new().read(true).write(true).open(&pipe)?;
    let end = writer.try_clone()?;
    let words = [
        "-c",
        "exec env MICROSHIELD_LOG=debug \"$@\" < \"$0\"",
        &pipe.display().to_string(),
        &binary("microshield-agent")?.display().to_string(),
        "--stdout",
        "--scope-log=-",
        "--node-name=node-1",
        &format!("--topology=file={}", lab.topology().display()),
        &format!("--cgroup-root={}", lab.cgroup_root("node-1").display()),
    ];
    fs::create_dir_all(lab.cgroup_root("node-1"))?;
    let mut agent = lab.host().exec(Path::new("sh"), words)?;
    thread::spawn(move || writer.write_all(framed.as_bytes()));
    wait_for_records(&agent, wanted)?;
    let status = agent.stop(Signal::SIGTERM)?;
    drop(end);
    ensure!(status.success(), "{status}");
    let seen = printed(&agent)?;
    ensure!(seen == wanted, "{seen} connections, not {wanted}");
    let log = agent.stderr();
    let malformed = (log.iter()).filter(|line| line.contains("malformed record of the probe"));
    let malformed: Vec<_> = malformed.collect();
    ensure!(malformed.len() == 5, "{malformed:?}");
    ensure!(
        (malformed.iter()).all(|line| line.contains("the line ends before the record does")),
        "{malformed:?}"
    );
    Ok(())
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/microshield/flows.log")
}

/// Connections that came about between two hosts, by flow.
fn recorded(lines: &[&str]) -> Result<BTreeMap<Flow, u64>> {
    let mut flows = BTreeMap::new();
    for line in lines {
        let (_, record) = line.rsplit_once('{').context("no record")?;
        let fields: Vec<&str> = record.trim_end_matches('}').split('|').collect();
        let (local, remote): (IpAddr, IpAddr) = (fields[6].parse()?, fields[7].parse()?);
        if local.is_loopback() || remote.is_loopback() || local == remote {
            continue;
        }
        let flow = match fields[3] {
            "Connect" => (false, local, remote, fields[9].parse()?),
            "Accept" => (true, remote, local, fields[8].parse()?),
            _ => continue,
        };
        *flows.entry(flow).or_default() += 1;
    }
    Ok(flows)
}

/// Until an agent has printed so many connections.
fn wait_for_records(agent: &Process, count: u64) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let printed = printed(agent)?;
        if printed >= count {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "{printed} connections were reported, not {count}: {:?}",
            agent.stderr()
        );
        thread::sleep(Duration::from_millis(100));
    }
}

/// How many connections an agent has printed.
fn printed(agent: &Process) -> Result<u64> {
    let mut printed = 0;
    for line in agent.stdout() {
        let record: FlowRecord = serde_json::from_str(&line)?;
        printed += record.count;
    }
    Ok(printed)
}

/// The agent and the probe watch the same connections.
fn merged_edges_are_the_truth(form: &str, ahead: i64) -> Result<()> {
    let lab = Lab::start(two_pods())?;
    let log = lab.folder().join("probe.log");
    let mut probe = probe(&lab, &log, form, ahead)?;
    let options = AgentOptions::stdout("node-1").arg("--scope-log", &log.display().to_string());
    let agent = Agent::start(&lab, &options)?;
    let mut world = Calls::new(&lab)?;
    // The lines that come first are of a file that was not there before.
    world.call(1)?;
    thread::sleep(SETTLED);
    world.call(60)?;
    thread::sleep(SETTLED);
    let capture = agent.stop()?;
    probe.stop(Signal::SIGTERM)?;
    for record in &capture.records {
        ensure!(
            record.sources == BTreeSet::from([Source::Ebpf, Source::Scope]),
            "both have seen it: {record:?}"
        );
        ensure!(
            record
                .process
                .as_ref()
                .is_some_and(|process| process.container.is_some()),
            "the agent knows the container: {record:?}"
        );
    }
    expect(&[capture], world.wanted())
}

/// The probe's lines come when the agent has reported long since.
fn a_log_that_comes_late() -> Result<()> {
    let lab = Lab::start(two_pods())?;
    let (hidden, log) = (lab.folder().join("hidden"), lab.folder().join("probe.log"));
    let mut probe = probe(&lab, &hidden, "plain", 0)?;
    let options = AgentOptions::stdout("node-1").arg("--scope-log", &log.display().to_string());
    let agent = Agent::start(&lab, &options)?;
    let mut world = Calls::new(&lab)?;
    world.call(40)?;
    thread::sleep(SETTLED);
    probe.stop(Signal::SIGTERM)?;
    fs::rename(&hidden, &log)?;
    thread::sleep(SETTLED);
    let capture = agent.stop()?;
    for direction in [Direction::Egress, Direction::Ingress] {
        let sources: Vec<_> = (capture.records.iter())
            .filter(|record| record.direction == direction)
            .map(|record| (record.count > 0, record.sources.contains(&Source::Scope)))
            .collect();
        ensure!(
            sources.contains(&(true, false)) && sources.contains(&(false, true)),
            "first what the agent saw, then that the probe saw it too: {sources:?}"
        );
    }
    expect(&[capture], world.wanted())
}

/// The agent is killed and comes back; the probe ends and comes back. The ledger has every connection once.
fn either_source_is_missing() -> Result<()> {
    let lab = Lab::start(two_pods())?;
    let log = lab.folder().join("probe.log");
    let mut generator = Generator::start(&lab, &GeneratorOptions::default())?;
    let spool = lab.folder().join("spool").display().to_string();
    let options = AgentOptions::streaming("node-1", &generator)
        .arg("--spool", &spool)
        .arg("--scope-log", &log.display().to_string());
    let mut first = probe(&lab, &log, "cri", 0)?;
    let mut world = Calls::new(&lab)?;
    let mut agent = Agent::start(&lab, &options)?;
    world.call(20)?;
    thread::sleep(SETTLED);
    // Counted in the kernel, or waiting for its lines, when the agent is killed.
    world.call(15)?;
    thread::sleep(Duration::from_millis(1_500));
    world.call(15)?;
    agent.process().stop(Signal::SIGKILL)?;
    world.call(30)?;
    let mut agent = Agent::start(&lab, &options)?;
    world.call(40)?;
    thread::sleep(Duration::from_millis(500));
    first.stop(Signal::SIGTERM)?;
    world.call(50)?;
    thread::sleep(SETTLED);
    let mut second = probe(&lab, &log, "docker", 0)?;
    world.call(10)?;
    thread::sleep(SETTLED);
    let log = agent.process().stderr().join("\n");
    ensure!(!log.contains("ERROR"), "{log}");
    agent.stop()?;
    second.stop(Signal::SIGTERM)?;
    generator.stop()?;
    let records = generator.export()?;
    for record in &records {
        ensure!(
            record.sources == BTreeSet::from([Source::Ebpf, Source::Scope]),
            "either has seen it: {record:?}"
        );
    }
    let (seen, wanted) = (truth::edges(&records), world.wanted());
    ensure!(seen == wanted, "seen: {seen:?}\nmade: {wanted:?}");
    Ok(())
}

fn two_pods() -> Cluster {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("shop", "web");
    cluster.pod("shop", "client");
    cluster
}

/// A probe on the node of the two pods, once it watches.
fn probe(lab: &Lab, out: &Path, form: &str, ahead: i64) -> Result<Process> {
    let how = [format!("--form={form}"), format!("--ahead={ahead}")];
    probe_of(lab, out, &["shop/web", "shop/client"], &how)
}

/// A probe on `node-1` that watches the sockets of these pods, once it does.
pub(crate) fn probe_of(lab: &Lab, out: &Path, pods: &[&str], how: &[String]) -> Result<Process> {
    let mut args = vec![
        "--host=node-1".to_owned(),
        format!("--out={}", out.display()),
    ];
    for pod in pods {
        let [v4, _] = lab.cluster().addresses(lab.spec(pod)?);
        args.push(format!("--address={v4}"));
    }
    args.extend_from_slice(how);
    let process = lab.node("node-1").exec(&binary("lab-probe")?, args)?;
    process.wait_stdout(|line| line == "ready")?;
    Ok(process)
}

/// A client that calls a server, and how often it has.
struct Calls<'a> {
    lab: &'a Lab,
    target: String,
    made: u64,
    _server: Process,
}

impl<'a> Calls<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let server = lab.pod("shop/web")?.serve(["--tcp", "8080"])?;
        let [v4, _] = lab.cluster().addresses(lab.spec("shop/web")?);
        Ok(Self {
            lab,
            target: format!("tcp://{v4}:8080"),
            made: 0,
            _server: server,
        })
    }

    fn call(&mut self, count: u64) -> Result<()> {
        let client = self.lab.pod("shop/client")?;
        client.call_all(["--count", &count.to_string(), &self.target])?;
        self.made += count;
        Ok(())
    }

    fn wanted(&self) -> BTreeMap<Edge, u64> {
        let edge = |direction| {
            let edge = Edge::new(direction, "shop/client", "shop/web TCP 8080");
            (edge, self.made)
        };
        [Direction::Egress, Direction::Ingress].map(edge).into()
    }
}
