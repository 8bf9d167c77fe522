//! The flows of the last moments.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use flow::{
    endpoint::Endpoint,
    record::{Direction, FlowRecord, Outcome, Process, Protocol, Source},
    time::Timestamp,
};

/// For how long a flow is told of after its last connection. Longer than the usual scrape or probe interval.
pub const SPAN: Duration = Duration::from_secs(30);

/// The most flows that are told of at a time. Each takes about two KiB of the answer, which the probe parses every
/// few seconds; what exceeds them is counted.
pub const MAX_FLOWS: usize = 4_096;

/// A process that is not known.
const NOBODY: Process = Process {
    pid: 0,
    comm: String::new(),
    container: None,
    fd: None,
};

/// The most processes of a flow that are told of.
const MAX_PROCESSES: usize = 4;

/// Flows that were seen lately.
#[derive(Debug, Default)]
pub struct Recent(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    flows: HashMap<Key, (Flow, Instant)>,
    /// Connections of flows for which there was no room, with the time.
    left_out: VecDeque<(Instant, u64)>,
}

/// What makes two records one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    client: IpAddr,
    server: IpAddr,
    port: u16,
    protocol: Protocol,
    outcome: Outcome,
    direction: Direction,
}

/// One end's view of the connections between a client and a server's port.
#[derive(Clone, Debug)]
pub struct Flow {
    /// The client.
    pub src: Endpoint,
    /// The client's address.
    pub client: IpAddr,
    /// The server.
    pub dst: Endpoint,
    /// The address that the client called.
    pub server: IpAddr,
    /// The server's own port.
    pub port: u16,
    /// The transport protocol.
    pub protocol: Protocol,
    /// Whether the connections came about.
    pub outcome: Outcome,
    /// Which end is this node's.
    pub direction: Direction,
    /// Connections for as long as there was no gap longer than [`SPAN`].
    pub count: u64,
    /// When the last of them was seen.
    pub last_seen: Timestamp,
    /// The processes at this node's end, the last first; not all of them if there are many. One without a number for those who are
    /// not known.
    pub processes: Vec<Process>,
}

impl Flow {
    /// This node's end, with its address.
    #[must_use]
    pub fn local(&self) -> (&Endpoint, IpAddr) {
        match self.direction {
            Direction::Egress => (&self.src, self.client),
            Direction::Ingress => (&self.dst, self.server),
        }
    }

    fn new(record: &FlowRecord) -> Self {
        Self {
            src: record.src.clone(),
            client: record.tuple.src_addr,
            dst: record.dst.clone(),
            server: server(record),
            port: record.tuple.dst_port,
            protocol: record.protocol,
            outcome: record.outcome,
            direction: record.direction,
            count: 0,
            last_seen: record.last_seen,
            processes: Vec::new(),
        }
    }

    fn add(&mut self, record: &FlowRecord) {
        self.count = self.count.saturating_add(record.count);
        self.last_seen = self.last_seen.max(record.last_seen);
        // Who was unknown at first may be known by now.
        self.src = record.src.clone();
        self.dst = record.dst.clone();
        let process = record.process.clone().unwrap_or(NOBODY);
        self.processes.retain(|known| known.pid != process.pid);
        self.processes.insert(0, process);
        self.processes.truncate(MAX_PROCESSES);
    }
}

/// What was seen lately.
#[derive(Debug)]
pub struct Seen {
    /// The flows, in an order that stays the same from one question to the next.
    pub flows: Vec<Flow>,
    /// How many connections there were besides, for which there was no room.
    pub left_out: u64,
}

impl Recent {
    /// Takes note of what was captured.
    pub fn add(&self, records: &[FlowRecord]) {
        self.state().add(records, Instant::now());
    }

    /// What was seen lately.
    #[must_use]
    pub fn seen(&self) -> Seen {
        self.state().seen(Instant::now())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn add(&mut self, records: &[FlowRecord], now: Instant) {
        self.forget(now);
        let mut left_out = 0;
        for record in records.iter().filter(|record| is_news(record)) {
            let key = Key {
                client: record.tuple.src_addr,
                server: server(record),
                port: record.tuple.dst_port,
                protocol: record.protocol,
                outcome: record.outcome,
                direction: record.direction,
            };
            if self.flows.len() >= MAX_FLOWS && !self.flows.contains_key(&key) {
                left_out += record.count;
                continue;
            }
            let entry = self.flows.entry(key);
            let (flow, seen) = entry.or_insert_with(|| (Flow::new(record), now));
            flow.add(record);
            *seen = now;
        }
        if left_out > 0 {
            self.left_out.push_back((now, left_out));
        }
    }

    fn seen(&mut self, now: Instant) -> Seen {
        self.forget(now);
        let mut flows: Vec<Flow> = self.flows.values().map(|(flow, _)| flow.clone()).collect();
        flows.sort_by_key(|flow| {
            let direction = flow.direction == Direction::Ingress;
            let failed = flow.outcome == Outcome::Failed;
            (
                flow.client,
                flow.server,
                flow.port,
                flow.protocol,
                failed,
                direction,
            )
        });
        Seen {
            flows,
            left_out: self.left_out.iter().map(|(_, count)| count).sum(),
        }
    }

    fn forget(&mut self, now: Instant) {
        let recent = |seen: Instant| now.saturating_duration_since(seen) < SPAN;
        self.flows.retain(|_, (_, seen)| recent(*seen));
        while self
            .left_out
            .front()
            .is_some_and(|(seen, _)| !recent(*seen))
        {
            self.left_out.pop_front();
        }
    }
}

/// The server's own address, which need not be the one that was called; the record's port is the server's in any case.
fn server(record: &FlowRecord) -> IpAddr {
    let called = record.tuple.dst_addr;
    match (&record.dst, record.via) {
        (Endpoint::Pod { pod, .. }, Some(_)) => {
            let mut own = pod.addresses.iter().copied();
            own.find(|own| own.is_ipv4() == called.is_ipv4())
                .unwrap_or(called)
        }
        _ => called,
    }
}

/// Whether Scope can learn something from it: it is no connection's end, and not what Scope alone has seen.
fn is_news(record: &FlowRecord) -> bool {
    let is_scopes = record.sources.iter().eq([&Source::Scope]);
    record.count > 0 && !is_scopes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(client: u32, count: u64, pid: u32) -> FlowRecord {
        let client = std::net::Ipv4Addr::from(0x0a00_0000 + client);
        let text = serde_json::json!({
            "timestamp": 7.0, "hostname": "here", "src": {"pod": {}}, "dst": {"pod": {}}, "count": count,
            "tuple": {"src_addr": client, "src_port": 0, "dst_addr": "10.9.0.1", "dst_port": 80},
            "process": {"pid": pid, "comm": "x"},
        });
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn flows_add_up_and_go_when_nothing_is_heard_of_them() {
        let (mut state, start) = (State::default(), Instant::now());
        state.add(&[record(1, 2, 10), record(2, 1, 20)], start);
        state.add(&[record(1, 3, 11)], start + SPAN / 2);
        let seen = state.seen(start + SPAN / 2);
        let counts: Vec<u64> = seen.flows.iter().map(|flow| flow.count).collect();
        assert_eq!(counts, [5, 1]);
        let pids: Vec<u32> = seen.flows[0]
            .processes
            .iter()
            .map(|process| process.pid)
            .collect();
        assert_eq!(pids, [11, 10]);
        let seen = state.seen(start + SPAN);
        assert_eq!(seen.flows.len(), 1);
        assert!(state.seen(start + SPAN * 2).flows.is_empty());
    }

    /// Two pods behind one service, which the probe's log tells apart, and a port that the node forwards.
    #[test]
    fn who_was_called_by_another_address_has_his_own() {
        let (mut state, start) = (State::default(), Instant::now());
        let called = |address: &str, own: &str| {
            let mut record = record(1, 1, 1);
            let own = own.parse().unwrap();
            record.dst = Endpoint::Pod {
                pod: std::sync::Arc::new(flow::endpoint::Pod {
                    uid: String::new(),
                    namespace: "shop".to_owned(),
                    name: "web".to_owned(),
                    labels: std::sync::Arc::default(),
                    workload: None,
                    node: None,
                    host_network: false,
                    addresses: vec!["fd00::1".parse().unwrap(), own],
                    services: std::sync::Arc::default(),
                }),
                service: None,
            };
            record.tuple.dst_addr = address.parse().unwrap();
            record.via = (record.tuple.dst_addr != own).then(|| (record.tuple.dst_addr, 80).into());
            record
        };
        let records = [
            called("10.96.0.1", "10.0.9.1"),
            called("10.96.0.1", "10.0.9.2"),
            called("192.0.2.1", "10.0.9.3"),
            called("10.0.9.3", "10.0.9.3"),
        ];
        state.add(&records, start);
        let flows = state.seen(start).flows;
        let seen: Vec<_> = (flows.iter())
            .map(|flow| (flow.server.to_string(), flow.count))
            .collect();
        let own = |last, count| (format!("10.0.9.{last}"), count);
        assert_eq!(seen, [own(1, 1), own(2, 1), own(3, 2)]);
    }

    #[test]
    fn what_scope_has_told_it_is_not_told() {
        let (mut state, start) = (State::default(), Instant::now());
        let of = |client, sources: &[Source]| FlowRecord {
            sources: sources.iter().copied().collect(),
            ..record(client, 1, 1)
        };
        let records = [
            of(1, &[Source::Scope]),
            of(2, &[Source::Ebpf]),
            of(3, &[Source::Scope, Source::Ebpf]),
            record(4, 0, 1),
        ];
        state.add(&records, start);
        assert_eq!(state.seen(start).flows.len(), 2);
    }

    #[test]
    fn what_there_is_no_room_for_is_counted() {
        let (mut state, start) = (State::default(), Instant::now());
        let records: Vec<_> = (0..)
            .take(MAX_FLOWS + 3)
            .map(|client| record(client, 2, 1))
            .collect();
        state.add(&records, start);
        let seen = state.seen(start);
        assert_eq!((seen.flows.len(), seen.left_out), (MAX_FLOWS, 6));
        // Those that are known still count.
        state.add(&records[..1], start + SPAN / 2);
        let seen = state.seen(start + SPAN);
        assert_eq!(
            (seen.flows.len(), seen.left_out, seen.flows[0].count),
            (1, 0, 4)
        );
    }
}
