//! `microshield status`: how a running generator is, and its agents.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use comfy_table::{Table, presets::NOTHING};
use flow::{
    time::Timestamp,
    transport::{ClientFiles, TokenFile},
};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request, Uri,
    body::Bytes,
    client::conn::http1,
    header::{AUTHORIZATION, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::Failure;
use crate::status::{STATUS_PATH, Status};

/// How long the generator may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// The largest answer: a thousand agents take half a MiB.
const MAX_ANSWER: usize = 256 << 20;

/// Show how a running generator is: its agents, when they were last seen, and what was lost
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The generator
    #[arg(
        long,
        value_name = "URL",
        env = "MICROSHIELD_URL",
        default_value = "http://127.0.0.1:8765"
    )]
    url: Uri,

    /// Bearer token to show: the first line of this file
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_READ_TOKEN_FILE")]
    token_file: Option<TokenFile>,

    /// Certificate authorities that the generator's certificate must come from [default: the system's]
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_CA")]
    ca: Option<PathBuf>,

    /// Certificate to show to a generator that asks for one
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,

    /// Its key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,

    /// As JSON
    #[arg(long)]
    json: bool,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")
        .map_err(Failure::other)?;
    let asked = async {
        timeout(PATIENCE, ask(args))
            .await
            .context("no answer in time")?
    };
    let answer = runtime
        .block_on(asked)
        .with_context(|| args.url.to_string())
        .map_err(Failure::other)?;
    let shown = if args.json {
        String::from_utf8_lossy(&answer).into_owned() + "\n"
    } else {
        let status = serde_json::from_slice(&answer)
            .context("the answer is no status")
            .map_err(Failure::other)?;
        table(&status).map_err(Failure::other)?
    };
    io::stdout()
        .lock()
        .write_all(shown.as_bytes())
        .context("standard output")
        .map_err(Failure::other)
}

async fn ask(args: &Args) -> Result<Bytes> {
    let host = args.url.host().context("no host")?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let (encrypted, port) = match args.url.scheme_str() {
        Some("http") => (false, 80),
        Some("https") => (true, 443),
        _ => bail!("expected http://HOST:PORT or https://HOST:PORT"),
    };
    let stream = TcpStream::connect((bare, args.url.port_u16().unwrap_or(port))).await?;
    let stream: Box<dyn Stream> = if encrypted {
        let files = ClientFiles {
            ca: args.ca.clone(),
            identity: args.tls_cert.clone().zip(args.tls_key.clone()),
        };
        let connector = TlsConnector::from(Arc::new(files.config()?));
        let name = ServerName::try_from(bare.to_owned())?;
        Box::new(connector.connect(name, stream).await?)
    } else {
        Box::new(stream)
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let authority = args
        .url
        .authority()
        .map_or(host, |authority| authority.as_str());
    let mut request = Request::get(STATUS_PATH)
        .header(HOST, authority)
        .body(Empty::<Bytes>::new())?;
    if let Some(file) = &args.token_file {
        let token = file.first()?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.expose()))
            .or(Err(anyhow!("the token cannot stand in a header")))?;
        value.set_sensitive(true);
        request.headers_mut().insert(AUTHORIZATION, value);
    }
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(|error| anyhow!("{error}"))?
        .to_bytes();
    connection.abort();
    ensure!(
        status.is_success(),
        "{status}: {}",
        String::from_utf8_lossy(&body[..body.len().min(500)]).trim()
    );
    Ok(body)
}

fn table(status: &Status) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    let connected = status.agents.iter().filter(|agent| agent.connected).count();
    let ledger = &status.ledger;
    writeln!(
        text,
        "generator {}, up {}: {} observations, {} in memory, {} on disk; {connected} agents connected",
        status.version,
        age(status.now, status.started),
        ledger.observations,
        mib(ledger.bytes),
        mib(ledger.database_bytes),
    )?;
    if let Some(topology) = &status.topology {
        let words = match (topology.ready, topology.stale_seconds) {
            (false, _) => "not known yet".to_owned(),
            (true, 0) => "current".to_owned(),
            (true, seconds) => format!("not current for {seconds} s"),
        };
        writeln!(text, "the cluster's objects: {words}")?;
    }
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "NODE",
        "AGENT",
        "CONNECTED",
        "LAST SEEN",
        "BEHIND",
        "LOST",
        "INSTANCE",
    ]);
    for agent in &status.agents {
        let ago = |time: Option<Timestamp>| {
            time.map_or_else(|| "never".to_owned(), |time| age(status.now, time))
        };
        table.add_row([
            agent.node.clone(),
            agent.version.clone(),
            if agent.connected { "yes" } else { "no" }.to_owned(),
            ago(agent.last_seen),
            agent
                .reported_until
                .map_or_else(String::new, |until| age(status.now, until)),
            agent.lost.to_string(),
            agent.instance.clone(),
        ]);
    }
    writeln!(text, "\n{}", table.trim_fmt())?;
    if !status.losses.is_empty() {
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.set_header(["NODE", "LOST", "REASON"]);
        for loss in &status.losses {
            table.add_row([
                loss.node.clone(),
                loss.count.to_string(),
                loss.reason.clone(),
            ]);
        }
        writeln!(text, "\n{}", table.trim_fmt())?;
    }
    Ok(text)
}

fn age(now: Timestamp, then: Timestamp) -> String {
    let seconds = now.as_nanos().saturating_sub(then.as_nanos()) / 1_000_000_000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
