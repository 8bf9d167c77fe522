//! The stream to the generator: numbered batches over a WebSocket, kept until acknowledged.

mod connection;
mod outbox;
mod url;

use std::time::Duration;

use bytes::Bytes;
use flow::{backoff::Backoff, wire::Hello};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};

pub use self::url::GeneratorUrl;
use self::{
    connection::{Connection, ConnectionError},
    outbox::Outbox,
};
use crate::collector::Report;

/// How long connecting and the greeting may take together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the generator may be silent before the connection counts as dead; half of it passes before it is asked.
const SILENCE: Duration = Duration::from_secs(60);

/// The longest wait for another attempt in that time.
const LAST_WAIT: Duration = Duration::from_millis(500);

/// How long after the end of capture the rest may take to be delivered.
const FAREWELL: Duration = Duration::from_secs(4);

/// The sending half of the agent: owns everything that is not acknowledged yet.
#[derive(Debug)]
pub struct Uplink {
    url: GeneratorUrl,
    hello: Hello,
    outbox: Outbox,
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
    /// It was lost.
    Lost(ConnectionError),
}

impl Uplink {
    /// Will send what comes through `reports` to `url`.
    #[must_use]
    pub fn new(url: GeneratorUrl, hello: Hello, reports: mpsc::Receiver<Report>) -> Self {
        Self {
            url,
            outbox: Outbox::new(hello.resolve),
            hello,
            reports,
            one_by_one: false,
            deadline: None,
        }
    }

    /// Runs until no more reports come and everything is delivered, or until four seconds after the last report. Returns
    /// how many connections were not delivered.
    pub async fn run(mut self) -> u64 {
        let mut backoff = Backoff::default();
        loop {
            let url = self.url.clone();
            let hello = self.hello.clone();
            let connecting = timeout(CONNECT_TIMEOUT, Connection::open(&url, &hello));
            let error = match self.collect_during(connecting).await {
                None => break,
                Some(Ok(Ok((connection, last_sequence)))) => {
                    tracing::info!(url = %self.url, last_sequence, "connected to the generator");
                    match self.stream(connection, last_sequence, &mut backoff).await {
                        Ended::Done => break,
                        Ended::Lost(error) => error,
                    }
                }
                Some(Ok(Err(error))) => error,
                Some(Err(_elapsed)) => ConnectionError::Silent,
            };
            let wait = backoff.next(&mut rand::rng());
            tracing::warn!(url = %self.url, %error, retry_in = ?wait, "not connected to the generator: flows are kept");
            if !self.wait(wait).await {
                break;
            }
        }
        self.outbox.connections()
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
        mut connection: Connection,
        last_sequence: u64,
        backoff: &mut Backoff,
    ) -> Ended {
        if last_sequence < self.outbox.acknowledged() {
            // An older ledger was put back, or the ledger is another one. It would take our next number for a gap; as an
            // instance that it does not know we may go on with any number, and nothing that is on its way can be counted
            // twice, because all of it is newer than what that ledger has.
            tracing::error!(
                last_sequence,
                acknowledged = self.outbox.acknowledged(),
                "the generator has forgotten batches that it had acknowledged"
            );
            self.hello.instance = new_instance();
            self.outbox.start_anew();
            return Ended::Lost(ConnectionError::Forgotten);
        }
        self.outbox.acknowledge(last_sequence);
        if let Err(ended) = self.resend(&mut connection).await {
            return ended;
        }
        let mut heard = Instant::now();
        let mut asked = false;
        loop {
            if let Err(ended) = self.send_pending(&mut connection).await {
                return ended;
            }
            if self.is_done() {
                connection.close().await;
                return Ended::Done;
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
                        return Ended::Lost(error);
                    }
                },
                report = self.reports.recv(), if self.deadline.is_none() => self.take(report),
                () = sleep_until(heard + patience) => {
                    if asked {
                        return Ended::Lost(ConnectionError::Silent);
                    }
                    asked = true;
                    match timeout(SILENCE, connection.ask()).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => return Ended::Lost(error),
                        Err(_elapsed) => return Ended::Lost(ConnectionError::Silent),
                    }
                }
                () = reached(self.deadline) => return Ended::Done,
            }
        }
    }

    async fn send_pending(&mut self, connection: &mut Connection) -> Result<(), Ended> {
        loop {
            let sealed = self.outbox.seal();
            let Some(batch) = sealed.map_err(|error| Ended::Lost(error.into()))? else {
                return Ok(());
            };
            tracing::debug!(batch.sequence, bytes = batch.message.len(), "sending");
            let message = batch.message.clone();
            self.send(connection, message).await?;
        }
    }

    /// Sends a message. The other side may hold it back for as long as it is not silent for good; reports are taken in
    /// meanwhile.
    async fn send(&mut self, connection: &mut Connection, message: Bytes) -> Result<(), Ended> {
        match self
            .collect_during(timeout(SILENCE, connection.send(message)))
            .await
        {
            None => Err(Ended::Done),
            Some(Err(_elapsed)) => Err(Ended::Lost(ConnectionError::Silent)),
            Some(Ok(sent)) => sent.map_err(Ended::Lost),
        }
    }

    /// Sends again what was not acknowledged.
    async fn resend(&mut self, connection: &mut Connection) -> Result<(), Ended> {
        let mut sent = 0;
        while let Some((sequence, message)) = self.outbox.unacknowledged_after(sent) {
            sent = sequence;
            self.send(connection, message).await?;
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
                Some(Err(_elapsed)) => return Err(Ended::Lost(ConnectionError::Silent)),
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
                    return Err(Ended::Lost(error));
                }
            }
        }
    }

    fn take(&mut self, report: Option<Report>) {
        match report {
            Some(report) => self.outbox.add(report),
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
