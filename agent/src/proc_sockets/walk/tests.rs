use std::{fs, os::unix::fs::symlink, path::Path};

use super::*;

const HEADING: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

fn line(
    local: [u8; 4],
    port: u16,
    remote: [u8; 4],
    remote_port: u16,
    state: &str,
    inode: u64,
) -> String {
    let word = |address| format!("{:08X}", u32::from_ne_bytes(address));
    format!(
        "   0: {}:{port:04X} {}:{remote_port:04X} {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0\n",
        word(local),
        word(remote)
    )
}

/// A process in a made-up `/proc`; its namespace's table is the one that `table` of it was called with first.
fn process(proc: &Path, pid: u32, netns: u32, table: &str, inodes: &[u64]) {
    let folder = proc.join(pid.to_string());
    for sub in ["ns", "net", "fd"] {
        fs::create_dir_all(folder.join(sub)).unwrap();
    }
    symlink(format!("net:[{netns}]"), folder.join("ns/net")).unwrap();
    let shared = proc.join(format!("namespace-{netns}"));
    if !shared.exists() {
        fs::write(&shared, format!("{HEADING}{table}")).unwrap();
    }
    fs::hard_link(shared, folder.join("net/tcp")).unwrap();
    symlink("/dev/null", folder.join("fd/0")).unwrap();
    for (fd, inode) in inodes.iter().enumerate() {
        symlink(
            format!("socket:[{inode}]"),
            folder.join(format!("fd/{}", fd + 1)),
        )
        .unwrap();
    }
    fs::write(folder.join("comm"), format!("process-{pid}\n")).unwrap();
    fs::write(folder.join("cgroup"), format!("0::/pods/{netns}\n")).unwrap();
}

const HERE: [u8; 4] = [10, 244, 0, 11];
const THERE: [u8; 4] = [10, 244, 0, 12];
const ANY: [u8; 4] = [0; 4];

/// Sorted: namespaces come in the order of their inodes, which here are those of some files.
fn summary(found: &Found) -> Vec<(u32, u16, u16, bool, Option<u32>)> {
    let mut summary: Vec<_> = (found.connections.iter())
        .map(|connection| {
            let ends = connection.ends;
            let pid = connection.owner.as_ref().map(|owner| owner.pid);
            (
                ends.netns,
                ends.local_port,
                ends.remote_port,
                connection.accepted,
                pid,
            )
        })
        .collect();
    summary.sort_unstable();
    summary
}

/// Two namespaces; in the first a server with a listener that its worker and pid 1 have too, one accepted connection, one
/// that nobody has accepted yet, a connection that the server made, one in TIME_WAIT and one that is closed already. One
/// process is a zombie, which has no namespaces any more, and one tells nobody what its namespace is.
#[test]
fn servers_clients_and_their_owners() {
    let proc = tempfile::tempdir().unwrap();
    let cgroups = tempfile::tempdir().unwrap();
    fs::create_dir_all(cgroups.path().join("pods/77")).unwrap();
    let table = [
        line(ANY, 8080, ANY, 0, "0A", 100),
        line(HERE, 8080, THERE, 40_000, "01", 101),
        line(HERE, 8080, THERE, 40_001, "08", 0),
        line(HERE, 50_000, THERE, 5432, "01", 102),
        line(HERE, 8080, THERE, 40_002, "06", 0),
        line(HERE, 50_001, THERE, 5432, "04", 103),
    ]
    .concat();
    process(proc.path(), 1, 1, "", &[100]);
    fs::create_dir_all(proc.path().join("4/net")).unwrap();
    process(proc.path(), 5, 77, &table, &[]);
    fs::remove_file(proc.path().join("5/ns/net")).unwrap();
    process(proc.path(), 6, 77, "", &[100, 102, 103]);
    process(proc.path(), 7, 77, "", &[100, 101]);
    process(
        proc.path(),
        8,
        88,
        &line(THERE, 40_000, HERE, 8080, "01", 200),
        &[200],
    );
    fs::write(proc.path().join("uptime"), "1 1\n").unwrap();

    let ids = CgroupIds::new(Some(cgroups.path().to_owned()));
    let found = Walk::new(Transport::Tcp, proc.path().to_owned(), ids)
        .run()
        .unwrap();
    assert_eq!((found.unread, found.left_out), (0, 0));
    assert_eq!(found.ownerless, 0);
    assert_eq!(found.listeners.len(), 1);
    let listener = &found.listeners[0];
    assert_eq!(
        (listener.netns, listener.address, listener.port),
        (77, Address::UNSPECIFIED, 8080)
    );
    let owner = listener.owner.as_ref().unwrap();
    assert_eq!((owner.pid, owner.comm.as_str()), (6, "process-6"));
    assert_ne!(owner.cgroup, 0);
    assert_eq!(
        summary(&found),
        [
            (77, 8080, 40_000, true, Some(6)),
            (77, 8080, 40_001, true, Some(6)),
            (77, 50_000, 5432, false, Some(6)),
            (88, 40_000, 8080, false, Some(8)),
        ]
    );
}

#[test]
fn what_cannot_be_read_and_what_has_no_room_is_counted() {
    let proc = tempfile::tempdir().unwrap();
    let table: String = (1..=5)
        .map(|port| line(HERE, port, THERE, 80, "01", 900 + u64::from(port)))
        .chain(["not a line\n".to_owned()])
        .collect();
    process(proc.path(), 6, 77, &table, &[]);
    // A table that is there and cannot be read: a loop of links.
    fs::create_dir_all(proc.path().join("9/net")).unwrap();
    symlink("tcp", proc.path().join("9/net/tcp")).unwrap();
    let mut walk = Walk::new(Transport::Tcp, proc.path().to_owned(), CgroupIds::new(None));
    walk.most_connections = 3;
    let found = walk.run().unwrap();
    assert_eq!(found.connections.len(), 3);
    assert_eq!((found.left_out, found.ownerless), (2, 3));
    assert_eq!(
        found.unread, 2,
        "the line that is none, and the table of process 9"
    );
}
