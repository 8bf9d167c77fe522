//! The deployment with the tools that people use on it: `kubectl microshield … --from-cluster`, kubectl's kustomize and Helm
//! where they are installed, and a real kube-apiserver where `KUBEBUILDER_ASSETS` names one.

mod from_cluster;
mod rights;
mod tools;

use std::{future::Future, process::ExitCode};

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let mut trials = from_cluster::tests();
    let mut skipped = Vec::new();
    for (tests, missing) in [
        (tools::of_kubectl(), tools::kubectl().err()),
        (tools::of_helm(), tools::helm().err()),
        (rights::tests(), lab::assets().err()),
    ] {
        if let Some(reason) = &missing {
            skipped.push(format!("{} tests were SKIPPED: {reason:#}", tests.len()));
        }
        trials.extend(
            tests
                .into_iter()
                .map(|test| test.with_ignored_flag(missing.is_some())),
        );
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    for line in skipped {
        eprintln!("{line}");
    }
    conclusion.exit_code()
}

/// A test on a runtime of its own.
fn test<F>(name: &str, run: fn() -> F) -> Trial
where
    F: Future<Output = Result<()>> + 'static,
{
    Trial::test(name, move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .map_err(|error| Failed::from(error.to_string()))?;
        runtime
            .block_on(run())
            .map_err(|error| Failed::from(format!("{error:#}")))
    })
}
