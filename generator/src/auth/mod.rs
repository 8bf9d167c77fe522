//! Who may report, and who may read.
//!
//! Agents show a bearer token: one of a file's, or their pod's service-account token, which is checked by a TokenReview
//! and then also says on which node the pod is. Readers show a token of another file, or one of another service account: who
//! may report may not read, nor the other way round. Certificates of clients are checked in the TLS handshake, before anything else is heard.

mod places;
mod review;

use std::net::{IpAddr, SocketAddr};

use flow::{
    source::{Access, ConnectError},
    transport::{Secret, ServerFiles, ServerTls, TlsError, TokenError, TokenFile},
};

pub use self::review::{Account, AccountError};
use self::review::{Holder, Reviewer};

/// What is asked of those who connect.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Agents show one of these tokens.
    pub tokens: Option<TokenFile>,
    /// Or the service-account token of their pod.
    pub review: Option<Review>,
    /// Readers show one of these.
    pub read_tokens: Option<TokenFile>,
    /// Connections are encrypted, and perhaps clients show a certificate.
    pub tls: Option<ServerFiles>,
    /// Nothing need be asked of agents, wherever they are.
    pub insecure: bool,
}

/// How service-account tokens are checked.
#[derive(Clone, Debug)]
pub struct Review {
    /// How to reach the API server.
    pub access: Access,
    /// The audience that tokens are issued for.
    pub audience: String,
    /// The account of the agents.
    pub agents: Account,
    /// That of the readers, if they may show a token of one.
    pub readers: Option<Account>,
}

/// Why the rules cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// Anybody could report.
    #[error(
        "{0} can be reached from other machines: give --token-file, --token-audience or --client-ca, or say --insecure"
    )]
    Open(SocketAddr),
    /// By a token of both, nobody could say whether it is to report or to read.
    #[error("{0} is --agent-account and --reader-account: who may report may not read")]
    OneAccount(Account),
    /// A token file is unusable.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// A certificate, a key or an authority is.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// There is no way to the API server.
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

/// Why somebody is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No token was shown.
    #[error("a bearer token is needed")]
    NoToken,
    /// It is not known, or expired, or of another audience or account.
    #[error("the bearer token is not valid here")]
    WrongToken,
    /// Nobody may read.
    #[error(
        "reading is not permitted: this generator has no --read-token-file and no --reader-account"
    )]
    NoReading,
    /// It cannot be found out at the moment.
    #[error("the bearer token cannot be checked now")]
    Unavailable,
}

/// What is known of an agent that is let in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// The node that its token belongs to, if the token says so.
    pub node: Option<String>,
}

/// Follows the rules.
#[derive(Debug)]
pub struct Gate {
    tokens: Option<TokenFile>,
    reviewer: Option<Reviewer>,
    read_tokens: Option<TokenFile>,
    tls: Option<ServerTls>,
    client_ca: bool,
}

impl Rules {
    /// Checks the rules for this address, and makes them ready to be followed.
    ///
    /// # Errors
    /// If they let anybody in who can reach a port that is not this machine's own, or if a file is unusable.
    pub async fn gate(self, listen: SocketAddr) -> Result<Gate, RulesError> {
        let client_ca = self.tls.as_ref().is_some_and(|tls| tls.client_ca.is_some());
        let asks = self.tokens.is_some() || self.review.is_some() || client_ca;
        if !asks && !self.insecure && !listen.ip().is_loopback() {
            return Err(RulesError::Open(listen));
        }
        if let Some(review) = &self.review
            && review.readers.as_ref() == Some(&review.agents)
        {
            return Err(RulesError::OneAccount(review.agents.clone()));
        }
        for file in [&self.tokens, &self.read_tokens].into_iter().flatten() {
            file.read()?;
        }
        Ok(Gate {
            tokens: self.tokens,
            reviewer: match self.review {
                Some(review) => Some(Reviewer::new(review).await?),
                None => None,
            },
            read_tokens: self.read_tokens,
            tls: self.tls.map(ServerTls::new).transpose()?,
            client_ca,
        })
    }
}

impl Gate {
    /// How connections are encrypted, if they are.
    #[must_use]
    pub fn tls(&self) -> Option<&ServerTls> {
        self.tls.as_ref()
    }

    /// Whether who shows this from there may report.
    ///
    /// # Errors
    /// If not, or if that cannot be found out.
    pub async fn agent(&self, shown: Option<&Secret>, from: IpAddr) -> Result<Admission, Denied> {
        if self.tokens.is_none() && self.reviewer.is_none() {
            return Ok(Admission::default());
        }
        let shown = shown.ok_or(Denied::NoToken)?;
        if let Some(tokens) = &self.tokens
            && has(tokens, shown)?
        {
            return Ok(Admission::default());
        }
        match &self.reviewer {
            Some(reviewer) => match reviewer.holder_of(shown, from).await? {
                Holder::Agent(node) => Ok(Admission { node: Some(node) }),
                Holder::Reader => Err(Denied::WrongToken),
            },
            None => Err(Denied::WrongToken),
        }
    }

    /// Whether who shows this from there may read.
    ///
    /// # Errors
    /// If not, or if that cannot be found out.
    pub async fn reader(&self, shown: Option<&Secret>, from: IpAddr) -> Result<(), Denied> {
        let reviewer = self.reviewer.as_ref().filter(|one| one.knows_readers());
        if self.read_tokens.is_none() && reviewer.is_none() {
            let open = self.tokens.is_none() && self.reviewer.is_none() && !self.client_ca;
            return if open { Ok(()) } else { Err(Denied::NoReading) };
        }
        let shown = shown.ok_or(Denied::NoToken)?;
        if let Some(tokens) = &self.read_tokens
            && has(tokens, shown)?
        {
            return Ok(());
        }
        match reviewer {
            Some(reviewer) => match reviewer.holder_of(shown, from).await? {
                Holder::Reader => Ok(()),
                Holder::Agent(_) => Err(Denied::WrongToken),
            },
            None => Err(Denied::WrongToken),
        }
    }
}

fn has(tokens: &TokenFile, shown: &Secret) -> Result<bool, Denied> {
    tokens.has(shown).map_err(|error| {
        tracing::warn!(%error, "tokens cannot be checked");
        Denied::Unavailable
    })
}

#[cfg(test)]
mod tests;
