//! The topology from Weave Scope's app, and from the Kubernetes API: against an API server that misbehaves, against recorded answers of a real one,
//! and, where `KUBEBUILDER_ASSETS` names a folder with `kube-apiserver` and `etcd`, against those.

mod broken;
mod local;
mod log;
mod objects;
mod once;
mod real;
mod recorded;
mod refused;
mod scope;
mod suite;
mod weave;
mod world;

use std::{future::Future, process::ExitCode};

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let missing = lab::assets().err();
    let mut trials: Vec<Trial> = [
        recorded::tests(),
        broken::tests(),
        refused::tests(),
        scope::tests(),
        local::tests(),
        suite::tests(),
        weave::tests(),
        once::tests(),
    ]
    .into_iter()
    .flatten()
    .collect();
    let real = real::tests();
    let skipped = real.len();
    trials.extend(
        real.into_iter()
            .map(|test| test.with_ignored_flag(missing.is_some())),
    );
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Some(reason) = missing {
        eprintln!("{skipped} tests against a real kube-apiserver were SKIPPED: {reason}");
    }
    conclusion.exit_code()
}

/// A test on a runtime of its own, of one thread as the agent's.
fn test<F>(name: &str, run: fn() -> F) -> Trial
where
    F: Future<Output = Result<()>> + 'static,
{
    Trial::test(name, move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Failed::from(error.to_string()))?;
        runtime
            .block_on(run())
            .map_err(|error| Failed::from(format!("{error:#}")))
    })
}
