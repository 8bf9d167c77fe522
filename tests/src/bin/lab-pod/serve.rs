//! The serving side.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use clap::Args;
use lab::pace::patience;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{call::announce, target::Target};

/// Enough for a thread that answers a byte.
const STACK_BYTES: usize = 128 << 10;

#[derive(Args)]
pub(crate) struct Options {
    /// TCP ports to listen on.
    #[arg(long, value_delimiter = ',')]
    tcp: Vec<u16>,
    /// Threads that block in `accept`, of each of these ports.
    #[arg(long, default_value_t = 1)]
    acceptors: usize,
    /// TCP ports to listen on, where every connection is reset as soon as it is accepted.
    #[arg(long, value_delimiter = ',')]
    reset: Vec<u16>,
    /// TCP ports to listen on, where every connection is accepted and left alone.
    #[arg(long, value_delimiter = ',')]
    keep: Vec<u16>,
    /// TCP ports to listen on, where nothing is accepted.
    #[arg(long, value_delimiter = ',')]
    deaf: Vec<u16>,
    /// TCP ports to listen on until a connection is accepted, which is left alone.
    #[arg(long, value_delimiter = ',')]
    once: Vec<u16>,
    /// How many connections may wait to be accepted. The most that the kernel allows by default: a burst of callers must
    /// not see a full queue.
    #[arg(long, default_value_t = 4096)]
    backlog: i32,
    /// UDP ports to answer on.
    #[arg(long, value_delimiter = ',')]
    udp: Vec<u16>,
    /// The address to listen on; `::` takes IPv4 as well.
    #[arg(long, default_value_t = IpAddr::V6(Ipv6Addr::UNSPECIFIED))]
    bind: IpAddr,
    /// What to call, once each, before a byte is answered.
    #[arg(long)]
    call: Vec<Target>,
}

/// Serves until this program is ended.
pub(crate) fn run(options: Options) -> Result<()> {
    let calls: Arc<[Target]> = options.call.into();
    for port in options.tcp {
        let address = SocketAddr::new(options.bind, port);
        let listener = listen(address, options.backlog).with_context(|| address.to_string())?;
        let listener = Arc::new(listener);
        for _ in 0..options.acceptors {
            let (listener, calls) = (Arc::clone(&listener), Arc::clone(&calls));
            let thread = thread::Builder::new().stack_size(STACK_BYTES);
            thread.spawn(move || accept(&listener, &calls))?;
        }
    }
    for port in options.reset {
        let address = SocketAddr::new(options.bind, port);
        let listener = listen(address, options.backlog).with_context(|| address.to_string())?;
        thread::spawn(move || reset(&listener));
    }
    for port in options.keep {
        let address = SocketAddr::new(options.bind, port);
        let listener = listen(address, options.backlog).with_context(|| address.to_string())?;
        thread::spawn(move || keep(&listener));
    }
    let mut deaf = Vec::new();
    for port in options.deaf {
        let address = SocketAddr::new(options.bind, port);
        deaf.push(listen(address, options.backlog).with_context(|| address.to_string())?);
    }
    for port in options.once {
        let address = SocketAddr::new(options.bind, port);
        let listener = listen(address, options.backlog).with_context(|| address.to_string())?;
        thread::spawn(move || once(listener));
    }
    for port in options.udp {
        let address = SocketAddr::new(options.bind, port);
        let socket = UdpSocket::bind(address).with_context(|| address.to_string())?;
        thread::spawn(move || echo(&socket));
    }
    announce()?;
    loop {
        thread::park();
    }
}

fn listen(address: SocketAddr, backlog: i32) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(backlog)?;
    Ok(socket.into())
}

/// Blocks in `accept`, as the simplest servers do; each connection has a thread.
fn accept(listener: &TcpListener, calls: &Arc<[Target]>) {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let calls = Arc::clone(calls);
                let thread = thread::Builder::new().stack_size(STACK_BYTES);
                if let Err(error) = thread.spawn(move || answer(stream, &calls)) {
                    eprintln!("lab-pod: no thread for a connection: {error}");
                }
            }
            Err(error) => eprintln!("lab-pod: accept: {error}"),
        }
    }
}

/// Closes each connection with a reset instead of a FIN.
fn reset(listener: &TcpListener) {
    loop {
        let closed = listener
            .accept()
            .and_then(|(stream, _)| Socket::from(stream).set_linger(Some(Duration::ZERO)));
        if let Err(error) = closed {
            eprintln!("lab-pod: accept: {error}");
        }
    }
}

/// Accepts for as long as there are files to be had.
fn keep(listener: &TcpListener) {
    let mut kept = Vec::new();
    loop {
        match listener.accept() {
            Ok((stream, _)) => kept.push(stream),
            Err(error) => eprintln!("lab-pod: accept: {error}"),
        }
    }
}

/// Accepts one connection and closes the listener.
fn once(listener: TcpListener) {
    match listener.accept() {
        Ok((_stream, _)) => {
            drop(listener);
            loop {
                thread::park();
            }
        }
        Err(error) => eprintln!("lab-pod: accept: {error}"),
    }
}

/// Answers until the caller closes. A caller that goes away is no matter of this side.
fn answer(mut stream: TcpStream, calls: &[Target]) {
    let mut byte = [0];
    while stream.read_exact(&mut byte).is_ok() {
        for target in calls {
            if let Err(failure) = target.call(patience(Duration::from_secs(5)), false) {
                eprintln!("lab-pod: {target}: {failure:?}");
            }
        }
        if stream.write_all(&byte).is_err() {
            return;
        }
    }
}

fn echo(socket: &UdpSocket) {
    let mut buffer = [0; 1500];
    while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
        if let Err(error) = socket.send_to(&buffer[..length], peer) {
            eprintln!("lab-pod: {peer}: {error}");
        }
    }
}
