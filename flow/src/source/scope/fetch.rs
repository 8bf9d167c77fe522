//! One question to Scope's app, and its answer.

use std::{io::Read, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use flate2::read::GzDecoder;
use http::{
    HeaderMap, Request, Response, StatusCode,
    header::{
        ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, ETAG, HOST, HeaderValue, IF_NONE_MATCH,
        RETRY_AFTER, USER_AGENT,
    },
};
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsConnector;

use super::{
    super::{api::Pace, feed::Feed},
    trouble::Trouble,
    url::ReportUrl,
};
use crate::{
    topology::scope::{self, Report},
    transport::{ClientFiles, TlsError, dial},
};

/// How long it may take to get a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// The largest head of an answer, in bytes.
const MAX_HEAD: usize = 64 << 10;

/// Chunks of an answer that may wait for the parser. When they are as many, the app waits.
const CHUNKS: usize = 8;

/// The longest time for which the app can send us away.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(300);

/// The first that the app knows; JSON for one that does not know it.
const WANTED: HeaderValue = HeaderValue::from_static("application/msgpack, application/json;q=0.5");

/// Who asks.
pub(super) struct Client {
    url: ReportUrl,
    tls: Option<Arc<ClientConfig>>,
    pace: Pace,
    /// What the app called its last answer, if it calls them anything.
    tag: Option<HeaderValue>,
}

/// What the app answered.
pub(super) enum Answer {
    /// A report.
    Report(Report),
    /// The last one is still true.
    Unchanged,
}

impl Client {
    /// Reads the certificate authorities if the URL needs any.
    pub(super) fn new(url: ReportUrl, pace: Pace) -> Result<Self, TlsError> {
        let mut client = Self {
            url,
            tls: None,
            pace,
            tag: None,
        };
        client.renew()?;
        Ok(client)
    }

    /// Reads the certificate authorities again.
    pub(super) fn renew(&mut self) -> Result<(), TlsError> {
        if self.url.is_encrypted() {
            let files = ClientFiles {
                ca: self.url.ca().map(Path::to_owned),
                identity: None,
            };
            self.tls = Some(Arc::new(files.config()?));
        }
        Ok(())
    }

    /// The next report is to be a whole one.
    pub(super) fn forget(&mut self) {
        self.tag = None;
    }

    /// Asks for the report.
    pub(super) async fn ask(&mut self) -> Result<Answer, Trouble> {
        let whole = self.pace.report;
        let asked = timeout(whole, self.ask_patiently()).await;
        asked.unwrap_or(Err(Trouble::TooSlow(whole)))
    }

    async fn ask_patiently(&mut self) -> Result<Answer, Trouble> {
        // The connection lives as long as this.
        let mut connection = JoinSet::new();
        let response = self.open(&mut connection).await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_MODIFIED if self.tag.is_some() => return Ok(Answer::Unchanged),
            StatusCode::NOT_FOUND => return Err(Trouble::NotThere),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                return Err(Trouble::Unauthorized(status.as_u16()));
            }
            status => {
                return Err(Trouble::Refused {
                    code: status.as_u16(),
                    retry_after: retry_after(response.headers()),
                });
            }
        }
        let tag = response.headers().get(ETAG).cloned();
        let compressed = match response.headers().get(CONTENT_ENCODING) {
            None => false,
            Some(encoding) if encoding == "gzip" => true,
            Some(encoding) if encoding == "identity" => false,
            Some(other) => return Err(Trouble::Encoding(format!("{other:?}"))),
        };
        let report = read(response.into_body(), compressed, self.pace.silence).await?;
        self.tag = tag;
        Ok(Answer::Report(report))
    }

    async fn open(&self, connection: &mut JoinSet<()>) -> Result<Response<Incoming>, Trouble> {
        let stream = timeout(CONNECT, dial(self.url.host(), self.url.port())).await;
        let stream = stream
            .map_err(|_elapsed| Trouble::timed_out(CONNECT))?
            .map_err(Trouble::unreachable)?;
        match &self.tls {
            None => self.send(stream, connection).await,
            Some(config) => {
                let name = ServerName::try_from(self.url.host().to_owned());
                let name = name.map_err(Trouble::unreachable)?;
                let connector = TlsConnector::from(Arc::clone(config));
                let stream = timeout(CONNECT, connector.connect(name, stream)).await;
                let stream = stream
                    .map_err(|_elapsed| Trouble::timed_out(CONNECT))?
                    .map_err(Trouble::unreachable)?;
                self.send(stream, connection).await
            }
        }
    }

    async fn send(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        connection: &mut JoinSet<()>,
    ) -> Result<Response<Incoming>, Trouble> {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_HEAD);
        let (mut sender, driver) = builder
            .handshake(TokioIo::new(stream))
            .await
            .map_err(Trouble::unreachable)?;
        connection.spawn(async move {
            // Whoever waits for the answer hears of it, too.
            driver.await.ok();
        });
        let response = timeout(self.pace.response, sender.send_request(self.request()?)).await;
        response
            .map_err(|_elapsed| Trouble::Silent(self.pace.response))?
            .map_err(|error| Trouble::Lost(error.into()))
    }

    fn request(&self) -> Result<Request<Empty<Bytes>>, Trouble> {
        let mut request = Request::get(self.url.path_and_query())
            .header(HOST, self.url.authority())
            .header(
                USER_AGENT,
                concat!("microshield/", env!("CARGO_PKG_VERSION")),
            )
            .header(ACCEPT, WANTED)
            .header(ACCEPT_ENCODING, "gzip");
        if let Some(tag) = &self.tag {
            request = request.header(IF_NONE_MATCH, tag);
        }
        request.body(Empty::new()).map_err(Trouble::unreachable)
    }
}

/// Parses the report while it arrives, on a thread for blocking work: the task's own has other things to do meanwhile.
async fn read(body: Incoming, compressed: bool, silence: Duration) -> Result<Report, Trouble> {
    let (sender, receiver) = mpsc::channel(CHUNKS);
    let feed = Feed::new(receiver);
    let parsing = tokio::task::spawn_blocking(move || {
        let text: Box<dyn Read> = match compressed {
            true => Box::new(GzDecoder::new(feed)),
            false => Box::new(feed),
        };
        scope::read(text)
    });
    let pumped = pump(body, silence, sender).await;
    let parsed = parsing.await?;
    // Where the answer broke off, that says more than that the text ends too early.
    pumped?;
    Ok(parsed?)
}

/// Ends with the answer, or when the parser has enough. If it is dropped, the parser finds the text to end.
async fn pump(
    mut body: Incoming,
    silence: Duration,
    chunks: mpsc::Sender<Bytes>,
) -> Result<(), Trouble> {
    loop {
        let frame = timeout(silence, body.frame()).await;
        let frame = match frame.map_err(|_elapsed| Trouble::Silent(silence))? {
            None => return Ok(()),
            Some(frame) => frame.map_err(|error| Trouble::Lost(error.into()))?,
        };
        if let Ok(chunk) = frame.into_data()
            && chunks.send(chunk).await.is_err()
        {
            return Ok(());
        }
    }
}

/// In seconds; a date is not worth the trouble.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds).min(LONGEST_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use tempfile::TempDir;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::transport::{ServerFiles, ServerTls};

    /// Certificate and key for this machine, in a folder.
    fn certificate() -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        fs::write(folder.path().join("cert"), cert.pem()).unwrap();
        fs::write(folder.path().join("key"), signing_key.serialize_pem()).unwrap();
        folder
    }

    /// Answers every question over TLS with a small report; returns its port.
    async fn app(folder: &Path) -> u16 {
        let tls = ServerTls::new(ServerFiles {
            cert: folder.join("cert"),
            key: folder.join("key"),
            client_ca: None,
        })
        .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let acceptor = TlsAcceptor::from(tls.config());
                // Who does not like the certificate does not say more.
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    continue;
                };
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let body = r#"{"Pod": {"nodes": {"1;<pod>": {"latest": {
                    "kubernetes_name": {"value": "web"}, "kubernetes_namespace": {"value": "shop"}}}}}}"#;
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                stream.write_all(answer.as_bytes()).await.unwrap();
                stream.shutdown().await.ok();
            }
        });
        port
    }

    #[tokio::test]
    async fn the_apps_certificate_is_checked() {
        let (own, other) = (certificate(), certificate());
        let port = app(own.path()).await;
        let client = |ca: &Path| {
            let mut url: ReportUrl = format!("https://localhost:{port}/api/report")
                .parse()
                .unwrap();
            url.set_ca(Some(ca.to_owned()));
            Client::new(url, Pace::default())
        };
        let cert = |folder: &TempDir| folder.path().join("cert");
        match client(&cert(&own)).unwrap().ask().await.unwrap() {
            Answer::Report(report) => assert_eq!(report.objects.pods.len(), 1),
            Answer::Unchanged => panic!("there was nothing before it"),
        }
        match client(&cert(&other)).unwrap().ask().await {
            Err(Trouble::Unreachable(why)) => assert!(why.contains("certificate"), "{why}"),
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("a certificate of somebody else's is taken"),
        }
        assert!(client(Path::new("/nowhere")).is_err());
    }
}
