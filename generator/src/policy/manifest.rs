//! Policies as Kubernetes objects, and as text.

use std::collections::BTreeMap;

use flow::{
    endpoint::Labels,
    record::{Direction, Protocol},
};
use k8s_openapi::{
    api::networking::v1::{
        IPBlock, NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule,
        NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};

use super::{
    Enforcer, Options, PolicyTypes, PortForm, Rule, peer::Peer, target::Target, yaml::to_yaml,
};

/// The label that says which program wrote an object.
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";

/// Its value on every policy written here. Files are recognised by it later.
pub const MANAGED_BY: &str = "microshield";

/// The label that the API server sets on every namespace since Kubernetes 1.21.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// The label that the pods of a cluster's DNS have by convention, whichever server they run.
const DNS_PODS: (&str, &str) = ("k8s-app", "kube-dns");

/// The namespace in which they are by convention.
pub(super) const DNS_NAMESPACE: &str = "kube-system";
pub(super) const DNS_PORT: u16 = 53;

/// Whether labels, or a selector, are those of the cluster's DNS.
pub(super) fn are_of_dns(labels: &Labels) -> bool {
    let (key, value) = DNS_PODS;
    labels.get(key).is_some_and(|label| label == value)
}

/// What a policy is made of.
pub(super) struct Spec<'a> {
    pub(super) target: &'a Target,
    pub(super) name: &'a str,
    /// Sorted by direction, peer, protocol and port.
    pub(super) rules: &'a [&'a Rule],
    pub(super) options: &'a Options,
    /// Some of its pods are the cluster's DNS, which all pods may ask.
    pub(super) answers_dns: bool,
}

pub(super) fn policy(spec: &Spec<'_>) -> NetworkPolicy {
    let Spec {
        target,
        name,
        rules,
        options,
        answers_dns,
    } = spec;
    let is_closed = |direction| match options.policy_types {
        PolicyTypes::Both => true,
        PolicyTypes::Observed => rules.iter().any(|rule| rule.direction == direction),
    };
    let openings = |direction| {
        rules
            .chunk_by(|one, other| (one.direction, &one.peer) == (other.direction, &other.peer))
            .filter(move |rules| rules[0].direction == direction)
            .filter_map(|rules| Some((NetworkPolicyPeer::from(rules[0].peer.as_ref()?), rules)))
            .map(|(peer, rules)| {
                let allowed: Vec<_> = rules
                    .iter()
                    .map(|rule| (rule.protocol, rule.port))
                    .collect();
                (vec![peer], ports(&allowed, options))
            })
    };
    let dns_ports = || {
        ports(
            &[(Protocol::Tcp, DNS_PORT), (Protocol::Udp, DNS_PORT)],
            options,
        )
    };
    let egress = is_closed(Direction::Egress).then(|| {
        let dns = options.allow_dns.then(|| NetworkPolicyEgressRule {
            ports: Some(dns_ports()),
            to: Some(vec![NetworkPolicyPeer {
                namespace_selector: Some(LabelSelector::default()),
                pod_selector: Some(select([DNS_PODS])),
                ip_block: None,
            }]),
        });
        let seen = openings(Direction::Egress).map(|(peers, ports)| NetworkPolicyEgressRule {
            ports: Some(ports),
            to: Some(peers),
        });
        dns.into_iter().chain(seen).collect()
    });
    let ingress = is_closed(Direction::Ingress).then(|| {
        let queried = (options.allow_dns && *answers_dns).then(|| NetworkPolicyIngressRule {
            ports: Some(dns_ports()),
            from: Some(vec![NetworkPolicyPeer {
                namespace_selector: Some(LabelSelector::default()),
                pod_selector: None,
                ip_block: None,
            }]),
        });
        let seen = openings(Direction::Ingress).map(|(peers, ports)| NetworkPolicyIngressRule {
            ports: Some(ports),
            from: Some(peers),
        });
        queried.into_iter().chain(seen).collect()
    });
    let types = [("Ingress", ingress.is_some()), ("Egress", egress.is_some())];
    NetworkPolicy {
        metadata: ObjectMeta {
            labels: Some([(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned())].into()),
            name: Some((*name).to_owned()),
            namespace: Some(target.id.namespace.clone()),
            ..ObjectMeta::default()
        },
        spec: Some(NetworkPolicySpec {
            egress,
            ingress,
            pod_selector: Some(match_labels(&target.selector)),
            policy_types: Some(
                types
                    .into_iter()
                    .filter(|(_, closed)| *closed)
                    .map(|(name, _)| name.to_owned())
                    .collect(),
            ),
        }),
    }
}

/// The policy as YAML, which `kubectl apply` takes.
///
/// # Errors
/// If the policy cannot be expressed in JSON; none made here cannot.
pub fn render(policy: &NetworkPolicy) -> serde_json::Result<String> {
    serde_json::to_value(policy).map(|policy| to_yaml(&policy))
}

/// `policy-NAME.yaml`, with the namespace before it if `prefixed`.
pub(super) fn file_name(policy: &NetworkPolicy, prefixed: bool) -> String {
    let name = policy.metadata.name.as_deref().unwrap_or_default();
    match policy.metadata.namespace.as_deref() {
        Some(namespace) if prefixed => format!("{namespace}.{name}.yaml"),
        _ => format!("{name}.yaml"),
    }
}

/// Of sorted ports.
fn ports(ports: &[(Protocol, u16)], options: &Options) -> Vec<NetworkPolicyPort> {
    let ranges = options.ports == PortForm::Ranges && options.enforcer == Enforcer::Kubernetes;
    ports
        .chunk_by(|(protocol, port), next| {
            ranges && port.checked_add(1).map(|port| (*protocol, port)) == Some(*next)
        })
        .filter_map(|run| Some((run.first()?, run.last()?)))
        .map(|((protocol, first), (_, last))| NetworkPolicyPort {
            end_port: (first != last).then_some(i32::from(*last)),
            port: Some(IntOrString::Int(i32::from(*first))),
            protocol: Some(protocol.name().to_owned()),
        })
        .collect()
}

fn match_labels(labels: &Labels) -> LabelSelector {
    LabelSelector {
        match_expressions: None,
        match_labels: (!labels.is_empty()).then(|| labels.clone()),
    }
}

fn select<const N: usize>(labels: [(&str, &str); N]) -> LabelSelector {
    let labels: BTreeMap<String, String> = labels
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    match_labels(&labels)
}

impl From<&Peer> for NetworkPolicyPeer {
    fn from(peer: &Peer) -> Self {
        match peer {
            Peer::Pods { namespace, labels } => Self {
                ip_block: None,
                namespace_selector: Some(select([(NAMESPACE_NAME, &**namespace)])),
                pod_selector: Some(match_labels(labels)),
            },
            Peer::Block(block) => Self {
                ip_block: Some(IPBlock {
                    cidr: block.to_string(),
                    except: None,
                }),
                namespace_selector: None,
                pod_selector: None,
            },
        }
    }
}
