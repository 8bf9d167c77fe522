//! The way to the generator in a cluster: a port of its pod, forwarded by the API server.
//!
//! What the generator asks for stands in its pod's own command line, so there is nothing to configure twice: the port, whether
//! it speaks TLS, and the service account of its readers, of which a short-lived token is asked for that is good for the
//! generator only.

use std::fmt;

use anyhow::{Context as _, Result, anyhow, bail};
use flow::{source, transport::Secret};
use futures_util::FutureExt as _;
use k8s_openapi::api::{
    authentication::v1::{TokenRequest, TokenRequestSpec},
    core::v1::{Container, Pod, ServiceAccount},
};
use kube::{
    Api, Client,
    api::{ListParams, PostParams},
};

use super::{policy_args::namespace, remote::Way, source::Kube};

/// The generator's pods.
const LABELS: &str = "app.kubernetes.io/name=microshield,app.kubernetes.io/component=generator";

/// The name of its Service, which its certificate is made for.
const SERVICE: &str = "microshield-generator";

/// The port that agents and readers connect to, by its name.
const PORT: &str = "agents";

/// How long a token is good for; the API server gives none that is good for less.
const TOKEN_SECONDS: i64 = 600;

/// The generator in a cluster.
#[derive(Debug, clap::Args)]
pub(super) struct Cluster {
    /// Read from the generator in the cluster of your kubeconfig: by a port of its pod that is forwarded and, without
    /// --token-file, by a token of the service account of its readers
    #[arg(long, env = "MICROSHIELD_FROM_CLUSTER")]
    from_cluster: bool,

    /// The namespace of that generator
    #[arg(
        long,
        value_name = "NAMESPACE",
        env = "MICROSHIELD_GENERATOR_NAMESPACE",
        default_value = "microshield",
        value_parser = namespace
    )]
    generator_namespace: String,

    #[command(flatten)]
    kube: Kube,
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generator in namespace {}", self.generator_namespace)
    }
}

impl Cluster {
    pub(super) fn kube(&self) -> &Kube {
        &self.kube
    }

    pub(super) fn is_meant(&self) -> bool {
        self.from_cluster
    }

    /// Forwards the generator's port; with a token for it if one is wanted, and the generator says of which account.
    ///
    /// # Errors
    /// If there is no generator that is ready, or the API server does not permit one of these.
    pub(super) async fn connect(&self, with_token: bool) -> Result<Way> {
        let client = source::client(&self.kube.access()).await?;
        let pods: Api<Pod> = Api::namespaced(client.clone(), &self.generator_namespace);
        let listed = pods.list(&ListParams::default().labels(LABELS)).await?;
        let pod = choose(listed.items)?;
        let name = pod.metadata.name.clone().unwrap_or_default();
        let container = container(&pod).context("the generator's pod has no container")?;
        let token = match reader(container) {
            // Whoever makes pods here may use the accounts of this namespace, and must not come by those of others.
            Some(reader) if with_token && reader.namespace != self.generator_namespace => bail!(
                "{name}: the account {}/{} is not of its own namespace; show a token with --token-file",
                reader.namespace,
                reader.name
            ),
            Some(reader) if with_token => Some(self.token(client, &reader).await?),
            _ => None,
        };
        let port = port(container);
        let mut forwarder = pods
            .portforward(&name, &[port])
            .await
            .with_context(|| format!("port {port} of pod {name} cannot be forwarded"))?;
        let stream = forwarder
            .take_stream(port)
            .ok_or_else(|| anyhow!("port {port} of pod {name} is not forwarded"))?;
        let cut = forwarder.take_error(port).map(|error| {
            error
                .map(move |error| Some(format!("pod {name}: {}", error?.trim())))
                .boxed()
        });
        Ok(Way {
            stream: Box::new(stream),
            encrypted: setting(container, "tls-cert").is_some(),
            name: SERVICE.to_owned(),
            authority: format!("{SERVICE}:{port}"),
            token,
            cut,
        })
    }

    async fn token(&self, client: Client, reader: &Reader) -> Result<Secret> {
        let accounts: Api<ServiceAccount> = Api::namespaced(client, &reader.namespace);
        let wanted = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: Some(vec![reader.audience.clone()]),
                expiration_seconds: Some(TOKEN_SECONDS),
                ..TokenRequestSpec::default()
            }),
            ..TokenRequest::default()
        };
        let answer = accounts
            .create_token_request(&reader.name, &PostParams::default(), &wanted)
            .await
            .with_context(|| {
                format!(
                    "no token of service account {}/{}",
                    reader.namespace, reader.name
                )
            })?;
        let token = answer.status.and_then(|status| status.token);
        Ok(Secret::new(token.context("the API server gave no token")?))
    }
}

/// Whom the generator lets read.
#[derive(Debug, PartialEq, Eq)]
struct Reader {
    namespace: String,
    name: String,
    audience: String,
}

/// The generator that is ready.
fn choose(pods: Vec<Pod>) -> Result<Pod> {
    let ready = |pod: &Pod| {
        let conditions = pod.status.iter().flat_map(|status| &status.conditions);
        pod.metadata.deletion_timestamp.is_none()
            && conditions
                .flatten()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True")
    };
    let found = pods.len();
    match pods.into_iter().find(ready) {
        Some(pod) => Ok(pod),
        None if found == 0 => bail!(
            "there is no pod with the labels {LABELS}; is it another namespace (--generator-namespace), or another cluster \
             (--context)?"
        ),
        None => bail!("none of {found} pods is ready"),
    }
}

/// The container of that name, or else the first one.
fn container(pod: &Pod) -> Option<&Container> {
    let containers = &pod.spec.as_ref()?.containers;
    containers
        .iter()
        .find(|container| container.name == "generator")
        .or_else(|| containers.first())
}

fn port(container: &Container) -> u16 {
    let mut ports = container.ports.iter().flatten();
    ports
        .find(|port| port.name.as_deref() == Some(PORT))
        .and_then(|port| u16::try_from(port.container_port).ok())
        .unwrap_or(8765)
}

fn reader(container: &Container) -> Option<Reader> {
    let account = setting(container, "reader-account")?;
    let (namespace, name) = account.split_once('/')?;
    Some(Reader {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        audience: setting(container, "token-audience")?.to_owned(),
    })
}

/// What the container's command line or environment says of an option of `microshield serve`.
fn setting<'a>(container: &'a Container, option: &str) -> Option<&'a str> {
    let flag = format!("--{option}");
    let mut args = container.args.iter().flatten();
    while let Some(arg) = args.next() {
        match arg.strip_prefix(&flag) {
            Some("") => return args.next().map(String::as_str),
            Some(rest) if rest.starts_with('=') => return rest.get(1..),
            _ => {}
        }
    }
    let name = format!("MICROSHIELD_{}", option.to_uppercase().replace('-', "_"));
    let mut variables = container.env.iter().flatten();
    variables
        .find(|variable| variable.name == name)
        .and_then(|variable| variable.value.as_deref())
}

#[cfg(test)]
mod tests;
