//! Time stands still here unless everybody waits, so that minutes of silence take no time.

use flow::{
    time::Timestamp,
    wire::{AgentMessage, Batch, Hello, Window},
};
use futures_util::{SinkExt as _, StreamExt as _, future::AbortHandle};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    task::JoinHandle,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};

use super::*;
use crate::ingest::{
    Receiver, Request,
    arrival::{ARRIVAL_DEADLINE, PATIENCE},
    door::Door,
    queue,
};

struct Peer {
    socket: WebSocketStream<DuplexStream>,
    queue: Sender,
    requests: Receiver,
    stop: watch::Sender<bool>,
    conversation: JoinHandle<()>,
}

impl Peer {
    async fn connect() -> Self {
        Self::connect_as(Admission::default()).await
    }

    async fn connect_as(admission: Admission) -> Self {
        Self::connect_beside(Nodes::default(), admission).await
    }

    async fn connect_beside(nodes: Nodes, admission: Admission) -> Self {
        let (ours, theirs) = tokio::io::duplex(1 << 10);
        let (queue, requests) = queue();
        let (stop, stopping) = watch::channel(false);
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let call = Call {
            peer,
            admission,
            stranger: Door::default()
                .enter(peer.ip(), AbortHandle::new_pair().0)
                .unwrap(),
            ends: Ends::default(),
            nodes,
            meter: Meter::default(),
        };
        Self {
            socket: WebSocketStream::from_raw_socket(ours, Role::Client, None).await,
            queue: queue.clone(),
            requests,
            stop,
            conversation: tokio::spawn(converse(theirs, call, queue, stopping)),
        }
    }

    async fn say(&mut self, message: &AgentMessage) {
        let bytes = wire::encode(message, Encoding::MessagePack).unwrap();
        self.socket.send(Message::binary(bytes)).await.unwrap();
    }

    /// Says hello, and is welcomed.
    async fn join(&mut self) {
        self.say(&hello()).await;
        let session = self.joining().await;
        session.acknowledge(0);
        let welcome = GeneratorMessage::Welcome { last_sequence: 0 };
        assert_eq!(self.hear().await, Some(welcome));
    }

    /// The next batch that reaches the keeper.
    async fn receive(&mut self) -> (Arc<Session>, u64) {
        match self.requests.recv().await {
            Some(Request {
                session,
                ask: Ask::Store(batch),
                ..
            }) => (session, batch.sequence),
            other => panic!("{other:?}"),
        }
    }

    /// The next message that is for the agent; nothing when the connection ends.
    async fn hear(&mut self) -> Option<GeneratorMessage> {
        loop {
            match self.socket.next().await?.unwrap() {
                Message::Binary(bytes) => {
                    return Some(wire::decode(&bytes, Encoding::MessagePack).unwrap());
                }
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn hello() -> AgentMessage {
    AgentMessage::Hello(Hello {
        instance: "one".to_owned(),
        node: "node-1".to_owned(),
        version: "1".to_owned(),
        resolve: flow::wire::Resolve::Both,
        capabilities: Vec::new(),
        clock: None,
    })
}

/// One of 15 KiB, most of which are reasons for losses.
fn large_batch(sequence: u64) -> AgentMessage {
    let AgentMessage::Batch(mut batch) = batch(sequence) else {
        panic!("not a batch");
    };
    batch.losses = (0..60)
        .map(|number| (format!("{number:0>250}"), 1))
        .collect();
    AgentMessage::Batch(batch)
}

fn batch(sequence: u64) -> AgentMessage {
    let moment = Timestamp::from_nanos(1);
    AgentMessage::Batch(Batch {
        sequence,
        window: Window {
            from: moment,
            to: moment,
        },
        flows: Vec::new(),
        losses: Default::default(),
        health: None,
    })
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_no_hello_is_refused() {
    let mut peer = Peer::connect().await;
    let start = Instant::now();
    let Some(GeneratorMessage::Refuse { reason, .. }) = peer.hear().await else {
        panic!("not refused");
    };
    assert_eq!(reason, "no hello within 10 s");
    assert_eq!(start.elapsed(), HELLO_DEADLINE);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_answers_pings_may_be_silent() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    let long = MIN_AGE - Duration::from_secs(1);
    timeout(long, peer.hear()).await.unwrap_err();
    peer.say(&batch(1)).await;
    assert_eq!(peer.receive().await.1, 1);
}

/// A token that was good once is not good for ever.
#[tokio::test(start_paused = true)]
async fn who_a_peer_is_must_be_shown_again_now_and_then() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    let start = Instant::now();
    let frame = loop {
        match peer.socket.next().await {
            Some(Ok(Message::Ping(_))) => {}
            Some(Ok(Message::Close(Some(frame)))) => break frame,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(frame.code, CloseCode::Away);
    let age = start.elapsed();
    assert!(age >= MIN_AGE && age <= MAX_AGE, "{age:?}");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_is_closed() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    let start = Instant::now();
    // Nobody reads the socket meanwhile, so nobody answers.
    (&mut peer.conversation).await.unwrap();
    assert_eq!(start.elapsed(), SILENCE_DEADLINE + CLOSE_DEADLINE);
    // Frames of the generator are not masked: their text can be read as it is.
    let mut sent = Vec::new();
    peer.socket
        .into_inner()
        .read_to_end(&mut sent)
        .await
        .unwrap();
    let sent = String::from_utf8_lossy(&sent);
    assert!(sent.contains("nothing heard for 60 s"), "{sent}");
}

#[tokio::test(start_paused = true)]
async fn a_peer_is_held_back_when_there_is_no_room_and_loses_nothing() {
    const BATCHES: u64 = 1_000;
    let mut peer = Peer::connect().await;
    peer.join().await;
    let mut sent = 0;
    let stuck = Duration::from_secs(600);
    while sent < BATCHES
        && timeout(stuck, peer.say(&large_batch(sent + 1)))
            .await
            .is_ok()
    {
        sent += 1;
    }
    assert!(sent < BATCHES, "nothing held the peer back");
    assert!(!peer.conversation.is_finished());
    for expected in 1..=sent {
        let (session, sequence) = peer.receive().await;
        assert_eq!(sequence, expected);
        session.acknowledge(expected);
    }
    let heard_last =
        async { while peer.hear().await != Some(GeneratorMessage::Ack { sequence: sent }) {} };
    timeout(stuck, heard_last).await.unwrap();
}

impl Peer {
    /// Announces a message of this length, and sends nothing of it.
    async fn announce(&mut self, length: usize) {
        let mut header = vec![0x82, 0x80 | 127];
        header.extend((length as u64).to_be_bytes());
        header.extend([0; 4]);
        let stream = self.socket.get_mut();
        stream.write_all(&header).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_message_that_arrives_slowly() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    let start = Instant::now();
    peer.announce(MAX_MESSAGE_BYTES).await;
    while peer.queue.load().kib == 0 {
        tokio::task::yield_now().await;
    }
    // There is room for one more of the longest messages, and when this one is set aside for two.
    let _one = peer.queue.reserve(MAX_MESSAGE_BYTES).await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
    let _other = peer.queue.reserve(MAX_MESSAGE_BYTES).await.unwrap();
    let waited = start.elapsed();
    assert!(waited >= PATIENCE && waited < 2 * PATIENCE, "{waited:?}");
    // It may go on as slowly until it is taken for silent.
    timeout(SILENCE_DEADLINE / 2, &mut peer.conversation)
        .await
        .unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn room_for_slow_messages_is_bounded() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    let queue = peer.queue.clone();
    let set_aside = |number: usize| {
        let node = format!("another-{number}");
        queue.set_aside(&node, MAX_MESSAGE_BYTES)
    };
    let first = set_aside(0).unwrap();
    assert_eq!(
        set_aside(0).unwrap_err().reason,
        "another message of this node arrives as slowly as this one"
    );
    drop(first);
    let aside: Vec<_> = (0..9).filter_map(|number| set_aside(number).ok()).collect();
    assert_eq!(aside.len(), 8);
    peer.announce(MAX_MESSAGE_BYTES).await;
    let refusal = GeneratorMessage::Refuse {
        reason: "too many messages arrive as slowly as this one".to_owned(),
        malformed: false,
    };
    assert_eq!(peer.hear().await, Some(refusal));
    peer.conversation.await.unwrap();
    drop(aside);
    assert_eq!(peer.queue.load().kib, 0);
}

/// The keeper may be at work for long: what waits for it has come.
#[tokio::test(start_paused = true)]
async fn a_slow_message_that_has_come_does_not_stand_in_the_next_one_s_way() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    for sequence in 1..=3 {
        let AgentMessage::Batch(batch) = large_batch(sequence) else {
            panic!("not a batch");
        };
        let batch = wire::encode(&AgentMessage::Batch(batch), Encoding::MessagePack).unwrap();
        peer.announce(batch.len()).await;
        tokio::time::sleep(2 * PATIENCE).await;
        // It comes while it has a place apart, so another of its node has none.
        assert!(peer.queue.set_aside("node-1", 1).is_err());
        peer.socket.get_mut().write_all(&batch).await.unwrap();
        tokio::time::sleep(PATIENCE).await;
        drop(peer.queue.set_aside("node-1", 1).unwrap());
    }
    for expected in 1..=3 {
        assert_eq!(peer.receive().await.1, expected);
    }
}

/// The machine may be busy, so that what came in time is looked at late.
#[tokio::test(start_paused = true)]
async fn what_has_come_in_time_is_not_slow() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    let _other = peer.queue.set_aside("node-1", 1).unwrap();
    for sequence in 1..=20 {
        let batch = wire::encode(&batch(sequence), Encoding::MessagePack).unwrap();
        let kib = peer.queue.load().kib;
        peer.announce(batch.len()).await;
        while peer.queue.load().kib == kib {
            tokio::task::yield_now().await;
        }
        // Nobody else has a turn before the time is over.
        peer.socket.get_mut().write_all(&batch).await.unwrap();
        tokio::time::advance(2 * PATIENCE).await;
        assert_eq!(peer.receive().await.1, sequence);
    }
}

#[tokio::test(start_paused = true)]
async fn a_hello_is_short() {
    let mut peer = Peer::connect().await;
    peer.announce(MAX_HELLO_BYTES + 1).await;
    let Some(GeneratorMessage::Refuse { reason, .. }) = peer.hear().await else {
        panic!("not refused");
    };
    assert!(
        reason.contains("Message too long: 16385 > 16384"),
        "{reason}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_read_is_given_up() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    peer.say(&batch(1)).await;
    let (session, _) = peer.receive().await;
    while !peer.conversation.is_finished() {
        session.acknowledge(1);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    peer.conversation.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stopping_generator_says_goodbye() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    peer.stop.send_replace(true);
    let Some(Ok(Message::Close(Some(frame)))) = peer.socket.next().await else {
        panic!("no close frame");
    };
    assert_eq!(frame.code, CloseCode::Away);
}

#[tokio::test(start_paused = true)]
async fn a_token_of_another_node_s_pod_is_refused() {
    let mut peer = Peer::connect_as(Admission {
        node: Some("node-2".to_owned()),
    })
    .await;
    peer.say(&hello()).await;
    let reason = "the token is of a pod on node node-2, not on node-1".to_owned();
    let refusal = GeneratorMessage::Refuse {
        reason,
        malformed: false,
    };
    assert_eq!(peer.hear().await, Some(refusal));
}

/// The keeper is not asked, which may have no time for long.
#[tokio::test(start_paused = true)]
async fn one_node_s_token_does_not_take_the_places_of_all() {
    let nodes = Nodes::default();
    let connect = async |node: Option<&str>| {
        let node = node.map(str::to_owned);
        let mut peer = Peer::connect_beside(nodes.clone(), Admission { node }).await;
        peer.say(&hello()).await;
        peer
    };
    let mut few = Vec::new();
    for _ in 0..8 {
        let mut peer = connect(Some("node-1")).await;
        peer.joining().await;
        few.push(peer);
    }
    let refusal = GeneratorMessage::Refuse {
        reason: "8 agents of node node-1 are connected".to_owned(),
        malformed: false,
    };
    let mut more = connect(Some("node-1")).await;
    assert_eq!(more.hear().await, Some(refusal));
    // Of whom no token says it nobody knows it.
    connect(None).await.joining().await;
    let one = few.pop().unwrap();
    drop(one.socket);
    one.stop.send_replace(true);
    one.conversation.await.unwrap();
    connect(Some("node-1")).await.joining().await;
}

#[tokio::test(start_paused = true)]
async fn the_keeper_learns_whether_a_token_says_the_node() {
    for (node, is_proven) in [(Some("node-1".to_owned()), true), (None, false)] {
        let mut peer = Peer::connect_as(Admission { node }).await;
        peer.join().await;
        peer.say(&batch(1)).await;
        let (session, _) = peer.receive().await;
        assert_eq!(session.is_node_proven, is_proven);
    }
}

impl Peer {
    /// Begins a message in pieces, with a piece that is empty.
    async fn begin(&mut self) {
        let stream = self.socket.get_mut();
        stream.write_all(&[0x02, 0x80, 0, 0, 0, 0]).await.unwrap();
    }

    async fn ping(&mut self) {
        let stream = self.socket.get_mut();
        stream.write_all(&[0x89, 0x80, 0, 0, 0, 0]).await.unwrap();
    }

    async fn wait_for_load(&self) {
        while self.queue.load().kib == 0 {
            tokio::task::yield_now().await;
        }
    }

    /// All the room that is not apart, as soon as it can be had.
    fn all_room(&self) -> impl Future<Output = [Room; 2]> + use<> {
        let queue = self.queue.clone();
        async move {
            let one = queue.reserve(MAX_MESSAGE_BYTES).await.unwrap();
            [one, queue.reserve(MAX_MESSAGE_BYTES).await.unwrap()]
        }
    }
}

#[tokio::test(start_paused = true)]
async fn pings_do_not_prolong_a_message() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    peer.begin().await;
    peer.wait_for_load().await;
    let start = Instant::now();
    let all_room = tokio::spawn(peer.all_room());
    while start.elapsed() < 2 * PATIENCE {
        peer.ping().await;
        tokio::time::sleep(PATIENCE / 5).await;
    }
    assert!(all_room.is_finished(), "others wait");
    while !peer.conversation.is_finished() && start.elapsed() < 2 * ARRIVAL_DEADLINE {
        peer.ping().await;
        let reason = "a message took more than 60 s to arrive".to_owned();
        let refusal = GeneratorMessage::Refuse {
            reason,
            malformed: false,
        };
        let pause = Duration::from_secs(5);
        while let Ok(heard) = timeout(pause, peer.socket.next()).await {
            match heard.unwrap().unwrap() {
                Message::Pong(_) | Message::Ping(_) => {}
                Message::Binary(bytes) => {
                    let heard = wire::decode::<GeneratorMessage>(&bytes, Encoding::MessagePack);
                    assert_eq!(heard.unwrap(), refusal);
                    let elapsed = start.elapsed();
                    assert!(elapsed <= ARRIVAL_DEADLINE + pause, "{elapsed:?}");
                    return;
                }
                other => panic!("{other:?}"),
            }
        }
    }
    panic!("it goes on");
}

/// Neither for one that had its room before, nor for one that is given it meanwhile.
#[tokio::test(start_paused = true)]
async fn nobody_waits_for_a_peer_that_does_not_read() {
    for waits_for_room in [false, true] {
        let mut peer = Peer::connect().await;
        peer.join().await;
        peer.say(&batch(1)).await;
        let (session, _) = peer.receive().await;
        let room = if waits_for_room {
            Some(peer.all_room().await)
        } else {
            None
        };
        peer.announce(MAX_MESSAGE_BYTES).await;
        for _ in 0..100 {
            session.acknowledge(1);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(room);
        tokio::task::yield_now().await;
        timeout(2 * PATIENCE, peer.all_room()).await.unwrap();
        assert!(!peer.conversation.is_finished());
    }
}

impl Peer {
    /// The session that asks the keeper to let it in.
    async fn joining(&mut self) -> Arc<Session> {
        match self.requests.recv().await {
            Some(Request {
                session,
                ask: Ask::Join,
                ..
            }) => session,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_is_welcomed_while_the_messages_of_others_wait() {
    let mut peer = Peer::connect().await;
    let _room = peer.all_room().await;
    timeout(Duration::from_secs(1), peer.join()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn no_message_has_room_before_the_welcome() {
    let mut peer = Peer::connect().await;
    peer.say(&hello()).await;
    let session = peer.joining().await;
    peer.say(&batch(1)).await;
    tokio::time::sleep(PATIENCE / 2).await;
    assert_eq!(peer.queue.load().kib, 0);
    session.acknowledge(0);
    let welcome = GeneratorMessage::Welcome { last_sequence: 0 };
    assert_eq!(peer.hear().await, Some(welcome));
    assert_eq!(peer.receive().await.1, 1);
}

#[tokio::test(start_paused = true)]
async fn who_is_not_let_in_is_told_why() {
    let mut peer = Peer::connect().await;
    peer.say(&hello()).await;
    peer.joining().await.refuse(Refusal::policy("no"));
    let refusal = GeneratorMessage::Refuse {
        reason: "no".to_owned(),
        malformed: false,
    };
    assert_eq!(peer.hear().await, Some(refusal));
}

#[tokio::test(start_paused = true)]
async fn who_waits_to_be_let_in_is_sent_away_when_the_generator_stops() {
    let mut peer = Peer::connect().await;
    peer.say(&hello()).await;
    peer.joining().await;
    peer.stop.send_replace(true);
    let Some(Ok(Message::Close(Some(frame)))) = peer.socket.next().await else {
        panic!("no close frame");
    };
    assert_eq!(frame.code, CloseCode::Away);
}

#[tokio::test(start_paused = true)]
async fn a_goodbye_is_returned() {
    for (said, returned) in [
        (None, None),
        (Some(CloseCode::Away), Some(CloseCode::Away)),
        (Some(CloseCode::Abnormal), Some(CloseCode::Protocol)),
    ] {
        let mut peer = Peer::connect().await;
        peer.join().await;
        let mut frame = vec![0x88, 0x80 | if said.is_some() { 2 } else { 0 }, 0, 0, 0, 0];
        frame.extend(
            said.into_iter()
                .flat_map(|code| u16::from(code).to_be_bytes()),
        );
        peer.socket.get_mut().write_all(&frame).await.unwrap();
        match peer.socket.next().await {
            Some(Ok(Message::Close(frame))) => {
                assert_eq!(frame.map(|frame| frame.code), returned);
            }
            other => panic!("{other:?}"),
        }
    }
}

/// What batches take in memory while they wait is counted, and no more is decoded than there is room for.
#[tokio::test(start_paused = true)]
async fn decoded_batches_are_held_back() {
    let mut peer = Peer::connect().await;
    peer.join().await;
    let mut taken = Vec::new();
    for _ in 0..4 {
        let mut room = peer.queue.reserve(1).await.unwrap();
        peer.queue.reserve_decoded(&mut room).await.unwrap();
        taken.push(room);
    }
    peer.say(&batch(1)).await;
    let second = Duration::from_secs(1);
    timeout(second, peer.receive()).await.unwrap_err();
    for room in &mut taken {
        room.is_of(1);
    }
    let (_, sequence) = timeout(second, peer.receive()).await.unwrap();
    assert_eq!(sequence, 1);
}
