//! The images, unpacked and started by runc with the rights of the manifests.
//!
//! They are made of the programs under test by the code that makes those of a release; programs that are not static find
//! this machine's libraries in their containers. `MICROSHIELD_IMAGES=target/images` has the test start the images that
//! `cargo xtask image` built instead, and look at them: those of both architectures are to be static. Where Debian's
//! `qemu-user` is installed those of arm64 are started too, by an emulation of the processor: a kernel that captures there is
//! not emulated.

use std::{
    collections::BTreeSet,
    env, fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use flow::record::{Direction, FlowRecord};
use lab::{
    Agent, AgentOptions, Cluster, Container, Lab, Process, Rights,
    image::{self, Image},
    truth::{self, Edge},
};
use nix::sys::signal::Signal;

use crate::Test;

pub(crate) fn tests() -> Vec<Test> {
    let mut tests = vec![
        Test::new("images::are_the_same_again", the_same_again),
        Test::new("images::too_large_a_one_is_refused", too_large),
        Test::new("images::run_with_the_manifests_rights", run),
    ];
    let Some(layouts) = image::of_a_release() else {
        return tests;
    };
    for (architecture, machine) in [("amd64", "X86-64"), ("arm64", "AArch64")] {
        let layouts = layouts.clone();
        tests.push(Test::new(
            format!("images::are_static[{architecture}]"),
            move || are_static(&layouts, architecture, machine),
        ));
    }
    if is_installed(EMULATOR) {
        tests.push(Test::new("images::run_emulated[arm64]", move || {
            run_emulated(&layouts)
        }));
    } else {
        eprintln!(
            "images of arm64 are not started: `{EMULATOR}` is not installed (Debian: qemu-user)"
        );
    }
    tests
}

/// Runs programs of arm64, their system calls on this machine's kernel.
const EMULATOR: &str = "qemu-aarch64";

/// Emulation is slow, and no promise is made for it.
const EMULATED: Duration = Duration::from_secs(60);

fn is_installed(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// How long a program may take to end, by the promise that is made for it.
const FAREWELL: Duration = Duration::from_secs(5);

fn the_same_again() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let build = |name: &str| -> Result<BTreeSet<String>> {
        let layouts = folder.path().join(name);
        let printed = image::build(&layouts, image::DEBUG_LIMIT)?;
        let digests = printed.lines().filter_map(|line| line.split_once('@'));
        Ok(digests.map(|(_, digest)| digest.to_owned()).collect())
    };
    let (one, other) = (build("one")?, build("other")?);
    ensure!(one.len() == 2 && one == other, "{one:?} {other:?}");
    Ok(())
}

/// It is said which and how large, and there is none.
fn too_large() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let layouts = folder.path().join("images");
    let error = image::build(&layouts, 1)
        .err()
        .context("it was taken")?
        .to_string();
    ensure!(
        error.contains("microshield-agent for ") && error.contains("and 1 are allowed"),
        "{error}"
    );
    ensure!(!layouts.exists());
    Ok(())
}

/// The programs ask for no loader and for no library, and are for the processor that the index says.
fn are_static(layouts: &Path, architecture: &str, machine: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    for name in ["microshield-agent", "microshield"] {
        let root = folder.path().join(name);
        let image = Image::unpack_for(architecture, &layouts.join(name), &root)?;
        ensure!(
            image.config["architecture"] == architecture,
            "{}",
            image.config
        );
        let program = image.root.join("usr/bin").join(name);
        let output = Command::new("readelf")
            .args(["--wide", "--file-header", "--program-headers", "--dynamic"])
            .arg(&program)
            .output()
            .context("readelf")?;
        let said = String::from_utf8(output.stdout)?;
        let line = said.lines().find(|line| line.contains("Machine:"));
        ensure!(
            line.is_some_and(|line| line.contains(machine)),
            "{name}: {line:?}"
        );
        for unwanted in ["INTERP", "(NEEDED)"] {
            ensure!(!said.contains(unwanted), "{name}: {said}");
        }
    }
    Ok(())
}

/// A generator of another architecture takes what this machine's agent streams, keeps it, and writes policies of it; the
/// agent starts as far as a kernel is there for it.
fn run_emulated(layouts: &Path) -> Result<()> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("shop", "client").label("app", "client");
    cluster.pod("shop", "server").label("app", "server");
    let lab = Lab::start(cluster)?;
    let unpack = |name: &str| -> Result<String> {
        let image = Image::unpack_for("arm64", &layouts.join(name), &lab.folder().join(name))?;
        let program = image
            .root
            .join(image.entry_point()?.trim_start_matches('/'));
        Ok(program.display().to_string())
    };
    let (agent, generator) = (unpack("microshield-agent")?, unpack("microshield")?);
    let start = |program: &str, words: &[&str]| -> Result<Process> {
        let words = [program].into_iter().chain(words.iter().copied());
        lab.host().exec(Path::new(EMULATOR), words)
    };
    for program in [&agent, &generator] {
        let mut process = start(program, &["--version"])?;
        let status = process.wait(EMULATED)?;
        let said = process.stdout().join("\n");
        ensure!(
            status.success() && said.ends_with(env!("CARGO_PKG_VERSION")),
            "{status} {said}"
        );
    }
    // No BPF there: it says so.
    let mut check = start(&agent, &["check"])?;
    let status = check.wait(EMULATED)?;
    let table = check.stdout().join("\n");
    ensure!(
        status.code() == Some(1) && table.contains("kernel"),
        "{status} {table}"
    );

    let data = lab.folder().join("ledger").display().to_string();
    let policies = lab.folder().join("policies");
    let output = format!("--output={}", policies.display());
    let data = format!("--data-dir={data}");
    let mut serving = start(
        &generator,
        &[
            "serve",
            "--listen=127.0.0.1:0",
            &data,
            &output,
            "-A",
            "-g",
            "svc",
        ],
    )?;
    let url = format!("ws://127.0.0.1:{}/agents", port(&serving)?);
    let mut capturing = Agent::start(&lab, &AgentOptions::to("node-1", &url))?;
    capturing
        .process()
        .wait_stderr(|line| line.contains("connected to the generator"))?;
    call(&lab)?;
    end(capturing.process())?;
    serving.signal(Signal::SIGTERM)?;
    let status = serving.wait(EMULATED)?;
    ensure!(status.success(), "{status}");
    expect_one_call(&mut start(&generator, &["export", &data])?)?;
    ensure!(fs::read_dir(policies)?.next().is_some(), "no policies");
    Ok(())
}

/// An agent streams to a generator, both from their images, and what was called is in the ledger and in the policies.
fn run() -> Result<()> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.pod("shop", "client").label("app", "client");
    cluster.pod("shop", "server").label("app", "server");
    let lab = Lab::start(cluster)?;
    let layouts = image::layouts(lab.folder())?;
    let unpack = |name: &str| {
        let image = Image::unpack(&layouts.join(name), &lab.folder().join(name));
        image.with_context(|| format!("{}/{name}", layouts.display()))
    };
    let agent = unpack("microshield-agent")?;
    let files: Vec<String> = agent.files()?.into_keys().collect();
    ensure!(
        files
            == [
                "licenses/LICENSE",
                "licenses/LICENSE-GPL-2.0.agent-ebpf",
                "licenses/LICENSE-MIT.agent-ebpf",
                "usr/bin/microshield-agent"
            ],
        "{files:?}"
    );
    let generator = unpack("microshield")?;
    let user = &generator.config["config"]["User"];
    ensure!(user == "65532:65532", "the generator's user is {user}");

    let volumes = lab.folder().join("generator-volumes");
    let rights = Rights::of_generator()?;
    ensure!(rights.user.0 != 0 && rights.capabilities.is_empty());
    let generator = Container::of_image(&generator.root, generator.entry_point()?, rights)
        .volumes(&volumes)
        .in_the_machine_s_network();
    let mut serving = generator.start(
        &lab,
        [
            "serve",
            "--listen=127.0.0.1:0",
            "--data-dir=/var/lib/microshield/ledger",
            "--output=/var/lib/microshield/policies",
            "--all-namespaces",
            "--granularity=svc",
            "--insecure",
        ],
    )?;
    let port = port(&serving)?;

    fs::create_dir_all(lab.cgroup_root("node-1"))?;
    // By a name, which a static program has to resolve as well.
    let hosts = lab.folder().join("hosts");
    fs::write(&hosts, "127.0.0.1 generator.microshield.svc\n")?;
    let capturing = Container::of_image(&agent.root, agent.entry_point()?, Rights::of_agent()?)
        .file(lab.folder())
        .file_at("/etc/hosts", &hosts)
        .in_the_machine_s_network();
    let mut capturing = capturing.start(
        &lab,
        [
            format!("--generator=ws://generator.microshield.svc:{port}/agents"),
            "--node-name=node-1".to_owned(),
            format!("--topology=file={}", lab.topology().display()),
            format!("--cgroup-root={}", lab.cgroup_root("node-1").display()),
            "--spool=/var/lib/microshield/spool".to_owned(),
        ],
    )?;
    capturing.wait_stderr(|line| line.contains("capturing"))?;
    capturing.wait_stderr(|line| line.contains("connected to the generator"))?;
    call(&lab)?;
    end(&mut capturing)?;
    end(&mut serving)?;

    expect_one_call(
        &mut generator.start(&lab, ["export", "--data-dir=/var/lib/microshield/ledger"])?,
    )?;
    let policies = volumes.join("0/policies");
    let written: Vec<_> = fs::read_dir(&policies)?.collect::<Result<_, _>>()?;
    ensure!(!written.is_empty(), "no policies");
    for entry in written {
        ensure!(entry.metadata()?.uid() == 65_532, "{:?}", entry.path());
    }
    ensure!(Path::new(&volumes.join("0/ledger")).is_dir());
    Ok(())
}

/// The port that a generator says it listens on.
fn port(serving: &Process) -> Result<String> {
    let line = serving.wait_stderr(|line| line.contains("listening"))?;
    let port = line.split_once("127.0.0.1:").context("no port")?.1;
    Ok(port.chars().take_while(char::is_ascii_digit).collect())
}

fn call(lab: &Lab) -> Result<()> {
    let address = lab.cluster().addresses(lab.spec("shop/server")?)[0];
    let _server = lab.pod("shop/server")?.serve(["--tcp", "7000"])?;
    lab.pod("shop/client")?
        .call_all([format!("tcp://{address}:7000")])?;
    Ok(())
}

/// What `export` prints is this call, as both ends saw it.
fn expect_one_call(export: &mut Process) -> Result<()> {
    let status = export.wait(EMULATED)?;
    let log = export.stderr().join("\n");
    ensure!(status.success() && log.is_empty(), "{status}\n{log}");
    let records: Result<Vec<FlowRecord>, _> = export
        .stdout()
        .iter()
        .map(|line| serde_json::from_str(line))
        .collect();
    let wanted = [Direction::Egress, Direction::Ingress].map(|direction| {
        (
            Edge::new(direction, "shop/client", "shop/server TCP 7000"),
            1,
        )
    });
    let seen = truth::edges(&records?);
    ensure!(seen == wanted.into(), "{seen:?}");
    Ok(())
}

/// Asks a program to end: it does in time, and well.
fn end(program: &mut Process) -> Result<()> {
    let asked = Instant::now();
    let status = program.stop(Signal::SIGTERM)?;
    let log = program.stderr().join("\n");
    ensure!(status.success(), "{status}\n{log}");
    ensure!(asked.elapsed() < FAREWELL, "{:?}\n{log}", asked.elapsed());
    Ok(())
}
