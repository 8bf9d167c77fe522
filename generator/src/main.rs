//! The command `microshield`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    generator::cli::run()
}
