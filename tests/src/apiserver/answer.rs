//! From request to response.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Instant};

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::{AUTHORIZATION, CONTENT_TYPE},
};
use tokio::sync::mpsc;

use super::{
    Asked, End, Reply, Shared, State, Verb,
    store::{Page, Refusal, Selector},
};

/// The connection is to break.
#[derive(Debug)]
pub(super) struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("broken on purpose")
    }
}

impl std::error::Error for Broken {}

pub(super) type Body = BoxBody<Bytes, Broken>;

/// An open watch.
#[derive(Debug)]
pub(super) struct Watcher {
    pub(super) resource: String,
    pub(super) selector: Selector,
    sender: mpsc::UnboundedSender<Result<Bytes, Broken>>,
}

impl Watcher {
    /// Says whether somebody was there to hear it.
    pub(super) fn say(&self, line: &str) -> bool {
        self.sender.send(Ok(format!("{line}\n").into())).is_ok()
    }

    pub(super) fn breaks(self) {
        let half = Ok(Bytes::from_static(b"{\"type\":\"MODIFIED\",\"obj"));
        // Somebody who is gone notices nothing.
        drop(
            self.sender
                .send(half)
                .and_then(|()| self.sender.send(Err(Broken))),
        );
    }

    pub(super) fn has_ended(&self) -> bool {
        self.sender.is_closed()
    }
}

pub(super) async fn answer(
    shared: &Shared,
    request: &Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let (asked, query) = match understand(request) {
        Some(understood) => understood,
        None => {
            return Ok(status(
                404,
                "NotFound",
                "the server could not find the requested resource",
            ));
        }
    };
    let delay = {
        let mut state = shared.state();
        state.asked.push(asked.clone());
        state.delay
    };
    tokio::time::sleep(delay).await;
    let token = request.headers().get(AUTHORIZATION).cloned();
    let token = token.as_ref().and_then(|token| token.to_str().ok());
    let mut state = shared.state();
    Ok(state.answer(&asked, &query, token))
}

/// What the URL asks for, and its query.
fn understand(request: &Request<Incoming>) -> Option<(Asked, BTreeMap<String, String>)> {
    let path = request.uri().path();
    let resource = path
        .strip_prefix("/api/v1/")
        .or_else(|| path.strip_prefix("/apis/discovery.k8s.io/v1/"))?;
    let text = request.uri().query().unwrap_or_default();
    let query: BTreeMap<String, String> = text
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.replace("%3D", "=")))
        .collect();
    let verb = if query.get("watch").is_some_and(|watch| watch == "true") {
        Verb::Watch
    } else {
        Verb::List
    };
    let asked = Asked {
        resource: resource.to_owned(),
        verb,
        query: text.trim_start_matches('&').to_owned(),
        at: Instant::now(),
    };
    Some((asked, query))
}

impl State {
    fn answer(
        &mut self,
        asked: &Asked,
        query: &BTreeMap<String, String>,
        token: Option<&str>,
    ) -> Response<Body> {
        let wanted = self.token.as_ref().map(|token| format!("Bearer {token}"));
        if wanted.is_some() && wanted.as_deref() != token {
            return status(401, "Unauthorized", "Unauthorized");
        }
        let (resource, verb) = (asked.resource.as_str(), asked.verb);
        if self.forbidden.contains(&(resource.to_owned(), verb)) {
            let verb = match verb {
                Verb::List => "list",
                Verb::Watch => "watch",
            };
            let message = format!(
                "{resource} is forbidden: User \"viewer\" cannot {verb} resource \"{resource}\" in API group \"\" at the cluster scope"
            );
            return status(403, "Forbidden", &message);
        }
        let prepared = self
            .replies
            .iter()
            .position(|(of, on, _)| of == resource && *on == verb);
        if let Some(position) = prepared {
            return self.replies.remove(position).2.into_response();
        }
        let answered = match verb {
            Verb::List => self.list(resource, query),
            Verb::Watch => self.watch(resource, query),
        };
        answered.unwrap_or_else(|refusal| match refusal {
            Refusal::TooNew { wanted, current } => {
                let message = format!("Too large resource version: {wanted}, current: {current}");
                status(504, "Timeout", &message)
            }
            Refusal::TooOld { wanted, current } => {
                let message = format!("too old resource version: {wanted} ({current})");
                let line = format!(
                    "{{\"type\":\"ERROR\",\"object\":{}}}\n",
                    status_text(410, "Expired", &message)
                );
                Reply::new(200, line).into_response()
            }
        })
    }

    fn list(
        &self,
        resource: &str,
        query: &BTreeMap<String, String>,
    ) -> Result<Response<Body>, Refusal> {
        let number = |key: &str| query.get(key).and_then(|value| value.parse::<u64>().ok());
        let version = number("resourceVersion");
        self.store.reaches(version.unwrap_or_default())?;
        let from_cache = version.is_some() && !self.pages_always;
        let limit = number("limit").filter(|_| !from_cache);
        let page = self.store.list(
            resource,
            &Selector::of(query),
            limit.map(|limit| usize::try_from(limit).unwrap_or(usize::MAX)),
            query.get("continue").map(String::as_str),
        );
        Ok(respond(200, list_body(page)))
    }

    fn watch(
        &mut self,
        resource: &str,
        query: &BTreeMap<String, String>,
    ) -> Result<Response<Body>, Refusal> {
        let version = query.get("resourceVersion").and_then(|v| v.parse().ok());
        let selector = Selector::of(query);
        let missed = self
            .store
            .since(resource, version.unwrap_or_default(), &selector)?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let watcher = Watcher {
            resource: resource.to_owned(),
            selector,
            sender,
        };
        for line in missed {
            self.bytes_watched += line.len() as u64;
            watcher.say(&line);
        }
        self.watchers.push(watcher);
        let lines = stream::unfold(receiver, |mut receiver| async {
            let line = receiver.recv().await?;
            Some((line.map(Frame::data), receiver))
        });
        Ok(respond(200, BodyExt::boxed(StreamBody::new(lines))))
    }
}

impl Selector {
    fn of(query: &BTreeMap<String, String>) -> Self {
        let fields = query.get("fieldSelector").map_or("", String::as_str);
        let field = |name: &str| {
            let mut terms = fields.split(',').filter_map(|term| term.split_once('='));
            terms
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.to_owned())
        };
        Self {
            name: field("metadata.name"),
            node: field("spec.nodeName"),
        }
    }
}

/// Objects are put into the response one by one: all of a large cluster's would be a large text.
fn list_body(page: Page) -> Body {
    let next = page
        .next
        .map_or_else(String::new, |next| format!(",\"continue\":\"{next}\""));
    let head = format!(
        "{{\"kind\":\"List\",\"apiVersion\":\"v1\",\"metadata\":{{\"resourceVersion\":\"{}\"{next}}},\"items\":[",
        page.version
    );
    let items = page.items.into_iter().enumerate().map(|(i, text)| {
        let comma = if i == 0 { "" } else { "," };
        Arc::<str>::from(format!("{comma}{text}"))
    });
    let texts = std::iter::once(Arc::from(head))
        .chain(items)
        .chain([Arc::from("]}")]);
    let frames = texts.map(|text| Ok(Frame::data(Bytes::copy_from_slice(text.as_bytes()))));
    BodyExt::boxed(StreamBody::new(stream::iter(frames)))
}

impl Reply {
    fn into_response(self) -> Response<Body> {
        let parts = self.parts.into_iter().map(|part| Ok(Frame::data(part)));
        let end = self.end;
        let ending = stream::unfold((), move |()| async move {
            match end {
                End::Whole => None,
                End::Broken => Some((Err(Broken), ())),
                End::Silence => std::future::pending().await,
            }
        });
        let body = futures_util::StreamExt::chain(stream::iter(parts), Box::pin(ending));
        respond(self.status, BodyExt::boxed(StreamBody::new(body)))
    }
}

pub(super) fn status(code: u16, reason: &str, message: &str) -> Response<Body> {
    reply(code, status_text(code, reason, message))
}

pub(super) fn reply(code: u16, text: String) -> Response<Body> {
    let body = Full::new(Bytes::from(text)).map_err(|never: Infallible| match never {});
    respond(code, BodyExt::boxed(body))
}

fn status_text(code: u16, reason: &str, message: &str) -> String {
    serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    })
    .to_string()
}

fn respond(code: u16, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_REQUEST);
    let json = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}
