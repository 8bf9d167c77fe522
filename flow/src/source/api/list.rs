//! Lists: what to ask for, and how the answer is taken apart while it arrives.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{AsyncBufRead, AsyncBufReadExt as _};
use http::Request;
use kube::{
    Client,
    core::params::{ListParams, VersionMatch},
};
use tokio::{sync::mpsc, time::timeout};

use super::{
    super::feed::Feed,
    access,
    kind::Kind,
    pace::Pace,
    parse::{self, Listed, Page},
    trouble::{Trouble, Verb},
};

/// Objects in one page, where the API server pages.
const PAGE: u32 = 500;

/// Chunks of a response that wait for the parser, each at most the client's read buffer of some hundred KiB; when they are
/// as many, the connection is not read any further.
const CHUNKS: usize = 4;

/// How new a list must be. That decides what it costs the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Freshness {
    /// As new as the API server's cache. It ignores the size of pages then, unless it keeps no cache of the kind.
    Any,
    /// From the cache, too, but not older than what we know: API servers differ in how far they are.
    NotOlderThan(String),
    /// The newest, which may have to be read from etcd; in pages, which makes it bearable.
    Newest,
    /// The same in one piece, because etcd forgot the version while we were turning pages.
    NewestInOnePiece,
}

impl Freshness {
    /// The request for a list, or for the page of it that `token` stands for.
    pub(super) fn request(
        &self,
        kind: Kind,
        selector: Option<&str>,
        token: Option<&str>,
    ) -> Result<Request<Vec<u8>>, Trouble> {
        let mut params = ListParams {
            field_selector: selector.map(str::to_owned),
            continue_token: token.map(str::to_owned),
            ..ListParams::default()
        };
        match self {
            Self::Any | Self::Newest => params.limit = Some(PAGE),
            Self::NotOlderThan(version) => {
                params.resource_version = Some(version.clone());
                params.version_match = Some(VersionMatch::NotOlderThan);
            }
            Self::NewestInOnePiece => {}
        }
        let malformed = |error: &dyn std::error::Error| Trouble::Malformed(error.to_string());
        let mut request = kube::core::Request::new(kind.path())
            .list(&params)
            .map_err(|error| malformed(&error))?;
        if *self == Self::Any && token.is_none() {
            // kube leaves version 0 out where there is a limit, and so would ask for the newest.
            let uri = format!("{}&resourceVersion=0", request.uri());
            *request.uri_mut() = uri
                .parse()
                .map_err(|error: http::uri::InvalidUri| malformed(&error))?;
        }
        Ok(request)
    }

    /// How to ask after this happened to the last list.
    pub(super) fn after(&self, trouble: &Trouble) -> Self {
        match (self, trouble) {
            (Self::Any | Self::Newest, Trouble::Expired(_)) => Self::NewestInOnePiece,
            // 504 says that the server's cache is behind, and stays so; 400 and 422 that the server is too old to be asked
            // like this.
            (
                Self::NotOlderThan(_),
                Trouble::Expired(_)
                | Trouble::Refused {
                    code: 400 | 422 | 504,
                    ..
                },
            ) => Self::Newest,
            _ => self.clone(),
        }
    }
}

/// Reads a whole list, page by page. Returns its version, too.
pub(super) async fn all(
    client: &Client,
    kind: Kind,
    selector: Option<&str>,
    freshness: &Freshness,
    pace: Pace,
) -> Result<(String, Listed), Trouble> {
    let mut listed = Listed::default();
    let mut token: Option<String> = None;
    let version = loop {
        let request = freshness.request(kind, selector, token.as_deref())?;
        let response = access::open(client, Verb::List, request, pace).await?;
        let (page, all) = read(kind, response, pace.silence, listed).await?;
        listed = all;
        match page.token {
            Some(next) => token = Some(next),
            None => break page.version,
        }
    };
    let version = version.ok_or_else(|| Trouble::Malformed("a list without version".to_owned()))?;
    Ok((version, listed))
}

/// The newest list.
pub(super) async fn newest(
    client: &Client,
    kind: Kind,
    selector: Option<&str>,
    pace: Pace,
) -> Result<Listed, Trouble> {
    let paged = all(client, kind, selector, &Freshness::Newest, pace).await;
    let listed = match paged {
        Err(Trouble::Expired(_)) => {
            all(client, kind, selector, &Freshness::NewestInOnePiece, pace).await
        }
        listed => listed,
    };
    listed.map(|(_, listed)| listed)
}

/// Reads a page from a response; its objects are added to `listed`.
///
/// It is parsed on a thread for blocking work: the task's own has other things to do during a hundred thousand pods.
async fn read(
    kind: Kind,
    response: impl AsyncBufRead + Unpin,
    silence: Duration,
    listed: Listed,
) -> Result<(Page, Listed), Trouble> {
    let (sender, receiver) = mpsc::channel(CHUNKS);
    let feed = Feed::new(receiver);
    let parsing = tokio::task::spawn_blocking(move || parse::page(kind, feed, listed));
    let pumped = pump(response, silence, sender).await;
    let parsed = parsing.await?;
    // Where the response broke off, that says more than that the text ends too early.
    pumped?;
    parsed
}

/// Ends with the response, or when the parser has enough. If it is dropped, the parser finds the text to end.
async fn pump(
    mut response: impl AsyncBufRead + Unpin,
    silence: Duration,
    chunks: mpsc::Sender<Bytes>,
) -> Result<(), Trouble> {
    loop {
        let read = timeout(silence, response.fill_buf()).await;
        let chunk = read.or(Err(Trouble::Silent(silence)))??;
        if chunk.is_empty() {
            return Ok(());
        }
        let length = chunk.len();
        let chunk = Bytes::copy_from_slice(chunk);
        response.consume_unpin(length);
        if chunks.send(chunk).await.is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(freshness: &Freshness, token: Option<&str>, expected: &str) {
        let request = freshness.request(Kind::Pods, Some("spec.nodeName=a"), token);
        let uri = request.unwrap().uri().to_string();
        let rest = uri.strip_prefix("/api/v1/pods?&fieldSelector=spec.nodeName%3Da");
        assert_eq!(rest, Some(expected), "{uri}");
    }

    #[test]
    fn a_list_is_asked_for_where_it_is_cheap() {
        check(&Freshness::Any, None, "&limit=500&resourceVersion=0");
        check(&Freshness::Any, Some("x"), "&limit=500&continue=x");
        check(
            &Freshness::NotOlderThan("7".into()),
            None,
            "&resourceVersion=7&resourceVersionMatch=NotOlderThan",
        );
        check(&Freshness::Newest, None, "&limit=500");
        check(&Freshness::NewestInOnePiece, None, "");
    }

    #[test]
    fn what_the_cache_cannot_give_is_asked_of_etcd() {
        let known = Freshness::NotOlderThan("7".into());
        let expired = Trouble::Expired(String::new());
        let refused = |code| Trouble::Refused {
            code,
            message: String::new(),
            retry_after: None,
        };
        assert_eq!(known.after(&expired), Freshness::Newest);
        assert_eq!(known.after(&refused(504)), Freshness::Newest);
        assert_eq!(known.after(&refused(503)), known);
        assert_eq!(
            Freshness::Newest.after(&expired),
            Freshness::NewestInOnePiece
        );
        assert_eq!(Freshness::Any.after(&expired), Freshness::NewestInOnePiece);
        assert_eq!(Freshness::Any.after(&refused(504)), Freshness::Any);
    }
}
