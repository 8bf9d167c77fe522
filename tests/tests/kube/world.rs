//! An API server and who listens to it.

use std::{
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result, bail, ensure};
use flow::{
    record::Protocol,
    source::{Access, Options, Pace, Scope, Source, Topology, View},
    time::Timestamp,
};
use lab::apiserver::ApiServer;
use tempfile::TempDir;

use crate::{log::Log, objects};

/// Far longer than anything takes on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// As in a cluster, but for what a test would wait for too long.
pub(crate) const PACE: Pace = Pace {
    response: Duration::from_secs(20),
    silence: Duration::from_secs(2),
    bookmarks: Duration::from_secs(2),
    refused: Duration::from_secs(2),
    remind: Duration::from_millis(500),
    poll: Duration::from_millis(200),
    report: Duration::from_secs(20),
};

/// An API server with a small shop: the service `front` with the pods `front-1` on node-1 and `front-2` on node-2.
pub(crate) struct World {
    pub(crate) server: ApiServer,
    pub(crate) log: Log,
    folder: TempDir,
}

impl World {
    pub(crate) async fn empty() -> Result<Self> {
        Ok(Self {
            server: ApiServer::start().await?,
            log: Log::collect(),
            folder: tempfile::tempdir()?,
        })
    }

    pub(crate) async fn shop() -> Result<Self> {
        let world = Self::empty().await?;
        let server = &world.server;
        server.put("namespaces", objects::namespace("shop"));
        server.put(
            "nodes",
            objects::node("node-1", "192.168.0.1", "10.0.1.0/24"),
        );
        server.put(
            "nodes",
            objects::node("node-2", "192.168.0.2", "10.0.2.0/24"),
        );
        server.put("services", objects::service("front", "10.96.0.1", 80, 8080));
        server.put("pods", objects::pod("front-1", "node-1", "10.0.1.1"));
        server.put("pods", objects::pod("front-2", "node-2", "10.0.2.1"));
        Ok(world)
    }

    pub(crate) fn token_file(&self) -> PathBuf {
        self.folder.path().join("token")
    }

    pub(crate) fn options(&self, scope: Scope) -> Result<Options> {
        let kubeconfig = self.folder.path().join("kubeconfig");
        let token_file = self.token_file();
        let token_file = token_file.exists().then_some(token_file.as_path());
        self.server.write_kubeconfig(&kubeconfig, token_file)?;
        Ok(Options {
            access: Access {
                kubeconfig: Some(kubeconfig),
                context: None,
            },
            scope,
            jitter: Duration::ZERO,
            pace: PACE,
        })
    }

    /// Begins to listen to everything.
    pub(crate) async fn listen(&self) -> Result<Topology> {
        self.listen_to(Scope::Everything).await
    }

    pub(crate) async fn listen_to(&self, scope: Scope) -> Result<Topology> {
        Ok(Topology::start(&Source::Kube, self.options(scope)?).await?)
    }

    /// The same, and waits until everything is known and watched.
    pub(crate) async fn follow(&self) -> Result<Topology> {
        let topology = self.listen().await?;
        self.ready(topology.view()).await?;
        self.wait_for("five watches", || self.server.watches() == 5)
            .await?;
        Ok(topology)
    }

    pub(crate) async fn ready(&self, view: &View) -> Result<()> {
        let mut view = view.clone();
        let ready = tokio::time::timeout(PATIENCE, view.ready()).await;
        ready.with_context(|| format!("not ready\n{}", self.log.text()))
    }

    pub(crate) async fn wait_for(&self, what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
        wait_for(&mut is_so).await.with_context(|| {
            let asked: Vec<String> = self
                .server
                .asked()
                .iter()
                .map(|asked| format!("{:?} {} {}", asked.verb, asked.resource, asked.query))
                .collect();
            format!("{what}\n{}\n{}", self.log.text(), asked.join("\n"))
        })
    }

    pub(crate) async fn wait_for_name(
        &self,
        topology: &Topology,
        address: &str,
        wanted: &str,
    ) -> Result<()> {
        self.wait_for(&format!("{address} is {wanted}"), || {
            name_of(topology.view(), address) == wanted
        })
        .await
    }
}

pub(crate) async fn wait_for(is_so: &mut dyn FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !is_so() {
        if start.elapsed() > PATIENCE {
            bail!("waited in vain");
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// Whom a server sees at this address now.
pub(crate) fn name_of(view: &View, address: &str) -> String {
    name_at(view, address, now())
}

pub(crate) fn name_at(view: &View, address: &str, at: Timestamp) -> String {
    let address: Result<IpAddr, _> = address.parse();
    address.map_or_else(
        |error| error.to_string(),
        |address| view.index().resolve_client(address, at).to_string(),
    )
}

/// What a client reaches at this address and port now, and the server's own port.
pub(crate) fn server_at(view: &View, address: &str, port: u16) -> Result<(String, u16)> {
    let address: IpAddr = address.parse()?;
    let server = view.index().resolve(address, Protocol::Tcp, port, now());
    Ok((server.endpoint.to_string(), server.port))
}

pub(crate) fn now() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

/// A list of what was asked says this, in this order, and nothing else.
pub(crate) fn ensure_asked(asked: &[String], wanted: &[&str]) -> Result<()> {
    let fits = asked.len() == wanted.len()
        && asked.iter().zip(wanted).all(|(asked, wanted)| {
            let mut words = wanted.split(' ');
            words.all(|word| asked.split([' ', '&']).any(|part| part == word))
        });
    ensure!(
        fits,
        "asked:\n{}\nwanted:\n{}",
        asked.join("\n"),
        wanted.join("\n")
    );
    Ok(())
}
