//! Sockets by the step, for what neither `serve` nor `call` does.

use std::{
    collections::HashMap,
    env, fs, io,
    mem::MaybeUninit,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    process::{Command, Stdio},
    str::FromStr,
    thread,
    time::Duration,
};

use anyhow::{Context, Error, Result, bail, ensure};
use clap::Args;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::call::announce;

/// `IPPROTO_MPTCP`.
const MPTCP: i32 = 262;

/// `IPPROTO_SCTP`.
const SCTP: i32 = 132;

/// How long a step may block.
fn patience() -> Duration {
    lab::pace::patience(Duration::from_secs(10))
}

#[derive(Args)]
pub(crate) struct Options {
    /// Such as `udp a 0.0.0.0:0`, `sendto a 10.0.0.1:53`, `recv a`; names of sockets are free.
    #[arg(required = true)]
    steps: Vec<Step>,
}

/// One step. Sockets go by names, addresses have a port.
#[derive(Clone, Debug)]
enum Step {
    /// `udp NAME ADDRESS`: a datagram socket that is bound there; port 0 is any.
    Udp(String, SocketAddr),
    /// `udp-shared NAME ADDRESS`: one of several there.
    UdpShared(String, SocketAddr),
    /// `udp-raw NAME ADDRESS`: one that every datagram to that address is shown to.
    UdpRaw(String, SocketAddr),
    /// `tcp NAME ADDRESS`: a stream socket that is bound there.
    Tcp(String, SocketAddr),
    /// `mptcp NAME ADDRESS`: the same for multipath TCP.
    Mptcp(String, SocketAddr),
    /// `sctp NAME ADDRESS`: a socket for one association, or one that listens for them, that is bound there.
    Sctp(String, SocketAddr),
    /// `sctp-many NAME ADDRESS`: one for many associations, which are made by sending.
    SctpMany(String, SocketAddr),
    /// `sctp-raw NAME ADDRESS`: one that sends and receives packets of SCTP as they are.
    SctpRaw(String, SocketAddr),
    /// `whole NAME`: has it send what begins with a network header.
    Whole(String),
    /// `packet NAME ADDRESS HEX`: these bytes there.
    Packet(String, SocketAddr, Vec<u8>),
    /// `associate COUNT ADDRESS`: so many SCTP associations, one after the other, each exchanging a byte.
    Associate(usize, SocketAddr),
    /// `connect NAME ADDRESS`.
    Connect(String, SocketAddr),
    /// `refused NAME ADDRESS`: a connect that is refused.
    Refused(String, SocketAddr),
    /// `begin NAME ADDRESS`: a connect that does not wait.
    Begin(String, SocketAddr),
    /// `fastopen NAME ADDRESS`: a connect that carries its first byte, if the kernel has a cookie for it.
    FastOpen(String, SocketAddr),
    /// `listen NAME`.
    Listen(String),
    /// `inherited NAME`: the socket that standard input is.
    Inherited(String),
    /// `worker NAME CGROUP STEP,STEP`: hands the socket to another process, in this cgroup, which takes these steps.
    Worker(String, String, Vec<String>),
    /// `sysctl NAME VALUE`: in this network namespace; the name has slashes.
    Sysctl(String, String),
    /// `accept NAME NEW`.
    Accept(String, String),
    /// `send NAME`: a byte to where it is connected.
    Send(String),
    /// `sendto NAME ADDRESS`: a byte there.
    SendTo(String, SocketAddr),
    /// `recv NAME`: without asking who has sent.
    Recv(String),
    /// `answer NAME`: receives, and sends a byte to whoever has sent.
    Answer(String),
    /// `echo NAME`: the same again and again, until nothing more comes.
    Echo(String),
    /// `join NAME GROUP`.
    Join(String, IpAddr),
    /// `broadcast NAME`: lets it send to everybody.
    Broadcast(String),
    /// `close NAME`.
    Close(String),
    /// `abort NAME`: closes it by a reset.
    Abort(String),
    /// `pause MILLISECONDS`.
    Pause(u64),
    /// `burst COUNT ADDRESS`: so many datagrams, each from a connected socket of its own, with a port of its own.
    Burst(usize, SocketAddr),
    /// `asks COUNT ADDRESS`: the same, each closed when its answer is there.
    Asks(usize, SocketAddr),
    /// `ports FIRST LAST ADDRESS`: a TCP connection from each of these ports, one after the other.
    Ports(u16, u16, SocketAddr),
    /// `listens COUNT ADDRESS`: so many listeners there, one after the other.
    Listens(usize, SocketAddr),
    /// `await FILE`: until it is there.
    Await(PathBuf),
    /// `ready`: tells the lab.
    Ready,
    /// `stay`: until the lab ends this program.
    Stay,
}

impl FromStr for Step {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let words: Vec<&str> = text.split(' ').collect();
        let name = |name: &str| name.to_owned();
        Ok(match words[..] {
            ["udp", socket, address] => Self::Udp(name(socket), address.parse()?),
            ["udp-shared", socket, address] => Self::UdpShared(name(socket), address.parse()?),
            ["udp-raw", socket, address] => Self::UdpRaw(name(socket), address.parse()?),
            ["tcp", socket, address] => Self::Tcp(name(socket), address.parse()?),
            ["mptcp", socket, address] => Self::Mptcp(name(socket), address.parse()?),
            ["sctp", socket, address] => Self::Sctp(name(socket), address.parse()?),
            ["sctp-many", socket, address] => Self::SctpMany(name(socket), address.parse()?),
            ["sctp-raw", socket, address] => Self::SctpRaw(name(socket), address.parse()?),
            ["whole", socket] => Self::Whole(name(socket)),
            ["packet", socket, address, bytes] => {
                Self::Packet(name(socket), address.parse()?, hexadecimal(bytes)?)
            }
            ["associate", count, address] => Self::Associate(count.parse()?, address.parse()?),
            ["refused", socket, address] => Self::Refused(name(socket), address.parse()?),
            ["connect", socket, address] => Self::Connect(name(socket), address.parse()?),
            ["begin", socket, address] => Self::Begin(name(socket), address.parse()?),
            ["fastopen", socket, address] => Self::FastOpen(name(socket), address.parse()?),
            ["inherited", socket] => Self::Inherited(name(socket)),
            ["worker", socket, cgroup, ref steps @ ..] => {
                let steps = steps.join(" ");
                let steps = steps.split(',').map(name).collect();
                Self::Worker(name(socket), name(cgroup), steps)
            }
            ["sysctl", setting, value] => Self::Sysctl(name(setting), name(value)),
            ["listen", socket] => Self::Listen(name(socket)),
            ["accept", socket, new] => Self::Accept(name(socket), name(new)),
            ["send", socket] => Self::Send(name(socket)),
            ["sendto", socket, address] => Self::SendTo(name(socket), address.parse()?),
            ["recv", socket] => Self::Recv(name(socket)),
            ["answer", socket] => Self::Answer(name(socket)),
            ["echo", socket] => Self::Echo(name(socket)),
            ["join", socket, group] => Self::Join(name(socket), group.parse()?),
            ["broadcast", socket] => Self::Broadcast(name(socket)),
            ["close", socket] => Self::Close(name(socket)),
            ["abort", socket] => Self::Abort(name(socket)),
            ["pause", milliseconds] => Self::Pause(milliseconds.parse()?),
            ["burst", count, address] => Self::Burst(count.parse()?, address.parse()?),
            ["asks", count, address] => Self::Asks(count.parse()?, address.parse()?),
            ["ports", first, last, address] => {
                Self::Ports(first.parse()?, last.parse()?, address.parse()?)
            }
            ["listens", count, address] => Self::Listens(count.parse()?, address.parse()?),
            ["await", file] => Self::Await(file.into()),
            ["ready"] => Self::Ready,
            ["stay"] => Self::Stay,
            _ => bail!("`{text}` is no step"),
        })
    }
}

/// Takes the steps; the first that fails ends it.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut sockets = HashMap::new();
    for step in &options.steps {
        take(step, &mut sockets).with_context(|| format!("{step:?}"))?;
    }
    Ok(())
}

fn take(step: &Step, sockets: &mut HashMap<String, Socket>) -> Result<()> {
    let get = |name: &String| {
        sockets
            .get(name)
            .with_context(|| format!("no socket {name}"))
    };
    match step {
        Step::Udp(name, address) => {
            let socket = open(*address, Type::DGRAM, Protocol::UDP)?;
            sockets.insert(name.clone(), socket);
        }
        Step::UdpShared(name, address) => {
            let socket = Socket::new(
                Domain::for_address(*address),
                Type::DGRAM,
                Some(Protocol::UDP),
            )?;
            socket.set_reuse_address(true)?;
            socket.bind(&(*address).into())?;
            sockets.insert(name.clone(), socket);
        }
        Step::UdpRaw(name, address) => {
            let socket = open(*address, Type::RAW, Protocol::UDP)?;
            sockets.insert(name.clone(), socket);
        }
        Step::Tcp(name, address) => {
            let socket = open(*address, Type::STREAM, Protocol::TCP)?;
            sockets.insert(name.clone(), socket);
        }
        Step::Mptcp(name, address) => {
            let socket = open(*address, Type::STREAM, MPTCP.into())?;
            sockets.insert(name.clone(), socket);
        }
        Step::Sctp(name, address) => {
            let socket = open(*address, Type::STREAM, SCTP.into())?;
            sockets.insert(name.clone(), socket);
        }
        Step::SctpMany(name, address) => {
            let socket = open(*address, Type::SEQPACKET, SCTP.into())?;
            sockets.insert(name.clone(), socket);
        }
        Step::SctpRaw(name, address) => {
            let socket = open(*address, Type::RAW, SCTP.into())?;
            sockets.insert(name.clone(), socket);
        }
        Step::Whole(name) => get(name)?.set_header_included_v4(true)?,
        Step::Packet(name, address, bytes) => {
            // A raw socket of IPv6 takes no port that is not its protocol.
            let address = SocketAddr::new(address.ip(), 0);
            get(name)?.send_to(bytes, &address.into())?;
        }
        Step::Associate(count, address) => {
            for _ in 0..*count {
                let any = SocketAddr::new(any(address.ip()), 0);
                let socket = open(any, Type::STREAM, SCTP.into())?;
                socket.connect(&(*address).into())?;
                socket.send(b"?")?;
                socket.recv(&mut [MaybeUninit::uninit()])?;
            }
        }
        Step::Refused(name, address) => {
            let refused = get(name)?.connect(&(*address).into()).err();
            ensure!(
                refused.as_ref().map(io::Error::kind) == Some(io::ErrorKind::ConnectionRefused),
                "{refused:?}"
            );
        }
        Step::Connect(name, address) => get(name)?.connect(&(*address).into())?,
        Step::Begin(name, address) => {
            let socket = get(name)?;
            socket.set_nonblocking(true)?;
            match socket.connect(&(*address).into()) {
                Err(error) if error.raw_os_error() != Some(nix::libc::EINPROGRESS) => {
                    return Err(error.into());
                }
                _ => socket.set_nonblocking(false)?,
            }
        }
        Step::FastOpen(name, address) => {
            get(name)?.send_to_with_flags(b"?", &(*address).into(), nix::libc::MSG_FASTOPEN)?;
        }
        Step::Listen(name) => get(name)?.listen(1024)?,
        Step::Inherited(name) => {
            let socket = Socket::from(io::stdin().as_fd().try_clone_to_owned()?);
            sockets.insert(name.clone(), socket);
        }
        Step::Worker(name, cgroup, steps) => {
            let socket = OwnedFd::from(get(name)?.try_clone()?);
            let status = Command::new(env::current_exe()?)
                .args(["--cgroup", cgroup, "play", &format!("inherited {name}")])
                .args(steps)
                .stdin(Stdio::from(socket))
                .status()?;
            ensure!(status.success(), "the worker: {status}");
        }
        Step::Sysctl(name, value) => fs::write(format!("/proc/sys/{name}"), value)?,
        Step::Accept(name, new) => {
            let (socket, _) = get(name)?.accept()?;
            socket.set_read_timeout(Some(patience()))?;
            sockets.insert(new.clone(), socket);
        }
        Step::Send(name) => {
            get(name)?.send(b"?")?;
        }
        Step::SendTo(name, address) => {
            get(name)?.send_to(b"?", &(*address).into())?;
        }
        Step::Recv(name) => {
            get(name)?.recv(&mut [MaybeUninit::uninit()])?;
        }
        Step::Answer(name) => answer(get(name)?)?,
        Step::Echo(name) => {
            let socket = get(name)?;
            while answer(socket).is_ok() {}
        }
        Step::Join(name, IpAddr::V4(group)) => {
            get(name)?.join_multicast_v4(group, &[0, 0, 0, 0].into())?;
        }
        Step::Join(name, IpAddr::V6(group)) => get(name)?.join_multicast_v6(group, 0)?,
        Step::Broadcast(name) => get(name)?.set_broadcast(true)?,
        Step::Close(name) => drop(sockets.remove(name)),
        Step::Abort(name) => {
            if let Some(socket) = sockets.remove(name) {
                socket.set_linger(Some(Duration::ZERO))?;
            }
        }
        Step::Pause(milliseconds) => thread::sleep(Duration::from_millis(*milliseconds)),
        Step::Burst(count, address) => burst(*count, *address, |_| Ok(()))?,
        Step::Asks(count, address) => burst(*count, *address, |socket| {
            socket.set_read_timeout(Some(patience()))?;
            socket.recv(&mut [MaybeUninit::uninit()]).map(drop)
        })?,
        Step::Ports(first, last, address) => {
            for port in *first..=*last {
                let any = SocketAddr::new(any(address.ip()), port);
                let socket = open(any, Type::STREAM, Protocol::TCP)?;
                // The port is free at once.
                socket.set_linger(Some(Duration::ZERO))?;
                match socket.connect(&(*address).into()) {
                    // It was established, and the server was faster than this process.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
                    connected => connected?,
                }
            }
        }
        Step::Listens(count, address) => {
            for _ in 0..*count {
                open(*address, Type::STREAM, Protocol::TCP)?.listen(1)?;
            }
        }
        Step::Await(file) => {
            while !file.exists() {
                thread::sleep(Duration::from_millis(10));
            }
        }
        Step::Ready => announce()?,
        Step::Stay => loop {
            thread::park();
        },
    }
    Ok(())
}

fn open(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    // A raw socket of IPv6 has a protocol of its own, and takes nothing else.
    if address.is_ipv6() && kind != Type::RAW {
        socket.set_only_v6(false)?;
    }
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
    }
    socket.set_read_timeout(Some(patience()))?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket)
}

fn answer(socket: &Socket) -> io::Result<()> {
    let (_, peer) = socket.recv_from(&mut [MaybeUninit::uninit()])?;
    socket.send_to(b"!", &peer)?;
    Ok(())
}

/// Two digits a byte.
fn hexadecimal(digits: &str) -> Result<Vec<u8>> {
    ensure!(digits.len().is_multiple_of(2), "half a byte in `{digits}`");
    (0..digits.len())
        .step_by(2)
        .map(|at| {
            let byte = digits.get(at..at + 2).context("no digits")?;
            Ok(u8::from_str_radix(byte, 16)?)
        })
        .collect()
}

/// Every address of this one's family.
fn any(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    }
}

/// A socket for each datagram, as resolvers do it.
fn burst(
    count: usize,
    address: SocketAddr,
    then: impl Fn(&Socket) -> io::Result<()>,
) -> io::Result<()> {
    for port in (20_000..).take(count) {
        let socket = Socket::new(
            Domain::for_address(address),
            Type::DGRAM,
            Some(Protocol::UDP),
        )?;
        // Ports that the kernel chooses may come again, and be no new peer for the other end.
        socket.bind(&SocketAddr::new(any(address.ip()), port).into())?;
        socket.connect(&address.into())?;
        socket.send(b"?")?;
        then(&socket)?;
    }
    Ok(())
}
