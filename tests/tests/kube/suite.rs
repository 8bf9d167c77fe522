//! What any API server must bring about, the small one as the real one: objects are created, changed and deleted through
//! it, and names follow.

use std::time::Duration;

use anyhow::{Result, ensure};
use flow::{
    source::{Access, Kind, Knowledge, Options, Scope, Source, Topology, View},
    time::Timestamp,
};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{
    objects::{namespace, node, pod, service},
    real::Real,
    test,
    world::{PACE, World, name_at, name_of, now, server_at, wait_for},
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![test("suite::small_api_server", || async {
        run(&Api::Small(World::empty().await?)).await
    })]
}

/// Something that serves the Kubernetes API.
pub(crate) enum Api {
    Small(World),
    Real(Real),
}

impl Api {
    /// Creates an object or changes it to this, its status included.
    async fn put(&self, resource: &str, object: Value) -> Result<()> {
        match self {
            Self::Small(world) => {
                world.server.put(resource, object);
                Ok(())
            }
            Self::Real(real) => real.put(resource, &object).await,
        }
    }

    async fn delete(&self, resource: &str, name: &str) -> Result<()> {
        match self {
            Self::Small(world) => {
                ensure!(world.server.delete(resource, "shop", name), "no {name}");
                Ok(())
            }
            Self::Real(real) => real.delete(resource, name).await,
        }
    }

    fn access(&self) -> Result<Access> {
        match self {
            Self::Small(world) => Ok(world.options(Scope::Everything)?.access),
            Self::Real(real) => Ok(real.admin()),
        }
    }

    /// The access of somebody who may read everything but services.
    fn limited_access(&self) -> Result<Access> {
        match self {
            Self::Small(world) => {
                use lab::apiserver::Verb;
                world.server.allow("services", Verb::List, false);
                self.access()
            }
            Self::Real(real) => Ok(real.viewer()),
        }
    }
}

async fn listen(access: Access, scope: Scope) -> Result<Topology> {
    let options = Options {
        access,
        scope,
        jitter: Duration::ZERO,
        pace: PACE,
    };
    let topology = Topology::start(&Source::Kube, options).await?;
    topology.view().clone().ready().await;
    Ok(topology)
}

async fn wait_for_name(view: &View, address: &str, wanted: &str) -> Result<Timestamp> {
    let named = wait_for(&mut || name_of(view, address) == wanted).await;
    ensure!(
        named.is_ok(),
        "{address} is {}, not {wanted}",
        name_of(view, address)
    );
    Ok(now())
}

pub(crate) async fn run(api: &Api) -> Result<()> {
    api.put("namespaces", namespace("shop")).await?;
    api.put("nodes", node("node-1", "192.168.0.1", "10.0.1.0/24"))
        .await?;
    api.put("nodes", node("node-2", "192.168.0.2", "10.0.2.0/24"))
        .await?;
    api.put("services", service("front", "10.96.0.100", 80, 8080))
        .await?;
    api.put("pods", pod("front-1", "node-1", "10.0.1.1"))
        .await?;

    let topology = listen(api.access()?, Scope::Everything).await?;
    let view = topology.view();
    ensure!(name_of(view, "10.0.1.1") == "shop/front-1");
    ensure!(name_of(view, "192.168.0.2") == "node node-2");
    ensure!(name_of(view, "10.0.2.77") == "node node-2");
    ensure!(server_at(view, "10.96.0.100", 80)? == ("service shop/front".to_owned(), 8080));
    let local = listen(api.access()?, Scope::OneNode("node-2".to_owned())).await?;
    ensure!(name_of(local.view(), "10.0.1.1") == "10.0.1.1");

    // Created.
    api.put("pods", pod("front-2", "node-2", "10.0.2.1"))
        .await?;
    wait_for_name(view, "10.0.2.1", "shop/front-2").await?;
    wait_for_name(local.view(), "10.0.2.1", "shop/front-2").await?;

    // Changed: it leaves its service.
    let services = |address: &str| {
        let mut found = Vec::new();
        for pod in view.index().pods() {
            if pod
                .addresses
                .iter()
                .any(|other| other.to_string() == address)
            {
                found = pod.services.to_vec();
            }
        }
        found
    };
    ensure!(services("10.0.2.1") == ["front"]);
    let mut changed = pod("front-2", "node-2", "10.0.2.1");
    changed["metadata"]["labels"] = json!({"app": "front-debug"});
    api.put("pods", changed).await?;
    let left = wait_for(&mut || services("10.0.2.1").is_empty()).await;
    ensure!(left.is_ok(), "{:?}", services("10.0.2.1"));
    api.put("services", service("front", "10.96.0.100", 80, 9090))
        .await?;
    wait_for(&mut || server_at(view, "10.96.0.100", 80).is_ok_and(|(_, port)| port == 9090))
        .await?;

    // Deleted, and its address is another's.
    let before = now();
    api.delete("pods", "front-2").await?;
    api.put("pods", pod("back-1", "node-2", "10.0.2.1")).await?;
    let after = wait_for_name(view, "10.0.2.1", "shop/back-1").await?;
    ensure!(name_at(view, "10.0.2.1", before) == "shop/front-2");
    ensure!(name_at(view, "10.0.2.1", after) == "shop/back-1");

    // Finished: it gives its address up.
    let mut finished = pod("back-1", "node-2", "10.0.2.1");
    finished["status"]["phase"] = "Succeeded".into();
    api.put("pods", finished).await?;
    api.put("pods", pod("back-2", "node-2", "10.0.2.1")).await?;
    wait_for_name(view, "10.0.2.1", "shop/back-2").await?;

    // Without one right everything else works.
    let limited = listen(api.limited_access()?, Scope::Everything).await?;
    let knowledge = limited.view().knowledge();
    ensure!(
        knowledge[&Kind::Services] == Knowledge::Refused,
        "{knowledge:?}"
    );
    ensure!(name_of(limited.view(), "10.0.1.1") == "shop/front-1");
    Ok(())
}
