//! The demonstration's edges and files.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use generator::ledger::{Edge, Ledger};
use lab::{Agent, AgentOptions, Cluster, Generator, GeneratorOptions, Lab, bookinfo};

use crate::Test;

pub(crate) fn tests() -> Vec<Test> {
    vec![Test::new(
        "bookinfo::edges_and_policies",
        edges_and_policies,
    )]
}

/// How long traffic flows: some twenty requests a second, so both replicas of reviews get some.
const TRAFFIC: Duration = Duration::from_secs(3);

fn edges_and_policies() -> Result<()> {
    let lab = Lab::start(bookinfo::cluster(Cluster::apart()))?;
    let folder = lab.folder().join("policies");
    let options = GeneratorOptions::default().output(&folder, bookinfo::NAMESPACE, "svc");
    let mut generator = Generator::start(&lab, &options)?;
    let agents = ["node-1", "node-2"]
        .map(|node| Agent::start(&lab, &AgentOptions::streaming(node, &generator)));
    let programs = bookinfo::start(&lab)?;
    thread::sleep(TRAFFIC);
    drop(programs);
    for agent in agents {
        let capture = agent?.stop()?;
        ensure!(capture.losses.is_empty(), "lost: {:?}", capture.losses);
    }
    generator.stop()?;

    let mut ledger = Ledger::default();
    for record in generator.export()? {
        ledger.observe(record);
    }
    let edges: String = ledger.edges().iter().map(line).collect();
    check(
        "edges.txt",
        &BTreeMap::from([("edges.txt".to_owned(), edges)]),
    )?;
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(&folder).context("the policies")? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        files.insert(format!("policies/{name}"), fs::read_to_string(&path)?);
    }
    check("policies", &files)
}

/// What does not vary of an edge: not its count, not its times.
fn line(edge: &Edge) -> String {
    format!(
        "{} -> {} {}/{}, seen by {}\n",
        edge.client,
        edge.server,
        edge.port,
        edge.protocol,
        generator::policy::SeenBy::of(edge).name()
    )
}

/// Compares files with those in `tests/fixtures/bookinfo`, or replaces these where `UPDATE_GOLDEN` is set.
fn check(part: &str, files: &BTreeMap<String, String>) -> Result<()> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bookinfo");
    if env::var_os("UPDATE_GOLDEN").is_some() {
        let old = golden.join(part);
        if old.is_dir() {
            fs::remove_dir_all(&old)?;
        }
        for (name, text) in files {
            let path = golden.join(name);
            fs::create_dir_all(path.parent().context("a file without folder")?)?;
            fs::write(path, text)?;
        }
        return Ok(());
    }
    for (name, text) in files {
        let path = golden.join(name);
        let wanted = fs::read_to_string(&path)
            .with_context(|| format!("{}; UPDATE_GOLDEN=1 writes it", path.display()))?;
        ensure!(
            *text == wanted,
            "{name} differs. It is:\n{text}\nand was:\n{wanted}"
        );
    }
    let present = golden_files(&golden.join(part))?;
    ensure!(
        present.len() == files.len(),
        "{part}: {present:?} are too many or too few"
    );
    Ok(())
}

fn golden_files(part: &Path) -> Result<BTreeSet<PathBuf>> {
    if part.is_file() {
        return Ok(BTreeSet::from([part.to_owned()]));
    }
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(part).with_context(|| part.display().to_string())? {
        files.insert(entry?.path());
    }
    Ok(files)
}
