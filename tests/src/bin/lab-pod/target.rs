//! What is called, and one call.

use std::{
    fmt,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    str::FromStr,
    time::Duration,
};

use anyhow::{Context, Error, bail};
use socket2::SockRef;

/// `tcp://ADDRESS:PORT` or `udp://ADDRESS:PORT`; IPv6 addresses in brackets.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    transport: Transport,
    address: SocketAddr,
}

#[derive(Clone, Copy, Debug)]
enum Transport {
    Tcp,
    Udp,
}

/// How a call that was not answered ended.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Failure {
    Refused,
    TimedOut,
    Reset,
    Other,
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (transport, address) = text.split_once("://").context("no `://`")?;
        let transport = match transport {
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            other => bail!("`{other}` is neither `tcp` nor `udp`"),
        };
        let address = address.parse().context("not an address with a port")?;
        Ok(Self { transport, address })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        write!(f, "{transport}://{}", self.address)
    }
}

impl Target {
    /// The same address, so many ports further on; the last port is followed by the first.
    pub(crate) fn ports_further(&self, by: u16) -> Self {
        let mut address = self.address;
        address.set_port(address.port().wrapping_add(by));
        Self { address, ..*self }
    }

    /// Connects and exchanges a byte. With `abort`, a TCP connection is closed by a reset, so that its port is free at
    /// once.
    pub(crate) fn call(&self, patience: Duration, abort: bool) -> Result<(), Failure> {
        match self.transport {
            Transport::Tcp => {
                let mut stream = self.connect(patience)?;
                if abort {
                    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                }
                stream.write_all(b"?")?;
                stream.read_exact(&mut [0])?;
            }
            Transport::Udp => {
                let any: SocketAddr = match self.address {
                    SocketAddr::V4(_) => ([0; 4], 0).into(),
                    SocketAddr::V6(_) => ([0_u16; 8], 0).into(),
                };
                let socket = UdpSocket::bind(any)?;
                socket.connect(self.address)?;
                socket.set_read_timeout(Some(patience))?;
                socket.send(b"?")?;
                socket.recv(&mut [0])?;
            }
        }
        Ok(())
    }

    /// Opens a TCP connection, whatever the target's transport.
    pub(crate) fn connect(&self, patience: Duration) -> Result<TcpStream, Failure> {
        let stream = TcpStream::connect_timeout(&self.address, patience)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::ConnectionRefused => Self::Refused,
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Self::TimedOut,
            ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe => {
                Self::Reset
            }
            _ => Self::Other,
        }
    }
}
