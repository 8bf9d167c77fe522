//! The command `microshield generate` as users run it: arguments, output, exit codes.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests are not seen as tests by clippy"
)]

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Instant,
};

use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("../tests/fixtures").join(name)
}

fn linked() -> PathBuf {
    fixture("microshield/linked.json")
}

fn microshield(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_microshield"));
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("MICROSHIELD_"))
        {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null());
    command
}

/// Runs `generate` with the arguments; the exit code and what was printed.
fn generate(flows: &Path, folder: &Path, args: &[&str]) -> Output {
    microshield(&["generate", "-f"])
        .arg(flows)
        .arg("-o")
        .arg(folder)
        .args(args)
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn contents(folder: &Path) -> BTreeMap<String, String> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                fs::read_to_string(entry.path()).unwrap(),
            )
        })
        .collect()
}

#[test]
fn a_folder_is_written_and_the_same_again() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("policies");
    let first = generate(&linked(), &folder, &["-n", "default", "-a"]);
    assert!(first.status.success(), "{}", stderr(&first));
    let text = stdout(&first);
    let header = "CLIENT                                   SERVER                                   PORT      COUNT  SEEN BY  LAST SEEN\n";
    assert!(text.starts_with(header), "{text}");
    assert!(
        text.contains(": 3 files written, 0 unchanged, 0 removed\n"),
        "{text}"
    );
    assert_eq!(stderr(&first), "");
    let written = contents(&folder);
    assert_eq!(
        written.keys().collect::<Vec<_>>(),
        [
            "policy-details.yaml",
            "policy-productpage.yaml",
            "policy-reviews.yaml"
        ]
    );

    let second = generate(&linked(), &folder, &["-n", "default", "-a"]);
    let text = stdout(&second);
    assert!(
        text.contains(": 0 files written, 3 unchanged, 0 removed\n"),
        "{text}"
    );
    assert_eq!(contents(&folder), written);

    let by_namespace = generate(&linked(), &folder, &["-n", "default", "-a", "-g", "ns"]);
    let text = stdout(&by_namespace);
    assert!(
        text.contains(": 1 file written, 0 unchanged, 3 removed\n"),
        "{text}"
    );
}

#[test]
fn the_order_of_records_does_not_matter() {
    let dir = TempDir::new().unwrap();
    let text = fs::read_to_string(linked()).unwrap();
    let reversed = dir.path().join("reversed.json");
    fs::write(&reversed, text.lines().rev().collect::<Vec<_>>().join("\n")).unwrap();
    let (one, other) = (dir.path().join("one"), dir.path().join("other"));
    for (flows, folder) in [(&linked(), &one), (&reversed, &other)] {
        let output = generate(flows, folder, &["-A", "-a"]);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    assert_eq!(contents(&one), contents(&other));
    assert!(contents(&one).contains_key("sock-shop.policy-carts.yaml"));
}

#[test]
fn programs_get_json_and_records_can_come_from_a_pipe() {
    let dir = TempDir::new().unwrap();
    let mut child = microshield(&[
        "generate",
        "-f",
        "-",
        "-n",
        "sock-shop",
        "-a",
        "--json",
        "-o",
    ])
    .arg(dir.path())
    .stdin(Stdio::piped())
    .stdout(Stdio::piped())
    .spawn()
    .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&fs::read(linked()).unwrap()).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["records"], 725);
    assert_eq!(report["changes"]["written"].as_array().unwrap().len(), 8);
    let connection = &report["connections"][0];
    assert_eq!(connection["client"], "sock-shop/catalogue-5f495f9cf8-68w5j");
    assert_eq!(connection["seen_by_server"], 1);
}

#[test]
fn a_reader_that_closes_the_pipe_is_no_failure() {
    let dir = TempDir::new().unwrap();
    let mut child = microshield(&["generate", "-A", "-a", "-f"])
        .arg(linked())
        .arg("-o")
        .arg(dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(stderr(&output), "");
    assert!(!contents(dir.path()).is_empty());
}

#[test]
fn wrong_usage_and_input_exit_with_2() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("policies");
    let broken = dir.path().join("broken.json");
    let text = fs::read_to_string(linked()).unwrap();
    let line = text.lines().next().unwrap();
    fs::write(&broken, format!("{line}\n{}\n", &line[..100])).unwrap();
    // A line that was broken off, as the seventh of twelve and as the last; and one that lacks a field.
    let lines: Vec<&str> = text.lines().take(12).collect();
    let seventh = dir.path().join("seventh.json");
    let rest = lines[7..].join("\n");
    fs::write(
        &seventh,
        [&lines[..6].join("\n"), &lines[6][..300], &rest].join("\n"),
    )
    .unwrap();
    let last = dir.path().join("last.json");
    fs::write(
        &last,
        [&lines[..11].join("\n"), &lines[11][..300]].join("\n"),
    )
    .unwrap();
    let lacking = dir.path().join("lacking.json");
    fs::write(&lacking, line.replacen("\"dst_port\"", "\"port\"", 1)).unwrap();
    let missing = dir.path().join("missing.json");
    for (flows, args, message) in [
        (
            &linked(),
            &[
                "-a",
                "-n",
                "a",
                "--ports",
                "ranges",
                "--target",
                "weave-npc",
            ][..],
            "Weave NPC does not know ranges",
        ),
        (
            &linked(),
            &["-a", "--exclude-namespaces", "a"],
            "--exclude-namespaces needs -A",
        ),
        (
            &linked(),
            &["-a", "-n", "a", "--since", "yesterday"],
            "neither a time",
        ),
        (
            &linked(),
            &["-a", "-n", "a", "--cidr-max-prefix4", "33"],
            "33 is not in 0..=32",
        ),
        (
            &PathBuf::from("-"),
            &["-n", "sock-shop"],
            "-f - needs -a: the panel reads its commands from standard input",
        ),
        (&linked(), &["-a"], "-n NAMESPACE, or -A"),
        (&linked(), &["-a", "-n", "Sock_Shop"], "lower case letters"),
        (&linked(), &["-a", "-n", "a", "-A"], "cannot be used with"),
        (
            &linked(),
            &["-a", "-n", "a", "-g", "node"],
            "possible values: ns, svc, workload, pod",
        ),
        (
            &linked(),
            &["-a", "-n", "a", "--frobnicate"],
            "unexpected argument",
        ),
        (
            &broken,
            &["-a", "-n", "sock-shop"],
            "broken.json: line 2, column 100: field `tuple`: EOF while parsing a string",
        ),
        (
            &seventh,
            &["-a", "-n", "sock-shop"],
            "seventh.json: line 7, column 300: field `src.",
        ),
        (
            &last,
            &["-a", "-n", "sock-shop"],
            "last.json: line 12, column 299: field `src.",
        ),
        (
            &lacking,
            &["-a", "-n", "sock-shop"],
            "field `tuple`: missing field `dst_port`",
        ),
        (
            &missing,
            &["-a", "-n", "sock-shop"],
            "missing.json: No such file",
        ),
    ] {
        let output = generate(flows, &folder, args);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            stderr(&output)
        );
        assert!(
            stderr(&output).contains(message),
            "{args:?}: {}",
            stderr(&output)
        );
        assert!(!folder.exists(), "{args:?}");
    }

    let output = generate(&broken, &folder, &["-a", "-n", "sock-shop", "--keep-going"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("1 line that is not a flow record was skipped\n"));
    assert!(stderr(&output).contains("skipped: "), "{}", stderr(&output));
}

#[test]
fn a_line_that_is_no_object_is_said_to_be_none() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("flows.json");
    let text = fs::read_to_string(linked()).unwrap();
    let array = format!("[{}]\n", text.lines().take(2).collect::<Vec<_>>().join(","));
    for (wrong, line) in [(array.as_str(), 1), ("null\n", 1), ("\u{feff}{}\n", 1)] {
        fs::write(&file, wrong).unwrap();
        let output = generate(&file, dir.path(), &["-A", "-a"]);
        assert_eq!(output.status.code(), Some(2));
        let expected = format!("flows.json: line {line}, column 1: no JSON object;");
        assert!(stderr(&output).contains(&expected), "{}", stderr(&output));
    }
}

#[test]
fn a_namespace_without_connections_leaves_the_folder_alone() {
    let dir = TempDir::new().unwrap();
    let output = generate(&linked(), dir.path(), &["-n", "sock-shop", "-a"]);
    assert!(output.status.success());
    let before = contents(dir.path());
    let output = generate(&linked(), dir.path(), &["-n", "sock-shpo", "-a"]);
    assert_eq!(output.status.code(), Some(1));
    let message = "only of default, kube-system, sock-shop, weave";
    assert!(stderr(&output).contains(message), "{}", stderr(&output));
    assert_eq!(contents(dir.path()), before);
}

#[test]
fn a_filter_that_leaves_nothing_leaves_the_folder_alone() {
    let dir = TempDir::new().unwrap();
    let args = ["-n", "sock-shop", "-a"];
    assert!(generate(&linked(), dir.path(), &args).status.success());
    let before = contents(dir.path());
    for (filter, reason) in [
        (
            ["--since", "2030-01-01"],
            "not seen since the time that --since gives",
        ),
        (
            ["--min-count", "1000000"],
            "seen less often than --min-count asks for",
        ),
    ] {
        let output = generate(&linked(), dir.path(), &[&args[..], &filter].concat());
        assert_eq!(output.status.code(), Some(1), "{filter:?}");
        let stderr = stderr(&output);
        assert!(stderr.contains("nothing was written"), "{stderr}");
        assert!(stderr.contains(reason), "{stderr}");
        assert_eq!(stdout(&output), "");
        assert_eq!(contents(dir.path()), before);
    }
}

#[test]
fn strict_does_without_files_that_lines_were_skipped_of() {
    let dir = TempDir::new().unwrap();
    let flows = dir.path().join("flows.json");
    fs::write(&flows, fs::read_to_string(linked()).unwrap() + "{\n").unwrap();
    let folder = dir.path().join("policies");
    let args = ["-n", "sock-shop", "-a", "--keep-going", "--strict"];
    let output = generate(&flows, &folder, &args);
    assert_eq!(output.status.code(), Some(1));
    let stderr = stderr(&output);
    assert!(stderr.contains("--strict: 1 line was skipped"), "{stderr}");
    assert!(!folder.exists());
    assert!(generate(&flows, &folder, &args[..4]).status.success());
    let whole = generate(&linked(), &folder, &args);
    assert!(whole.status.success(), "{whole:?}");
}

#[test]
fn a_file_of_another_hand_is_not_overwritten() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("policy-carts.yaml");
    fs::write(&path, "kind: NetworkPolicy\n").unwrap();
    let output = generate(&linked(), dir.path(), &["-n", "sock-shop", "-a"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("policy-carts.yaml"),
        "{}",
        stderr(&output)
    );
    assert_eq!(fs::read_to_string(path).unwrap(), "kind: NetworkPolicy\n");
}

/// Killed at any moment, a run leaves the old files or the new ones, or a journal with which the next run gets there.
#[test]
fn a_killed_run_loses_nothing() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("policies");
    let run = |granularity: &str| {
        let output = generate(&linked(), &folder, &["-A", "-a", "-g", granularity]);
        assert!(output.status.success(), "{}", stderr(&output));
        contents(&folder)
    };
    let (new, old) = (run("svc"), run("ns"));
    assert_ne!(new, old);
    let whole = Instant::now();
    run("ns");
    let whole = whole.elapsed();
    let mut interrupted = 0;
    for part in 0..16 {
        let mut child = microshield(&["generate", "-A", "-a", "-g", "svc", "-f"])
            .arg(linked())
            .arg("-o")
            .arg(&folder)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(whole * part / 12);
        child.kill().unwrap();
        let status = child.wait().unwrap();
        interrupted += u32::from(!status.success());
        let found = contents(&folder);
        let is_decided = found.contains_key(".microshield.journal");
        let visible: BTreeMap<String, String> = found
            .into_iter()
            .filter(|(name, _)| !name.starts_with('.'))
            .collect();
        for (name, text) in &visible {
            let known = [&old, &new].map(|set| set.get(name) == Some(text));
            assert!(known.contains(&true), "{name}\n{text}");
        }
        assert!(
            is_decided || visible == old || visible == new,
            "{visible:?}"
        );
        assert_eq!(run("svc"), new);
        assert_eq!(run("ns"), old);
    }
    assert!(interrupted > 0, "no run was killed before its end");
}

#[test]
fn options_can_come_from_the_environment() {
    let dir = TempDir::new().unwrap();
    let output = microshield(&["generate"])
        .env("MICROSHIELD_FLOWS", linked())
        .env("MICROSHIELD_OUTPUT", dir.path())
        .env("MICROSHIELD_NAMESPACE", "default,sock-shop")
        .env("MICROSHIELD_GRANULARITY", "ns")
        .env("MICROSHIELD_FORBID_DNS", "yes")
        .env("MICROSHIELD_ALL", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let files = contents(dir.path());
    assert_eq!(
        files.keys().collect::<Vec<_>>(),
        [
            "default.policy-default.yaml",
            "sock-shop.policy-sock-shop.yaml"
        ]
    );
    assert!(files.values().all(|text| !text.contains("kube-dns")));
}
