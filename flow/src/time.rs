//! Points in time.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A point in time: nanoseconds since the Unix epoch.
///
/// In JSON and on the wire it is a number of seconds with a fraction, as MicroShield's records have it. That is a
/// 64-bit float, so a time of this century survives with a precision better than half a microsecond.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The time `nanos` nanoseconds after the Unix epoch.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the Unix epoch.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// This time plus `duration`; stays at the largest time that can be expressed.
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)),
        )
    }

    /// This time minus `duration`; stays at the epoch.
    #[must_use]
    pub fn saturating_sub(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}

impl From<SystemTime> for Timestamp {
    /// A time before the epoch becomes the epoch.
    fn from(time: SystemTime) -> Self {
        Self::default().saturating_add(
            time.duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or(Duration::ZERO),
        )
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Cut to whole microseconds: the float's next digits would be noise.
        let micros = self.0 / 1_000;
        serializer.serialize_f64(micros as f64 / 1_000_000.0)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        if !(0.0..=18_000_000_000.0).contains(&seconds) {
            return Err(de::Error::invalid_value(
                de::Unexpected::Float(seconds),
                &"seconds since the Unix epoch",
            ));
        }
        // Microseconds first: they are exact in a float, nanoseconds of today are not.
        let micros = (seconds * 1_000_000.0).round() as u64;
        Ok(Self(micros * 1_000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_survives_json_to_the_microsecond() {
        let time = Timestamp::from_nanos(1_660_793_051_696_728_000);
        let json = serde_json::to_string(&time).unwrap();
        assert_eq!(json, "1660793051.696728");
        assert_eq!(serde_json::from_str::<Timestamp>(&json).unwrap(), time);
    }

    #[test]
    fn a_time_out_of_range_is_refused() {
        for bad in ["-1", "1e300", "null", "\"x\""] {
            assert!(serde_json::from_str::<Timestamp>(bad).is_err(), "{bad}");
        }
    }
}
