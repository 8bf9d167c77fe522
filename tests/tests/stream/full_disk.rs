//! A ledger, and an agent's spool, on a file system that is full.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::StreamClient;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{
    programs::{Feeder, export, generator},
    truth::{self, Counts, record},
};

/// Enough for an empty ledger and its log, and for no more than some thousand edges.
const SMALL: &str = "size=1m";
const LARGE: &str = "size=64m";

/// More than fits into the small one.
const BATCHES: u16 = 60;
const FLOWS: u16 = 100;

/// A small file system, gone when this is dropped.
struct Disk<'a>(&'a Path);

impl Disk<'_> {
    fn resize(&self, options: &str) -> Result<()> {
        let none: Option<&str> = None;
        mount(none, self.0, none, MsFlags::MS_REMOUNT, Some(options)).context("remount")
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.0, MntFlags::MNT_DETACH) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

pub(crate) fn run() -> Result<()> {
    let folder = tempfile::tempdir()?;
    mount(
        Some("tmpfs"),
        folder.path(),
        Some("tmpfs"),
        MsFlags::empty(),
        Some(SMALL),
    )?;
    let disk = Disk(folder.path());
    let data = folder.path().join("data");
    let (program, address) = generator(&["--data-dir", &data.display().to_string()])?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // As many as fit, and then the generator says that no more do.
    let mut sent = 0;
    runtime.block_on(deliver(address, &mut sent, true))?;
    ensure!(sent < BATCHES, "the disk is not full");
    program.wait_for(|line| {
        (line.contains("batches not stored") && line.contains("full")).then_some(())
    })?;
    // What was acknowledged is there, also for a reader.
    let (ledger, _) = export(&data)?;
    same(&ledger, sent).context("while it is full")?;

    disk.resize(LARGE)?;
    runtime.block_on(deliver(address, &mut sent, false))?;
    ensure!(sent == BATCHES);
    program.terminate()?;
    let (ledger, said) = export(&data)?;
    same(&ledger, BATCHES).context("in the end")?;
    ensure!(said.is_empty(), "{said}");
    drop(disk);
    Ok(())
}

/// A node whose disk is full has a generator that could have everything.
pub(crate) fn run_of_an_agent() -> Result<()> {
    const DRAINS: u64 = 20;
    let (folder, data) = (tempfile::tempdir()?, tempfile::tempdir()?);
    mount(
        Some("tmpfs"),
        folder.path(),
        Some("tmpfs"),
        MsFlags::empty(),
        Some(SMALL),
    )?;
    let disk = Disk(folder.path());
    let filled = std::fs::write(folder.path().join("ballast"), vec![1; 1 << 20]);
    let more = std::fs::write(folder.path().join("more"), [1]);
    ensure!(filled.is_ok() && more.is_err(), "the disk is not full");

    let token = data.path().join("token");
    std::fs::write(&token, "secret")?;
    let ledger = data.path().join("ledger");
    let arguments = [
        Path::new("--data-dir"),
        &ledger,
        Path::new("--token-file"),
        &token,
    ];
    let arguments = arguments.map(|argument| argument.display().to_string());
    let (program, address) = generator(&arguments.each_ref().map(String::as_str))?;
    let (url, spool) = (
        format!("ws://{address}/agents"),
        folder.path().join("spool"),
    );
    let mut feeder = Feeder::start(&url, &spool, &token, Path::new(""))?;
    for number in 1..=DRAINS {
        feeder.feed(number)?;
    }
    let (taken, lost, spooled) = feeder.finish()?;
    ensure!((lost, spooled) == (0, 0), "{lost} lost, {spooled} spooled");
    program.terminate()?;
    let (ledger, said) = export(&ledger)?;
    truth::check(&ledger, &taken, DRAINS)?;
    ensure!(said.is_empty(), "{said}");
    drop(disk);
    Ok(())
}

fn port(batch: u16, flow: u16) -> u16 {
    batch * FLOWS + flow + 1
}

/// Names the first edge that is not as it should be.
fn same(ledger: &Counts, batches: u16) -> Result<()> {
    let expected = expected(batches);
    for port in expected.keys().chain(ledger.keys()) {
        let (has, should) = (ledger.get(port), expected.get(port));
        ensure!(
            has == should,
            "{batches} batches, port {port}: {has:?}, not {should:?}"
        );
    }
    Ok(())
}

fn expected(batches: u16) -> Counts {
    (0..batches)
        .flat_map(|batch| (0..FLOWS).map(move |flow| (port(batch, flow), 1)))
        .collect()
}

/// Delivers batches until all are, or until one is not taken.
async fn deliver(address: SocketAddr, sent: &mut u16, may_fail: bool) -> Result<()> {
    loop {
        let (mut client, stored) = StreamClient::join(address, "one", "node-1").await?;
        *sent = u16::try_from(stored)?;
        while *sent < BATCHES {
            let flows = (0..FLOWS).map(|flow| record(port(*sent, flow), 1, 1_000));
            client
                .report(u64::from(*sent) + 1, flows.collect::<Result<_>>()?)
                .await?;
            match client.acknowledged().await {
                Ok(sequence) => *sent = u16::try_from(sequence)?,
                Err(_) if may_fail => return Ok(()),
                Err(_) => break,
            }
        }
        if *sent == BATCHES {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
