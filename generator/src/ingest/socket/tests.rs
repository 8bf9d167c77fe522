use futures_util::FutureExt as _;
use tokio::io::DuplexStream;

use super::*;

const LIMIT: usize = 1 << 16;

/// A socket that a peer has sent this to, and the peer.
async fn socket(sent: &[Vec<u8>]) -> (Socket<DuplexStream>, DuplexStream) {
    let (mut theirs, ours) = tokio::io::duplex(1 << 20);
    theirs.write_all(&sent.concat()).await.unwrap();
    (Socket::new(ours, LIMIT), theirs)
}

fn frame(opcode: OpCode, is_final: bool, contents: &[u8]) -> Vec<u8> {
    let mut frame = Frame::message(contents.to_vec(), OpCode::Data(Data::Binary), is_final);
    frame.header_mut().opcode = opcode;
    frame.header_mut().mask = Some([1, 2, 3, 4]);
    let mut bytes = Vec::new();
    frame.format(&mut bytes).unwrap();
    bytes
}

fn binary(contents: &[u8]) -> Vec<u8> {
    frame(OpCode::Data(Data::Binary), true, contents)
}

fn ping(contents: &[u8]) -> Vec<u8> {
    frame(OpCode::Control(Control::Ping), true, contents)
}

/// The next message and the room that it asked for.
async fn message(socket: &mut Socket<DuplexStream>) -> (usize, Vec<u8>) {
    let Heard::Announced(room) = socket.next().await.unwrap() else {
        panic!("no message");
    };
    socket.admit();
    match socket.next().await.unwrap() {
        Heard::Message { bytes, .. } => (room, bytes),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn messages_of_every_length() {
    let lengths = [0, 1, 3, 4, 125, 126, 1_018, 1_019, 1_024, 5_000, LIMIT];
    let contents = lengths.map(|length| (0..length).map(|at| at as u8).collect::<Vec<u8>>());
    let (mut socket, _peer) = socket(&contents.each_ref().map(|it| binary(it))).await;
    for contents in contents {
        assert_eq!(message(&mut socket).await, (contents.len(), contents));
    }
}

#[tokio::test]
async fn no_message_is_read_before_there_is_room() {
    let contents = vec![7; LIMIT];
    let (mut socket, mut peer) = socket(&[]).await;
    let sent = binary(&contents);
    peer.write_all(&sent).await.unwrap();
    for _ in 0..3 {
        let heard = socket.next().await.unwrap();
        assert!(matches!(heard, Heard::Announced(LIMIT)), "{heard:?}");
        assert_eq!(socket.message.capacity(), 0);
    }
    let mut left = Vec::new();
    let unread = unread(&mut socket, &mut left);
    assert!(unread >= sent.len() - HEAD, "{unread}");
}

/// How much of what was sent is in the stream still.
fn unread(socket: &mut Socket<DuplexStream>, left: &mut Vec<u8>) -> usize {
    while let Some(Ok(1..)) = socket.stream.read_buf(left).now_or_never() {}
    left.len()
}

#[tokio::test]
async fn nothing_is_kept_of_a_message() {
    let (mut socket, mut peer) = socket(&[binary(&[7; LIMIT])]).await;
    assert_eq!(message(&mut socket).await.1.len(), LIMIT);
    assert_eq!(socket.message.capacity(), 0);
    assert!(socket.next().now_or_never().is_none());
    peer.write_all(&binary(b"next")).await.unwrap();
    assert_eq!(message(&mut socket).await, (4, b"next".to_vec()));
}

#[tokio::test]
async fn one_byte_at_a_time() {
    let (mut socket, mut peer) = socket(&[]).await;
    let sent = [ping(b"1"), binary(&[7; 300])].concat();
    let (mut pongs, mut messages) = (0, 0);
    for byte in sent {
        peer.write_all(&[byte]).await.unwrap();
        // What is given up before its end goes on where it was.
        while let Some(heard) = socket.next().now_or_never() {
            match heard.unwrap() {
                Heard::Announced(300) => socket.admit(),
                Heard::Alive(Some(pong)) => {
                    assert_eq!(pong, Frame::pong(b"1".to_vec()));
                    pongs += 1;
                }
                Heard::Message { bytes, .. } => {
                    assert_eq!(bytes, [7; 300]);
                    messages += 1;
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!((pongs, messages), (1, 1));
}

#[tokio::test]
async fn a_message_in_pieces_with_pings_between_them() {
    let piece = |data, is_final, contents| frame(OpCode::Data(data), is_final, contents);
    let (mut socket, _peer) = socket(&[
        piece(Data::Text, false, b"{\"a\":"),
        ping(b"x"),
        piece(Data::Continue, false, "\"é".as_bytes()),
        ping(b"y"),
        piece(Data::Continue, true, b"\"}"),
    ])
    .await;
    assert!(matches!(
        socket.next().await.unwrap(),
        Heard::Announced(LIMIT)
    ));
    socket.admit();
    let Heard::Message { bytes, encoding } = socket.next().await.unwrap() else {
        panic!("no message");
    };
    assert_eq!(bytes, "{\"a\":\"é\"}".as_bytes());
    assert_eq!(encoding, Encoding::Json);
    // Of the pings that came meanwhile the last is answered.
    match socket.next().await.unwrap() {
        Heard::Alive(Some(pong)) => assert_eq!(pong, Frame::pong(b"y".to_vec())),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_is_against_the_protocol() {
    let data = |data, contents: &[u8]| frame(OpCode::Data(data), true, contents);
    let control = |control, contents: &[u8]| frame(OpCode::Control(control), true, contents);
    let begun = frame(OpCode::Data(Data::Binary), false, b"x");
    let mut reserved = binary(b"x");
    reserved[0] |= 0x40;
    let mut unmasked = binary(b"x");
    unmasked[1] &= 0x7f;
    for (sent, problem) in [
        (data(Data::Continue, b"x"), "nothing to continue"),
        (data(Data::Reserved(3), b"x"), "invalid opcode: 3"),
        (control(Control::Reserved(11), b""), "invalid opcode: 11"),
        ([begun.clone(), binary(b"x")].concat(), "fragment"),
        (reserved, "Reserved bits are non-zero"),
        (unmasked, "unmasked frame"),
        (
            frame(OpCode::Control(Control::Ping), false, b""),
            "Fragmented control frame",
        ),
        (control(Control::Ping, &[0; 126]), "Control frame too big"),
        (control(Control::Close, &[3]), "Invalid close sequence"),
        (control(Control::Close, b"\x03\xe8\xff"), "UTF-8"),
        (data(Data::Text, b"\"\xff\""), "UTF-8"),
        (
            data(Data::Binary, &[0; LIMIT + 1]),
            "Message too long: 65537 > 65536",
        ),
        (
            [begun, data(Data::Continue, &[0; LIMIT])].concat(),
            "Message too long: 65537 > 65536",
        ),
        (binary(b"x")[..5].to_vec(), "without closing handshake"),
    ] {
        let (mut socket, peer) = socket(&[sent]).await;
        drop(peer);
        let error = loop {
            match socket.next().await {
                Ok(Heard::Announced(_)) => socket.admit(),
                Ok(other) => panic!("{other:?}, not {problem}"),
                Err(error) => break error.to_string(),
            }
        };
        assert!(error.contains(problem), "{error}, not {problem}");
    }
}

#[tokio::test]
async fn a_goodbye() {
    for (contents, expected) in [
        (b"".as_slice(), None),
        (b"\x03\xe8done", Some((1_000, "done"))),
    ] {
        let (mut socket, _peer) =
            socket(&[frame(OpCode::Control(Control::Close), true, contents)]).await;
        let Heard::Close(frame) = socket.next().await.unwrap() else {
            panic!("no goodbye");
        };
        let told = frame
            .as_ref()
            .map(|frame| (u16::from(frame.code), frame.reason.as_str()));
        assert_eq!(told, expected);
    }
}

#[tokio::test]
async fn a_message_in_pieces_takes_no_more_than_its_room() {
    let piece = |data, is_final, length| frame(OpCode::Data(data), is_final, &vec![7; length]);
    let (mut socket, _peer) = socket(&[
        piece(Data::Binary, false, 0),
        piece(Data::Continue, false, LIMIT / 2 + 1),
        piece(Data::Continue, true, LIMIT / 4),
    ])
    .await;
    let (room, bytes) = message(&mut socket).await;
    assert_eq!(bytes.len(), LIMIT / 2 + 1 + LIMIT / 4);
    assert!(bytes.capacity() <= room, "{}", bytes.capacity());
}

#[tokio::test]
async fn a_ping_is_answered_before_a_message_has_room() {
    let (mut socket, _peer) = socket(&[ping(b"x"), binary(b"next")]).await;
    match socket.next().await.unwrap() {
        Heard::Alive(Some(pong)) => assert_eq!(pong, Frame::pong(b"x".to_vec())),
        other => panic!("{other:?}"),
    }
    assert_eq!(message(&mut socket).await, (4, b"next".to_vec()));
}
