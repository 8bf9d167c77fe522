//! `microshield-agent`: see `--help`.
#![forbid(unsafe_code)]

use std::{
    io::{self, IsTerminal as _},
    process::ExitCode,
};

use agent::{args::Args, runtime};
use clap::Parser as _;
use tracing_subscriber::EnvFilter;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&args.log))
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    match runtime::run(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            tracing::error!("{:#}", failure.error);
            ExitCode::from(failure.code)
        }
    }
}
