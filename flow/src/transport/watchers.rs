//! HTTP for those who watch a process: kubelet and Prometheus.

use std::{collections::VecDeque, convert::Infallible, time::Duration};

use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tracing::{debug, warn};

/// The most connections at a time. One more ends the oldest, so that nobody who holds them all keeps kubelet out.
const MAX_WATCHERS: usize = 16;

/// How long a connection may last. Prometheus keeps its connection from one reading to the next, and makes another.
const DEADLINE: Duration = Duration::from_secs(60);

/// The largest head of a request, in bytes.
const MAX_HEAD: usize = 8 << 10;

/// How long to wait when the system has no more file descriptors or memory for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Answers each request that comes to a listener until it is dropped, which ends every connection.
pub async fn answer_watchers<F, A>(listener: TcpListener, answer: F) -> Infallible
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Response<String>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut handles: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            Some(ended) = connections.join_next() => {
                if let Err(error) = ended
                    && !error.is_cancelled()
                {
                    warn!(%error, "connection ended by a defect");
                }
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                handles.retain(|handle| !handle.is_finished());
                if handles.len() >= MAX_WATCHERS
                    && let Some(oldest) = handles.pop_front()
                {
                    oldest.abort();
                }
                handles.push_back(connections.spawn(serve(stream, answer.clone())));
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve<F, A>(stream: TcpStream, answer: F)
where
    F: Fn(Request<Incoming>) -> A,
    A: Future<Output = Response<String>>,
{
    let service = service_fn(|request| {
        let response = answer(request);
        async { Ok::<_, Infallible>(response.await) }
    });
    let exchange = http1::Builder::new()
        .timer(TokioTimer::new())
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(DEADLINE, exchange).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "HTTP request failed"),
        Err(_elapsed) => debug!("a watcher's connection has lasted long enough"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn who_holds_every_place_keeps_nobody_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let answer = |_| async { Response::new("well".to_owned()) };
        let watched = tokio::spawn(answer_watchers(listener, answer));
        let mut idle = Vec::new();
        for _ in 0..=MAX_WATCHERS {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        let mut kubelet = TcpStream::connect(address).await.unwrap();
        let request = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        kubelet.write_all(request).await.unwrap();
        let mut response = String::new();
        kubelet.read_to_string(&mut response).await.unwrap();
        assert!(response.ends_with("\r\n\r\nwell"), "{response}");

        let mut byte = [0];
        let ended = timeout(Duration::from_secs(10), idle[0].read(&mut byte)).await;
        assert!(
            matches!(ended, Ok(Ok(0) | Err(_))),
            "the oldest is ended: {ended:?}"
        );
        let last = idle.last_mut().unwrap();
        let open = timeout(Duration::from_millis(100), last.read(&mut byte)).await;
        assert!(open.is_err(), "the youngest is not: {open:?}");
        watched.abort();
    }
}
