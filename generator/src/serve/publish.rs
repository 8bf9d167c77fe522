//! Keeping the policy folder up to date.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use flow::wire::UDP_NOT_CAPTURED;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinError,
    time::{Instant, sleep},
};
use tracing::{error, info, warn};

use super::keeper::{Snapshot, SnapshotRequest};
use crate::{
    evaluate::{InvalidPolicy, Policies, Proof, World, prove},
    folder::{self, Changes, FolderError},
    policy::{self, Notice, Options, Reason, Unwatched},
};

/// The least time between two looks at the ledger: flows come in every second, and most change no policy.
const PAUSE: Duration = Duration::from_secs(1);

/// How many times as long to pause as the last look and its files took: a large ledger must not keep the keeper from its
/// batches.
const PAUSE_FACTOR: u32 = 4;

/// What is published, and where.
#[derive(Clone, Debug)]
pub struct Publication {
    /// The folder that `kubectl apply -f` is pointed at.
    pub folder: PathBuf,
    /// How its policies are made.
    pub options: Options,
    /// Whether it is left alone as long as the ledger lacks something.
    pub strict: bool,
}

/// Why the folder could not be brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The folder could not be written.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// A policy cannot be expressed in YAML.
    #[error("cannot write a policy as YAML: {0}")]
    Yaml(#[from] serde_json::Error),
    /// A policy is none that the API server would take.
    #[error(transparent)]
    Invalid(#[from] InvalidPolicy),
    /// The task that wrote it did not come to its end.
    #[error("cannot write the folder: {0}")]
    Task(#[from] JoinError),
}

/// Brings a folder up to date.
#[derive(Debug)]
pub(super) struct Publisher {
    publication: Arc<Publication>,
    /// The revision of the ledger that the folder shows.
    shown: Option<u64>,
    /// How many notices of each reason were logged last.
    noticed: Option<BTreeMap<Reason, usize>>,
    /// How many edges the policies denied when that was last said.
    denied: usize,
    /// How many policies were for pods of which only others told when that was last said.
    unwatched: usize,
    /// Whether the last attempt failed: a folder that cannot be written stays so for a while, and is logged once.
    failing: bool,
    /// Whether the folder was left alone the last time, because of what the ledger lacks.
    holding: bool,
}

impl Publisher {
    pub(super) fn new(publication: Publication) -> Self {
        Self {
            publication: Arc::new(publication),
            shown: None,
            noticed: None,
            denied: 0,
            unwatched: 0,
            failing: false,
            holding: false,
        }
    }

    /// Brings the folder up to date with a snapshot.
    ///
    /// As long as nothing was seen of the chosen namespaces, the folder is left as it is: neither a generator that has
    /// just started and remembers nothing nor a mistyped namespace may take away the policies that are there. So it is as
    /// long as something was lost, if that was asked for.
    pub(super) async fn publish(&mut self, snapshot: Snapshot) -> Result<(), PublishError> {
        if self.shown == Some(snapshot.revision) {
            return Ok(());
        }
        let revision = snapshot.revision;
        if self.publication.strict && !snapshot.losses.is_empty() {
            self.hold(snapshot.losses.total());
            self.shown = Some(revision);
            self.failing = false;
            return Ok(());
        }
        self.holding = false;
        let publication = Arc::clone(&self.publication);
        // Making the policies is work for the processor, writing them for the disk.
        let write = move || {
            let plan = policy::plan(&snapshot.edges, &publication.options);
            let namespaces = &publication.options.namespaces;
            let all = plan.all();
            let files = plan.files(&all)?;
            if files.is_empty() {
                return Ok(None);
            }
            let policies = Policies::compile(plan.manifests(&all))?;
            let proof = prove(
                &snapshot.edges,
                &policies,
                &World::of_edges(&snapshot.edges),
            );
            let changes = folder::write(&publication.folder, &files, namespaces)?;
            report(&publication, &snapshot, &proof, files.len(), &changes);
            let unwatched = plan.unwatched(&all);
            Ok::<_, PublishError>(Some((counts(&plan.notices), unwatched, proof)))
        };
        if let Some((noticed, unwatched, proof)) = tokio::task::spawn_blocking(write).await?? {
            self.notice(noticed);
            self.warn_of_unwatched(&unwatched);
            self.warn_of_denied(&proof);
        }
        self.shown = Some(revision);
        self.failing = false;
        Ok(())
    }

    /// One line when it begins that the folder is left alone: what nobody saw may be missing in the policies.
    fn hold(&mut self, lost: u64) {
        if !self.holding {
            error!(
                lost,
                folder = %self.publication.folder.display(),
                "--strict: observations were lost, the policy folder is left as it is"
            );
        }
        self.holding = true;
    }

    /// One line for each reason whose notices have changed in number.
    fn notice(&mut self, counts: BTreeMap<Reason, usize>) {
        let before = self.noticed.get_or_insert_default();
        for (reason, edges) in &counts {
            if before.get(reason) != Some(edges) {
                info!(edges, %reason, "notice");
            }
        }
        for reason in before.keys().filter(|reason| !counts.contains_key(*reason)) {
            info!(edges = 0, %reason, "notice");
        }
        *before = counts;
    }

    /// One line when it has changed how many policies are for pods of which only the agents of others told.
    fn warn_of_unwatched(&mut self, unwatched: &[Unwatched]) {
        let policies = unwatched.len();
        if policies != self.unwatched
            && let Some(Unwatched { namespace, policy }) = unwatched.first()
        {
            warn!(
                policies,
                namespace,
                policy,
                "only the other ends' agents told of the pods of policies such as this: is an agent on their nodes?"
            );
        }
        self.unwatched = policies;
    }

    /// One line when it has changed how many connections that were seen the policies do not allow: those that were left out,
    /// each for a reason that a notice has.
    fn warn_of_denied(&mut self, proof: &Proof) {
        let denied = proof.denied.len();
        if denied != self.denied
            && let Some(first) = proof.denied.first()
        {
            let (client, server) = (&first.client, &first.server);
            let (port, protocol) = (first.port, first.protocol);
            warn!(denied, client, server, port, %protocol, "the policies deny edges that were seen, such as this");
        }
        self.denied = denied;
    }

    /// Publishes each change until the keeper has ended: what was there before is in the folder.
    pub(super) async fn follow(
        mut self,
        mut revision: watch::Receiver<u64>,
        snapshots: mpsc::Sender<SnapshotRequest>,
    ) -> Self {
        loop {
            if !self.failing && revision.changed().await.is_err() {
                return self;
            }
            let start = Instant::now();
            let (wanted, snapshot) = oneshot::channel();
            if snapshots.send(wanted).await.is_err() {
                return self;
            }
            let Ok(snapshot) = snapshot.await else {
                return self;
            };
            if let Err(failure) = self.publish(snapshot).await {
                if !self.failing {
                    error!(error = %failure, "policy folder is not up to date");
                }
                self.failing = true;
            }
            tokio::select! {
                () = sleep(PAUSE.max(start.elapsed() * PAUSE_FACTOR)) => {}
                () = snapshots.closed() => return self,
            }
        }
    }
}

fn counts(notices: &[Notice]) -> BTreeMap<Reason, usize> {
    let mut counts = BTreeMap::new();
    for notice in notices {
        *counts.entry(notice.reason).or_default() += 1;
    }
    counts
}

/// One line, where there is something to say.
fn report(
    publication: &Publication,
    snapshot: &Snapshot,
    proof: &Proof,
    policies: usize,
    changes: &Changes,
) {
    if changes.written.is_empty() && changes.removed.is_empty() {
        return;
    }
    info!(
        folder = %publication.folder.display(),
        policies,
        written = changes.written.len(),
        removed = changes.removed.len(),
        edges = snapshot.edges.len(),
        allowed = proof.allowed,
        denied = proof.denied.len(),
        open_but_never_seen = proof.never_seen,
        lost = snapshot.losses.total(),
        "policy folder is up to date"
    );
    for (node, reason, _) in snapshot.losses.iter() {
        if reason == UDP_NOT_CAPTURED {
            warn!(
                node,
                "UDP is not captured on this node: the policies may stop what was not seen"
            );
        }
    }
    if !snapshot.losses.is_empty() {
        warn!(
            lost = snapshot.losses.total(),
            "observations were lost: the policies may lack rules for connections that nobody saw"
        );
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::{policy::Namespaces, store::Losses};

    /// A look at the whole ledger is work for the keeper, just when its agents come.
    #[tokio::test(start_paused = true)]
    async fn the_ledger_is_looked_at_when_it_has_changed() {
        let folder = tempfile::tempdir().unwrap();
        let publisher = Publisher::new(Publication {
            folder: folder.path().to_owned(),
            options: Options::new(Namespaces::All),
            strict: false,
        });
        let (changes, revision) = watch::channel(0);
        let (wanted, mut snapshots) = mpsc::channel::<SnapshotRequest>(1);
        let following = tokio::spawn(publisher.follow(revision, wanted));
        let while_nothing_happens = Duration::from_secs(3_600);
        for revision in 1..=3 {
            timeout(while_nothing_happens, snapshots.recv())
                .await
                .unwrap_err();
            changes.send_replace(revision);
            let answer = snapshots.recv().await.unwrap();
            answer
                .send(Snapshot {
                    revision,
                    edges: Vec::new(),
                    losses: Losses::default(),
                })
                .unwrap();
        }
        drop(changes);
        assert_eq!(following.await.unwrap().shown, Some(3));
    }
}
