//! A real kube-apiserver with its etcd, as `KUBEBUILDER_ASSETS` names them by the convention of envtest, and a real `kubectl`.

use std::{
    env, fs,
    io::Write as _,
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use flow::source::Access;
use serde_json::Value;
use tempfile::TempDir;

/// Far longer than the two take to start on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(180);

/// The folder with the programs.
///
/// # Errors
/// Why there is none.
pub fn assets() -> Result<PathBuf> {
    let folder = env::var_os("KUBEBUILDER_ASSETS").context("KUBEBUILDER_ASSETS is not set")?;
    let folder = PathBuf::from(folder);
    for program in ["kube-apiserver", "etcd"] {
        let path = folder.join(program);
        ensure!(path.is_file(), "{} is missing", path.display());
    }
    Ok(folder)
}

/// A running API server; ends with its etcd when dropped.
#[derive(Debug)]
pub struct RealApi {
    folder: TempDir,
    address: String,
    kubectl: PathBuf,
    _apiserver: Running,
    _etcd: Running,
}

#[derive(Debug)]
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl RealApi {
    /// Starts both. There are two users: `admin`, who may do everything, and `viewer`, who may do nothing yet.
    ///
    /// # Errors
    /// If a program is missing, or does not become ready.
    pub async fn start() -> Result<Self> {
        let assets = assets()?;
        let folder = tempfile::tempdir()?;
        let path = |name: &str| folder.path().join(name).display().to_string();
        let (client, peer, secure) = (free_port()?, free_port()?, free_port()?);
        let etcd_url = format!("http://127.0.0.1:{client}");
        let peer_url = format!("http://127.0.0.1:{peer}");
        let etcd = run(
            &assets.join("etcd"),
            folder.path(),
            &[
                ("data-dir", path("etcd")),
                ("listen-client-urls", etcd_url.clone()),
                ("advertise-client-urls", etcd_url.clone()),
                ("listen-peer-urls", peer_url.clone()),
                ("initial-advertise-peer-urls", peer_url.clone()),
                ("initial-cluster", format!("default={peer_url}")),
            ],
        )?;
        let key = Command::new("openssl")
            .args(["genrsa", "-traditional", "-out", &path("key"), "2048"])
            .stderr(Stdio::null())
            .status()
            .context("openssl")?;
        ensure!(key.success(), "openssl: {key}");
        fs::write(
            path("tokens"),
            "admin,admin,1,system:masters\nviewer,viewer,2\n",
        )?;
        let apiserver = run(
            &assets.join("kube-apiserver"),
            folder.path(),
            &[
                ("etcd-servers", etcd_url),
                ("cert-dir", path("certificates")),
                ("bind-address", "127.0.0.1".to_owned()),
                ("secure-port", secure.to_string()),
                ("service-cluster-ip-range", "10.96.0.0/16".to_owned()),
                ("authorization-mode", "RBAC".to_owned()),
                ("token-auth-file", path("tokens")),
                ("service-account-issuer", "https://localhost".to_owned()),
                ("service-account-key-file", path("key")),
                ("service-account-signing-key-file", path("key")),
                // Nobody is there to make accounts for pods.
                ("disable-admission-plugins", "ServiceAccount".to_owned()),
            ],
        )?;
        let beside = assets.join("kubectl");
        let kubectl = if beside.is_file() {
            beside
        } else {
            "kubectl".into()
        };
        let api = Self {
            folder,
            address: format!("https://127.0.0.1:{secure}"),
            kubectl,
            _apiserver: apiserver,
            _etcd: etcd,
        };
        for user in ["admin", "viewer"] {
            api.kubeconfig(user, user)?;
        }
        api.wait_until_ready().await?;
        Ok(api)
    }

    /// As whom to reach it.
    #[must_use]
    pub fn access(&self, user: &str) -> Access {
        Access {
            kubeconfig: Some(self.folder.path().join(user)),
            context: None,
        }
    }

    /// Makes a kubeconfig of a name, with a token.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(name);
        let server = &self.address;
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters: [{{name: test, cluster: {{server: '{server}', insecure-skip-tls-verify: true}}}}]\n\
             contexts: [{{name: test, context: {{cluster: test, user: test}}}}]\n\
             users: [{{name: test, user: {{token: {token}}}}}]\n"
        );
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Runs kubectl as `admin`, and returns what it prints.
    ///
    /// # Errors
    /// If it fails, with what it says.
    pub fn kubectl(&self, words: &[&str], input: Option<&Value>) -> Result<String> {
        let mut child = Command::new(&self.kubectl)
            .arg("--kubeconfig")
            .arg(self.folder.path().join("admin"))
            .arg(format!(
                "--cache-dir={}",
                self.folder.path().join("cache").display()
            ))
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("kubectl")?;
        if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
            stdin.write_all(input.to_string().as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "kubectl {}: {error}",
            words.join(" ")
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    async fn wait_until_ready(&self) -> Result<()> {
        let start = Instant::now();
        while let Err(error) = self.kubectl(&["get", "--raw", "/readyz"], None) {
            if start.elapsed() > PATIENCE {
                let log = fs::read_to_string(self.folder.path().join("kube-apiserver.log"));
                bail!("{error:#}\n{}", log.unwrap_or_default());
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    }
}

fn run(program: &Path, folder: &Path, arguments: &[(&str, String)]) -> Result<Running> {
    let name = program
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let log = fs::File::create(folder.join(format!("{name}.log")))?;
    let child = Command::new(program)
        .args(
            arguments
                .iter()
                .map(|(key, value)| format!("--{key}={value}")),
        )
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| program.display().to_string())?;
    Ok(Running(child))
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}
