//! The generator stores a ledger of some size with the rights of its manifest, and nowhere else than on its volume.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, ensure};
use flow::{record::FlowRecord, wire::MAX_BATCH_FLOWS};
use lab::{Cluster, Container, Lab, Rights, StreamClient, binary};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::Test;

pub(crate) fn tests() -> Vec<Test> {
    vec![Test::new(
        "stored::scattered_observations_need_no_temporary_files",
        scattered,
    )]
}

/// Observations: their counts alone are many more pages of the database than a statement may change before SQLite wants
/// to keep the old ones in a temporary file.
const OBSERVATIONS: u16 = 6_000;

/// Between one changed row and the next: about a page of the database.
const STRIDE: u16 = 127;

/// How often each is seen again.
const TIMES: u64 = 2;

/// Far longer than a batch takes on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn scattered() -> Result<()> {
    let mut cluster = Cluster::apart();
    cluster.node("node-1");
    let lab = Lab::start(cluster)?;
    let rights = Rights::of_generator()?;
    ensure!(rights.read_only_root && rights.own_folders.len() == 1);
    let program = binary("microshield")?;
    let generator = Container::of_program(&program, rights)
        .volumes(&lab.folder().join("volumes"))
        .in_the_machine_s_network();
    let mut serving = generator.start(
        &lab,
        [
            "serve",
            "--listen=127.0.0.1:0",
            "--data-dir=/var/lib/microshield/ledger",
            "--insecure",
        ],
    )?;
    let line = serving.wait_stderr(|line| line.contains("listening"))?;
    let address = line.split_once("address=").context("no address")?.1;
    let address = address.trim().parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let delivered = runtime.block_on(deliver(address));
    delivered.with_context(|| serving.stderr().join("\n"))?;
    let status = serving.stop(Signal::SIGTERM)?;
    let log = serving.stderr().join("\n");
    ensure!(status.success() && !log.contains("not stored"), "{log}");

    let mut export = generator.start(&lab, ["export", "--data-dir=/var/lib/microshield/ledger"])?;
    let status = export.wait(PATIENCE)?;
    ensure!(status.success(), "{}", export.stderr().join("\n"));
    let lines = export.stdout();
    ensure!(lines.len() == usize::from(OBSERVATIONS), "{}", lines.len());
    for line in lines {
        let record: FlowRecord = serde_json::from_str(&line)?;
        ensure!(record.count == 1 + TIMES, "{line}");
    }
    Ok(())
}

/// Each observation once in the order of its row, and then again and again all over the database.
async fn deliver(address: SocketAddr) -> Result<()> {
    let (mut client, stored) = StreamClient::join(address, "one", "node-1").await?;
    ensure!(stored == 0, "{stored}");
    let in_order = 1..=OBSERVATIONS;
    let scattered = (0..STRIDE).flat_map(|first| (1 + first..=OBSERVATIONS).step_by(STRIDE.into()));
    let again = (0..TIMES).flat_map(|_| scattered.clone());
    let ports: Vec<u16> = in_order.chain(again).collect();
    for (ports, sequence) in ports.chunks(MAX_BATCH_FLOWS).zip(1..) {
        let flows = ports.iter().map(record).collect::<Result<_, _>>()?;
        client.report(sequence, flows).await?;
        ensure!(client.acknowledged().await? == sequence);
    }
    Ok(())
}

fn record(port: &u16) -> serde_json::Result<FlowRecord> {
    serde_json::from_value(json!({
        "timestamp": 1000.5, "hostname": "node-1",
        "tuple": {"src_addr": "10.0.1.2", "src_port": 0, "dst_addr": "10.0.2.3", "dst_port": port},
        "src": {"pod": {"id": "1;<pod>", "namespace": "shop", "name": "web", "labels": {"app": "web"}}, "service": {}},
        "dst": {"pod": {"id": "2;<pod>", "namespace": "shop", "name": "db", "labels": {"app": "db"}}, "service": {}},
    }))
}
