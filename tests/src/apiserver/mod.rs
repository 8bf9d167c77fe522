//! A small Kubernetes API server, on loopback and over real HTTP: lists, pages, watches with bookmarks, and everything
//! that can go wrong with them.
//!
//! It keeps whatever objects it is given and knows nothing of their kinds but their paths. Where it has a choice it does
//! as kube-apiserver 1.24 does, whose recorded answers are in `tests/fixtures/kube-1.24`.

mod answer;
mod forward;
mod store;

use std::{
    collections::BTreeSet,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    net::TcpListener,
    task::{JoinHandle, JoinSet},
};

use self::{answer::Watcher, forward::Doors, store::Store};

/// A running API server; it ends when this is dropped.
#[derive(Debug)]
pub struct ApiServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: Option<JoinHandle<()>>,
}

/// What is asked of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    /// A list, or a page of one.
    List,
    /// A watch.
    Watch,
}

/// A request that was made.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Such as `pods`.
    pub resource: String,
    /// What for.
    pub verb: Verb,
    /// The part of the URL after `?`.
    pub query: String,
    /// When.
    pub at: Instant,
}

/// An answer that is given as it is.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The body, in the parts in which it is sent.
    pub parts: Vec<Bytes>,
    /// What comes after it.
    pub end: End,
}

/// How an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// As it should.
    Whole,
    /// The connection breaks.
    Broken,
    /// It does not.
    Silence,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    store: Store,
    watchers: Vec<Watcher>,
    asked: Vec<Asked>,
    replies: Vec<(String, Verb, Reply)>,
    forbidden: BTreeSet<(String, Verb)>,
    token: Option<String>,
    delay: Duration,
    /// Whether lists of version 0 are cut into pages, as a server does that keeps no cache.
    pages_always: bool,
    bytes_watched: u64,
    doors: Doors,
    /// Ends of paths that nobody may ask for.
    closed: Vec<String>,
}

impl Reply {
    /// This status and body.
    #[must_use]
    pub fn new(status: u16, body: impl Into<Bytes>) -> Self {
        Self {
            status,
            parts: vec![body.into()],
            end: End::Whole,
        }
    }

    /// The same in parts of so many bytes.
    #[must_use]
    pub fn in_parts(mut self, bytes: usize) -> Self {
        let mut whole = self.parts.concat();
        self.parts.clear();
        while !whole.is_empty() {
            let rest = whole.split_off(bytes.min(whole.len()));
            self.parts.push(whole.into());
            whole = rest;
        }
        self
    }

    /// The same with another end.
    #[must_use]
    pub fn end(mut self, end: End) -> Self {
        self.end = end;
        self
    }
}

impl ApiServer {
    /// Starts it, without any object, on a free port.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared::default());
        let listening = Some(tokio::spawn(serve(listener, Arc::clone(&shared))));
        Ok(Self {
            address,
            shared,
            listening,
        })
    }

    /// Writes a kubeconfig for it. With `token_file`, that has the token.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_kubeconfig(&self, path: &Path, token_file: Option<&Path>) -> io::Result<()> {
        let user = token_file.map_or_else(
            || "{}".to_owned(),
            |path| format!("{{tokenFile: {}}}", path.display()),
        );
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             clusters: [{{name: test, cluster: {{server: 'http://{}'}}}}]\n\
             contexts: [{{name: test, context: {{cluster: test, user: test}}}}]\n\
             users: [{{name: test, user: {user}}}]\n",
            self.address
        );
        std::fs::write(path, text)
    }

    /// Creates an object, or changes it; its version is set.
    pub fn put(&self, resource: &str, object: Value) {
        let mut state = self.state();
        let event = state.store.put(resource, object);
        state.tell(resource, &event);
    }

    /// The same for the objects of a list of any kinds, as kubectl prints it.
    ///
    /// # Errors
    /// If it is no such list, or has objects of a kind that nobody here asks for.
    pub fn put_all(&self, list: &Value) -> Result<()> {
        for object in list["items"].as_array().context("no items")? {
            let resource = match object["kind"].as_str() {
                Some("Pod") => "pods",
                Some("Service") => "services",
                Some("EndpointSlice") => "endpointslices",
                Some("Node") => "nodes",
                Some("Namespace") => "namespaces",
                other => bail!("a {other:?}"),
            };
            self.put(resource, object.clone());
        }
        Ok(())
    }

    /// Deletes an object; says whether it was there.
    pub fn delete(&self, resource: &str, namespace: &str, name: &str) -> bool {
        let mut state = self.state();
        let event = state.store.delete(resource, namespace, name);
        if let Some(event) = &event {
            state.tell(resource, event);
        }
        event.is_some()
    }

    /// Tells all watchers of a resource that nothing is new.
    pub fn bookmark(&self, resource: &str) {
        let mut state = self.state();
        let line = state.store.bookmark();
        state.say(resource, &line);
    }

    /// Says something to all watchers of a resource.
    pub fn say(&self, resource: &str, line: &str) {
        self.state().say(resource, line);
    }

    /// The next request of this kind is answered like this. Several are used up in order.
    pub fn reply_once(&self, resource: &str, verb: Verb, reply: Reply) {
        let resource = resource.to_owned();
        self.state().replies.push((resource, verb, reply));
    }

    /// The same, in front of those that wait already.
    pub fn reply_first(&self, resource: &str, verb: Verb, reply: Reply) {
        let resource = resource.to_owned();
        self.state().replies.insert(0, (resource, verb, reply));
    }

    /// Breaks all watches in the middle of an event.
    pub fn break_watches(&self) {
        for watcher in self.state().watchers.drain(..) {
            watcher.breaks();
        }
    }

    /// Ends all watches, as happens when their time is up.
    pub fn end_watches(&self) {
        self.state().watchers.clear();
    }

    /// Forgets what happened: who wants to watch from an earlier version is told that it is too old.
    pub fn forget(&self) {
        self.state().store.forget();
    }

    /// Allows or forbids a request.
    pub fn allow(&self, resource: &str, verb: Verb, allowed: bool) {
        let key = (resource.to_owned(), verb);
        let forbidden = &mut self.state().forbidden;
        if allowed {
            forbidden.remove(&key);
        } else {
            forbidden.insert(key);
        }
    }

    /// From now on only requests with this token are answered.
    pub fn set_token(&self, token: &str) {
        self.state().token = Some(token.to_owned());
    }

    /// A token of a service account, named NAMESPACE/NAME, for one audience; bound to a pod on a node if one is named.
    #[must_use]
    pub fn token(&self, account: &str, audience: &str, node: Option<&str>) -> String {
        self.state().doors.token(account, audience, node)
    }

    /// The pod's port leads to the process that listens on this address.
    pub fn forward(&self, pod: &str, port: u16, address: SocketAddr) {
        let key = (pod.to_owned(), port);
        self.state().doors.ports.insert(key, address);
    }

    /// From now on nobody may forward ports, or ask for tokens, where the path ends like this.
    pub fn close(&self, path: &str) {
        self.state().closed.push(path.to_owned());
    }

    /// Every answer takes this long.
    pub fn set_delay(&self, delay: Duration) {
        self.state().delay = delay;
    }

    /// Lists of version 0 are cut into pages, too.
    pub fn keep_no_cache(&self) {
        self.state().pages_always = true;
    }

    /// Goes away: connections break, and new ones are refused.
    pub async fn leave(&mut self) {
        if let Some(listening) = self.listening.take() {
            listening.abort();
            // It is an error that it was aborted.
            drop(listening.await);
        }
        self.state().watchers.clear();
    }

    /// Comes back on the same port.
    ///
    /// # Errors
    /// If it is taken.
    pub async fn come_back(&mut self) -> io::Result<()> {
        let listener = TcpListener::bind(self.address).await?;
        self.listening = Some(tokio::spawn(serve(listener, Arc::clone(&self.shared))));
        Ok(())
    }

    /// What was asked so far.
    #[must_use]
    pub fn asked(&self) -> Vec<Asked> {
        self.state().asked.clone()
    }

    /// What was asked so far of a resource, as `list QUERY` and `watch QUERY`.
    #[must_use]
    pub fn asked_of(&self, resource: &str) -> Vec<String> {
        let state = self.state();
        let asked = state
            .asked
            .iter()
            .filter(|asked| asked.resource == resource);
        asked
            .map(|asked| match asked.verb {
                Verb::List => format!("list {}", asked.query),
                Verb::Watch => format!("watch {}", asked.query),
            })
            .collect()
    }

    /// How many watches are open.
    #[must_use]
    pub fn watches(&self) -> usize {
        let mut state = self.state();
        state.watchers.retain(|watcher| !watcher.has_ended());
        state.watchers.len()
    }

    /// How many bytes of events all watchers together were sent.
    #[must_use]
    pub fn bytes_watched(&self) -> u64 {
        self.state().bytes_watched
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if let Some(listening) = &self.listening {
            listening.abort();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn tell(&mut self, resource: &str, event: &store::Event) {
        let mut bytes = 0;
        self.watchers.retain(|watcher| {
            if watcher.resource != resource {
                return true;
            }
            match event.line(&watcher.selector) {
                Some(line) => {
                    bytes += line.len() as u64;
                    watcher.say(&line)
                }
                None => !watcher.has_ended(),
            }
        });
        self.bytes_watched += bytes;
    }

    fn say(&mut self, resource: &str, line: &str) {
        self.watchers
            .retain(|watcher| watcher.resource != resource || watcher.say(line));
    }
}

/// Accepts connections; they end with the task.
async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            return;
        };
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let shared = Arc::clone(&shared);
                async move {
                    match forward::answer(&shared, request).await {
                        Ok(answer) => Ok(answer),
                        Err(request) => answer::answer(&shared, &request).await,
                    }
                }
            });
            // How a connection ends is the client's business.
            drop(
                http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades()
                    .await,
            );
        });
        while connections.try_join_next().is_some() {}
    }
}
