//! A thousand agents at one generator.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use flow::{
    record::FlowRecord,
    time::Timestamp,
    wire::{
        self, AgentMessage, Batch, Encoding, GeneratorMessage, Hello, Resolve, SUBPROTOCOL, Window,
    },
};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{net::TcpStream, sync::Semaphore, task::JoinSet, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Message, client::IntoClientRequest as _, http::HeaderValue},
};

use crate::{
    programs::{PATIENCE, generator},
    truth::record,
};

const AGENTS: usize = 1_000;

/// For so long each agent sends as fast as it is acknowledged.
const RACE: Duration = Duration::from_secs(8);

/// How many may connect at a time: a slow machine takes longer over all of them than each may take.
const CONNECTING: usize = 100;

/// What a generator without optimisation may take for a thousand connections and a small ledger.
const MAX_RESIDENT: u64 = 300 << 20;

/// A client that keeps to the protocol.
pub(crate) struct Client {
    socket: WebSocketStream<TcpStream>,
}

impl Client {
    /// Connects and says hello. Returns the last batch that is stored.
    pub(crate) async fn join(address: SocketAddr, instance: &str) -> Result<(Self, u64)> {
        let mut request = format!("ws://{address}/agents").into_client_request()?;
        let subprotocol = HeaderValue::from_static(SUBPROTOCOL);
        request
            .headers_mut()
            .insert("sec-websocket-protocol", subprotocol);
        let stream = TcpStream::connect(address).await?;
        let (socket, _) = client_async(request, stream).await?;
        let mut client = Self { socket };
        let hello = Hello {
            instance: instance.to_owned(),
            node: format!("node-{instance}"),
            version: "1".to_owned(),
            resolve: Resolve::Both,
            capabilities: Vec::new(),
            clock: None,
        };
        client.say(&AgentMessage::Hello(hello)).await?;
        match client.hear().await? {
            GeneratorMessage::Welcome { last_sequence } => Ok((client, last_sequence)),
            other => bail!("{other:?}"),
        }
    }

    pub(crate) async fn send(&mut self, sequence: u64, flows: Vec<FlowRecord>) -> Result<()> {
        let moment = Timestamp::from_nanos(1_000_000_000_000);
        let batch = Batch {
            sequence,
            window: Window {
                from: moment,
                to: moment,
            },
            flows,
            losses: BTreeMap::new(),
            health: None,
        };
        self.say(&AgentMessage::Batch(batch)).await
    }

    pub(crate) async fn acknowledged(&mut self) -> Result<u64> {
        match self.hear().await? {
            GeneratorMessage::Ack { sequence } => Ok(sequence),
            other => bail!("{other:?}"),
        }
    }

    async fn say(&mut self, message: &AgentMessage) -> Result<()> {
        let bytes = wire::encode(message, Encoding::MessagePack)?;
        Ok(self.socket.send(Message::binary(bytes)).await?)
    }

    async fn hear(&mut self) -> Result<GeneratorMessage> {
        loop {
            let message = timeout(PATIENCE, self.socket.next()).await?;
            match message.context("closed")?? {
                Message::Binary(bytes) => return Ok(wire::decode(&bytes, Encoding::MessagePack)?),
                Message::Ping(_) | Message::Pong(_) => {}
                other => bail!("{other:?}"),
            }
        }
    }
}

pub(crate) fn run() -> Result<()> {
    let data = tempfile::tempdir()?;
    let (program, address) = generator(&["--data-dir", &data.path().display().to_string()])?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut acknowledged = runtime.block_on(race(address))?;
    ensure!(acknowledged.len() == AGENTS);
    acknowledged.sort_unstable();
    let (slowest, median) = (acknowledged[0], acknowledged[AGENTS / 2]);
    ensure!(
        slowest * 2 >= median && slowest > 0,
        "slowest {slowest}, median {median}"
    );
    let resident = program.resident()?;
    ensure!(resident < MAX_RESIDENT, "{} MiB resident", resident >> 20);
    program.terminate()?;
    let (ledger, said) = crate::programs::export(data.path())?;
    ensure!(said.is_empty(), "{said}");
    let stored: u64 = ledger.values().sum();
    let sent: u64 = acknowledged.iter().sum::<u64>() * FLOWS;
    ensure!(stored == sent, "{stored} stored of {sent}");
    Ok(())
}

const FLOWS: u64 = 5;

/// Batches that were acknowledged, for each agent.
async fn race(address: SocketAddr) -> Result<Vec<u64>> {
    let connecting = Arc::new(Semaphore::new(CONNECTING));
    let ready = Arc::new(tokio::sync::Barrier::new(AGENTS));
    let mut agents = JoinSet::new();
    for number in 0..AGENTS {
        let (connecting, ready) = (Arc::clone(&connecting), Arc::clone(&ready));
        agents.spawn(async move {
            let place = connecting.acquire().await?;
            let (mut client, _) = Client::join(address, &number.to_string()).await?;
            drop(place);
            ready.wait().await;
            let end = Instant::now() + RACE;
            let mut sequence = 0;
            while Instant::now() < end {
                sequence += 1;
                let flows = (1..=FLOWS).map(|port| record(u16::try_from(port)?, 1, 1_000));
                client.send(sequence, flows.collect::<Result<_>>()?).await?;
                while client.acknowledged().await? < sequence {}
            }
            anyhow::Ok(sequence)
        });
    }
    let mut acknowledged = Vec::new();
    while let Some(agent) = agents.join_next().await {
        acknowledged.push(agent??);
    }
    Ok(acknowledged)
}
