//! `microshield-agent`: see `--help`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use agent::{
    args::{Args, Word},
    check, runtime,
};
use clap::Parser as _;
use flow::causes::in_full;

fn main() -> ExitCode {
    let mut args = Args::parse();
    if let Some(Word::Check(args)) = args.word.take() {
        return match check::run(&args) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("microshield-agent: {error}");
                ExitCode::FAILURE
            }
        };
    }
    args.log.init(true);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start the runtime");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(runtime::run(args));
    // A name that is being looked up keeps its thread for as long as no server answers: nobody waits for it any more.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            tracing::error!("{}", in_full(failure.error.as_ref()));
            ExitCode::from(failure.code)
        }
    }
}
