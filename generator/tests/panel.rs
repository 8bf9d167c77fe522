//! The panel on a pipe: sessions as scripts have them (`tests/fixtures/panel/*.in`) and what is printed (`*.out`).
//!
//! `UPDATE_GOLDEN=1 cargo test -p generator --test panel` writes the latter anew.
#![expect(
    clippy::unwrap_used,
    reason = "in a test, a panic is how a failure is told"
)]

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("../tests/fixtures").join(name)
}

/// Runs `generate` in a folder of its own with the session's commands.
fn run(session: &str, folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_microshield"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MICROSHIELD_") {
            command.env_remove(name);
        }
    }
    command
        .args(["generate", "-f"])
        .arg(fixture("microshield/linked.json").canonicalize().unwrap())
        .args(args)
        .current_dir(folder)
        .stdin(File::open(fixture("panel").join(session).with_extension("in")).unwrap())
        .output()
        .unwrap()
}

/// Runs a session and compares what is printed, then the exit code, then the files' names.
fn check(session: &str, args: &[&str], code: i32, written: &[&str]) {
    let dir = TempDir::new().unwrap();
    let output = run(session, dir.path(), args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    let printed = String::from_utf8(output.stdout).unwrap() + &stderr;
    let golden = fixture("panel").join(session).with_extension("out");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&golden, &printed).unwrap();
    }
    assert_eq!(printed, fs::read_to_string(&golden).unwrap(), "{session}");
    assert_eq!(output.status.code(), Some(code), "{printed}");
    let mut files = Vec::new();
    for folder in ["out", "policies/default"] {
        if let Ok(entries) = fs::read_dir(dir.path().join(folder)) {
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            files.extend(names.map(|name| format!("{folder}/{name}")));
        }
    }
    files.sort();
    assert_eq!(files, written, "{printed}");
}

const SOCK_SHOP: [&str; 6] = ["-n", "sock-shop", "-g", "svc", "-o", "out"];

#[test]
fn a_script_of_the_original_works() {
    check("select-one", &SOCK_SHOP, 0, &["out/policy-carts.yaml"]);
}

#[test]
fn a_script_need_not_say_what_has_a_default() {
    check(
        "select-one",
        &["-n", "sock-shop", "-o", "out"],
        0,
        &["out/policy-carts.yaml"],
    );
}

#[test]
fn selection_filter_undo_and_preview() {
    check(
        "all-commands",
        &SOCK_SHOP,
        0,
        &["out/policy-catalogue.yaml", "out/policy-front-end.yaml"],
    );
}

#[test]
fn what_is_missing_is_asked_for() {
    check(
        "questions",
        &[],
        0,
        &["policies/default/policy-default.yaml"],
    );
}

#[test]
fn quitting_and_ending_write_nothing() {
    check("quit", &SOCK_SHOP, 0, &[]);
    check("ended", &SOCK_SHOP, 1, &[]);
    check("nothing-selected", &SOCK_SHOP, 1, &[]);
}

#[test]
fn a_script_that_is_wrong_in_one_line_writes_nothing() {
    check("wrong-number", &SOCK_SHOP, 2, &[]);
    check("wrong-answer", &[], 2, &[]);
}

#[test]
fn all_selected_is_what_all_gives() {
    let dir = TempDir::new().unwrap();
    for (folder, args) in [("panel", &[][..]), ("all", &["-a"])] {
        let args = [&["-A", "-g", "svc", "-o", folder], args].concat();
        let output = run("everything", dir.path(), &args);
        assert!(output.status.success());
    }
    let names = |folder: &str| {
        let entries = fs::read_dir(dir.path().join(folder)).unwrap();
        let mut files: Vec<(String, String)> = entries
            .map(|entry| entry.unwrap())
            .map(|entry| {
                let name = entry.file_name().into_string().unwrap();
                (name, fs::read_to_string(entry.path()).unwrap())
            })
            .collect();
        files.sort();
        files
    };
    assert_eq!(names("panel"), names("all"));
    assert!(names("all").len() > 10);
}

#[test]
fn with_json_only_the_result_is_on_standard_output() {
    let dir = TempDir::new().unwrap();
    let output = run(
        "select-one",
        dir.path(),
        &[&SOCK_SHOP[..], &["--json"]].concat(),
    );
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let policies = report["policies"].as_array().unwrap();
    assert_eq!(policies.len(), 1);
    let rule = &policies[0]["rules"][0];
    assert_eq!(policies[0]["name"], "policy-carts");
    assert_eq!(
        (rule["count"].as_u64(), rule["seen_by"].as_str()),
        (Some(25), Some("server"))
    );
    assert_eq!(
        (rule["pods"].as_u64(), rule["of_pods"].as_u64()),
        (Some(1), Some(1))
    );
    assert_eq!(report["one_sided"][0]["direction"], "egress");
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("1 of 17 selected")
    );
}
