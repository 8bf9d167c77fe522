//! Whatever a file of the spool is: what is taken for good of it is written again as it was, and its end is where it says.
#![no_main]

use flow::segment::{HEADER_BYTES, header, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some(parsed) = parse(bytes) else {
        return;
    };
    let mut again = header(parsed.resolve);
    assert_eq!(again.len() as u64, HEADER_BYTES);
    for entry in &parsed.entries {
        let entry_bytes = entry.to_bytes().unwrap();
        assert_eq!(entry_bytes.len() as u64, entry.len());
        again.extend(entry_bytes);
    }
    assert_eq!(again.len() as u64, parsed.good_bytes);
    assert_eq!(again, bytes[..again.len()]);
    // A file that is cut there loses nothing more.
    assert_eq!(parse(&again), Some(parsed));
});
