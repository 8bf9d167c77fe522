//! Where Scope's app answers.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use http::Uri;

/// `http://APP:4040/api/report`, or with `https`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReportUrl {
    uri: Uri,
    ca: Option<PathBuf>,
}

impl ReportUrl {
    /// The host: a name or an address, an IPv6 address without brackets.
    pub(super) fn host(&self) -> &str {
        let host = self.uri.host().unwrap_or_default();
        host.trim_start_matches('[').trim_end_matches(']')
    }

    /// The port, or that of the scheme.
    pub(super) fn port(&self) -> u16 {
        let default = if self.is_encrypted() { 443 } else { 80 };
        self.uri.port_u16().unwrap_or(default)
    }

    /// Host and port as they stand in the URL.
    pub(super) fn authority(&self) -> &str {
        self.uri
            .authority()
            .map_or("", |authority| authority.as_str())
    }

    /// What comes after that.
    pub(super) fn path_and_query(&self) -> &str {
        self.uri.path_and_query().map_or("/", |path| path.as_str())
    }

    /// The authorities that the app's certificate must come from, if not the system's.
    pub(super) fn ca(&self) -> Option<&Path> {
        self.ca.as_deref()
    }

    pub(in super::super) fn set_ca(&mut self, ca: Option<PathBuf>) {
        self.ca = ca;
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.uri.scheme_str() == Some("https")
    }
}

impl FromStr for ReportUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let uri: Uri = text.parse().map_err(|error| format!("{text}: {error}"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err(format!("{text}: expected http:// or https://"));
        }
        if uri.host().is_none_or(str::is_empty) || uri.authority().is_none() {
            return Err(format!("{text}: the host is missing"));
        }
        if uri
            .authority()
            .is_some_and(|authority| authority.as_str().contains('@'))
        {
            // Whoever lists processes would read it.
            return Err("a URL with a password is not taken".to_owned());
        }
        let host = uri.host().map_or(0, str::len);
        if uri.port_u16().is_none() && uri.authority().is_some_and(|own| own.as_str().len() > host)
        {
            return Err(format!("{text}: the port is no number"));
        }
        if matches!(uri.path(), "" | "/") {
            return Err(format!(
                "{text}: the path is missing; the app answers at {}/api/report",
                text.trim_end_matches('/')
            ));
        }
        Ok(Self { uri, ca: None })
    }
}

impl fmt::Display for ReportUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.uri.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        for (text, host, port, path) in [
            ("http://app:4040/api/report", "app", 4040, "/api/report"),
            (
                "https://scope.example/x/api/report?a=b",
                "scope.example",
                443,
                "/x/api/report?a=b",
            ),
            ("http://[fd00::1]/api/report", "fd00::1", 80, "/api/report"),
        ] {
            let url: ReportUrl = text.parse().unwrap();
            assert_eq!(
                (url.host(), url.port(), url.path_and_query()),
                (host, port, path)
            );
            assert_eq!(url.to_string(), text);
        }
    }

    #[test]
    fn what_cannot_be_asked_is_refused_with_a_reason() {
        for (text, reason) in [
            ("ftp://app/api/report", "http"),
            ("http:///api/report", "invalid"),
            ("http://app:4040", "http://app:4040/api/report"),
            ("http://app:4040/", "http://app:4040/api/report"),
            ("http://app:port/api/report", "the port is no number"),
        ] {
            let error = text.parse::<ReportUrl>().unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        let error = "http://me:secret@app/api/report"
            .parse::<ReportUrl>()
            .unwrap_err();
        assert!(
            error.contains("password") && !error.contains("secret"),
            "{error}"
        );
    }
}
