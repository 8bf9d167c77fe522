//! The data directory, and what is exported from it.

use std::path::Path;

use serde_json::Value;
use sqlx::{ConnectOptions as _, sqlite::SqliteConnectOptions};

use crate::{
    client::{Client, batch_with_losses, flow},
    generator::{Generator, export, run},
};

/// `serve` must not start: exit code 2 and this reason.
fn assert_refused(data_dir: &Path, args: &[&str], reason: &str) {
    let mut all = vec!["serve", "--listen", "127.0.0.1:0", "--data-dir"];
    all.push(data_dir.to_str().unwrap());
    all.extend(args);
    let output = run(&all);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains(reason), "{stderr}\nnot: {reason}");
    assert_eq!(output.status.code(), Some(2), "{stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn has_one_owner() {
    let data = tempfile::tempdir().unwrap();
    let generator = Generator::on(data.path(), &[]);
    assert_refused(data.path(), &[], "is in use by another process (process ");
    let (mut agent, _) = Client::join(generator.address, "one").await;
    agent.deliver(1, vec![flow("web", "db", 80, 1)]).await;
    // A lock does not outlive its process, however that ends.
    generator.kill();
    let generator = Generator::on(data.path(), &[]);
    assert_eq!(Client::join(generator.address, "one").await.1, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_newer_version_is_left_alone() {
    let data = tempfile::tempdir().unwrap();
    let (status, _) = Generator::on(data.path(), &[]).terminate();
    assert!(status.success());
    let mut database = SqliteConnectOptions::new()
        .filename(data.path().join("ledger.db"))
        .connect()
        .await
        .unwrap();
    sqlx::raw_sql("UPDATE meta SET schema_version = 99")
        .execute(&mut database)
        .await
        .unwrap();
    let reason = "has schema version 99, this program knows none above 2";
    assert_refused(data.path(), &[], reason);
    let output = run(&["export", "--data-dir", data.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains(reason));
}

#[tokio::test(flavor = "multi_thread")]
async fn is_exported_while_in_use_and_after() {
    let data = tempfile::tempdir().unwrap();
    let generator = Generator::on(data.path(), &[]);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    let flows = vec![
        flow("web", "db", 5432, 7),
        flow("web", "cache", 6379, 2),
        flow("web", "db", 5432, 4),
    ];
    agent.deliver(1, flows).await;
    let running = export(data.path());
    let ends: Vec<(String, u16, u64)> = running
        .iter()
        .map(|record| (record.dst.to_string(), record.tuple.dst_port, record.count))
        .collect();
    assert_eq!(
        ends,
        [
            ("shop/cache".to_owned(), 6379, 2),
            ("shop/db".to_owned(), 5432, 11)
        ]
    );
    let (status, _) = generator.terminate();
    assert!(status.success());
    assert_eq!(export(data.path()), running);

    let data_dir = data.path().to_str().unwrap();
    let table = run(&["export", "--data-dir", data_dir, "--edges"]).stdout;
    let table = String::from_utf8(table).unwrap();
    let words: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        words[1][..4],
        ["shop/web", "shop/cache", "6379/TCP", "2"],
        "{table}"
    );
    assert_eq!(
        words[2][..4],
        ["shop/web", "shop/db", "5432/TCP", "11"],
        "{table}"
    );
    assert_eq!(words.len(), 3, "{table}");

    let json = run(&["export", "--data-dir", data_dir, "--edges", "--json"]).stdout;
    let counts: Vec<u64> = String::from_utf8(json)
        .unwrap()
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["count"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert_eq!(counts, [2, 11]);

    let file = data.path().join("flows.json");
    let to_file = [
        "export",
        "--data-dir",
        data_dir,
        "-o",
        file.to_str().unwrap(),
    ];
    assert!(run(&to_file).status.success());
    let written = std::fs::read(&file).unwrap();
    assert_eq!(written, run(&["export", "--data-dir", data_dir]).stdout);
}

#[test]
fn may_be_missing_or_no_folder() {
    let data = tempfile::tempdir().unwrap();
    let output = run(&["export", "--data-dir", data.path().to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("holds no ledger"));

    let file = data.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert_refused(&file, &[], "data directory");
}

#[test]
fn usage_is_checked() {
    let data = tempfile::tempdir().unwrap();
    for (args, reason) in [
        (vec!["-o", "policies"], "choose whose policies to write"),
        (vec!["-n", "shop"], "--output FOLDER is missing"),
        (vec!["-g", "all"], "invalid value 'all'"),
        (
            vec!["--log", "=,="],
            "invalid value '=,=' for '--log <FILTER>'",
        ),
        (vec!["--frobnicate"], "unexpected argument '--frobnicate'"),
    ] {
        assert_refused(data.path(), &args, reason);
    }
    let generator = Generator::start(&[]);
    let taken = generator.address.to_string();
    let output = run(&["serve", "--listen", &taken]);
    assert_eq!(output.status.code(), Some(2));
    let reason = format!("cannot listen on {taken}: Address already in use");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains(&reason),
        "{output:?}"
    );
}

#[test]
fn without_one_a_restart_forgets() {
    let generator = Generator::start(&[]);
    let line = generator.wait_for_log("a restart forgets it");
    assert!(line.contains("WARN"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_are_made_and_judged_from_it_while_it_is_in_use() {
    let data = tempfile::tempdir().unwrap();
    let generator = Generator::on(data.path(), &[]);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    agent.deliver(1, vec![flow("web", "db", 5432, 7)]).await;
    agent
        .say(&batch_with_losses(2, Vec::new(), &[("ring_full", 3)]))
        .await;
    agent.hear().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (data_dir, folder) = (
        data.path().to_str().unwrap(),
        folder.path().to_str().unwrap(),
    );
    let stdout = |args: &[&str]| {
        let output = run(&[args, &["--data-dir", data_dir]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            (output.status.code(), stderr.as_str()),
            (Some(0), ""),
            "{args:?}"
        );
        String::from_utf8(output.stdout).unwrap()
    };
    let summary = stdout(&["generate", "-A", "-a", "-o", folder]);
    assert!(summary.contains("flows allowed: 1, denied: 0"), "{summary}");
    let lost = ": 3 observations lost: ring_full: connections may be missing\n";
    assert!(summary.contains(lost), "{summary}");
    let strict = [
        "generate",
        "-A",
        "-a",
        "-o",
        folder,
        "--forbid-dns",
        "--strict",
        "--data-dir",
        data_dir,
    ];
    let output = run(&strict);
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("--strict: 3 observations were lost"),
        "{stderr}"
    );
    let said = stderr.lines().last().unwrap();
    assert!(said.ends_with(": 3 observations lost: ring_full"), "{said}");
    let again = stdout(&["generate", "-A", "-a", "-o", folder]);
    assert!(again.contains(": 0 files written, 2 unchanged"), "{again}");
    let audit = stdout(&["audit", "-p", folder]);
    assert!(audit.starts_with("flows: 1 judged, 1 allowed, "), "{audit}");
    let explanation = stdout(&["explain", "-p", folder, "shop/policy-db"]);
    assert!(explanation.contains("connections: 7, "), "{explanation}");
    stdout(&["diff", "-p", folder, "-p", folder]);

    let empty = tempfile::tempdir().unwrap();
    let empty = empty.path().to_str().unwrap();
    for (args, reason) in [
        (["--data-dir", empty].as_slice(), "holds no ledger"),
        (
            &[],
            "flow records are missing: -f FILE, --from-cluster, --url URL, or --data-dir DIR",
        ),
    ] {
        let output = run(&[&["audit", "-p", folder], args].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(reason), "{stderr}");
    }
}
