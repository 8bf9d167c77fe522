//! What the API server accepts as names, labels and ports: the rules of `k8s.io/apimachinery/pkg/util/validation`.

/// Whether a text is the key of a label: `IsQualifiedName`.
#[must_use]
pub fn is_label_key(key: &str) -> bool {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    prefix.is_none_or(is_subdomain) && !name.is_empty() && is_label_value(name)
}

/// Whether a text is the value of a label, which may be empty: `IsValidLabelValue`.
#[must_use]
pub fn is_label_value(value: &str) -> bool {
    let bytes = value.as_bytes();
    bytes.len() <= 63
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
        && [bytes.first(), bytes.last()]
            .into_iter()
            .flatten()
            .all(u8::is_ascii_alphanumeric)
}

/// Whether a text is a DNS-1123 subdomain, as names of most objects are.
#[must_use]
pub fn is_subdomain(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_dns_text)
}

/// Whether a text is a DNS-1123 label, as names of namespaces are.
#[must_use]
pub fn is_dns_label(text: &str) -> bool {
    text.len() <= 63 && is_dns_text(text)
}

/// Whether a text is the name of a port: `IsValidPortName`.
#[must_use]
pub fn is_port_name(text: &str) -> bool {
    text.len() <= 15
        && is_dns_text(text)
        && !text.contains("--")
        && text.bytes().any(|byte| byte.is_ascii_lowercase())
}

fn is_dns_text(text: &str) -> bool {
    let bytes = text.as_bytes();
    let is_alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    bytes.first().is_some_and(is_alphanumeric)
        && bytes.last().is_some_and(is_alphanumeric)
        && bytes
            .iter()
            .all(|byte| is_alphanumeric(byte) || *byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(is_valid: fn(&str) -> bool, valid: &[&str], invalid: &[&str]) {
        for text in valid {
            assert!(is_valid(text), "{text}");
        }
        for text in invalid {
            assert!(!is_valid(text), "{text}");
        }
    }

    #[test]
    fn texts_are_judged_as_the_api_server_does() {
        let long = "x".repeat(64);
        check(
            is_label_key,
            &["app", "example.com/My_App.x", &long[1..]],
            &[
                "",
                "/app",
                "example.com/",
                "a/b/c",
                "Example.com/app",
                &long,
            ],
        );
        check(
            is_label_value,
            &["", "V1_2.3-x", &long[1..]],
            &["-db", "d b", "d\nb", "db.", &long],
        );
        check(
            is_subdomain,
            &["a", "a.b-c.d"],
            &["", ".", "a..b", "a_b", "A", &"x.".repeat(127)],
        );
        check(
            is_dns_label,
            &["sock-shop", "0", &long[1..]],
            &["", "a.b", "-a", "A", &long],
        );
        check(
            is_port_name,
            &["http", "8a", "grpc-web", "fifteen-letters"],
            &["", "80", "a--b", "-a", "HTTP", "sixteen-letters-"],
        );
    }
}
