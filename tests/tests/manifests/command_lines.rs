//! The programs' own definitions decide what a command line may be.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use agent::args::{Args, Resolve};
use clap::{Command, CommandFactory as _, Parser as _};
use flow::source::Source;
use k8s_openapi::api::core::v1::{Container, PodTemplateSpec};

use crate::load::{container, load, spec};

/// The command line, the image's entry point being the program.
pub(crate) fn words<'a>(program: &'a str, container: &'a Container) -> Vec<&'a str> {
    assert!(container.command.is_none());
    let args = container.args.iter().flatten().map(String::as_str);
    [program].into_iter().chain(args).collect()
}

/// Asserts that the program reads each variable that the container sets.
fn reads_all_variables(command: &Command, container: &Container) {
    let known: Vec<&str> = command
        .get_arguments()
        .filter_map(|argument| argument.get_env()?.to_str())
        .collect();
    for variable in container.env.iter().flatten() {
        assert!(
            known.contains(&variable.name.as_str()),
            "{} is none of {known:?}",
            variable.name
        );
    }
}

/// Where the volume that this path lies in is mounted.
fn volume_of<'a>(template: &'a PodTemplateSpec, path: &Path) -> &'a str {
    let mounts = container(template).volume_mounts.iter().flatten();
    let mount = mounts
        .filter(|mount| path.starts_with(&mount.mount_path))
        .max_by_key(|mount| mount.mount_path.len())
        .unwrap_or_else(|| panic!("{} is in no volume", path.display()));
    &mount.name
}

#[test]
fn the_agent_accepts_its_command_line() {
    let manifests = load();
    let template = manifests.agent();
    let container = container(template);
    let args = Args::try_parse_from(words("microshield-agent", container)).unwrap();
    reads_all_variables(&Args::command(), container);

    let service = &manifests.services[0];
    let ports = service.spec.as_ref().unwrap().ports.as_ref().unwrap();
    let wanted = format!(
        "ws://{}:{}/agents",
        service.metadata.name.as_ref().unwrap(),
        ports[0].port
    );
    let [generator] = args.output.generator.as_slice() else {
        panic!("one address is expected");
    };
    assert_eq!(generator.to_string(), wanted);
    let credentials = args.stream.credentials();
    let token = credentials.token.unwrap();
    assert_eq!(volume_of(template, token.path()), "token");
    let spool = args.stream.spool.unwrap();
    assert_eq!(volume_of(template, &spool), "spool");

    assert_eq!(args.topology.source(), Source::Kube);
    assert_eq!(args.resolve, Resolve::Both);
}

#[test]
fn the_generator_accepts_its_command_line() {
    let manifests = load();
    let template = manifests.generator();
    let container = container(template);
    let variables = container.env.iter().flatten();
    let ledger = variables
        .filter(|variable| variable.name == "MICROSHIELD_DATA_DIR")
        .find_map(|variable| variable.value.as_deref())
        .unwrap();
    // This process's own environment stays as it is: what the variable says is said by the flag.
    let mut words = words("microshield", container);
    words.extend(["--data-dir", ledger]);
    let mut command = generator::cli::command();
    let matches = command.try_get_matches_from_mut(words).unwrap();
    let (word, args) = matches.subcommand().unwrap();
    assert_eq!(word, "serve");
    reads_all_variables(command.find_subcommand(word).unwrap(), container);

    let listen: &SocketAddr = args.get_one("listen").unwrap();
    let ports = container.ports.iter().flatten();
    let ports: Vec<i32> = ports.map(|port| port.container_port).collect();
    assert_eq!(ports, [i32::from(listen.port())]);
    assert!(listen.ip().is_unspecified());

    let output: &PathBuf = args.get_one("output").unwrap();
    for folder in [output, Path::new(ledger)] {
        let volume = volume_of(template, folder);
        let volumes = spec(template).volumes.iter().flatten();
        let mut kept = volumes.filter(|volume| volume.persistent_volume_claim.is_some());
        assert!(kept.any(|kept| kept.name == volume), "{volume}");
    }
    // kubectl applies a folder without those below it, and the ledger is not to lie in it.
    assert!(!Path::new(ledger).starts_with(output) && !output.starts_with(ledger));
}
