//! Service-account tokens, checked by the API server.

use std::{
    collections::HashMap,
    fmt,
    net::IpAddr,
    str::FromStr,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use flow::{
    source::{self, ConnectError},
    transport::Secret,
};
use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, UserInfo},
    core::v1::Pod,
};
use kube::{Api, Client, api::PostParams};
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use super::{Denied, Review, places::Places};

/// How long a valid token is not asked for again: so long it goes on being valid after it was revoked.
const REMEMBER_VALID: Duration = Duration::from_secs(60);

/// How long an invalid one is not.
const REMEMBER_INVALID: Duration = Duration::from_secs(10);

/// The most tokens that are remembered; more than there are agents.
const MAX_REMEMBERED: usize = 8_192;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest token, in bytes.
const MAX_TOKEN: usize = 16 << 10;

/// Where the API server says whose a token is.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

/// A service account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    namespace: String,
    name: String,
}

/// What is no account.
#[derive(Debug, thiserror::Error)]
#[error("expected NAMESPACE/NAME")]
pub struct AccountError;

impl FromStr for Account {
    type Err = AccountError;

    fn from_str(text: &str) -> Result<Self, AccountError> {
        match text.split_once('/') {
            Some((namespace, name))
                if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
            {
                Ok(Self {
                    namespace: namespace.to_owned(),
                    name: name.to_owned(),
                })
            }
            _ => Err(AccountError),
        }
    }
}

/// As the API server calls it.
impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "system:serviceaccount:{}:{}", self.namespace, self.name)
    }
}

/// Asks the API server.
pub(super) struct Reviewer {
    client: Client,
    audience: String,
    agents: Account,
    readers: Option<Account>,
    /// By the tokens' fingerprints: tokens themselves are not kept.
    remembered: Mutex<HashMap<[u8; 32], Remembered>>,
    places: Places,
}

struct Remembered {
    /// Of a valid token.
    holder: Option<Holder>,
    until: Instant,
}

/// Whose a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// The agent on this node.
    Agent(String),
    /// Who may read.
    Reader,
}

impl fmt::Debug for Reviewer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reviewer")
            .field("audience", &self.audience)
            .field("agents", &self.agents)
            .field("readers", &self.readers)
            .finish_non_exhaustive()
    }
}

impl Reviewer {
    pub(super) async fn new(review: Review) -> Result<Self, ConnectError> {
        Ok(Self {
            client: source::client(&review.access).await?,
            audience: review.audience,
            agents: review.agents,
            readers: review.readers,
            remembered: Mutex::default(),
            places: Places::new(),
        })
    }

    /// Whether there is anybody who may read by a token of an account.
    pub(super) fn knows_readers(&self) -> bool {
        self.readers.is_some()
    }

    /// Whose the token is that was shown from this address.
    pub(super) async fn holder_of(&self, token: &Secret, from: IpAddr) -> Result<Holder, Denied> {
        if token.expose().len() > MAX_TOKEN {
            return Err(Denied::WrongToken);
        }
        let fingerprint = token.fingerprint();
        if let Some(holder) = self.remembered(&fingerprint) {
            return holder.ok_or(Denied::WrongToken);
        }
        let Ok(_place) = self.places.take(from).await else {
            return Err(Denied::Unavailable);
        };
        let holder = match timeout(PATIENCE, self.ask(token)).await {
            Ok(Ok(holder)) => holder,
            Ok(Err(error)) => {
                warn!(%error, "tokens cannot be checked by the API server");
                return Err(Denied::Unavailable);
            }
            Err(_elapsed) => {
                warn!("the API server does not answer: tokens cannot be checked");
                return Err(Denied::Unavailable);
            }
        };
        self.remember(fingerprint, holder.clone());
        holder.ok_or(Denied::WrongToken)
    }

    fn remembered(&self, fingerprint: &[u8; 32]) -> Option<Option<Holder>> {
        let remembered = self
            .remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let known = remembered.get(fingerprint)?;
        (Instant::now() < known.until).then(|| known.holder.clone())
    }

    fn remember(&self, fingerprint: [u8; 32], holder: Option<Holder>) {
        let now = Instant::now();
        let until = now
            + match holder {
                Some(_) => REMEMBER_VALID,
                None => REMEMBER_INVALID,
            };
        let mut remembered = self
            .remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= MAX_REMEMBERED {
            remembered.retain(|_, known| now < known.until);
        }
        if remembered.len() >= MAX_REMEMBERED {
            // Strangers must not push out who belongs here.
            remembered.retain(|_, known| known.holder.is_some());
        }
        if remembered.len() < MAX_REMEMBERED {
            remembered.insert(fingerprint, Remembered { holder, until });
        }
    }

    /// `None` if the token is not valid, or of an account that has no business here.
    async fn ask(&self, token: &Secret) -> Result<Option<Holder>, kube::Error> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                audiences: Some(vec![self.audience.clone()]),
                token: token.expose().to_owned(),
            },
            ..TokenReview::default()
        };
        let reviews: Api<TokenReview> = Api::all(self.client.clone());
        let answer = reviews.create(&PostParams::default(), &review).await?;
        let Some(status) = answer.status else {
            return Ok(None);
        };
        let audience = status
            .audiences
            .iter()
            .flatten()
            .any(|one| *one == self.audience);
        let Some(user) = status
            .user
            .filter(|_| status.authenticated == Some(true) && audience)
        else {
            debug!("token refused by the API server");
            return Ok(None);
        };
        let is = |account: &Account| user.username.as_deref() == Some(&account.to_string());
        if self.readers.as_ref().is_some_and(is) {
            return Ok(Some(Holder::Reader));
        }
        if !is(&self.agents) {
            warn!(user = user.username, "a token of another account was shown");
            return Ok(None);
        }
        let node = match extra(&user, NODE_NAME) {
            Some(node) => Some(node.to_owned()),
            None => self.node_of_pod(&user).await?,
        };
        Ok(node.map(Holder::Agent))
    }

    /// Where the API server does not say the node (before Kubernetes 1.30): by the pod, which the token is bound to.
    async fn node_of_pod(&self, user: &UserInfo) -> Result<Option<String>, kube::Error> {
        let (Some(name), Some(uid)) = (extra(user, POD_NAME), extra(user, POD_UID)) else {
            warn!("the agents' token is not bound to a pod: a projected one is");
            return Ok(None);
        };
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.agents.namespace);
        let Some(pod) = pods.get_opt(name).await? else {
            return Ok(None);
        };
        let same = pod.metadata.uid.as_deref() == Some(uid);
        Ok(pod.spec.filter(|_| same).and_then(|spec| spec.node_name))
    }
}

fn extra<'a>(user: &'a UserInfo, key: &str) -> Option<&'a str> {
    user.extra.as_ref()?.get(key)?.first().map(String::as_str)
}
