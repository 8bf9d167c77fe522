//! Whatever a report of Weave Scope is: it is read or refused, in either form, and what is read can be put into the index.
#![no_main]

use flow::{
    time::Timestamp,
    topology::{Index, scope},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    if let Ok(report) = scope::read(text) {
        let mut index = Index::default();
        let now = Timestamp::from_nanos(1_795_292_200_000_000_000);
        index.replace(report.objects.clone(), now);
        let first = index.counts();
        // The same again changes nothing.
        index.replace(report.objects, now);
        assert_eq!(index.counts(), first);
    }
});
