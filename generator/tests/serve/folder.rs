//! The policy folder follows the flows.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::ErrorKind,
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use flow::record::FlowRecord;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    client::{Client, batch, batch_with_losses, flow},
    generator::{Generator, PATIENCE, microshield},
};

/// The folder's files, but for those that are gone before they are read: what is being written has other names at first.
fn files(folder: &Path) -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        match fs::read_to_string(path) {
            Ok(text) => drop(files.insert(name, text)),
            Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{name}: {error}"),
        }
    }
    files
}

/// Waits until the folder's files are these.
fn wait_for_files(folder: &Path, names: &[&str]) -> BTreeMap<String, String> {
    let start = Instant::now();
    loop {
        let files = files(folder);
        if files.keys().eq(names) {
            return files;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{:?}, not {names:?}",
            files.keys()
        );
        sleep(Duration::from_millis(20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn follows_the_flows() {
    let data = tempfile::tempdir().unwrap();
    let policies = tempfile::tempdir().unwrap();
    let folder = policies.path().join("shop");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("own.yaml"), "mine: true\n").unwrap();
    let args = [
        "-o",
        folder.to_str().unwrap(),
        "-n",
        "shop",
        "-g",
        "svc",
        "--forbid-dns",
    ];
    let generator = Generator::on(data.path(), &args);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    assert_eq!(files(&folder).len(), 1);

    agent.deliver(1, vec![flow("web", "db", 5432, 1)]).await;
    let first = wait_for_files(&folder, &["own.yaml", "policy-db.yaml", "policy-web.yaml"]);
    assert!(first["policy-db.yaml"].contains("port: 5432"), "{first:?}");
    let line = generator.wait_for_log("policy folder is up to date");
    for proven in ["allowed=1", "denied=0", "open_but_never_seen=0"] {
        assert!(line.contains(proven), "{line}");
    }
    assert!(
        !first["policy-web.yaml"].contains("port: 53\n"),
        "{first:?}"
    );
    let before = fs::metadata(folder.join("policy-db.yaml"))
        .unwrap()
        .modified()
        .unwrap();

    agent.deliver(2, vec![flow("web", "cache", 6379, 1)]).await;
    let names = [
        "own.yaml",
        "policy-cache.yaml",
        "policy-db.yaml",
        "policy-web.yaml",
    ];
    let second = wait_for_files(&folder, &names);
    assert!(
        second["policy-cache.yaml"].contains("port: 6379"),
        "{second:?}"
    );
    let after = fs::metadata(folder.join("policy-db.yaml"))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(before, after, "an unchanged policy was written again");
    assert_eq!(second["own.yaml"], "mine: true\n");

    // A restart knows what was: a policy that somebody removed is back before the first agent is.
    generator.kill();
    fs::remove_file(folder.join("policy-db.yaml")).unwrap();
    let _generator = Generator::on(data.path(), &args);
    assert_eq!(files(&folder).len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn is_final_after_sigterm() {
    /// So many policies that not all of them come with the first look at the ledger.
    const BATCHES: u64 = 40;
    let data = tempfile::tempdir().unwrap();
    let policies = tempfile::tempdir().unwrap();
    let folder = policies.path().join("all");
    let args = ["-o", folder.to_str().unwrap(), "-A", "-g", "svc"];
    let generator = Generator::on(data.path(), &args);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    for sequence in 1..=BATCHES {
        let server = format!("db-{sequence}");
        let flows: Vec<FlowRecord> = vec![flow("web", &server, 5432, 1)];
        agent.deliver(sequence, flows).await;
    }
    // This one is on its way: it is stored or not, and then the folder has it or not.
    agent
        .say(&batch(BATCHES + 1, vec![flow("web", "last", 5432, 1)]))
        .await;
    let (status, took) = generator.terminate();
    assert_eq!(status.code(), Some(0));
    assert!(took < Duration::from_secs(5), "took {took:?}");
    let stored = crate::generator::export(data.path()).len();
    assert!(stored as u64 >= BATCHES);
    assert_eq!(
        files(&folder).len(),
        stored + 1,
        "a policy for each server, and for `web`"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn keeps_its_rules_over_a_restart() {
    let data = tempfile::tempdir().unwrap();
    let policies = tempfile::tempdir().unwrap();
    let args = ["-o", policies.path().to_str().unwrap(), "-A"];
    let generator = Generator::on(data.path(), &args);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    agent.deliver(1, vec![flow("web", "db", 5432, 1)]).await;
    assert!(generator.terminate().0.success());
    let before = files(policies.path());
    assert_eq!(before.len(), 2);

    let generator = Generator::on(data.path(), &args);
    let (mut agent, _) = Client::join(generator.address, "two").await;
    agent.deliver(1, vec![flow("web", "cache", 6379, 1)]).await;
    assert!(generator.terminate().0.success());
    let after = files(policies.path());
    assert_eq!(after.len(), 3);
    for (name, text) in &before {
        let lost: Vec<&str> = text
            .lines()
            .filter(|line| !after[name].contains(line))
            .collect();
        assert_eq!(lost, [""; 0], "{name}");
    }

    // A ledger that knows nothing of the namespaces takes nothing away.
    let empty = tempfile::tempdir().unwrap();
    assert!(Generator::on(empty.path(), &args).terminate().0.success());
    assert_eq!(files(policies.path()), after);
}

#[test]
fn needs_a_ledger_that_remembers() {
    let policies = tempfile::tempdir().unwrap();
    let output = crate::generator::run(&["serve", "-A", "-o", policies.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("--data-dir <DIR>"),
        "{output:?}"
    );
}

#[test]
fn must_be_one() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let data = tempfile::tempdir().unwrap();
    let output = crate::generator::run(&[
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        data.path().to_str().unwrap(),
        "-A",
        "-o",
        file.path().to_str().unwrap(),
    ]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot create folder"));
}

/// Nothing is written of what may lack something, and what was written before stays.
#[tokio::test(flavor = "multi_thread")]
async fn strict_writes_nothing_from_a_lossy_ledger() {
    let data = tempfile::tempdir().unwrap();
    let policies = tempfile::tempdir().unwrap();
    let folder = policies.path().to_str().unwrap();
    let args = ["-o", folder, "-n", "shop", "-g", "svc", "--strict"];
    let generator = Generator::on(data.path(), &args);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    agent.deliver(1, vec![flow("web", "db", 5432, 1)]).await;
    let names = ["policy-db.yaml", "policy-web.yaml"];
    let before = wait_for_files(policies.path(), &names);

    let flows = vec![flow("web", "cache", 6379, 1)];
    agent
        .say(&batch_with_losses(2, flows, &[("udp_peers_full", 2)]))
        .await;
    agent.hear().await.unwrap();
    let said = "--strict: observations were lost, the policy folder is left as it is";
    let line = generator.wait_for_log(said);
    assert!(line.contains("ERROR") && line.contains("lost=2"), "{line}");
    agent.deliver(3, vec![flow("web", "queue", 5672, 1)]).await;
    sleep(Duration::from_secs(3));
    assert_eq!(files(policies.path()), before);
    assert_eq!(generator.log().matches(said).count(), 1);
    let (status, _) = generator.terminate();
    assert_eq!(status.code(), Some(0));

    // It is no reason not to take what agents bring.
    let generator = Generator::on(data.path(), &args);
    generator.wait_for_log(said);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    agent.deliver(4, vec![flow("web", "cache", 6379, 1)]).await;
    assert_eq!(generator.terminate().0.code(), Some(0));
    assert_eq!(files(policies.path()), before);
}

/// A large ledger's takes minutes; here it waits for somebody else who changes the folder.
#[tokio::test(flavor = "multi_thread")]
async fn is_not_waited_for_when_it_takes_too_long() {
    let data = tempfile::tempdir().unwrap();
    let policies = tempfile::tempdir().unwrap();
    let folder = policies.path().to_str().unwrap();
    let args = ["-o", folder, "-A", "-g", "svc"];
    let generator = Generator::on(data.path(), &args);
    let changing = File::open(policies.path()).unwrap();
    changing.lock().unwrap();
    let (mut agent, _) = Client::join(generator.address, "one").await;
    agent.deliver(1, vec![flow("web", "db", 5432, 1)]).await;
    let (status, took) = generator.terminate();
    assert_eq!(status.code(), Some(0));
    assert!(took < Duration::from_secs(25), "took {took:?}");
    assert_eq!(files(policies.path()).len(), 0);

    // Nor when it is asked to end before it has begun.
    let mut starting = microshield()
        .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(data.path())
        .args(args)
        .spawn()
        .unwrap();
    let start = Instant::now();
    while fs::read_to_string(data.path().join("lock")).unwrap() != format!("{}\n", starting.id()) {
        assert!(start.elapsed() < PATIENCE);
        sleep(Duration::from_millis(20));
    }
    let pid = Pid::from_raw(starting.id().try_into().unwrap());
    kill(pid, Signal::SIGTERM).unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = starting.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(25) {
            starting.kill().unwrap();
        }
        sleep(Duration::from_millis(20));
    };
    assert_eq!(status.code(), Some(0));

    // The next start makes up for it.
    drop(changing);
    let _generator = Generator::on(data.path(), &args);
    assert_eq!(files(policies.path()).len(), 2);
}
