//! An API server of one's own, as `setup-envtest` lays out its programs, to try policies on.

use std::{
    collections::BTreeSet,
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

const TOKEN: &str = "golden";

/// How long the API server may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(120);

/// etcd and kube-apiserver, on loopback, as long as this lives.
pub(crate) struct Server {
    kubectl: PathBuf,
    url: String,
    /// Ended in this order.
    _programs: [Running; 2],
    _dir: TempDir,
}

impl Server {
    /// Starts both and waits until the API server answers.
    pub(crate) fn start(assets: &Path) -> Self {
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let [client, peer, secure] = free_ports();
        let etcd_url = format!("http://127.0.0.1:{client}");
        let peer_url = format!("http://127.0.0.1:{peer}");
        let etcd = start(
            &assets.join("etcd"),
            &[
                ("--data-dir", &path("etcd")),
                ("--listen-client-urls", &etcd_url),
                ("--advertise-client-urls", &etcd_url),
                ("--listen-peer-urls", &peer_url),
                ("--initial-advertise-peer-urls", &peer_url),
                ("--initial-cluster", &format!("default={peer_url}")),
            ],
        );
        fs::write(
            path("tokens"),
            format!("{TOKEN},admin,admin,system:masters\n"),
        )
        .unwrap();
        let key = Command::new("openssl")
            .args(["genrsa", "-out", &path("key"), "2048"])
            .output()
            .unwrap();
        assert!(
            key.status.success(),
            "openssl makes the key of service accounts: {key:?}"
        );
        let apiserver = start(
            &assets.join("kube-apiserver"),
            &[
                ("--etcd-servers", &etcd_url),
                ("--cert-dir", &path("certificates")),
                ("--bind-address", "127.0.0.1"),
                ("--secure-port", &secure.to_string()),
                ("--service-cluster-ip-range", "10.96.0.0/16"),
                ("--token-auth-file", &path("tokens")),
                ("--authorization-mode", "RBAC"),
                ("--disable-admission-plugins", "ServiceAccount"),
                ("--service-account-issuer", "https://127.0.0.1"),
                ("--service-account-key-file", &path("key")),
                ("--service-account-signing-key-file", &path("key")),
            ],
        );
        let server = Self {
            kubectl: assets.join("kubectl"),
            url: format!("https://127.0.0.1:{secure}"),
            _programs: [apiserver, etcd],
            _dir: dir,
        };
        let started = Instant::now();
        while !server.kubectl(&["get", "namespaces"]).status.success() {
            assert!(
                started.elapsed() < PATIENCE,
                "the API server does not answer"
            );
            thread::sleep(Duration::from_millis(500));
        }
        server
    }

    /// Has the API server check a folder of policies without keeping them.
    pub(crate) fn apply(&self, folder: &Path) {
        let mut namespaces = BTreeSet::new();
        for entry in fs::read_dir(folder).unwrap() {
            let text = fs::read_to_string(entry.unwrap().path()).unwrap();
            let namespace = text
                .lines()
                .find_map(|line| line.strip_prefix("  namespace: "));
            namespaces.insert(namespace.unwrap().to_owned());
        }
        for namespace in namespaces {
            // It may be there already.
            self.kubectl(&["create", "namespace", &namespace]);
        }
        let folder = folder.to_str().unwrap();
        let output = self.kubectl(&["apply", "--dry-run=server", "--validate=true", "-f", folder]);
        assert!(output.status.success(), "{folder}: {output:?}");
    }

    fn kubectl(&self, args: &[&str]) -> Output {
        Command::new(&self.kubectl)
            .args(["--server", &self.url, "--token", TOKEN])
            .args(["--insecure-skip-tls-verify", "--kubeconfig", "/dev/null"])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

/// A program that ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn start(program: &Path, args: &[(&str, &str)]) -> Running {
    let child = Command::new(program)
        .args(args.iter().map(|(name, value)| format!("{name}={value}")))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
    Running(child)
}

/// Ports that nobody listened on a moment ago.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}
