//! The command line of `microshield`.
//!
//! A subcommand is a module with its `Args` and `run`, a variant of [`Command`] and an arm in [`run`].

mod ask;
mod audit;
mod cluster;
mod diff;
mod explain;
mod export;
mod generate;
mod inputs;
mod link;
mod output;
mod policy_args;
mod proof;
mod remote;
mod report;
mod serve;
mod source;
mod status;

use std::{env, ffi::OsString, path::Path, process::ExitCode};

use clap::{
    ArgAction, CommandFactory as _, FromArgMatches as _, Parser, Subcommand,
    builder::BoolishValueParser,
};
use flow::causes::in_full;

pub use self::policy_args::PolicyArgs;

/// Writes NetworkPolicies that allow exactly the connections that were seen.
#[derive(Debug, Parser)]
#[command(name = "microshield", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::Args>),
    Status(status::Args),
    Link(link::Args),
    Export(export::Args),
    Generate(generate::Args),
    Audit(audit::Args),
    Explain(explain::Args),
    Diff(diff::Args),
}

/// Why a command did not do what it was asked to do.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Wrong usage or input: exit code 2.
    #[error("{}", in_full(.0.as_ref()))]
    Input(anyhow::Error),
    /// A negative answer, or any other failure: exit code 1.
    #[error("{}", in_full(.0.as_ref()))]
    Other(anyhow::Error),
    /// A negative answer that was given on standard output: exit code 1.
    #[error("no")]
    Answered,
}

impl Failure {
    /// Wrong usage or input.
    pub fn input(error: impl Into<anyhow::Error>) -> Self {
        Self::Input(error.into())
    }

    /// A negative answer, or any other failure.
    pub fn other(error: impl Into<anyhow::Error>) -> Self {
        Self::Other(error.into())
    }
}

/// The definition of the command line, for those who check one without running it.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command().mut_subcommands(|command| {
        command.mut_args(|arg| match arg.get_action() {
            // A variable may be 1 or yes as well.
            ArgAction::SetTrue => arg.value_parser(BoolishValueParser::new()),
            _ => arg,
        })
    })
}

/// What kubectl looks for when it is told `kubectl microshield`.
const PLUGIN: &str = "kubectl-microshield";

/// The definition under the name by which the program was called.
fn called(program: Option<OsString>) -> clap::Command {
    let name = program.as_deref().map(Path::new).and_then(Path::file_stem);
    match name {
        Some(name) if name == PLUGIN => command().bin_name("kubectl microshield"),
        _ => command(),
    }
}

/// Parses the command line, runs the command, and reports its failure on standard error.
#[must_use]
pub fn run() -> ExitCode {
    let matches = called(env::args_os().next()).get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let result = match cli.command {
        Command::Serve(args) => serve::run(*args),
        Command::Status(args) => status::run(&args),
        Command::Link(args) => link::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Generate(args) => generate::run(args),
        Command::Audit(args) => audit::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Diff(args) => diff::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !matches!(failure, Failure::Answered) {
                eprintln!("microshield: {failure}");
            }
            ExitCode::from(match failure {
                Failure::Input(_) => 2,
                Failure::Other(_) | Failure::Answered => 1,
            })
        }
    }
}
