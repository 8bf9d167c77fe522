//! Who called, of connects that were under way when the map of flows was drained.

use std::collections::HashMap;

use agent_common::types::{Comm, FlowKey, FlowValue, IPPROTO_TCP, kind};

/// How many drains an owner is remembered: the kernel tries a handshake for two minutes by default
/// (`net.ipv4.tcp_syn_retries`).
const ROUNDS_KEPT: u32 = 180;

/// Flows whose owner is remembered at once. What exceeds it is counted, and lacks pid and name.
const MOST: usize = 65_536;

/// So many at most make room for those of flows that were counted already. Another of their calls may be under way, which its
/// entry does not tell; one that finds no owner is counted when it ends.
const MOST_COUNTED: usize = 16_384;

/// The owners of flows that may have a call under way: one that had not ended when the map was drained, or that failed.
#[derive(Debug, Default)]
pub(super) struct Callers {
    by_flow: HashMap<FlowKey, Caller>,
    round: u32,
    /// The round in which the latest owner of a counted flow found no room.
    left_out: Option<u32>,
}

#[derive(Debug)]
struct Caller {
    pid: u32,
    comm: Comm,
    seen: u32,
}

impl Callers {
    /// Takes the entries without a count out of `flows`, and names the owners of the others where they lack one. Returns how
    /// many owners there was no room for, and are or may be missed.
    pub(super) fn settle(&mut self, flows: &mut Vec<(FlowKey, FlowValue)>) -> u64 {
        self.round = self.round.saturating_add(1);
        let oldest = self.round.saturating_sub(ROUNDS_KEPT);
        self.by_flow.retain(|_, caller| caller.seen >= oldest);
        let mut forgotten = 0;
        flows.retain(|(key, value)| {
            let is_counted = value.count > 0;
            if !is_counted {
                forgotten += u64::from(!self.remember(key, value, MOST));
            } else if is_call(key) && value.pid != 0 && !self.remember(key, value, MOST_COUNTED) {
                self.left_out = Some(self.round);
            }
            is_counted
        });
        let lacks = self.left_out.is_some_and(|round| round >= oldest);
        for (key, value) in flows.iter_mut().filter(|(_, value)| value.pid == 0) {
            let key = as_announced(key);
            if let Some(caller) = self.by_flow.get(&key) {
                value.pid = caller.pid;
                value.comm = caller.comm;
            } else {
                forgotten += u64::from(lacks && is_call(&key));
            }
        }
        forgotten
    }

    /// Remembers whose flow this is, unless there are so many already.
    fn remember(&mut self, key: &FlowKey, value: &FlowValue, most: usize) -> bool {
        let has_room = self.by_flow.len() < most || self.by_flow.contains_key(key);
        if has_room {
            let caller = Caller {
                pid: value.pid,
                comm: value.comm,
                seen: self.round,
            };
            self.by_flow.insert(*key, caller);
        }
        has_room
    }
}

/// Whether this is of calls that have a beginning and an end.
fn is_call(key: &FlowKey) -> bool {
    key.kind == kind::CONNECTED && key.protocol == IPPROTO_TCP
}

/// The key under which the call was announced, before it was known whether it would fail.
fn as_announced(key: &FlowKey) -> FlowKey {
    FlowKey {
        kind: if key.kind == kind::CONNECT_FAILED {
            kind::CONNECTED
        } else {
            key.kind
        },
        ..*key
    }
}

#[cfg(test)]
mod tests {
    use agent_common::address::Address;

    use super::*;

    fn flow(kind: u8, port: u16, count: u64, pid: u32) -> (FlowKey, FlowValue) {
        let key = FlowKey {
            local: Address::from_bytes([1; 16]),
            remote: Address::from_bytes([2; 16]),
            cgroup: 3,
            netns: 4,
            port,
            protocol: 6,
            kind,
        };
        let value = FlowValue {
            count,
            first_ns: 5,
            last_ns: 6,
            pid,
            padding: 0,
            comm: Comm::new(pid.to_string().as_bytes()),
        };
        (key, value)
    }

    fn pids(flows: &[(FlowKey, FlowValue)]) -> Vec<(u16, u32)> {
        flows
            .iter()
            .map(|(key, value)| (key.port, value.pid))
            .collect()
    }

    #[test]
    fn a_call_keeps_its_caller_over_drains_and_failures() {
        let mut callers = Callers::default();
        let mut first = vec![
            flow(kind::CONNECT_FAILED, 80, 1, 0),
            flow(kind::CONNECTED, 80, 0, 7),
            flow(kind::CONNECTED, 81, 0, 8),
            flow(kind::CONNECTED, 82, 2, 9),
        ];
        assert_eq!(callers.settle(&mut first), 0);
        assert_eq!(pids(&first), [(80, 7), (82, 9)]);
        let mut second = vec![
            flow(kind::CONNECTED, 81, 1, 0),
            flow(kind::ACCEPTED, 81, 1, 0),
        ];
        assert_eq!(callers.settle(&mut second), 0);
        assert_eq!(pids(&second), [(81, 8), (81, 0)]);
        for _ in 0..=ROUNDS_KEPT {
            callers.settle(&mut Vec::new());
        }
        let mut late = vec![flow(kind::CONNECTED, 81, 1, 0)];
        callers.settle(&mut late);
        assert_eq!(pids(&late), [(81, 0)]);
    }

    #[test]
    fn a_call_that_begins_beside_another_keeps_its_caller() {
        let mut callers = Callers::default();
        // One of the two calls has ended.
        assert_eq!(
            callers.settle(&mut vec![flow(kind::CONNECTED, 80, 1, 7)]),
            0
        );
        let mut second = vec![
            flow(kind::CONNECTED, 80, 1, 0),
            flow(kind::CONNECT_FAILED, 80, 1, 0),
        ];
        assert_eq!(callers.settle(&mut second), 0);
        assert_eq!(pids(&second), [(80, 7), (80, 7)]);
    }

    #[test]
    fn counted_flows_leave_room_for_calls_under_way() {
        let mut callers = Callers::default();
        let ports = 0..=u16::MAX;
        let mut counted: Vec<_> = (ports.clone())
            .map(|port| flow(kind::CONNECTED, port, 1, 1))
            .collect();
        assert_eq!(callers.settle(&mut counted), 0);
        let mut late: Vec<_> = (ports)
            .map(|port| flow(kind::CONNECTED, port, 1, 0))
            .collect();
        let known = MOST_COUNTED as u64;
        assert_eq!(callers.settle(&mut late), MOST as u64 - known);
        let mut announced: Vec<_> = (0..1_000)
            .map(|port| {
                let (mut key, value) = flow(kind::CONNECTED, port, 0, 1);
                key.netns += 1;
                (key, value)
            })
            .collect();
        assert_eq!(callers.settle(&mut announced), 0);
    }

    #[test]
    fn what_finds_no_room_is_counted() {
        let mut callers = Callers::default();
        let mut many: Vec<_> = (0..=u16::MAX)
            .map(|port| flow(kind::CONNECTED, port, 0, 1))
            .collect();
        assert_eq!(callers.settle(&mut many), 0);
        let (mut key, value) = flow(kind::CONNECTED, 1, 0, 1);
        key.netns += 1;
        assert_eq!(callers.settle(&mut vec![(key, value)]), 1);
    }
}
