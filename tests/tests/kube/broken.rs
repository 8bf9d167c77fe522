//! Connections that break, servers that are away, streams that say nothing or nonsense.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use flow::source::{Kind, Knowledge, Options, Pace, Scope, Source, Topology};
use k8s_openapi::jiff;
use lab::apiserver::{End, Reply, Verb};
use libtest_mimic::Trial;

use crate::{
    objects::{pod, service},
    test,
    world::{PACE, World, ensure_asked, name_at, name_of, now, server_at},
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("broken::changes_arrive", changes_arrive),
        test(
            "broken::a_watch_goes_on_where_it_broke",
            a_watch_goes_on_where_it_broke,
        ),
        test("broken::a_watch_whose_time_is_up", a_watch_whose_time_is_up),
        test("broken::a_bookmark_saves_a_list", a_bookmark_saves_a_list),
        test(
            "broken::what_is_forgotten_is_listed",
            what_is_forgotten_is_listed,
        ),
        test(
            "broken::a_relist_is_swapped_at_once",
            a_relist_is_swapped_at_once,
        ),
        test(
            "broken::an_api_server_that_is_away",
            an_api_server_that_is_away,
        ),
        test(
            "broken::an_address_that_moves_on_meanwhile",
            an_address_that_moves_on_meanwhile,
        ),
        test(
            "broken::a_watch_that_is_refused_after_it_began",
            a_watch_that_is_refused_after_it_began,
        ),
        test(
            "broken::an_api_server_that_is_away_at_first",
            an_api_server_that_is_away_at_first,
        ),
        test("broken::a_slow_api_server", a_slow_api_server),
        test("broken::a_silent_watch", a_silent_watch),
        test("broken::a_list_that_breaks_off", a_list_that_breaks_off),
        test("broken::nonsense", nonsense),
        test("broken::a_malformed_object", a_malformed_object),
        test(
            "broken::nothing_is_ready_before_everything",
            nothing_is_ready_before_everything,
        ),
    ]
}

async fn changes_arrive() -> Result<()> {
    let world = World::shop().await?;
    let topology = world.follow().await?;
    let view = topology.view();
    ensure!(server_at(view, "10.96.0.1", 80)? == ("service shop/front".to_owned(), 8080));

    let before = now();
    world.server.delete("pods", "shop", "front-1");
    world
        .server
        .put("pods", pod("back-1", "node-1", "10.0.1.1"));
    world
        .wait_for_name(&topology, "10.0.1.1", "shop/back-1")
        .await?;
    ensure!(name_at(view, "10.0.1.1", before) == "shop/front-1");
    world
        .server
        .put("services", service("front", "10.96.0.1", 80, 9090));
    world
        .wait_for("the new target port", || {
            server_at(view, "10.96.0.1", 80).is_ok_and(|(_, port)| port == 9090)
        })
        .await?;
    ensure!(
        world.server.asked().len() == 10,
        "{:?}",
        world.server.asked()
    );
    Ok(())
}

async fn a_watch_goes_on_where_it_broke() -> Result<()> {
    let world = World::shop().await?;
    let topology = world.follow().await?;
    world.server.break_watches();
    // Nobody is there to hear this.
    world.server.delete("pods", "shop", "front-2");
    world
        .server
        .put("pods", pod("back-1", "node-2", "10.0.2.9"));
    world
        .wait_for_name(&topology, "10.0.2.9", "shop/back-1")
        .await?;
    ensure!(topology.view().index().pod_by_uid("uid-front-2").is_some());
    ensure!(topology.view().index().pods().count() == 2);
    ensure_asked(
        &world.server.asked_of("pods"),
        &[
            "list resourceVersion=0",
            "watch resourceVersion=6",
            "watch resourceVersion=6",
        ],
    )?;
    ensure!(
        world.log.lines(&["WARN", "kind="]).is_empty(),
        "{}",
        world.log.text()
    );
    Ok(())
}

async fn a_watch_whose_time_is_up() -> Result<()> {
    let world = World::shop().await?;
    let topology = world.follow().await?;
    let mut away = Duration::ZERO;
    for round in 0..3 {
        let address = format!("10.0.1.{}", 100 + round);
        world.server.put("pods", pod("new", "node-1", &address));
        world.wait_for_name(&topology, &address, "shop/new").await?;
        world.server.end_watches();
        let ended = Instant::now();
        world
            .wait_for("five watches", || world.server.watches() == 5)
            .await?;
        away += ended.elapsed();
    }
    // The last of five is early three times in a row once in some ten million runs.
    ensure!(away > Duration::from_millis(300), "in step: {away:?}");
    let lists = world
        .server
        .asked()
        .iter()
        .filter(|asked| asked.verb == Verb::List)
        .count();
    ensure!(lists == 5, "{lists} lists");
    Ok(())
}

async fn a_bookmark_saves_a_list() -> Result<()> {
    let world = World::shop().await?;
    let _topology = world.follow().await?;
    // Other kinds' changes make the nodes' version old.
    for _ in 0..10 {
        world
            .server
            .put("pods", pod("front-1", "node-1", "10.0.1.1"));
    }
    world.server.bookmark("nodes");
    world.server.forget();
    // The watcher has to have read the bookmark before the stream breaks.
    tokio::time::sleep(Duration::from_millis(200)).await;
    world.server.break_watches();
    world
        .wait_for("nodes are watched anew", || {
            world.server.asked_of("nodes").len() == 3
        })
        .await?;
    ensure_asked(
        &world.server.asked_of("nodes"),
        &[
            "list resourceVersion=0",
            "watch resourceVersion=6",
            "watch resourceVersion=16",
        ],
    )
}

async fn what_is_forgotten_is_listed() -> Result<()> {
    let world = World::shop().await?;
    let topology = world.follow().await?;
    world.server.break_watches();
    world.server.delete("pods", "shop", "front-2");
    world
        .server
        .put("pods", pod("back-1", "node-2", "10.0.2.9"));
    world.server.forget();
    world
        .wait_for_name(&topology, "10.0.2.9", "shop/back-1")
        .await?;
    ensure!(topology.view().index().pods().count() == 2);
    world
        .wait_for("a watch", || world.server.asked_of("pods").len() == 5)
        .await?;
    ensure_asked(
        &world.server.asked_of("pods"),
        &[
            "list resourceVersion=0",
            "watch resourceVersion=6",
            "watch resourceVersion=6",
            "list resourceVersion=6 resourceVersionMatch=NotOlderThan",
            "watch resourceVersion=8",
        ],
    )
}

async fn a_relist_is_swapped_at_once() -> Result<()> {
    let world = World::shop().await?;
    for number in 0..2_000 {
        let address = format!("10.0.3.{}", number % 250);
        world
            .server
            .put("pods", pod(&format!("many-{number}"), "node-2", &address));
    }
    let topology = world.follow().await?;
    let stop = Arc::new(AtomicBool::new(false));
    let (view, stopped) = (topology.view().clone(), Arc::clone(&stop));
    let reader = thread::spawn(move || {
        let (mut looks, mut wrong) = (0, 0);
        while !stopped.load(Ordering::Relaxed) {
            looks += 1;
            let all_there = view.index().pods().count() == 2_002;
            let named = name_of(&view, "10.0.1.1") == "shop/front-1";
            wrong += u32::from(!all_there || !named);
        }
        (looks, wrong)
    });
    for round in 1..=3 {
        // What would make the version old.
        world
            .server
            .put("pods", pod("front-1", "node-1", "10.0.1.1"));
        world.server.break_watches();
        world
            .server
            .put("pods", pod("front-1", "node-1", "10.0.1.1"));
        world.server.forget();
        world
            .wait_for("another list", || {
                let asked = world.server.asked_of("pods");
                asked
                    .iter()
                    .filter(|asked| asked.starts_with("list"))
                    .count()
                    > round
                    && asked.last().is_some_and(|asked| asked.starts_with("watch"))
            })
            .await?;
    }
    stop.store(true, Ordering::Relaxed);
    let (looks, wrong) = reader
        .join()
        .map_err(|panic| anyhow::anyhow!("the reader panicked: {panic:?}"))?;
    ensure!(
        wrong == 0 && looks > 100,
        "{wrong} of {looks} looks saw half a list"
    );
    Ok(())
}

async fn an_api_server_that_is_away() -> Result<()> {
    let mut world = World::shop().await?;
    let topology = world.follow().await?;
    let view = topology.view();
    world.server.leave().await;
    world
        .wait_for("it is noticed", || view.stale_since().is_some())
        .await?;
    let since = view.stale_since();
    ensure!(view.is_ready() && since.is_some_and(|since| since <= now()));
    world
        .wait_for("how old the names are is said", || {
            world
                .log
                .lines(&["WARN", "names go on as they were known", "age="])
                .len()
                >= 2
        })
        .await?;
    ensure!(
        world.log.lines(&["cannot be reached", "kind=pods"]).len() == 1,
        "{}",
        world.log.text()
    );
    ensure!(name_of(view, "10.0.1.1") == "shop/front-1");
    ensure!(
        view.stale_since() == since,
        "it becomes no younger by itself"
    );

    let mut away = now();
    world.server.delete("pods", "shop", "front-1");
    world
        .server
        .put("pods", pod("back-1", "node-2", "10.0.2.9"));
    world.server.come_back().await?;
    world
        .wait_for_name(&topology, "10.0.2.9", "shop/back-1")
        .await?;
    world
        .wait_for("everything is current", || view.stale_since().is_none())
        .await?;
    ensure!(
        world.log.lines(&["INFO", "heard again", "kind=pods"]).len() == 1,
        "{}",
        world.log.text()
    );
    // What ended unheard has its name as long as the end was not known.
    ensure!(name_at(view, "10.0.1.1", away) == "shop/front-1");
    away = now();
    ensure!(view.index().pods().count() == 2 && away > since.unwrap_or_default());
    Ok(())
}

async fn an_address_that_moves_on_meanwhile() -> Result<()> {
    let mut world = World::shop().await?;
    let topology = world.follow().await?;
    let view = topology.view();
    world.server.leave().await;
    world.server.delete("pods", "shop", "front-2");
    // Starts are told in whole seconds, rounded down.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut next = pod("back-1", "node-2", "10.0.2.1");
    let started = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
    next["status"]["startTime"] = started.to_string().into();
    world.server.put("pods", next);
    let speaks = now();
    tokio::time::sleep(Duration::from_secs(2)).await;
    world.server.come_back().await?;
    world
        .wait_for_name(&topology, "10.0.2.1", "shop/back-1")
        .await?;
    let name = name_at(view, "10.0.2.1", speaks);
    ensure!(name == "shop/back-1", "{name}");
    Ok(())
}

async fn a_watch_that_is_refused_after_it_began() -> Result<()> {
    let mut world = World::shop().await?;
    let topology = world.follow().await?;
    let view = topology.view();
    world.server.leave().await;
    world
        .wait_for("it is noticed", || view.stale_since().is_some())
        .await?;
    let stale = |kind| match view.knowledge()[&kind] {
        Knowledge::Stale { since } => Some(since),
        _ => None,
    };
    let since = stale(Kind::Pods);
    // What happened is forgotten, which a watch says in a response that begins well; and there is no list.
    world
        .server
        .put("pods", pod("back-1", "node-2", "10.0.2.9"));
    world.server.forget();
    let busy = r#"{"kind": "Status", "code": 503, "message": "starting"}"#;
    for _ in 0..50 {
        world
            .server
            .reply_once("pods", Verb::List, Reply::new(503, busy));
    }
    world.server.come_back().await?;
    world
        .wait_for("a list is asked for", || {
            !world.log.lines(&["kind=pods", "503"]).is_empty()
        })
        .await?;
    ensure!(
        since.is_some() && stale(Kind::Pods) == since,
        "nothing was heard: {:?}",
        view.knowledge()
    );
    Ok(())
}

async fn an_api_server_that_is_away_at_first() -> Result<()> {
    let mut world = World::shop().await?;
    world.server.leave().await;
    let topology = world.listen().await?;
    world
        .wait_for("it is said", || {
            !world
                .log
                .lines(&[
                    "WARN",
                    "cannot be reached",
                    "kind=pods",
                    "Connection refused",
                ])
                .is_empty()
        })
        .await?;
    ensure!(!topology.view().is_ready());
    world.server.come_back().await?;
    world.ready(topology.view()).await?;
    ensure!(name_of(topology.view(), "10.0.1.1") == "shop/front-1");
    Ok(())
}

async fn a_slow_api_server() -> Result<()> {
    let world = World::shop().await?;
    let impatient = Options {
        pace: Pace {
            response: Duration::from_millis(200),
            ..PACE
        },
        ..world.options(Scope::Everything)?
    };
    world.server.set_delay(Duration::from_secs(1));
    let topology = Topology::start(&Source::Kube, impatient).await?;
    // Once is nothing to speak of.
    world
        .wait_for("it is said", || {
            let said = world
                .log
                .lines(&["WARN", "has been silent for", "kind=pods"]);
            !said.is_empty()
        })
        .await?;
    ensure!(world.server.asked_of("pods").len() >= 2 && !topology.view().is_ready());
    world.server.set_delay(Duration::from_millis(20));
    world.ready(topology.view()).await?;
    ensure!(name_of(topology.view(), "10.0.1.1") == "shop/front-1");
    Ok(())
}

async fn a_silent_watch() -> Result<()> {
    let world = World::shop().await?;
    let bookmark = r#"{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"6"}}}"#;
    let silent = Reply::new(200, format!("{bookmark}\n")).end(End::Silence);
    world.server.reply_once("pods", Verb::Watch, silent);
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    world
        .server
        .put("pods", pod("back-1", "node-2", "10.0.2.9"));
    // Such a server sends bookmarks: without any, the connection must be dead.
    world
        .wait_for_name(&topology, "10.0.2.9", "shop/back-1")
        .await?;
    ensure_asked(
        &world.server.asked_of("pods"),
        &[
            "list resourceVersion=0",
            "watch resourceVersion=6",
            "watch resourceVersion=6",
        ],
    )
}

async fn a_list_that_breaks_off() -> Result<()> {
    let world = World::shop().await?;
    let half = r#"{"metadata":{"resourceVersion":"6"},"items":[{"metadata":{"name":"x","#;
    for end in [End::Broken, End::Whole, End::Silence] {
        let reply = Reply::new(200, half).end(end);
        world.server.reply_once("pods", Verb::List, reply);
    }
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    ensure!(topology.view().index().pods().count() == 2);
    let lists = world.server.asked_of("pods");
    ensure!(
        lists
            .iter()
            .filter(|asked| asked.starts_with("list"))
            .count()
            == 4,
        "{lists:?}"
    );
    Ok(())
}

async fn nonsense() -> Result<()> {
    let world = World::shop().await?;
    for body in [
        "",
        "<html>502</html>",
        "{}",
        r#"{"items": [], "metadata": {}}"#,
    ] {
        world
            .server
            .reply_once("pods", Verb::List, Reply::new(200, body));
    }
    for line in [
        "<html>\n",
        "{}\n",
        "{\"type\": \"MODIFIED\", \"object\": {}}\n",
    ] {
        world
            .server
            .reply_once("pods", Verb::Watch, Reply::new(200, line));
    }
    let topology = world.listen().await?;
    world.ready(topology.view()).await?;
    world
        .server
        .put("pods", pod("back-1", "node-2", "10.0.2.9"));
    world
        .wait_for_name(&topology, "10.0.2.9", "shop/back-1")
        .await?;
    ensure!(
        !world
            .log
            .lines(&["WARN", "not what an API server says"])
            .is_empty()
    );
    ensure!(topology.view().knowledge()[&Kind::Nodes] == Knowledge::Current);
    Ok(())
}

async fn a_malformed_object() -> Result<()> {
    let world = World::shop().await?;
    let mut malformed = pod("odd-1", "node-1", "10.0.1.300");
    world.server.put("pods", malformed.clone());
    let topology = world.follow().await?;
    ensure!(topology.view().index().pods().count() == 2);
    malformed["spec"]["containers"] = 7.into();
    world.server.put("pods", malformed);
    world
        .wait_for("the object and the field are named", || {
            !world
                .log
                .lines(&["WARN", "left out", "odd-1", "spec.containers"])
                .is_empty()
        })
        .await?;
    world
        .server
        .put("pods", pod("odd-1", "node-1", "10.0.1.30"));
    world
        .wait_for_name(&topology, "10.0.1.30", "shop/odd-1")
        .await?;
    ensure!(world.server.asked_of("pods").len() == 2);
    Ok(())
}

async fn nothing_is_ready_before_everything() -> Result<()> {
    let world = World::shop().await?;
    for _ in 0..3 {
        let later = Reply::new(503, "{}").in_parts(1);
        world.server.reply_once("services", Verb::List, later);
    }
    let topology = world.listen().await?;
    world
        .wait_for("pods are known", || {
            topology.view().knowledge()[&Kind::Pods] == Knowledge::Current
        })
        .await?;
    ensure!(!topology.view().is_ready());
    world.ready(topology.view()).await?;
    ensure!(topology.view().knowledge()[&Kind::Services] == Knowledge::Current);
    world
        .wait_for("it is said", || {
            world
                .log
                .lines(&["the cluster's objects are known", "pods=2"])
                .len()
                == 1
        })
        .await
}
