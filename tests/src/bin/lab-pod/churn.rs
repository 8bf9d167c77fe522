//! Pods that come and go, one after the other.

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::Args;
use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        socket,
    },
};

#[derive(Args)]
pub(crate) struct Options {
    /// The folder below which pods have their cgroups.
    root: PathBuf,
    /// A letter for the names of the pods, which differs from that of other processes.
    letter: char,
    /// How many come and go.
    pods: u32,
}

/// Makes a pod with its network, has it talk to itself, and removes it, so many times.
pub(crate) fn run(options: &Options) -> Result<()> {
    writeln!(io::stdout(), "ready")?;
    let rest = fs::read_to_string("/proc/self/cgroup")?;
    let rest = rest
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .context("no cgroup of version 2")?
        .trim_start_matches('/')
        .to_owned();
    let mount = options
        .root
        .ancestors()
        .find(|folder| folder.join(&rest).join("cgroup.procs").exists())
        .context("the cgroup of this process is not beside the pods'")?;
    let home = mount.join(&rest);
    for number in 0..options.pods {
        let letter = u32::from(options.letter) & 0xff;
        let pod = options.root.join(format!(
            "pod00000000-0000-4000-80{letter:02x}-{number:012x}"
        ));
        let container = pod.join(format!("{letter:02x}{number:062x}"));
        fs::create_dir_all(&container).with_context(|| container.display().to_string())?;
        join(&container)?;
        unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
        loopback_up().context("lo")?;
        talk()?;
        join(&home)?;
        fs::remove_dir(&container)?;
        fs::remove_dir(&pod)?;
    }
    Ok(())
}

fn join(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| cgroup.display().to_string())
}

fn talk() -> Result<()> {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = TcpStream::connect(server.local_addr()?)?;
    let (mut accepted, _) = server.accept()?;
    client.write_all(b"?")?;
    accepted.read_exact(&mut [0])?;
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    client.send_to(b"?", server.local_addr()?)?;
    server.recv(&mut [0])?;
    Ok(())
}

/// Sets `IFF_UP` of the first interface, as `ip link set lo up` does (`man 7 rtnetlink`).
fn loopback_up() -> Result<()> {
    const LENGTH: u32 = 32;
    const RTM_NEWLINK: u16 = 16;
    const REQUEST_AND_ACK: u16 = 1 | 4;
    const LOOPBACK: u32 = 1;
    const UP: u32 = 1;
    let mut message = Vec::new();
    message.extend(LENGTH.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(REQUEST_AND_ACK.to_ne_bytes());
    // Sequence number and port, then `struct ifinfomsg`: family and type, index, flags, and which of them to change.
    for word in [0, 0, 0, LOOPBACK, UP, UP] {
        message.extend(word.to_ne_bytes());
    }
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(netlink.as_raw_fd(), &message, &kernel, MsgFlags::empty())?;
    let mut answer = [0; 256];
    let length = recv(netlink.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    // `struct nlmsgerr` begins with the error, 0 for none.
    let error = answer.get(16..20).filter(|_| length >= 20);
    let error = error.and_then(|bytes| Some(i32::from_ne_bytes(bytes.try_into().ok()?)));
    anyhow::ensure!(error == Some(0), "rtnetlink: {error:?}");
    Ok(())
}
