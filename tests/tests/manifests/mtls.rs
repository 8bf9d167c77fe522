//! With `mtls`, agents and generator show each other the certificates that `certificates.sh` makes.

use std::{fs, path::Path, process::Command, sync::Arc};

use agent::args::Args;
use clap::Parser as _;
use flow::transport::{ClientFiles, ServerFiles, ServerTls};
use lab::deployment;
use tokio_rustls::{TlsAcceptor, TlsConnector, rustls::pki_types::ServerName};

use crate::{
    command_lines::{serve, volume_of, words},
    load::{container, spec, with},
};

/// Runs the script; `kubectl` is not called. Returns the commands that it prints.
fn make_certificates(folder: &Path) -> Vec<String> {
    let script = deployment::folder().join("components/mtls/certificates.sh");
    let output = Command::new("sh")
        .arg(script)
        .arg(folder)
        .env("PATH", std::env::var_os("PATH").unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let printed = String::from_utf8(output.stdout)
        .unwrap()
        .replace("\\\n", "");
    printed.lines().map(str::to_owned).collect()
}

/// Of Secrets that are there, too: certificates are renewed.
#[test]
fn what_is_printed_makes_the_secrets_and_renews_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    for _ in 0..2 {
        let commands = make_certificates(folder.path());
        let commands: Vec<Vec<&str>> = commands
            .iter()
            .map(|command| command.split_whitespace().collect())
            .collect();
        assert_eq!(commands.len(), 2);
        for (command, part) in commands.iter().zip(["agent", "generator"]) {
            let secret = format!("microshield-{part}-tls");
            let files = ["ca.crt", "tls.crt", "tls.key"]
                .map(|name| format!("--from-file={path}/{part}/{name}"));
            let (make, apply) = command.split_at(command.len() - 5);
            assert_eq!(apply, ["|", "kubectl", "apply", "-f", "-"]);
            let wanted = ["create", "secret", "generic", "--dry-run=client", "yaml"];
            let wanted = wanted.into_iter().chain([secret.as_str()]);
            for word in wanted.chain(files.iter().map(String::as_str)) {
                assert!(make.contains(&word), "{word}: {make:?}");
            }
        }
    }
}

#[tokio::test]
async fn the_certificates_are_good_for_each_other_and_for_nothing_else() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for folder in &folders {
        make_certificates(folder.path());
    }
    let [ours, others] = folders;
    let file = |folder: &Path, name: &str| folder.join(name);
    let server = ServerTls::new(ServerFiles {
        cert: file(ours.path(), "generator/tls.crt"),
        key: file(ours.path(), "generator/tls.key"),
        client_ca: Some(file(ours.path(), "generator/ca.crt")),
    })
    .unwrap();
    let client = |ca: &Path, identity: Option<(&Path, &str)>| ClientFiles {
        ca: Some(file(ca, "agent/ca.crt")),
        identity: identity.map(|(folder, of)| {
            let file = |name: &str| folder.join(of).join(name);
            (file("tls.crt"), file("tls.key"))
        }),
    };
    let (ours, others) = (ours.path(), others.path());
    for (files, name, good) in [
        (
            client(ours, Some((ours, "agent"))),
            "microshield-generator",
            true,
        ),
        (
            client(ours, Some((ours, "agent"))),
            "microshield-generator.microshield.svc",
            true,
        ),
        (client(ours, Some((ours, "agent"))), "another", false),
        (client(ours, None), "microshield-generator", false),
        (
            client(ours, Some((others, "agent"))),
            "microshield-generator",
            false,
        ),
        // Each is for its own side.
        (
            client(ours, Some((ours, "generator"))),
            "microshield-generator",
            false,
        ),
        (
            client(others, Some((ours, "agent"))),
            "microshield-generator",
            false,
        ),
    ] {
        let (near, far) = tokio::io::duplex(1 << 16);
        let acceptor = TlsAcceptor::from(server.config());
        let connector = TlsConnector::from(Arc::new(files.config().unwrap()));
        let name = ServerName::try_from(name).unwrap();
        let (accepted, connected) =
            tokio::join!(acceptor.accept(far), connector.connect(name.clone(), near));
        assert_eq!(
            accepted.is_ok() && connected.is_ok(),
            good,
            "{name:?} {files:?}"
        );
    }
    // Keys are for their owner's eyes.
    let mode = fs::metadata(file(ours, "agent/tls.key"))
        .unwrap()
        .permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o077, 0);
}

#[test]
fn both_programs_are_given_their_certificates() {
    let all = with("mtls");
    let agent = all.agent();
    let args = Args::try_parse_from(words("microshield-agent", container(agent))).unwrap();
    let [generator] = args.output.generator.as_slice() else {
        panic!("one address is expected");
    };
    assert_eq!(
        generator.to_string(),
        "wss://microshield-generator:8765/agents"
    );
    let tls = args.stream.credentials().tls;
    let (cert, key) = tls.identity.unwrap();
    let serve = serve(container(all.generator()));
    let of_serve = |option: &str| serve.get_one::<std::path::PathBuf>(option).unwrap().clone();
    for (template, secret, paths) in [
        (agent, "microshield-agent-tls", [tls.ca.unwrap(), cert, key]),
        (
            all.generator(),
            "microshield-generator-tls",
            ["client_ca", "tls_cert", "tls_key"].map(of_serve),
        ),
    ] {
        for (path, file) in paths.iter().zip(["ca.crt", "tls.crt", "tls.key"]) {
            assert_eq!(path.file_name().unwrap(), file);
            let volume = volume_of(template, path);
            let volumes = spec(template).volumes.as_ref().unwrap();
            let volume = volumes.iter().find(|one| one.name == volume).unwrap();
            let mounted = volume.secret.as_ref().unwrap();
            assert_eq!(mounted.secret_name.as_deref(), Some(secret));
        }
    }
}
