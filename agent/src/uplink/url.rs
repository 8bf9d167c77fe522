//! The generator's address.

use std::{fmt, str::FromStr};

use tokio_tungstenite::tungstenite::http::Uri;

/// A WebSocket URL with a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeneratorUrl(Uri);

impl GeneratorUrl {
    pub(super) fn uri(&self) -> &Uri {
        &self.0
    }

    /// The host, an IPv6 address without its brackets.
    pub(super) fn host(&self) -> &str {
        let host = self.0.host().unwrap_or_default();
        host.strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host)
    }

    pub(super) fn port(&self) -> u16 {
        let default = if self.is_encrypted() { 443 } else { 80 };
        self.0.port_u16().unwrap_or(default)
    }

    /// Whether the connection is to be encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.0.scheme_str() == Some("wss")
    }
}

impl fmt::Display for GeneratorUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for GeneratorUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|error| format!("{error}"))?;
        match uri.scheme_str() {
            Some("ws" | "wss") => {}
            Some(other) => {
                return Err(format!("scheme `{other}`: only ws:// and wss:// are known"));
            }
            None => return Err("no scheme: expected wss://HOST:PORT/agents".to_owned()),
        }
        if uri.path() != flow::wire::AGENTS_PATH {
            return Err(format!(
                "path `{}`: the generator takes agents at `{}`",
                uri.path(),
                flow::wire::AGENTS_PATH
            ));
        }
        if uri
            .authority()
            .is_some_and(|host| host.as_str().contains('@'))
        {
            return Err("a URL is no place for a password: give --token-file".to_owned());
        }
        Ok(Self(uri))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_addresses_are_taken() {
        assert!("ws://generator:8765/agents".parse::<GeneratorUrl>().is_ok());
        let parsed = |text: &str| text.parse::<GeneratorUrl>().unwrap();
        let loopback = parsed("ws://[::1]:8765/agents");
        assert_eq!((loopback.host(), loopback.port()), ("::1", 8765));
        let default = parsed("wss://generator/agents");
        assert_eq!((default.host(), default.port()), ("generator", 443));
        for bad in [
            "generator:8765",
            "http://generator:8765/agents",
            "ws://generator:8765",
            "ws://generator:8765/other",
            "ws://user:password@generator:8765/agents",
            "/agents",
            "",
        ] {
            assert!(bad.parse::<GeneratorUrl>().is_err(), "{bad}");
        }
    }
}
