//! The Dockerfile says of each image what `cargo xtask image` says of it.

use std::{collections::BTreeSet, fs};

use lab::deployment;

use crate::load::{container, load};

/// The instructions of each stage that ends in an image, by the stage's name.
fn stages() -> Vec<(String, BTreeSet<String>)> {
    let text = fs::read_to_string(deployment::folder().join("Dockerfile")).unwrap();
    let mut stages = Vec::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("FROM ") {
            let (_, name) = rest.split_once(" AS ").unwrap();
            stages.push((name.to_owned(), BTreeSet::new()));
        } else if !line.is_empty() && !line.starts_with('#') {
            stages.last_mut().unwrap().1.insert(line.to_owned());
        }
    }
    stages
}

#[test]
fn it_has_what_the_manifests_expect() {
    let manifests = load();
    let [build, agent, generator] = stages().try_into().unwrap();
    let command = "RUN cargo xtask image --arch \"$TARGETARCH\" --tree --output /images";
    assert!(build.1.contains(command), "{build:?}");
    for ((name, stage), template, user) in [
        (agent, manifests.agent(), "USER 0:0"),
        (generator, manifests.generator(), "USER 65532:65532"),
    ] {
        let container = container(template);
        assert_eq!(container.image.as_deref(), Some(name.as_str()));
        assert!(stage.contains(user), "{name}: {stage:?}");
        let entry_point = format!("ENTRYPOINT [\"/usr/bin/{name}\"]");
        assert!(stage.contains(&entry_point), "{name}: {stage:?}");
        assert!(stage.contains(&format!("COPY --from=build /images/{name}/ /")));
        // `kubectl exec … -- microshield export` finds it.
        assert!(stage.contains("ENV PATH=/usr/bin"));
    }
}
