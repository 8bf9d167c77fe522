//! Commands that ask the Kubernetes API once.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use lab::{
    apiserver::{ApiServer, Reply, Verb},
    binary,
    scope_app::ScopeApp,
};
use libtest_mimic::Trial;

use crate::test;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("once::link_knows_what_a_file_tells", link),
        test("once::link_knows_what_scope_tells", link_by_scope),
    ]
}

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/microshield");

/// Runs `microshield link` on the recorded log.
async fn run(topology: &str, kubeconfig: &Path) -> Result<Output> {
    let mut command = Command::new(binary("microshield")?);
    command
        .env_clear()
        .args(["link", "--log", &format!("{FIXTURES}/flows.log")])
        .args(["--topology", topology, "--kubeconfig"])
        .arg(kubeconfig);
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

async fn link() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let kubeconfig = folder.path().join("kubeconfig");
    let mut api = ApiServer::start().await?;
    api.write_kubeconfig(&kubeconfig, None)?;
    let file = format!("{FIXTURES}/cluster.yaml");
    api.put_all(&serde_yaml::from_str(&fs::read_to_string(&file)?)?)?;

    let of_file = run(&format!("file={file}"), &kubeconfig).await?;
    ensure!(of_file.status.success(), "{of_file:?}");
    let of_api = run("kube", &kubeconfig).await?;
    ensure!(of_api.stdout == of_file.stdout, "{of_api:?}");
    ensure!(of_api.stdout.split(|byte| *byte == b'\n').count() > 700);

    // A list may be too old before all its pages are read.
    api.reply_once("pods", Verb::List, Reply::new(410, "{\"code\":410}"));
    ensure!(run("kube", &kubeconfig).await?.stdout == of_file.stdout);

    // Without nodes names are missing, and without pods nothing is known.
    api.allow("nodes", Verb::List, false);
    let output = run("kube", &kubeconfig).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success() && said.contains("microshield: no nodes: "),
        "{said}"
    );
    api.allow("pods", Verb::List, false);
    let output = run("kube", &kubeconfig).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(2) && said.contains("the Kubernetes API, pods: "),
        "{said}"
    );

    api.leave().await;
    let output = run("kube", &kubeconfig).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(2) && said.contains("cannot be reached"),
        "{said}"
    );
    let missing = run("kube", Path::new("/nonexistent/kubeconfig")).await?;
    let said = String::from_utf8(missing.stderr).context("no text")?;
    ensure!(
        missing.status.code() == Some(2) && said.contains("/nonexistent/kubeconfig"),
        "{said}"
    );
    Ok(())
}

async fn link_by_scope() -> Result<()> {
    let nowhere = Path::new("/nonexistent/kubeconfig");
    let report = format!("{FIXTURES}/report.json");
    let app = ScopeApp::start().await?;
    app.report_value(&serde_json::from_slice(&fs::read(&report)?)?)?;
    let of_file = run(&format!("scope={report}"), nowhere).await?;
    let of_app = run(&format!("scope={}", app.url()), nowhere).await?;
    ensure!(
        of_app.status.success() && of_app.stdout == of_file.stdout,
        "{of_app:?}"
    );
    ensure!(of_app.stdout.split(|byte| *byte == b'\n').count() == 726);
    Ok(())
}
