//! The images, unpacked and started by runc with the rights of the manifests.
//!
//! They are made of the programs under test by the code that makes those of a release; programs that are not static find
//! this machine's libraries in their containers. `MICROSHIELD_IMAGES=target/images` has the test start the images that
//! `cargo xtask image` built instead.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use flow::record::{Direction, FlowRecord};
use lab::{
    Cluster, Container, Lab, Process, Rights,
    image::{self, Image},
    truth::{self, Edge},
};
use nix::sys::signal::Signal;

use crate::Test;

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("images::are_the_same_again", the_same_again),
        Test::new("images::run_with_the_manifests_rights", run),
    ]
}

/// How long a program may take to end, by the promise that is made for it.
const FAREWELL: Duration = Duration::from_secs(5);

fn the_same_again() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let build = |name: &str| -> Result<BTreeSet<String>> {
        let layouts = folder.path().join(name);
        let printed = image::build(&layouts)?;
        let digests = printed.lines().filter_map(|line| line.split_once('@'));
        Ok(digests.map(|(_, digest)| digest.to_owned()).collect())
    };
    let (one, other) = (build("one")?, build("other")?);
    ensure!(one.len() == 2 && one == other, "{one:?} {other:?}");
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
    let line = serving.wait_stderr(|line| line.contains("listening"))?;
    let port = line.split_once("127.0.0.1:").context("no port")?.1;
    let port: String = port.chars().take_while(char::is_ascii_digit).collect();

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
    let address = lab.cluster().addresses(lab.spec("shop/server")?)[0];
    let _server = lab.pod("shop/server")?.serve(["--tcp", "7000"])?;
    lab.pod("shop/client")?
        .call_all([format!("tcp://{address}:7000")])?;
    end(&mut capturing)?;
    end(&mut serving)?;

    let mut export = generator.start(&lab, ["export", "--data-dir=/var/lib/microshield/ledger"])?;
    let status = export.wait(Duration::from_secs(10))?;
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
    let policies = volumes.join("0/policies");
    let written: Vec<_> = fs::read_dir(&policies)?.collect::<Result<_, _>>()?;
    ensure!(!written.is_empty(), "no policies");
    for entry in written {
        ensure!(entry.metadata()?.uid() == 65_532, "{:?}", entry.path());
    }
    ensure!(Path::new(&volumes.join("0/ledger")).is_dir());
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
