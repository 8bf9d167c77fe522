//! How the API server is reached.

use std::{path::PathBuf, time::Duration};

use futures_util::AsyncBufRead;
use http::Request;
use kube::{
    Client, Config,
    config::{InferConfigError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tokio::time::timeout;

use super::{
    pace::Pace,
    trouble::{Trouble, Verb},
};

/// How long it may take to get a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// How to reach and convince the API server.
///
/// Without either: what `$KUBECONFIG` or `~/.kube/config` says, else what every pod is given. Token files are read again
/// every minute, so tokens may expire.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// This kubeconfig.
    pub kubeconfig: Option<PathBuf>,
    /// This context of the kubeconfig, not its current one.
    pub context: Option<String>,
}

/// Why it is not known how to reach the API server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig is missing or malformed, or no context of it can be used.
    #[error("kubeconfig{}: {source}", named(path))]
    Kubeconfig {
        /// The file, if one was named.
        path: Option<PathBuf>,
        /// What is wrong.
        source: KubeconfigError,
    },
    /// There is neither a kubeconfig nor what every pod is given.
    #[error("no way to the Kubernetes API is known: {0}")]
    Infer(#[from] InferConfigError),
    /// The configuration cannot be used.
    #[error("cannot use the configuration for the Kubernetes API: {0}")]
    Client(#[from] kube::Error),
}

/// A client with what the files say now.
///
/// # Errors
/// If they do not say how to reach the API server.
pub async fn client(access: &Access) -> Result<Client, ConnectError> {
    let mut config = config(access).await?;
    config.connect_timeout = Some(CONNECT);
    // Whoever asks decides when to ask again, and says so.
    config.default_retry = false;
    Ok(Client::try_from(config)?)
}

/// Asks, and waits until the answer begins.
pub(super) async fn open(
    client: &Client,
    verb: Verb,
    request: Request<Vec<u8>>,
    pace: Pace,
) -> Result<impl AsyncBufRead + Unpin + use<>, Trouble> {
    let response = timeout(pace.response, client.request_stream(request)).await;
    let response = response.or(Err(Trouble::Silent(pace.response)))?;
    let response = response.map_err(|error| Trouble::of_request(verb, error))?;
    Ok(Box::pin(response))
}

async fn config(access: &Access) -> Result<Config, ConnectError> {
    let failed = |source| ConnectError::Kubeconfig {
        path: access.kubeconfig.clone(),
        source,
    };
    let options = KubeConfigOptions {
        context: access.context.clone(),
        ..KubeConfigOptions::default()
    };
    match &access.kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
            let config = Config::from_custom_kubeconfig(kubeconfig, &options);
            config.await.map_err(failed)
        }
        None if access.context.is_some() => Config::from_kubeconfig(&options).await.map_err(failed),
        None => Ok(Config::infer().await?),
    }
}

fn named(path: &Option<PathBuf>) -> String {
    path.as_ref()
        .map_or_else(String::new, |path| format!(" {}", path.display()))
}
