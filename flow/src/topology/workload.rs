//! The controller at the top of a pod's owner references, found without looking at the controllers themselves.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use crate::endpoint::{Labels, Workload};

/// The labels by which a controller of ReplicaSets tells its ReplicaSets' pods apart. The value is the last part of the
/// ReplicaSet's name.
const REPLICA_SET_HASHES: [(&str, &str); 2] = [
    ("pod-template-hash", "Deployment"),
    // Argo Rollouts makes ReplicaSets, too.
    ("rollouts-pod-template-hash", "Rollout"),
];

/// The workload of a pod with these owners and labels; `None` for a bare pod and for the mirror of a static pod, which
/// its node owns.
#[must_use]
pub(super) fn workload_of(owners: &[OwnerReference], labels: &Labels) -> Option<Workload> {
    let owner = owners.iter().find(|owner| owner.controller == Some(true))?;
    let found = match owner.kind.as_str() {
        "Node" => return None,
        "ReplicaSet" => REPLICA_SET_HASHES.iter().find_map(|(label, kind)| {
            let hash = labels.get(*label)?;
            Some((*kind, strip_part(&owner.name, hash)?))
        }),
        "Job" => cron_job(&owner.name).map(|name| ("CronJob", name)),
        _ => None,
    };
    let (kind, name) = found.unwrap_or((&owner.kind, &owner.name));
    Some(Workload {
        kind: kind.to_owned(),
        name: name.to_owned(),
    })
}

/// `name` without its last part `-part`.
fn strip_part<'a>(name: &'a str, part: &str) -> Option<&'a str> {
    let rest = name.strip_suffix(part)?.strip_suffix('-')?;
    (!rest.is_empty()).then_some(rest)
}

/// The CronJob that made a Job of this name, if the name says so.
///
/// The CronJob controller names a Job `CRONJOB-TIME`, with the scheduled time in minutes since the epoch (since
/// Kubernetes 1.20; eight digits), before that in seconds (ten digits); see `getJobName` in
/// `pkg/controller/cronjob/utils.go`. Only times from 2020 on are taken for one, so a Job that someone named after a date
/// (`import-20260131`) stays a Job.
pub(super) fn cron_job(job: &str) -> Option<&str> {
    const MINUTES_SINCE: u64 = 26_297_280;
    let (name, time) = job.rsplit_once('-')?;
    if name.is_empty() || !time.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = time.parse().ok()?;
    let scheduled = match time.len() {
        8 => number >= MINUTES_SINCE,
        10 => (MINUTES_SINCE * 60..=u64::from(u32::MAX)).contains(&number),
        _ => false,
    };
    scheduled.then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(owner: &str, labels: &[(&str, &str)], expected: &str) {
        let (kind, name) = owner.split_once('/').unwrap();
        let labels = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        let owners = [
            OwnerReference {
                kind: "ConfigMap".to_owned(),
                name: "no-controller".to_owned(),
                ..OwnerReference::default()
            },
            OwnerReference {
                kind: kind.to_owned(),
                name: name.to_owned(),
                controller: Some(true),
                ..OwnerReference::default()
            },
        ];
        let found = workload_of(&owners, &labels)
            .map_or("none".to_owned(), |w| format!("{}/{}", w.kind, w.name));
        assert_eq!(found, expected, "{owner}");
    }

    #[test]
    fn owners_lead_to_the_controller_at_the_top() {
        let hash = [("pod-template-hash", "67796785cb")];
        check("ReplicaSet/front-67796785cb", &hash, "Deployment/front");
        check("ReplicaSet/front", &[], "ReplicaSet/front");
        check("ReplicaSet/front-77", &hash, "ReplicaSet/front-77");
        check("ReplicaSet/67796785cb", &hash, "ReplicaSet/67796785cb");
        check(
            "ReplicaSet/canary-5d9",
            &[("rollouts-pod-template-hash", "5d9")],
            "Rollout/canary",
        );
        check("StatefulSet/db", &[], "StatefulSet/db");
        check("DaemonSet/exporter", &[], "DaemonSet/exporter");
        check("Job/report-29921534", &[], "CronJob/report");
        check("Job/report-1660793040", &[], "CronJob/report");
        check("Job/import-20260131", &[], "Job/import-20260131");
        check("Job/migrate", &[], "Job/migrate");
        check("Job/-29921534", &[], "Job/-29921534");
        check("Job/step-2", &[], "Job/step-2");
        check("SparkApplication/pi", &[], "SparkApplication/pi");
        check("Node/master", &[], "none");
    }

    #[test]
    fn a_bare_pod_has_no_workload() {
        assert_eq!(workload_of(&[], &Labels::new()), None);
    }
}
