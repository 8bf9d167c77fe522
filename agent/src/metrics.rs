//! What the agent counts, and where it is asked: `--metrics ADDR` answers `/healthz`, `/readyz` and `/metrics`.

use std::{future::ready, io, net::SocketAddr};

use flow::{source::View, transport::answer_watchers};
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{CONTENT_TYPE, HeaderValue},
};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::net::TcpListener;

use crate::{collector::Report, pulse::Pulse};

/// What has happened since the start, and how things are. Copies count together.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    connections: Counter,
    records: Counter,
    drains: Counter,
    losses: Family<OfReason, Counter>,
    pub(crate) acknowledged: Counter,
    pub(crate) attempts: Counter,
    pub(crate) connected: Gauge,
    pub(crate) in_flight: Gauge,
    pub(crate) pending: Gauge,
    pub(crate) spool_bytes: Gauge,
    pub(crate) spool_batches: Gauge,
    pub(crate) scope: ScopeMeter,
}

/// What the log of the Scope probe had. Copies count together.
#[derive(Clone, Debug, Default)]
pub struct ScopeMeter {
    pub(crate) bytes: Counter,
    pub(crate) records: Counter,
    pub(crate) malformed: Counter,
    pub(crate) too_long: Counter,
    outcomes: Family<OfOutcome, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfOutcome {
    outcome: String,
}

impl ScopeMeter {
    /// Counts records of which the same became.
    pub(crate) fn count(&self, outcome: &str, count: u64) {
        let outcome = OfOutcome {
            outcome: outcome.to_owned(),
        };
        self.outcomes.get_or_create(&outcome).inc_by(count);
    }
}

/// What a drain amounts to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counted {
    records: u64,
    connections: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfReason {
    reason: String,
}

impl Meter {
    /// Counts a drain, to be added when it is kept.
    pub(crate) fn count(report: &Report) -> Counted {
        Counted {
            records: report.records.len() as u64,
            connections: report.records.iter().map(|record| record.count).sum(),
        }
    }

    /// Adds a drain.
    pub(crate) fn add(&self, counted: Counted) {
        self.records.inc_by(counted.records);
        self.connections.inc_by(counted.connections);
        self.drains.inc();
    }

    /// Counts what is lost, once: where the loss arises, and not where word of it is passed on.
    pub(crate) fn lose(&self, reason: &str, count: u64) {
        let reason = OfReason {
            reason: reason.to_owned(),
        };
        self.losses.get_or_create(&reason).inc_by(count);
    }

    /// What was lost for a reason.
    #[cfg(test)]
    pub(crate) fn lost(&self, reason: &str) -> u64 {
        let reason = OfReason {
            reason: reason.to_owned(),
        };
        self.losses.get_or_create(&reason).get()
    }

    /// How many connections these were.
    #[cfg(test)]
    pub(crate) fn connections(&self) -> u64 {
        self.connections.get()
    }

    /// How many drains were taken over for delivery.
    #[must_use]
    pub fn drains(&self) -> u64 {
        self.drains.get()
    }

    fn text(&self, view: &View) -> Result<String, std::fmt::Error> {
        let mut registry = Registry::with_prefix("microshield_agent");
        for (name, help, counter) in [
            (
                "connections",
                "Connections that were captured and named",
                &self.connections,
            ),
            (
                "records",
                "Flow records that they were added up to",
                &self.records,
            ),
            (
                "drains",
                "Drains of the kernel's maps, and of single connections between them, that were taken over for delivery",
                &self.drains,
            ),
            (
                "batches_acknowledged",
                "Batches that the generator has stored",
                &self.acknowledged,
            ),
            (
                "connection_attempts",
                "Attempts to connect to the generator",
                &self.attempts,
            ),
            (
                "scope_log_bytes",
                "Bytes of the Scope probe's log that were read",
                &self.scope.bytes,
            ),
            (
                "scope_log_records",
                "Connections that the Scope probe's log tells of",
                &self.scope.records,
            ),
            (
                "scope_log_malformed",
                "Records of the Scope probe that are malformed",
                &self.scope.malformed,
            ),
            (
                "scope_log_too_long",
                "Lines of the Scope probe's log that are too long to be read",
                &self.scope.too_long,
            ),
        ] {
            registry.register(name, help, counter.clone());
        }
        registry.register(
            "observations_lost",
            "Observations that were lost, by reason",
            self.losses.clone(),
        );
        registry.register(
            "scope_connections",
            "Connections of the Scope probe's log by what became of them: merged with one that was captured, counted by an \
             earlier process or long ago, seen by the probe only, passed on from elsewhere to another node, or left out for want of room",
            self.scope.outcomes.clone(),
        );
        let stale = Gauge::<i64>::default();
        if let Some(since) = view.stale_since() {
            let now = flow::time::Timestamp::from(std::time::SystemTime::now());
            let seconds = now.as_nanos().saturating_sub(since.as_nanos()) / 1_000_000_000;
            stale.set(i64::try_from(seconds).unwrap_or(i64::MAX));
        }
        let ready = Gauge::<i64>::default();
        ready.set(i64::from(view.is_ready()));
        for (name, help, gauge) in [
            (
                "connected",
                "Whether there is a connection to the generator",
                &self.connected,
            ),
            (
                "batches_in_flight",
                "Batches that are sent and not acknowledged",
                &self.in_flight,
            ),
            (
                "records_pending",
                "Flow records that wait in memory",
                &self.pending,
            ),
            (
                "spool_bytes",
                "Bytes of the spool's files",
                &self.spool_bytes,
            ),
            (
                "spool_batches",
                "Batches in the spool that are not acknowledged",
                &self.spool_batches,
            ),
            (
                "topology_ready",
                "Whether the cluster's objects are known",
                &ready,
            ),
            (
                "topology_stale_seconds",
                "For how long the cluster's objects have not been current",
                &stale,
            ),
        ] {
            registry.register(name, help, gauge.clone());
        }
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// The socket on which it is asked.
#[derive(Debug)]
pub struct Desk {
    listener: TcpListener,
    meter: Meter,
    view: View,
    pulse: Pulse,
}

impl Desk {
    /// Listens.
    ///
    /// # Errors
    /// If the address is not this machine's, is taken, or not for this process.
    pub async fn open(
        address: SocketAddr,
        meter: Meter,
        view: View,
        pulse: Pulse,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        tracing::info!(address = %listener.local_addr()?, "metrics");
        Ok(Self {
            listener,
            meter,
            view,
            pulse,
        })
    }

    /// Answers until it is dropped.
    pub async fn run(self) {
        let Self {
            listener,
            meter,
            view,
            pulse,
        } = self;
        let answer = move |request| ready(answer(&request, &meter, &view, &pulse));
        match answer_watchers(listener, answer).await {}
    }
}

fn answer(
    request: &Request<Incoming>,
    meter: &Meter,
    view: &View,
    pulse: &Pulse,
) -> Response<String> {
    let (status, content_type, body) = match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz") => (StatusCode::OK, "text/plain", "ok\n".to_owned()),
        (&Method::GET, "/readyz") if !pulse.is_beating() => (
            StatusCode::SERVICE_UNAVAILABLE,
            "text/plain",
            "Nothing is captured.\n".to_owned(),
        ),
        (&Method::GET, "/readyz") if view.is_ready() => {
            (StatusCode::OK, "text/plain", "ready\n".to_owned())
        }
        (&Method::GET, "/readyz") => (
            StatusCode::SERVICE_UNAVAILABLE,
            "text/plain",
            "The cluster's objects are not known yet.\n".to_owned(),
        ),
        (&Method::GET, "/metrics") => match meter.text(view) {
            Ok(text) => (
                StatusCode::OK,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                text,
            ),
            Err(error) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "text/plain",
                error.to_string(),
            ),
        },
        _ => (
            StatusCode::NOT_FOUND,
            "text/plain",
            "There are /healthz, /readyz and /metrics.\n".to_owned(),
        ),
    };
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
