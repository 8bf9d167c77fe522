//! The topology from Weave Scope's app: its recorded answers, from the connection to the index, and an app that misbehaves.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use flow::{
    source::{Access, Kind, Knowledge, Options, Pace, Scope, Source, Topology},
    topology::Index,
};
use lab::scope_app::{Reply, ScopeApp};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{
    log::Log,
    test,
    world::{PACE, name_of, now, wait_for},
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("weave::recorded_reports_in_both_forms", recorded_reports),
        test(
            "weave::what_has_not_changed_is_not_sent_again",
            not_modified,
        ),
        test("weave::what_has_not_changed_is_not_taken_again", unchanged),
        test("weave::an_app_that_fails_for_a_while", failures),
        test("weave::what_does_not_end", endless),
        test("weave::an_app_that_was_started_anew", started_anew),
        test("weave::a_file_that_changes", a_file),
    ]
}

/// The pod `shop/api-…` in the recorded report.
const ADDRESS: &str = "10.244.1.12";
const NAME: &str = "shop/api-56c994bcff-4tg24";

fn recorded(name: &str) -> Result<Vec<u8>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/scope")
        .join(name);
    fs::read(&path).with_context(|| path.display().to_string())
}

struct Weave {
    app: ScopeApp,
    log: Log,
}

impl Weave {
    /// An app with the recorded report.
    async fn recorded() -> Result<Self> {
        let app = ScopeApp::start().await?;
        app.report(
            recorded("report-kubernetes.json")?,
            recorded("report-kubernetes.msgpack")?,
        );
        Ok(Self {
            app,
            log: Log::collect(),
        })
    }

    async fn listen(&self) -> Result<Topology> {
        start(&format!("scope={}", self.app.url())).await
    }

    async fn wait_for(&self, what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
        let context = || {
            format!(
                "{what}\n{}\n{}",
                self.log.text(),
                self.app.asked().join("\n")
            )
        };
        wait_for(&mut is_so).await.with_context(context)
    }

    async fn wait_for_name(&self, topology: &Topology) -> Result<()> {
        let is_named = || name_of(topology.view(), ADDRESS) == NAME;
        self.wait_for("the pod is known", is_named).await?;
        self.wait_for("all is current", || is_current(topology))
            .await
    }

    /// Until so many questions were asked from now on.
    async fn wait_for_questions(&self, count: usize) -> Result<()> {
        let wanted = self.app.asked().len() + count;
        self.wait_for("more questions", || self.app.asked().len() >= wanted)
            .await
    }
}

async fn start(source: &str) -> Result<Topology> {
    let source: Source = source.parse().map_err(anyhow::Error::msg)?;
    let options = Options {
        access: Access::default(),
        scope: Scope::Everything,
        jitter: Duration::ZERO,
        pace: PACE,
    };
    Ok(Topology::start(&source, options).await?)
}

fn is_current(topology: &Topology) -> bool {
    let known = topology.view().knowledge();
    known.get(&Kind::Pods) == Some(&Knowledge::Current)
}

/// All that the index says of pods, services and namespaces.
fn contents(index: &Index) -> Vec<String> {
    let pods = index.pods().map(|pod| format!("{pod:?}"));
    let services = index.services().map(|service| format!("{service:?}"));
    let namespaces = index.namespaces().map(|namespace| format!("{namespace:?}"));
    let mut all: Vec<String> = pods.chain(services).chain(namespaces).collect();
    all.sort();
    all.push(format!("{:?}", index.counts()));
    all
}

async fn recorded_reports() -> Result<()> {
    let weave = Weave::recorded().await?;
    let of_app = weave.listen().await?;
    ensure!(!of_app.view().is_ready());
    weave.wait_for_name(&of_app).await?;
    ensure!(of_app.view().is_ready());
    let question = weave.app.asked().remove(0);
    for line in [
        "get /api/report http/1.1\r\n",
        "\r\naccept: application/msgpack, ",
        "\r\naccept-encoding: gzip\r\n",
    ] {
        ensure!(question.contains(line), "{question}");
    }
    // The form that was not asked for.
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("report.json");
    fs::write(&path, recorded("report-kubernetes.json")?)?;
    let of_file = start(&format!("scope={}", path.display())).await?;
    let of_app = contents(&of_app.view().index());
    ensure!(of_app.len() == 19 + 8 + 7 + 1, "{of_app:#?}");
    ensure!(of_app == contents(&of_file.view().index()));
    Ok(())
}

async fn not_modified() -> Result<()> {
    let weave = Weave::recorded().await?;
    weave.app.tag("a1");
    let topology = weave.listen().await?;
    weave.wait_for_name(&topology).await?;
    weave.wait_for_questions(2).await?;
    let asked = weave.app.asked();
    let tagged = |question: &String| question.contains("if-none-match: \"a1\"");
    ensure!(
        !tagged(&asked[0]) && asked[1..].iter().all(tagged),
        "{asked:?}"
    );
    ensure!(is_current(&topology));
    Ok(())
}

/// Two reports of one state have other times and another order.
async fn unchanged() -> Result<()> {
    let weave = Weave::recorded().await?;
    let topology = weave.listen().await?;
    weave.wait_for_name(&topology).await?;
    let before = contents(&topology.view().index());
    let mut report: Value = serde_json::from_slice(&recorded("report-kubernetes.json")?)?;
    report["TS"] = json!("2026-11-22T00:00:00Z");
    for topology in ["Pod", "Service", "Namespace"] {
        let nodes = report[topology]["nodes"].as_object_mut().context("nodes")?;
        for node in nodes.values_mut() {
            let latest = node["latest"].as_object_mut().context("latest")?;
            for value in latest.values_mut() {
                value["timestamp"] = json!("2026-11-22T00:00:00Z");
            }
        }
    }
    weave.app.report_value(&report)?;
    weave.wait_for_questions(3).await?;
    ensure!(contents(&topology.view().index()) == before);
    let taken = || weave.log.lines(&["the cluster has changed"]).len();
    ensure!(taken() == 0, "{}", weave.log.text());

    let nodes = report["Pod"]["nodes"].as_object_mut().context("pods")?;
    nodes.retain(|_, node| node["latest"]["kubernetes_ip"]["value"] != ADDRESS);
    weave.app.report_value(&report)?;
    weave
        .wait_for("the pod is gone", || {
            !topology
                .view()
                .index()
                .pods()
                .any(|pod| NAME.ends_with(&pod.name))
        })
        .await?;
    weave.wait_for_questions(2).await?;
    ensure!(taken() == 1, "{}", weave.log.text());
    Ok(())
}

async fn failures() -> Result<()> {
    let cases: [(&str, Vec<Reply>, &str); 9] = [
        ("500", vec![Reply::Status(500, "")], "Scope says 500"),
        (
            "503",
            vec![Reply::Status(503, "Retry-After: 1\r\n")],
            "Scope says 503",
        ),
        ("401", vec![Reply::Status(401, "")], "show a password (401)"),
        (
            "404",
            vec![Reply::Status(404, "")],
            "the app answers at /api/report",
        ),
        (
            "redirect",
            vec![Reply::Status(302, "Location: /login\r\n")],
            "Scope says 302",
        ),
        (
            "cut",
            vec![Reply::Cut; 2],
            "the connection to Scope was lost",
        ),
        (
            "stall",
            vec![Reply::Stall; 2],
            "Scope has been silent for 2s",
        ),
        (
            "html",
            vec![Reply::Bytes(b"<html>".to_vec())],
            "neither JSON nor MessagePack",
        ),
        (
            "other json",
            vec![Reply::Bytes(b"{\"Pod\": 7}".to_vec())],
            "expected a topology",
        ),
    ];
    for (what, replies, complaint) in cases {
        let weave = Weave::recorded().await?;
        let count = replies.len();
        // Before anything is known, and then again.
        weave.app.reply(replies.clone());
        let topology = weave.listen().await?;
        weave.wait_for_questions(count).await?;
        weave.wait_for_name(&topology).await.context(what)?;
        let complaints = |word: &str| weave.log.lines(&["WARN", complaint, word]).len();
        let at_first = "nothing is named before";
        ensure!(complaints(at_first) == 1, "{what}:\n{}", weave.log.text());
        weave.app.reply(replies);
        weave.wait_for(what, || !is_current(&topology)).await?;
        ensure!(name_of(topology.view(), ADDRESS) == NAME, "{what}");
        weave.wait_for_name(&topology).await.context(what)?;
        let later = "going on with what is known";
        ensure!(complaints(later) == 1, "{what}:\n{}", weave.log.text());
        ensure!(
            weave.log.lines(&["INFO", "Scope is heard again"]).len() == 2,
            "{what}"
        );
    }
    Ok(())
}

async fn endless() -> Result<()> {
    const MUCH: u64 = 200 << 20;
    for (junk, complaint) in [
        (Reply::Junk(b"", b'x', MUCH), "neither JSON nor MessagePack"),
        (
            Reply::Junk(b"{\"Pod\": {\"nodes\": {\"", b'x', MUCH),
            "a node of more than",
        ),
        (
            Reply::Junk(b"\x81\xdb\xff\xff\xff\xff", b'x', MUCH),
            "a node of more than",
        ),
        (
            Reply::Junk(b"{\"TS\": ", b'[', MUCH),
            "recursion limit|a node of more than",
        ),
        (Reply::Dribble, "has not ended after 1s"),
        (Reply::Silence, "has been silent for"),
    ] {
        let weave = Weave::recorded().await?;
        weave.app.reply([junk.clone(), junk.clone()]);
        let source: Source = format!("scope={}", weave.app.url())
            .parse()
            .map_err(anyhow::Error::msg)?;
        let options = Options {
            access: Access::default(),
            scope: Scope::Everything,
            jitter: Duration::ZERO,
            pace: Pace {
                report: Duration::from_secs(1),
                response: Duration::from_millis(500),
                ..PACE
            },
        };
        let topology = Topology::start(&source, options).await?;
        let said = || {
            let mut words = complaint.split('|');
            words.any(|word| !weave.log.lines(&["WARN", word]).is_empty())
        };
        weave.wait_for(complaint, said).await?;
        let taken = weave.app.written();
        // A node's worth, and what the system's buffers hold.
        ensure!(taken < 24 << 20, "{complaint}: {taken} bytes");
        drop(topology);
    }
    Ok(())
}

async fn started_anew() -> Result<()> {
    let weave = Weave::recorded().await?;
    let topology = weave.listen().await?;
    weave.wait_for_name(&topology).await?;
    let pods = |count: usize| -> Result<Value> {
        let mut report: Value = serde_json::from_slice(&recorded("report-kubernetes.json")?)?;
        let nodes = report["Pod"]["nodes"].as_object_mut().context("pods")?;
        let kept: Vec<_> = nodes.keys().take(count).cloned().collect();
        nodes.retain(|id, _| kept.contains(id));
        Ok(report)
    };
    let known = || topology.view().index().pods().count();

    // Nothing at all: it has heard of nobody yet.
    let empty = pods(0)?;
    weave.app.report_value(&empty)?;
    weave
        .wait_for("nothing is not believed", || !is_current(&topology))
        .await?;
    ensure!(known() == 19);
    weave
        .wait_for("and said", || {
            !weave
                .log
                .lines(&["WARN", "the report has no pods"])
                .is_empty()
        })
        .await?;

    // Few, for a moment.
    weave
        .app
        .reply([Reply::Bytes(pods(3)?.to_string().into_bytes())]);
    weave.app.report(
        recorded("report-kubernetes.json")?,
        recorded("report-kubernetes.msgpack")?,
    );
    weave.wait_for_questions(3).await?;
    ensure!(known() == 19);
    let doubts = weave.log.lines(&[
        "WARN",
        "believed if it says so again",
        "known=19",
        "found=3",
    ]);
    ensure!(doubts.len() == 1, "{}", weave.log.text());

    // Few, and it insists.
    weave.app.report_value(&pods(3)?)?;
    weave.wait_for("it is believed", || known() == 3).await
}

async fn a_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("report");
    fs::write(&path, recorded("report-kubernetes.msgpack")?)?;
    let source = format!("scope={}", path.display());
    let topology = start(&source).await?;
    ensure!(topology.view().is_ready());
    ensure!(name_of(topology.view(), ADDRESS) == NAME);
    fs::write(&path, recorded("report-live.json")?)?;
    wait_for(&mut || name_of(topology.view(), "10.244.0.21") == "demo/web").await?;
    let gone = topology
        .view()
        .index()
        .resolve_client(ADDRESS.parse()?, now());
    ensure!(
        gone.to_string() == NAME,
        "what has ended is known for a while: {gone}"
    );

    fs::write(&path, "nonsense")?;
    match start(&source).await {
        Err(error) => ensure!(
            error.to_string().contains("neither JSON nor MessagePack"),
            "{error}"
        ),
        Ok(_) => bail!("nonsense is taken for a report"),
    }
    Ok(())
}
