//! A cluster in which everybody knows who has which address: the index, which hears of it late, must know it, too.

use std::{sync::Arc, time::Duration};

use flow::{
    endpoint,
    time::Timestamp,
    topology::{Change, Index, Object, ObjectKey, Phase, Pod, RETENTION},
};
use proptest::prelude::*;

/// One pod's life; all times in milliseconds.
#[derive(Clone, Debug)]
struct Life {
    /// After the address is free.
    started_after: u64,
    /// From the start until kubelet has given it the address, and its processes run.
    setting_up: u64,
    /// From then until the API tells of the address.
    told_after: u64,
    /// From then until its last process ends.
    living: u64,
    /// From then until the API tells of its end.
    ended_after: u64,
    end: End,
    /// Whether the watch is away from its end to the start of the next one, and then hears of both at once.
    away: bool,
}

#[derive(Clone, Copy, Debug)]
enum End {
    Deleted,
    /// Deleted, and its containers' last status tells when it ended.
    DeletedAndTold,
    /// Its containers' status tells when it ended.
    Finished,
    /// The watch was away; a list does not name it any more.
    GoneFromList,
}

fn life() -> impl Strategy<Value = Life> {
    let end = prop_oneof![
        Just(End::Deleted),
        Just(End::DeletedAndTold),
        Just(End::Finished),
        Just(End::GoneFromList)
    ];
    // Often the next pod has the address at once, within the second in which the last one ended.
    let soon = prop_oneof![Just(0_u64), 0..100_u64, 0..5_000_u64];
    (
        soon.clone(),
        soon,
        0..5_000_u64,
        1..20_000_u64,
        0..3_000_u64,
        end,
        any::<bool>(),
    )
        .prop_map(
            |(started_after, setting_up, told_after, living, ended_after, end, away)| Life {
                started_after,
                setting_up,
                told_after,
                living,
                ended_after,
                end,
                away,
            },
        )
}

fn at(millis: u64) -> Timestamp {
    Timestamp::from_nanos((1_700_000_000_000 + millis) * 1_000_000)
}

fn whole_seconds(millis: u64) -> Timestamp {
    at(millis / 1_000 * 1_000)
}

fn pod(i: usize, started: u64, phase: Phase) -> Pod {
    let name = format!("pod-{i}");
    Pod {
        identity: endpoint::Pod {
            uid: name.clone(),
            namespace: "shop".to_owned(),
            name,
            labels: Arc::default(),
            workload: None,
            node: None,
            host_network: false,
            addresses: vec!["10.0.0.1".parse().unwrap()],
            services: Arc::default(),
        },
        static_uid: None,
        ports: Arc::default(),
        phase,
        started: Some(whole_seconds(started)),
    }
}

proptest! {
    /// One address goes from pod to pod; the next one gets it once the API has told of the last one's end.
    #[test]
    fn at_any_time_of_its_life_the_address_is_the_pods(
        lives in prop::collection::vec(life(), 1..12),
        moments in prop::collection::vec(0.0..1.0_f64, 8),
    ) {
        let mut index = Index::default();
        let mut now = 0;
        let mut heard = 0;
        let mut missed: Option<Change> = None;
        let mut spans = Vec::new();
        let mut finished = Vec::new();
        for (i, life) in lives.iter().enumerate() {
            // Of what is learnt late only whole seconds are known.
            let apart = if missed.is_some() { 1_000 } else { 0 };
            let started = now + apart + life.started_after;
            let running = started + life.setting_up;
            let told = running + life.told_after;
            let ended = told + life.living;
            let born = Change::Upsert(Object::Pod(pod(i, started, Phase::Running)));
            match missed.take() {
                Some(end) => {
                    index.apply_late(end, at(heard), at(told));
                    index.apply_late(born, at(heard), at(told));
                }
                None => index.apply(born, at(told)),
            }
            now = ended + life.ended_after;
            let key = ObjectKey::Pod { uid: format!("pod-{i}") };
            let last = match life.end {
                End::Deleted => Change::Delete { key, ended: None },
                End::DeletedAndTold => Change::Delete { key, ended: Some(whole_seconds(ended)) },
                End::Finished => {
                    let phase = Phase::Finished { at: Some(whole_seconds(ended)) };
                    let last = pod(i, started, phase);
                    finished.push(last.clone());
                    Change::Upsert(Object::Pod(last))
                }
                End::GoneFromList => {
                    index.replace_pods(finished.clone(), at(now));
                    spans.push((running, ended));
                    continue;
                }
            };
            if life.away {
                heard = told;
                missed = Some(last);
            } else {
                index.apply(last, at(now));
            }
            spans.push((running, ended));
            index.expire(at(now));
        }

        if let Some(end) = missed {
            index.apply_late(end, at(heard), at(now));
        }
        let address = "10.0.0.1".parse().unwrap();
        let known_since = (now + 1).saturating_sub(RETENTION.as_millis() as u64);
        for (i, (running, ended)) in spans.into_iter().enumerate() {
            if ended <= known_since {
                continue;
            }
            for moment in &moments {
                let time = running + ((ended - running) as f64 * moment) as u64;
                let found = index.resolve_client(address, at(time));
                prop_assert_eq!(found.to_string(), format!("shop/pod-{}", i), "at {}", time);
            }
        }

        index.expire(at(now).saturating_add(RETENTION).saturating_add(Duration::from_millis(1)));
        for i in 0..lives.len() {
            let stays = finished.iter().any(|pod| pod.identity.name == format!("pod-{i}"));
            prop_assert_eq!(index.pod_by_uid(&format!("pod-{i}")).is_some(), stays);
        }
        prop_assert!(matches!(
            index.resolve_client(address, at(now)),
            endpoint::Endpoint::External(_)
        ));
    }
}
