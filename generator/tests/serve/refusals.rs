//! What a peer does wrong ends its own connection, with a reason; others go on.

use std::net::SocketAddr;

use flow::{
    record::FlowRecord,
    wire::{Encoding, MAX_MESSAGE_BYTES},
};
use futures_util::SinkExt as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::tungstenite::{
    self, Message, Utf8Bytes,
    protocol::frame::{
        Frame,
        coding::{CloseCode, Data, OpCode},
    },
};

use crate::{
    client::{Client, End, batch, flow, hello, request},
    generator::{Generator, PATIENCE, raise_file_limit},
};

/// A generator, and an agent that is on good terms with it.
struct Scene {
    generator: Generator,
    good: Client,
    delivered: u64,
}

impl Scene {
    async fn set() -> Self {
        let generator = Generator::start(&[]);
        let (good, _) = Client::join(generator.address, "good").await;
        let mut scene = Self {
            generator,
            good,
            delivered: 0,
        };
        scene.good_goes_on().await;
        scene
    }

    fn address(&self) -> SocketAddr {
        self.generator.address
    }

    async fn good_goes_on(&mut self) {
        self.delivered += 1;
        let flows = vec![flow("web", "db", 5432, 1)];
        self.good.deliver(self.delivered, flows).await;
    }

    /// The end of a connection, on which `bad` is sent after a hello. The good agent delivers before that end and after.
    async fn end_of(&mut self, encoding: Encoding, bad: Message) -> End {
        let (mut client, _) = Client::join_in(self.address(), "bad", encoding).await;
        // The generator may close before it has read everything.
        drop(client.socket.send(bad).await);
        self.good_goes_on().await;
        let end = client.end().await;
        self.good_goes_on().await;
        end
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_messages() {
    let mut scene = Scene::set().await;
    let deep = |opening: &str| opening.repeat(MAX_MESSAGE_BYTES / opening.len() - 1);
    let binary = |bytes: &[u8]| Message::binary(bytes.to_vec());
    let frame = |code, bytes: &[u8]| {
        Message::Frame(Frame::message(bytes.to_vec(), OpCode::Data(code), true))
    };
    // `losses` is the last field of a batch.
    let in_losses = |value: &[u8]| {
        let mut bytes = b"\x81\xa5batch\x81\xa6losses".to_vec();
        bytes.extend(value);
        Message::binary(bytes)
    };
    for (encoding, bad, code, reason) in [
        (
            Encoding::MessagePack,
            binary(b""),
            CloseCode::Invalid,
            "malformed MessagePack",
        ),
        (
            Encoding::MessagePack,
            binary(b"\xc1"),
            CloseCode::Invalid,
            "malformed MessagePack",
        ),
        (
            Encoding::MessagePack,
            binary(b"GET / HTTP/1.1"),
            CloseCode::Invalid,
            "malformed MessagePack",
        ),
        (
            Encoding::MessagePack,
            binary(b"\x81\xa4what\x80"),
            CloseCode::Invalid,
            "malformed MessagePack: unknown variant `what`",
        ),
        // A map that claims four billion entries, and an array likewise.
        (
            Encoding::MessagePack,
            binary(b"\xdf\xff\xff\xff\xff"),
            CloseCode::Invalid,
            "malformed MessagePack",
        ),
        (
            Encoding::MessagePack,
            in_losses(b"\xdd\xff\xff\xff\xff"),
            CloseCode::Invalid,
            "malformed MessagePack",
        ),
        (
            Encoding::MessagePack,
            in_losses(&[0x91; MAX_MESSAGE_BYTES - 100]),
            CloseCode::Invalid,
            "malformed MessagePack",
        ),
        // So many values that each would be remembered with 32 times its length.
        (
            Encoding::MessagePack,
            in_losses(&[b"\xdd\x00\x3f\xff\x00".as_slice(), &[0; 0x3f_ff00]].concat()),
            CloseCode::Invalid,
            "malformed MessagePack",
        ),
        (
            Encoding::Json,
            Message::text("{"),
            CloseCode::Invalid,
            "malformed JSON: EOF",
        ),
        (
            Encoding::Json,
            Message::text(r#"{"batch":{}}"#),
            CloseCode::Invalid,
            "malformed JSON: missing field `sequence`",
        ),
        (
            Encoding::Json,
            Message::text(deep("[")),
            CloseCode::Invalid,
            "malformed JSON",
        ),
        (
            Encoding::Json,
            Message::text(deep(r#"{"a":"#)),
            CloseCode::Invalid,
            "malformed JSON",
        ),
        (
            Encoding::MessagePack,
            frame(Data::Text, b"\"\xff\""),
            CloseCode::Invalid,
            "UTF-8",
        ),
        (
            Encoding::MessagePack,
            frame(Data::Continue, b"x"),
            CloseCode::Protocol,
            "Continue frame but nothing to continue",
        ),
        (
            Encoding::MessagePack,
            frame(Data::Reserved(3), b"x"),
            CloseCode::Protocol,
            "Encountered invalid opcode: 3",
        ),
    ] {
        let end = scene.end_of(encoding, bad).await;
        let told = end
            .refusal
            .as_deref()
            .unwrap_or_else(|| panic!("{end:?}, not {reason}"));
        assert!(told.contains(reason), "{told}\nnot: {reason}");
        assert_eq!(end.code, Some(code), "{told}");
        assert!(told.starts_with(&end.close_reason), "{end:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_too_long() {
    let mut scene = Scene::set().await;
    let end = scene
        .end_of(
            Encoding::MessagePack,
            Message::binary(vec![0; MAX_MESSAGE_BYTES + 1]),
        )
        .await;
    let reason = "Space limit exceeded: Message too long: 4194305 > 4194304";
    assert_eq!(end.refusal.as_deref(), Some(reason));
    assert_eq!(end.code, Some(CloseCode::Size));

    // A frame that claims to be of 1 GiB is refused before its contents come.
    let (mut client, _) = Client::join(scene.address(), "bad").await;
    let mut header = vec![0x82, 0x80 | 127];
    header.extend((1_u64 << 30).to_be_bytes());
    header.extend([1, 2, 3, 4]);
    client.socket.get_mut().write_all(&header).await.unwrap();
    let end = client.end().await;
    assert_eq!(end.code, Some(CloseCode::Size));

    // So is a message in many pieces.
    let (mut client, _) = Client::join(scene.address(), "bad").await;
    let piece = |code| Frame::message(vec![0; 1 << 20], OpCode::Data(code), false);
    let mut pieces = vec![piece(Data::Binary)];
    pieces.extend((0..4).map(|_| piece(Data::Continue)));
    for piece in pieces {
        drop(client.socket.send(Message::Frame(piece)).await);
    }
    let end = client.end().await;
    assert_eq!(end.code, Some(CloseCode::Size));
    scene.good_goes_on().await;
}

/// Frames without contents, and a message of which each frame has one byte: they take their sender's time and nobody else's.
#[tokio::test(flavor = "multi_thread")]
async fn a_million_tiny_frames() {
    const MILLION: usize = 1_000_000;
    let mut scene = Scene::set().await;
    let start = std::time::Instant::now();
    let ping = [0x89, 0x80, 0, 0, 0, 0];
    let piece = |head: u8| [head, 0x81, 0, 0, 0, 0, 0];
    let pieces = [
        piece(0x02).to_vec(),
        piece(0x00).repeat(MILLION - 2),
        piece(0x80).to_vec(),
    ];
    for (frames, ends) in [(ping.repeat(MILLION), false), (pieces.concat(), true)] {
        let (mut client, _) = Client::join(scene.address(), "bad").await;
        let flood = tokio::spawn(async move {
            client.socket.get_mut().write_all(&frames).await.unwrap();
            client
        });
        while !flood.is_finished() {
            scene.good_goes_on().await;
        }
        let mut client = flood.await.unwrap();
        if ends {
            let end = client.end().await;
            assert_eq!(end.code, Some(CloseCode::Invalid), "{end:?}");
        }
        scene.good_goes_on().await;
    }
    let took = start.elapsed();
    assert!(took.as_secs() < 120, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_out_of_place() {
    let mut scene = Scene::set().await;
    let mut client = Client::connect(scene.address(), Encoding::Json).await;
    client.say(&batch(1, Vec::new())).await;
    let end = client.end().await;
    assert_eq!(
        end.refusal.as_deref(),
        Some("the first message must be a hello")
    );
    assert_eq!(end.code, Some(CloseCode::Protocol));

    let (mut client, _) = Client::join(scene.address(), "bad").await;
    client.say(&hello("bad")).await;
    let end = client.end().await;
    assert_eq!(end.refusal.as_deref(), Some("hello was said before"));

    let mut client = Client::connect(scene.address(), Encoding::MessagePack).await;
    client.say(&hello("two\nlines")).await;
    let end = client.end().await;
    let reason = r"instance: two\nlines has other than printable characters";
    assert_eq!(end.refusal.as_deref(), Some(reason));

    let (mut client, _) = Client::join(scene.address(), "bad").await;
    let mut bad: FlowRecord = flow("web", "db", 80, 1);
    bad.hostname = "../node".to_owned();
    client
        .say(&batch(1, vec![flow("web", "db", 80, 1), bad]))
        .await;
    let end = client.end().await;
    let reason = "flows[1].hostname: ../node is not a name";
    assert_eq!(end.refusal.as_deref(), Some(reason));
    assert_eq!(end.code, Some(CloseCode::Invalid));
    scene.good_goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_fields_are_tolerated() {
    let scene = Scene::set().await;
    let mut client = Client::connect(scene.address(), Encoding::Json).await;
    for (said, heard) in [
        (
            r#"{"hello":{"instance":"later","node":"node-2","version":"9","capabilities":["x"]}}"#,
            r#"{"welcome":{"last_sequence":0}}"#,
        ),
        (
            r#"{"batch":{"sequence":1,"window":{"from":1,"to":2,"x":[]},"flows":[],"health":{"y":1}}}"#,
            r#"{"ack":{"sequence":1}}"#,
        ),
    ] {
        client.socket.send(Message::text(said)).await.unwrap();
        let answer = futures_util::StreamExt::next(&mut client.socket)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(answer, Message::Text(Utf8Bytes::from_static(heard)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_for_something_else() {
    let mut scene = Scene::set().await;
    for (path, subprotocol, status, reason) in [
        (
            "/",
            Some("microshield.v1"),
            404,
            "There is nothing at this path. Agents connect to /agents.",
        ),
        (
            "/agents/",
            Some("microshield.v1"),
            404,
            "There is nothing at this path.",
        ),
        (
            "/agents",
            None,
            400,
            "This generator speaks the WebSocket subprotocol microshield.v1",
        ),
        (
            "/agents",
            Some("microshield.v2"),
            400,
            "This generator speaks the WebSocket subprotocol microshield.v1",
        ),
    ] {
        match request(scene.address(), path, subprotocol).await {
            Err(tungstenite::Error::Http(response)) => {
                assert_eq!(response.status().as_u16(), status, "{path}");
                let body = String::from_utf8(response.body().clone().unwrap_or_default()).unwrap();
                assert!(body.starts_with(reason), "{path}: {body}");
            }
            other => panic!("{path}: {other:?}"),
        }
    }
    let later = request(
        scene.address(),
        "/agents?x=1",
        Some("microshield.v2, microshield.v1"),
    )
    .await;
    // A client that offers more than one is told which it is.
    assert!(later.is_ok(), "{later:?}");

    for (bytes, answer) in [
        (
            "GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
            "HTTP/1.1 404 ",
        ),
        (
            "GET /agents HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
            "HTTP/1.1 400 ",
        ),
        (
            "POST /agents HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".to_owned(),
            "HTTP/1.1 400 ",
        ),
        (
            "\x16\x03\x01 this is not HTTP\r\n\r\n".to_owned(),
            "HTTP/1.1 400 ",
        ),
        (
            format!("GET /agents HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(1 << 16)),
            "HTTP/1.1 431 ",
        ),
    ] {
        let mut stream = TcpStream::connect(scene.address()).await.unwrap();
        drop(stream.write_all(bytes.as_bytes()).await);
        let mut answered = [0; 13];
        let read = timeout(PATIENCE, stream.read_exact(&mut answered))
            .await
            .unwrap();
        read.unwrap_or_else(|error| panic!("{error}, not {answer}"));
        assert_eq!(String::from_utf8_lossy(&answered), answer);
    }
    scene.good_goes_on().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence() {
    let mut scene = Scene::set().await;
    let mut no_request = TcpStream::connect(scene.address()).await.unwrap();
    let mut half_a_request = TcpStream::connect(scene.address()).await.unwrap();
    half_a_request
        .write_all(b"GET /agents HTTP/1.1\r\n")
        .await
        .unwrap();
    let mut no_hello = Client::connect(scene.address(), Encoding::MessagePack).await;
    scene.good_goes_on().await;
    for stream in [&mut no_request, &mut half_a_request] {
        let mut rest = Vec::new();
        let read = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "not closed");
    }
    let end = no_hello.end().await;
    assert_eq!(end.refusal.as_deref(), Some("no hello within 10 s"));
    assert_eq!(end.code, Some(CloseCode::Policy));
    scene.good_goes_on().await;
}

/// More than may stand in the door.
#[tokio::test(flavor = "multi_thread")]
async fn one_address_does_not_keep_the_door_shut() {
    raise_file_limit();
    let mut scene = Scene::set().await;
    let mut silent = Vec::new();
    for _ in 0..2_100 {
        silent.push(TcpStream::connect(scene.address()).await.unwrap());
    }
    let (mut late, _) = Client::join(scene.address(), "late").await;
    late.deliver(1, vec![flow("web", "db", 5432, 1)]).await;
    // The oldest have made way, which is said once.
    let read = timeout(PATIENCE, silent[0].read(&mut [0])).await.unwrap();
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    let warning = "too many connections that have not said who they are";
    scene.generator.wait_for_log(warning);
    assert_eq!(scene.generator.log().matches(warning).count(), 1);
    scene.good_goes_on().await;
}
