//! The documentation says what there is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use clap::CommandFactory as _;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// All Rust files below some folders, with string literals in one piece.
fn sources(folders: &[&str]) -> String {
    let mut text = String::new();
    let mut folders: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&fs::read_to_string(path).unwrap());
            }
        }
    }
    let mut lines = text.split("\\\n");
    let mut joined = lines.next().unwrap().to_owned();
    for line in lines {
        joined.push_str(line.trim_start());
    }
    joined
}

/// What stands between backquotes.
fn code(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Each message in the tables of symptoms is one that a program has; what is left out of it there is `…` or `N`.
#[test]
fn messages_are_those_of_the_programs() {
    let sources = sources(&["agent/src", "agent-common/src", "flow/src", "generator/src"]);
    let others = [
        "Operation not permitted",
        "forbidden: violates PodSecurity",
        "MountVolume.SetUp failed",
        "secret \"microshield-agent-tls\" not found",
        "invalid peer certificate",
        "microshield-agent-tls",
        "Pending",
        "privileged",
    ];
    let text = read("docs/troubleshooting.md");
    let mut checked = 0;
    for row in text.lines().filter(|line| line.starts_with("| ")) {
        let symptom = row.split(" | ").next().unwrap();
        for message in code(symptom) {
            for part in message.split(['…', 'N']) {
                let part = part.trim().trim_matches(|c: char| "():, ".contains(c));
                let known = others.iter().any(|other| part.contains(other));
                // Names and options are in other places, too.
                if known || part.len() < 9 || part.contains("microshield/") {
                    continue;
                }
                checked += 1;
                assert!(sources.contains(part), "`{part}` of `{message}`");
            }
        }
    }
    assert!(checked > 40, "{checked}");
}

/// The lines that a text has people type, each in one piece and without what follows `#`.
fn typed(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for block in text.split("\n```").skip(1).step_by(2) {
        let Some((kind @ ("sh" | "console"), block)) = block.split_once('\n') else {
            continue;
        };
        for line in block.replace("\\\n", " ").lines() {
            let line = match kind {
                "sh" => Some(line),
                _ => line.strip_prefix("$ "),
            };
            let line = line.map(|line| line.split(" #").next().unwrap_or_default());
            lines.extend(line.map(str::to_owned));
        }
    }
    lines
}

/// Every command line of ours that is to be typed, the program takes: its words and options are those of the program.
#[test]
fn commands_are_those_of_the_programs() {
    let mut checked = 0;
    for file in DOCUMENTS {
        for line in typed(&read(file)) {
            let line = line.replace("kubectl microshield ", "microshield ");
            let words: Vec<&str> = line.split_whitespace().collect();
            let command = match words.first() {
                Some(&"microshield") => generator::cli::command(),
                Some(&"microshield-agent") => agent::args::Args::command(),
                _ => continue,
            };
            checked += 1;
            if let Err(error) = command.try_get_matches_from(words) {
                panic!("{file}: {line}: {error}");
            }
        }
    }
    assert!(checked > 8, "{checked}");
}

/// Files and folders of this repository in what is to be typed are there.
#[test]
fn commands_name_files_that_there_are() {
    let mut checked = 0;
    for file in DOCUMENTS {
        for line in typed(&read(file)) {
            let words = line.split([' ', '=', '\'']);
            let ours = words.filter(|word| *word == "deploy" || word.starts_with("deploy/"));
            for path in ours {
                checked += 1;
                assert!(root().join(path).exists(), "{file}: {line}");
            }
        }
    }
    assert!(checked > 6, "{checked}");
}

const DOCUMENTS: [&str; 6] = [
    "README.md",
    "deploy/README.md",
    "docs/beside-scope.md",
    "docs/first-policy.md",
    "docs/install.md",
    "docs/troubleshooting.md",
];

/// Files that the documentation leads to.
#[test]
fn links_lead_somewhere() {
    let mut files = vec!["README.md".to_owned(), "deploy/README.md".to_owned()];
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        files.push(format!("docs/{name}"));
    }
    for file in files {
        let text = read(&file);
        let folder = Path::new(&file).parent().unwrap();
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            if link.starts_with("http") {
                continue;
            }
            let (path, section) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                PathBuf::from(&file)
            } else {
                folder.join(path)
            };
            assert!(root().join(&target).exists(), "{file}: {link}");
            if !section.is_empty() {
                let text = read(target.to_str().unwrap());
                let headings = text.lines().filter(|line| line.starts_with('#'));
                let mut slugs = headings.map(slug);
                assert!(slugs.any(|slug| slug == section), "{file}: {link}");
            }
        }
    }
}

/// As the place where the repository is shown makes anchors of headings.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text
        .chars()
        .filter(|c| c.is_alphanumeric() || *c == ' ' || *c == '-' || *c == '_');
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}
