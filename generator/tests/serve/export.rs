//! The ledger of a running generator, read over HTTP.

use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    thread,
};

use flow::{lost::Lost, record::FlowRecord};
use serde_json::Value;
use sqlx::{ConnectOptions as _, sqlite::SqliteConnectOptions};

use crate::{
    client::{Client, batch_with_losses, flow},
    generator::{Generator, export, run},
};

#[tokio::test(flavor = "multi_thread")]
async fn all_pages_and_what_was_lost() {
    let data = tempfile::tempdir().unwrap();
    let readers = data.path().join("readers");
    std::fs::write(&readers, "readers-token").unwrap();
    let readers = readers.to_str().unwrap();
    let ledger = data.path().join("ledger");
    let generator = Generator::on(&ledger, &["--read-token-file", readers]);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    // Some pages: a record takes half a KiB.
    for sequence in 1..=4 {
        let ports = 1_000 * sequence as u16..1_000 * (sequence + 1) as u16;
        let flows = ports.map(|port| flow("web", "db", port, 2)).collect();
        agent.deliver(sequence, flows).await;
    }
    agent
        .say(&batch_with_losses(5, Vec::new(), &[("ring_full", 3)]))
        .await;
    agent.hear().await.unwrap();

    let url = format!("http://{}", generator.address);
    let refused = run(&["export", "--url", &url]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("401 Unauthorized"));

    let remote = run(&["export", "--url", &url, "--token-file", readers]);
    assert!(remote.status.success(), "{remote:?}");
    assert_eq!(
        String::from_utf8_lossy(&remote.stderr),
        "microshield: node node-1: 3 observations lost: ring_full\n"
    );
    let local = run(&["export", "--data-dir", ledger.to_str().unwrap()]);
    assert_eq!(local.stdout, remote.stdout);
    let lines: Vec<&[u8]> = remote
        .stdout
        .trim_ascii()
        .split(|byte| *byte == b'\n')
        .collect();
    let (lost, records) = lines.split_last().unwrap();
    let lost = Lost::parse_line(lost).unwrap();
    assert_eq!(
        lost.to_string(),
        "node node-1: 3 observations lost: ring_full"
    );
    let records = records
        .iter()
        .map(|line| serde_json::from_slice(line).unwrap());
    let records: Vec<FlowRecord> = records.collect();
    assert_eq!(records.len(), 4_000);
    assert_eq!(records, export(&ledger));
    let file = data.path().join("flows.json");
    std::fs::write(&file, &local.stdout).unwrap();

    let folder = data.path().join("policies");
    let folder = folder.to_str().unwrap();
    let mut generate = vec!["generate", "--url", &url, "--token-file", readers];
    generate.extend(["-A", "-g", "workload", "-a", "-o", folder]);
    let written = run(&generate);
    assert!(written.status.success(), "{written:?}");
    assert!(std::fs::read_dir(folder).unwrap().count() > 0);
    generate.push("--strict");
    let of_file = ["generate", "-f", file.to_str().unwrap(), "--strict"];
    let of_file = [&of_file, &["-A", "-g", "workload", "-a", "-o", folder][..]].concat();
    for generate in [generate, of_file] {
        let strict = run(&generate);
        assert_eq!(strict.status.code(), Some(1), "{strict:?}");
        assert!(String::from_utf8_lossy(&strict.stderr).contains("ring_full"));
    }
}

/// Places in the ledger are of one reading: when the store fails and is read again, the rest would be another's.
#[tokio::test(flavor = "multi_thread")]
async fn ends_with_the_reading_that_it_is_of() {
    let data = tempfile::tempdir().unwrap();
    let generator = Generator::on(data.path(), &["--log", "debug"]);
    let (mut agent, _) = Client::join(generator.address, "one").await;
    // More than what the system keeps of a body that nobody reads.
    let labels: serde_json::Map<String, Value> = (0..25)
        .map(|number| (format!("{number:0>250}"), "x".into()))
        .collect();
    let mut large = serde_json::to_value(flow("web", "db", 1, 1)).unwrap();
    large["src"]["pod"]["labels"] = labels.into();
    for sequence in 1..=4 {
        let ports = 1_000 * sequence as u16..1_000 * (sequence + 1) as u16;
        let flows = ports.map(|port| {
            large["tuple"]["dst_port"] = port.into();
            serde_json::from_value(large.clone()).unwrap()
        });
        agent.deliver(sequence, flows.collect()).await;
    }
    let mut export = TcpStream::connect(generator.address).unwrap();
    write!(export, "GET /v1/export HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut body = vec![0; 100_000];
    export.read_exact(&mut body).unwrap();

    let mut database = SqliteConnectOptions::new()
        .filename(data.path().join("ledger.db"))
        .connect()
        .await
        .unwrap();
    let failing =
        "CREATE TRIGGER failing BEFORE INSERT ON counts BEGIN SELECT RAISE(ABORT, 'no'); END";
    sqlx::raw_sql(failing).execute(&mut database).await.unwrap();
    agent
        .say(&batch_with_losses(5, vec![flow("web", "db", 80, 1)], &[]))
        .await;
    let end = agent.end().await;
    assert_eq!(
        end.refusal.as_deref(),
        Some("the batch cannot be stored now")
    );

    export.read_to_end(&mut body).unwrap();
    assert!(
        !body.ends_with(b"0\r\n\r\n"),
        "all of {} bytes came",
        body.len()
    );
    generator.wait_for_log("an export is cut off: the ledger was read again");
    sqlx::raw_sql("DROP TRIGGER failing")
        .execute(&mut database)
        .await
        .unwrap();
    let again = run(&["export", "--url", &format!("http://{}", generator.address)]);
    let lines = again.stdout.split(|byte| *byte == b'\n').count();
    assert_eq!(lines, 4_001, "{}", String::from_utf8_lossy(&again.stderr));
}

#[test]
fn one_that_is_cut_off_is_no_ledger() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let record = serde_json::to_string(&flow("web", "db", 5432, 1)).unwrap() + "\n";
    let generator = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1_024];
        assert!(stream.read(&mut request).unwrap() > 0);
        let length = record.len();
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        write!(stream, "{head}{length:x}\r\n{record}\r\n").unwrap();
    });
    let output = run(&["export", "--url", &url]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(output.stdout.is_empty());
    generator.join().unwrap();
}
