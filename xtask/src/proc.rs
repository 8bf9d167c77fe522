//! Running other programs.

use std::{
    env, fs,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// The system lacks something that only its user can provide; the exit code is 2.
#[derive(Debug)]
pub(crate) struct Unmet(pub(crate) String);

impl std::fmt::Display for Unmet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unmet {}

/// The workspace's root folder.
pub(crate) fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// Folders of this machine and what stands for them in what is built, as `FROM=TO`: the same sources are to give the same
/// bytes wherever they lie. Of several that fit a path the last counts, for rustc and for C compilers. All that stands for
/// them begins with `root`.
///
/// # Errors
/// If rustc does not say where it is, or a folder cannot be read.
pub(crate) fn remapped_prefixes(root: &str) -> Result<Vec<String>> {
    let sysroot = output(Command::new("rustc").args(["--print", "sysroot"]))?;
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    let mut prefixes = vec![
        (workspace().to_owned(), "/microshield"),
        (cargo_home.clone(), "/cargo"),
        (sysroot.trim().into(), "/rust"),
    ];
    // What build scripts write lies there.
    if !target_dir().starts_with(workspace()) {
        prefixes.push((target_dir(), "/microshield/target"));
    }
    // The same crates, whatever mirror they came from: Cargo.lock has their checksums.
    let registries = registries(&cargo_home.join("registry/src"))?;
    prefixes.extend(
        registries
            .into_iter()
            .map(|folder| (folder, "/cargo/crates")),
    );
    let remap = |(from, to): (PathBuf, &str)| format!("{}={root}{to}", from.display());
    Ok(prefixes.into_iter().map(remap).collect())
}

/// The folders in which cargo keeps the sources of crates, one for each registry that they came from.
fn registries(sources: &Path) -> Result<Vec<PathBuf>> {
    let context = || sources.display().to_string();
    let mut registries = Vec::new();
    // With vendored sources there is none.
    if !sources.is_dir() {
        return Ok(registries);
    }
    for entry in fs::read_dir(sources).with_context(context)? {
        registries.push(entry.with_context(context)?.path());
    }
    // They are listed in no order.
    registries.sort();
    Ok(registries)
}

/// A command for the cargo that runs this program, in the workspace's root.
///
/// What cargo has set about this package is not passed on: to build scripts that look at it (ring's) it would be a change,
/// and everything that depends on them would be built anew, back and forth, here and by a cargo that somebody calls.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    for (variable, _) in env::vars_os() {
        let name = variable.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(variable);
        }
    }
    command
}

/// Runs a command with its output shown as it comes.
///
/// # Errors
/// If it cannot be started or does not succeed; the message is the command line.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| line(command))?;
    ensure!(status.success(), "{}: {status}", line(command));
    Ok(())
}

/// Builds a program, and those that it starts, with optimisation, and becomes it: an interrupt then reaches the program that
/// has to clean up, and nothing waits above it.
///
/// Always of the same packages, so that cargo chooses the same features each time and compiles nothing twice.
///
/// # Errors
/// If it cannot be built or started.
pub(crate) fn become_program(name: &str, beside: &[&str], args: &[String]) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--release"]);
    build.args(["-p", "agent", "-p", "generator", "-p", "tests"]);
    for program in std::iter::once(&name).chain(beside) {
        build.args(["--bin", program]);
    }
    run(&mut build)?;
    let mut program = Command::new(target_dir().join("release").join(name));
    program.args(args);
    let error = program.exec();
    Err(error).with_context(|| line(&program))
}

/// Runs a command and returns what it printed.
///
/// # Errors
/// As [`run`].
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| line(command))?;
    ensure!(
        output.status.success(),
        "{}: {}",
        line(command),
        output.status
    );
    String::from_utf8(output.stdout).with_context(|| line(command))
}

/// The command as a person would type it.
pub(crate) fn line(command: &Command) -> String {
    let variables = command
        .get_envs()
        .filter_map(|(key, value)| Some((key, value?)))
        .map(|(key, value)| format!("{}={} ", key.display(), value.display()));
    let words = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>();
    variables.collect::<String>() + &words.join(" ")
}

/// Finds a program in `PATH` and where Debian keeps the system administrator's programs.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(program))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_for_folders_begins_with_the_root() {
        let prefixes = remapped_prefixes("/dev/null").unwrap();
        assert!(prefixes.len() >= 3);
        for prefix in prefixes {
            let (from, to) = prefix.rsplit_once('=').unwrap();
            assert!(Path::new(from).is_absolute(), "{prefix}");
            assert!(
                to.starts_with("/dev/null/") && !Path::new(to).exists(),
                "{prefix}"
            );
        }
    }
}
