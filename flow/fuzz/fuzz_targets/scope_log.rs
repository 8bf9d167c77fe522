//! Whatever a log of the Scope probe is: each line is a connection, nothing, or refused with a place in it; and what is put
//! together is no longer than it may be.
#![no_main]

use flow::scope_log::{
    Ends, Parser, Problem,
    frame::{Assembler, MAX_LINE_BYTES, unframe},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let mut assembler = Assembler::default();
    let mut all = Parser::new(Ends::Both);
    let mut servers = Parser::new(Ends::Servers);
    for line in text.split(|byte| *byte == b'\n') {
        assert!(unframe(line).text.len() <= line.len() * 3);
        let Ok(Some(line)) = assembler.push(line) else {
            continue;
        };
        assert!(line.len() <= MAX_LINE_BYTES);
        let parsed = all.parse(&line);
        // What is asked for less is the same, or is not told of.
        match servers.parse(&line) {
            Ok(None) => {}
            // Of several things that are wrong, either may find another first.
            Err(_) => assert!(parsed.is_err()),
            some => assert_eq!(some, parsed),
        }
        assert_eq!(all.parse_unended(&line), parsed);
        match parsed {
            Ok(None) => {}
            Ok(Some(connection)) => {
                assert_ne!(connection.server.port(), 0);
                assert!(line.windows(connection.hostname.len().max(1)).count() > 0);
            }
            Err(Problem { offset, .. }) => assert!(offset <= line.len()),
        }
    }
});
