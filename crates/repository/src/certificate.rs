//! The certificate of a repository that runs by itself: from a directory, where a Secret is mounted.

use onboarding_endpoint::backend::{ConfigSource, Snapshot, TlsMaterial};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The kubelet takes a minute to bring a new Secret.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Of `tls.crt` or `tls.key`, in bytes.
const MOST: u64 = 1 << 20;

/// `tls.crt` and `tls.key` of a directory, in PEM.
pub struct Mounted {
    directory: PathBuf,
    snapshots: watch::Sender<Arc<Snapshot>>,
}

impl ConfigSource for Mounted {
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshots.subscribe()
    }
}

impl Mounted {
    pub fn new(directory: PathBuf) -> Self {
        let first = Arc::new(snapshot(&directory, 1));
        Self { directory, snapshots: watch::Sender::new(first) }
    }

    /// Reads the files again and again until `stop`.
    pub async fn follow(&self, stop: &CancellationToken) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = looks.tick() => {}
            }
            let (directory, generation) = (self.directory.clone(), self.snapshots.borrow().generation + 1);
            let Ok(newest) = tokio::task::spawn_blocking(move || snapshot(&directory, generation)).await else {
                return;
            };
            self.snapshots.send_if_modified(|held| {
                let changed = held.tls != newest.tls;
                if changed {
                    *held = Arc::new(newest);
                }
                changed
            });
        }
    }
}

/// A file that isn't there is a certificate that isn't there.
fn snapshot(directory: &Path, generation: u64) -> Snapshot {
    let read = |name: &str| {
        let file = directory.join(name);
        let small = std::fs::metadata(&file).ok()?.len() <= MOST;
        small.then(|| std::fs::read_to_string(file).ok())?
    };
    let tls = read("tls.crt").zip(read("tls.key"));
    let tls = tls.map(|(certificate_chain, private_key)| Arc::new(TlsMaterial { certificate_chain, private_key }));
    Snapshot { generation, tls, ..Snapshot::default() }
}
