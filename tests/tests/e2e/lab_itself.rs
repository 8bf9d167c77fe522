//! The lab does what the other tests rely on.

use std::{
    fs,
    net::IpAddr,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use lab::{
    Calls, Cluster, Lab,
    cgroup::{Driver, Runtime},
    cluster::OUTSIDE,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;

use crate::Test;

pub(crate) fn tests() -> Vec<Test> {
    vec![
        Test::new("lab::places_reach_each_other", places_reach_each_other),
        Test::new(
            "lab::cgroups_are_named_as_by_kubelet",
            cgroups_are_named_as_by_kubelet,
        ),
        Test::new("lab::nothing_is_left", nothing_is_left),
        Test::new("lab::an_interrupt_removes_all[SIGINT]", || {
            an_interrupt_removes_all(Signal::SIGINT)
        }),
        Test::new("lab::an_interrupt_removes_all[SIGTERM]", || {
            an_interrupt_removes_all(Signal::SIGTERM)
        }),
        Test::new("lab::the_killed_are_swept", the_killed_are_swept),
        Test::new("lab::the_locked_are_not_swept", the_locked_are_not_swept),
    ]
}

/// Two nodes, two pods each; `web` is behind a service, and so is `unheard`, where nobody listens.
fn cluster() -> Cluster {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    cluster.node("node-2");
    for (key, node) in [("web-a", "node-1"), ("web-b", "node-2")] {
        cluster
            .pod("shop", key)
            .on(node)
            .label("app", "web")
            .deployment("web")
            .port("http", 8080);
    }
    cluster.pod("shop", "near").on("node-1");
    cluster.pod("shop", "far").on("node-2").host_network();
    cluster
        .service("shop", "web")
        .select("app", "web")
        .port("http", 80, "http")
        .node_port(30080);
    cluster
        .service("shop", "only-a")
        .select("app", "web")
        .port("other", 81, 8081);
    cluster
        .service("shop", "nobody")
        .select("app", "nobody")
        .port("http", 80, 8080);
    cluster
}

fn tcp(address: IpAddr, port: u16) -> String {
    match address {
        IpAddr::V4(_) => format!("tcp://{address}:{port}"),
        IpAddr::V6(_) => format!("tcp://[{address}]:{port}"),
    }
}

fn places_reach_each_other() -> Result<()> {
    let lab = Lab::start(cluster())?;
    let _a = lab
        .pod("shop/web-a")?
        .serve(["--tcp", "8080,8081", "--udp", "53"])?;
    let _b = lab
        .pod("shop/web-b")?
        .serve(["--tcp", "8080,8081", "--udp", "53"])?;
    let _outside = lab.outside().serve(["--tcp", "443"])?;
    let spec = lab.cluster();
    let [web, _, nobody] = &spec.services[..] else {
        bail!("three services were asked for");
    };
    for path in ["shop/web-a", "shop/web-b", "shop/near", "shop/far"] {
        let place = lab.pod(path)?;
        let mut targets: Vec<String> = Vec::new();
        for family in [0, 1] {
            targets.push(tcp(web.addresses()[family], 80));
            targets.push(tcp(OUTSIDE[family], 443));
            targets.extend(
                spec.nodes
                    .iter()
                    .map(|node| tcp(node.addresses()[family], 30080)),
            );
            for pod in &spec.pods[..2] {
                targets.push(tcp(spec.addresses(pod)[family], 8080));
            }
        }
        targets.push(tcp(spec.addresses(&spec.pods[1])[0], 53).replace("tcp", "udp"));
        // Both backends are chosen within so many calls, also by themselves, but once in 2^39.
        targets.extend(["--count".into(), "40".into()]);
        place.call_all(&targets)?;
        let refused = place.call([tcp(nobody.addresses()[0], 80)])?;
        ensure!(
            refused
                == Calls {
                    refused: 1,
                    ..Calls::default()
                },
            "a service without endpoints, from {path}: {refused:?}"
        );
    }
    for node in &spec.nodes {
        let targets = spec.pods[..2].iter().flat_map(|pod| spec.addresses(pod));
        lab.node(&node.name)
            .call_all(targets.map(|address| tcp(address, 8080)))?;
    }
    Ok(())
}

fn cgroups_are_named_as_by_kubelet() -> Result<()> {
    for (driver, runtime, wanted) in [
        (
            Driver::Systemd,
            Runtime::Containerd,
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_.slice/cri-containerd-ID.scope",
        ),
        (
            Driver::Systemd,
            Runtime::Crio,
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_.slice/crio-ID.scope",
        ),
        (
            Driver::Systemd,
            Runtime::Docker,
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_.slice/docker-ID.scope",
        ),
        (
            Driver::Cgroupfs,
            Runtime::Containerd,
            "kubepods/burstable/podUID/ID",
        ),
        (
            Driver::Cgroupfs,
            Runtime::Crio,
            "kubepods/burstable/podUID/crio-ID",
        ),
    ] {
        let mut cluster = Cluster::apart();
        cluster.node("node-1").cgroups(driver, runtime);
        cluster.pod("shop", "web");
        let lab = Lab::start(cluster)?;
        let pod = lab.pod("shop/web")?;
        let server = pod.serve(["--tcp", "80"])?;
        let spec = lab.spec("shop/web")?;
        let wanted = wanted
            .replace("UID_", &spec.uid().replace('-', "_"))
            .replace("UID", &spec.uid())
            .replace("ID", &spec.container());
        let procs = lab.cgroup_root("node-1").join(wanted).join("cgroup.procs");
        let procs = fs::read_to_string(&procs)?;
        ensure!(procs.trim() == server.pid().to_string(), "{procs}");
    }
    Ok(())
}

fn nothing_is_left() -> Result<()> {
    let lab = Lab::start(cluster())?;
    let name = lab.name().to_owned();
    let mut server = lab.pod("shop/web-a")?.serve(["--tcp", "8080"])?;
    let places = remains(&name)?;
    ensure!(
        places.len() > 3,
        "this test looks in the wrong places: {places:?}"
    );
    drop(lab);
    // The server did not outlive its lab, though nobody stopped it.
    server.wait(Duration::from_secs(1))?;
    let left = remains(&name)?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// The demonstration is interrupted while its cluster is up.
fn an_interrupt_removes_all(signal: Signal) -> Result<()> {
    let (mut demo, name, _folder) = demo_that_is_up()?;
    kill(Pid::from_raw(i32::try_from(demo.0.id())?), signal)?;
    let status = demo.wait()?;
    ensure!(
        status.code() == Some(128 + signal as i32),
        "{signal}: {status}"
    );
    let left = remains(&name)?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// The demonstration is killed; its programs die with it, and the next lab removes what it could not.
fn the_killed_are_swept() -> Result<()> {
    let (mut demo, name, _folder) = demo_that_is_up()?;
    demo.0.kill()?;
    demo.wait()?;
    ensure!(
        !remains(&name)?.is_empty(),
        "this test looks in the wrong places"
    );
    drop(Lab::start(cluster())?);
    let left = remains(&name)?;
    ensure!(left.is_empty(), "{left:?}");
    Ok(())
}

/// A process that cannot be seen from here, in another pid namespace, is alive as long as its lab's folder is locked.
fn the_locked_are_not_swept() -> Result<()> {
    // Above the highest process id that the kernel gives.
    let folder = std::env::temp_dir().join(format!("microshield-lab-{}-0", (1 << 22) + 1));
    fs::create_dir(&folder)?;
    let locked = fs::File::open(&folder)?;
    locked.lock()?;
    drop(Lab::start(cluster())?);
    ensure!(folder.exists(), "a lab that is alive was removed");
    drop(locked);
    drop(Lab::start(cluster())?);
    ensure!(!folder.exists(), "a lab that is dead was not removed");
    Ok(())
}

/// A program that is killed when a test fails.
struct Demo(Child);

impl Demo {
    fn wait(&mut self) -> Result<ExitStatus> {
        until("the demonstration ends", || Ok(self.0.try_wait()?))
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // Asked first: what is killed leaves its lab behind.
        if let Ok(pid) = i32::try_from(self.0.id())
            && matches!(self.0.try_wait(), Ok(None))
            && kill(Pid::from_raw(pid), Signal::SIGTERM).is_ok()
        {
            let _status = self.0.wait();
        }
    }
}

/// The demonstration with its agents running, the start of its labs' names, and the folder that it writes to.
fn demo_that_is_up() -> Result<(Demo, String, TempDir)> {
    let folder = tempfile::tempdir()?;
    let demo = Command::new(lab::binary("demo")?)
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let name = format!("microshield-lab-{}-0", demo.id());
    let mut demo = Demo(demo);
    let host = lab::cgroup::mount()?.join(&name).join("host/cgroup.procs");
    until("the demonstration is up", || {
        if let Some(status) = demo.0.try_wait()? {
            bail!("the demonstration ended: {status}");
        }
        let programs = fs::read_to_string(&host).unwrap_or_default();
        // The generator and two agents.
        Ok((programs.lines().count() == 3).then_some(()))
    })?;
    Ok((demo, name, folder))
}

fn until<T>(what: &str, mut test: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        if let Some(value) = test()? {
            return Ok(value);
        }
        ensure!(Instant::now() < deadline, "in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Namespaces, cgroups and folders of a lab.
fn remains(name: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for folder in [
        "/run/netns".into(),
        std::env::temp_dir(),
        lab::cgroup::mount()?,
    ]
    .into_iter()
    .chain(lab::cgroup::v1_mount())
    {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path
                .file_name()
                .is_some_and(|file| file.to_string_lossy().starts_with(name))
            {
                found.push(path);
            }
        }
    }
    Ok(found)
}
