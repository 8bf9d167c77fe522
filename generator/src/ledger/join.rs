//! Joins the observations of clients and servers into edges.
//!
//! Observations of the same two ends and port are one edge with two counts. What remains are connections that one side
//! cannot name exactly, because an address was translated between the two:
//!
//! * a client that called a *service* does not know which pod answered, the server does;
//! * a client that called a *node* does not know which pod in the node's network answered, the server does;
//! * a server that was called from a pod in a node's network sees the *node*, the client knows the pod;
//! * a pod that called itself through its own service comes to itself masked as its *node*.
//!
//! Such an observation is matched with one of the other side that can be of the same connections: as many as both sides
//! counted go to the edge between the ends as each named itself. The sums of the counts of either side never change.
//!
//! An edge's addresses are those that policies are judged on: ingress on the address from which the server was called,
//! which may be masked (kube-proxy gives what a node's process sends to a service another of the node's addresses), egress
//! on the address that the client called.

use std::collections::{BTreeMap, HashMap};

use flow::{
    endpoint::Endpoint,
    observations::translated,
    record::{Direction, Outcome, Protocol},
};

use self::{end::End, names::Names};
use super::{
    edge::Edge,
    observation::{Key, Sighting},
};

mod end;
mod names;

/// The sightings must come in the order of their keys.
pub(super) fn edges(sightings: &[Sighting<'_>]) -> Vec<Edge> {
    let mut join = Join::new(sightings);
    let claims = join.unknown_backends();
    join.settle(claims);
    let claims = join.masked_clients();
    join.settle(claims);
    join.finish()
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Pair<'a> {
    client: End<'a>,
    protocol: Protocol,
    port: u16,
    server: End<'a>,
}

struct Tally<'a> {
    edge: Edge,
    /// The node whose agent saw the client's side.
    client_node: Option<&'a str>,
}

/// A client's observation, and the servers' observations that can be of the same connections.
struct Claim<'a> {
    /// Claims of a lower rank are settled first.
    rank: usize,
    claimant: Pair<'a>,
    witnesses: Vec<Pair<'a>>,
}

struct Join<'a> {
    tallies: BTreeMap<Pair<'a>, Tally<'a>>,
}

impl<'a> Join<'a> {
    fn new(sightings: &[Sighting<'a>]) -> Self {
        let names = Names::new(sightings);
        let mut tallies = BTreeMap::<Pair<'a>, Tally<'a>>::new();
        for sighting in sightings {
            let key = sighting.observation.key;
            if key.outcome == Outcome::Failed {
                continue;
            }
            let pair = Pair {
                client: End::from(sighting.client),
                protocol: key.protocol,
                port: key.port,
                server: End::from(sighting.server),
            };
            let tally = Tally::new(sighting, &names);
            match tallies.get_mut(&pair) {
                Some(known) => known.join(tally),
                None => {
                    tallies.insert(pair, tally);
                }
            }
        }
        Self { tallies }
    }

    /// Clients that called a service or a node, and the pods that say that this client called them.
    fn unknown_backends(&self) -> Vec<Claim<'a>> {
        let mut groups = BTreeMap::<_, (Vec<Pair<'a>>, Vec<Pair<'a>>)>::new();
        for (pair, tally) in &self.tallies {
            let (claimants, witnesses) = groups
                .entry((pair.client, pair.protocol, pair.port))
                .or_default();
            if tally.unmatched_by_server() > 0 && !matches!(pair.server, End::Pod(_)) {
                claimants.push(*pair);
            }
            if tally.unmatched_by_client() > 0 {
                witnesses.push(*pair);
            }
        }
        let mut claims = Vec::new();
        for (claimants, witnesses) in groups.into_values() {
            if claimants.is_empty() {
                continue;
            }
            let answers = self.answers(&witnesses);
            for claimant in claimants {
                let called = &self.tallies[&claimant].edge.server;
                claims.push(Claim {
                    rank: 0,
                    claimant,
                    witnesses: answers.to(called).to_vec(),
                });
            }
        }
        claims
    }

    /// Pods whose connections the server can have seen coming from their node, and the servers that saw that.
    fn masked_clients(&self) -> Vec<Claim<'a>> {
        let mut from_node = BTreeMap::<_, Vec<Pair<'a>>>::new();
        for (pair, tally) in &self.tallies {
            if let End::Node { name, .. } = pair.client
                && tally.unmatched_by_client() > 0
            {
                from_node
                    .entry((name, pair.protocol, pair.port))
                    .or_default()
                    .push(*pair);
            }
        }
        let from_node: BTreeMap<_, Answers<'_, 'a>> = from_node
            .iter()
            .map(|(from, witnesses)| (*from, self.answers(witnesses)))
            .collect();
        let mut claims = Vec::new();
        for (claimant, tally) in &self.tallies {
            let Endpoint::Pod { pod, .. } = &tally.edge.client else {
                continue;
            };
            let Some(node) = pod.node.as_deref().or(tally.client_node) else {
                continue;
            };
            let Some(answers) = from_node.get(&(node, claimant.protocol, claimant.port)) else {
                continue;
            };
            if tally.unmatched_by_server() == 0 {
                continue;
            }
            let called = &tally.edge.server;
            let mut witnesses: Vec<Pair<'a>> = if pod.host_network {
                let exact = answers.at(claimant.server).iter();
                exact.chain(answers.to(called)).copied().collect()
            } else {
                let itself = answers.at(claimant.client).iter().copied();
                itself
                    .filter(|witness| {
                        witness.server == claimant.server
                            || answers.to(called).binary_search(witness).is_ok()
                    })
                    .collect()
            };
            witnesses.sort_unstable();
            witnesses.dedup();
            claims.push(Claim {
                // A pod in the node's network has no other address; a pod of its own is only masked when it calls itself.
                rank: usize::from(!pod.host_network),
                claimant: *claimant,
                witnesses,
            });
        }
        claims
    }

    /// The witnesses, which are sorted, by what a client can have called that they answered.
    fn answers(&self, witnesses: &[Pair<'a>]) -> Answers<'_, 'a> {
        let mut answers = Answers::default();
        for witness in witnesses {
            let server = &self.tallies[witness].edge.server;
            answers
                .by_server
                .entry(witness.server)
                .or_default()
                .push(*witness);
            for called in Called::answered_by(server) {
                answers.by_called.entry(called).or_default().push(*witness);
            }
        }
        answers
    }

    /// Moves to the exact edge as many connections as the claimant and its witnesses counted.
    fn settle(&mut self, mut claims: Vec<Claim<'a>>) {
        // Who has the fewest witnesses chooses first, so that others do not take them away.
        claims.sort_by_key(|claim| (claim.rank, claim.witnesses.len(), claim.claimant));
        for Claim {
            claimant,
            witnesses,
            ..
        } in claims
        {
            for witness in witnesses {
                self.move_matched(claimant, witness);
            }
        }
    }

    fn move_matched(&mut self, claimant: Pair<'a>, witness: Pair<'a>) {
        let (Some(client_side), Some(server_side)) =
            (self.tallies.get(&claimant), self.tallies.get(&witness))
        else {
            return;
        };
        let count = client_side
            .unmatched_by_server()
            .min(server_side.unmatched_by_client());
        if count == 0 {
            return;
        }
        let client_address = server_side.edge.client_address;
        // A service's address is translated before the client's policy is judged, a node's own is not.
        let server_address = match claimant.server {
            End::Node { .. } => client_side.edge.server_address,
            _ => server_side.edge.server_address,
        };
        let exact = Pair {
            client: claimant.client.at(client_address),
            server: witness.server.at(server_address),
            ..claimant
        };
        let moved = Tally {
            edge: Edge {
                client: client_side.edge.client.clone(),
                client_address,
                server: server_side.edge.server.clone(),
                server_address,
                protocol: exact.protocol,
                port: exact.port,
                seen_by_client: count,
                seen_by_server: count,
                first_seen: client_side.edge.first_seen.min(server_side.edge.first_seen),
                last_seen: client_side.edge.last_seen.max(server_side.edge.last_seen),
                sources: &client_side.edge.sources | &server_side.edge.sources,
                is_disputed: client_side.edge.is_disputed || server_side.edge.is_disputed,
            },
            client_node: client_side.client_node,
        };
        if let Some(tally) = self.tallies.get_mut(&claimant) {
            tally.edge.seen_by_client -= count;
        }
        if let Some(tally) = self.tallies.get_mut(&witness) {
            tally.edge.seen_by_server -= count;
        }
        match self.tallies.get_mut(&exact) {
            Some(tally) => tally.join(moved),
            None => {
                self.tallies.insert(exact, moved);
            }
        }
    }

    fn finish(self) -> Vec<Edge> {
        let mut edges: Vec<Edge> = self
            .tallies
            .into_values()
            .map(|tally| tally.edge)
            .filter(|edge| edge.count() > 0)
            .collect();
        // The sort is stable: pods of one name, which lived one after the other, stay in the order of their identities.
        edges.sort_by_cached_key(|edge| {
            (
                (edge.client.to_string(), edge.client_address),
                (edge.server.to_string(), edge.server_address),
                (edge.protocol, edge.port),
            )
        });
        edges
    }
}

impl<'a> Tally<'a> {
    fn new(sighting: &Sighting<'a>, names: &Names<'a>) -> Self {
        let observation = sighting.observation;
        let Key {
            protocol,
            port,
            direction,
            ..
        } = observation.key;
        let by_client = direction == Direction::Egress;
        let (src, dst) = (sighting.src, sighting.dst);
        let via = observation.names.via.map(|called| called.ip());
        Self {
            edge: Edge {
                client: names.agreed(&src.endpoint),
                client_address: src.address,
                server: names.agreed(&dst.endpoint),
                server_address: if via == Some(dst.address) {
                    translated(&dst.endpoint, dst.address)
                } else {
                    dst.address
                },
                protocol,
                port,
                seen_by_client: if by_client { observation.count } else { 0 },
                seen_by_server: if by_client { 0 } else { observation.count },
                first_seen: observation.first_seen,
                last_seen: observation.last_seen,
                sources: observation.sources.into(),
                is_disputed: [src, dst]
                    .iter()
                    .any(|end| names.is_disputed(&end.endpoint, observation.last_seen)),
            },
            client_node: by_client.then_some(&*observation.names.hostname),
        }
    }

    fn unmatched_by_server(&self) -> u64 {
        self.edge
            .seen_by_client
            .saturating_sub(self.edge.seen_by_server)
    }

    fn unmatched_by_client(&self) -> u64 {
        self.edge
            .seen_by_server
            .saturating_sub(self.edge.seen_by_client)
    }

    /// Adds another tally of the same ends and port.
    fn join(&mut self, other: Self) {
        let known = &mut self.edge;
        let new = other.edge;
        let newer = new.last_seen > known.last_seen;
        known.seen_by_client = known.seen_by_client.saturating_add(new.seen_by_client);
        known.seen_by_server = known.seen_by_server.saturating_add(new.seen_by_server);
        known.first_seen = known.first_seen.min(new.first_seen);
        known.last_seen = known.last_seen.max(new.last_seen);
        known.sources.extend(new.sources);
        known.is_disputed |= new.is_disputed;
        prefer(&mut known.client, new.client, newer);
        prefer(&mut known.server, new.server, newer);
        if newer {
            known.client_address = new.client_address;
            known.server_address = new.server_address;
        }
        self.client_node = self.client_node.or(other.client_node);
    }
}

/// Both name the same pod; the one that names a service too is the better name, else the newer one.
fn prefer(known: &mut Endpoint, new: Endpoint, newer: bool) {
    let has_service = |endpoint: &Endpoint| {
        matches!(
            endpoint,
            Endpoint::Pod {
                service: Some(_),
                ..
            }
        )
    };
    if match (has_service(known), has_service(&new)) {
        (true, false) => false,
        (false, true) => true,
        _ => newer,
    } {
        *known = new;
    }
}

/// What a client can have called that does not say which pod answered.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Called<'t> {
    Service { namespace: &'t str, name: &'t str },
    Node(&'t str),
}

impl<'t> Called<'t> {
    fn of(endpoint: &'t Endpoint) -> Option<Self> {
        match endpoint {
            Endpoint::Service(service) => Some(Self::Service {
                namespace: &service.namespace,
                name: &service.name,
            }),
            Endpoint::Node(node) => Some(Self::Node(&node.name)),
            Endpoint::Pod { .. } | Endpoint::External(_) => None,
        }
    }

    /// All calls that `server` can have answered, each once: to the services that select it, and to its node if it is in
    /// that one's network.
    fn answered_by(server: &'t Endpoint) -> Vec<Self> {
        let Endpoint::Pod { pod, service } = server else {
            return Vec::new();
        };
        let named = service.iter().map(|service| &service.name);
        let others = pod.services.iter();
        let mut names: Vec<&String> = named.chain(others).collect();
        names.sort_unstable();
        names.dedup();
        let services = names.into_iter().map(|name| Self::Service {
            namespace: &pod.namespace,
            name,
        });
        let node = pod.node.as_deref().filter(|_| pod.host_network);
        services.chain(node.map(Self::Node)).collect()
    }
}

/// Servers' observations, found by what the client can have called. A client may call very many.
#[derive(Default)]
struct Answers<'t, 'a> {
    by_server: HashMap<End<'a>, Vec<Pair<'a>>>,
    by_called: HashMap<Called<'t>, Vec<Pair<'a>>>,
}

impl<'a> Answers<'_, 'a> {
    /// Those of this server; sorted.
    fn at(&self, server: End<'a>) -> &[Pair<'a>] {
        self.by_server.get(&server).map_or(&[], Vec::as_slice)
    }

    /// Those that can have answered a call to this service or node; sorted.
    fn to<'s>(&'s self, called: &'s Endpoint) -> &'s [Pair<'a>] {
        Called::of(called)
            .and_then(|called| self.by_called.get(&called))
            .map_or(&[], Vec::as_slice)
    }
}
