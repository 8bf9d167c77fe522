//! The uplink against a server that misbehaves, over real sockets.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use agent::{
    collector::Report,
    metrics::Meter,
    uplink::{
        Config, Credentials, Leftover, Uplink,
        spool::{MIN_SPOOL_BYTES, Spool},
    },
};
use bytes::Bytes;
use flow::{
    endpoint::{Endpoint, Labels, Pod},
    record::FlowRecord,
    time::Timestamp,
    wire::{
        self, AgentMessage, Batch, Encoding, GeneratorMessage, Hello, Resolve, SUBPROTOCOL, Window,
    },
};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async,
    tungstenite::{
        Message,
        handshake::server::{Request, Response},
        http::HeaderValue,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

/// Longer than anything here takes, on any machine.
const PATIENCE: Duration = Duration::from_secs(60);

type Socket = WebSocketStream<TcpStream>;

#[expect(
    clippy::result_large_err,
    reason = "the signature is the handshake callback's"
)]
async fn accept(listener: &TcpListener) -> (Socket, Hello) {
    let (stream, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    let mut socket = accept_hdr_async(stream, |request: &Request, mut response: Response| {
        assert_eq!(request.uri().path(), "/agents");
        response.headers_mut().insert(
            "sec-websocket-protocol",
            HeaderValue::from_static(SUBPROTOCOL),
        );
        Ok(response)
    })
    .await
    .unwrap();
    match receive(&mut socket).await {
        AgentMessage::Hello(hello) => (socket, hello),
        other => panic!("{other:?}"),
    }
}

async fn receive(socket: &mut Socket) -> AgentMessage {
    loop {
        match timeout(PATIENCE, socket.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
        {
            Message::Binary(bytes) => return wire::decode(&bytes, Encoding::MessagePack).unwrap(),
            Message::Text(text) => return wire::decode(text.as_bytes(), Encoding::Json).unwrap(),
            Message::Ping(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

async fn batch(socket: &mut Socket) -> Batch {
    match receive(socket).await {
        AgentMessage::Batch(batch) => batch,
        other => panic!("{other:?}"),
    }
}

async fn say(socket: &mut Socket, message: &GeneratorMessage) {
    let bytes = wire::encode(message, Encoding::MessagePack).unwrap();
    socket.send(Message::Binary(bytes.into())).await.unwrap();
}

fn refusal(reason: String, malformed: bool) -> GeneratorMessage {
    GeneratorMessage::Refuse { reason, malformed }
}

fn report(count: u64) -> Report {
    let mut record: FlowRecord = serde_json::from_str(
        r#"{"timestamp": 1.5, "hostname": "node-1", "src": {"pod": {}, "service": {}}, "dst": {"pod": {}, "service": {}},
            "tuple": {"src_addr": "10.0.0.1", "src_port": 0, "dst_addr": "10.0.0.2", "dst_port": 80}}"#,
    )
    .unwrap();
    record.count = count;
    Report {
        window: Window {
            from: Timestamp::from_nanos(1_000_000_000),
            to: Timestamp::from_nanos(2_000_000_000),
        },
        records: vec![record],
        losses: BTreeMap::new(),
        receipt: None,
    }
}

/// About two MiB of flows, each within bounds; in JSON it is six times as much.
fn large_report(number: u32) -> Report {
    let mut large = report(1);
    let text = "\u{1}".repeat(1_000);
    let labels: Labels = (0..24).map(|key| (key.to_string(), text.clone())).collect();
    let labels = Arc::new(labels);
    let small = large.records.remove(0);
    large.records = (0..80)
        .map(|pod| FlowRecord {
            dst: Endpoint::Pod {
                pod: Arc::new(Pod {
                    uid: format!("{number}-{pod}"),
                    labels: Arc::clone(&labels),
                    namespace: "shop".to_owned(),
                    name: "web".to_owned(),
                    workload: None,
                    node: None,
                    host_network: false,
                    addresses: Vec::new(),
                    services: Arc::default(),
                }),
                service: None,
            },
            ..small.clone()
        })
        .collect();
    large
}

async fn start(
    encoding: Encoding,
) -> (
    TcpListener,
    mpsc::Sender<Report>,
    tokio::task::JoinHandle<Leftover>,
) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/agents", listener.local_addr().unwrap());
    let (sender, reports) = mpsc::channel(4);
    let config = Config {
        urls: vec![url.parse().unwrap()],
        node: "node-1".to_owned(),
        resolve: Resolve::Both,
        capabilities: vec!["tcp".to_owned()],
        view: None,
        encoding,
        credentials: Credentials::default(),
    };
    let uplink = Uplink::new(config, None, reports, Meter::default());
    (listener, sender, tokio::spawn(uplink.run()))
}

/// An agent that has a spool, and sends to the first of these addresses that answers.
fn start_with_spool(
    folder: &std::path::Path,
    addresses: &[std::net::SocketAddr],
) -> (mpsc::Sender<Report>, tokio::task::JoinHandle<Leftover>) {
    let (sender, reports) = mpsc::channel(4);
    let config = Config {
        urls: addresses
            .iter()
            .map(|address| format!("ws://{address}/agents").parse().unwrap())
            .collect(),
        node: "node-1".to_owned(),
        resolve: Resolve::Both,
        capabilities: vec!["tcp".to_owned()],
        view: None,
        encoding: Encoding::Json,
        credentials: Credentials::default(),
    };
    let spool = Spool::open(folder, MIN_SPOOL_BYTES, Resolve::Both).unwrap();
    let uplink = Uplink::new(config, Some(spool), reports, Meter::default());
    (sender, tokio::spawn(uplink.run()))
}

#[tokio::test]
async fn what_an_agent_leaves_behind_is_delivered_by_the_next_under_the_old_name() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();

    // Of three batches one is acknowledged before the agent dies.
    let (sender, uplink) = start_with_spool(folder.path(), &[address]);
    let (mut socket, first) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    for count in 1..=3 {
        sender.send(report(count)).await.unwrap();
        assert_eq!(batch(&mut socket).await.sequence, count);
    }
    say(&mut socket, &GeneratorMessage::Ack { sequence: 1 }).await;
    uplink.abort();
    assert!(uplink.await.unwrap_err().is_cancelled());
    drop((sender, socket));

    // The next agent ends before it has reached anybody.
    let nowhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (sender, uplink) = start_with_spool(folder.path(), &[nowhere.local_addr().unwrap()]);
    sender.send(report(4)).await.unwrap();
    drop(sender);
    let left = timeout(PATIENCE, uplink).await.unwrap().unwrap();
    assert_eq!((left.lost, left.spooled), (0, 4));
    drop(nowhere);

    // The third finds a generator that has stored the second batch too. What has no number yet comes under a new name.
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dead_address = dead.local_addr().unwrap();
    drop(dead);
    let (sender, uplink) = start_with_spool(folder.path(), &[dead_address, address]);
    let (mut socket, hello) = accept(&listener).await;
    assert_eq!(hello.instance, first.instance);
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 2 }).await;
    let third = batch(&mut socket).await;
    assert_eq!((third.sequence, third.flows[0].count), (3, 3));
    say(&mut socket, &GeneratorMessage::Ack { sequence: 3 }).await;
    let (mut socket, hello) = accept(&listener).await;
    assert_ne!(hello.instance, first.instance);
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    let fourth = batch(&mut socket).await;
    assert_eq!((fourth.sequence, fourth.flows[0].count), (1, 4));
    say(&mut socket, &GeneratorMessage::Ack { sequence: 1 }).await;
    drop(sender);
    let left = timeout(PATIENCE, uplink).await.unwrap().unwrap();
    assert_eq!(left, Leftover::default());
}

/// Each address is tried before the wait, which grows.
#[tokio::test]
async fn addresses_are_tried_in_turn_and_ever_more_rarely() {
    let folder = tempfile::tempdir().unwrap();
    let mut listeners = Vec::new();
    for _ in 0..2 {
        listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
    }
    let address = |listener: &TcpListener| listener.local_addr().unwrap();
    let addresses: Vec<_> = listeners.iter().map(address).collect();
    let (sender, uplink) = start_with_spool(folder.path(), &addresses);
    let mut tried = Vec::new();
    for _ in 0..7 {
        // Whoever is asked hangs up.
        let [first, second] = listeners.as_slice() else {
            panic!("two listeners are expected");
        };
        let which = timeout(PATIENCE, async {
            tokio::select! {
                stream = first.accept() => stream.map(|_| 0),
                stream = second.accept() => stream.map(|_| 1),
            }
        });
        tried.push((which.await.unwrap().unwrap(), Instant::now()));
    }
    let order: Vec<i32> = tried.iter().map(|(which, _)| *which).collect();
    assert_eq!(order, [0, 1, 0, 1, 0, 1, 0]);
    // At least half of half a second, of a second, and of two.
    for (round, least) in [(1, 250), (2, 500), (3, 1_000)] {
        let wait = tried[2 * round].1 - tried[2 * round - 1].1;
        assert!(
            wait >= Duration::from_millis(least - 50),
            "{wait:?} before round {round}"
        );
    }
    uplink.abort();
    drop(sender);
}

/// The other address may have a ledger of its own, for which all would be new.
#[tokio::test]
async fn a_connection_that_is_to_be_made_anew_is_made_to_the_same_address() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addresses = [&listener, &other].map(|listener| listener.local_addr().unwrap());
    let (sender, uplink) = start_with_spool(folder.path(), &addresses);
    let mut instances = Vec::new();
    // The waits would add up if they grew.
    let began = Instant::now();
    for _ in 0..5 {
        let (mut socket, hello) = accept(&listener).await;
        instances.push(hello.instance);
        say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
        let frame = CloseFrame {
            code: CloseCode::Away,
            reason: "come back".into(),
        };
        socket.close(Some(frame)).await.unwrap();
    }
    assert!(began.elapsed() < Duration::from_secs(5));
    instances.dedup();
    assert_eq!(instances.len(), 1);
    // Who has gone for good is passed over.
    drop(listener);
    let (mut socket, _) = accept(&other).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    uplink.abort();
    drop(sender);
}

#[tokio::test]
async fn a_batch_comes_again_until_it_is_acknowledged() {
    let (listener, sender, uplink) = start(Encoding::MessagePack).await;
    sender.send(report(3)).await.unwrap();

    // The first connection breaks before the acknowledgement.
    let (mut socket, hello) = accept(&listener).await;
    assert_eq!(hello.node, "node-1");
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    let first = batch(&mut socket).await;
    assert_eq!((first.sequence, first.flows[0].count), (1, 3));
    drop(socket);

    // On the second it comes unchanged, and what came up meanwhile follows under the next number.
    sender.send(report(4)).await.unwrap();
    let (mut socket, _) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    assert_eq!(batch(&mut socket).await, first);
    let second = batch(&mut socket).await;
    assert_eq!((second.sequence, second.flows[0].count), (2, 4));
    say(&mut socket, &GeneratorMessage::Ack { sequence: 1 }).await;
    drop(socket);

    // The third server has stored the second batch although its acknowledgement never arrived: it does not come again.
    let (mut socket, _) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 2 }).await;
    sender.send(report(5)).await.unwrap();
    let third = batch(&mut socket).await;
    assert_eq!((third.sequence, third.flows[0].count), (3, 5));
    say(&mut socket, &GeneratorMessage::Ack { sequence: 3 }).await;

    drop(sender);
    assert_eq!(timeout(PATIENCE, uplink).await.unwrap().unwrap().lost, 0);
}

#[tokio::test]
async fn what_nobody_takes_is_counted_at_the_end() {
    let (listener, sender, uplink) = start(Encoding::MessagePack).await;
    sender.send(report(3)).await.unwrap();
    let (mut socket, _) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    batch(&mut socket).await;
    sender.send(report(4)).await.unwrap();
    drop(sender);
    assert_eq!(timeout(PATIENCE, uplink).await.unwrap().unwrap().lost, 7);
}

#[tokio::test]
async fn a_refusal_and_a_stranger_are_survived() {
    let (listener, sender, uplink) = start(Encoding::MessagePack).await;
    sender.send(report(1)).await.unwrap();
    // Somebody who does not speak WebSocket at all.
    let (stream, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    drop(stream);
    let (mut socket, _) = accept(&listener).await;
    let reason = "not today".to_owned();
    say(&mut socket, &refusal(reason, false)).await;
    let (mut socket, _) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    let only = batch(&mut socket).await;
    assert_eq!((only.sequence, only.flows[0].count), (1, 1));
    say(&mut socket, &GeneratorMessage::Ack { sequence: 1 }).await;
    drop(sender);
    assert_eq!(timeout(PATIENCE, uplink).await.unwrap().unwrap().lost, 0);
}

#[tokio::test]
async fn a_generator_that_forgot_what_it_acknowledged_gets_a_new_instance() {
    let (listener, sender, uplink) = start(Encoding::MessagePack).await;
    let (mut socket, first) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    for sequence in 1..=2 {
        sender.send(report(sequence)).await.unwrap();
        assert_eq!(batch(&mut socket).await.sequence, sequence);
        say(&mut socket, &GeneratorMessage::Ack { sequence }).await;
        // What answers the ping has read the acknowledgement before it.
        socket.send(Message::Ping(Bytes::new())).await.unwrap();
        let answer = timeout(PATIENCE, socket.next()).await.unwrap();
        assert!(matches!(answer, Some(Ok(Message::Pong(_)))), "{answer:?}");
    }
    sender.send(report(3)).await.unwrap();
    assert_eq!(batch(&mut socket).await.sequence, 3);
    drop(socket);

    // It has the first, and lacks the second, which nobody has any more.
    let (mut socket, hello) = accept(&listener).await;
    assert_eq!(hello.instance, first.instance);
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 1 }).await;
    let (mut socket, second) = accept(&listener).await;
    assert_ne!(second.instance, first.instance);
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    let again = batch(&mut socket).await;
    assert_eq!((again.sequence, again.flows[0].count), (3, 3));
    drop(socket);

    // One that knows nothing of an instance is told by the first number what it lacks.
    let (mut socket, hello) = accept(&listener).await;
    assert_eq!(hello.instance, second.instance);
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    assert_eq!(batch(&mut socket).await.sequence, 3);
    say(&mut socket, &GeneratorMessage::Ack { sequence: 3 }).await;
    drop(sender);
    assert_eq!(timeout(PATIENCE, uplink).await.unwrap().unwrap().lost, 0);
}

#[tokio::test]
async fn only_the_batch_that_is_refused_for_good_is_given_up() {
    let (listener, sender, uplink) = start(Encoding::MessagePack).await;
    // Two batches are under way when the second is refused; neither was acknowledged.
    sender.send(report(1)).await.unwrap();
    let (mut socket, _) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    assert_eq!(batch(&mut socket).await.sequence, 1);
    sender.send(report(2)).await.unwrap();
    assert_eq!(batch(&mut socket).await.sequence, 2);
    say(&mut socket, &refusal("no".to_owned(), true)).await;

    // Now they come one by one.
    let (mut socket, _) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    let first = batch(&mut socket).await;
    assert_eq!((first.sequence, first.flows[0].count), (1, 1));
    say(&mut socket, &GeneratorMessage::Ack { sequence: 1 }).await;
    let second = batch(&mut socket).await;
    assert_eq!((second.sequence, second.flows[0].count), (2, 2));
    say(&mut socket, &refusal("no".to_owned(), true)).await;

    let (mut socket, _) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 1 }).await;
    let instead = batch(&mut socket).await;
    assert_eq!((instead.sequence, instead.flows.len()), (2, 0));
    assert_eq!(instead.losses["batch_refused"], 2);
    say(&mut socket, &GeneratorMessage::Ack { sequence: 2 }).await;
    sender.send(report(3)).await.unwrap();
    let third = batch(&mut socket).await;
    assert_eq!((third.sequence, third.flows[0].count), (3, 3));
    say(&mut socket, &GeneratorMessage::Ack { sequence: 3 }).await;
    drop(sender);
    assert_eq!(timeout(PATIENCE, uplink).await.unwrap().unwrap().lost, 0);
}

#[tokio::test]
async fn what_is_too_long_in_json_comes_in_messagepack() {
    let (listener, sender, uplink) = start(Encoding::Json).await;
    let (mut socket, _) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    for (sequence, report, is_text) in [(1, large_report(1), false), (2, report(1), true)] {
        let flows = report.records.len();
        sender.send(report).await.unwrap();
        let message = timeout(PATIENCE, socket.next()).await.unwrap();
        let message = message.unwrap().unwrap();
        assert_eq!(message.is_text(), is_text);
        let encoding = match &message {
            Message::Text(_) => Encoding::Json,
            _ => Encoding::MessagePack,
        };
        let AgentMessage::Batch(batch) = wire::decode(&message.into_data(), encoding).unwrap()
        else {
            panic!("no batch");
        };
        assert_eq!((batch.sequence, batch.flows.len()), (sequence, flows));
        say(&mut socket, &GeneratorMessage::Ack { sequence }).await;
    }
    drop(sender);
    assert_eq!(timeout(PATIENCE, uplink).await.unwrap().unwrap().lost, 0);
}

#[tokio::test]
async fn a_generator_that_stops_reading_does_not_hold_the_agent_up() {
    let (listener, sender, uplink) = start(Encoding::MessagePack).await;
    let (mut socket, _) = accept(&listener).await;
    say(&mut socket, &GeneratorMessage::Welcome { last_sequence: 0 }).await;
    // More than the sockets' buffers take: sending blocks, and yet every report is taken in and the end is reached.
    for number in 0..40_u32 {
        timeout(PATIENCE, sender.send(large_report(number)))
            .await
            .unwrap()
            .unwrap();
    }
    drop(sender);
    let left = timeout(PATIENCE, uplink).await.unwrap().unwrap();
    assert_eq!(left.lost, 40 * 80);
    drop(socket);
}
