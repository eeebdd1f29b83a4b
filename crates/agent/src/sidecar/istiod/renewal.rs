//! Keeps a workload's certificate fresh: from the disk, or from istiod; renewed at half of its life.

use super::{Credentials, certificate};
use crate::store::{self, StoredIdentity, with_source};
use jiff::{SignedDuration, Timestamp};
use onboarding_runtime::backoff::Backoff;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// Renews as long as it is held.
pub(in crate::sidecar) struct Renewal {
    credentials: watch::Sender<Credentials>,
    pub(in crate::sidecar) standing: watch::Receiver<Standing>,
    _task: AbortOnDropHandle<()>,
}

/// Where the certificate stands.
#[derive(Clone, Default)]
pub(in crate::sidecar) struct Standing {
    /// The newest; what has expired too.
    pub identity: Option<StoredIdentity>,
    /// Why there is no valid one.
    pub problem: Option<String>,
}

/// A suspended VM's clock jumps, and this one's doesn't.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
const LARGEST: u64 = 1 << 20;

impl Renewal {
    /// What is kept at `path` is used while it is valid; what is new is kept there.
    pub(in crate::sidecar) fn start(credentials: Credentials, path: PathBuf) -> Self {
        let (credentials, wanted) = watch::channel(credentials);
        let (said, standing) = watch::channel(Standing::default());
        let task = AbortOnDropHandle::new(tokio::spawn(keep(wanted, path, said)));
        Self { credentials, standing, _task: task }
    }

    /// A new token, other roots, another address: used from now on.
    pub(in crate::sidecar) fn with(&self, credentials: Credentials) {
        self.credentials.send_if_modified(|current| {
            let changed = *current != credentials;
            *current = credentials;
            changed
        });
    }
}

async fn keep(mut wanted: watch::Receiver<Credentials>, path: PathBuf, said: watch::Sender<Standing>) {
    let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(60));
    let mut again_at = None;
    // So that those who started together don't renew together.
    let early = rand::random::<f64>() * 0.1;
    let kept = read(&path).filter(|identity| identity.spiffe_id == wanted.borrow().spiffe_id);
    said.send_modify(|standing| standing.identity = kept);
    loop {
        let now = Timestamp::now();
        let credentials = wanted.borrow_and_update().clone();
        let mut standing = said.borrow().clone();
        let current = standing.identity.take().filter(|identity| identity.spiffe_id == credentials.spiffe_id);
        let due = current.as_ref().map_or(now, |identity| renew_at(identity, early));
        let due = due.max(again_at.unwrap_or(Timestamp::MIN));
        if due <= now {
            match certificate(&credentials, current.as_ref()).await {
                Ok(identity) => {
                    tracing::info!(
                        spiffe_id = identity.spiffe_id,
                        expires_at = %identity.expires_at,
                        "got a certificate of istiod"
                    );
                    write(&path, &identity);
                    backoff.reset();
                    again_at = None;
                    said.send_replace(Standing { identity: Some(identity), problem: None });
                }
                Err(error) => {
                    let why = with_source(&error);
                    let retry_in = backoff.next_delay();
                    tracing::warn!(why, ?retry_in, "no certificate of istiod");
                    again_at = Some(after(Timestamp::now(), retry_in));
                    // What is valid stays in use.
                    let valid = current.as_ref().is_some_and(|identity| identity.expires_at > Timestamp::now());
                    said.send_replace(Standing { identity: current, problem: (!valid).then_some(why) });
                }
            }
            continue;
        }
        let left = Duration::try_from(due.duration_since(now)).unwrap_or_default() + Duration::from_millis(1);
        tokio::select! {
            () = tokio::time::sleep(left.min(LONGEST_SLEEP)) => {}
            changed = wanted.changed() => match changed {
                // What was refused with the last token may not be with this one.
                Ok(()) => {
                    backoff.reset();
                    again_at = None;
                }
                Err(_) => return,
            },
        }
    }
}

/// At half of its life, or a little earlier.
fn renew_at(identity: &StoredIdentity, early: f64) -> Timestamp {
    let life = identity.expires_at.duration_since(identity.obtained_at).as_secs_f64().max(0.0);
    let half = SignedDuration::try_from_secs_f64(life * (0.5 - early)).unwrap_or(SignedDuration::ZERO);
    identity.obtained_at.checked_add(half).unwrap_or(Timestamp::MAX)
}

fn after(moment: Timestamp, duration: Duration) -> Timestamp {
    moment.checked_add(duration).unwrap_or(Timestamp::MAX)
}

fn read(path: &Path) -> Option<StoredIdentity> {
    let bytes = store::read_bounded(path, LARGEST).ok().flatten()?;
    serde_json::from_slice(&bytes).ok()
}

/// A failure to write is said, and does not end what works.
fn write(path: &Path, identity: &StoredIdentity) {
    let bytes = serde_json::to_vec(identity).unwrap_or_default();
    if let Err(error) = store::write_atomically(path, &bytes, 0o600) {
        tracing::error!(error = %with_source(&error), "can't keep the certificate on disk; after a reboot istiod must be reachable");
    }
}
