//! All namespaces and all processes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::{self, BufReader},
    path::PathBuf,
};

use agent_common::{
    address::Address,
    tcp::{LISTEN, is_open},
};

use super::{
    CgroupIds, Connection, Found, Listener, Process, Progress,
    processes::{self, is_gone},
    table::{self, Row, Table},
};

/// Connections that are kept; each takes some 200 bytes until it is reported.
const MOST_CONNECTIONS: usize = 262_144;

/// How often each table is read: a table that changes while it is read may miss a socket that is there all the time.
const READINGS: u32 = 2;

/// Whose sockets are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Its connections.
    Tcp,
    /// Its associations.
    Sctp,
}

/// One look at everything.
#[derive(Debug)]
pub struct Walk {
    transport: Transport,
    proc: PathBuf,
    cgroups: CgroupIds,
    most_connections: usize,
}

/// A namespace as far as it is read.
#[derive(Default)]
struct Namespace {
    /// Its own inode number; 0 if no process tells.
    netns: u32,
    /// Inode number of the listening socket, by address and port.
    listeners: BTreeMap<(Address, u16), u64>,
    /// Inode number of the socket, by its ends; 0 if it waits in a listener's queue.
    connections: BTreeMap<(Address, u16, Address, u16), u64>,
}

impl Walk {
    /// A look at the processes in `proc`, usually `/proc`.
    #[must_use]
    pub fn new(transport: Transport, proc: PathBuf, cgroups: CgroupIds) -> Self {
        Self {
            transport,
            proc,
            cgroups,
            most_connections: MOST_CONNECTIONS,
        }
    }

    /// Finds what is open now.
    ///
    /// # Errors
    /// If processes cannot be listed.
    pub fn run(mut self) -> io::Result<Found> {
        let mut found = Found::default();
        let mut progress = Progress::start();
        let pids = processes::ids(&self.proc)?;
        let mut members: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for &pid in &pids {
            match processes::namespace(&self.proc, pid) {
                Ok(namespace) => members.entry(namespace).or_default().push(pid),
                Err(error) if is_gone(&error) => {}
                Err(_) => found.unread += 1,
            }
        }

        let mut namespaces = Vec::new();
        let mut room = self.most_connections;
        for pids in members.values() {
            if let Some(mut namespace) = self.read_namespace(pids, &mut room, &mut found) {
                let mut netns = pids.iter().map(|pid| processes::netns(&self.proc, *pid));
                namespace.netns = netns.find_map(|netns| netns).unwrap_or(0);
                namespaces.push(namespace);
            }
            log(&mut progress, "namespaces", namespaces.len(), members.len());
        }
        let owners = self.find_owners(&pids, &namespaces, &mut found, &mut progress);
        for namespace in &namespaces {
            collect(namespace, &owners, &mut found);
        }
        Ok(found)
    }

    /// Reads the tables of a namespace through the first of its processes that is still there; `None` if none is, and so
    /// the namespace has ended.
    fn read_namespace(
        &self,
        pids: &[u32],
        room: &mut usize,
        found: &mut Found,
    ) -> Option<Namespace> {
        let mut namespace = Namespace::default();
        'pids: for pid in pids {
            for reading in 0..READINGS {
                for table in self.tables() {
                    let path = self.proc.join(format!("{pid}/net/{}", table.file));
                    let read = File::open(&path).and_then(|file| {
                        table.read(BufReader::new(file), |row| {
                            if !namespace.add(row, room) && reading == 0 {
                                found.left_out += 1;
                            }
                        })
                    });
                    match read {
                        Ok(unread) if reading == 0 => found.unread += unread,
                        Ok(_) => {}
                        Err(error) if is_gone(&error) && table.is_optional => {}
                        Err(error) if is_gone(&error) => continue 'pids,
                        Err(error) => {
                            tracing::warn!(%error, path = %path.display(), "a table of sockets cannot be read");
                            found.unread += 1;
                        }
                    }
                }
            }
            return Some(namespace);
        }
        None
    }

    fn tables(&self) -> &'static [Table] {
        match self.transport {
            Transport::Tcp => &table::TCP,
            Transport::Sctp => &table::SCTP,
        }
    }

    /// The processes that have the sockets open, by inode number. Of several it is the first in the order of their ids, the
    /// oldest; but pid 1, which opens sockets for the services that it starts, only if there is no other.
    fn find_owners(
        &mut self,
        pids: &[u32],
        namespaces: &[Namespace],
        found: &mut Found,
        progress: &mut Progress,
    ) -> HashMap<u64, Process> {
        let mut wanted: HashSet<u64> = namespaces
            .iter()
            .flat_map(|namespace| {
                namespace
                    .listeners
                    .values()
                    .chain(namespace.connections.values())
            })
            .copied()
            .collect();
        wanted.remove(&0);
        let (last, others): (Vec<u32>, Vec<u32>) = pids.iter().partition(|pid| **pid == 1);
        let mut owners = HashMap::new();
        for (done, &pid) in others.iter().chain(&last).enumerate() {
            if wanted.is_empty() {
                break;
            }
            let mut own = Vec::new();
            processes::sockets(&self.proc, pid, |inode| {
                if wanted.remove(&inode) {
                    own.push(inode);
                }
            });
            if !own.is_empty() {
                let process = processes::describe(&self.proc, pid, &mut self.cgroups);
                owners.extend(own.into_iter().map(|inode| (inode, process.clone())));
            }
            log(progress, "processes", done, pids.len());
        }
        found.ownerless = wanted.len();
        owners
    }
}

impl Namespace {
    /// Takes in what matters; false if there is no room for it.
    fn add(&mut self, row: Row, room: &mut usize) -> bool {
        if row.state == LISTEN {
            let key = (row.local.unwildcard(), row.local_port);
            self.listeners.insert(key, row.inode);
        } else if is_open(row.state) {
            let key = (row.local, row.local_port, row.remote, row.remote_port);
            if let Some(inode) = self.connections.get_mut(&key) {
                // Accepted in the meantime.
                *inode = (*inode).max(row.inode);
            } else if *room == 0 {
                return false;
            } else {
                *room -= 1;
                self.connections.insert(key, row.inode);
            }
        }
        true
    }

    /// The listener from which a connection with this local end can have come.
    fn listener(&self, local: Address, port: u16) -> Option<u64> {
        let exact = self.listeners.get(&(local, port));
        exact
            .or_else(|| self.listeners.get(&(Address::UNSPECIFIED, port)))
            .copied()
    }
}

fn collect(namespace: &Namespace, owners: &HashMap<u64, Process>, found: &mut Found) {
    for (&(address, port), inode) in &namespace.listeners {
        found.listeners.push(Listener {
            netns: namespace.netns,
            address,
            port,
            owner: owners.get(inode).cloned(),
        });
    }
    for (&(local, local_port, remote, remote_port), inode) in &namespace.connections {
        let listener = namespace.listener(local, local_port);
        let listens = listener.and_then(|inode| owners.get(&inode));
        found.connections.push(Connection {
            ends: agent_common::types::Connection {
                local,
                remote,
                netns: namespace.netns,
                local_port,
                remote_port,
            },
            accepted: listener.is_some(),
            owner: listens.or_else(|| owners.get(inode)).cloned(),
        });
    }
}

fn log(progress: &mut Progress, what: &str, done: usize, of: usize) {
    if progress.is_due() {
        tracing::info!(what, done, of, "looking for what was open before");
    }
}

#[cfg(test)]
mod tests;
