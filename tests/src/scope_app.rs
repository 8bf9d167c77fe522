//! A stand-in for Weave Scope's app: answers `GET /api/report` with the bytes that it is given, or misbehaves.

use std::{
    collections::VecDeque,
    io::Write as _,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use flate2::{Compression, write::GzEncoder};
use flow::{
    record::Protocol,
    topology::{Phase, TargetPort, file},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use crate::lab::Lab;

/// The app, listening.
#[derive(Debug)]
pub struct ScopeApp {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    json: Vec<u8>,
    message_pack: Vec<u8>,
    /// The name of the report, and whether it is the one that was asked for is looked at.
    tag: Option<String>,
    replies: VecDeque<Reply>,
    asked: Vec<String>,
    written: u64,
}

/// What the app does with a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It answers with a status, some more lines of the head, and nothing else.
    Status(u16, &'static str),
    /// It answers with these bytes.
    Bytes(Vec<u8>),
    /// It closes the connection half-way through the report.
    Cut,
    /// It says nothing.
    Silence,
    /// It begins its answer, and then says nothing.
    Stall,
    /// It answers a byte at a time, for ever.
    Dribble,
    /// After these bytes, so many more of another one.
    Junk(&'static [u8], u8, u64),
}

impl ScopeApp {
    /// Listens on the loopback interface.
    ///
    /// # Errors
    /// If there is no port to be had.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                tokio::spawn(async move {
                    // Who asks may be gone.
                    serve(stream, &state).await.ok();
                });
            }
        });
        Ok(Self {
            address,
            state,
            task,
        })
    }

    /// Where the report is.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/api/report", self.address)
    }

    /// From now on the report is this, in both its forms.
    pub fn report(&self, json: Vec<u8>, message_pack: Vec<u8>) {
        let mut state = self.state();
        state.json = json;
        state.message_pack = message_pack;
    }

    /// From now on the report is this.
    ///
    /// # Errors
    /// If it has no MessagePack form.
    pub fn report_value(&self, report: &Value) -> Result<()> {
        self.report(report.to_string().into_bytes(), rmp_serde::to_vec(report)?);
        Ok(())
    }

    /// From now on the report has a name, by which it may be asked whether it is still the same.
    pub fn tag(&self, tag: &str) {
        self.state().tag = Some(tag.to_owned());
    }

    /// The next questions get these replies.
    pub fn reply(&self, replies: impl IntoIterator<Item = Reply>) {
        self.state().replies.extend(replies);
    }

    /// The heads of all questions so far, in lower case.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        self.state().asked.clone()
    }

    /// How many bytes somebody has taken.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.state().written
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Drop for ScopeApp {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn serve(mut stream: TcpStream, state: &Mutex<State>) -> Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head)?.to_lowercase();
    let (reply, report, same) = {
        let mut state = lock(state);
        state.asked.push(head.clone());
        let same = state.tag.as_ref().is_some_and(|tag| {
            head.contains(&format!("if-none-match: \"{}\"", tag.to_lowercase()))
        });
        // The app looks at how the header begins.
        let report = match head.contains("accept: application/msgpack") {
            true => state.message_pack.clone(),
            false => state.json.clone(),
        };
        (state.replies.pop_front(), report, same)
    };
    match reply {
        None if same => write(&mut stream, state, b"HTTP/1.1 304 Not Modified\r\n\r\n").await,
        None => {
            let compressed = head.contains("accept-encoding: gzip");
            let report = if compressed { gzip(&report)? } else { report };
            let mut lines = String::new();
            if compressed {
                lines.push_str("Content-Encoding: gzip\r\n");
            }
            if let Some(tag) = &lock(state).tag {
                lines.push_str(&format!("ETag: \"{tag}\"\r\n"));
            }
            chunked(&mut stream, state, &lines, &report).await
        }
        Some(Reply::Status(status, lines)) => {
            let answer = format!("HTTP/1.1 {status} \r\nContent-Length: 0\r\n{lines}\r\n");
            write(&mut stream, state, answer.as_bytes()).await
        }
        Some(Reply::Bytes(bytes)) => chunked(&mut stream, state, "", &bytes).await,
        Some(Reply::Cut) => {
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
                report.len()
            );
            write(&mut stream, state, head.as_bytes()).await?;
            write(&mut stream, state, &report[..report.len() / 2]).await
        }
        Some(Reply::Silence) => until_gone(&mut stream).await,
        Some(Reply::Stall) => {
            let head = "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{";
            write(&mut stream, state, head.as_bytes()).await?;
            until_gone(&mut stream).await
        }
        Some(Reply::Dribble) => {
            write(&mut stream, state, b"HTTP/1.1 200 OK\r\n\r\n{").await?;
            loop {
                write(&mut stream, state, b" ").await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Some(Reply::Junk(head, byte, count)) => {
            write(&mut stream, state, b"HTTP/1.1 200 OK\r\n\r\n").await?;
            write(&mut stream, state, head).await?;
            let piece = vec![byte; 64 << 10];
            for _ in 0..count / piece.len() as u64 {
                write(&mut stream, state, &piece).await?;
            }
            Ok(())
        }
    }
}

async fn until_gone(stream: &mut TcpStream) -> Result<()> {
    stream.read_u8().await.map(drop).context("gone")
}

/// In parts that respect nothing.
async fn chunked(
    stream: &mut TcpStream,
    state: &Mutex<State>,
    lines: &str,
    body: &[u8],
) -> Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\n{lines}Transfer-Encoding: chunked\r\n\r\n");
    write(stream, state, head.as_bytes()).await?;
    let size = (body.len() / 64).max(977);
    for part in body.chunks(size) {
        let mut chunk = format!("{:x}\r\n", part.len()).into_bytes();
        chunk.extend_from_slice(part);
        chunk.extend_from_slice(b"\r\n");
        write(stream, state, &chunk).await?;
    }
    write(stream, state, b"0\r\n\r\n").await
}

async fn write(stream: &mut TcpStream, state: &Mutex<State>, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).await?;
    lock(state).written += bytes.len() as u64;
    Ok(())
}

fn gzip(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

/// The lab's objects as a report of the modified probe has them, with containers, and with a translated connection to every
/// port of a service over TCP.
///
/// # Errors
/// If the lab's own file cannot be read.
pub fn report_of(lab: &Lab) -> Result<Value> {
    let objects = file::load(&lab.topology())?.objects;
    let latest = |entries: &[(&str, String)]| -> Value {
        let entries = entries.iter().map(|(key, value)| {
            let value = json!({"timestamp": "2026-11-21T20:16:37.392079527Z", "value": value});
            ((*key).to_owned(), value)
        });
        entries.collect::<serde_json::Map<_, _>>().into()
    };
    let mut report = json!({"Endpoint": {"nodes": {}}, "Container": {"nodes": {}}, "Pod": {"nodes": {}},
        "Service": {"nodes": {}}, "Deployment": {"nodes": {}}, "Namespace": {"nodes": {}}, "Host": {"nodes": {}}});
    let mut add = |topology: &str, id: String, node: Value| {
        report[topology]["nodes"][id] = node;
    };
    for namespace in &objects.namespaces {
        let name = &namespace.name;
        let node = json!({"latest": latest(&[("kubernetes_name", name.clone())])});
        add("Namespace", format!("{name};<namespace>"), node);
    }
    for (node, spec) in objects.nodes.iter().zip(&lab.cluster().nodes) {
        let addresses = spec.addresses().into_iter().chain(spec.gateway());
        let networks: Vec<String> = addresses.map(|address| format!("{address}/24")).collect();
        let id = format!("{};<host>", node.identity.name);
        add(
            "Host",
            id,
            json!({"latest": {}, "sets": {"local_networks": networks}}),
        );
    }
    for pod in &objects.pods {
        let own = &pod.identity;
        let state = match pod.phase {
            Phase::Pending => "Pending",
            Phase::Running => "Running",
            Phase::Finished { .. } => "Succeeded",
        };
        let mut entries = vec![
            ("kubernetes_name", own.name.clone()),
            ("kubernetes_namespace", own.namespace.clone()),
            ("kubernetes_state", state.to_owned()),
        ];
        let address = own.addresses.first();
        entries.extend(address.map(|address| ("kubernetes_ip", address.to_string())));
        if own.host_network {
            entries.push(("kubernetes_is_in_host_network", "true".to_owned()));
        }
        let labels: Vec<(String, String)> = own
            .labels
            .iter()
            .map(|(key, value)| (format!("kubernetes_labels_{key}"), value.clone()))
            .collect();
        entries.extend(
            labels
                .iter()
                .map(|(key, value)| (key.as_str(), value.clone())),
        );
        let mut parents = json!({});
        if let Some(workload) = own.workload.as_ref().filter(|own| own.kind == "Deployment") {
            let id = format!("{}-{};<deployment>", own.namespace, workload.name);
            parents["deployment"] = json!([id]);
            let name = latest(&[("kubernetes_name", workload.name.clone())]);
            add("Deployment", id, json!({"latest": name}));
        }
        let id = format!("{};<pod>", own.uid);
        add(
            "Pod",
            id.clone(),
            json!({"latest": latest(&entries), "parents": parents}),
        );
        if let Some(node) = &own.node {
            let host = format!("{node};<host>");
            let node = json!({"latest": latest(&[("host_node_id", host.clone())]),
                "parents": {"pod": [id], "host": [host]}});
            add("Container", format!("of-{};<container>", own.uid), node);
        }
    }
    for service in &objects.services {
        let own = &service.identity;
        let ports: Vec<String> = service
            .ports
            .iter()
            .map(|port| match port.node_port {
                Some(node_port) => format!("{}:{node_port}/{}", port.port, port.protocol),
                None => format!("{}/{}", port.port, port.protocol),
            })
            .collect();
        let selector: Vec<String> = own
            .selector
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        let address = service.cluster_addresses.first();
        let entries = [
            ("kubernetes_name", own.name.clone()),
            ("kubernetes_namespace", own.namespace.clone()),
            (
                "kubernetes_ip",
                address.map_or("None".to_owned(), ToString::to_string),
            ),
            ("kubernetes_ports", ports.join(",")),
            ("kubernetes_selector", selector.join(",")),
        ];
        add(
            "Service",
            format!("{};<service>", own.uid),
            json!({"latest": latest(&entries)}),
        );
        let selected = objects.pods.iter().find(|pod| {
            own.selector
                .iter()
                .all(|(key, value)| pod.identity.labels.get(key) == Some(value))
        });
        let backend = selected.and_then(|pod| pod.identity.addresses.first());
        for port in service
            .ports
            .iter()
            .filter(|port| port.protocol == Protocol::Tcp)
        {
            if let (Some(address), Some(backend), TargetPort::Number(target)) =
                (address, backend, &port.target)
            {
                let real = latest(&[("copy_of", format!(";{backend};{target}"))]);
                add(
                    "Endpoint",
                    format!(";{address};{}", port.port),
                    json!({"latest": real}),
                );
            }
        }
    }
    Ok(report)
}
