//! Again and again: ask, compare, put into the index.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    mem::{Discriminant, discriminant},
    panic::AssertUnwindSafe,
    time::Duration,
};

use futures_util::FutureExt as _;
use rand::Rng as _;
use tokio::time::{Instant, sleep};

use super::{
    super::{
        Options, age,
        api::Pace,
        now,
        view::{Knowledge, Shared},
    },
    fetch::{Answer, Client},
    say,
    trouble::Trouble,
};
use crate::{
    backoff::Backoff,
    time::Timestamp,
    topology::{Objects, scope::Report},
};

/// Asking and reading takes at most one part in so many of the time.
const REST: u32 = 20;

/// However long a report takes, it is asked for this often.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// Keeps the index current.
pub(super) struct Follower {
    client: Client,
    shared: Shared,
    jitter: Duration,
    pace: Pace,
    backoff: Backoff,
    /// What is in the index.
    known: Option<Known>,
    /// Whether the last report was not believed.
    in_doubt: bool,
    heard: Timestamp,
    failures: u32,
    /// What was last complained about. The same is not said twice.
    complaint: Option<Discriminant<Trouble>>,
    /// What was wrong with the last report's nodes.
    warnings: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    hash: u64,
    pods: usize,
}

impl Follower {
    pub(super) fn new(client: Client, options: &Options, shared: Shared) -> Self {
        Self {
            client,
            shared,
            jitter: options.jitter,
            pace: options.pace,
            backoff: Backoff::default(),
            known: None,
            in_doubt: false,
            heard: Timestamp::default(),
            failures: 0,
            complaint: None,
            warnings: Vec::new(),
        }
    }

    /// Never ends.
    pub(super) async fn run(mut self) {
        let wait = rand::rng().random_range(Duration::ZERO..=self.jitter);
        sleep(wait).await;
        loop {
            let step = AssertUnwindSafe(self.step()).catch_unwind().await;
            let wait = step.unwrap_or_else(|_panic| {
                // The panic has printed what happened. The rest of the program can do with old names.
                tracing::error!("a defect: Scope's report is asked for anew");
                self.known = None;
                self.client.forget();
                LONGEST_REST
            });
            sleep(wait).await;
        }
    }

    /// Asks once; returns how long to wait.
    async fn step(&mut self) -> Duration {
        let begun = Instant::now();
        let answer = self.client.ask().await;
        let taken = match answer {
            Ok(Answer::Unchanged) => Ok(()),
            Ok(Answer::Report(report)) => self.take(report).await,
            Err(trouble) => Err(trouble),
        };
        match taken {
            Ok(()) => {
                self.is_current();
                let longest = LONGEST_REST.max(self.pace.poll);
                let wait = (begun.elapsed() * REST).clamp(self.pace.poll, longest);
                rand::rng().random_range(wait * 3 / 4..=wait * 5 / 4)
            }
            Err(trouble) => self.digest(&trouble),
        }
    }

    async fn take(&mut self, report: Report) -> Result<(), Trouble> {
        let Report { objects, warnings } = report;
        if objects.pods.is_empty() {
            self.client.forget();
            return Err(Trouble::NoPods);
        }
        if warnings != self.warnings {
            for warning in &warnings {
                tracing::warn!("Scope's report: {warning}");
            }
            self.warnings = warnings;
        }
        let found = Known {
            hash: hash(&objects),
            pods: objects.pods.len(),
        };
        if self.known.is_some_and(|known| known.hash == found.hash) {
            self.in_doubt = false;
            return Ok(());
        }
        // An app that was started anew learns of the cluster from one probe after the other.
        let shrunk = self.known.filter(|known| found.pods < known.pods / 2);
        if let Some(known) = shrunk.filter(|_| !self.in_doubt) {
            self.in_doubt = true;
            self.client.forget();
            tracing::warn!(
                known = known.pods,
                found = found.pods,
                "Scope knows less than half of the pods that it knew: it is believed if it says so again"
            );
            return Ok(());
        }
        self.in_doubt = false;
        let (services, nodes) = (objects.services.len(), objects.nodes.len());
        let shared = self.shared.clone();
        let replace = move || shared.write().replace(objects, now());
        tokio::task::spawn_blocking(replace).await?;
        let pods = found.pods;
        match self.known.replace(found) {
            None => tracing::info!(pods, services, nodes, "the cluster's objects are known"),
            Some(_) => tracing::debug!(pods, services, nodes, "the cluster has changed"),
        }
        Ok(())
    }

    fn is_current(&mut self) {
        self.heard = now();
        self.failures = 0;
        self.backoff.reset();
        if self.complaint.take().is_some() {
            tracing::info!("Scope is heard again");
        }
        say(&self.shared, Knowledge::Current);
    }

    /// Decides what to do after a failure, and how long to wait before.
    fn digest(&mut self, trouble: &Trouble) -> Duration {
        self.failures = self.failures.saturating_add(1);
        if self.known.is_some() {
            let since = self.heard;
            say(&self.shared, Knowledge::Stale { since });
        }
        if let Trouble::Unreachable(_) = trouble
            && let Err(error) = self.client.renew()
        {
            tracing::debug!(%error, "the old certificate authorities stay in use");
        }
        let asked = match trouble {
            Trouble::Refused { retry_after, .. } => retry_after.unwrap_or_default(),
            _ => Duration::ZERO,
        };
        let wait = self.backoff.next(&mut rand::rng()) + asked;
        self.complain(trouble, wait);
        wait
    }

    fn complain(&mut self, trouble: &Trouble, retry_in: Duration) {
        let complaint = Some(discriminant(trouble));
        if self.complaint == complaint || (trouble.is_ordinary() && self.failures == 1) {
            tracing::debug!(%trouble, ?retry_in, "no report of use");
            return;
        }
        self.complaint = complaint;
        if self.known.is_some() {
            let age = age(self.heard);
            tracing::warn!(error = %trouble, ?retry_in, ?age, "going on with what is known");
        } else {
            tracing::warn!(error = %trouble, ?retry_in, "nothing is named before Scope's report is there");
        }
    }
}

/// Every report differs from the last by its times and its order; this does not.
fn hash(objects: &Objects) -> u64 {
    let mut hasher = DefaultHasher::new();
    objects.hash(&mut hasher);
    hasher.finish()
}
