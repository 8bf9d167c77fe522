//! Errors as a line for people.

use std::error::Error;

/// What an error says and then its causes, outermost first, but nothing twice: what libraries say of an error has its cause's
/// words in it more often than not.
#[must_use]
pub fn in_full(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Failed {
        #[error("cannot read shop.yaml")]
        Silent(#[source] io::Error),
        #[error("cannot read shop.yaml: {0}")]
        Telling(#[source] io::Error),
        #[error("no topology (in a pod: no; {0})")]
        Within(#[source] Box<Failed>),
    }

    #[test]
    fn each_cause_is_said_once() {
        let cause = || io::Error::other("is a folder");
        let read = "cannot read shop.yaml: is a folder";
        assert_eq!(in_full(&cause()), "is a folder");
        assert_eq!(in_full(&Failed::Silent(cause())), read);
        assert_eq!(in_full(&Failed::Telling(cause())), read);
        let within = |inner| in_full(&Failed::Within(Box::new(inner)));
        assert_eq!(
            within(Failed::Telling(cause())),
            format!("no topology (in a pod: no; {read})")
        );
        assert_eq!(
            within(Failed::Silent(cause())),
            "no topology (in a pod: no; cannot read shop.yaml): is a folder"
        );
    }
}
