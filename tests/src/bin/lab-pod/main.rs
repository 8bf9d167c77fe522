//! The program in the lab's pods: serves, calls, or becomes another program.
#![forbid(unsafe_code)]

mod call;
mod churn;
mod hold;
mod play;
mod serve;
mod target;

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, CpuSet, sched_setaffinity, setns, unshare},
    sys::{
        prctl,
        signal::{SigSet, Signal},
    },
    unistd::{self, Pid},
};

/// Where programs look for tracefs.
const TRACEFS: &str = "/sys/kernel/tracing";

/// Joins a namespace and cgroups, and then does what the word says; prints `ready` when it is.
#[derive(Parser)]
struct Cli {
    /// The network namespace to join.
    #[arg(long)]
    netns: Option<PathBuf>,
    /// A cgroup to join; one of each hierarchy.
    #[arg(long)]
    cgroup: Vec<PathBuf>,
    /// The only processor to run on.
    #[arg(long)]
    processor: Option<usize>,
    /// Die with this process, which must be the one that started this one.
    #[arg(long)]
    parent: Option<i32>,
    #[command(subcommand)]
    word: Word,
}

#[derive(Subcommand)]
enum Word {
    /// Answer every byte with a byte.
    Serve(serve::Options),
    /// Make connections, exchange a byte on each, close them, and print what became of them as a line of JSON.
    Call(call::Options),
    /// Make connections and keep them.
    Hold(hold::Options),
    /// Do what the steps say with sockets of one's own, one step after the other, and end.
    Play(play::Options),
    /// Be pods that come and go, one after the other.
    Churn(churn::Options),
    /// Become another program.
    Exec {
        /// A folder that the program finds empty.
        #[arg(long)]
        hide: Option<PathBuf>,
        /// The program.
        program: PathBuf,
        /// Its arguments.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    lab::exit_code("lab-pod", join(&cli).and_then(|()| run(cli.word)))
}

/// Goes where it belongs, while there is a single thread.
fn join(cli: &Cli) -> Result<()> {
    // The lab blocks the signals that it waits for, and a program inherits what is blocked.
    SigSet::all().thread_unblock()?;
    if let Some(parent) = cli.parent {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // A parent that died before the line above sends nothing.
        ensure!(unistd::getppid().as_raw() == parent, "the parent is gone");
    }
    for cgroup in &cli.cgroup {
        let file = cgroup.join("cgroup.procs");
        fs::write(&file, "0").with_context(|| file.display().to_string())?;
    }
    if let Some(processor) = cli.processor {
        let mut only = CpuSet::new();
        only.set(processor)?;
        sched_setaffinity(Pid::from_raw(0), &only)?;
    }
    if let Some(netns) = &cli.netns {
        let file = File::open(netns).with_context(|| netns.display().to_string())?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| netns.display().to_string())?;
    }
    Ok(())
}

fn run(word: Word) -> Result<()> {
    match word {
        Word::Serve(options) => serve::run(options),
        Word::Call(options) => call::run(options),
        Word::Hold(options) => hold::run(&options),
        Word::Play(options) => play::run(&options),
        Word::Churn(options) => churn::run(&options),
        Word::Exec {
            hide,
            program,
            args,
        } => exec(hide.as_deref(), &program, &args),
    }
}

fn exec(hide: Option<&Path>, program: &Path, args: &[String]) -> Result<()> {
    let lacks_tracefs = !Path::new(TRACEFS).join("events").exists();
    if lacks_tracefs || hide.is_some() {
        leave_mount_namespace().context("a mount namespace")?;
    }
    if lacks_tracefs {
        // A DaemonSet gets it from its node.
        mount_over(Path::new(TRACEFS), "tracefs").context("tracefs")?;
    }
    if let Some(folder) = hide {
        mount_over(folder, "tmpfs").with_context(|| folder.display().to_string())?;
    }
    let error = Command::new(program).args(args).exec();
    Err(error).with_context(|| program.display().to_string())
}

/// Goes to a mount namespace of this program's own, where no mount is seen by others.
fn leave_mount_namespace() -> Result<()> {
    let nothing: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    Ok(mount(nothing, "/", nothing, private, nothing)?)
}

fn mount_over(folder: &Path, kind: &str) -> Result<()> {
    let nothing: Option<&str> = None;
    Ok(mount(
        Some(kind),
        folder,
        Some(kind),
        MsFlags::empty(),
        nothing,
    )?)
}
