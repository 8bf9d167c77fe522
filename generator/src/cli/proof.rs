//! A proof for people.

use crate::{
    evaluate::{Denial, NeverSeen, Proof},
    table::printable,
};

/// Denied edges and rules that are listed.
const MAX_LISTED: usize = 10;

/// What the policies do to the connections that were seen, and what they leave open besides.
pub(super) fn text(proof: &Proof) -> String {
    let Proof {
        allowed,
        denied,
        reachable_before,
        reachable_after,
        unrestricted,
        never_seen,
        never_seen_by_rule,
    } = proof;
    let mut text = format!("flows allowed: {allowed}, denied: {}\n", denied.len());
    for denied in denied.iter().take(MAX_LISTED) {
        text.push_str(&format!(
            "  {} -> {} {}/{}, {} times: {}\n",
            printable(&denied.client),
            printable(&denied.server),
            denied.port,
            denied.protocol,
            denied.count,
            listing(&denied.denials),
        ));
    }
    text.push_str(&more(denied.len()));
    text.push_str(&format!(
        "pairs of endpoints reachable: {reachable_before} before, {reachable_after} after, {unrestricted} of these without any restriction\n"
    ));
    text.push_str(&format!("open but never seen: {never_seen}\n"));
    let mut rules: Vec<&NeverSeen> = never_seen_by_rule.iter().collect();
    // The sort is stable: rules that open equally much stay in their order.
    rules.sort_by_key(|rule| std::cmp::Reverse(rule.count));
    for NeverSeen {
        rule,
        count,
        examples,
    } in rules.iter().take(MAX_LISTED)
    {
        let mut examples: Vec<String> = examples
            .iter()
            .map(|unused| printable(&unused.to_string()))
            .collect();
        if *count > examples.len() as u64 {
            examples.push("...".to_owned());
        }
        text.push_str(&format!("  {count} by {rule}: {}\n", examples.join(", ")));
    }
    text.push_str(&more(rules.len()));
    text
}

/// `egress of shop/a and shop/b has no rule for it, and ingress of shop/c has no rule for it`.
pub(super) fn listing(denials: &[Denial]) -> String {
    let of_end = |denial: &Denial| {
        let policies = denial.policies.join(" and ");
        format!("{} of {policies} has no rule for it", denial.direction)
    };
    denials
        .iter()
        .map(of_end)
        .collect::<Vec<_>>()
        .join(", and ")
}

fn more(count: usize) -> String {
    match count.checked_sub(MAX_LISTED) {
        Some(more @ 1..) => format!("  and {more} more, which --json lists\n"),
        _ => String::new(),
    }
}
