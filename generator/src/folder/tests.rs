use std::{
    os::unix::fs::{MetadataExt, symlink},
    panic::{AssertUnwindSafe, catch_unwind, panic_any},
};

use tempfile::TempDir;

use super::*;

fn policy(namespace: &str, rules: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\n  labels:\n    \
         {MANAGED_BY_LABEL}: {MANAGED_BY}\n  name: policy-web\n  namespace: {namespace}\nspec:\n  ingress: {rules}\n"
    )
}

fn files(files: &[(&str, &str)]) -> BTreeMap<String, String> {
    files
        .iter()
        .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
        .collect()
}

fn only(namespace: &str) -> Namespaces {
    Namespaces::Only([namespace.to_owned()].into())
}

/// All regular files of the folder.
fn contents(folder: &Path) -> BTreeMap<String, String> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                fs::read_to_string(entry.path()).unwrap(),
            )
        })
        .collect()
}

#[test]
fn a_folder_is_made_and_kept_up_to_date() {
    let dir = TempDir::new().unwrap();
    let folder = dir.path().join("policies/shop");
    let (one, other) = (policy("shop", "[]"), policy("shop", "[{}]"));

    let changes = write(
        &folder,
        &files(&[("a.yaml", &one), ("b.yaml", &one)]),
        &only("shop"),
    )
    .unwrap();
    assert_eq!(changes.written, ["a.yaml", "b.yaml"]);

    let before = fs::metadata(folder.join("a.yaml")).unwrap();
    assert_eq!(before.mode() & 0o444, 0o444);
    let expected = files(&[("a.yaml", &one), ("c.yaml", &other)]);
    let changes = write(&folder, &expected, &only("shop")).unwrap();
    assert_eq!(changes.unchanged, ["a.yaml"]);
    assert_eq!(changes.written, ["c.yaml"]);
    assert_eq!(changes.removed, ["b.yaml"]);
    let after = fs::metadata(folder.join("a.yaml")).unwrap();
    assert_eq!(
        (before.ino(), before.modified().unwrap()),
        (after.ino(), after.modified().unwrap())
    );
    assert_eq!(contents(&folder), expected);

    let changes = write(&folder, &expected, &only("shop")).unwrap();
    assert_eq!(changes.unchanged, ["a.yaml", "c.yaml"]);
    assert!(changes.written.is_empty() && changes.removed.is_empty());

    let changed = files(&[("a.yaml", &other), ("c.yaml", &other)]);
    assert_eq!(
        write(&folder, &changed, &only("shop")).unwrap().written,
        ["a.yaml"]
    );
    assert_eq!(contents(&folder), changed);
}

#[test]
fn what_is_not_ours_stays() {
    let ours = policy("shop", "[]");
    let foreign = [
        ("by-hand.yaml", ours.replace("microshield", "helm")),
        ("appended.yaml", format!("{ours}---\nkind: ConfigMap\n")),
        (
            "calico.yaml",
            ours.replace("networking.k8s.io/v1", "crd.projectcalico.org/v1"),
        ),
        ("configmap.yaml", ours.replace("NetworkPolicy", "ConfigMap")),
        ("broken.yaml", "{".to_owned()),
        ("list.yml", "- a\n- b\n".to_owned()),
        ("other-namespace.yaml", policy("bank", "[]")),
    ];
    let dir = TempDir::new().unwrap();
    for (name, text) in &foreign {
        fs::write(dir.path().join(name), text).unwrap();
    }
    fs::write(dir.path().join("notes.txt"), &ours).unwrap();
    let before = contents(dir.path());

    let changes = write(
        dir.path(),
        &files(&[("policy-web.yaml", &ours)]),
        &only("shop"),
    )
    .unwrap();
    assert_eq!(
        changes.kept,
        [
            "appended.yaml",
            "broken.yaml",
            "by-hand.yaml",
            "calico.yaml",
            "configmap.yaml",
            "list.yml",
            "other-namespace.yaml"
        ]
    );
    assert_eq!(changes.written, ["policy-web.yaml"]);
    let mut expected = before;
    expected.insert("policy-web.yaml".to_owned(), ours.clone());
    assert_eq!(contents(dir.path()), expected);

    let name = "policy-web.yaml";
    for (_, text) in foreign {
        fs::write(dir.path().join(name), &text).unwrap();
        let wanted = files(&[("a-new.yaml", &ours), (name, &ours)]);
        let error = write(dir.path(), &wanted, &only("shop")).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert_eq!(contents(dir.path())[name], text);
        assert!(!dir.path().join("a-new.yaml").exists());
    }
}

#[test]
fn links_and_folders_are_not_ours() {
    let dir = TempDir::new().unwrap();
    let elsewhere = dir.path().join("elsewhere");
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    fs::write(&elsewhere, policy("shop", "[]")).unwrap();
    symlink(&elsewhere, folder.join("link.yaml")).unwrap();
    fs::create_dir(folder.join("folder.yaml")).unwrap();

    let changes = write(&folder, &files(&[]), &only("shop")).unwrap();
    assert_eq!(changes.kept, ["folder.yaml", "link.yaml"]);
    for name in ["link.yaml", "folder.yaml"] {
        let wanted = files(&[(name, "kind: NetworkPolicy")]);
        let error = write(&folder, &wanted, &only("shop")).unwrap_err();
        assert!(matches!(error, FolderError::Foreign { .. }), "{error}");
    }
    assert_eq!(fs::read_to_string(elsewhere).unwrap(), policy("shop", "[]"));
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = write(&file.join("folder"), &files(&[]), &Namespaces::All).unwrap_err();
    assert!(error.to_string().contains("file/folder"), "{error}");
}

/// What a run is stopped by, in place of a loss of power.
struct Crash;

/// Writes, and crashes before the step with this number, from 0. Returns the steps that were reached; `None` if there were
/// not so many.
fn write_until(
    folder: &Path,
    wanted: &BTreeMap<String, String>,
    crash_before: usize,
) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    let run = catch_unwind(AssertUnwindSafe(|| {
        write_in_steps(folder, wanted, &only("shop"), &mut |step| {
            steps.push(step);
            if steps.len() > crash_before {
                panic_any(Crash);
            }
        })
        .unwrap();
    }));
    match run {
        Ok(()) => None,
        Err(payload) if payload.is::<Crash>() => Some(steps),
        Err(other) => std::panic::resume_unwind(other),
    }
}

fn hidden(folder: &Path) -> Vec<String> {
    let names = contents(folder).into_keys();
    names
        .filter(|name| name.starts_with(".microshield"))
        .collect()
}

fn visible(folder: &Path) -> BTreeMap<String, String> {
    let mut files = contents(folder);
    files.retain(|name, _| !name.starts_with('.'));
    files
}

#[test]
fn a_crash_at_any_step_leaves_the_old_set_or_the_new_one() {
    let (one, other) = (policy("shop", "[]"), policy("shop", "[{}]"));
    let foreign = ("by-hand.yaml", "kind: NetworkPolicy\n");
    let kept = ("same.yaml", one.as_str());
    let old = files(&[
        ("a.yaml", &one),
        ("b.yaml", &one),
        ("c.yaml", &one),
        kept,
        foreign,
    ]);
    let wanted = files(&[
        ("b.yaml", &other),
        ("c.yaml", &other),
        ("d.yaml", &one),
        kept,
    ]);
    let new = {
        let mut new = wanted.clone();
        new.extend(files(&[foreign]));
        new
    };
    let mut crashes = Vec::new();
    loop {
        let dir = TempDir::new().unwrap();
        for (name, text) in &old {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let inode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().ino();
        let untouched = (inode("same.yaml"), inode("by-hand.yaml"));
        let Some(steps) = write_until(dir.path(), &wanted, crashes.len()) else {
            break;
        };
        let decided = steps[..steps.len() - 1].contains(&Step::Decide);
        if !decided {
            assert_eq!(visible(dir.path()), old, "{steps:?}");
        }
        recover(dir.path()).unwrap();
        assert_eq!(
            visible(dir.path()),
            if decided { &new } else { &old }.clone(),
            "{steps:?}"
        );
        assert_eq!(hidden(dir.path()), [""; 0], "{steps:?}");
        assert_eq!((inode("same.yaml"), inode("by-hand.yaml")), untouched);
        write(dir.path(), &wanted, &only("shop")).unwrap();
        assert_eq!(visible(dir.path()), new, "{steps:?}");
        crashes.push(steps.last().copied().unwrap());
    }
    use Step::{CleanUp, Decide, Place, Remove, Sync, Write, WriteJournal};
    assert_eq!(
        crashes,
        [
            Write,
            Write,
            Write,
            WriteJournal,
            Sync,
            Decide,
            Sync,
            Place,
            Place,
            Place,
            Remove,
            Sync,
            CleanUp
        ]
    );
}

#[test]
fn a_crash_while_another_is_made_up_for_is_made_up_for() {
    let (one, other) = (policy("shop", "[]"), policy("shop", "[{}]"));
    let old = files(&[("a.yaml", &one), ("b.yaml", &one)]);
    let new = files(&[("b.yaml", &other), ("c.yaml", &other)]);
    // The first run crashes between placing its two files, the second again and again while it completes the first.
    let first = [
        Step::Write,
        Step::Write,
        Step::WriteJournal,
        Step::Sync,
        Step::Decide,
        Step::Sync,
        Step::Place,
        Step::Place,
    ];
    for second in 0.. {
        let dir = TempDir::new().unwrap();
        write(dir.path(), &old, &only("shop")).unwrap();
        assert_eq!(
            write_until(dir.path(), &new, first.len() - 1).unwrap(),
            first
        );
        assert_eq!(visible(dir.path()).len(), 2);
        if write_until(dir.path(), &new, second).is_none() {
            break;
        }
        recover(dir.path()).unwrap();
        assert_eq!(contents(dir.path()), new);
    }
}

#[test]
fn a_place_that_another_hand_took_meanwhile_stays_theirs() {
    let dir = TempDir::new().unwrap();
    let one = policy("shop", "[]");
    let wanted = files(&[("a.yaml", &one), ("b.yaml", &one)]);
    let steps = write_until(dir.path(), &wanted, 6).unwrap();
    assert_eq!(steps.last(), Some(&Step::Place));
    fs::write(dir.path().join("b.yaml"), "kind: ConfigMap\n").unwrap();
    recover(dir.path()).unwrap();
    let expected = files(&[("a.yaml", &one), ("b.yaml", "kind: ConfigMap\n")]);
    assert_eq!(contents(dir.path()), expected);
}

#[test]
fn a_failure_before_the_decision_leaves_nothing_behind() {
    let dir = TempDir::new().unwrap();
    let one = policy("shop", "[]");
    // Stands where the third new text would be written.
    fs::create_dir(dir.path().join(".microshield-2.tmp")).unwrap();
    let wanted = files(&[("a.yaml", &one), ("b.yaml", &one), ("c.yaml", &one)]);
    let error = write(dir.path(), &wanted, &only("shop")).unwrap_err();
    assert!(error.to_string().contains(".microshield-2.tmp"), "{error}");
    let names = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    assert_eq!(names.collect::<Vec<_>>(), [".microshield-2.tmp"]);
}

#[test]
fn a_journal_of_another_hand_is_refused() {
    for text in [
        "",
        "[]",
        r#"{"place": [[".microshield-0.tmp", "../a.yaml"]], "remove": []}"#,
        r#"{"place": [["/etc/passwd", "a.yaml"]], "remove": []}"#,
        r#"{"place": [], "remove": ["x/../a.yaml"]}"#,
        r#"{"place": [], "remove": ["a.yaml/"]}"#,
    ] {
        let dir = TempDir::new().unwrap();
        let journal = dir.path().join(".microshield.journal");
        fs::write(&journal, text).unwrap();
        let error = write(dir.path(), &files(&[]), &only("shop")).unwrap_err();
        assert!(
            matches!(&error, FolderError::Journal { path } if *path == journal),
            "{error}"
        );
    }
}
