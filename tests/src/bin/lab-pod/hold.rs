//! Connections that stay open.

use std::{io::Write, net::TcpStream, thread, time::Duration};

use anyhow::{Context, Result, anyhow};
use clap::Args;
use lab::pace::patience;

use crate::{call::announce, target::Target};

#[derive(Args)]
pub(crate) struct Options {
    /// What to connect to, over TCP.
    #[arg(required = true)]
    targets: Vec<Target>,
    /// How many connections to each target.
    #[arg(long, default_value_t = 1)]
    count: usize,
    /// Microseconds between two connections.
    #[arg(long, default_value_t = 0)]
    pause: u64,
}

/// Says `ready`, makes the connections, says `held`, and keeps them until this program is ended.
pub(crate) fn run(options: &Options) -> Result<()> {
    announce()?;
    let mut held: Vec<TcpStream> = Vec::new();
    for _ in 0..options.count {
        for target in &options.targets {
            let stream = target
                .connect(patience(Duration::from_secs(20)))
                .map_err(|failure| anyhow!("{target}: {failure:?}"))?;
            held.push(stream);
            if options.pause > 0 {
                thread::sleep(Duration::from_micros(options.pause));
            }
        }
    }
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "held")
        .and_then(|()| stdout.flush())
        .context("standard output")?;
    loop {
        thread::park();
    }
}
