//! The life of one kind: list, watch, and what to do when either fails.

use std::{
    mem::{Discriminant, discriminant},
    panic::AssertUnwindSafe,
    time::Duration,
};

use futures_util::FutureExt as _;
use kube::{Client, core::params::WatchParams};
use rand::Rng as _;
use tokio::time::{Instant, sleep, timeout};

use super::{
    super::{
        Options, age, now,
        view::{Knowledge, Shared},
    },
    access,
    kind::Kind,
    lines::Lines,
    list::{self, Freshness},
    parse::{self, Event, MAX_OBJECT_BYTES, MAX_OBJECTS},
    trouble::{Trouble, Verb},
};
use crate::{backoff::Backoff, time::Timestamp};

/// How long a watch lasts, in seconds. Each is drawn from the range, so that those of many agents do not end together.
const WATCH_SECONDS: std::ops::RangeInclusive<u32> = 300..=600;

/// How much longer than it was to last a silent watch is believed in.
const WATCH_MARGIN: Duration = Duration::from_secs(10);

/// A watch that is shorter than this and says nothing is a failure.
const SHORTEST_WATCH: Duration = Duration::from_secs(1);

/// For so long after a watch has begun its events may tell of what happened while there was none: an API server has that in
/// memory. It may also say by then that it has it no more, in a response that began well.
const CATCHING_UP: Duration = Duration::from_secs(1);

/// A watch that ends so long before its time was ended for a reason that may have ended all others, too.
const EARLY: Duration = Duration::from_secs(5);

/// Watches that were ended early are asked for again at a time drawn from this span, so that those of many agents do not
/// come back in step.
const RETURN: Duration = Duration::from_secs(1);

/// How often something must be refused in a row until nobody waits for it any more. Rights that are granted together with
/// our start arrive a moment after it.
const REFUSALS: u32 = 4;

/// The longest time for which the API server can send us away.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(300);

/// Keeps one kind's objects in the index current.
pub(super) struct Follower {
    kind: Kind,
    selector: Option<String>,
    options: Options,
    client: Client,
    shared: Shared,
    next: Step,
    backoff: Backoff,
    /// What was refused last, and how often in a row.
    refused: Option<(Verb, u32)>,
    /// When the API server last said something about this kind.
    heard: Timestamp,
    /// Failures since a watch last said something.
    failures: u32,
    /// What was last complained about. The same is not said twice.
    complaint: Option<Complaint>,
}

/// What is the same complaint: a right that is missing is another one for each verb.
type Complaint = (Discriminant<Trouble>, Option<Verb>);

/// What is to be done next.
#[derive(Clone, Debug)]
enum Step {
    List(Freshness),
    /// Watch what happens after this version.
    Watch(String),
}

impl Follower {
    pub(super) fn new(
        kind: Kind,
        selector: Option<String>,
        options: &Options,
        client: Client,
        shared: Shared,
    ) -> Self {
        Self {
            kind,
            selector,
            options: options.clone(),
            client,
            shared,
            next: Step::List(Freshness::Any),
            backoff: Backoff::default(),
            refused: None,
            heard: Timestamp::default(),
            failures: 0,
            complaint: None,
        }
    }

    /// Never ends.
    pub(super) async fn run(mut self) {
        let wait = rand::rng().random_range(Duration::ZERO..=self.options.jitter);
        sleep(wait).await;
        loop {
            if AssertUnwindSafe(self.follow())
                .catch_unwind()
                .await
                .is_err()
            {
                // The panic has printed what happened. The rest of the program can do with old names.
                tracing::error!(kind = %self.kind, "a defect: the objects are listed anew");
                self.next = Step::List(Freshness::Newest);
                sleep(self.options.pace.refused).await;
            }
        }
    }

    async fn follow(&mut self) {
        loop {
            let done = match self.next.clone() {
                Step::List(freshness) => self.list(&freshness).await,
                Step::Watch(version) => self.watch(&version).await,
            };
            if let Err(trouble) = done {
                let wait = self.digest(&trouble);
                sleep(wait).await;
                if trouble.may_be_the_client() {
                    self.renew_client().await;
                }
            }
        }
    }

    async fn list(&mut self, freshness: &Freshness) -> Result<(), Trouble> {
        let (version, listed) = list::all(
            &self.client,
            self.kind,
            self.selector.as_deref(),
            freshness,
            self.options.pace,
        )
        .await?;

        let (kind, shared, count) = (self.kind, self.shared.clone(), listed.objects.len());
        if listed.malformed > 1 {
            let malformed = listed.malformed;
            tracing::warn!(%kind, malformed, "objects are malformed and left out; the first one was named");
        }
        let replace = move || kind.replace(&mut shared.write(), listed.objects, now());
        tokio::task::spawn_blocking(replace).await?;
        tracing::debug!(%kind, count, version, "listed");
        self.next = Step::Watch(version);
        self.is_current(Verb::List);
        Ok(())
    }

    async fn watch(&mut self, version: &str) -> Result<(), Trouble> {
        let seconds = rand::rng().random_range(WATCH_SECONDS);
        let params = WatchParams {
            field_selector: self.selector.clone(),
            timeout: Some(seconds),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = kube::core::Request::new(self.kind.path())
            .watch(&params, version)
            .map_err(|error| Trouble::Malformed(error.to_string()))?;
        let response = access::open(&self.client, Verb::Watch, request, self.options.pace).await?;

        let began = Instant::now();
        let mut said_something = false;
        let mut caught_up = false;
        let was_away = matches!(self.shared.knowledge(self.kind), Knowledge::Stale { .. });
        let drawn = Duration::from_secs(seconds.into());
        let mut patience = drawn + WATCH_MARGIN;
        let mut lines = Lines::new(response, MAX_OBJECT_BYTES);
        loop {
            let wait = if caught_up {
                patience
            } else {
                CATCHING_UP.saturating_sub(began.elapsed())
            };
            let line = match timeout(wait, lines.next()).await {
                Ok(Ok(None)) => break,
                Ok(line) => line?,
                Err(_elapsed) if caught_up => return Err(Trouble::Silent(patience)),
                Err(_elapsed) => None,
            };
            let event = line.map(|line| parse::event(self.kind, &line));
            let event = event.transpose()?;
            if !caught_up && began.elapsed() >= CATCHING_UP {
                caught_up = true;
                self.is_current(Verb::Watch);
            }
            let Some(event) = event else { continue };
            let version = match event {
                Event::Change { change, version } => {
                    let mut index = self.shared.write();
                    let now = now();
                    let is_late = was_away && !caught_up;
                    let since = if is_late { self.heard } else { now };
                    index.apply_late(*change, since, now);
                    if self.kind.held(&index) > MAX_OBJECTS {
                        return Err(Trouble::TooMany(MAX_OBJECTS));
                    }
                    version
                }
                Event::Bookmark { version } => {
                    patience = self.options.pace.bookmarks;
                    version
                }
                Event::Malformed { version } => version,
            };
            self.next = Step::Watch(version);
            if caught_up {
                self.heard = now();
            }
            said_something = true;
            self.succeeded();
        }
        if said_something || began.elapsed() > SHORTEST_WATCH {
            self.succeeded();
            self.is_current(Verb::Watch);
            if began.elapsed() + EARLY < drawn {
                let pause = rand::rng().random_range(Duration::ZERO..=RETURN);
                sleep(pause).await;
            }
            Ok(())
        } else {
            Err(Trouble::Fruitless)
        }
    }

    fn succeeded(&mut self) {
        self.backoff.reset();
        self.failures = 0;
    }

    /// Reads again what says how to reach the API server: tokens and certificates are renewed while we run.
    async fn renew_client(&mut self) {
        match access::client(&self.options.access).await {
            Ok(client) => self.client = client,
            Err(error) => {
                tracing::debug!(%error, "the old configuration for the Kubernetes API stays in use");
            }
        }
    }

    /// What the index has is what the API server has.
    fn is_current(&mut self, by: Verb) {
        self.heard = now();
        if self.refused.is_some_and(|(verb, _)| verb == by) {
            self.refused = None;
        }
        // A watch that is not allowed is not made up for by a list.
        if self.refused.is_none() && self.complaint.take().is_some() {
            tracing::info!(kind = %self.kind, "the API server is heard again");
        }
        self.shared.set_knowledge(self.kind, Knowledge::Current);
    }

    /// Decides what to do after a failure, and how long to wait before.
    fn digest(&mut self, trouble: &Trouble) -> Duration {
        let verb = match &self.next {
            Step::List(_) => Verb::List,
            Step::Watch(_) => Verb::Watch,
        };
        let known = self.shared.knowledge(self.kind);
        let refusals = self.count_refusal(verb, trouble);
        self.failures = self.failures.saturating_add(1);
        match known {
            Knowledge::Current => {
                let since = self.heard;
                self.shared
                    .set_knowledge(self.kind, Knowledge::Stale { since });
            }
            Knowledge::Awaited if refusals >= REFUSALS => {
                self.shared.set_knowledge(self.kind, Knowledge::Refused);
            }
            Knowledge::Awaited | Knowledge::Refused | Knowledge::Stale { .. } => {}
        }
        self.next = self.next.after(trouble);

        let random = &mut rand::rng();
        // What makes one watch start anew may do so to all agents' watches, and lists are what they must not ask for in step.
        let spread = match (verb, &self.next) {
            (Verb::Watch, Step::List(_)) => self.options.jitter,
            _ => Duration::ZERO,
        };
        let wait = if refusals >= REFUSALS {
            let refused = self.options.pace.refused;
            random.random_range(refused / 2..=refused)
        } else {
            let asked = match trouble {
                Trouble::Refused { retry_after, .. } => retry_after.unwrap_or_default(),
                _ => Duration::ZERO,
            };
            let asked = asked.min(LONGEST_RETRY_AFTER);
            self.backoff.next(random) + asked + random.random_range(Duration::ZERO..=spread)
        };
        self.complain(trouble, known, wait);
        wait
    }

    fn count_refusal(&mut self, verb: Verb, trouble: &Trouble) -> u32 {
        if !trouble.is_refusal() {
            return 0;
        }
        let before = match self.refused {
            Some((refused, count)) if refused == verb => count,
            _ => 0,
        };
        let count = before.saturating_add(1);
        self.refused = Some((verb, count));
        count
    }

    fn complain(&mut self, trouble: &Trouble, known: Knowledge, retry_in: Duration) {
        let kind = self.kind;
        let verb = match trouble {
            Trouble::Forbidden { verb, .. } => Some(*verb),
            _ => None,
        };
        let complaint = Some((discriminant(trouble), verb));
        let new = self.complaint != complaint;
        if !new || (trouble.is_ordinary() && self.failures == 1) {
            tracing::debug!(%kind, %trouble, ?retry_in, "no answer of use");
            return;
        }
        self.complaint = complaint;
        if let Trouble::Forbidden { verb, message } = trouble {
            let without = match (kind, known) {
                (Kind::Pods, Knowledge::Awaited | Knowledge::Refused) => "nothing is named before",
                _ => "names that take them are missing",
            };
            tracing::warn!(
                server = message,
                ?retry_in,
                "not allowed to {verb} {kind}: {without}. The account's RBAC rule needs the verbs \
                 get, list and watch on the resource {kind} of the API group \"{}\"",
                kind.group()
            );
            return;
        }
        match known {
            Knowledge::Current => {
                let age = age(self.heard);
                tracing::warn!(%kind, error = %trouble, ?retry_in, ?age, "going on with what is known");
            }
            _ => tracing::warn!(%kind, error = %trouble, ?retry_in, "trying again"),
        }
    }
}

impl Step {
    fn after(&self, trouble: &Trouble) -> Self {
        match (self, trouble) {
            (Self::List(freshness), _) => Self::List(freshness.after(trouble)),
            // What happened since is not to be had one by one; or not at all, and then asking now and then is better than
            // nothing.
            (
                Self::Watch(version),
                Trouble::Expired(_)
                | Trouble::Forbidden { .. }
                | Trouble::Unserved
                | Trouble::TooMany(_)
                | Trouble::EventTooLong(_)
                | Trouble::Refused {
                    code: 400 | 422, ..
                }
                | Trouble::Malformed(_),
            ) => Self::List(Freshness::NotOlderThan(version.clone())),
            (Self::Watch(_), _) => self.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_that_cannot_be_watched_is_not_watched_for_ever() {
        let watch = Step::Watch("7".to_owned());
        let refused = |code| Trouble::Refused {
            code,
            message: String::new(),
            retry_after: None,
        };
        let lists = |trouble| matches!(watch.after(&trouble), Step::List(_));
        assert!(lists(Trouble::EventTooLong(1)));
        assert!(lists(refused(400)) && lists(refused(422)) && lists(Trouble::Unserved));
        assert!(!lists(refused(429)) && !lists(refused(503)) && !lists(Trouble::Fruitless));
    }
}
