//! A thousand agents at one generator.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use lab::StreamClient;
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{programs::generator, truth::record};

const AGENTS: usize = 1_000;

/// For so long each agent sends as fast as it is acknowledged.
const RACE: Duration = Duration::from_secs(8);

/// How many may connect at a time: a slow machine takes longer over all of them than each may take.
const CONNECTING: usize = 100;

/// What a generator without optimisation may take for a thousand connections and a small ledger.
const MAX_RESIDENT: u64 = 300 << 20;

pub(crate) fn run() -> Result<()> {
    let data = tempfile::tempdir()?;
    let (program, address) = generator(&["--data-dir", &data.path().display().to_string()])?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut acknowledged = runtime.block_on(race(address))?;
    ensure!(acknowledged.len() == AGENTS);
    acknowledged.sort_unstable();
    let (slowest, median) = (acknowledged[0], acknowledged[AGENTS / 2]);
    ensure!(
        slowest * 2 >= median && slowest > 0,
        "slowest {slowest}, median {median}"
    );
    let resident = program.resident()?;
    ensure!(resident < MAX_RESIDENT, "{} MiB resident", resident >> 20);
    program.terminate()?;
    let (ledger, said) = crate::programs::export(data.path())?;
    ensure!(said.is_empty(), "{said}");
    let stored: u64 = ledger.values().sum();
    let sent: u64 = acknowledged.iter().sum::<u64>() * FLOWS;
    ensure!(stored == sent, "{stored} stored of {sent}");
    Ok(())
}

const FLOWS: u64 = 5;

/// Batches that were acknowledged, for each agent.
async fn race(address: SocketAddr) -> Result<Vec<u64>> {
    let connecting = Arc::new(Semaphore::new(CONNECTING));
    let ready = Arc::new(tokio::sync::Barrier::new(AGENTS));
    let mut agents = JoinSet::new();
    for number in 0..AGENTS {
        let (connecting, ready) = (Arc::clone(&connecting), Arc::clone(&ready));
        agents.spawn(async move {
            let place = connecting.acquire().await?;
            let node = format!("node-{number}");
            let (mut client, _) = StreamClient::join(address, &number.to_string(), &node).await?;
            drop(place);
            ready.wait().await;
            let end = Instant::now() + RACE;
            let mut sequence = 0;
            while Instant::now() < end {
                sequence += 1;
                let flows = (1..=FLOWS).map(|port| record(u16::try_from(port)?, 1, 1_000));
                client
                    .report(sequence, flows.collect::<Result<_>>()?)
                    .await?;
                while client.acknowledged().await? < sequence {}
            }
            anyhow::Ok(sequence)
        });
    }
    let mut acknowledged = Vec::new();
    while let Some(agent) = agents.join_next().await {
        acknowledged.push(agent??);
    }
    Ok(acknowledged)
}
