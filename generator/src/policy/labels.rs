//! Labels that a policy may select on.

use flow::endpoint::Labels;

use crate::syntax::{is_label_key, is_label_value};

/// The label that names a single pod of a StatefulSet. It outlives rollouts, but selects one replica.
pub(super) const STATEFULSET_POD: &str = "statefulset.kubernetes.io/pod-name";

/// Labels that a controller or a release tool sets anew with each rollout, run or replica.
const UNSTABLE: [&str; 10] = [
    "app.kubernetes.io/version",
    "apps.kubernetes.io/pod-index",
    "controller-revision-hash",
    "controller-uid",
    "helm.sh/chart",
    "job-name",
    "kubernetes.io/hostname",
    "pod-template-generation",
    "pod-template-hash",
    "rollouts-pod-template-hash",
];

/// Prefixes of such labels, and of those that tell where a pod was scheduled.
const UNSTABLE_PREFIXES: [&str; 3] = [
    "batch.kubernetes.io/",
    "failure-domain.beta.kubernetes.io/",
    "topology.",
];

/// The labels that outlive a rollout and are common to all replicas. Those that no API server would have accepted are
/// left out as well: no pod carries them.
pub(super) fn stable(labels: &Labels) -> Labels {
    labels
        .iter()
        .filter(|(key, value)| is_stable(key) && is_label(key, value))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn is_stable(key: &str) -> bool {
    key != STATEFULSET_POD
        && !UNSTABLE.contains(&key)
        && !UNSTABLE_PREFIXES
            .iter()
            .any(|prefix| key.starts_with(prefix))
}

/// Whether a pod with `labels` is selected.
pub(super) fn selects(selector: &Labels, labels: &Labels) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

pub(super) fn is_label(key: &str, value: &str) -> bool {
    is_label_key(key) && is_label_value(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::labels;

    #[test]
    fn only_labels_that_outlive_a_rollout_are_stable() {
        let all = labels(&[
            ("app", "db"),
            ("app.kubernetes.io/name", "db"),
            ("app.kubernetes.io/version", "1.2.3"),
            ("apps.kubernetes.io/pod-index", "0"),
            ("batch.kubernetes.io/controller-uid", "6ba7"),
            ("controller-revision-hash", "764f4c9954"),
            ("helm.sh/chart", "db-4.5.6"),
            ("job-name", "db-1"),
            ("pod-template-hash", "5f495f9cf8"),
            ("statefulset.kubernetes.io/pod-name", "db-0"),
            ("topology.kubernetes.io/zone", "a"),
        ]);
        let expected = labels(&[("app", "db"), ("app.kubernetes.io/name", "db")]);
        assert_eq!(stable(&all), expected);
    }
}
