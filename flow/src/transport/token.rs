//! Bearer tokens.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
    str::FromStr,
};

use ring::digest::{SHA256, digest};
use subtle::ConstantTimeEq as _;

/// The largest token file, in bytes. A service-account token has one to two KiB.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// A token. It is not shown by `Debug`, has no `Display`, and is compared in a time that tells nothing of it.
#[derive(Clone)]
pub struct Secret(String);

/// A file with a token, or with one a line: whoever checks takes any of them, whoever shows one shows the first. So a token
/// can be replaced without a moment at which either side has only one that the other does not know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenFile(PathBuf);

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read.
    #[error("token file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is nothing in it, or what cannot stand in an HTTP header.
    #[error("token file {}: line {line}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it. The line itself is not shown.
        problem: &'static str,
    },
}

impl Secret {
    /// Takes a token as it is.
    #[must_use]
    pub fn new(token: String) -> Self {
        Self(token)
    }

    /// The token itself, to be sent and for nothing else.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether it is this one.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        let hash = |secret: &Self| digest(&SHA256, secret.0.as_bytes());
        bool::from(hash(self).as_ref().ct_eq(hash(other).as_ref()))
    }

    /// What a table of tokens may be keyed by.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest(&SHA256, self.0.as_bytes()).as_ref());
        bytes
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl TokenFile {
    /// The file's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Reads the tokens, of which there is at least one.
    ///
    /// # Errors
    /// If the file cannot be read, or has no usable token in it.
    pub fn read(&self) -> Result<Vec<Secret>, TokenError> {
        let mut text = String::new();
        File::open(&self.0)
            .and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text))
            .map_err(|source| TokenError::Read {
                path: self.0.clone(),
                source,
            })?;
        let malformed = |line, problem| TokenError::Malformed {
            path: self.0.clone(),
            line,
            problem,
        };
        let mut tokens = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let token = line.trim();
            if token.is_empty() {
                continue;
            }
            if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(malformed(
                    number + 1,
                    "a token has printable ASCII characters only",
                ));
            }
            tokens.push(Secret(token.to_owned()));
        }
        if tokens.is_empty() {
            return Err(malformed(1, "there is no token"));
        }
        Ok(tokens)
    }

    /// The token to show.
    ///
    /// # Errors
    /// As for [`TokenFile::read`].
    pub fn first(&self) -> Result<Secret, TokenError> {
        // There is at least one.
        self.read().map(|mut tokens| tokens.swap_remove(0))
    }

    /// Whether one of the tokens is this one.
    ///
    /// # Errors
    /// As for [`TokenFile::read`].
    pub fn has(&self, shown: &Secret) -> Result<bool, TokenError> {
        // All are compared: where the right one stands is nobody's business either.
        let tokens = self.read()?;
        Ok(tokens
            .iter()
            .fold(false, |known, token| known | token.is(shown)))
    }
}

impl FromStr for TokenFile {
    type Err = std::convert::Infallible;

    fn from_str(path: &str) -> Result<Self, Self::Err> {
        Ok(Self(path.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::NamedTempFile, TokenFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let tokens = TokenFile(file.path().to_owned());
        (file, tokens)
    }

    #[test]
    fn any_line_is_taken_and_the_first_is_shown() {
        let (file, tokens) = file("one\n\n two \r\n");
        assert_eq!(tokens.first().unwrap().expose(), "one");
        let has = |token: &str| tokens.has(&Secret::new(token.to_owned())).unwrap();
        assert!(has("one") && has("two"));
        assert!(!has("") && !has("on") && !has("onetwo"));
        std::fs::write(file.path(), "three").unwrap();
        assert!(!has("one") && has("three"));
    }

    #[test]
    fn a_file_without_token_is_told_without_its_contents() {
        for (text, line) in [("", 1), ("\n \n", 1), ("good\nse cret", 2), ("sécret", 1)] {
            let (_file, tokens) = file(text);
            let error = tokens.read().unwrap_err().to_string();
            assert!(error.contains(&format!("line {line}: ")), "{error}");
            assert!(!error.contains("cret"), "{error}");
        }
        let missing = TokenFile("/nowhere/token".into()).read().unwrap_err();
        assert!(missing.to_string().contains("/nowhere/token"), "{missing}");
    }

    #[test]
    fn a_secret_does_not_show() {
        let secret = Secret::new("hunter2".to_owned());
        assert!(!format!("{secret:?} {:?}", Some(&secret)).contains("hunter2"));
    }
}
