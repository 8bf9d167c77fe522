//! Two hundred rounds of faults, with a fixed seed.

use std::{fs, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rcgen::{CertificateParams, KeyPair};

use crate::{
    programs::{Feeder, Program, export, generator},
    proxy::Proxy,
    truth,
};

/// Each has its own generator, feeder, network and seed. They run side by side because mostly they wait.
const LANES: u64 = 5;
const ROUNDS: u64 = 40;

/// How often what is left in the spool may be tried to deliver in the end.
const LAST_ATTEMPTS: usize = 20;

pub(crate) fn run() -> Result<()> {
    let lanes: Vec<_> = (0..LANES)
        .map(|lane| thread::spawn(move || Lane::start(lane)?.run()))
        .collect();
    let mut kills = (0, 0);
    for (number, lane) in lanes.into_iter().enumerate() {
        let (feeders, generators) = lane
            .join()
            .ok()
            .context("a panic")?
            .with_context(|| format!("lane {number}"))?;
        kills = (kills.0 + feeders, kills.1 + generators);
    }
    // With this seed; else nothing was tested.
    ensure!(kills.0 > 30 && kills.1 > 30, "{kills:?}");
    Ok(())
}

struct Lane {
    runtime: tokio::runtime::Runtime,
    random: StdRng,
    folder: tempfile::TempDir,
    proxy: Proxy,
    generator: Program,
    feeder: Feeder,
    fed: u64,
    taken: Vec<u64>,
    feeders_killed: u64,
    generators_killed: u64,
}

impl Lane {
    fn start(seed: u64) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let key = KeyPair::generate()?;
        let certificate =
            CertificateParams::new(vec!["127.0.0.1".to_owned()])?.self_signed(&key)?;
        fs::write(folder.path().join("cert"), certificate.pem())?;
        fs::write(folder.path().join("key"), key.serialize_pem())?;
        fs::write(folder.path().join("token"), "secret")?;
        let (generator, address) = start_generator(&folder)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let proxy = runtime.block_on(Proxy::start(address, seed))?;
        let feeder = start_feeder(&folder, &proxy)?;
        Ok(Self {
            runtime,
            random: StdRng::seed_from_u64(seed),
            folder,
            proxy,
            generator,
            feeder,
            fed: 0,
            taken: Vec::new(),
            feeders_killed: 0,
            generators_killed: 0,
        })
    }

    fn run(mut self) -> Result<(u64, u64)> {
        for round in 0..ROUNDS {
            self = self.round().with_context(|| format!("round {round}"))?;
        }
        self.proxy.behave();
        for attempt in 0.. {
            let (taken, lost, spooled) = self.feeder.finish()?;
            self.taken.extend(taken);
            ensure!(lost == 0, "{lost} connections lost");
            if spooled == 0 {
                break;
            }
            ensure!(
                attempt < LAST_ATTEMPTS,
                "{spooled} batches are not delivered"
            );
            self.feeder = start_feeder(&self.folder, &self.proxy)?;
        }
        self.generator.terminate()?;
        let (ledger, said) = export(&self.folder.path().join("data"))?;
        ensure!(said.is_empty(), "losses: {said}");
        truth::check(&ledger, &self.taken, self.fed)?;
        self.runtime.shutdown_background();
        Ok((self.feeders_killed, self.generators_killed))
    }

    fn round(mut self) -> Result<Self> {
        for _ in 0..self.random.random_range(1..8) {
            self.fed += 1;
            self.feeder.feed(self.fed)?;
        }
        thread::sleep(Duration::from_millis(self.random.random_range(0..120)));
        match self.random.random_range(0..5) {
            0 | 1 => {
                self.taken.extend(self.feeder.kill()?);
                self.feeder = start_feeder(&self.folder, &self.proxy)?;
                self.feeders_killed += 1;
            }
            2 | 3 => {
                self.generator.kill()?;
                let (generator, address) = start_generator(&self.folder)?;
                self.generator = generator;
                self.proxy.redirect(address);
                self.generators_killed += 1;
            }
            _ => self.proxy.cut(),
        }
        Ok(self)
    }
}

fn start_generator(folder: &tempfile::TempDir) -> Result<(Program, std::net::SocketAddr)> {
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (data, cert, key, token) = (path("data"), path("cert"), path("key"), path("token"));
    generator(&[
        "--data-dir",
        &data,
        "--tls-cert",
        &cert,
        "--tls-key",
        &key,
        "--token-file",
        &token,
    ])
}

fn start_feeder(folder: &tempfile::TempDir, proxy: &Proxy) -> Result<Feeder> {
    let url = format!("wss://{}/agents", proxy.address);
    let path = |name: &str| folder.path().join(name);
    Feeder::start(&url, &path("spool"), &path("token"), &path("cert"))
}
