//! MicroShield's own `generator.py`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;

use crate::{contents, fixtures, microshield};

/// Of the records that `link` makes it makes the same policies as of those of its own `linker.py`, and it takes records with
/// all that ours have besides.
pub(crate) fn makes_the_same_of_our_records(folder: &Path) {
    let original = Original::new(folder);
    let microshields = fixtures().join("../microshield");
    let ours = original.dir.path().join("flows.json");
    microshield(
        &microshields,
        &[
            "link",
            "--log",
            "flows.log",
            "--topology",
            "scope=report.json",
            "-o",
            ours.to_str().unwrap(),
        ],
    );
    for namespace in ["default", "sock-shop"] {
        for granularity in ["ns", "svc", "pod"] {
            let [theirs, of_ours] = [&microshields.join("linked.json"), &ours]
                .map(|records| original.generate(records, namespace, granularity));
            assert!(!theirs.is_empty(), "{namespace} {granularity}");
            assert_eq!(of_ours, theirs, "{namespace} {granularity}");
        }
    }
    let policies = original.generate(&fixtures().join("shop.json"), "shop", "svc");
    assert!(!policies.is_empty());
}

/// A copy of it: it writes beside where it is.
struct Original {
    dir: TempDir,
}

impl Original {
    fn new(folder: &Path) -> Self {
        let dir = TempDir::new().unwrap();
        for name in ["generator.py", "templates.py"] {
            let from = folder.join("policy-generator").join(name);
            fs::copy(&from, dir.path().join(name))
                .unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        }
        Self { dir }
    }

    /// What it makes of a file of records, all of it chosen.
    fn generate(
        &self,
        records: &Path,
        namespace: &str,
        granularity: &str,
    ) -> BTreeMap<String, String> {
        let output = Command::new("python3")
            .arg("generator.py")
            .args(["-a", "-o", "made", "-n", namespace, "-g", granularity, "-f"])
            .arg(records)
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let made: PathBuf = self.dir.path().join("policies/made");
        contents(&made)
    }
}
