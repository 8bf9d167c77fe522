//! The stream to the generator: numbered batches over a WebSocket, kept until acknowledged.

mod connection;
mod loose;
mod outbox;
pub mod spool;
mod url;

use std::time::{Duration, SystemTime};

use flow::{
    backoff::Backoff,
    source::View,
    time::Timestamp,
    wire::{Encoding, Hello, Resolve},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};

pub use self::{connection::Credentials, outbox::Leftover, url::GeneratorUrl};
use self::{
    connection::{Connection, ConnectionError},
    outbox::{Mismatch, Outbox, Sealed},
    spool::Spool,
};
use crate::{collector::Report, metrics::Meter};

/// How long connecting and the greeting may take together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the generator may be silent before the connection counts as dead; half of it passes before it is asked.
const SILENCE: Duration = Duration::from_secs(60);

/// The longest wait for another attempt in that time.
const LAST_WAIT: Duration = Duration::from_millis(500);

/// How long after the end of capture the rest may take to be delivered.
const FAREWELL: Duration = Duration::from_secs(4);

/// Where to send, and as whom.
#[derive(Clone, Debug)]
pub struct Config {
    /// The generator's addresses: if one does not answer, the next is tried.
    pub urls: Vec<GeneratorUrl>,
    /// The node's name.
    pub node: String,
    /// How flows are named.
    pub resolve: Resolve,
    /// What is captured, and how, in words.
    pub capabilities: Vec<String>,
    /// The view of the cluster whose age the generator is told, if there is one.
    pub view: Option<View>,
    /// How messages are encoded.
    pub encoding: Encoding,
    /// What the generator is shown, and must show.
    pub credentials: Credentials,
}

/// The sending half of the agent: owns everything that is not acknowledged yet.
#[derive(Debug)]
pub struct Uplink {
    config: Config,
    /// The address to try next.
    next_url: usize,
    outbox: Outbox,
    meter: Meter,
    reports: mpsc::Receiver<Report>,
    /// Whether a batch was refused for good, and it is to be found out which.
    one_by_one: bool,
    /// When to give up; set when no more reports will come.
    deadline: Option<Instant>,
}

/// A name for an agent's instance that nobody else has.
#[must_use]
pub fn new_instance() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Why a connection ended.
enum Ended {
    /// Everything is delivered, or the time for it is up.
    Done,
    /// What is left is another instance's.
    NextInstance,
    /// It is to be made anew with the same generator, which had welcomed us, or that is about to end.
    Away(ConnectionError),
    /// It was lost.
    Lost(ConnectionError),
}

impl<E: Into<ConnectionError>> From<E> for Ended {
    fn from(error: E) -> Self {
        Self::Lost(error.into())
    }
}

impl Uplink {
    /// Will send what comes through `reports`, and before it what the spool has.
    #[must_use]
    pub fn new(
        config: Config,
        spool: Option<Spool>,
        reports: mpsc::Receiver<Report>,
        meter: Meter,
    ) -> Self {
        let outbox = Outbox::new(config.resolve, spool, meter.clone());
        Self {
            outbox: outbox.watching(config.view.clone()),
            meter,
            config,
            next_url: 0,
            reports,
            one_by_one: false,
            deadline: None,
        }
    }

    /// Runs until no more reports come and everything is delivered, or until four seconds after the last report. Returns
    /// what was not delivered.
    pub async fn run(mut self) -> Leftover {
        let mut backoff = Backoff::default();
        loop {
            let url = self.config.urls[self.next_url].clone();
            let error = match self.connect_and_stream(&url, &mut backoff).await {
                Ended::Done => break,
                Ended::NextInstance => continue,
                Ended::Away(error) => {
                    // It knows our numbers, which another address may not. If it has gone, the next attempt says so.
                    backoff.reset();
                    let wait = backoff.next(&mut rand::rng());
                    tracing::info!(%url, %error, retry_in = ?wait, "the connection is made anew");
                    if !self.wait(wait).await {
                        break;
                    }
                    continue;
                }
                Ended::Lost(error) => error,
            };
            self.next_url = (self.next_url + 1) % self.config.urls.len();
            // Another address is tried at once, and all of them again after a while.
            let wait = match self.next_url {
                0 => backoff.next(&mut rand::rng()),
                _ => Duration::ZERO,
            };
            tracing::warn!(%url, %error, retry_in = ?wait, "not connected to the generator: flows are kept");
            if !self.wait(wait).await {
                break;
            }
        }
        self.outbox.close()
    }

    async fn connect_and_stream(&mut self, url: &GeneratorUrl, backoff: &mut Backoff) -> Ended {
        let (instance, resolve) = self.outbox.identity();
        let hello = Hello {
            instance,
            node: self.config.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            resolve,
            capabilities: self.config.capabilities.clone(),
            clock: Some(Timestamp::from(SystemTime::now())),
        };
        self.meter.attempts.inc();
        let encoding = self.config.encoding;
        let credentials = self.config.credentials.clone();
        let opening = Connection::open(url, &hello, encoding, &credentials);
        let connecting = timeout(CONNECT_TIMEOUT, opening);
        match self.collect_during(connecting).await {
            None => Ended::Done,
            Some(Ok(Ok((connection, last_sequence)))) => {
                tracing::info!(%url, last_sequence, "connected to the generator");
                self.stream(connection, &hello.instance, last_sequence, backoff)
                    .await
            }
            Some(Ok(Err(error))) => error.into(),
            Some(Err(_elapsed)) => ConnectionError::Silent.into(),
        }
    }

    /// Takes reports in while `work` goes on; `None` when there is no time left, or nothing left to do.
    async fn collect_during<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(work);
        loop {
            if self.is_done() {
                return None;
            }
            tokio::select! {
                result = &mut work => return Some(result),
                report = self.reports.recv(), if self.deadline.is_none() => self.take(report),
                () = reached(self.deadline) => return None,
            }
        }
    }

    /// Takes reports in for a while; `false` when there is no time left, or nothing left to do. The end of reports cuts the
    /// wait short: there are only seconds left to deliver what is there.
    async fn wait(&mut self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        while self.deadline.is_none() {
            tokio::select! {
                () = sleep_until(until) => return true,
                report = self.reports.recv() => self.take(report),
            }
        }
        self.collect_during(sleep(wait.min(LAST_WAIT)))
            .await
            .is_some()
    }

    /// Sends batches and takes acknowledgements until the connection is lost or all is done.
    async fn stream(
        &mut self,
        connection: Connection,
        instance: &str,
        last_sequence: u64,
        backoff: &mut Backoff,
    ) -> Ended {
        let ended = self
            .try_stream(connection, instance, last_sequence, backoff)
            .await;
        self.meter.connected.set(0);
        match ended {
            Ok(Ended::Lost(error @ ConnectionError::Away(_)))
            | Err(Ended::Lost(error @ ConnectionError::Away(_))) => Ended::Away(error),
            Ok(ended) | Err(ended) => ended,
        }
    }

    async fn try_stream(
        &mut self,
        mut connection: Connection,
        instance: &str,
        last_sequence: u64,
        backoff: &mut Backoff,
    ) -> Result<Ended, Ended> {
        if let Some(mismatch) = self.outbox.mismatch(last_sequence) {
            // It would take our next number for a gap, or for one that it knows; as an instance that it does not know we may go
            // on with any number. Nothing that is on its way to a ledger that has forgotten can be counted twice, because all
            // of it is newer than what that ledger has. Of an agent that was set back some of it may have been stored before:
            // a few batches that count twice are better than edges that nobody has.
            if mismatch == Mismatch::SetBack {
                tracing::error!(
                    last_sequence,
                    "the generator has batches that this agent has not sent: was its node put back to an earlier state?"
                );
            }
            self.outbox.start_anew(mismatch);
            return Err(Ended::Away(ConnectionError::Anew));
        }
        let first = self.outbox.first_unacknowledged();
        if last_sequence == 0 && first > 1 {
            tracing::error!(
                first,
                "the generator has forgotten batches that were acknowledged, or another has them"
            );
        }
        self.outbox.acknowledge(last_sequence);
        self.meter.connected.set(1);
        self.resend(&mut connection).await?;
        let mut heard = Instant::now();
        let mut asked = false;
        loop {
            while let Some(batch) = self.outbox.seal()? {
                tracing::debug!(batch.sequence, bytes = batch.message.len(), "sending");
                self.send(&mut connection, batch).await?;
            }
            if self.is_done() {
                connection.close().await;
                return Ok(Ended::Done);
            }
            if self.outbox.is_turn_of_another(instance) {
                connection.close().await;
                return Ok(Ended::NextInstance);
            }
            let patience = if asked { SILENCE } else { SILENCE / 2 };
            tokio::select! {
                received = connection.receive() => match received {
                    Ok(acknowledged) => {
                        heard = Instant::now();
                        asked = false;
                        if let Some(sequence) = acknowledged {
                            self.outbox.acknowledge(sequence);
                            backoff.reset();
                        }
                    }
                    Err(error) => {
                        // Which batch it was shows when they come again one by one.
                        self.one_by_one = matches!(error, ConnectionError::Malformed(_));
                        return Err(error.into());
                    }
                },
                report = self.reports.recv(), if self.deadline.is_none() => self.take(report),
                () = sleep_until(heard + patience) => {
                    if asked {
                        return Err(ConnectionError::Silent.into());
                    }
                    asked = true;
                    match timeout(SILENCE, connection.ask()).await {
                        Ok(asking) => asking?,
                        Err(_elapsed) => return Err(ConnectionError::Silent.into()),
                    }
                }
                () = reached(self.deadline) => return Ok(Ended::Done),
            }
        }
    }

    /// Sends a batch. The other side may hold it back for as long as it is not silent for good; reports are taken in
    /// meanwhile.
    async fn send(&mut self, connection: &mut Connection, batch: Sealed) -> Result<(), Ended> {
        match self
            .collect_during(timeout(SILENCE, connection.send(batch.message)))
            .await
        {
            None => Err(Ended::Done),
            Some(Err(_elapsed)) => Err(ConnectionError::Silent.into()),
            Some(Ok(sent)) => sent.map_err(Ended::Lost),
        }
    }

    /// Sends again what was not acknowledged.
    async fn resend(&mut self, connection: &mut Connection) -> Result<(), Ended> {
        let mut sent = 0;
        while let Some(batch) = self.outbox.unacknowledged_after(sent) {
            sent = batch.sequence;
            self.send(connection, batch).await?;
            if self.one_by_one {
                self.acknowledgement(connection, sent).await?;
            }
        }
        self.one_by_one = false;
        Ok(())
    }

    /// Waits until the only batch under way is stored. If the generator says that it can never accept it, what the batch
    /// stands for is lost, but not what comes after it.
    async fn acknowledgement(
        &mut self,
        connection: &mut Connection,
        sequence: u64,
    ) -> Result<(), Ended> {
        loop {
            let received = self
                .collect_during(timeout(SILENCE, connection.receive()))
                .await;
            match received {
                None => return Err(Ended::Done),
                Some(Err(_elapsed)) => return Err(ConnectionError::Silent.into()),
                Some(Ok(Ok(acknowledged))) => {
                    let acknowledged = acknowledged.unwrap_or(0);
                    self.outbox.acknowledge(acknowledged);
                    if acknowledged >= sequence {
                        return Ok(());
                    }
                }
                Some(Ok(Err(error))) => {
                    if matches!(error, ConnectionError::Malformed(_))
                        && let Some(connections) = self.outbox.give_up_first()
                    {
                        tracing::error!(connections, %error, "connections are lost");
                    }
                    return Err(error.into());
                }
            }
        }
    }

    fn take(&mut self, report: Option<Report>) {
        match report {
            Some(report) => {
                self.outbox.add(report);
                self.outbox.measure();
            }
            None => self.deadline = Some(Instant::now() + FAREWELL),
        }
    }

    fn is_done(&self) -> bool {
        self.deadline.is_some() && self.outbox.is_empty()
    }
}

async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
