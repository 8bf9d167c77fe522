//! The options that decide how policies are made.

use std::{num::NonZeroUsize, time::Duration};

use anyhow::anyhow;
use clap::Args;
use flow::time::Timestamp;

use super::Failure;
use crate::{
    policy::{
        Blocks, Enforcer, Granularity, Namespaces, Options, OwnNode, PolicyTypes, PortForm, Since,
    },
    syntax::is_dns_label,
};

/// The options that decide how policies are made, for every command that makes some.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Policies")]
pub struct PolicyArgs {
    /// Write policies for the pods of this namespace; may be repeated
    #[arg(
        short,
        long = "namespace",
        value_name = "NAMESPACE",
        env = "MICROSHIELD_NAMESPACE",
        value_delimiter = ',',
        value_parser = namespace
    )]
    pub(super) namespaces: Vec<String>,

    /// Write policies for the pods of all namespaces
    #[arg(
        short = 'A',
        long,
        env = "MICROSHIELD_ALL_NAMESPACES",
        conflicts_with = "namespaces"
    )]
    pub(super) all_namespaces: bool,

    /// With -A: write no policies for the pods of this namespace; may be repeated
    #[arg(
        long = "exclude-namespaces",
        value_name = "NAMESPACE",
        env = "MICROSHIELD_EXCLUDE_NAMESPACES",
        value_delimiter = ',',
        value_parser = namespace,
        conflicts_with = "namespaces"
    )]
    excluded: Vec<String>,

    /// Which pods share a policy [default: svc]
    #[arg(short, long, value_enum, env = "MICROSHIELD_GRANULARITY")]
    pub(super) granularity: Option<Granularity>,

    /// Write no rule that allows queries to the cluster's DNS; those that were seen are allowed like anything else
    #[arg(long, env = "MICROSHIELD_FORBID_DNS")]
    pub(super) forbid_dns: bool,

    /// Whether what reaches a pod from its own node (kubelet's probes) gets a rule
    #[arg(long, value_enum, default_value_t, env = "MICROSHIELD_NODES")]
    nodes: OwnNode,

    /// Which directions a policy closes to all that its rules do not allow
    #[arg(long, value_enum, default_value_t, env = "MICROSHIELD_POLICY_TYPES")]
    policy_types: PolicyTypes,

    /// How ports are written
    #[arg(long, value_enum, default_value_t, env = "MICROSHIELD_PORTS")]
    ports: PortForm,

    /// What is to enforce the policies
    #[arg(long, value_enum, default_value_t, env = "MICROSHIELD_TARGET")]
    target: Enforcer,

    /// Allow external IPv4 addresses as blocks with a prefix of at most this length
    #[arg(
        long,
        value_name = "LENGTH",
        default_value_t = 32,
        value_parser = clap::value_parser!(u8).range(..=32),
        env = "MICROSHIELD_CIDR_MAX_PREFIX4"
    )]
    cidr_max_prefix4: u8,

    /// Allow external IPv6 addresses as blocks with a prefix of at most this length
    #[arg(
        long,
        value_name = "LENGTH",
        default_value_t = 128,
        value_parser = clap::value_parser!(u8).range(..=128),
        env = "MICROSHIELD_CIDR_MAX_PREFIX6"
    )]
    cidr_max_prefix6: u8,

    /// Merge the closest external addresses until a policy has at most this many blocks for the same ports in one
    /// direction, of IPv4 and of IPv6 each
    #[arg(long, value_name = "N", env = "MICROSHIELD_CIDR_GROUP")]
    cidr_group: Option<NonZeroUsize>,

    /// Leave out connections that were seen fewer times, all pods of a service or controller taken together
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        env = "MICROSHIELD_MIN_COUNT"
    )]
    min_count: u64,

    /// Leave out connections that were not seen since: a time (2022-08-18, 2022-08-18T03:24:11Z), or how long before the
    /// newest of all connections (90m, 24h, 7d)
    #[arg(long, value_name = "TIME", value_parser = since, env = "MICROSHIELD_SINCE")]
    since: Option<Since>,
}

impl PolicyArgs {
    /// The checked options.
    ///
    /// # Errors
    /// If no namespace was chosen, or two options contradict each other.
    pub fn options(&self) -> Result<Options, Failure> {
        let namespaces = match (self.all_namespaces, self.excluded.is_empty()) {
            (true, true) => Namespaces::All,
            (true, false) => Namespaces::AllBut(self.excluded.iter().cloned().collect()),
            (false, false) => {
                return Err(Failure::input(anyhow!(
                    "--exclude-namespaces needs -A, all namespaces"
                )));
            }
            (false, true) if self.namespaces.is_empty() => {
                return Err(Failure::input(anyhow!(
                    "choose whose policies to write: -n NAMESPACE, or -A for all namespaces"
                )));
            }
            (false, true) => Namespaces::Only(self.namespaces.iter().cloned().collect()),
        };
        if self.ports == PortForm::Ranges && self.target == Enforcer::WeaveNpc {
            return Err(Failure::input(anyhow!(
                "--ports ranges and --target weave-npc exclude each other: Weave NPC does not know ranges of ports"
            )));
        }
        Ok(Options {
            granularity: self.granularity.unwrap_or_default(),
            allow_dns: !self.forbid_dns,
            own_node: self.nodes,
            policy_types: self.policy_types,
            ports: self.ports,
            enforcer: self.target,
            blocks: Blocks {
                max_prefix4: self.cidr_max_prefix4,
                max_prefix6: self.cidr_max_prefix6,
                group: self.cidr_group,
            },
            min_count: self.min_count,
            since: self.since,
            ..Options::new(namespaces)
        })
    }
}

/// A namespace's name as Kubernetes accepts it.
pub(super) fn namespace(text: &str) -> Result<String, &'static str> {
    if is_dns_label(text) {
        Ok(text.to_owned())
    } else {
        Err(
            "a namespace's name has at most 63 lower case letters, digits and `-`, and neither starts nor ends with `-`",
        )
    }
}

fn since(text: &str) -> Result<Since, &'static str> {
    let expected =
        "neither a time (2022-08-18, 2022-08-18T03:24:11Z) nor a duration (90m, 24h, 7d)";
    if let Some(duration) = duration(text) {
        return Ok(Since::Last(duration));
    }
    let midnight = || {
        let date: jiff::civil::Date = text.parse().ok()?;
        let midnight = date.to_zoned(jiff::tz::TimeZone::UTC).ok()?;
        Some(midnight.timestamp())
    };
    let time = text.parse::<jiff::Timestamp>().ok().or_else(midnight);
    let nanos = time.and_then(|time| u64::try_from(time.as_nanosecond()).ok());
    nanos
        .map(|nanos| Since::At(Timestamp::from_nanos(nanos)))
        .ok_or(expected)
}

/// A whole number of seconds, minutes, hours, days or weeks.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let unit: u64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        "w" => 7 * 24 * 60 * 60,
        _ => return None,
    };
    let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
    let number: u64 = number.parse().ok().filter(|_| is_number)?;
    number.checked_mul(unit).map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_or_a_duration_is_taken() {
        let at = |seconds: u64| Some(Since::At(Timestamp::from_nanos(seconds * 1_000_000_000)));
        let last = |seconds| Some(Since::Last(Duration::from_secs(seconds)));
        for (text, expected) in [
            ("2022-08-18", at(1_660_780_800)),
            ("2022-08-18T03:24:11Z", at(1_660_793_051)),
            ("2022-08-18T05:24:11+02:00", at(1_660_793_051)),
            ("90m", last(5_400)),
            ("0s", last(0)),
            ("2w", last(1_209_600)),
            ("", None),
            ("h", None),
            ("+1h", None),
            ("1.5h", None),
            ("yesterday", None),
            ("1922-08-18", None),
            ("99999999999999999999h", None),
            ("9999999999999999h", None),
        ] {
            assert_eq!(since(text).ok(), expected, "{text}");
        }
    }
}
