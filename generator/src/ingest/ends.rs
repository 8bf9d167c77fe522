//! The ends that agents have sent lately, by how they were said.
//!
//! An agent says the same ends in every batch, and most of them are said by many agents. Each is decoded and checked once.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::{Arc, Mutex, PoisonError},
};

use flow::{
    topology::Common,
    wire::{Encoding, End, Packed, RawEnd, bounds},
};
use siphasher::sip128::{Hasher128 as _, SipHasher13};

use super::{Refusal, queue::MAX_DECODED_BYTES};
use crate::ledger::KnownEnd;

/// How much is kept of ends, in bytes, of all agents: that of some forty thousand. When it is more, all are forgotten.
const MAX_KEPT: usize = 128 << 20;

/// Decodes ends. Copies have what they know in common.
#[derive(Clone, Debug)]
pub(super) struct Ends {
    table: Arc<Mutex<Table>>,
    /// Makes fingerprints of texts, with a key that nobody knows.
    fingerprints: SipHasher13,
}

/// What a text is known by: 128 bits, so that no two are alike, neither by chance nor by intent.
type Fingerprint = u128;

#[derive(Debug, Default)]
struct Table {
    known: HashMap<Fingerprint, KnownEnd>,
    /// Pods of one template have most of what they say in common.
    common: Common,
    kept: usize,
    serials: u64,
}

impl Ends {
    /// The batch with its ends decoded and checked, as `encoding` says them, and how many bytes those take that were not
    /// known before.
    pub(super) fn decode(
        &self,
        batch: Packed<RawEnd<'_>>,
        encoding: Encoding,
    ) -> Result<(Packed<KnownEnd>, usize), Refusal> {
        let mut index = 0;
        let mut weight = 0;
        let batch = batch.try_map(|end| {
            let (known, added) = self.end(end, encoding, index)?;
            index += 1;
            weight += added;
            if weight > MAX_DECODED_BYTES {
                let mib = MAX_DECODED_BYTES >> 20;
                let reason = format!("the batch's ends take more than {mib} MiB in memory");
                return Err(Refusal::too_big(reason));
            }
            Ok(known)
        })?;
        Ok((batch, weight))
    }

    /// An end, and how many bytes it takes if it is new.
    fn end(
        &self,
        end: RawEnd<'_>,
        encoding: Encoding,
        index: usize,
    ) -> Result<(KnownEnd, usize), Refusal> {
        let mut hasher = self.fingerprints;
        hasher.write(end.0);
        let fingerprint = hasher.finish128().as_u128();
        if let Some(known) = self.lock().known.get(&fingerprint) {
            return Ok((known.clone(), 0));
        }
        let decoded = end.decode(encoding)?;
        bounds::end(&decoded).map_err(|invalid| {
            Refusal::invalid(invalid.within(&format!("ends[{index}]")).to_string())
        })?;
        let known = self.lock().keep(fingerprint, decoded);
        let weight = known.weight();
        Ok((known, weight))
    }

    /// Nothing panics while it is held.
    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Ends {
    fn default() -> Self {
        let [one, other] = [(); 2].map(|()| RandomState::new().hash_one(()));
        Self {
            table: Arc::default(),
            fingerprints: SipHasher13::new_with_keys(one, other),
        }
    }
}

impl Table {
    fn keep(&mut self, fingerprint: Fingerprint, mut end: End) -> KnownEnd {
        self.common.share_end(&mut end.endpoint);
        self.serials += 1;
        let known = KnownEnd {
            serial: self.serials,
            end: Arc::new(end),
        };
        let cost = known.weight();
        if self.kept + cost > MAX_KEPT {
            self.known.clear();
            self.kept = 0;
        }
        // Two connections may have met it at the same moment: then it has two serials, which costs no more than a look.
        if self.known.insert(fingerprint, known.clone()).is_none() {
            self.kept += cost;
        }
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(name: &str) -> String {
        let labels = "x".repeat(900);
        format!(
            r#"{{"sequence": 1, "window": {{"from": 1, "to": 2}}, "flows": [],
                "ends": [{{"address": "10.0.0.1", "pod": {{"id": "u", "namespace": "n", "name": "{name}",
                           "labels": {{"a": "{labels}"}}}}}}]}}"#
        )
    }

    fn decode(ends: &Ends, name: &str) -> Result<KnownEnd, Refusal> {
        let text = batch(name);
        let packed = serde_json::from_str(&text).unwrap();
        Ok(ends.decode(packed, Encoding::Json)?.0.ends.remove(0))
    }

    #[test]
    fn an_end_is_decoded_once() {
        let ends = Ends::default();
        let one = decode(&ends, "web-1").unwrap();
        let again = decode(&ends.clone(), "web-1").unwrap();
        assert_eq!(one.serial, again.serial);
        assert!(Arc::ptr_eq(&one.end, &again.end));
        assert_ne!(decode(&ends, "web-2").unwrap().serial, one.serial);
    }

    #[test]
    fn what_is_not_valid_is_refused_each_time() {
        let ends = Ends::default();
        for _ in 0..2 {
            let refusal = decode(&ends, "../web").unwrap_err();
            assert!(
                refusal
                    .to_string()
                    .contains("ends[0].pod.name: ../web is not a name"),
                "{refusal}"
            );
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let ends = Ends::default();
        for number in 0..2 * MAX_KEPT / 1_800 {
            decode(&ends, &format!("web-{number}")).unwrap();
            let table = ends.lock();
            assert!(table.kept <= MAX_KEPT && table.known.len() <= MAX_KEPT / 900);
        }
    }

    /// What is short to say may take much when it is decoded.
    #[test]
    fn what_is_kept_counts_as_it_is_in_memory() {
        let ends = Ends::default();
        let labels: Vec<String> = (0..250).map(|number| format!(r#""{number}":"""#)).collect();
        let end = format!(
            r#"{{"address":"10.0.0.1","pod":{{"id":"u","namespace":"n","name":"p","labels":{{{}}}}}}}"#,
            labels.join(",")
        );
        let batch = format!(
            r#"{{"sequence": 1, "window": {{"from": 1, "to": 2}}, "flows": [], "ends": [{end}]}}"#
        );
        let packed = serde_json::from_str(&batch).unwrap();
        ends.decode(packed, Encoding::Json).unwrap();
        let strings = 250 * 2 * size_of::<String>();
        let kept = ends.lock().kept;
        assert!(kept > end.len() + strings, "{kept} for {}", end.len());
    }
    /// A batch of so many ends, each of which says little and takes much.
    fn swollen(count: usize) -> String {
        let labels: Vec<String> = (0..250).map(|number| format!(r#""{number}":"""#)).collect();
        let labels = labels.join(",");
        let ends: Vec<String> = (0..count)
            .map(|number| {
                format!(
                    r#"{{"address":"10.0.0.1","pod":{{"id":"u{number}","namespace":"n","name":"p",
                        "labels":{{{labels}}}}}}}"#
                )
            })
            .collect();
        let ends = ends.join(",");
        format!(
            r#"{{"sequence": 1, "window": {{"from": 1, "to": 2}}, "flows": [], "ends": [{ends}]}}"#
        )
    }

    #[test]
    fn what_a_batch_takes_when_it_is_decoded_is_bounded() {
        let text = swollen(1_800);
        assert!(text.len() < flow::wire::MAX_MESSAGE_BYTES);
        let packed = serde_json::from_str(&text).unwrap();
        let refusal = Ends::default().decode(packed, Encoding::Json).unwrap_err();
        assert!(refusal.is_of_the_message());
        assert_eq!(
            refusal.reason,
            "the batch's ends take more than 32 MiB in memory"
        );
    }

    #[test]
    fn ends_that_are_known_add_nothing() {
        let ends = Ends::default();
        let text = swollen(10);
        let decode = || {
            let packed = serde_json::from_str(&text).unwrap();
            ends.decode(packed, Encoding::Json).unwrap().1
        };
        assert!(decode() > text.len());
        assert_eq!(decode(), 0);
    }
}
