//! What the programs say of themselves: on standard error, as text for people or as JSON for programs.

use std::io::{self, IsTerminal as _};

use clap::ValueEnum;
use tracing::{Level, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::{FilterExt as _, filter_fn},
    fmt,
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

/// Whose traces are not for logs, whatever is asked for: the WebSocket library's whole request, in which there is a token.
const SECRETS: &str = "tungstenite::handshake::client";

/// What to log, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct LogArgs {
    /// What to log: error, warn, info, debug or trace, also by module
    ///
    /// The HTTP client's own words are left out by default: what comes of its failures is said where they are dealt with.
    #[arg(
        long,
        visible_alias = "log-level",
        env = "MICROSHIELD_LOG",
        value_name = "FILTER",
        default_value = "info,kube_client=off",
        value_parser = filter
    )]
    log: String,

    /// How to log: a line of text, or a JSON object a line
    #[arg(
        long,
        env = "MICROSHIELD_LOG_FORMAT",
        value_enum,
        default_value_t = LogFormat::Text
    )]
    log_format: LogFormat,
}

/// The form of a log's lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line of text.
    Text,
    /// A JSON object: `timestamp`, `level`, `message`, `target`, and the fields beside them.
    Json,
}

impl LogArgs {
    /// From now on all that this process says goes to standard error. With `targets`, a line of text names the module that
    /// it comes from; JSON always does.
    ///
    /// To be called once: who is there already stays.
    pub fn init(&self, targets: bool) {
        let lines = match self.log_format {
            LogFormat::Text => fmt::layer()
                .with_writer(io::stderr)
                .with_ansi(io::stderr().is_terminal())
                .with_target(targets)
                .boxed(),
            LogFormat::Json => fmt::layer()
                .json()
                .flatten_event(true)
                .with_current_span(false)
                .with_span_list(false)
                .with_writer(io::stderr)
                .boxed(),
        };
        let no_secrets = filter_fn(|metadata| {
            !metadata.target().starts_with(SECRETS) || *metadata.level() < Level::TRACE
        });
        // The hint is that it bounds nothing: without one, nobody would be spared what the other filter leaves out.
        let no_secrets = no_secrets.with_max_level_hint(LevelFilter::TRACE);
        let filter = EnvFilter::new(&self.log).and(no_secrets);
        let subscriber = tracing_subscriber::registry().with(lines.with_filter(filter));
        if let Err(error) = subscriber.try_init() {
            tracing::debug!(%error, "somebody logs already");
        }
    }
}

/// What is understood as a whole: `EnvFilter::new` would leave out the rest.
fn filter(text: &str) -> Result<String, String> {
    match EnvFilter::builder().parse(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        log: LogArgs,
    }

    #[test]
    fn a_level_may_be_asked_for_by_either_name() {
        let parse = |args: &[&str]| Cli::try_parse_from(["program"].iter().chain(args));
        assert_eq!(parse(&[]).unwrap().log.log_format, LogFormat::Text);
        for flag in ["--log", "--log-level"] {
            let parsed = parse(&[flag, "warn,agent=debug", "--log-format", "json"]).unwrap();
            assert_eq!(parsed.log.log, "warn,agent=debug");
            assert_eq!(parsed.log.log_format, LogFormat::Json);
            assert!(parse(&[flag, "agent=loud"]).is_err());
        }
        assert!(parse(&["--log-format", "xml"]).is_err());
    }
}
