//! What the machine says on its serial line.

use std::fmt;

/// The start of the lines in which the first program speaks of itself; see `vm-init` in `tests`.
const OWN: &str = "vm-init: ";

/// What became of the tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    passed: u32,
    failed: u32,
    ignored: u32,
    end: Option<bool>,
}

impl Summary {
    /// Takes in a line, which may end with a carriage return.
    pub(crate) fn read(&mut self, line: &str) {
        let line = line.trim_end();
        if let Some(own) = line.strip_prefix(OWN) {
            match own {
                "passed" => self.end = Some(true),
                "failed" => self.end = Some(false),
                _ => {}
            }
        }
        // The last word of a test's line: `test NAME ... ok`.
        if let Some(rest) = line.strip_prefix("test ")
            && let Some((_, verdict)) = rest.rsplit_once(" ... ")
        {
            match verdict {
                "ok" => self.passed += 1,
                "ignored" => self.ignored += 1,
                _ => self.failed += 1,
            }
        }
    }

    /// Whether the first program has said that everything has passed, and something was tested.
    pub(crate) fn is_good(&self) -> bool {
        self.end == Some(true) && self.failed == 0 && self.passed > 0
    }

    /// Whether it has said how it ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.end.is_some()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed", self.passed)?;
        for (count, what) in [(self.failed, "failed"), (self.ignored, "not run")] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Summary {
        let mut summary = Summary::default();
        text.split('\n').for_each(|line| summary.read(line));
        summary
    }

    #[test]
    fn good_is_only_what_says_so_and_has_tested_something() {
        let passed = "test capture::a[btf] ... ok\r\ntest b   ... ignored\r\nvm-init: passed\r\n";
        let summary = read(passed);
        assert!(summary.is_good());
        assert_eq!(summary.to_string(), "1 passed, 1 not run");
        for bad in [
            "",
            "vm-init: passed\n",
            "test a ... ok\n",
            "test a ... ok\nvm-init: failed\n",
            "test a ... ok\ntest b ... FAILED\nvm-init: passed\n",
            "[    1.2] Kernel panic - not syncing\n",
        ] {
            assert!(!read(bad).is_good(), "{bad}");
        }
    }
}
