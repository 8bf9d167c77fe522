//! Who is let in, and what is never shown.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use flow::{
    transport::ClientFiles,
    wire::{Encoding, SUBPROTOCOL},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpSocket, TcpStream},
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};
use tokio_tungstenite::{
    client_async,
    tungstenite::{self, client::IntoClientRequest as _, http::HeaderValue},
};

use crate::{
    client::{Client, flow, hello},
    generator::{Generator, raise_file_limit, run},
};

const AGENTS: &str = "agents-token-7f3a";
const READERS: &str = "readers-token-91bc";

/// What came of asking for a WebSocket: the status, and what was said.
type Refused = (u16, String);

struct Files {
    folder: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        fs::write(self.path(name), text).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }
}

/// Asks for a WebSocket with this token.
async fn ask(
    address: SocketAddr,
    token: Option<&str>,
    tls: Option<&ClientFiles>,
) -> Result<Client, Refused> {
    let mut request = format!("ws://{address}/agents")
        .into_client_request()
        .unwrap();
    let headers = request.headers_mut();
    headers.insert(
        "sec-websocket-protocol",
        HeaderValue::from_static(SUBPROTOCOL),
    );
    if let Some(token) = token {
        headers.insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    let refused = |error| match error {
        tungstenite::Error::Http(response) => {
            let body = String::from_utf8(response.body().clone().unwrap_or_default()).unwrap();
            (response.status().as_u16(), body.trim().to_owned())
        }
        error => (0, error.to_string()),
    };
    let stream = TcpStream::connect(address).await.unwrap();
    let Some(files) = tls else {
        let (socket, _) = client_async(request, stream).await.map_err(refused)?;
        return Ok(Client {
            socket,
            encoding: Encoding::MessagePack,
        });
    };
    let connector = TlsConnector::from(Arc::new(files.config().unwrap()));
    let name = ServerName::try_from("localhost").unwrap();
    let stream = connector
        .connect(name, stream)
        .await
        .map_err(|error| (0, error.to_string()))?;
    match client_async(request, stream).await {
        Ok(_) => Err((101, String::new())),
        Err(error) => Err(refused(error)),
    }
}

async fn refused(address: SocketAddr, token: Option<&str>) -> Refused {
    match ask(address, token, None).await {
        Ok(_) => panic!("let in"),
        Err(refused) => refused,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_opens_what_it_is_for_and_is_never_shown() {
    let files = Files::new();
    let agents = files.write("agents", AGENTS);
    let readers = files.write("readers", READERS);
    let generator = Generator::start(&[
        "--token-file",
        &agents,
        "--read-token-file",
        &readers,
        "--log",
        "trace",
    ]);
    let address = generator.address;
    assert_eq!(
        refused(address, None).await,
        (401, "a bearer token is needed".to_owned())
    );
    for wrong in [READERS, "agents-token-7f3", "agents-token-7f3ab", "x"] {
        assert_eq!(
            refused(address, Some(wrong)).await,
            (401, "the bearer token is not valid here".to_owned())
        );
    }
    let mut agent = ask(address, Some(AGENTS), None).await.unwrap();
    agent.say(&hello("one")).await;
    agent.hear().await.unwrap();
    agent.deliver(1, vec![flow("web", "db", 5432, 3)]).await;

    // A token that is replaced is replaced, without a restart.
    files.write("agents", "another");
    assert_eq!(refused(address, Some(AGENTS)).await.0, 401);
    assert!(ask(address, Some("another"), None).await.is_ok());
    // Who is connected stays.
    agent.deliver(2, vec![flow("web", "db", 5432, 3)]).await;

    let url = format!("http://{address}");
    let status = |token: &str| run(&["status", "--url", &url, "--token-file", token, "--json"]);
    let told = status(&readers);
    assert!(told.status.success(), "{told:?}");
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(told["agents"][0]["node"], "node-1");
    assert_eq!(told["agents"][0]["connected"], true);
    assert_eq!(told["agents"][0]["last_sequence"], 2);
    assert_eq!(told["ledger"]["observations"], 1);
    let refusal = status(&agents);
    assert_eq!(refusal.status.code(), Some(1));
    let said = String::from_utf8(refusal.stderr).unwrap();
    assert!(
        said.contains("401 Unauthorized: the bearer token is not valid"),
        "{said}"
    );
    let table = run(&["status", "--url", &url, "--token-file", &readers]).stdout;
    let table = String::from_utf8(table).unwrap();
    assert!(
        table.contains("1 agents connected") && table.contains("node-1"),
        "{table}"
    );

    let command_line = fs::read(format!("/proc/{}/cmdline", generator.id())).unwrap();
    let log = generator.log();
    let shown = [log.as_bytes(), &command_line, said.as_bytes()].concat();
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("agent connected"));
    for token in [AGENTS, READERS] {
        assert!(!shown.contains(token), "{shown}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_health() {
    let files = Files::new();
    let agents = files.write("agents", AGENTS);
    let readers = files.write("readers", READERS);
    let generator = Generator::start(&["--token-file", &agents, "--read-token-file", &readers]);
    let mut agent = ask(generator.address, Some(AGENTS), None).await.unwrap();
    agent.say(&hello("one")).await;
    agent.hear().await.unwrap();
    agent
        .deliver(
            1,
            vec![flow("web", "db", 5432, 3), flow("web", "db", 80, 1)],
        )
        .await;
    for (path, token, status, part) in [
        ("/healthz", None, 200, "ok"),
        ("/readyz", None, 200, "ready"),
        ("/metrics", None, 401, "a bearer token is needed"),
        ("/metrics", Some(AGENTS), 401, "not valid"),
        (
            "/metrics",
            Some(READERS),
            200,
            "microshield_flows_stored_total 2\n",
        ),
        (
            "/metrics",
            Some(READERS),
            200,
            "microshield_agent_connected{node=\"node-1\"} 1\n",
        ),
        ("/metrics", Some(READERS), 200, "# EOF"),
        ("/v1/status", Some(AGENTS), 401, "not valid"),
        ("/v1/status", Some(READERS), 200, "\"observations\":2"),
    ] {
        let answer = get(generator.address, path, token);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(part),
            "{path}: {answer}"
        );
    }
}

/// Kubelet has neither a token nor a certificate to show.
#[test]
fn watchers_have_an_address_of_their_own_and_hear_no_more_there() {
    let files = Files::new();
    let agents = files.write("agents", AGENTS);
    let authority = Authority::new();
    let ca = files.write("ca", &authority.certificate);
    let (cert, key) = authority.issue("localhost");
    let (cert, key) = (files.write("cert", &cert), files.write("key", &key));
    let generator = Generator::start(&[
        "--metrics",
        "127.0.0.1:0",
        "--token-file",
        &agents,
        "--tls-cert",
        &cert,
        "--tls-key",
        &key,
        "--client-ca",
        &ca,
    ]);
    let line = generator.wait_for_log("metrics address=");
    let (_, address) = line.split_once("address=").unwrap();
    let address: SocketAddr = address.trim().parse().unwrap();
    for (path, status, part) in [
        ("/healthz", 200, "ok"),
        ("/readyz", 200, "ready"),
        ("/metrics", 200, "microshield_agents_connected 0\n"),
        ("/v1/status", 404, "nothing at this path"),
        ("/agents", 404, "nothing at this path"),
    ] {
        let answer = get(address, path, Some(AGENTS));
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(part),
            "{path}: {answer}"
        );
    }
    // Connections that say nothing keep nobody else from being answered.
    let mut silent: Vec<_> = (0..16)
        .map(|_| std::net::TcpStream::connect(address).unwrap())
        .collect();
    let asked = std::time::Instant::now();
    assert!(get(address, "/healthz", None).contains("ok"));
    assert!(asked.elapsed().as_secs() < 30, "{:?}", asked.elapsed());
    // The first of them has made way, and only that.
    let closed = |stream: &mut std::net::TcpStream, within: Duration| {
        stream.set_read_timeout(Some(within)).unwrap();
        stream.read(&mut [0]).is_ok_and(|read| read == 0)
    };
    assert!(closed(&mut silent[0], Duration::from_secs(30)));
    assert!(!closed(&mut silent[1], Duration::from_millis(100)));
    drop(silent);
    let (status, took) = generator.terminate();
    assert!(status.success() && took.as_secs() < 5, "{took:?}");
}

/// One request, over a connection of its own.
fn get(address: SocketAddr, path: &str, token: Option<&str>) -> String {
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let token = token.map_or_else(String::new, |token| {
        format!("Authorization: Bearer {token}\r\n")
    });
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: x\r\n{token}Connection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn nobody_is_left_in_by_mistake() {
    let files = Files::new();
    let empty = files.write("empty", "\n");
    let missing = files.path("missing").to_str().unwrap().to_owned();
    for (args, reason) in [
        (
            vec![],
            "give --token-file, --token-audience or --client-ca, or say --insecure",
        ),
        (vec!["--token-file", &empty], "line 1: there is no token"),
        (vec!["--token-file", &missing], "No such file"),
        (vec!["--tls-cert", &empty], "--tls-key"),
        (vec!["--client-ca", &empty], "--tls-cert"),
        (
            vec!["--insecure", "--tls-cert", &empty, "--tls-key", &empty],
            "no certificate in it",
        ),
        (vec!["--token-audience", "microshield"], "--agent-account"),
        (
            vec!["--insecure", "--reader-account", "a/b"],
            "--token-audience",
        ),
        (
            vec!["--insecure", "--metrics", "192.0.2.1:9465"],
            "cannot listen on 192.0.2.1:9465",
        ),
    ] {
        let mut all = vec!["serve", "--listen", "0.0.0.0:0"];
        all.extend(args);
        let output = run(&all);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(reason), "{said}\nnot: {reason}");
    }
}

/// An authority.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        Self {
            certificate,
            issuer: Issuer::new(params, key),
        }
    }

    /// A certificate for a name, and its key.
    fn issue(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_both_sides_are_checked_and_replaced_without_a_restart() {
    let files = Files::new();
    let (ours, others) = (Authority::new(), Authority::new());
    let ca = files.write("ca", &ours.certificate);
    let install = |authority: &Authority| {
        let (cert, key) = authority.issue("localhost");
        (files.write("cert", &cert), files.write("key", &key))
    };
    let (cert, key) = install(&ours);
    let generator = Generator::start(&["--tls-cert", &cert, "--tls-key", &key, "--client-ca", &ca]);
    let identity = |authority: &Authority, name: &str| {
        let (cert, key) = authority.issue("agent");
        let cert = files.write(&format!("{name}-cert"), &cert);
        let key = files.write(&format!("{name}-key"), &key);
        Some((PathBuf::from(cert), PathBuf::from(key)))
    };
    let with = |ca: &Path, identity| ClientFiles {
        ca: Some(ca.to_owned()),
        identity,
    };
    let asked = async |files: &ClientFiles| match ask(generator.address, None, Some(files)).await {
        Ok(_) => panic!("not encrypted"),
        Err(outcome) => outcome,
    };
    let agent = with(Path::new(&ca), identity(&ours, "agent"));
    assert_eq!(asked(&agent).await.0, 101);
    let stranger = with(Path::new(&ca), identity(&others, "stranger"));
    assert_eq!(asked(&stranger).await.0, 0);
    let nobody = with(Path::new(&ca), None);
    assert_eq!(asked(&nobody).await.0, 0);
    // Who does not encrypt is not understood.
    assert_eq!(refused(generator.address, None).await.0, 0);

    // Half of a replacement is not used, all of it is.
    let (cert, key) = others.issue("localhost");
    files.write("cert", &cert);
    tokio::time::sleep(std::time::Duration::from_millis(1_100)).await;
    assert_eq!(asked(&agent).await.0, 101);
    files.write("key", &key);
    tokio::time::sleep(std::time::Duration::from_millis(1_100)).await;
    let (status, reason) = asked(&agent).await;
    assert_eq!(status, 0, "{reason}");
    let other_ca = files.write("other-ca", &others.certificate);
    let agent = with(Path::new(&other_ca), identity(&ours, "agent"));
    assert_eq!(asked(&agent).await.0, 101);
    generator.wait_for_log("certificate replaced");
}

/// Who expects TLS would take an answer in plain text for a part of it.
#[tokio::test(flavor = "multi_thread")]
async fn who_finds_no_room_is_told_so_where_that_can_be_read() {
    raise_file_limit();
    let files = Files::new();
    let (cert, key) = Authority::new().issue("localhost");
    let (cert, key) = (files.write("cert", &cert), files.write("key", &key));
    let tls = ["--tls-cert", &cert, "--tls-key", &key];
    for (args, answer) in [(&[][..], "HTTP/1.1 503 "), (&tls, "")] {
        let generator = Generator::start(args);
        // Each comes alone, so none of them makes way for another.
        let connect = async |number: u16| {
            let [high, low] = number.to_be_bytes();
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind(([127, 1, high, low], 0).into()).unwrap();
            socket.connect(generator.address).await.unwrap()
        };
        let mut strangers = Vec::new();
        for number in 1..=2_048 {
            strangers.push(connect(number).await);
        }
        let mut heard = String::new();
        let mut more = connect(2_049).await;
        more.read_to_string(&mut heard).await.unwrap();
        assert!(heard.starts_with(answer), "{heard}");
        assert_eq!(heard.is_empty(), answer.is_empty(), "{heard}");
    }
}

/// An API server that knows some tokens, and one pod. Returns its kubeconfig and the number of reviews.
fn api_server(files: &Files) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let reviews = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&reviews);
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            let mut piece = [0; 4096];
            let body = loop {
                let read = stream.read(&mut piece).unwrap();
                request.extend(&piece[..read]);
                let text = String::from_utf8_lossy(&request).into_owned();
                let Some((head, body)) = text.split_once("\r\n\r\n") else {
                    continue;
                };
                let head = head.to_ascii_lowercase();
                let length = head.split_once("content-length: ").map_or(0, |(_, rest)| {
                    rest.lines()
                        .next()
                        .unwrap()
                        .trim()
                        .parse::<usize>()
                        .unwrap()
                });
                if body.len() >= length {
                    break body.to_owned();
                }
            };
            let answer = if request.starts_with(b"POST /apis/authentication.k8s.io/v1/tokenreviews")
            {
                counted.fetch_add(1, Ordering::Relaxed);
                review(&serde_json::from_str(&body).unwrap())
            } else {
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "agent-1", "uid": "u1"},
                    "spec": {"nodeName": "node-1", "containers": []}})
            };
            let answer = answer.to_string();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{answer}",
                answer.len()
            )
            .unwrap();
        }
    });
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "x", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    });
    (files.write("kubeconfig", &kubeconfig.to_string()), reviews)
}

/// As the API server reviews: the token says itself what is true of it.
fn review(asked: &Value) -> Value {
    let account = |name: &str, extra: Value| {
        json!({"authenticated": true, "audiences": ["microshield"],
            "user": {"username": format!("system:serviceaccount:microshield:{name}"), "extra": extra}})
    };
    let key = |name: &str| format!("authentication.kubernetes.io/{name}");
    let status = match asked["spec"]["token"].as_str().unwrap() {
        "on-node-1" => account("agent", json!({key("node-name"): ["node-1"]})),
        "on-node-2" => account("agent", json!({key("node-name"): ["node-2"]})),
        "of-a-pod" => account(
            "agent",
            json!({key("pod-name"): ["agent-1"], key("pod-uid"): ["u1"]}),
        ),
        "of-an-older-pod" => account(
            "agent",
            json!({key("pod-name"): ["agent-1"], key("pod-uid"): ["u0"]}),
        ),
        "of-no-pod" => account("agent", json!({})),
        "of-a-reader" => account("reader", json!({})),
        "of-another" => account("default", json!({key("node-name"): ["node-1"]})),
        "for-another" => {
            let mut status = account("agent", json!({key("node-name"): ["node-1"]}));
            status["audiences"] = json!(["https://kubernetes.default.svc"]);
            status
        }
        _ => json!({"authenticated": false, "error": "token has expired"}),
    };
    json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "metadata": {}, "spec": asked["spec"],
        "status": status})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_account_s_token_reports_for_its_own_node() {
    let files = Files::new();
    let (kubeconfig, reviews) = api_server(&files);
    let generator = Generator::start(&[
        "--token-audience",
        "microshield",
        "--agent-account",
        "microshield/agent",
        "--kubeconfig",
        &kubeconfig,
    ]);
    let address = generator.address;
    for token in ["on-node-1", "of-a-pod"] {
        let mut agent = ask(address, Some(token), None).await.unwrap();
        agent.say(&hello(token)).await;
        agent.hear().await.unwrap();
        agent.deliver(1, vec![flow("web", "db", 5432, 3)]).await;
    }
    // It says that it is of node-1.
    let mut agent = ask(address, Some("on-node-2"), None).await.unwrap();
    agent.say(&hello("other")).await;
    let end = agent.end().await;
    let reason = "the token is of a pod on node node-2, not on node-1";
    assert_eq!(end.refusal.as_deref(), Some(reason));
    for token in [
        "of-an-older-pod",
        "of-no-pod",
        "of-another",
        "for-another",
        "expired",
    ] {
        let refusal = refused(address, Some(token)).await;
        let reason = "the bearer token is not valid here".to_owned();
        assert_eq!(refusal, (401, reason), "{token}");
    }
    let before = reviews.load(Ordering::Relaxed);
    for _ in 0..5 {
        assert!(ask(address, Some("on-node-1"), None).await.is_ok());
        assert_eq!(refused(address, Some("expired")).await.0, 401);
    }
    assert_eq!(reviews.load(Ordering::Relaxed), before, "asked again");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_read_may_not_report_by_a_service_account_either() {
    let files = Files::new();
    let (kubeconfig, reviews) = api_server(&files);
    let common = [
        "--token-audience",
        "microshield",
        "--agent-account",
        "microshield/agent",
        "--kubeconfig",
        &kubeconfig,
    ];
    let readers = ["--reader-account", "microshield/reader"];
    let generator = Generator::start(&[common.as_slice(), &readers].concat());
    let address = generator.address;
    let status = |token| get(address, "/v1/status", token);
    assert!(status(None).starts_with("HTTP/1.1 401 "));
    assert!(status(Some("of-a-reader")).starts_with("HTTP/1.1 200 "));
    assert!(status(Some("of-a-reader")).contains("\"agents\":[]"));
    for token in ["on-node-1", "of-another", "for-another", "expired"] {
        assert!(status(Some(token)).starts_with("HTTP/1.1 401 "), "{token}");
    }
    assert_eq!(refused(address, Some("of-a-reader")).await.0, 401);
    assert!(ask(address, Some("on-node-1"), None).await.is_ok());
    // One review for each of the five tokens, whatever it was shown for.
    assert_eq!(reviews.load(Ordering::Relaxed), 5);

    // A file beside it is another way to read, and not the only one.
    let file = files.write("readers", READERS);
    let generator =
        Generator::start(&[common.as_slice(), &readers, &["--read-token-file", &file]].concat());
    for token in [READERS, "of-a-reader"] {
        let answer = get(generator.address, "/v1/status", Some(token));
        assert!(answer.starts_with("HTTP/1.1 200 "), "{token}: {answer}");
    }

    let generator = Generator::start(&common);
    let answer = get(generator.address, "/v1/status", Some("of-a-reader"));
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
}
