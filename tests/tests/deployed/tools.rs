//! What kubectl and Helm make of the deployment is what the other tests look at.

use std::{
    env, fs,
    path::PathBuf,
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use lab::deployment::{self, FEATURES, Objects, by_name, differences, documents, kustomize};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::test;

pub(crate) fn of_kubectl() -> Vec<Trial> {
    vec![
        test("kubectl::renders_the_same", || async {
            for folder in folders() {
                let path = deployment::folder().join(&folder);
                let text = said(
                    Command::new(kubectl_program())
                        .arg("kustomize")
                        .arg(&path)
                        .output()?,
                )?;
                let ours = by_name(kustomize::render(&path)?)?;
                same(&by_name(documents(&text)?)?, &ours).with_context(|| folder.clone())?;
            }
            Ok(())
        }),
        // The file that the documentation tells to change.
        test("kubectl::features_are_switched_on_by_a_line", || async {
            let copy = tempfile::tempdir()?;
            let deploy = copy.path().join("deploy");
            let copied = Command::new("cp")
                .arg("-r")
                .arg(deployment::folder())
                .arg(&deploy)
                .output()?;
            said(copied)?;
            let file = deploy.join("kustomization.yaml");
            let text = fs::read_to_string(&file)?;
            fs::write(&file, text.replace("# - components/", "- components/"))?;
            let rendered = Command::new(kubectl_program())
                .arg("kustomize")
                .arg(&deploy)
                .output()?;
            let all = by_name(documents(&said(rendered)?)?)?;
            same(&all, &by_name(kustomize::render(&deploy)?)?)?;
            ensure!(all.contains_key("ServiceMonitor/microshield-agent"));
            ensure!(all.contains_key("ClusterRole/microshield-generator"));
            Ok(())
        }),
    ]
}

pub(crate) fn of_helm() -> Vec<Trial> {
    vec![
        test("helm::lint", || async {
            let output = Command::new(helm()?)
                .arg("lint")
                .arg("--strict")
                .arg(chart())
                .output()?;
            said(output)?;
            Ok(())
        }),
        test("helm::renders_the_same", || async {
            same_by_helm(".", None)?;
            for feature in FEATURES {
                same_by_helm(&format!("overlays/{feature}"), Some(feature))?;
            }
            Ok(())
        }),
        test("helm::wrong_values_are_refused", || async {
            for wrong in [
                "agent.image.tagg=1",
                "mtls.enabled=yes-please",
                "agent.extraArgs={log}",
                "generator.storage.size=",
                "besidescope.enabled=true",
            ] {
                let output = template().args(["--set", wrong]).output()?;
                ensure!(!output.status.success(), "{wrong} was accepted");
            }
            Ok(())
        }),
    ]
}

/// kubectl, with a kustomize that knows components (1.21): the program that `KUBECTL` names, or else what is installed.
///
/// # Errors
/// Why there is none.
pub(crate) fn kubectl() -> Result<()> {
    let output = Command::new(kubectl_program())
        .args(["version", "--client", "--output=json"])
        .output()
        .context("kubectl is not installed, and KUBECTL does not name it")?;
    let version: Value = serde_json::from_str(&said(output)?)?;
    let minor = version["clientVersion"]["minor"].as_str().unwrap_or("0");
    let minor: u32 = minor.trim_end_matches('+').parse()?;
    ensure!(minor >= 21, "kubectl 1.{minor} knows no components");
    Ok(())
}

fn kubectl_program() -> PathBuf {
    env::var_os("KUBECTL").map_or_else(|| "kubectl".into(), PathBuf::from)
}

/// Helm: the program that `HELM` names, or else what is installed.
///
/// # Errors
/// Why there is none.
pub(crate) fn helm() -> Result<PathBuf> {
    let helm = env::var_os("HELM").map_or_else(|| "helm".into(), PathBuf::from);
    let output = Command::new(&helm)
        .args(["version", "--short"])
        .output()
        .context("helm is not installed, and HELM does not name it")?;
    let version = said(output)?;
    ensure!(!version.starts_with("v2"), "helm {version} is too old");
    Ok(helm)
}

fn chart() -> PathBuf {
    deployment::folder().join("helm/microshield")
}

fn template() -> Command {
    let mut command = Command::new(helm().unwrap_or_default());
    command.args(["template", "microshield"]).arg(chart());
    // It has the version of this machine's kubectl otherwise.
    command.args(["--namespace", "microshield", "--kube-version", "1.22.0"]);
    command
}

fn same_by_helm(overlay: &str, feature: Option<&str>) -> Result<()> {
    let mut command = template();
    if let Some(feature) = feature {
        let (first, second) = feature.split_once('-').unwrap_or((feature, ""));
        let mut second = second.chars();
        let capital = second.next().map(|first| first.to_ascii_uppercase());
        let key: String = first.chars().chain(capital).chain(second).collect();
        command.args(["--set", &format!("{key}.enabled=true")]);
    }
    let made = by_name(documents(&said(command.output()?)?)?)?;
    let mut ours = by_name(kustomize::render(&deployment::folder().join(overlay))?)?;
    // Helm makes it by itself.
    ours.remove("Namespace/microshield");
    same(&made, &ours).with_context(|| overlay.to_owned())
}

fn folders() -> Vec<String> {
    let overlays = FEATURES.map(|feature| format!("overlays/{feature}"));
    [".".to_owned(), "base".to_owned()]
        .into_iter()
        .chain(overlays)
        .collect()
}

fn same(one: &Objects, other: &Objects) -> Result<()> {
    let names = |objects: &Objects| objects.keys().cloned().collect::<Vec<_>>();
    ensure!(
        names(one) == names(other),
        "{:?}, not {:?}",
        names(one),
        names(other)
    );
    for (name, object) in one {
        let found = differences(object, other.get(name).unwrap_or(&Value::Null));
        ensure!(found.is_empty(), "{name}: {found:#?}");
    }
    Ok(())
}

/// What a program printed.
fn said(output: Output) -> Result<String> {
    let error = String::from_utf8_lossy(&output.stderr);
    let out = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {out}{error}", output.status);
    Ok(out.into_owned())
}
