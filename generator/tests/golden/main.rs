//! Golden cases: each folder of `tests/fixtures/generate` is one run of `microshield generate`.
//!
//! A case has `case.yaml` (what it is about, the input, the arguments), the folder `policies` as it is to be written, and in
//! `summary.txt` what is to be printed. `UPDATE_GOLDEN=1 cargo test -p generator --test golden` writes both anew; read the
//! changes before committing them.
//!
//! What needs programs of others is ignored without them, and the reason is said at the end.
#![expect(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "helpers of tests are not seen as tests by clippy; what is skipped must be said"
)]

#[path = "../../src/policy/tests/api_server.rs"]
mod api_server;
mod dry_run;
mod original;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use flow::record::FlowRecord;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use libtest_mimic::{Arguments, Trial};
use serde::Deserialize;
use tempfile::TempDir;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let test = |name: &str, run: fn()| {
        Trial::test(name, move || {
            run();
            Ok(())
        })
    };
    let mut trials = vec![
        test(
            "every_case_makes_its_folder_and_its_summary",
            every_case_makes_its_folder_and_its_summary,
        ),
        test(
            "every_file_is_what_the_api_server_takes",
            every_file_is_what_the_api_server_takes,
        ),
        test("every_case_is_proven", every_case_is_proven),
        test(
            "the_original_can_read_our_records",
            the_original_can_read_our_records,
        ),
    ];
    let mut skipped = Vec::new();
    for (name, run, variable, folder_of) in [
        (
            "an_api_server_takes_every_file",
            an_api_server_takes_every_file as fn(&Path),
            "KUBEBUILDER_ASSETS",
            "etcd, kube-apiserver and kubectl",
        ),
        (
            "the_originals_generator_makes_the_same_of_our_records",
            original::makes_the_same_of_our_records,
            "MICROSHIELD_ORIGINAL",
            "the original, with policy-generator/generator.py",
        ),
    ] {
        let folder = env::var_os(variable);
        if folder.is_none() {
            skipped.push(format!(
                "{name} was SKIPPED: {variable} does not name the folder of {folder_of}"
            ));
        }
        let is_ignored = folder.is_none();
        let trial = Trial::test(name, move || {
            let folder = folder.ok_or_else(|| format!("{variable} is not set"))?;
            run(Path::new(&folder));
            Ok(())
        });
        trials.push(trial.with_ignored_flag(is_ignored));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    for reason in skipped {
        eprintln!("{reason}");
    }
    conclusion.exit_code()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    /// For whoever reads it.
    #[serde(rename = "about")]
    _about: String,
    /// Flow records, relative to the case.
    flows: Option<PathBuf>,
    /// Or the log of a probe, and whose its addresses are: the records come of `microshield link --external`.
    log: Option<String>,
    topology: Option<String>,
    /// For `generate`, besides input, folder and `-a`.
    args: Vec<String>,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/generate")
}

fn cases() -> Vec<PathBuf> {
    let entries = fs::read_dir(fixtures()).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut cases: Vec<PathBuf> = paths.filter(|path| path.is_dir()).collect();
    cases.sort();
    cases
}

fn contents(folder: &Path) -> BTreeMap<String, String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return BTreeMap::new();
    };
    entries
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read_to_string(entry.path()).unwrap())
        })
        .collect()
}

/// Runs `microshield` in a folder; what it printed.
fn microshield(folder: &Path, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_microshield"));
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("MICROSHIELD_") {
            command.env_remove(name);
        }
    }
    let output = command
        .args(args)
        .current_dir(folder)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// The folder and the summary of a case.
fn run(path: &Path) -> (BTreeMap<String, String>, String) {
    let text = fs::read_to_string(path.join("case.yaml")).unwrap();
    let case: Case =
        serde_yaml::from_str(&text).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let dir = TempDir::new().unwrap();
    let linked = dir.path().join("flows.json");
    let flows = match (&case.flows, &case.log, &case.topology) {
        (Some(flows), None, None) => path.join(flows),
        (None, Some(log), Some(topology)) => {
            let to = linked.to_str().unwrap();
            microshield(
                path,
                &[
                    "link",
                    "--external",
                    "--log",
                    log,
                    "--topology",
                    topology,
                    "-o",
                    to,
                ],
            );
            linked
        }
        _ => panic!("{path:?}: either flows, or log and topology"),
    };
    let mut args = vec![
        "generate",
        "-a",
        "-f",
        flows.to_str().unwrap(),
        "-o",
        "policies",
    ];
    args.extend(case.args.iter().map(String::as_str));
    let summary = microshield(dir.path(), &args);
    let written = contents(&dir.path().join("policies"));
    let again = microshield(dir.path(), &args);
    assert!(again.contains(": 0 files written, "), "{path:?}: {again}");
    (written, summary)
}

fn every_case_makes_its_folder_and_its_summary() {
    let update = env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1");
    let mut wrong = Vec::new();
    for path in cases() {
        let (written, summary) = run(&path);
        let (policies, text) = (path.join("policies"), path.join("summary.txt"));
        if update {
            if policies.exists() {
                fs::remove_dir_all(&policies).unwrap();
            }
            fs::create_dir(&policies).unwrap();
            for (name, text) in &written {
                fs::write(policies.join(name), text).unwrap();
            }
            fs::write(&text, &summary).unwrap();
        }
        let expected = contents(&policies);
        let names = expected.keys().chain(written.keys());
        let differing: std::collections::BTreeSet<&String> = names
            .filter(|name| expected.get(*name) != written.get(*name))
            .collect();
        if !differing.is_empty() || fs::read_to_string(&text).unwrap_or_default() != summary {
            wrong.push(format!("{path:?}: {differing:?}, summary now\n{summary}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{}\nUPDATE_GOLDEN=1 writes them anew",
        wrong.join("\n")
    );
}

/// Every golden file, ours and those that tests compare with: only fields that the API knows, each once, and nothing that
/// the API server complains of.
fn every_file_is_what_the_api_server_takes() {
    let mut files = 0;
    for (name, text) in cases()
        .iter()
        .flat_map(|case| contents(&case.join("policies")))
    {
        let value: serde_json::Value = serde_yaml::from_str(&text).unwrap();
        let policy: NetworkPolicy = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(serde_json::to_value(&policy).unwrap(), value, "{name}");
        assert_eq!(api_server::complaints(&policy), [""; 0], "{name}");
        files += 1;
    }
    assert!(files > 50, "{files}");
}

/// No flow of a golden case is denied, unless the summary says that it was left out.
fn every_case_is_proven() {
    for case in cases() {
        let summary = fs::read_to_string(case.join("summary.txt")).unwrap();
        let is_whole = summary.lines().any(|line| line.ends_with(", denied: 0"));
        assert!(
            is_whole || summary.contains("left out"),
            "{case:?}\n{summary}"
        );
    }
}

/// What MicroShield's own `generator.py` takes from a record, and would fail without: of each end that is a pod or has a
/// service `id`, `name`, `namespace` and what it selects by, an empty object where there is none, and all of `tuple`.
fn the_original_can_read_our_records() {
    let text = fs::read_to_string(fixtures().join("shop.json")).unwrap();
    let mut kinds = std::collections::BTreeSet::new();
    for line in text.lines() {
        let record: FlowRecord = serde_json::from_str(line).unwrap();
        let record = serde_json::to_value(&record).unwrap();
        for field in ["src_addr", "src_port", "dst_addr", "dst_port"] {
            assert!(!record["tuple"][field].is_null(), "{record}");
        }
        for end in [&record["src"], &record["dst"]] {
            let (pod, service) = (end["pod"].as_object(), end["service"].as_object());
            let (pod, service) = (pod.unwrap(), service.unwrap());
            kinds.insert((pod.is_empty(), service.is_empty()));
            for of in [pod, service].into_iter().filter(|of| !of.is_empty()) {
                for field in ["id", "name", "namespace"] {
                    assert!(of[field].is_string(), "{record}");
                }
            }
            assert!(pod.is_empty() || pod["labels"].is_object(), "{record}");
            if let Some(selector) = service.get("selector") {
                let mut pairs = selector.as_str().unwrap().split(',');
                assert!(pairs.all(|pair| pair.split('=').count() == 2), "{record}");
            }
        }
    }
    assert_eq!(kinds.len(), 4, "every kind of end: {kinds:?}");
}

fn an_api_server_takes_every_file(assets: &Path) {
    let server = dry_run::Server::start(assets);
    for case in cases() {
        server.apply(&case.join("policies"));
    }
}
