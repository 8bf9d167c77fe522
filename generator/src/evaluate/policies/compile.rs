//! From the API's types to prepared policies.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
};

use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};

use super::{NamespacePeer, PeerId, PodPeer, Policies, Policy, Rules};
use crate::{
    evaluate::{
        block::Block,
        error::{Flaw, InvalidPolicy, Problem},
        field::At,
        ports::Ports,
        selector::Selector,
    },
    syntax,
};

/// Collects policies one by one, so that a bad one can be left out.
#[derive(Debug, Default)]
pub struct Compiler {
    policies: Vec<Policy>,
    names: BTreeSet<(String, String)>,
    pod_peers: Interned<PodPeer>,
    blocks: Interned<Block>,
}

impl Compiler {
    /// Adds a policy.
    ///
    /// # Errors
    /// If the API server would refuse it, or there was one of the same name. It is left out then.
    pub fn add(&mut self, policy: &NetworkPolicy) -> Result<(), InvalidPolicy> {
        self.compile(policy)
            .map(|policy| self.policies.push(policy))
            .map_err(|(field, problem)| {
                let name = |name: &Option<String>| name.clone().unwrap_or_else(|| "?".to_owned());
                let metadata = &policy.metadata;
                InvalidPolicy {
                    policy: format!("{}/{}", name(&metadata.namespace), name(&metadata.name)),
                    field,
                    problem,
                }
            })
    }

    /// The policies that were added.
    #[must_use]
    pub fn finish(self) -> Policies {
        let mut policies = Policies {
            policies: self.policies,
            pod_peers: self.pod_peers.items,
            blocks: self.blocks.items,
            ..Policies::default()
        };
        policies.policies.sort_by(|one, other| {
            (&one.namespace, &one.name).cmp(&(&other.namespace, &other.name))
        });
        for (i, block) in policies.blocks.iter().enumerate() {
            match block.single() {
                Some(address) => {
                    policies.single_blocks.insert(address, i);
                }
                None => policies.wide_blocks.push(i),
            }
        }
        policies
    }

    fn compile(&mut self, policy: &NetworkPolicy) -> Result<Policy, Flaw> {
        let metadata = At::root("metadata");
        let name = checked(
            policy.metadata.name.as_deref(),
            syntax::is_subdomain,
            &metadata.field("name"),
        )?;
        let namespace = checked(
            policy.metadata.namespace.as_deref(),
            syntax::is_dns_label,
            &metadata.field("namespace"),
        )?;

        let default = NetworkPolicySpec::default();
        let spec = policy.spec.as_ref().unwrap_or(&default);
        let at = At::root("spec");
        let pods = match &spec.pod_selector {
            Some(selector) => Selector::compile(selector, &at.field("podSelector"))?,
            None => Selector::default(),
        };
        let ingress_rules = spec.ingress.as_deref().unwrap_or_default();
        let egress_rules = spec.egress.as_deref().unwrap_or_default();
        let (for_ingress, for_egress) = concerned(
            spec.policy_types.as_deref().unwrap_or_default(),
            !egress_rules.is_empty(),
            &at.field("policyTypes"),
        )?;

        // Rules for a direction that is not concerned have no effect, but the API server checks them all the same.
        let ingress_at = at.field("ingress");
        let mut ingress = Rules::default();
        for (i, rule) in ingress_rules.iter().enumerate() {
            let at = ingress_at.index(i);
            self.add_rule(
                &mut ingress,
                &namespace,
                (rule.from.as_deref(), &at.field("from")),
                (rule.ports.as_deref(), &at.field("ports")),
            )?;
        }
        let egress_at = at.field("egress");
        let mut egress = Rules::default();
        for (i, rule) in egress_rules.iter().enumerate() {
            let at = egress_at.index(i);
            self.add_rule(
                &mut egress,
                &namespace,
                (rule.to.as_deref(), &at.field("to")),
                (rule.ports.as_deref(), &at.field("ports")),
            )?;
        }
        for rules in [&mut ingress, &mut egress] {
            rules.by_peer.sort_unstable();
            rules.by_peer.dedup();
        }

        if !self.names.insert((namespace.clone(), name.clone())) {
            return Err(Problem::Duplicate.at(&metadata.field("name")));
        }
        Ok(Policy {
            namespace,
            name,
            pods,
            ingress: for_ingress.then_some(ingress),
            egress: for_egress.then_some(egress),
        })
    }

    fn add_rule(
        &mut self,
        rules: &mut Rules,
        namespace: &str,
        (peers, peers_at): (Option<&[NetworkPolicyPeer]>, &At<'_>),
        (ports, ports_at): (Option<&[NetworkPolicyPort]>, &At<'_>),
    ) -> Result<(), Flaw> {
        let rule = rules.ports.len();
        // An empty list means the same as none: everything.
        match peers.unwrap_or_default() {
            [] => rules.for_all.push(rule),
            peers => {
                for (i, peer) in peers.iter().enumerate() {
                    let peer = self.peer(peer, namespace, &peers_at.index(i))?;
                    rules.by_peer.push((peer, rule));
                }
            }
        }
        let ports = ports.unwrap_or_default();
        let ports = ports
            .iter()
            .enumerate()
            .map(|(i, port)| Ports::compile(port, &ports_at.index(i)))
            .collect::<Result<Vec<_>, _>>()?;
        rules.ports.push((!ports.is_empty()).then_some(ports));
        Ok(())
    }

    fn peer(
        &mut self,
        peer: &NetworkPolicyPeer,
        namespace: &str,
        at: &At<'_>,
    ) -> Result<PeerId, Flaw> {
        let pods = |selector| Selector::compile(selector, &at.field("podSelector"));
        let namespaces = |selector| {
            Selector::compile(selector, &at.field("namespaceSelector")).map(NamespacePeer::Selected)
        };
        let peer = match (&peer.ip_block, &peer.namespace_selector, &peer.pod_selector) {
            (None, None, None) => return Err(Problem::EmptyPeer.at(at)),
            (Some(block), None, None) => {
                let block = Block::compile(block, &at.field("ipBlock"))?;
                return Ok(PeerId::Block(self.blocks.intern(block)));
            }
            (Some(_), _, _) => return Err(Problem::MixedPeer.at(&at.field("ipBlock"))),
            (None, Some(of), None) => PodPeer {
                namespaces: namespaces(of)?,
                pods: Selector::default(),
            },
            (None, None, Some(selector)) => PodPeer {
                namespaces: NamespacePeer::Own(namespace.to_owned()),
                pods: pods(selector)?,
            },
            (None, Some(of), Some(selector)) => PodPeer {
                namespaces: namespaces(of)?,
                pods: pods(selector)?,
            },
        };
        Ok(PeerId::Pods(self.pod_peers.intern(peer)))
    }
}

fn checked(name: Option<&str>, is_valid: fn(&str) -> bool, at: &At<'_>) -> Result<String, Flaw> {
    match name {
        None | Some("") => Err(Problem::Missing.at(at)),
        Some(name) if is_valid(name) => Ok(name.to_owned()),
        Some(name) => Err(Problem::Name(name.to_owned()).at(at)),
    }
}

/// Whether the policy concerns ingress, and whether egress. Where it does not say it concerns ingress, and egress only if
/// it has rules for it.
fn concerned(types: &[String], has_egress: bool, at: &At<'_>) -> Result<(bool, bool), Flaw> {
    if types.is_empty() {
        return Ok((true, has_egress));
    }
    // More are refused even where they say the same twice.
    if types.len() > 2 {
        return Err(Problem::PolicyTypes.at(at));
    }
    let mut concerned = (false, false);
    for (i, name) in types.iter().enumerate() {
        match name.as_str() {
            "Ingress" => concerned.0 = true,
            "Egress" => concerned.1 = true,
            _ => return Err(Problem::PolicyType(name.clone()).at(&at.index(i))),
        }
    }
    Ok(concerned)
}

/// Gives equal items one number.
#[derive(Debug)]
struct Interned<T> {
    items: Vec<T>,
    numbers: HashMap<T, usize>,
}

impl<T> Default for Interned<T> {
    fn default() -> Self {
        Self {
            items: Vec::new(),
            numbers: HashMap::new(),
        }
    }
}

impl<T: Clone + Eq + Hash> Interned<T> {
    fn intern(&mut self, item: T) -> usize {
        if let Some(number) = self.numbers.get(&item) {
            return *number;
        }
        let number = self.items.len();
        self.items.push(item.clone());
        self.numbers.insert(item, number);
        number
    }
}
