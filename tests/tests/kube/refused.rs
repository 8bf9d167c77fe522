//! An API server that says no.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use flow::source::{Kind, Knowledge};
use lab::apiserver::{Reply, Verb};
use libtest_mimic::Trial;

use crate::{
    objects::pod,
    test,
    world::{World, name_of, now},
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("refused::one_kind", one_kind),
        test("refused::pods", pods),
        test(
            "refused::watching_but_not_listing",
            watching_but_not_listing,
        ),
        test(
            "refused::a_right_that_is_taken_away",
            a_right_that_is_taken_away,
        ),
        test(
            "refused::a_right_that_comes_a_moment_late",
            a_right_that_comes_a_moment_late,
        ),
        test("refused::an_expired_token", an_expired_token),
        test("refused::too_many_requests", too_many_requests),
    ]
}

async fn one_kind() -> Result<()> {
    let world = World::shop().await?;
    world.server.allow("services", Verb::List, false);
    let topology = world.listen().await?;
    let view = topology.view();
    world.ready(view).await?;
    ensure!(view.knowledge()[&Kind::Services] == Knowledge::Refused);
    ensure!(
        view.stale_since().is_none(),
        "nothing is known, so nothing is old"
    );
    ensure!(name_of(view, "10.0.1.1") == "shop/front-1");
    let complaints = world
        .log
        .lines(&["WARN", "not allowed to list services", "API group \"\""]);
    ensure!(complaints.len() == 1, "{}", world.log.text());

    // Asked for rarely, and yet noticed when it is granted.
    world.server.allow("services", Verb::List, true);
    world
        .wait_for("services are known", || {
            view.index().services().count() == 1
        })
        .await?;
    world
        .wait_for("they are current", || {
            view.knowledge()[&Kind::Services] == Knowledge::Current
        })
        .await
}

async fn pods() -> Result<()> {
    let world = World::shop().await?;
    world.server.allow("pods", Verb::List, false);
    let topology = world.listen().await?;
    let view = topology.view();
    world
        .wait_for("it is given up", || {
            view.knowledge()[&Kind::Pods] == Knowledge::Refused
        })
        .await?;
    world
        .wait_for("the others are known", || {
            view.knowledge()[&Kind::Services] == Knowledge::Current
        })
        .await?;
    ensure!(!view.is_ready(), "every pod would look like an external");
    world.server.allow("pods", Verb::List, true);
    world.ready(view).await?;
    ensure!(name_of(view, "10.0.1.1") == "shop/front-1");
    Ok(())
}

async fn watching_but_not_listing() -> Result<()> {
    let world = World::shop().await?;
    world.server.allow("endpointslices", Verb::Watch, false);
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    world
        .wait_for("the right that is missing is named", || {
            let words = [
                "WARN",
                "not allowed to watch endpointslices",
                "\"discovery.k8s.io\"",
            ];
            world.log.lines(&words).len() == 1
        })
        .await?;
    // Then it is listed now and then.
    let lists = || {
        let asked = world.server.asked_of("endpointslices");
        asked
            .iter()
            .filter(|asked| asked.starts_with("list"))
            .count()
    };
    let before = lists();
    world
        .wait_for("another list", || lists() > before + 1)
        .await?;
    ensure!(
        world.log.lines(&["heard again"]).is_empty(),
        "{}",
        world.log.text()
    );
    Ok(())
}

async fn a_right_that_is_taken_away() -> Result<()> {
    let world = World::shop().await?;
    let topology = world.follow().await?;
    let view = topology.view();
    world.server.allow("pods", Verb::List, false);
    world.server.allow("pods", Verb::Watch, false);
    world.server.break_watches();
    world
        .wait_for("it is said", || {
            !world.log.lines(&["not allowed to watch pods"]).is_empty()
                && !world.log.lines(&["not allowed to list pods"]).is_empty()
        })
        .await?;
    ensure!(view.is_ready() && view.stale_since().is_some_and(|since| since <= now()));
    ensure!(name_of(view, "10.0.1.1") == "shop/front-1");
    Ok(())
}

async fn a_right_that_comes_a_moment_late() -> Result<()> {
    let world = World::shop().await?;
    world.server.allow("pods", Verb::List, false);
    let topology = world.listen().await?;
    world
        .wait_for("it was refused", || {
            !world.log.lines(&["not allowed to list pods"]).is_empty()
        })
        .await?;
    ensure!(
        !topology.view().is_ready(),
        "rights are granted while we start"
    );
    world.server.allow("pods", Verb::List, true);
    world.ready(topology.view()).await?;
    ensure!(name_of(topology.view(), "10.0.1.1") == "shop/front-1");
    Ok(())
}

async fn an_expired_token() -> Result<()> {
    let world = World::shop().await?;
    std::fs::write(world.token_file(), "first")?;
    world.server.set_token("first");
    let topology = world.follow().await?;
    world.server.set_token("second");
    world.server.break_watches();
    world
        .wait_for("it is said", || {
            !world
                .log
                .lines(&["WARN", "does not accept the credentials", "kind=pods"])
                .is_empty()
        })
        .await?;
    ensure!(name_of(topology.view(), "10.0.1.1") == "shop/front-1");
    // kubelet renews the file; nobody has to be told.
    std::fs::write(world.token_file(), "second")?;
    world
        .server
        .put("pods", pod("back-1", "node-2", "10.0.2.9"));
    world
        .wait_for_name(&topology, "10.0.2.9", "shop/back-1")
        .await
}

async fn too_many_requests() -> Result<()> {
    let world = World::shop().await?;
    let busy = r#"{"kind": "Status", "code": 429, "message": "too many requests", "details": {"retryAfterSeconds": 2}}"#;
    world
        .server
        .reply_once("pods", Verb::List, Reply::new(429, busy));
    let start = Instant::now();
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    ensure!(
        start.elapsed() >= Duration::from_secs(2),
        "{:?}",
        start.elapsed()
    );
    ensure!(
        !world
            .log
            .lines(&["WARN", "429", "too many requests"])
            .is_empty()
    );
    Ok(())
}
