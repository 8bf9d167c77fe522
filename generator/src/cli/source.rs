//! Where the cluster's objects come from.

use std::{
    io::{self, IsTerminal as _},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use anyhow::Context as _;
use clap::Args;
use flow::{
    source::{self, Access, Options, Pace, Scope, Source},
    time::Timestamp,
    topology::Objects,
};

use super::Failure;

/// From when on it is said that objects are read.
const SAID_AFTER: Duration = Duration::from_secs(2);

/// How the Kubernetes API is reached.
#[derive(Clone, Debug, Args)]
pub(super) struct Kube {
    /// How to reach the Kubernetes API [default: $KUBECONFIG, ~/.kube/config, else the pod's own account]
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,

    /// The context of the kubeconfig to use, instead of its current one
    #[arg(long, value_name = "NAME", env = "MICROSHIELD_CONTEXT")]
    context: Option<String>,
}

impl Kube {
    pub(super) fn access(&self) -> Access {
        Access {
            kubeconfig: self.kubeconfig.clone(),
            context: self.context.clone(),
        }
    }
}

/// The cluster's objects, as they are when a command runs.
#[derive(Debug, Args)]
pub(super) struct TopologyArgs {
    /// Where the cluster's objects come from, which tell whose addresses are, the labels of namespaces, and named ports: kube,
    /// the Kubernetes API; file=PATH, a list as `kubectl get namespaces,nodes,services,endpointslices,pods -A -o yaml` prints
    /// it; scope=URL, the report of Weave Scope's app (http://APP:4040/api/report), or scope=PATH, a file with one
    #[arg(long, value_name = "SRC", env = "MICROSHIELD_TOPOLOGY")]
    topology: Option<Source>,

    /// Certificate authorities that the certificate of Scope's app must come from [default: the system's]
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_SCOPE_CA")]
    scope_ca: Option<PathBuf>,
}

impl TopologyArgs {
    /// Whether the objects are known.
    pub(super) fn is_given(&self) -> bool {
        self.topology.is_some()
    }

    /// Reads the objects, and says when; `None` if it is not said where they are. What is wrong with single ones goes to
    /// standard error.
    ///
    /// # Errors
    /// If there is nothing that could be read.
    pub(super) fn load(&self, kube: &Kube) -> Result<Option<(Objects, Timestamp)>, Failure> {
        let Some(source) = self.topology.clone() else {
            return Ok(None);
        };
        let source = source.scope_ca(self.scope_ca.as_deref());
        let options = Options {
            access: kube.access(),
            scope: Scope::Everything,
            jitter: Duration::ZERO,
            pace: Pace::default(),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime")
            .map_err(Failure::other)?;
        let loading = async {
            let mut loading = std::pin::pin!(source::load(&source, &options));
            if let Ok(loaded) = tokio::time::timeout(SAID_AFTER, &mut loading).await {
                return loaded;
            }
            if io::stderr().is_terminal() {
                eprintln!("microshield: reading the cluster's objects from {source} …");
            }
            loading.await
        };
        let (objects, warnings) = runtime.block_on(loading).map_err(Failure::input)?;
        for warning in &warnings {
            eprintln!("microshield: {warning}");
        }
        Ok(Some((objects, Timestamp::from(SystemTime::now()))))
    }
}
