//! The Kubernetes API as a source: every kind is listed, then watched, by a task of its own.
//!
//! [`kube`]'s client does what concerns connection, TLS and credentials. Its `watcher` is not used: it holds the text of a
//! whole list twice and all its objects once before it hands out the first, gigabytes for the pods of a large cluster;
//! with pages it does without that, but then asks for the newest state, which every agent's list has to be read from etcd
//! for. Here a list comes from the API server's cache and is taken apart while it arrives, one object at a time.

mod access;
mod follow;
mod kind;
mod lines;
mod list;
mod pace;
mod parse;
mod trouble;

use std::time::Duration;

use tokio::task::JoinSet;

use self::follow::Follower;
pub use self::{
    access::{Access, ConnectError, client},
    kind::{Kind, Scope},
    pace::Pace,
};
use super::{
    Options, SourceError,
    once::{LoadError, Warnings},
    view::{Knowledge, Shared},
};
use crate::topology::Objects;

/// Starts to follow what is in scope.
pub(super) async fn start(
    options: Options,
    shared: &Shared,
    tasks: &mut JoinSet<()>,
) -> Result<(), ConnectError> {
    let client = access::client(&options.access).await?;
    tracing::info!("reading the cluster's objects from the Kubernetes API");
    for kind in options.scope.kinds() {
        // Before any task runs, so that nobody finds the view ready in between.
        shared.set_knowledge(*kind, Knowledge::Awaited);
    }
    for kind in options.scope.kinds() {
        let selector = options.scope.field_selector(*kind);
        let follower = Follower::new(*kind, selector, &options, client.clone(), shared.clone());
        tasks.spawn(follower.run());
    }
    tasks.spawn(remind(options.pace.remind, shared.clone()));
    tasks.spawn(announce(shared.clone()));
    Ok(())
}

/// Lists everything in scope once.
pub(super) async fn load(options: &Options) -> Result<(Objects, Warnings), LoadError> {
    let client = access::client(&options.access)
        .await
        .map_err(SourceError::from)?;
    let (mut objects, mut warnings) = (Objects::default(), Warnings::new());
    for kind in options.scope.kinds() {
        let selector = options.scope.field_selector(*kind);
        match list::newest(&client, *kind, selector.as_deref(), options.pace).await {
            Ok(listed) => {
                if listed.malformed > 0 {
                    warnings.push(format!(
                        "{} malformed {kind} are left out",
                        listed.malformed
                    ));
                }
                objects.append(listed.objects);
            }
            Err(trouble) if trouble.is_refusal() && *kind != Kind::Pods => {
                warnings.push(format!("no {kind}: {trouble}"));
            }
            Err(trouble) => {
                return Err(LoadError::Refused {
                    at: format!("the Kubernetes API, {kind}"),
                    message: trouble.to_string(),
                });
            }
        }
    }
    Ok((objects, warnings))
}

/// Says how old the knowledge in use is, while it is not current.
async fn remind(every: Duration, shared: Shared) {
    let view = shared.view();
    loop {
        tokio::time::sleep(every).await;
        if let Some(since) = view.stale_since() {
            let age = super::age(since);
            tracing::warn!(
                ?age,
                "the API server is not heard: names go on as they were known then"
            );
        }
    }
}

/// Says when all kinds are known.
async fn announce(shared: Shared) {
    shared.view().ready().await;
    let counts = shared.view().index().counts();
    tracing::info!(
        pods = counts.pods,
        services = counts.services,
        endpoint_slices = counts.endpoint_slices,
        nodes = counts.nodes,
        namespaces = counts.namespaces,
        "the cluster's objects are known"
    );
}
