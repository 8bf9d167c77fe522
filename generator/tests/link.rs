//! The command `microshield link` as users run it: arguments, output, exit codes.
#![expect(
    clippy::unwrap_used,
    reason = "in a test, a panic is how a failure is told"
)]

use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use tempfile::TempDir;

fn fixture(name: &str) -> String {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("../tests/fixtures/microshield").join(name);
    path.to_str().unwrap().to_owned()
}

fn microshield(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_microshield"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MICROSHIELD_") {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn link(log: &str, topology: &str, more: &[&str]) -> Output {
    let args = [&["link", "--log", log, "--topology", topology], more].concat();
    microshield(&args).output().unwrap()
}

#[test]
fn records_go_to_standard_output_or_to_a_file_and_generate_reads_them() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("flows.json");
    let report = format!("scope={}", fixture("report.json"));
    let printed = link(&fixture("flows.log"), &report, &[]);
    assert!(printed.status.success());
    assert_eq!(
        text(&printed.stderr).lines().next().unwrap(),
        "microshield: 725 records of 4801 lines"
    );
    let written = link(
        &fixture("flows.log"),
        &report,
        &["-o", file.to_str().unwrap(), "--threads", "1"],
    );
    assert!(written.status.success() && written.stdout.is_empty());
    assert_eq!(fs::read(&file).unwrap(), printed.stdout);

    let cluster = format!("file={}", fixture("cluster.yaml"));
    let mut piped = microshield(&["link", "--log", "-", "--topology", &cluster, "--external"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = piped.stdin.take().unwrap();
    let log = fs::read(fixture("flows.log")).unwrap();
    let feed = std::thread::spawn(move || stdin.write_all(&log).unwrap());
    let mut generate = microshield(&["generate", "-f", "-", "-n", "sock-shop", "-a", "-o"])
        .arg(dir.path().join("policies"))
        .stdin(piped.stdout.take().unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    assert!(generate.wait().unwrap().success());
    assert!(piped.wait().unwrap().success());
    feed.join().unwrap();
    assert_eq!(
        fs::read_dir(dir.path().join("policies")).unwrap().count(),
        8
    );
}

#[test]
fn what_is_no_file_is_written_to_as_it_is() {
    let dir = TempDir::new().unwrap();
    let (log, report) = (
        fixture("flows.log"),
        format!("scope={}", fixture("report.json")),
    );
    let printed = link(&log, &report, &["-o", "-"]).stdout;
    assert_eq!(printed.iter().filter(|byte| **byte == b'\n').count(), 725);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);

    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let path = pipe.clone();
    let reader = std::thread::spawn(move || fs::read(path).unwrap());
    assert!(
        link(&log, &report, &["-o", pipe.to_str().unwrap()])
            .status
            .success()
    );
    assert_eq!(reader.join().unwrap(), printed);

    let (file, link_to_it) = (dir.path().join("flows.json"), dir.path().join("link"));
    fs::write(&file, "old").unwrap();
    std::os::unix::fs::symlink(&file, &link_to_it).unwrap();
    assert!(
        link(&log, &report, &["-o", link_to_it.to_str().unwrap()])
            .status
            .success()
    );
    assert!(fs::symlink_metadata(&link_to_it).unwrap().is_symlink());
    assert_eq!(fs::read(&file).unwrap(), printed);
}

#[test]
fn wrong_usage_and_input_exit_with_2_and_leave_the_file_alone() {
    let dir = TempDir::new().unwrap();
    let broken = dir.path().join("broken.log");
    let log = fs::read_to_string(fixture("flows.log")).unwrap();
    fs::write(&broken, &log[..2_000]).unwrap();
    let broken = broken.to_str().unwrap();
    let file = dir.path().join("flows.json");
    fs::write(&file, "old").unwrap();
    let output = ["-o", file.to_str().unwrap()];
    let report = format!("scope={}", fixture("report.json"));
    let (log, not_a_report) = (
        fixture("flows.log"),
        format!("scope={}", fixture("linked.json")),
    );
    for (log, topology, message) in [
        (
            broken,
            report.as_str(),
            "broken.log: line 15, column 1: the log ends within the line",
        ),
        (
            "/nonexistent/flows.log",
            &report,
            "/nonexistent/flows.log: No such file",
        ),
        (
            &log,
            "scope=/nonexistent/report.json",
            "/nonexistent/report.json: No such file",
        ),
        (&log, &not_a_report, "linked.json:1:"),
        (
            &log,
            "cluster",
            "unknown source `cluster`: expected kube, file=PATH",
        ),
        (&log, "file=", "file= needs a path"),
        (
            &log,
            "scope=http://127.0.0.1:1/api/report",
            "http://127.0.0.1:1/api/report: Scope cannot be reached",
        ),
    ] {
        let result = link(log, topology, &output);
        assert_eq!(result.status.code(), Some(2), "{topology}");
        let stderr = text(&result.stderr);
        assert!(stderr.contains(message), "{stderr}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "old");
    }
    let result = link(broken, &report, &[&output[..], &["--keep-going"]].concat());
    assert!(result.status.success());
    let stderr = text(&result.stderr);
    assert!(
        stderr.contains("skipped: ") && stderr.contains("1 malformed line"),
        "{stderr}"
    );
    assert!(
        fs::read_to_string(&file)
            .unwrap()
            .starts_with("{\"timestamp\":")
    );
}

#[test]
fn a_reader_that_closes_the_pipe_is_no_failure() {
    let log = TempDir::new().unwrap();
    let path = log.path().join("long.log");
    fs::write(
        &path,
        fs::read_to_string(fixture("flows.log")).unwrap().repeat(20),
    )
    .unwrap();
    let report = format!("scope={}", fixture("report.json"));
    let mut child = microshield(&[
        "link",
        "--log",
        path.to_str().unwrap(),
        "--topology",
        &report,
    ])
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(text(&output.stderr), "");
}
