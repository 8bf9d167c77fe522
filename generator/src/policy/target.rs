//! Which pods a policy governs.

use std::fmt;

use flow::endpoint::{Endpoint, Labels, Pod, Service};

use super::{
    cluster::{Cluster, workload},
    labels::{STATEFULSET_POD, is_label, stable},
    notice::Reason,
    options::Granularity,
};
use crate::syntax::is_dns_label;

/// The pods that one policy governs.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Target {
    pub(super) id: TargetId,
    /// `spec.podSelector.matchLabels`; empty for all pods of the namespace.
    pub(super) selector: Labels,
}

/// What makes two targets the same one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct TargetId {
    pub(super) namespace: String,
    pub(super) kind: TargetKind,
}

/// The order decides who keeps the plain name where two targets have the same.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum TargetKind {
    Namespace,
    Service { name: String },
    Workload { name: String, kind: String },
    Pods { name: String, selector: Labels },
}

impl TargetId {
    /// The name of the namespace, service, workload or pod.
    pub(super) fn name(&self) -> &str {
        match &self.kind {
            TargetKind::Namespace => &self.namespace,
            TargetKind::Service { name }
            | TargetKind::Workload { name, .. }
            | TargetKind::Pods { name, .. } => name,
        }
    }
}

impl Target {
    /// Whether it is meant to be of the pods of one workload, or of some of them.
    pub(super) fn is_of_a_workload(&self) -> bool {
        matches!(
            self.id.kind,
            TargetKind::Workload { .. } | TargetKind::Pods { .. }
        )
    }
}

/// The text that the hash in a name is made of: it must not change between versions.
impl fmt::Display for TargetId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { namespace, kind } = self;
        match kind {
            TargetKind::Namespace => write!(f, "namespace {namespace}"),
            TargetKind::Service { name } => write!(f, "service {namespace}/{name}"),
            TargetKind::Workload { name, kind } => write!(f, "{kind} {namespace}/{name}"),
            TargetKind::Pods { name, selector } => {
                write!(f, "pods {namespace}/{name}")?;
                selector
                    .iter()
                    .try_for_each(|(key, value)| write!(f, " {key}={value}"))
            }
        }
    }
}

/// The targets that an end of an edge belongs to; none where it is not of pods that a policy could govern.
pub(super) fn targets(
    cluster: &Cluster<'_>,
    endpoint: &Endpoint,
    granularity: Granularity,
) -> Result<Vec<Target>, Reason> {
    let Some(namespace) = endpoint.namespace() else {
        return Ok(Vec::new());
    };
    if !is_dns_label(namespace) {
        return Err(Reason::InvalidNamespace);
    }
    let whole_namespace = || {
        vec![Target {
            id: TargetId {
                namespace: namespace.to_owned(),
                kind: TargetKind::Namespace,
            },
            selector: Labels::new(),
        }]
    };
    match endpoint {
        Endpoint::Pod { pod, .. } if pod.host_network => Err(Reason::HostNetwork),
        Endpoint::Pod { .. } if granularity == Granularity::Namespace => Ok(whole_namespace()),
        Endpoint::Pod { pod, service } => {
            let service = (granularity == Granularity::Service)
                .then(|| cluster.service_of(pod, service.as_ref()))
                .flatten();
            match service {
                Some((name, selector)) => Ok(vec![of_service(namespace, name, selector)]),
                None => of_pod(cluster, pod, granularity).map(|target| vec![target]),
            }
        }
        // Nothing is known of pods behind a service without a selector.
        Endpoint::Service(service) if service.selector.is_empty() => Ok(Vec::new()),
        Endpoint::Service(_) if granularity == Granularity::Namespace => Ok(whole_namespace()),
        Endpoint::Service(service) => behind(cluster, service, granularity),
        Endpoint::Node(_) | Endpoint::External(_) => Ok(Vec::new()),
    }
}

/// The labels by which a rule or a policy selects a pod that is not given by its service.
pub(super) fn pod_labels(
    cluster: &Cluster<'_>,
    pod: &Pod,
    granularity: Granularity,
) -> Option<Labels> {
    of_pod(cluster, pod, granularity)
        .ok()
        .map(|target| target.selector)
}

fn of_pod(cluster: &Cluster<'_>, pod: &Pod, granularity: Granularity) -> Result<Target, Reason> {
    let target = |kind, selector| Target {
        id: TargetId {
            namespace: pod.namespace.clone(),
            kind,
        },
        selector,
    };
    if granularity != Granularity::Pod
        && let Some(((_, kind, name), selector)) = cluster.workload_of(pod)
    {
        return Ok(target(TargetKind::Workload { name, kind }, selector));
    }
    let mut selector = stable(&pod.labels);
    let (_, _, mut name) = workload(pod);
    if granularity == Granularity::Pod
        && let Some(replica) = pod.labels.get(STATEFULSET_POD)
        && is_label(STATEFULSET_POD, replica)
    {
        selector.insert(STATEFULSET_POD.to_owned(), replica.clone());
        name.clone_from(&pod.name);
    }
    if selector.is_empty() {
        return Err(Reason::Unlabelled);
    }
    Ok(target(
        TargetKind::Pods {
            name,
            selector: selector.clone(),
        },
        selector,
    ))
}

/// The pod that answered is not known: each pod that can have is a target, or else the service's selector.
fn behind(
    cluster: &Cluster<'_>,
    service: &Service,
    granularity: Granularity,
) -> Result<Vec<Target>, Reason> {
    if granularity != Granularity::Service {
        let targets: Vec<Target> = cluster
            .pods_of(service)
            .filter_map(|pod| of_pod(cluster, pod, granularity).ok())
            .collect();
        if !targets.is_empty() {
            return Ok(targets);
        }
    }
    let selector = stable(&service.selector);
    if selector.is_empty() {
        return Err(Reason::Unlabelled);
    }
    let (namespace, name) = (&service.namespace, service.name.clone());
    Ok(vec![of_service(namespace, name, selector)])
}

fn of_service(namespace: &str, name: String, selector: Labels) -> Target {
    Target {
        id: TargetId {
            namespace: namespace.to_owned(),
            kind: TargetKind::Service { name },
        },
        selector,
    }
}
