//! The programs' own definitions decide what a command line may be.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use agent::args::{Args, Resolve};
use clap::{ArgMatches, Command, CommandFactory as _, Parser as _};
use flow::source::Source;
use k8s_openapi::api::core::v1::{Container, PodTemplateSpec};

use lab::deployment::FEATURES;

use crate::load::{container, load, spec, with};

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
pub(crate) fn volume_of<'a>(template: &'a PodTemplateSpec, path: &Path) -> &'a str {
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

/// The options of `serve` on the container's command line.
pub(crate) fn serve(container: &Container) -> ArgMatches {
    let mut words = words("microshield", container);
    // This process's own environment stays as it is: what the variable says is said by the flag.
    words.extend(["--data-dir", ledger(container)]);
    let mut matches = generator::cli::command()
        .try_get_matches_from(words)
        .unwrap_or_else(|error| panic!("{error}"));
    let (word, args) = matches.remove_subcommand().unwrap();
    assert_eq!(word, "serve");
    args
}

fn ledger(container: &Container) -> &str {
    let mut variables = container.env.iter().flatten();
    variables
        .find(|variable| variable.name == "MICROSHIELD_DATA_DIR")
        .and_then(|variable| variable.value.as_deref())
        .unwrap()
}

#[test]
fn the_generator_accepts_its_command_line() {
    let manifests = load();
    let template = manifests.generator();
    let container = container(template);
    let args = serve(container);
    let command = generator::cli::command();
    reads_all_variables(command.find_subcommand("serve").unwrap(), container);

    let address = |option| -> SocketAddr { *args.get_one(option).unwrap() };
    let addresses = [address("listen"), address("metrics")];
    let ports = container.ports.iter().flatten();
    let ports: Vec<i32> = ports.map(|port| port.container_port).collect();
    assert_eq!(ports, addresses.map(|address| i32::from(address.port())));
    assert!(
        addresses
            .iter()
            .all(|address| address.ip().is_unspecified())
    );

    let output: &PathBuf = args.get_one("output").unwrap();
    let ledger = Path::new(ledger(container));
    for folder in [output, ledger] {
        let volume = volume_of(template, folder);
        let volumes = spec(template).volumes.iter().flatten();
        let mut kept = volumes.filter(|volume| volume.persistent_volume_claim.is_some());
        assert!(kept.any(|kept| kept.name == volume), "{volume}");
    }
    // kubectl applies a folder without those below it, and the ledger is not to lie in it.
    assert!(!ledger.starts_with(output) && !output.starts_with(ledger));
}

#[test]
fn the_programs_accept_what_every_feature_adds() {
    for feature in FEATURES {
        let all = with(feature);
        let agent = words("microshield-agent", container(all.agent()));
        if let Err(error) = Args::try_parse_from(agent) {
            panic!("{feature}: {error}");
        }
        serve(container(all.generator()));
    }
}

/// As `extraArgs` of the chart and patches of kustomize add them: after what the manifests say.
#[test]
fn what_is_added_counts_instead() {
    let manifests = load();
    let container_of_agent = container(manifests.agent());
    let mut agent = words("microshield-agent", container_of_agent);
    agent.extend(container_of_agent.args.iter().flatten().map(String::as_str));
    agent.extend(["--topology=file=/cluster.yaml", "--spool-bytes", "1048576"]);
    let args = Args::try_parse_from(agent).unwrap();
    assert_eq!(args.topology.source(), Source::File("/cluster.yaml".into()));
    assert_eq!(args.stream.spool_bytes, 1_048_576);

    let mut generator = container(manifests.generator()).clone();
    let given = generator.args.get_or_insert_default();
    given.extend(given[1..].to_vec());
    given.extend(["--listen=[::]:9000", "-gns", "-nshop"].map(str::to_owned));
    let args = serve(&generator);
    let listen: SocketAddr = *args.get_one("listen").unwrap();
    assert_eq!(listen.to_string(), "[::]:9000");
    let granularity = args.get_raw("granularity").unwrap().next_back();
    assert_eq!(granularity.unwrap(), "ns");
    let namespaces: Vec<&String> = args.get_many("namespaces").unwrap().collect();
    assert_eq!(namespaces, ["shop"]);
    assert!(!args.get_flag("all_namespaces"));
}

#[test]
fn every_flag_has_an_environment_variable() {
    let lacking = |command: &Command| -> Vec<String> {
        let flags = command
            .get_arguments()
            .filter(|arg| arg.get_long().is_some());
        flags
            .filter(|arg| arg.get_env().is_none())
            .map(|arg| format!("{} --{}", command.get_name(), arg.get_long().unwrap()))
            .collect()
    };
    for command in [Args::command(), generator::cli::command()] {
        assert_eq!(lacking(&command), [""; 0]);
        for word in command.get_subcommands() {
            assert_eq!(lacking(word), [""; 0]);
        }
    }
}
