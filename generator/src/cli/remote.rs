//! Asking a running generator.

use std::{
    io::{self, Read},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use flow::transport::{ClientFiles, Secret, TokenFile, dial};
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, Response, Uri,
    body::{Buf as _, Bytes, Incoming},
    client::conn::http1,
    header::{AUTHORIZATION, HOST, HeaderValue},
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    runtime::Runtime,
    time::timeout,
};
use tokio_rustls::{TlsConnector, rustls::pki_types::ServerName};

use super::{cluster::Cluster, source::Kube};

/// How long the generator may take to answer, and with each part of the answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long to wait for the reason of a way that is known to be cut.
const REASON: Duration = Duration::from_secs(3);

/// The most of a refusal that is repeated, in bytes.
const MAX_REFUSAL: u64 = 500;

/// A running generator, and what it is shown.
#[derive(Debug, clap::Args)]
pub(super) struct Remote {
    /// A running generator to read from. Of several sources one is read: files (-f), else a generator, else a ledger (--data-dir)
    #[arg(long, value_name = "URL", env = "MICROSHIELD_URL", value_parser = address)]
    url: Option<Uri>,

    #[command(flatten)]
    cluster: Cluster,

    /// Bearer token to show to the generator: the first line of this file
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_READ_TOKEN_FILE")]
    token_file: Option<TokenFile>,

    /// Certificate authorities that the generator's certificate must come from [default: the system's]
    #[arg(long, value_name = "FILE", env = "MICROSHIELD_CA")]
    ca: Option<PathBuf>,

    /// Certificate to show to a generator that asks for one
    #[arg(
        long,
        value_name = "FILE",
        env = "MICROSHIELD_READ_TLS_CERT",
        requires = "tls_key"
    )]
    tls_cert: Option<PathBuf>,

    /// Its key
    #[arg(
        long,
        value_name = "FILE",
        env = "MICROSHIELD_READ_TLS_KEY",
        requires = "tls_cert"
    )]
    tls_key: Option<PathBuf>,
}

/// What the generator answers, to be read to its end: an answer that is cut off is an error.
pub(super) struct Answer {
    runtime: Runtime,
    body: Incoming,
    /// What has come and was not read yet.
    part: Bytes,
}

/// A connection to the generator, as yet without TLS.
pub(super) struct Way {
    pub(super) stream: Box<dyn Stream>,
    /// Whether TLS is spoken on it.
    pub(super) encrypted: bool,
    /// The name in the generator's certificate.
    pub(super) name: String,
    /// What stands in the request as the host.
    pub(super) authority: String,
    /// A token that came with the way.
    pub(super) token: Option<Secret>,
    /// Ready once it is known why the way is cut.
    pub(super) cut: Option<BoxFuture<'static, Option<String>>>,
}

pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Remote {
    /// How the Kubernetes API is reached.
    pub(super) fn kube(&self) -> &Kube {
        self.cluster.kube()
    }

    /// Says whether a generator was named.
    pub(super) fn is_named(&self) -> bool {
        self.url.is_some() || self.cluster.is_meant()
    }

    /// The generator, for messages; the one on this machine if none was named.
    pub(super) fn place(&self) -> String {
        if self.cluster.is_meant() {
            self.cluster.to_string()
        } else {
            self.url().to_string()
        }
    }

    /// Asks for a path.
    ///
    /// # Errors
    /// If the generator cannot be reached, does not answer in time, or refuses.
    pub(super) fn get(&self, path: &'static str) -> Result<Answer> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start the runtime")?;
        let asked = async {
            timeout(PATIENCE, self.ask(path))
                .await
                .context("no answer in time")?
        };
        let response = runtime.block_on(asked).with_context(|| self.place())?;
        let status = response.status();
        let mut answer = Answer {
            runtime,
            body: response.into_body(),
            part: Bytes::new(),
        };
        if !status.is_success() {
            let mut reason = Vec::new();
            (&mut answer).take(MAX_REFUSAL).read_to_end(&mut reason)?;
            bail!(
                "{}: {status}: {}",
                self.place(),
                String::from_utf8_lossy(&reason).trim()
            );
        }
        Ok(answer)
    }

    fn url(&self) -> Uri {
        let local = || Uri::from_static("http://127.0.0.1:8765");
        self.url.clone().unwrap_or_else(local)
    }

    async fn ask(&self, path: &'static str) -> Result<Response<Incoming>> {
        let mut way = if self.cluster.is_meant() {
            self.cluster.connect(self.token_file.is_none()).await?
        } else {
            connect(&self.url()).await?
        };
        let cut = way.cut.take();
        match (self.ask_on(way, path).await, cut) {
            (Err(error), Some(cut)) => match timeout(REASON, cut).await {
                Ok(Some(reason)) => Err(error.context(reason)),
                _ => Err(error),
            },
            (result, _) => result,
        }
    }

    async fn ask_on(&self, way: Way, path: &'static str) -> Result<Response<Incoming>> {
        let stream: Box<dyn Stream> = if way.encrypted {
            let files = ClientFiles {
                ca: self.ca.clone(),
                identity: self.tls_cert.clone().zip(self.tls_key.clone()),
            };
            let connector = TlsConnector::from(Arc::new(files.config()?));
            let name = ServerName::try_from(way.name)?;
            let stream = connector.connect(name, way.stream).await;
            Box::new(stream.context("TLS (--ca, --tls-cert, --tls-key)")?)
        } else {
            way.stream
        };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        // It goes on whenever the runtime waits for something, and ends with it.
        tokio::spawn(connection);
        let mut request = Request::get(path)
            .header(HOST, way.authority)
            .body(Empty::<Bytes>::new())?;
        let token = match &self.token_file {
            Some(file) => Some(file.first()?),
            None => way.token,
        };
        if let Some(token) = token {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", token.expose()))
                .or(Err(anyhow!("the token cannot stand in a header")))?;
            value.set_sensitive(true);
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        Ok(sender.send_request(request).await?)
    }
}

/// Where a generator is, as the command line says it.
fn address(text: &str) -> Result<Uri, String> {
    let url: Uri = text.parse().map_err(|error| format!("{error}"))?;
    match (url.scheme_str(), url.host()) {
        (Some("http" | "https"), Some(_)) => Ok(url),
        _ => Err("expected http://HOST:PORT or https://HOST:PORT".to_owned()),
    }
}

/// The way to a generator whose address is known.
async fn connect(url: &Uri) -> Result<Way> {
    let host = url.host().context("no host")?;
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let encrypted = url.scheme_str() == Some("https");
    let port = url.port_u16().unwrap_or(if encrypted { 443 } else { 80 });
    let stream = dial(bare, port).await?;
    Ok(Way {
        stream: Box::new(stream),
        encrypted,
        name: bare.to_owned(),
        authority: url
            .authority()
            .map_or(host, |authority| authority.as_str())
            .to_owned(),
        token: None,
        cut: None,
    })
}

impl Read for Answer {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.part.is_empty() {
            let next = async { timeout(PATIENCE, self.body.frame()).await };
            match self.runtime.block_on(next) {
                Ok(Some(Ok(frame))) => self.part = frame.into_data().unwrap_or_default(),
                Ok(Some(Err(error))) => return Err(io::Error::other(error)),
                Ok(None) => return Ok(0),
                Err(_elapsed) => return Err(io::ErrorKind::TimedOut.into()),
            }
        }
        let read = to.len().min(self.part.len());
        self.part.copy_to_slice(&mut to[..read]);
        Ok(read)
    }
}
