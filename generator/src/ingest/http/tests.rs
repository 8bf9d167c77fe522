use super::*;
use crate::{auth::Rules, ingest};

/// Kubelet asks often, and waits a second.
#[tokio::test]
async fn readiness_is_known_without_the_keeper() {
    let (status, statuses) = mpsc::channel(1);
    let (page, _pages) = mpsc::channel(1);
    let (queue, _requests) = ingest::queue();
    let loopback = "127.0.0.1:0".parse().unwrap();
    let desk = Desk {
        gate: Rules::default().gate(loopback).await.unwrap(),
        meter: Meter::default(),
        status,
        topology: None,
        exports: Exports::of(page),
        queue,
    };
    // The keeper answers nobody at the moment, and others wait for it already.
    let (wanted, _answer) = oneshot::channel();
    desk.status.try_send(wanted).unwrap();
    assert_eq!(ready(&desk).status(), StatusCode::OK);
    drop(statuses);
    assert_eq!(ready(&desk).status(), StatusCode::SERVICE_UNAVAILABLE);
}
