//! How slow this machine is, compared with those that the tests' limits and loads are made for.

use std::{env, sync::LazyLock, time::Duration};

/// By how much time limits are longer than elsewhere; a whole number, 1 if it is not set.
static PATIENCE: LazyLock<u32> = LazyLock::new(|| factor("LAB_PATIENCE"));

/// The part of a load that is made, one in so many; a whole number, 1 if it is not set.
static SHARE: LazyLock<u32> = LazyLock::new(|| factor("LAB_SHARE"));

/// The size of the agents' maps where a test asks for none; else the agents' own default. While the kernel goes through a map for
/// an agent, it leaves classic tracepoints' programs out on that processor.
static MAP_ENTRIES: LazyLock<Option<String>> = LazyLock::new(|| env::var("LAB_MAP_ENTRIES").ok());

/// How long to wait here for what never takes longer than `limit` elsewhere.
#[must_use]
pub fn patience(limit: Duration) -> Duration {
    limit * *PATIENCE
}

/// How much to do of what is done `count` times elsewhere.
#[must_use]
pub fn share(count: u64) -> u64 {
    (count / u64::from(*SHARE)).max(1)
}

/// The size that agents' maps have here, if it is not the usual one.
#[must_use]
pub(crate) fn map_entries() -> Option<&'static str> {
    MAP_ENTRIES.as_deref()
}

fn factor(variable: &str) -> u32 {
    parse(env::var(variable).ok().as_deref())
}

/// What is no positive number is as if it were not set: not all programs of the lab have somebody to tell.
fn parse(value: Option<&str>) -> u32 {
    value
        .and_then(|value| value.parse().ok())
        .filter(|factor| *factor > 0)
        .unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_positive_number_or_1() {
        for (value, wanted) in [
            (None, 1),
            (Some("20"), 20),
            (Some("0"), 1),
            (Some("slow"), 1),
        ] {
            assert_eq!(parse(value), wanted, "{value:?}");
        }
    }
}
