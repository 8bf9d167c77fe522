//! Who asks for what, and when.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use flow::source::{Options, Scope, Source, Topology};
use lab::apiserver::Verb;
use libtest_mimic::Trial;

use crate::{
    objects::pod,
    test,
    world::{World, ensure_asked, name_of},
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("scope::one_node", one_node),
        test("scope::both_ends", both_ends),
        test("scope::no_cache", no_cache),
        test("scope::many_at_once", many_at_once),
    ]
}

async fn one_node() -> Result<()> {
    let world = World::shop().await?;
    let topology = world.listen_to(Scope::OneNode("node-1".to_owned())).await?;
    let view = topology.view();
    world.ready(view).await?;
    world
        .wait_for("two watches", || world.server.watches() == 2)
        .await?;
    ensure_asked(
        &world.server.asked_of("pods"),
        &[
            "list fieldSelector=spec.nodeName%3Dnode-1 resourceVersion=0",
            "watch fieldSelector=spec.nodeName%3Dnode-1 resourceVersion=6",
        ],
    )?;
    ensure_asked(
        &world.server.asked_of("nodes"),
        &[
            "list fieldSelector=metadata.name%3Dnode-1",
            "watch fieldSelector=metadata.name%3Dnode-1",
        ],
    )?;
    ensure!(
        world.server.asked().len() == 4,
        "{:?}",
        world.server.asked()
    );
    ensure!(name_of(view, "10.0.1.1") == "shop/front-1");
    ensure!(name_of(view, "10.0.2.1") == "10.0.2.1");

    // A pod is told of when it is bound to the node, and not before.
    world.server.put("pods", pod("back-1", "", "10.0.1.9"));
    world
        .server
        .put("pods", pod("back-2", "node-2", "10.0.2.9"));
    world
        .server
        .put("pods", pod("back-1", "node-1", "10.0.1.9"));
    world
        .wait_for_name(&topology, "10.0.1.9", "shop/back-1")
        .await?;
    ensure!(view.index().pods().count() == 2);
    Ok(())
}

async fn both_ends() -> Result<()> {
    let world = World::shop().await?;
    let topology = world.listen_to(Scope::BothEnds).await?;
    world.ready(topology.view()).await?;
    let mut kinds: Vec<String> = world
        .server
        .asked()
        .into_iter()
        .map(|asked| asked.resource)
        .collect();
    kinds.sort();
    kinds.dedup();
    ensure!(
        kinds == ["endpointslices", "nodes", "pods", "services"],
        "{kinds:?}"
    );
    Ok(())
}

async fn no_cache() -> Result<()> {
    let world = World::shop().await?;
    world.server.keep_no_cache();
    for number in 0..1_200 {
        let address = format!("10.1.{}.{}", number / 250, number % 250);
        world
            .server
            .put("pods", pod(&format!("many-{number}"), "node-2", &address));
    }
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    let count = topology.view().index().pods().count();
    ensure!(count == 1_202, "{count} pods");
    let asked = world.server.asked_of("pods");
    let pages = asked
        .iter()
        .filter(|asked| asked.starts_with("list limit=500"))
        .count();
    ensure!(pages == 3, "{asked:?}");
    Ok(())
}

/// A DaemonSet's agents start together, and lose their watches together.
async fn many_at_once() -> Result<()> {
    const AGENTS: usize = 40;
    const JITTER: Duration = Duration::from_secs(2);
    let world = World::shop().await?;
    let options = Options {
        jitter: JITTER,
        ..world.options(Scope::BothEnds)?
    };
    let start = Instant::now();
    let mut agents = Vec::new();
    for _ in 0..AGENTS {
        agents.push(Topology::start(&Source::Kube, options.clone()).await?);
    }
    for agent in &agents {
        world.ready(agent.view()).await?;
    }
    let first = world.server.asked();
    let lists: Vec<_> = first
        .iter()
        .filter(|asked| asked.verb == Verb::List)
        .collect();
    ensure!(lists.len() == AGENTS * 4, "{} lists", lists.len());
    ensure!(
        lists
            .iter()
            .all(|asked| asked.query.ends_with("resourceVersion=0"))
    );
    let early = |limit: Duration| lists.iter().filter(|a| a.at - start < limit).count();
    let (quarter, half) = (early(JITTER / 4), early(JITTER / 2));
    ensure!(quarter < AGENTS * 2, "{quarter} in the first quarter");
    ensure!(half < AGENTS * 3, "{half} in the first half");

    world
        .wait_for("all watch", || world.server.watches() == AGENTS * 4)
        .await?;
    let known = world.server.asked().len();
    let broken = Instant::now();
    world.server.break_watches();
    world
        .wait_for("all watch again", || world.server.watches() == AGENTS * 4)
        .await?;
    let again = world.server.asked().split_off(known);
    let at_once = again
        .iter()
        .filter(|a| a.at - broken < Duration::from_millis(200))
        .count();
    ensure!(again.iter().all(|asked| asked.verb == Verb::Watch));
    ensure!(at_once < AGENTS / 2, "{at_once} came back at once");

    // What the server has forgotten has to be listed anew.
    let known = world.server.asked().len();
    let forgotten = Instant::now();
    world.server.break_watches();
    world
        .server
        .put("pods", pod("back-1", "node-1", "10.0.1.9"));
    world.server.forget();
    let lists = || {
        let mut asked = world.server.asked().split_off(known);
        asked.retain(|asked| asked.resource == "pods" && asked.verb == Verb::List);
        asked
    };
    world
        .wait_for("all list again", || lists().len() == AGENTS)
        .await?;
    let early = lists()
        .iter()
        .filter(|asked| asked.at - forgotten < JITTER / 2)
        .count();
    ensure!(early < AGENTS * 3 / 4, "{early} lists in the first half");
    Ok(())
}
