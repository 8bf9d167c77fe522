//! The bytes of a real kube-apiserver, from request to index.

use std::{collections::BTreeMap, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use flow::{
    source::{Kind, Knowledge},
    topology::{Index, Objects, file},
};
use lab::apiserver::{End, Reply, Verb};
use libtest_mimic::Trial;

use crate::{
    test,
    world::{World, ensure_asked, name_of, now},
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("recorded::lists_and_watches", lists_and_watches),
        test("recorded::pages", pages),
        test("recorded::a_page_that_has_expired", a_page_that_has_expired),
        test("recorded::a_watch_that_is_too_old", a_watch_that_is_too_old),
        test("recorded::refusals", refusals),
        test("recorded::bad_tokens", bad_tokens),
    ]
}

const KINDS: [&str; 5] = ["namespaces", "nodes", "services", "endpointslices", "pods"];

fn recorded(name: &str) -> Result<Vec<u8>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/kube-1.24")
        .join(name);
    fs::read(&path).with_context(|| path.display().to_string())
}

/// Every kind's list; the watch is silent.
fn reply_lists(world: &World) -> Result<()> {
    for kind in KINDS {
        let list = recorded(&format!("list-{kind}.json"))?;
        let watch = Reply::new(200, Vec::new()).end(End::Silence);
        world
            .server
            .reply_once(kind, Verb::List, Reply::new(200, list));
        world.server.reply_once(kind, Verb::Watch, watch);
    }
    Ok(())
}

/// Everything that an index says of its objects, as text.
fn contents(index: &Index) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for pod in index.pods() {
        all.insert(format!("pod {}", pod.uid), format!("{pod:?}"));
        for address in &pod.addresses {
            // The script behind the recording gave some addresses to two pods at a time. Whose they are then depends on
            // what was heard first.
            let holders = index
                .pods()
                .filter(|other| other.addresses.contains(address));
            if holders.count() == 1 {
                let holder = index.resolve_client(*address, now());
                all.insert(format!("address {address}"), holder.to_string());
            }
        }
    }
    for service in index.services() {
        let key = format!("service {}/{}", service.namespace, service.name);
        all.insert(key, format!("{service:?}"));
    }
    for (name, labels) in index.namespaces() {
        all.insert(format!("namespace {name}"), format!("{labels:?}"));
    }
    for name in ["node-1", "node-2", "node-3"] {
        all.insert(format!("node {name}"), format!("{:?}", index.node(name)));
    }
    all.insert("counts".to_owned(), format!("{:?}", index.counts()));
    all
}

/// What it should be after the recorded events.
fn afterwards() -> Result<Index> {
    let mut objects = Objects::default();
    for kind in KINDS {
        let name = format!("after-{kind}.json");
        let mut loaded = file::parse(name.as_ref(), &recorded(&name)?)?.objects;
        objects.namespaces.append(&mut loaded.namespaces);
        objects.nodes.append(&mut loaded.nodes);
        objects.services.append(&mut loaded.services);
        objects.endpoint_slices.append(&mut loaded.endpoint_slices);
        objects.pods.append(&mut loaded.pods);
    }
    let mut index = Index::default();
    index.replace(objects, now());
    Ok(index)
}

async fn lists_and_watches() -> Result<()> {
    let world = World::empty().await?;
    for kind in KINDS {
        // In parts that respect neither lines nor objects.
        let list = Reply::new(200, recorded(&format!("list-{kind}.json"))?).in_parts(977);
        let events = Reply::new(200, recorded(&format!("watch-{kind}.jsonl"))?);
        let events = events.in_parts(1_023).end(End::Silence);
        world.server.reply_once(kind, Verb::List, list);
        world.server.reply_once(kind, Verb::Watch, events);
    }
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    let wanted = contents(&afterwards()?);
    world
        .wait_for("the index says what the API said last", || {
            contents(&topology.view().index()) == wanted
        })
        .await
        .with_context(|| {
            let found = contents(&topology.view().index());
            let differs = |(key, value): &(&String, &String)| wanted.get(*key) != Some(*value);
            let different: Vec<_> = found.iter().filter(differs).collect();
            format!("different: {different:#?}")
        })?;
    ensure_asked(
        &world.server.asked_of("pods"),
        &[
            "list limit=500 resourceVersion=0",
            "watch resourceVersion=425 allowWatchBookmarks=true",
        ],
    )
}

async fn pages() -> Result<()> {
    let world = World::empty().await?;
    for page in 1..=4 {
        let page = recorded(&format!("page-pods-{page}.json"))?;
        world
            .server
            .reply_once("pods", Verb::List, Reply::new(200, page));
    }
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    let count = topology.view().index().pods().count();
    ensure!(count == 15, "{count} pods");
    let asked = world.server.asked_of("pods");
    let lists: Vec<String> = asked
        .into_iter()
        .filter(|asked| asked.starts_with("list"))
        .collect();
    ensure_asked(
        &lists,
        &[
            "list limit=500 resourceVersion=0",
            "list limit=500 continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6NDI3LCJzdGFydCI6ImRhdGEvZGItMVx1MDAwMCJ9",
            "list limit=500 continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6NDI3LCJzdGFydCI6Imt1YmUtc3lzdGVtL25vZGUtZXhwb3J0ZXItaGZydmZcdTAwMDAifQ",
            "list limit=500 continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6NDI3LCJzdGFydCI6InNob3AvYXBpLTU2Yzk5NGJjZmYtdGp4dmZcdTAwMDAifQ",
        ],
    )
}

async fn a_page_that_has_expired() -> Result<()> {
    let world = World::empty().await?;
    let first = recorded("page-pods-1.json")?;
    let expired = recorded("410-expired-continue.json")?;
    let whole = recorded("list-pods.json")?;
    world
        .server
        .reply_once("pods", Verb::List, Reply::new(200, first));
    world
        .server
        .reply_once("pods", Verb::List, Reply::new(410, expired));
    world
        .server
        .reply_once("pods", Verb::List, Reply::new(200, whole));
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    let count = topology.view().index().pods().count();
    ensure!(count == 15, "{count} pods");
    // The third is not cut into pages again: that would take as long as the last time.
    let asked = world.server.asked_of("pods");
    ensure!(
        asked.get(2).is_some_and(|query| query == "list "),
        "{asked:?}"
    );
    Ok(())
}

async fn a_watch_that_is_too_old() -> Result<()> {
    let world = World::empty().await?;
    reply_lists(&world)?;
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    ensure!(name_of(topology.view(), "10.244.3.13") == "shop/front-67796785cb-bjxrg");
    drop(topology);

    let world = World::empty().await?;
    let expired = Reply::new(200, recorded("410-watch-pods.jsonl")?);
    world.server.reply_once("pods", Verb::Watch, expired);
    reply_lists(&world)?;
    let after = Reply::new(200, recorded("after-pods.json")?);
    world.server.reply_once("pods", Verb::List, after);
    let topology = world.listen().await?;
    world
        .wait_for_name(&topology, "10.244.3.13", "batch/intruder")
        .await?;
    world
        .wait_for("a watch", || world.server.asked_of("pods").len() == 4)
        .await?;
    ensure_asked(
        &world.server.asked_of("pods"),
        &[
            "list limit=500 resourceVersion=0",
            "watch resourceVersion=425",
            // Not older than what was known, and from the cache.
            "list resourceVersion=425 resourceVersionMatch=NotOlderThan",
            "watch resourceVersion=506",
        ],
    )
}

async fn refusals() -> Result<()> {
    let world = World::empty().await?;
    reply_lists(&world)?;
    for _ in 0..8 {
        let refusal = Reply::new(403, recorded("403-list-pods.json")?);
        world.server.reply_first("pods", Verb::List, refusal);
    }
    let topology = world.listen().await?;
    world
        .wait_for("pods are given up, and nodes are known", || {
            let knowledge = topology.view().knowledge();
            knowledge[&Kind::Pods] == Knowledge::Refused
                && knowledge[&Kind::Nodes] == Knowledge::Current
        })
        .await?;
    ensure!(name_of(topology.view(), "192.168.50.11") == "node node-1");
    ensure!(!topology.view().is_ready());
    let complaints = world
        .log
        .lines(&["WARN", "not allowed to list pods", "get, list and watch"]);
    ensure!(complaints.len() == 1, "{}", world.log.text());
    drop(topology);

    let world = World::empty().await?;
    for _ in 0..8 {
        let refusal = Reply::new(403, recorded("403-watch-pods.json")?);
        world.server.reply_once("pods", Verb::Watch, refusal);
    }
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    world
        .wait_for("the right that is missing is named", || {
            !world
                .log
                .lines(&["WARN", "not allowed to watch pods", "cannot watch resource"])
                .is_empty()
        })
        .await?;
    Ok(())
}

async fn bad_tokens() -> Result<()> {
    let world = World::empty().await?;
    for kind in KINDS {
        let refusal = Reply::new(401, recorded("401-list-pods.json")?);
        world.server.reply_once(kind, Verb::List, refusal);
    }
    reply_lists(&world)?;
    let topology = world.listen().await?;
    let known = || topology.view().knowledge()[&Kind::Pods];
    let at_first = known();
    world.ready(topology.view()).await?;
    ensure!(at_first == Knowledge::Awaited);
    let complaints = world
        .log
        .lines(&["WARN", "does not accept the credentials", "kind=pods"]);
    ensure!(complaints.len() == 1, "{}", world.log.text());
    Ok(())
}
