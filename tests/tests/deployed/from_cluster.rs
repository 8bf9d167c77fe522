//! `kubectl microshield … --from-cluster`: the real command line, through an API server that forwards ports as a real one does,
//! to a real generator.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use agent::{
    collector::Report,
    metrics::Meter,
    uplink::{Config, Credentials, Uplink},
};
use anyhow::{Context as _, Result, ensure};
use flow::{
    record::FlowRecord,
    time::Timestamp,
    transport::ClientFiles,
    wire::{AGENTS_PATH, Encoding, Resolve, SUBPROTOCOL, Window},
};
use lab::{
    apiserver::ApiServer,
    binary,
    deployment::{self, kustomize},
    truth,
};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
};

use crate::test;

const PODS: &str = "namespaces/microshield/pods";
const POD: &str = "microshield-generator-0";

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("from_cluster::every_word", || async {
            every_word(&[], &[]).await
        }),
        test("from_cluster::with_mutual_tls", || async {
            let folder = tempfile::tempdir()?;
            let path = certificates(folder.path())?;
            let serve = [
                "--tls-cert",
                &path("generator/tls.crt"),
                "--tls-key",
                &path("generator/tls.key"),
                "--client-ca",
                &path("generator/ca.crt"),
            ];
            let shown = [
                "--ca",
                &path("reader/ca.crt"),
                "--tls-cert",
                &path("reader/tls.crt"),
                "--tls-key",
                &path("reader/tls.key"),
            ];
            every_word(&serve, &shown).await
        }),
        test("from_cluster::what_goes_wrong_is_said", what_goes_wrong),
        test(
            "from_cluster::accounts_of_other_namespaces_are_strangers",
            strangers,
        ),
        test("from_cluster::a_url_does_as_well", a_url),
        test("from_cluster::help_is_in_the_name_of_kubectl", help),
    ]
}

/// A generator with two edges, and the way to it.
struct Cluster {
    folder: tempfile::TempDir,
    api: ApiServer,
    generator: Generator,
    /// The generator's pod.
    pod: Value,
}

/// A running `microshield serve`; killed when dropped.
pub(crate) struct Generator {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Drop for Generator {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Cluster {
    async fn start(options: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let api = ApiServer::start().await?;
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig, None)?;
        // Agents are none of this test's business: they report before anything is encrypted.
        let generator = Generator::start(folder.path(), &kubeconfig, &[])?;
        feed(&api, folder.path(), generator.address).await?;
        drop(generator);
        let generator = Generator::start(folder.path(), &kubeconfig, options)?;
        // As the deployment has it, and with the options.
        let objects = kustomize::render(&deployment::folder().join("base"))?;
        let deployment = objects.iter().find(|object| object["kind"] == "Deployment");
        let mut pod = deployment.context("no Deployment")?["spec"]["template"].clone();
        pod["metadata"]["name"] = POD.into();
        pod["metadata"]["namespace"] = "microshield".into();
        pod["status"] = json!({"conditions": [{"type": "Ready", "status": "True"}]});
        let args = pod["spec"]["containers"][0]["args"].as_array_mut();
        let options = options.iter().map(|option| Value::from(*option));
        args.context("no arguments")?.extend(options);
        api.put(PODS, pod.clone());
        api.forward(POD, 8765, generator.address);
        Ok(Self {
            folder,
            api,
            generator,
            pod,
        })
    }

    /// `kubectl-microshield WORDS --from-cluster`, on a thread of its own: the API server is in this process.
    async fn plugin(&self, words: &[&str]) -> Result<Output> {
        let words = [words, &["--from-cluster"]].concat();
        run(plugin(self.folder.path())?, self.folder.path(), &words).await
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }
}

/// What an agent saw, by the agent's own uplink. It returns when that is stored.
async fn feed(api: &ApiServer, folder: &Path, address: SocketAddr) -> Result<()> {
    let account = "microshield/microshield-agent";
    let token = api.token(account, "microshield", Some("node-1"));
    let file = folder.join("token");
    fs::write(&file, token)?;
    let config = Config {
        urls: vec![
            format!("ws://{address}/agents")
                .parse()
                .map_err(anyhow::Error::msg)?,
        ],
        node: "node-1".to_owned(),
        resolve: Resolve::Both,
        capabilities: vec!["tcp".to_owned()],
        view: None,
        encoding: Encoding::MessagePack,
        credentials: Credentials {
            token: Some(file.display().to_string().parse()?),
            tls: ClientFiles::default(),
        },
    };
    let (sender, reports) = mpsc::channel(1);
    let moment = Timestamp::from_nanos(1_000_000_000_000_000_000);
    let report = Report {
        window: Window {
            from: moment,
            to: moment,
        },
        records: vec![record("web", "api", 8080)?, record("api", "db", 5432)?],
        losses: BTreeMap::from([("ring_full".to_owned(), 3)]),
        receipt: None,
    };
    sender.send(report).await?;
    drop(sender);
    let uplink = Uplink::new(config, None, reports, Meter::default());
    let left = uplink.run().await;
    ensure!(left.lost == 0, "{left:?}");
    Ok(())
}

fn record(client: &str, server: &str, port: u16) -> Result<FlowRecord> {
    let end = |name: &str| {
        json!({"pod": {"id": format!("{name};<pod>"), "namespace": "shop", "name": format!("{name}-1"),
            "labels": {"app": name}}, "service": {}})
    };
    Ok(serde_json::from_value(json!({
        "timestamp": 1_000_000_000, "hostname": "node-1", "count": 7, "direction": "egress", "sources": ["ebpf"],
        "tuple": {"src_addr": "10.0.1.2", "src_port": 0, "dst_addr": "10.0.2.3", "dst_port": port},
        "src": end(client), "dst": end(server),
    }))?)
}

impl Generator {
    /// With the accounts of the deployment.
    pub(crate) fn start(folder: &Path, kubeconfig: &Path, options: &[&str]) -> Result<Self> {
        let mut child = Command::new(binary("microshield")?)
            .env_clear()
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(folder.join("ledger"))
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args([
                "--token-audience=microshield",
                "--agent-account=microshield/microshield-agent",
                "--reader-account=microshield/microshield-reader",
            ])
            .args(options)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = child.stderr.take().context("no standard error")?;
        let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let address = loop {
            let line = lines.next().with_context(|| said.join("\n"))?;
            if let Some((_, address)) = line.split_once("listening address=") {
                break address.trim().parse()?;
            }
            said.push(line);
        };
        // It is to have somewhere to write to as long as it lives.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(Self { child, address })
    }
}

/// The program under the name that kubectl looks for.
fn plugin(folder: &Path) -> Result<PathBuf> {
    let path = folder.join("kubectl-microshield");
    if !path.exists() {
        symlink(binary("microshield")?, &path)?;
    }
    Ok(path)
}

async fn run(program: PathBuf, folder: &Path, words: &[&str]) -> Result<Output> {
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("KUBECONFIG", folder.join("kubeconfig"))
        .args(words)
        .current_dir(folder)
        .stdin(Stdio::null());
    Ok(tokio::task::spawn_blocking(move || command.output()).await??)
}

fn out(output: &Output) -> Result<String> {
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {error}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

async fn every_word(serve: &[&str], shown: &[&str]) -> Result<()> {
    let cluster = Cluster::start(serve).await?;
    let plugin = async |words: &[&str]| cluster.plugin(&[words, shown].concat()).await;
    let policies = cluster.path("policies");

    let status = plugin(&["status", "--json"]).await?;
    let status: Value = serde_json::from_str(&out(&status)?)?;
    ensure!(status["ledger"]["observations"] == 2, "{status}");
    ensure!(status["version"] == env!("CARGO_PKG_VERSION"), "{status}");

    let generated = plugin(&["generate", "-n", "shop", "-g", "svc", "-o", &policies, "-a"]).await?;
    let said = out(&generated)?;
    ensure!(said.contains("ring_full"), "the loss is not told: {said}");
    let mut files: Vec<String> = fs::read_dir(&policies)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    files.sort();
    ensure!(
        files == ["policy-api-1.yaml", "policy-db-1.yaml", "policy-web-1.yaml"],
        "{files:?}"
    );
    let strict = [
        "generate", "-n", "shop", "-g", "svc", "-o", &policies, "-a", "--strict",
    ];
    ensure!(!plugin(&strict).await?.status.success());

    let audited = plugin(&["audit", "-p", &policies]).await?;
    ensure!(audited.status.success(), "{audited:?}");
    let of_cluster = plugin(&["audit", "-p", &policies, "--topology", "kube"]).await?;
    ensure!(of_cluster.status.success(), "{of_cluster:?}");
    ensure!(!cluster.api.asked_of("pods").is_empty());
    let explained = plugin(&["explain", "-p", &policies, "shop/policy-db-1"]).await?;
    ensure!(out(&explained)?.contains("5432"), "{explained:?}");
    let edges = plugin(&["export", "--edges"]).await?;
    ensure!(out(&edges)?.contains("shop/api-1"), "{edges:?}");
    let records = out(&plugin(&["export"]).await?)?;
    ensure!(
        truth::records(records.lines().map(str::as_bytes))?.len() == 2
            && records.lines().count() == 3,
        "two edges and what was lost: {records}"
    );
    // What is missing is found.
    fs::remove_file(Path::new(&policies).join("policy-web-1.yaml"))?;
    fs::write(
        Path::new(&policies).join("policy-web-1.yaml"),
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed, namespace: shop}\n\
         spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress]}\n",
    )?;
    let audited = plugin(&["audit", "-p", &policies]).await?;
    ensure!(audited.status.code() == Some(1), "{audited:?}");

    // The generator's pod was looked for by its labels.
    let asked = cluster.api.asked_of(PODS);
    ensure!(
        !asked.is_empty() && asked.iter().all(|asked| asked.contains("labelSelector=")),
        "{asked:?}"
    );
    Ok(())
}

async fn what_goes_wrong() -> Result<()> {
    let cluster = Cluster::start(&[]).await?;
    let failure = async |words: &[&str]| -> Result<String> {
        let output = cluster.plugin(&[&["status"], words].concat()).await?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for (words, reasons) in [
        (
            ["--generator-namespace", "elsewhere"],
            ["there is no pod with the labels", "--context"],
        ),
        (
            ["--context", "missing"],
            ["kubeconfig: ", "failed to load current context"],
        ),
        (
            ["--kubeconfig", "/nonexistent"],
            ["kubeconfig /nonexistent: ", "No such file or directory"],
        ),
    ] {
        let said = failure(&words).await?;
        for reason in reasons {
            ensure!(said.matches(reason).count() == 1, "{reason}: {said}");
        }
    }

    // Nobody listens at the port.
    let gone: SocketAddr = "127.0.0.1:1".parse()?;
    cluster.api.forward(POD, 8765, gone);
    let said = failure(&[]).await?;
    ensure!(
        said.contains("generator in namespace microshield")
            && said.contains("connect to localhost:8765"),
        "{said}"
    );
    cluster.api.forward(POD, 8765, cluster.generator.address);

    // A token of another's is not taken instead.
    fs::write(cluster.path("wrong"), "no-such-token\n")?;
    let said = failure(&["--token-file", &cluster.path("wrong")]).await?;
    ensure!(said.contains("401 Unauthorized"), "{said}");

    cluster.api.close("/token");
    let said = failure(&[]).await?;
    ensure!(
        said.contains("no token of service account microshield/microshield-reader")
            && said.contains("forbidden"),
        "{said}"
    );
    cluster.api.close("/portforward");
    let said = failure(&["--token-file", &cluster.path("wrong")]).await?;
    ensure!(
        said.contains("port 8765 of pod microshield-generator-0 cannot be forwarded"),
        "{said}"
    );
    Ok(())
}

/// Who may make accounts and pods in one namespace may call them as they are called in another.
async fn strangers() -> Result<()> {
    let cluster = Cluster::start(&[]).await?;
    let address = cluster.generator.address;
    let shown = async |account: &str, path: &str| -> Result<u16> {
        let token = cluster.api.token(account, "microshield", Some("node-1"));
        let mut stream = TcpStream::connect(address).await?;
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).await?;
        Ok(std::str::from_utf8(&answer[9..])?.parse()?)
    };
    for (account, path, status) in [
        ("microshield/microshield-agent", AGENTS_PATH, 101),
        ("elsewhere/microshield-agent", AGENTS_PATH, 401),
        ("microshield/microshield-reader", "/v1/status", 200),
        ("elsewhere/microshield-reader", "/v1/status", 401),
        // Nor does either do what the other may.
        ("microshield/microshield-reader", AGENTS_PATH, 401),
        ("microshield/microshield-agent", "/v1/status", 401),
    ] {
        let answered = shown(account, path).await?;
        ensure!(answered == status, "{account} at {path}: {answered}");
    }

    // A pod that says it is a generator is not asked for another namespace's token on its word.
    let mut pod = cluster.pod.clone();
    let args = pod["spec"]["containers"][0]["args"].as_array_mut();
    let args = args.context("no arguments")?;
    args.retain(|arg| {
        !arg.as_str()
            .unwrap_or_default()
            .starts_with("--reader-account")
    });
    args.push("--reader-account=kube-system/admin".into());
    cluster.api.put(PODS, pod);
    let output = cluster.plugin(&["status"]).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1)
            && said.contains("the account kube-system/admin is not of its own namespace"),
        "{output:?}"
    );
    Ok(())
}

async fn a_url() -> Result<()> {
    let cluster = Cluster::start(&[]).await?;
    let token = cluster
        .api
        .token("microshield/microshield-reader", "microshield", None);
    fs::write(cluster.path("token"), token)?;
    let url = format!("http://{}", cluster.generator.address);
    let policies = cluster.path("policies");
    let words = [
        "generate",
        "-n",
        "shop",
        "-g",
        "svc",
        "-o",
        &policies,
        "-a",
        "--url",
        &url,
        "--token-file",
        &cluster.path("token"),
    ];
    out(&run(
        plugin(cluster.folder.path())?,
        cluster.folder.path(),
        &words,
    )
    .await?)?;
    ensure!(Path::new(&policies).join("policy-db-1.yaml").is_file());
    Ok(())
}

async fn help() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let plugin = plugin(folder.path())?;
    for (program, name) in [
        (plugin, "kubectl microshield"),
        (binary("microshield")?, "microshield"),
    ] {
        let help = run(program, folder.path(), &["generate", "--help"]).await?;
        let help = out(&help)?;
        let usage = format!("\nUsage: {name} generate [OPTIONS]");
        ensure!(help.contains(&usage), "{help}");
    }
    Ok(())
}

/// Makes certificates, and tells where they are.
fn certificates(folder: &Path) -> Result<impl Fn(&str) -> String> {
    let script = deployment::folder().join("components/mtls/certificates.sh");
    let output = Command::new("sh").arg(script).arg(folder).output()?;
    out(&output)?;
    let folder = folder.to_owned();
    Ok(move |name: &str| folder.join(name).display().to_string())
}
