use std::{path::PathBuf, time::Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    task::JoinHandle,
};

use super::*;

/// As a probe was seen to ask.
const QUESTION: &str = "GET /report?api_version=1&probe_id=2b6c443405ab307c HTTP/1.1\r\nHost: plugin\r\n\
     User-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\n\r\n";

struct Stage {
    _folder: TempDir,
    path: PathBuf,
    recent: Arc<Recent>,
    plugin: JoinHandle<()>,
}

fn stage() -> Stage {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("plugins/microshield.sock");
    let recent = Arc::new(Recent::default());
    let socket = path.to_str().unwrap().parse().unwrap();
    let plugin = Plugin::open(&socket, "vm".to_owned(), Arc::clone(&recent)).unwrap();
    Stage {
        _folder: folder,
        path,
        recent,
        plugin: tokio::spawn(plugin.run()),
    }
}

impl Stage {
    /// Status and body.
    async fn ask(&self, question: &str) -> (u16, String) {
        let mut stream = UnixStream::connect(&self.path).await.unwrap();
        stream.write_all(question.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }
}

fn record() -> flow::record::FlowRecord {
    let record = json!({
        "timestamp": 7.0, "hostname": "vm", "src": {"pod": {}}, "dst": {"pod": {}},
        "tuple": {"src_addr": "10.0.0.1", "src_port": 0, "dst_addr": "10.0.0.2", "dst_port": 80},
    });
    serde_json::from_value(record).unwrap()
}

#[tokio::test]
async fn the_probes_question_is_answered() {
    let stage = stage();
    for edges in [0, 2] {
        let (status, body) = stage.ask(QUESTION).await;
        assert_eq!(status, 200);
        let report: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(report["Plugins"][0]["id"], "microshield");
        assert_eq!(
            report["Endpoint"]["nodes"].as_object().unwrap().len(),
            edges
        );
        stage.recent.add(&[record()]);
    }
    stage.plugin.abort();
    stage.plugin.await.unwrap_err();
    assert!(!stage.path.exists());
}

#[tokio::test]
async fn what_is_no_question_is_refused() {
    let stage = stage();
    for (question, status) in [
        (
            "GET /report?api_version=2 HTTP/1.1\r\nHost: plugin\r\n\r\n",
            400,
        ),
        ("GET /report HTTP/1.1\r\nHost: plugin\r\n\r\n", 400),
        (
            "POST /report?api_version=1 HTTP/1.1\r\nHost: plugin\r\nContent-Length: 2\r\n\r\n{}",
            405,
        ),
        (
            "POST /control HTTP/1.1\r\nHost: plugin\r\nContent-Length: 2\r\n\r\n{}",
            404,
        ),
        ("GET / HTTP/1.1\r\nHost: plugin\r\n\r\n", 404),
        ("GARBAGE\r\n\r\n", 400),
    ] {
        assert_eq!(stage.ask(question).await.0, status, "{question}");
    }
    let long = format!("GET /report?{} HTTP/1.1\r\n\r\n", "x".repeat(2 * MAX_HEAD));
    let mut stream = UnixStream::connect(&stage.path).await.unwrap();
    // It may be closed before all of it is written.
    stream.write_all(long.as_bytes()).await.ok();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok();
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
    assert_eq!(stage.ask(QUESTION).await.0, 200);
}

/// Who says nothing, or does not read, has a place for a while; then the probe has its turn.
#[tokio::test]
async fn the_slow_make_way() {
    let stage = stage();
    let mut slow = Vec::new();
    for number in 0..MAX_CONNECTIONS {
        let mut stream = UnixStream::connect(&stage.path).await.unwrap();
        let part = if number % 2 == 0 {
            QUESTION
        } else {
            "GET /rep"
        };
        stream.write_all(part.as_bytes()).await.unwrap();
        slow.push(stream);
    }
    let records: Vec<_> = (0_u32..4_000)
        .map(|number| {
            let mut record = record();
            record.tuple.src_addr = std::net::Ipv4Addr::from(0x0a00_0000 + number).into();
            record
        })
        .collect();
    stage.recent.add(&records);
    let begun = Instant::now();
    assert_eq!(stage.ask(QUESTION).await.0, 200);
    let taken = begun.elapsed();
    assert!(taken < DEADLINE + Duration::from_secs(20), "{taken:?}");
}
