//! An agent without a kernel: the real uplink and spool, fed from standard input.
//!
//! `N` on a line is drain N of [`truth`](crate::truth). `taken N` is said when so many drains of this process are in the
//! spool, `left LOST SPOOLED` when it ends, which it does when its input does.

use std::{
    io::{self, BufRead as _, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use agent::{
    metrics::Meter,
    uplink::{Config, Credentials, Uplink, spool::Spool},
};
use anyhow::{Context as _, Result};
use flow::{
    transport::ClientFiles,
    wire::{Encoding, Resolve},
};
use tokio::sync::mpsc;

use crate::truth;

/// The first argument of a test program that is to be a feeder.
pub(crate) const WORD: &str = "feeder";

/// Far more than the tests bring.
const SPOOL_BYTES: u64 = 64 << 20;

/// How often the number of drains in the spool is looked at.
const LOOK: Duration = Duration::from_millis(1);

pub(crate) fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_max_level(tracing::Level::INFO)
        .init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("feeder: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Arguments: URL, spool, token file, authorities.
fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(2).collect();
    let [url, spool, token, ca] = args.as_slice() else {
        anyhow::bail!("four arguments are expected");
    };
    let config = Config {
        urls: vec![url.parse().map_err(anyhow::Error::msg)?],
        node: "node-1".to_owned(),
        resolve: Resolve::Both,
        capabilities: vec!["tcp".to_owned()],
        view: None,
        encoding: Encoding::MessagePack,
        credentials: Credentials {
            token: token.parse().ok(),
            tls: ClientFiles {
                ca: Some(PathBuf::from(ca)),
                identity: None,
            },
        },
    };
    let spool = Spool::open(spool.as_ref(), SPOOL_BYTES, Resolve::Both)?;
    let (sender, reports) = mpsc::channel(4);
    let meter = Meter::default();
    let reading = std::thread::spawn(move || -> Result<()> {
        for line in io::stdin().lock().lines() {
            let number = line?.parse()?;
            if sender.blocking_send(truth::report(number)?).is_err() {
                break;
            }
        }
        Ok(())
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let left = runtime.block_on(async {
        let said = tokio::spawn(say_taken(meter.clone()));
        let left = Uplink::new(config, Some(spool), reports, meter.clone())
            .run()
            .await;
        said.abort();
        left
    });
    reading
        .join()
        .ok()
        .context("the reader of standard input")??;
    let mut out = io::stdout().lock();
    writeln!(out, "taken {}", meter.drains())?;
    writeln!(out, "left {} {}", left.lost, left.spooled)?;
    Ok(())
}

async fn say_taken(meter: Meter) {
    let mut said = 0;
    loop {
        let taken = meter.drains();
        if taken > said {
            said = taken;
            // Whoever does not listen has gone, and will kill this process.
            drop(writeln!(io::stdout().lock(), "taken {taken}"));
        }
        tokio::time::sleep(LOOK).await;
    }
}
