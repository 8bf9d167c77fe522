use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::scope::{
    samples::{SECOND, key, sighting},
    told::{BACKLOG_NS, Socket},
};

/// The first drain of a world ends at this second of `CLOCK_MONOTONIC`.
const START: u64 = 100_000;

/// The node's clock when that of the kernel read 0.
const BOOTED: u64 = 1_700_000_000;

fn clock(round: u64) -> Clock {
    let now = Timestamp::from_nanos((BOOTED + START + round) * SECOND);
    Clock::new((START + round) * SECOND, now)
}

/// A connection, made so many nanoseconds after the start.
#[derive(Clone, Copy, Debug)]
struct Made {
    ns: u64,
    port: u16,
    by_agent: bool,
    by_probe: bool,
    /// By how many drains its line is late.
    late: u64,
    /// How long after it was made it was accepted, in nanoseconds, if it was seen at its server.
    accepted: Option<u64>,
}

impl Default for Made {
    fn default() -> Self {
        Self {
            ns: SECOND / 2,
            port: 80,
            by_agent: true,
            by_probe: true,
            late: 0,
            accepted: None,
        }
    }
}

impl Made {
    /// The drain whose window it lies in: (round - 1, round].
    fn round(self) -> u64 {
        self.ns.div_ceil(SECOND).max(1)
    }

    fn line(self) -> Told {
        let ns = START * SECOND + self.ns + self.accepted.unwrap_or(0);
        let mut key = key(self.port);
        key.client_port = 40_000;
        let mut near_ns = SAME_EVENT_NS;
        if self.accepted.is_some() {
            key.direction = Direction::Ingress;
            near_ns = BACKLOG_NS;
        }
        Told::Socket(Socket {
            key,
            process: Process {
                pid: 7,
                comm: "app".to_owned(),
                fd: None,
            },
            at: Moment {
                host: None,
                time: clock(0).at(ns),
                boot: Boot::This(When {
                    ns,
                    early_ns: near_ns,
                    late_ns: near_ns,
                    is_delayed: self.accepted.is_some(),
                }),
            },
        })
    }
}

/// What an agent and its output have in common.
struct World {
    made: Vec<Made>,
    merger: Merger,
    handed_over: Vec<Sighting>,
    counts: Counts,
    /// By drain: when everything was counted by then.
    positions: Vec<(u64, Vec<Span>)>,
}

impl World {
    fn new(made: &[Made]) -> Self {
        Self {
            made: made.to_vec(),
            merger: Merger::new(Default::default()),
            handed_over: Vec::new(),
            counts: Counts::default(),
            positions: Vec::new(),
        }
    }

    /// One drain, with the lines that come in these drains.
    fn drain(&mut self, number: u64, lines: std::ops::RangeInclusive<u64>, is_last: bool) {
        let in_window = |made: &&Made| made.by_agent && made.round() == number;
        let mut seen: HashMap<u16, Sighting> = HashMap::new();
        for made in self.made.iter().filter(in_window) {
            let time = clock(0).at(START * SECOND + made.ns);
            let sighting = seen.entry(made.port).or_insert_with(|| {
                let mut sighting = sighting(made.port, 0);
                if made.accepted.is_some() {
                    sighting.observation.event = Event::Accept;
                }
                sighting.observation.first_seen = time;
                sighting.observation.last_seen = time;
                sighting
            });
            sighting.observation.count += 1;
            let seen = &mut sighting.observation;
            seen.first_seen = seen.first_seen.min(time);
            seen.last_seen = seen.last_seen.max(time);
        }
        let comes = |made: &&Made| made.by_probe && lines.contains(&(made.round() + made.late));
        let told = self.made.iter().filter(comes).map(|made| made.line());
        let round = Round {
            number,
            window: Window {
                from: clock(number - 1).now(),
                to: clock(number).now(),
            },
            clock: clock(number),
            is_complete: true,
            is_last,
        };
        let told = told.collect();
        let sightings = seen.into_values().map(|mut sighting| {
            sighting.round = number;
            sighting
        });
        let merged = self
            .merger
            .merge(round, sightings.collect(), told, &|_, _| true);
        self.handed_over.extend(merged.0);
        for (sum, new) in [
            (&mut self.counts.merged, merged.1.merged),
            (&mut self.counts.covered, merged.1.covered),
            (&mut self.counts.alone, merged.1.alone),
        ] {
            *sum += new;
        }
        self.positions.push((number, self.merger.counted()));
    }

    /// What was handed over, by server's port.
    fn sums(&self) -> HashMap<u16, u64> {
        let mut sums = HashMap::new();
        for sighting in &self.handed_over {
            *sums.entry(sighting.observation.port).or_default() += sighting.observation.count;
        }
        sums.retain(|_, sum| *sum > 0);
        sums
    }

    fn truth(&self) -> HashMap<u16, u64> {
        let mut sums = HashMap::new();
        for made in &self.made {
            *sums.entry(made.port).or_default() += 1;
        }
        sums
    }
}

/// Spans of so many seconds, in the middle of which both watch, or one of them does. What is accepted is so within some
/// seconds.
fn phases(
    most: usize,
    seconds: u64,
    most_late: u64,
    accepted: bool,
) -> impl Strategy<Value = Vec<Made>> {
    let delay = 0..3 * SECOND;
    let connection = (0..6 * SECOND, 80..82_u16, 0..=most_late, delay);
    let phase = (0..3, prop::collection::vec(connection, 0..12));
    prop::collection::vec(phase, 1..=most).prop_map(move |phases| {
        let made = phases
            .into_iter()
            .zip(0..)
            .flat_map(|((who, made), phase)| {
                made.into_iter().map(move |(ns, port, late, delay)| Made {
                    ns: (phase * seconds + 12) * SECOND + ns,
                    port,
                    by_agent: who != 1,
                    by_probe: who != 2,
                    // It is accepted first.
                    late: late + if accepted { 4 } else { 0 },
                    accepted: accepted.then_some(delay),
                })
            });
        made.collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whoever saw it, whenever its line comes, and in whatever order.
    #[test]
    fn each_connection_is_counted_once(
        made in prop_oneof![phases(6, 30, 400, false), phases(3, 150, 100, true)],
    ) {
        let mut world = World::new(&made);
        let last = 590;
        for round in 1..=last {
            world.drain(round, round..=round, round == last);
        }
        prop_assert_eq!(world.sums(), world.truth());
        let count = |of: fn(&Made) -> bool| made.iter().filter(|made| of(made)).count() as u64;
        prop_assert_eq!(world.counts.alone, count(|made| !made.by_agent));
        prop_assert_eq!(world.counts.merged, count(|made| made.by_agent && made.by_probe));
        prop_assert_eq!(world.counts.covered, 0);
    }

    /// The position is kept with what was handed over; what was not is read again.
    #[test]
    fn a_kill_neither_repeats_nor_skips(
        made in prop::collection::vec((0..120 * SECOND, 80..82_u16, 0..5_u64), 0..80),
        kills in prop::collection::btree_set(5..110_u64, 0..4),
        pause in 1..8_u64,
    ) {
        // A connection that nobody counted cannot be told from one of its flow that was counted in the same instant.
        let starts = |kill: &u64| (kill + pause) * SECOND;
        let is_doubtful = |ns: u64| {
            kills.iter().map(starts).any(|start| (start - SAME_EVENT_NS..start).contains(&ns))
        };
        let made: Vec<Made> = made
            .into_iter()
            .filter(|(ns, ..)| !is_doubtful(*ns))
            .map(|(ns, port, late)| Made { ns, port, late, ..Made::default() })
            .collect();
        let mut world = World::new(&made);
        let (mut read_to, mut resume) = (0, 0);
        for round in 1..=140 {
            if round < resume {
                continue;
            }
            world.drain(round, read_to + 1..=round, round == 140);
            read_to = round;
            if kills.contains(&round) {
                let done = world.merger.oldest().map_or(round, |oldest| oldest - 1);
                let position = world.positions.iter().rev().find(|(number, _)| *number <= done);
                let (number, counted) = position.cloned().unwrap_or_default();
                // The others were never written.
                world.positions.retain(|(other, _)| *other <= number);
                world.merger = Merger::new([counted, Vec::new()]);
                // Lines that come in a drain are read in it.
                read_to = number;
                resume = round + 1 + pause;
            }
        }
        prop_assert_eq!(world.sums(), world.truth());
    }
}

fn one(by_agent: bool, by_probe: bool, late: u64) -> World {
    let made = Made {
        by_agent,
        by_probe,
        late,
        ..Made::default()
    };
    let mut world = World::new(&[made]);
    for round in 1..=10 + late {
        world.drain(round, round..=round, false);
    }
    world
}

#[test]
fn who_saw_it_is_said() {
    for (by_agent, by_probe, wanted) in [
        (true, true, Some(false)),
        (false, true, Some(true)),
        (true, false, None),
    ] {
        let world = one(by_agent, by_probe, 1);
        let [sighting] = world.handed_over.as_slice() else {
            panic!("{:?}", world.handed_over);
        };
        let is_alone = sighting.log.as_ref().map(|log| log.is_alone);
        assert_eq!((sighting.observation.count, is_alone), (1, wanted));
    }
}

#[test]
fn a_late_line_adds_who_saw_it_and_no_count() {
    let world = one(true, true, 300);
    let counts: Vec<u64> = world
        .handed_over
        .iter()
        .map(|s| s.observation.count)
        .collect();
    assert_eq!(counts, [1, 0]);
    assert_eq!(world.handed_over[1].observation.cgroup, 3);
    assert!(!world.handed_over[1].log.as_ref().unwrap().is_alone);
}

#[test]
fn a_line_that_is_too_late_to_be_told_apart_is_counted_already() {
    let world = one(true, true, 700);
    assert_eq!((world.counts.covered, world.handed_over.len()), (1, 1));
}

#[test]
fn what_was_open_at_the_start_began_before() {
    let mut world = World::new(&[]);
    let mut open = sighting(80, 1);
    open.observation.first_seen = clock(0).now();
    open.observation.last_seen = clock(0).now();
    let round = |number| Round {
        number,
        window: Window {
            from: clock(number - 1).now(),
            to: clock(number).now(),
        },
        clock: clock(number),
        is_complete: true,
        is_last: number == 2,
    };
    let here = |_, _| true;
    world.merger.merge(round(1), vec![open], Vec::new(), &here);
    let mut line = Made {
        ns: 0,
        ..Made::default()
    }
    .line();
    if let Told::Socket(socket) = &mut line
        && let Boot::This(when) = &mut socket.at.boot
    {
        when.ns -= 5_000 * SECOND;
    }
    let (_, counts) = world
        .merger
        .merge(round(2), Vec::new(), vec![line.clone(), line], &here);
    assert_eq!((counts.merged, counts.alone), (1, 1));
}

fn tracked(client_port: u16, server: [u8; 4]) -> Told {
    let made = Made::default();
    let Told::Socket(socket) = made.line() else {
        panic!("no socket");
    };
    Told::Tracked(Tracked {
        client: SocketAddr::new(socket.key.local, client_port),
        called: SocketAddr::new(socket.key.remote, 80),
        server: SocketAddr::from((server, 8080)),
        masked: SocketAddr::new(socket.key.local, client_port),
        at: socket.at,
    })
}

/// One drain with two connections of the kernel programs, these lines, and then nothing.
fn with_lines(told: Vec<Told>) -> (Vec<Sighting>, Counts) {
    let mut merger = Merger::new(Default::default());
    let mut seen = sighting(80, 2);
    seen.observation.first_seen = clock(0).at(START * SECOND + SECOND / 2);
    seen.observation.last_seen = seen.observation.first_seen;
    let round = |number| Round {
        number,
        window: Window {
            from: clock(number - 1).now(),
            to: clock(number).now(),
        },
        clock: clock(number),
        is_complete: true,
        is_last: false,
    };
    let mut all = merger.merge(round(1), vec![seen], told, &|_, _| true);
    for number in 2..6 {
        let (more, counts) = merger.merge(round(number), Vec::new(), Vec::new(), &|_, _| true);
        all.0.extend(more);
        all.1.merged += counts.merged;
        all.1.alone += counts.alone;
    }
    all
}

fn backends(sightings: &[Sighting]) -> Vec<(u64, Option<SocketAddr>)> {
    let mut backends: Vec<_> = sightings
        .iter()
        .map(|sighting| {
            let log = sighting.log.as_ref();
            (sighting.observation.count, log.and_then(|log| log.backend))
        })
        .collect();
    backends.sort();
    backends
}

#[test]
fn the_server_behind_a_service_is_named() {
    let line = Made::default().line();
    // Its client's port is 40000.
    let behind = SocketAddr::from(([10, 0, 9, 9], 8080));
    for told in [
        vec![line.clone(), tracked(40_000, [10, 0, 9, 9])],
        vec![tracked(40_000, [10, 0, 9, 9]), line],
        // Without a line of its own, it is one of those that were counted.
        vec![tracked(40_001, [10, 0, 9, 9])],
    ] {
        let (sightings, counts) = with_lines(told);
        assert_eq!((counts.merged, counts.alone), (1, 0));
        let backends = backends(&sightings);
        let total: u64 = backends.iter().map(|(count, _)| count).sum();
        assert_eq!(total, 2);
        let is_late = backends.contains(&(0, None));
        assert!(
            is_late || backends.contains(&(1, Some(behind))),
            "{backends:?}"
        );
    }
}

/// Drains in which the kernel programs count nothing and not everything, with the lines that come in each.
fn unwatched(lines: Vec<(u64, Told)>, is_here: &dyn Fn(IpAddr, Timestamp) -> bool) -> World {
    let mut world = World::new(&[]);
    for number in 1..=12 {
        let told = lines.iter().filter(|(round, _)| *round == number);
        let round = Round {
            number,
            window: Window {
                from: clock(number - 1).now(),
                to: clock(number).now(),
            },
            clock: clock(number),
            is_complete: false,
            is_last: number == 12,
        };
        let told = told.map(|(_, told)| told.clone()).collect();
        let (sightings, counts) = world.merger.merge(round, Vec::new(), told, is_here);
        world.handed_over.extend(sightings);
        world.counts.merged += counts.merged;
        world.counts.alone += counts.alone;
        world.counts.passed_on += counts.passed_on;
    }
    world
}

/// The other end of the connection that [`tracked`] tells of, accepted from this client.
fn accepted(client: SocketAddr, server: [u8; 4]) -> Told {
    let made = Made {
        accepted: Some(0),
        ..Made::default()
    };
    let Told::Socket(mut socket) = made.line() else {
        panic!("no socket");
    };
    socket.key.local = server.into();
    socket.key.port = 8080;
    socket.key.remote = client.ip();
    socket.key.client_port = client.port();
    Told::Socket(socket)
}

#[test]
fn who_answered_is_known_whichever_line_comes_first() {
    let behind = [10, 0, 9, 9];
    let client = SocketAddr::new(key(80).local, 40_000);
    let call = Made::default().line();
    let accept = accepted(client, behind);
    let tracked = tracked(client.port(), behind);
    for rounds in [[3, 3, 3], [3, 4, 4], [4, 3, 4], [4, 3, 3], [3, 3, 4]] {
        let told = [&call, &tracked, &accept].map(Told::clone);
        let lines = rounds.into_iter().zip(told).collect();
        let world = unwatched(lines, &|_, _| true);
        let of = |direction: Event| {
            let told = world.handed_over.iter();
            let told = told.filter(|sighting| sighting.observation.event == direction);
            backends(&told.cloned().collect::<Vec<_>>())
        };
        let named = [(1, Some(SocketAddr::from((behind, 8080))))];
        assert_eq!(
            of(Event::Connect(Outcome::Established)),
            named,
            "{rounds:?}"
        );
        assert_eq!(of(Event::Accept), [(1, None)], "{rounds:?}");
        assert_eq!(world.counts.alone, 2, "{rounds:?}");
    }
}

/// A process may accept a connection long after the node has tracked it.
#[test]
fn what_was_placed_as_it_was_tracked_is_not_placed_again() {
    let behind = [10, 0, 9, 9];
    let client = SocketAddr::new(key(80).local, 40_000);
    let server_is_here = |address, _| address == IpAddr::from(behind);
    let lines = vec![
        (2, tracked(client.port(), behind)),
        (9, accepted(client, behind)),
    ];
    let world = unwatched(lines, &server_is_here);
    assert_eq!((world.counts.alone, world.counts.merged), (1, 1));
    assert_eq!(backends(&world.handed_over).len(), 1);
    // That of another server is another.
    let lines = vec![
        (2, tracked(client.port(), behind)),
        (9, accepted(client, [10, 0, 9, 8])),
    ];
    assert_eq!(unwatched(lines, &server_is_here).counts.alone, 2);
}

/// Ports are used again, for another server, before the line about the first has been placed.
#[test]
fn what_a_client_called_before_counts_too() {
    let lines = vec![
        (2, tracked(40_000, [10, 0, 9, 9])),
        (2, tracked(40_000, [10, 0, 9, 8])),
        // The same once more is not.
        (3, tracked(40_000, [10, 0, 9, 8])),
    ];
    let world = unwatched(lines, &|_, _| true);
    assert_eq!(world.counts.alone, 2);
    let named: Vec<_> = backends(&world.handed_over)
        .into_iter()
        .filter_map(|(_, backend)| Some(backend?.ip()))
        .collect();
    assert_eq!(named, [[10, 0, 9, 8], [10, 0, 9, 9]].map(IpAddr::from));
}

/// A node port's client, in whose stead the node asks.
#[test]
fn who_comes_masked_counts_once_and_who_only_passes_does_not() {
    let behind = [10, 0, 9, 9];
    let node = SocketAddr::from(([10, 0, 9, 1], 5_000));
    let mut told = tracked(40_000, behind);
    if let Told::Tracked(tracked) = &mut told {
        tracked.masked = node;
    }
    let server_is_here = |address, _| address == IpAddr::from(behind);
    for rounds in [(2, 2), (2, 9), (3, 2)] {
        let lines = vec![(rounds.0, told.clone()), (rounds.1, accepted(node, behind))];
        let world = unwatched(lines, &server_is_here);
        assert_eq!(world.counts.alone, 1, "{rounds:?}");
        let [sighting] = world.handed_over.as_slice() else {
            panic!("{:?}", world.handed_over);
        };
        assert_eq!(sighting.observation.remote, node.ip());
    }
    let world = unwatched(vec![(2, told)], &|_, _| false);
    assert_eq!((world.counts.alone, world.counts.passed_on), (0, 1));
}
