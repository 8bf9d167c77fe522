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
            Some("ws") => {}
            Some(other) => return Err(format!("scheme `{other}`: only ws:// is known")),
            None => return Err("no scheme: expected ws://HOST:PORT/agents".to_owned()),
        }
        if uri.path() != flow::wire::AGENTS_PATH {
            return Err(format!(
                "path `{}`: the generator takes agents at `{}`",
                uri.path(),
                flow::wire::AGENTS_PATH
            ));
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
        assert!("ws://[::1]:8765/agents".parse::<GeneratorUrl>().is_ok());
        for bad in [
            "generator:8765",
            "http://generator:8765/agents",
            "ws://generator:8765",
            "ws://generator:8765/other",
            "/agents",
            "",
        ] {
            assert!(bad.parse::<GeneratorUrl>().is_err(), "{bad}");
        }
    }
}
