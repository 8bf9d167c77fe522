//! What is to be sent, and what is sent but not acknowledged.

use std::collections::VecDeque;

use bytes::Bytes;
use flow::{
    observations::Observations,
    record::FlowRecord,
    wire::{self, AgentMessage, Batch, Encoding, MAX_BATCH_FLOWS, Resolve, Window, WireError},
};

use crate::{capture::Losses, collector::Report};

/// Batches that may be under way unacknowledged. Enough to keep the connection busy; what comes meanwhile is merged.
const MAX_IN_FLIGHT: usize = 8;

/// Distinct flows that may wait. While the generator is away equal flows are added up, so this bounds distinct edges and
/// not connections; a record takes about half a KiB. What exceeds it is counted as lost.
const MAX_PENDING: usize = 100_000;

/// The reason under which connections are counted that found no room.
const OUTBOX_FULL: &str = "outbox_full";
/// The reason under which connections are counted whose batch the generator refused for good.
const BATCH_REFUSED: &str = "batch_refused";
/// The reason under which connections are counted whose record no peer would accept.
const RECORD_TOO_LONG: &str = "record_too_long";

/// Numbers batches without gaps, and keeps each until it is acknowledged.
#[derive(Debug)]
pub(super) struct Outbox {
    pending: Pending,
    losses: Losses,
    window: Option<Window>,
    in_flight: VecDeque<Sealed>,
    last_sequence: u64,
    acknowledged: u64,
}

/// A batch that has its number and will not change any more.
#[derive(Debug)]
pub(super) struct Sealed {
    pub(super) sequence: u64,
    pub(super) message: Bytes,
    connections: u64,
    window: Window,
    losses: Losses,
}

impl Outbox {
    pub(super) fn new(resolve: Resolve) -> Self {
        Self {
            pending: Pending::new(resolve),
            losses: Losses::new(),
            window: None,
            in_flight: VecDeque::new(),
            last_sequence: 0,
            acknowledged: 0,
        }
    }

    /// Takes in one drain.
    pub(super) fn add(&mut self, report: Report) {
        if report.records.is_empty() && report.losses.is_empty() {
            return;
        }
        self.widen(report.window);
        for (reason, count) in report.losses {
            self.lose(&reason, count);
        }
        for mut record in report.records {
            // The ledger counts connections and does not tell them apart; what ends one has been counted before.
            if record.count == 0 {
                continue;
            }
            record.connection = None;
            record.tuple.src_port = 0;
            if self.pending.len() >= MAX_PENDING && !self.pending.knows(&record) {
                self.lose(OUTBOX_FULL, record.count);
            } else {
                self.pending.add(record);
            }
        }
    }

    /// Seals the next batch, if there is something to send and room for one more under way.
    ///
    /// # Errors
    /// If the batch cannot be expressed on the wire at all.
    pub(super) fn seal(&mut self) -> Result<Option<&Sealed>, WireError> {
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return Ok(None);
        }
        let Some(window) = self.window else {
            return Ok(None);
        };
        let mut room = MAX_BATCH_FLOWS;
        loop {
            let flows = self.pending.take(room);
            let connections = flows.iter().map(|flow| flow.count).sum();
            let message = AgentMessage::Batch(Batch {
                sequence: self.last_sequence + 1,
                window,
                flows,
                losses: self.losses.clone(),
            });
            match wire::encode(&message, Encoding::MessagePack) {
                Ok(bytes) => {
                    self.last_sequence += 1;
                    let losses = std::mem::take(&mut self.losses);
                    if self.pending.is_empty() {
                        self.window = None;
                    }
                    self.in_flight.push_back(Sealed {
                        sequence: self.last_sequence,
                        message: bytes.into(),
                        connections,
                        window,
                        losses,
                    });
                    return Ok(self.in_flight.back());
                }
                Err(WireError::TooLong(_)) => {
                    let AgentMessage::Batch(batch) = message else {
                        return Ok(None);
                    };
                    room = batch.flows.len() / 2;
                    self.put_back(batch.flows);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Forgets all batches up to this one.
    pub(super) fn acknowledge(&mut self, sequence: u64) {
        self.acknowledged = self.acknowledged.max(sequence.min(self.last_sequence));
        while self
            .in_flight
            .front()
            .is_some_and(|batch| batch.sequence <= sequence)
        {
            self.in_flight.pop_front();
        }
    }

    /// Replaces the first batch, which no generator will ever accept, by one that only says so under the same number.
    /// Returns how many connections that costs; `None` if there is nothing to give up.
    pub(super) fn give_up_first(&mut self) -> Option<u64> {
        let first = self.in_flight.front_mut()?;
        let lost = std::mem::take(&mut first.connections);
        let mut losses = std::mem::take(&mut first.losses);
        *losses.entry(BATCH_REFUSED.to_owned()).or_default() += lost;
        let message = AgentMessage::Batch(Batch {
            sequence: first.sequence,
            window: first.window,
            flows: Vec::new(),
            losses,
        });
        first.message = wire::encode(&message, Encoding::MessagePack).ok()?.into();
        Some(lost)
    }

    /// The largest number that was acknowledged; 0 if none was.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Forgets what was acknowledged, for a ledger that does not know it.
    pub(super) fn start_anew(&mut self) {
        self.acknowledged = 0;
    }

    /// The first batch after this number that was not acknowledged: its own number, and its message.
    pub(super) fn unacknowledged_after(&self, sequence: u64) -> Option<(u64, Bytes)> {
        self.in_flight
            .iter()
            .find(|batch| batch.sequence > sequence)
            .map(|batch| (batch.sequence, batch.message.clone()))
    }

    /// Whether nothing is left to send or to be acknowledged.
    pub(super) fn is_empty(&self) -> bool {
        self.in_flight.is_empty() && self.window.is_none()
    }

    /// Connections that were not acknowledged.
    pub(super) fn connections(&self) -> u64 {
        let sealed: u64 = self.in_flight.iter().map(|batch| batch.connections).sum();
        sealed + self.pending.connections()
    }

    /// A batch that was too long goes back; a single record that is too long alone is lost.
    fn put_back(&mut self, flows: Vec<FlowRecord>) {
        if let [record] = flows.as_slice() {
            let count = record.count;
            self.lose(RECORD_TOO_LONG, count);
            return;
        }
        for record in flows {
            self.pending.add(record);
        }
    }

    fn lose(&mut self, reason: &str, count: u64) {
        let sum = self.losses.entry(reason.to_owned()).or_default();
        *sum = sum.saturating_add(count);
    }

    fn widen(&mut self, window: Window) {
        self.window = Some(match self.window {
            Some(known) => Window {
                from: known.from.min(window.from),
                to: known.to.max(window.to),
            },
            None => window,
        });
    }
}

/// Records that wait to be sent.
#[derive(Debug)]
enum Pending {
    /// Added up.
    Merged(Observations),
    /// Each by itself: who an address was is decided by the time in the record, which adding up would lose.
    Apart(VecDeque<FlowRecord>),
}

impl Pending {
    fn new(resolve: Resolve) -> Self {
        match resolve {
            Resolve::Both => Self::Merged(Observations::default()),
            Resolve::Local => Self::Apart(VecDeque::new()),
        }
    }

    fn add(&mut self, record: FlowRecord) {
        match self {
            Self::Merged(observations) => {
                observations.observe(record);
            }
            Self::Apart(records) => records.push_back(record),
        }
    }

    /// Whether the record would take no more room.
    fn knows(&self, record: &FlowRecord) -> bool {
        match self {
            Self::Merged(observations) => observations.knows(record),
            Self::Apart(_) => false,
        }
    }

    fn take(&mut self, most: usize) -> Vec<FlowRecord> {
        match self {
            Self::Merged(observations) => observations.take(most),
            Self::Apart(records) => records.drain(..most.min(records.len())).collect(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Merged(observations) => observations.len(),
            Self::Apart(records) => records.len(),
        }
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn connections(&self) -> u64 {
        match self {
            Self::Merged(observations) => observations.records().map(|record| record.count).sum(),
            Self::Apart(records) => records.iter().map(|record| record.count).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::IpAddr};

    use flow::{
        endpoint::Endpoint,
        record::{Direction, Outcome, Protocol, Source, Tuple},
        time::Timestamp,
    };

    use super::*;

    fn record(client: u32, count: u64) -> FlowRecord {
        let address = IpAddr::from(client.to_be_bytes());
        let server = IpAddr::from([10, 0, 0, 1]);
        FlowRecord {
            timestamp: Timestamp::from_nanos(5),
            hostname: "node-1".to_owned(),
            tuple: Tuple {
                src_addr: address,
                src_port: 0,
                dst_addr: server,
                dst_port: 80,
            },
            src: Endpoint::External(address),
            dst: Endpoint::External(server),
            protocol: Protocol::Tcp,
            direction: Direction::Ingress,
            outcome: Outcome::Established,
            count,
            first_seen: Timestamp::from_nanos(5),
            last_seen: Timestamp::from_nanos(5),
            process: None,
            sources: BTreeSet::from([Source::Ebpf]),
            via: None,
            connection: None,
        }
    }

    fn report(from: u64, records: Vec<FlowRecord>) -> Report {
        Report {
            window: Window {
                from: Timestamp::from_nanos(from * 1_000),
                to: Timestamp::from_nanos((from + 10) * 1_000),
            },
            records,
            losses: Losses::new(),
        }
    }

    fn batch(sealed: &Sealed) -> Batch {
        match wire::decode(&sealed.message, Encoding::MessagePack).unwrap() {
            AgentMessage::Batch(batch) => batch,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn batches_are_numbered_and_kept_until_acknowledged() {
        let mut outbox = Outbox::new(Resolve::Both);
        for number in 1..=3 {
            outbox.add(report(number * 10, vec![record(1, number)]));
            let sealed = outbox.seal().unwrap().unwrap();
            let batch = batch(sealed);
            assert_eq!(batch.sequence, number);
            assert_eq!(batch.flows[0].count, number);
            assert!(outbox.seal().unwrap().is_none());
        }
        outbox.acknowledge(2);
        let left = |after| outbox.unacknowledged_after(after).map(|(number, _)| number);
        assert_eq!((left(0), left(3)), (Some(3), None));
        assert_eq!(outbox.connections(), 3);
        outbox.acknowledge(3);
        assert!(outbox.is_empty());
    }

    #[test]
    fn what_waits_is_added_up() {
        let mut outbox = Outbox::new(Resolve::Both);
        for _ in 0..MAX_IN_FLIGHT {
            outbox.add(report(0, vec![record(1, 1)]));
            outbox.seal().unwrap().unwrap();
        }
        for second in 0..1_000 {
            outbox.add(report(second, vec![record(1, 2), record(2, 3)]));
            assert!(outbox.seal().unwrap().is_none(), "too many under way");
        }
        outbox.acknowledge(1);
        let batch = batch(outbox.seal().unwrap().unwrap());
        let counts: Vec<u64> = batch.flows.iter().map(|flow| flow.count).collect();
        assert_eq!(counts, [2_000, 3_000]);
        assert_eq!(batch.window.from, Timestamp::from_nanos(0));
        assert_eq!(batch.window.to, Timestamp::from_nanos(1_009_000));
    }

    #[test]
    fn records_whose_other_end_is_only_an_address_keep_their_own_time() {
        let mut outbox = Outbox::new(Resolve::Local);
        for _ in 0..MAX_IN_FLIGHT {
            outbox.add(report(0, vec![record(1, 1)]));
            outbox.seal().unwrap().unwrap();
        }
        for second in 1..=3 {
            let mut later = record(1, second);
            later.last_seen = Timestamp::from_nanos(second * 1_000);
            outbox.add(report(second, vec![later]));
        }
        assert_eq!(outbox.connections(), MAX_IN_FLIGHT as u64 + 6);
        outbox.acknowledge(1);
        let batch = batch(outbox.seal().unwrap().unwrap());
        let seen: Vec<(u64, u64)> = batch
            .flows
            .iter()
            .map(|flow| (flow.last_seen.as_nanos() / 1_000, flow.count))
            .collect();
        assert_eq!(seen, [(1, 1), (2, 2), (3, 3)]);
    }

    #[test]
    fn a_full_outbox_counts_what_it_turns_away() {
        let mut outbox = Outbox::new(Resolve::Both);
        let clients = u32::try_from(MAX_PENDING).unwrap() + 5;
        outbox.add(report(
            0,
            (0..clients).map(|client| record(client, 7)).collect(),
        ));
        // What is known already is still added up.
        outbox.add(report(0, vec![record(0, 1)]));
        assert_eq!(outbox.pending.len(), MAX_PENDING);
        let mut sent = 0;
        let mut lost = 0;
        while let Some(sealed) = outbox.seal().unwrap() {
            let batch = batch(sealed);
            assert!(batch.flows.len() <= MAX_BATCH_FLOWS);
            sent += batch.flows.iter().map(|flow| flow.count).sum::<u64>();
            lost += batch.losses.values().sum::<u64>();
            let sequence = batch.sequence;
            outbox.acknowledge(sequence);
        }
        assert_eq!(lost, 35);
        assert_eq!(sent + lost, u64::from(clients) * 7 + 1);
    }

    #[test]
    fn a_batch_that_is_too_long_is_divided_and_a_record_that_is_too_long_is_counted() {
        let mut outbox = Outbox::new(Resolve::Both);
        let long = |client, bytes| FlowRecord {
            hostname: "x".repeat(bytes),
            ..record(client, 1)
        };
        let mut records: Vec<FlowRecord> = (0..10).map(|client| long(client, 1 << 20)).collect();
        records.push(long(99, wire::MAX_MESSAGE_BYTES + 1));
        outbox.add(report(0, records));
        let (mut sent, mut lost) = (0, 0);
        while let Some(sealed) = outbox.seal().unwrap() {
            let batch = batch(sealed);
            sent += batch.flows.len();
            lost += batch.losses.get(RECORD_TOO_LONG).copied().unwrap_or(0);
            let sequence = batch.sequence;
            outbox.acknowledge(sequence);
        }
        assert_eq!((sent, lost), (10, 1));
        assert!(outbox.is_empty());
    }

    #[test]
    fn losses_travel_without_flows() {
        let mut outbox = Outbox::new(Resolve::Both);
        let mut lossy = report(0, Vec::new());
        lossy.losses.insert("flows_and_ring_full".to_owned(), 4);
        outbox.add(lossy);
        let batch = batch(outbox.seal().unwrap().unwrap());
        assert_eq!(batch.losses["flows_and_ring_full"], 4);
        assert!(batch.flows.is_empty());
    }

    #[test]
    fn a_batch_that_is_given_up_keeps_its_number_and_becomes_a_loss() {
        let mut outbox = Outbox::new(Resolve::Both);
        assert_eq!(outbox.give_up_first(), None);
        let mut first = report(0, vec![record(1, 5)]);
        first.losses.insert("socket_unreadable".to_owned(), 2);
        outbox.add(first);
        outbox.seal().unwrap().unwrap();
        assert_eq!(outbox.give_up_first(), Some(5));
        let (number, message) = outbox.unacknowledged_after(0).unwrap();
        let AgentMessage::Batch(batch) = wire::decode(&message, Encoding::MessagePack).unwrap()
        else {
            panic!("no batch");
        };
        assert_eq!((number, batch.sequence), (1, 1));
        assert!(batch.flows.is_empty());
        assert_eq!(batch.losses["socket_unreadable"], 2);
        assert_eq!(batch.losses[BATCH_REFUSED], 5);
        assert_eq!(outbox.connections(), 0);
    }
}
