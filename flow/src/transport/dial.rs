//! Connections to a host that is known by its name.

use std::{io, time::Duration};

use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};

/// How long an address of a host may take that is not its last. One that drops what it is sent would otherwise take, with
/// minutes of the kernel's own patience, the time of those after it.
const PATIENCE: Duration = Duration::from_secs(2);

/// Connects to the first address that answers of those that the host's name stands for now, in the resolver's order. How long
/// the last one may take is for the caller to say.
///
/// # Errors
/// If the name is not known, or of no address anybody takes the connection: why, of the last one.
pub async fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    first_of(lookup_host((host, port)).await?).await
}

async fn first_of(addresses: impl Iterator<Item = std::net::SocketAddr>) -> io::Result<TcpStream> {
    let mut error = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut addresses = addresses.peekable();
    while let Some(address) = addresses.next() {
        let connecting = TcpStream::connect(address);
        let connected = match addresses.peek() {
            Some(_) => timeout(PATIENCE, connecting).await,
            None => Ok(connecting.await),
        };
        error = match connected {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(refused)) => io::Error::new(refused.kind(), format!("{address}: {refused}")),
            Err(_elapsed) => {
                let what = format!("{address}: no answer within {PATIENCE:?}");
                io::Error::new(io::ErrorKind::TimedOut, what)
            }
        };
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use tokio::net::TcpSocket;

    use super::*;

    #[tokio::test]
    async fn an_address_that_drops_what_it_is_sent_does_not_keep_from_the_next() {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        // With a backlog of nobody more than two, whoever comes next is dropped without a word.
        let silent = TcpSocket::new_v4().unwrap();
        silent.bind(any).unwrap();
        let silent = silent.listen(0).unwrap();
        let dropping = silent.local_addr().unwrap();
        let mut waiting = Vec::new();
        while let Ok(Ok(stream)) =
            timeout(Duration::from_millis(300), TcpStream::connect(dropping)).await
        {
            waiting.push(stream);
        }
        let answering = tokio::net::TcpListener::bind(any).await.unwrap();
        let wanted = answering.local_addr().unwrap();

        let stream = first_of([dropping, wanted].into_iter()).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), wanted);

        // The last is waited for.
        let last = first_of([dropping].into_iter());
        assert!(timeout(PATIENCE * 2, last).await.is_err());
        let error = first_of([].into_iter()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
