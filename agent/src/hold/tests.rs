use std::{net::IpAddr, sync::Arc};

use flow::{
    endpoint::{self, Endpoint},
    record::{Connection, Outcome, Protocol},
    time::Timestamp,
    topology::{Change, Node, Object, ObjectKey, Phase, Pod},
    wire::Resolve,
};

use super::*;
use crate::{
    capture::{Event, Observation},
    identity::{ContainerRef, Owner},
};

const HERE: &str = "node-1";

fn pod(uid: &str, address: Option<[u8; 4]>, node: &str, started: u64) -> Change {
    Change::Upsert(Object::Pod(Pod {
        identity: endpoint::Pod {
            uid: uid.to_owned(),
            namespace: "shop".to_owned(),
            name: uid.to_owned(),
            labels: Arc::default(),
            workload: None,
            node: Some(node.into()),
            host_network: false,
            addresses: address.map(IpAddr::from).into_iter().collect(),
            services: Arc::default(),
        },
        static_uid: None,
        ports: Arc::default(),
        phase: Phase::Running,
        started: Some(seconds(started)),
    }))
}

fn node(name: &str, address: [u8; 4], range: &str) -> Change {
    Change::Upsert(Object::Node(Node {
        identity: Arc::new(endpoint::Node {
            name: name.to_owned(),
            addresses: vec![address.into()],
        }),
        interfaces: Vec::new(),
        pod_cidrs: vec![range.parse().unwrap()],
        created: None,
    }))
}

fn index(changes: Vec<Change>) -> Index {
    let mut index = Index::default();
    for change in changes {
        index.apply(change, seconds(100));
    }
    index
}

/// A connection that the pod `uid` of this node made at second 105.
fn sighting(uid: &str, remote: [u8; 4], count: u64) -> Sighting {
    Sighting {
        observation: Observation {
            event: Event::Connect(Outcome::Established),
            protocol: Protocol::Tcp,
            local: [10, 0, 1, 9].into(),
            remote: remote.into(),
            port: 80,
            cgroup: 1,
            netns: 0,
            client_port: 0,
            connection: None,
            pid: 0,
            comm: String::new(),
            count,
            first_seen: seconds(105),
            last_seen: seconds(105),
        },
        owner: Some(Owner::Container(ContainerRef {
            pod_uid: uid.to_owned(),
            container: None,
        })),
        log: None,
        round: 0,
    }
}

fn seconds(seconds: u64) -> Timestamp {
    Timestamp::from_nanos(seconds * 1_000_000_000)
}

fn both_ends() -> Resolver {
    Resolver::new(HERE.to_owned(), Resolve::Both, true)
}

fn names(released: &Released) -> Vec<String> {
    let ends = |record: &FlowRecord| format!("{} -> {}", record.src, record.dst);
    released.records.iter().map(ends).collect()
}

#[test]
fn what_is_known_does_not_wait() {
    let index = index(vec![
        pod("here", Some([10, 0, 1, 9]), HERE, 90),
        pod("there", Some([10, 0, 2, 9]), "node-2", 90),
        node(HERE, [192, 168, 0, 1], "10.0.1.0/24"),
    ]);
    let (mut hold, now) = (Hold::new(PATIENCE, Resolve::Both), Instant::now());
    let sightings = vec![
        sighting("here", [10, 0, 2, 9], 1),
        sighting("here", [192, 168, 0, 1], 1),
    ];
    let released = hold.release(sightings, &both_ends(), &index, now, now);
    assert_eq!(
        names(&released),
        ["shop/here -> shop/there", "shop/here -> node node-1"]
    );
}

#[test]
fn in_order_nothing_passes_what_came_with_an_earlier_drain() {
    let index = index(vec![
        pod("here", Some([10, 0, 1, 9]), HERE, 90),
        pod("there", Some([10, 0, 2, 9]), "node-2", 90),
    ]);
    let of = |round: u64, remote: [u8; 4]| Sighting {
        round,
        ..sighting("here", remote, 1)
    };
    let sightings = vec![
        of(1, [10, 0, 2, 9]),
        of(2, [1, 1, 1, 1]),
        of(2, [10, 0, 2, 9]),
        of(3, [10, 0, 2, 9]),
    ];
    for (is_in_order, oldest, first, second) in [(false, Some(2), 3, 1), (true, Some(2), 2, 2)] {
        let mut hold = Hold::new(PATIENCE, Resolve::Both).in_order(is_in_order);
        let now = Instant::now();
        let released = hold.release(sightings.clone(), &both_ends(), &index, now, now);
        assert_eq!((released.records.len(), hold.oldest()), (first, oldest));
        let later = now + PATIENCE;
        let released = hold.release(Vec::new(), &both_ends(), &index, later, later);
        assert_eq!((released.records.len(), hold.oldest()), (second, None));
    }
}

#[test]
fn a_pod_that_speaks_before_the_api_tells_of_it_is_waited_for() {
    let young_here = sighting("young", [10, 0, 2, 9], 1);
    let young_there = sighting("here", [10, 0, 2, 7], 2);
    let known = || {
        vec![
            pod("here", Some([10, 0, 1, 8]), HERE, 90),
            pod("there", Some([10, 0, 2, 9]), "node-2", 90),
            // The address is in its range: for now it looks like the node's own.
            node("node-2", [192, 168, 0, 2], "10.0.2.0/24"),
        ]
    };
    let (mut hold, start) = (Hold::new(PATIENCE, Resolve::Both), Instant::now());
    let resolver = both_ends();
    let before = index(known());
    let released = hold.release(
        vec![young_here.clone(), young_there.clone()],
        &resolver,
        &before,
        start,
        start,
    );
    assert_eq!(released, Released::default());

    let mut after = known();
    after.push(pod("young", None, HERE, 104));
    after.push(pod("late", Some([10, 0, 2, 7]), "node-2", 104));
    let after = index(after);
    let second = start + Duration::from_secs(1);
    let released = hold.release(Vec::new(), &resolver, &after, second, second);
    assert_eq!(
        names(&released),
        ["shop/young -> shop/there", "shop/here -> shop/late"]
    );
    assert_eq!(released.records[1].last_seen, seconds(105));

    // Who had the address until a moment ago is not taken for who has it now.
    let mut reused = known();
    reused.push(pod("gone", Some([10, 0, 2, 7]), "node-2", 90));
    let mut reused = index(reused);
    let key = ObjectKey::Pod {
        uid: "gone".to_owned(),
    };
    reused.apply(Change::Delete { key, ended: None }, seconds(104));
    let mut hold = Hold::new(PATIENCE, Resolve::Both);
    let sightings = vec![young_there.clone()];
    let released = hold.release(sightings, &resolver, &reused, start, start);
    assert_eq!(released, Released::default());
    let late = pod("late", Some([10, 0, 2, 7]), "node-2", 104);
    reused.apply(late, seconds(106));
    let released = hold.release(Vec::new(), &resolver, &reused, second, second);
    assert_eq!(names(&released), ["shop/here -> shop/late"]);

    // Nobody is waited for for ever.
    let mut hold = Hold::new(PATIENCE, Resolve::Both);
    hold.release(
        vec![young_here, young_there],
        &resolver,
        &before,
        start,
        start,
    );
    let early = start + PATIENCE - Duration::from_millis(1);
    let released = hold.release(Vec::new(), &resolver, &before, early, early);
    assert_eq!(released, Released::default());
    let released = hold.release(
        Vec::new(),
        &resolver,
        &before,
        start + PATIENCE,
        start + PATIENCE,
    );
    assert_eq!(
        names(&released),
        ["10.0.1.9 -> shop/there", "shop/here -> node node-2"]
    );
}

#[test]
fn no_more_than_so_many_wait_for_better_names() {
    let index = index(vec![pod("here", Some([10, 0, 1, 9]), HERE, 90)]);
    let external = vec![sighting("here", [8, 8, 8, 8], 1); MAX_DOUBTFUL + 3];
    let (mut hold, now) = (Hold::new(PATIENCE, Resolve::Both), Instant::now());
    let released = hold.release(external, &both_ends(), &index, now, now);
    assert_eq!(names(&released), vec!["shop/here -> 8.8.8.8"; 3]);
    let released = hold.release_all(Vec::new(), &both_ends(), &index);
    assert_eq!(released.records.len(), MAX_DOUBTFUL);
}

#[test]
fn before_the_first_lists_are_in_everything_waits_and_the_excess_is_counted() {
    let (mut hold, now) = (Hold::new(Duration::ZERO, Resolve::Both), Instant::now());
    let early = vec![sighting("here", [10, 0, 2, 9], 2); MAX_EARLY];
    assert_eq!(hold.keep(early, now), Released::default());
    let excess = hold.keep(vec![sighting("here", [10, 0, 2, 9], 7)], now);
    assert_eq!((excess.lost, excess.records.len()), (7, 0));

    let index = index(vec![
        pod("here", Some([10, 0, 1, 9]), HERE, 90),
        pod("there", Some([10, 0, 2, 9]), "node-2", 90),
    ]);
    let released = hold.release(Vec::new(), &both_ends(), &index, now, now);
    assert_eq!(released.records.len(), MAX_EARLY);
    assert!(matches!(released.records[0].dst, Endpoint::Pod { .. }));
    assert_eq!(released.lost, 0);
}

#[test]
fn what_is_never_known_is_lost_and_not_guessed() {
    let (mut hold, now) = (Hold::new(PATIENCE, Resolve::Both), Instant::now());
    hold.keep(vec![sighting("here", [10, 0, 2, 9], 2)], now);
    let mut close = sighting("here", [10, 0, 2, 9], 0);
    close.observation.connection = Some(Connection {
        event: ConnectionEvent::Close,
        duration_ns: 1,
        bytes_sent: 1,
        bytes_received: 1,
    });
    let lost = hold.lose_all([sighting("here", [10, 0, 2, 9], 3), close]);
    assert_eq!((lost.lost, lost.lost_closes, lost.records.len()), (5, 1, 0));
}

#[test]
fn the_other_end_is_left_to_whom_it_is_left() {
    let index = index(vec![
        pod("here", Some([10, 0, 1, 9]), HERE, 90),
        pod("there", Some([10, 0, 1, 8]), HERE, 90),
    ]);
    let resolver = Resolver::new(HERE.to_owned(), Resolve::Local, true);
    let (mut hold, now) = (Hold::new(PATIENCE, Resolve::Local), Instant::now());
    let many = vec![sighting("here", [10, 0, 1, 8], 1); MAX_DOUBTFUL + 1];
    let released = hold.release(many, &resolver, &index, now, now);
    assert_eq!(released, Released::default(), "all of them wait");
    let mut hold = Hold::new(PATIENCE, Resolve::Local);
    let seen = vec![sighting("here", [10, 0, 1, 8], 1)];
    // The generator needs its time to learn of a young pod, too.
    let released = hold.release(seen, &resolver, &index, now, now);
    assert_eq!(released, Released::default());
    let released = hold.release(
        Vec::new(),
        &resolver,
        &index,
        now + PATIENCE,
        now + PATIENCE,
    );
    assert_eq!(names(&released), ["shop/here -> 10.0.1.8"]);
}

#[test]
fn while_the_api_is_away_young_pods_are_waited_for() {
    let before = index(vec![pod("here", Some([10, 0, 1, 9]), HERE, 90)]);
    let resolver = both_ends();
    let (mut hold, heard) = (Hold::new(PATIENCE, Resolve::Both), Instant::now());
    let minute = heard + Duration::from_secs(60);
    let young = vec![sighting("here", [10, 0, 2, 7], 1)];
    assert_eq!(
        hold.release(young, &resolver, &before, heard, heard),
        Released::default()
    );
    let released = hold.release(Vec::new(), &resolver, &before, minute, heard);
    assert_eq!(released, Released::default());
    let after = index(vec![
        pod("here", Some([10, 0, 1, 9]), HERE, 90),
        pod("late", Some([10, 0, 2, 7]), "node-2", 104),
    ]);
    let released = hold.release(Vec::new(), &resolver, &after, minute, minute);
    assert_eq!(names(&released), ["shop/here -> shop/late"]);
}

#[test]
fn an_api_that_stays_away_keeps_nothing_back_for_ever() {
    let index = index(vec![pod("here", Some([10, 0, 1, 9]), HERE, 90)]);
    let resolver = both_ends();
    let heard = Instant::now();
    let mut hold = Hold::new(PATIENCE, Resolve::Both).in_order(true);
    let seen = vec![sighting("here", [10, 0, 2, 7], 1)];
    let released = hold.release(seen, &resolver, &index, heard, heard);
    assert_eq!(released, Released::default());
    let released = hold.release(Vec::new(), &resolver, &index, heard + LONGEST, heard);
    assert_eq!(names(&released), ["shop/here -> 10.0.2.7"]);
    assert_eq!(hold.oldest(), None);
}

#[test]
fn what_waits_is_left_alone_between_two_drains() {
    let before = index(vec![pod("here", Some([10, 0, 1, 9]), HERE, 90)]);
    let after = index(vec![
        pod("here", Some([10, 0, 1, 9]), HERE, 90),
        pod("late", Some([10, 0, 2, 7]), "node-2", 104),
    ]);
    let (mut hold, now) = (Hold::new(PATIENCE, Resolve::Both), Instant::now());
    let young = || vec![sighting("here", [10, 0, 2, 7], 1)];
    let released = hold.release_new(young(), &both_ends(), &before, now, now);
    assert_eq!(released, Released::default());
    let released = hold.release_new(young(), &both_ends(), &after, now, now);
    assert_eq!(names(&released), ["shop/here -> shop/late"]);
    let released = hold.release(Vec::new(), &both_ends(), &after, now, now);
    assert_eq!(names(&released), ["shop/here -> shop/late"]);
}

#[test]
fn attempts_to_port_0_are_left_out() {
    let index = index(vec![pod("here", Some([10, 0, 1, 9]), HERE, 90)]);
    let (mut hold, now) = (Hold::new(PATIENCE, Resolve::Both), Instant::now());
    let mut attempt = sighting("here", [10, 0, 2, 7], 3);
    attempt.observation.port = 0;
    attempt.observation.event = Event::Connect(Outcome::Failed);
    let released = hold.release(vec![attempt], &both_ends(), &index, now, now);
    let left_out = Released {
        no_port: 3,
        ..Released::default()
    };
    assert_eq!(released, left_out);
}
