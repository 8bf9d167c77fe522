//! The running generator: `microshield serve`.
//!
//! Connections ([`crate::ingest`]) pass requests to the [`Keeper`], which owns ledger and store; the publisher asks the
//! keeper for snapshots and writes the policy folder. All meet in bounded queues. It stops in the order in which data
//! flows: no more connections, then the last batches into the store, then the last state of the folder.

mod keeper;
mod page;
mod publish;
mod round;
mod sessions;
mod status;
mod vet;

use std::{future::Future, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use flow::source::{self, Source, SourceError, Topology};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinError, spawn_blocking},
    time::timeout,
};
use tracing::{info, warn};

use self::publish::Publisher;
pub use self::{
    keeper::{Keeper, Limits, Snapshot},
    publish::{Publication, PublishError},
    round::{MAX_LEDGER_BYTES, MAX_OBSERVATIONS},
};
pub use crate::ledger::Bounds;
use crate::{
    auth::{Gate, Rules, RulesError},
    folder::FolderError,
    ingest::{self, Desk, Exports, Server, Watchers},
    metrics::Meter,
    store::{Store, StoreError},
};

/// Questions for the keeper's status, or for a page of its ledger, that may wait; more wait in their connections.
const QUESTIONS: usize = 4;

/// How long the policy folder may take to come up to date when the generator stops. For a large ledger that is minutes, and
/// Kubernetes kills after thirty seconds; the next start begins with it.
const LAST_PUBLICATION: Duration = Duration::from_secs(5);

/// What to serve.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where agents connect.
    pub listen: SocketAddr,
    /// Where those connect who watch the process, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// What is asked of those who do, and of readers.
    pub rules: Rules,
    /// Where the ledger is kept; without it, in memory.
    pub data_dir: Option<PathBuf>,
    /// Where the cluster's objects come from; without it, agents that leave names to the generator are sent away.
    pub topology: Option<TopologyConfig>,
    /// How much of the ledger is kept.
    pub limits: Limits,
    /// The folder to keep up to date, if any.
    pub publication: Option<Publication>,
}

/// Where the cluster's objects come from.
#[derive(Clone, Debug)]
pub struct TopologyConfig {
    /// The API or a file.
    pub source: Source,
    /// What to read of it.
    pub options: source::Options,
    /// Whether it was asked for: else the generator does without where no way to the API is known.
    pub required: bool,
}

/// Why the generator could not start, or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// It is not settled who is let in.
    #[error(transparent)]
    Rules(#[from] RulesError),
    /// There is no way to the cluster's objects.
    #[error(transparent)]
    Topology(#[from] SourceError),
    /// The store cannot be opened, or has failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The policy folder cannot be written.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// A part of the generator has ended by a defect.
    #[error("internal error: {0}")]
    Task(#[from] JoinError),
}

/// A generator that has all it needs.
#[derive(Debug)]
pub struct Generator {
    topology: Option<Topology>,
    keeper: Keeper,
    publisher: Option<Publisher>,
    server: Server,
    watchers: Option<Watchers>,
    gate: Gate,
    meter: Meter,
}

impl Generator {
    /// Loads the ledger, brings the folder up to date with it, and takes the address.
    ///
    /// # Errors
    /// If one of these cannot be done.
    pub async fn start(config: Config) -> Result<Self, ServeError> {
        let gate = config.rules.gate(config.listen).await?;
        let meter = Meter::default();
        let topology = match config.topology {
            Some(wanted) => topology(wanted).await?,
            None => None,
        };
        let view = topology.as_ref().map(|topology| topology.view().clone());
        let store = open_store(config.data_dir).await?;
        let keeper = Keeper::load(store, view, config.limits, meter.clone()).await?;
        let publisher = match config.publication {
            Some(publication) => Some(first_publication(publication, &keeper).await?),
            None => None,
        };
        let server = Server::bind(config.listen)
            .await
            .map_err(cannot_listen(config.listen))?;
        let watchers = match config.metrics {
            Some(address) => Some(
                Watchers::bind(address)
                    .await
                    .map_err(cannot_listen(address))?,
            ),
            None => None,
        };
        Ok(Self {
            topology,
            keeper,
            publisher,
            server,
            watchers,
            gate,
            meter,
        })
    }

    /// Serves agents until `shutdown` is ready, then stores and publishes what it has, and returns.
    ///
    /// A publication that takes too long goes on in a blocking task of the runtime, which need not be waited for: the folder
    /// is changed as a whole or not at all.
    ///
    /// # Errors
    /// If the store fails for good, or if the last state of the folder cannot be written.
    pub async fn run(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self {
            // It is kept current until everything has stopped.
            topology,
            keeper,
            publisher,
            server,
            watchers,
            gate,
            meter,
        } = self;
        let address = server.address();
        let (queue, requests) = ingest::queue();
        let (wanted, snapshots) = mpsc::channel(1);
        let (status, statuses) = mpsc::channel(QUESTIONS);
        let (page, pages) = mpsc::channel(QUESTIONS);
        let (stop, stopping) = watch::channel(false);
        let publishing =
            publisher.map(|publisher| tokio::spawn(publisher.follow(keeper.revision(), wanted)));
        let mut keeping = tokio::spawn(keeper.run(requests, snapshots, statuses, pages));
        let desk = Arc::new(Desk {
            gate,
            meter,
            status,
            topology: topology.as_ref().map(|topology| topology.view().clone()),
            exports: Exports::of(page),
            queue,
        });
        let watching = watchers.map(|watchers| {
            if let Ok(address) = watchers.address() {
                info!(%address, "metrics");
            }
            tokio::spawn(watchers.run(Arc::clone(&desk), stopping.clone()))
        });
        let serving = tokio::spawn(server.run(desk, stopping));
        info!(%address, "listening");

        let mut kept = None;
        tokio::select! {
            () = shutdown => {}
            // Before its end is asked for, the keeper ends when the store fails for good.
            ended = &mut keeping => kept = Some(ended),
        }
        info!("stopping");
        stop.send_replace(true);
        if let Some(watching) = watching {
            watching.await?;
        }
        serving.await?;
        let kept = match kept {
            Some(kept) => kept,
            None => keeping.await,
        };
        let (revision, state) = kept??;
        if let Some(publishing) = publishing {
            let last = spawn_blocking(move || Snapshot::of(revision, &state));
            let finish =
                async { Ok::<_, ServeError>(publishing.await?.publish(last.await?).await?) };
            match timeout(LAST_PUBLICATION, finish).await {
                Ok(finished) => finished?,
                Err(_elapsed) => warn!("the policy folder is brought up to date by the next start"),
            }
        }
        info!("stopped");
        Ok(())
    }
}

fn cannot_listen(address: SocketAddr) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Listen { address, source }
}

async fn topology(wanted: TopologyConfig) -> Result<Option<Topology>, SourceError> {
    match Topology::start(&wanted.source, wanted.options).await {
        Ok(topology) => Ok(Some(topology)),
        Err(error @ SourceError::Connect(_)) if !wanted.required => {
            info!(%error, "agents with --resolve local will be sent away");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

async fn open_store(data_dir: Option<PathBuf>) -> Result<Store, StoreError> {
    match data_dir {
        Some(directory) => Store::open(&directory).await,
        None => {
            warn!("the ledger is in memory only: a restart forgets it (--data-dir keeps it)");
            Store::in_memory().await
        }
    }
}

/// Shows in the folder what the store has. A folder that cannot be written is found out here, before agents are let in.
async fn first_publication(
    publication: Publication,
    keeper: &Keeper,
) -> Result<Publisher, PublishError> {
    std::fs::create_dir_all(&publication.folder).map_err(|error| FolderError::Io {
        action: "create folder",
        path: publication.folder.clone(),
        error,
    })?;
    let mut publisher = Publisher::new(publication);
    publisher.publish(keeper.snapshot()).await?;
    Ok(publisher)
}
