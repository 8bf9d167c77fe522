//! Which labels stand for a workload whose pods were not all made alike.
//!
//! What the pods of all times have in common outlives rollouts: a label that says a version goes. But of a workload that was
//! given other labels, as when it is deleted and made anew, perhaps nothing remains but what half of the namespace has, and a
//! selector of that would close or open pods that nobody meant. So labels are given up only as long as the rest selects no
//! pod of another workload that the newest pods' own labels do not. Pods that are not selected in the end have their own
//! labels as their selector.
//!
//! The newest labels may be fewer than those before: a pod may have been taken out of its service to be looked at, and is the
//! newest until the one in its place has spoken. They do not stand for pods that could be told from other workloads by labels
//! which they have lost.
//!
//! What tells releases of one workload apart does not tell workloads apart, and goes in any case: the pods of the next release
//! would not be selected, and their traffic would be cut.

use std::{
    cell::RefCell,
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use flow::{endpoint::Labels, time::Timestamp};

use super::labels::selects;

/// Labels that by convention say what runs. They may have a digit that changes, but without them a selector may mean half of
/// the namespace.
const NAMES: [&str; 9] = [
    "app",
    "app.kubernetes.io/component",
    "app.kubernetes.io/instance",
    "app.kubernetes.io/name",
    "app.kubernetes.io/part-of",
    "component",
    "k8s-app",
    "name",
    "run",
];

/// The different labels of a workload's pods, and when the newest pod with them appeared.
#[derive(Debug, Default)]
pub(super) struct Variants(BTreeMap<Labels, Timestamp>);

impl Variants {
    /// Adds a pod by its stable labels.
    pub(super) fn add(&mut self, labels: Labels, appeared: Timestamp) {
        let newest = self.0.entry(labels).or_insert(appeared);
        *newest = appeared.max(*newest);
    }

    /// When the newest pod appeared.
    pub(super) fn newest(&self) -> Timestamp {
        self.0.values().copied().max().unwrap_or_default()
    }

    /// The labels to select by; none if the newest pods have none. `strangers` counts the pods of other workloads that
    /// labels, of which there is at least one, select.
    pub(super) fn common(self, strangers: impl Fn(&Labels) -> usize) -> Labels {
        let mut newest_first: Vec<(Labels, Timestamp)> = self.0.into_iter().collect();
        // The sort is stable: of those that appeared together the first by its labels comes first.
        newest_first.sort_by_key(|(_, appeared)| Reverse(*appeared));
        let mut variants: Vec<Labels> =
            newest_first.into_iter().map(|(labels, _)| labels).collect();
        give_up_releases(&mut variants);
        variants.dedup();
        let Some(first) = variants.first() else {
            return Labels::new();
        };
        if variants.len() == 1 || first.is_empty() {
            return first.clone();
        }
        // Workloads may have very many variants, which leave few different rests.
        let counted = RefCell::new(BTreeMap::<Labels, usize>::new());
        let strangers = |labels: &Labels| {
            if let Some(&known) = counted.borrow().get(labels) {
                return known;
            }
            let count = strangers(labels);
            counted.borrow_mut().insert(labels.clone(), count);
            count
        };
        // Of the variants that these labels select and that select fewer strangers the newest of those with the fewest.
        let dragged_along = |labels: &Labels| {
            let count = strangers(labels);
            if count == 0 {
                return None;
            }
            let selected = variants.iter().filter(|variant| selects(labels, variant));
            let best = selected.min_by_key(|variant| strangers(variant))?;
            (strangers(best) < count).then_some(best)
        };
        let mut lead = first;
        while let Some(better) = dragged_along(lead) {
            lead = better;
        }
        let known = strangers(lead);
        let mut common = lead.clone();
        let mut tried = BTreeMap::<Labels, bool>::new();
        for other in &variants {
            if selects(&common, other) {
                continue;
            }
            let mut rest = common.clone();
            rest.retain(|key, value| other.get(key) == Some(value));
            if rest.is_empty() {
                continue;
            }
            let is_precise = *tried.entry(rest.clone()).or_insert_with_key(|rest| {
                strangers(rest) <= known && dragged_along(rest).is_none()
            });
            if is_precise {
                common = rest;
            }
        }
        common
    }
}

/// Takes from variants, the newest first, the labels that tell releases apart; not from one that has no others.
fn give_up_releases(variants: &mut [Labels]) {
    let pairs = variants.windows(2);
    let of_releases: BTreeSet<String> = pairs
        .flat_map(|pair| of_releases(&pair[0], &pair[1]))
        .collect();
    if of_releases.is_empty() {
        return;
    }
    for variant in variants {
        let mut of_all_releases = variant.clone();
        of_all_releases.retain(|key, _| !of_releases.contains(key));
        if !of_all_releases.is_empty() {
            *variant = of_all_releases;
        }
    }
}

/// The keys whose values were changed from one variant to the next, if nothing else was and all of them look like versions.
/// A name that is changed once looks just like that, but for the digit.
fn of_releases(newer: &Labels, older: &Labels) -> Vec<String> {
    if !newer.keys().eq(older.keys()) {
        return Vec::new();
    }
    let pairs = newer.iter().zip(older.values());
    let changed = pairs.filter(|((_, new), old)| new != old);
    let keys = changed.map(|((key, new), old)| {
        let is_release = has_digit(new) && has_digit(old) && !NAMES.contains(&key.as_str());
        is_release.then(|| key.clone())
    });
    keys.collect::<Option<Vec<String>>>().unwrap_or_default()
}

fn has_digit(value: &str) -> bool {
    value.bytes().any(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::labels;

    /// The common labels of variants, the newest first. Every pod of another workload has `shared`.
    fn check(newest_first: &[&[(&str, &str)]], expected: &[(&str, &str)]) {
        let mut variants = Variants::default();
        for (age, pairs) in (0..).zip(newest_first) {
            variants.add(labels(pairs), Timestamp::from_nanos(100 - age));
            variants.add(labels(pairs), Timestamp::from_nanos(1));
        }
        let shared = labels(&[("team", "shop"), ("tier", "web")]);
        let common = variants.common(|rest| if selects(rest, &shared) { 7 } else { 0 });
        assert_eq!(common, labels(expected), "{newest_first:?}");
    }

    #[test]
    fn labels_are_given_up_as_long_as_no_other_pods_are_selected_by_the_rest() {
        let [old, new] = [("app", "web"), ("name", "web")];
        let (team, tier) = (("team", "shop"), ("tier", "web"));
        check(&[&[new, team]], &[new, team]);
        check(&[&[new, team], &[old, team]], &[new, team]);
        check(&[&[old, team], &[new, team]], &[old, team]);
        check(
            &[
                &[old, team, ("version", "2")],
                &[old, team, ("version", "1")],
            ],
            &[old, team],
        );
        // The one between them is not like the others, which have a label in common.
        check(&[&[old, team], &[new, team], &[old]], &[old]);
        // A workload that never had a label of its own.
        check(&[&[team, tier], &[team]], &[team]);
        // Another name is no release.
        check(
            &[&[("app", "web2"), team], &[("app", "web1"), team]],
            &[("app", "web2"), team],
        );
        check(
            &[&[("svc", "shop"), team], &[("svc", "web"), team]],
            &[("svc", "shop"), team],
        );
        check(&[&[new], &[old]], &[new]);
        check(&[&[], &[old]], &[]);
        check(&[&[old], &[]], &[old]);
    }

    #[test]
    fn the_newest_pods_do_not_stand_for_others_that_their_fewer_labels_select() {
        let [old, new] = [("app", "web"), ("name", "web")];
        let (team, tier) = (("team", "shop"), ("tier", "web"));
        check(&[&[team], &[old, team]], &[old, team]);
        check(&[&[team], &[old, team], &[old, team, new]], &[old, team]);
        check(&[&[team], &[new, team], &[old, team]], &[new, team]);
        // What they have left tells them from others, or those before had no more that does.
        check(&[&[old], &[old, team]], &[old]);
        check(&[&[team], &[team, tier]], &[team]);
        // Nor does what two others have in common.
        check(&[&[team, tier], &[old, team]], &[team, tier]);
        check(
            &[
                &[team, ("version", "3")],
                &[old, team, ("version", "3")],
                &[old, team, ("version", "2")],
            ],
            &[old, team],
        );
    }

    #[test]
    fn what_tells_releases_apart_is_given_up_though_others_are_selected_by_the_rest() {
        let (team, tier) = (("team", "shop"), ("tier", "web"));
        let release = |number| ("version", number);
        check(
            &[&[team, tier, release("8")], &[team, tier, release("7")]],
            &[team, tier],
        );
        // Two of them are changed at once, and what was there before has none.
        check(
            &[
                &[team, release("8"), ("commit", "b4")],
                &[team, release("7"), ("commit", "a3")],
                &[team, tier],
            ],
            &[team],
        );
        check(&[&[release("8")], &[release("7")]], &[release("8")]);
    }
}
