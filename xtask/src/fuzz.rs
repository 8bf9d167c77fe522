//! Fuzzing: every target in `flow/fuzz`, each for a bounded time.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    proc::{self, cargo, line, target_dir, workspace},
    setup::{self, Scope},
};

/// How long each target runs among the checks.
pub(crate) const SECONDS: u64 = 60;

/// Targets that run at the same time.
const AT_ONCE: usize = 2;

/// The largest input that is made up, in bytes. What is longer takes longer, and finds no other mistakes.
const MAX_INPUT: u32 = 16 << 10;

/// The most memory that a target may take, in MiB.
const MAX_MEMORY: u32 = 2_048;

/// The longest that one input may take, in seconds.
const MAX_SECONDS: u32 = 10;

/// Builds the targets and runs each of them for so many seconds; `only` chooses some by name.
///
/// # Errors
/// If one cannot be built, or finds something: the message names the input.
pub(crate) fn run(seconds: u64, only: &[String]) -> Result<()> {
    let targets = targets(only)?;
    setup::run(Scope::Fuzz)?;
    let built = build()?;
    let waiting = Mutex::new(targets.iter());
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(targets.len()) {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().map(|mut waiting| waiting.next());
                    let Ok(Some(target)) = next else {
                        return;
                    };
                    if let Err(error) = fuzz(&built, target, seconds)
                        && let Ok(mut failed) = failed.lock()
                    {
                        failed.push(format!("{target}: {error:#}"));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_default();
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

fn folder() -> PathBuf {
    workspace().join("flow/fuzz")
}

fn targets(only: &[String]) -> Result<Vec<String>> {
    let folder = folder().join("fuzz_targets");
    let mut targets = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
            targets.push(name.to_owned());
        }
    }
    targets.sort();
    if let Some(unknown) = only.iter().find(|name| !targets.contains(name)) {
        bail!(
            "there is no target {unknown}; there are {}",
            targets.join(", ")
        );
    }
    if !only.is_empty() {
        targets.retain(|target| only.contains(target));
    }
    Ok(targets)
}

/// Builds all targets at once; returns the folder of the programs.
fn build() -> Result<PathBuf> {
    let output = target_dir().join("fuzz");
    // The stable toolchain has the sanitizer too, for who asks for it in this way.
    proc::run(
        cargo()
            .env("RUSTC_BOOTSTRAP", "1")
            .current_dir(folder())
            .args(["fuzz", "build", "--fuzz-dir", "."])
            .arg("--target-dir")
            .arg(&output),
    )?;
    let built = fs::read_dir(&output).with_context(|| output.display().to_string())?;
    let mut programs = built
        .flatten()
        .map(|entry| entry.path().join("release"))
        .filter(|path| path.is_dir() && !path.starts_with(output.join("release")));
    programs.next().context("cargo fuzz has built nothing")
}

fn fuzz(programs: &Path, target: &str, seconds: u64) -> Result<()> {
    let work = target_dir().join("fuzz-work").join(target);
    let (corpus, found) = (work.join("corpus"), work.join("found"));
    for folder in [&corpus, &found] {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let log_path = work.join("log");
    let log = File::create(&log_path).with_context(|| log_path.display().to_string())?;
    let mut command = Command::new(programs.join(target));
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={MAX_INPUT}"))
        .arg(format!("-rss_limit_mb={MAX_MEMORY}"))
        .arg(format!("-timeout={MAX_SECONDS}"))
        .arg(format!("-artifact_prefix={}/", found.display()))
        .arg(&corpus);
    let seeds = folder().join("seeds").join(target);
    if seeds.is_dir() {
        command.arg(seeds);
    }
    eprintln!("{target}: for {seconds} s");
    let start = Instant::now();
    let status = command
        .stderr(log)
        .status()
        .with_context(|| line(&command))?;
    let text = fs::read_to_string(&log_path).unwrap_or_default();
    ensure!(
        status.success(),
        "{status}; the input is in {}\n{}",
        found.display(),
        tail(&text, 30)
    );
    // One that ends sooner has not done what it should.
    ensure!(
        start.elapsed() >= Duration::from_secs(seconds),
        "it ended after {:.1} s\n{}",
        start.elapsed().as_secs_f32(),
        tail(&text, 30)
    );
    eprintln!("{target}: {}", tail(&text, 1));
    Ok(())
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
