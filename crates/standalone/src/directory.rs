//! The manifests directory: read at start, and again whenever something in it changes.

mod assemble;
mod scan;

use crate::mesh::MeshConfig;
use assemble::{Assembled, Files};
use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use onboarding_core::policy::PolicySet;
use onboarding_endpoint::backend::{ConfigSource, FaultLog, Snapshot};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

/// A change is read when this long nothing followed it, so that a file that is being written is read when it is whole.
const QUIET: Duration = Duration::from_millis(30);
/// Or this long after it at the latest: a policy that is withdrawn ends sessions within a second.
const PATIENCE: Duration = Duration::from_millis(150);
/// What the kernel doesn't report (a network file system) is found this late.
const POLL: Duration = Duration::from_secs(15);
/// The same while directories can't be watched.
const POLL_UNWATCHED: Duration = Duration::from_millis(500);

/// The configuration as of the last reading.
pub struct ManifestDirectory {
    snapshot: watch::Sender<Arc<Snapshot>>,
    mesh: watch::Sender<Arc<MeshConfig>>,
}

/// Who else has something to say in `Snapshot.faults`.
pub struct OtherFaults {
    /// Asked at each reading.
    pub own: Box<dyn Fn() -> Vec<String> + Send>,
    /// Of what becomes of the mesh's part.
    pub mesh: watch::Receiver<Vec<String>>,
}

impl ManifestDirectory {
    /// Reads the directory, and starts a task that follows it until `stop`. `uid`: the plane's, where the ControlPlane names none.
    pub fn start(
        root: &Path,
        uid: String,
        mut others: OtherFaults,
        metrics: &mut prometheus_client::registry::Registry,
        stop: CancellationToken,
    ) -> (Arc<Self>, tokio::task::JoinHandle<()>) {
        let directory =
            Arc::new(Self { snapshot: watch::Sender::new(Arc::default()), mesh: watch::Sender::new(Arc::default()) });
        let changed = Arc::new(Notify::new());
        let mut reader = Reader {
            root: root.to_owned(),
            uid,
            files: Files::default(),
            assembled: Assembled::default(),
            watches: Watches::new(root, changed.clone()),
            policies: Arc::default(),
            said: FaultLog::default(),
            directory: directory.clone(),
            metrics: Metrics::register(metrics),
            own_faults: others.own,
        };
        reader.read();
        reader.publish(&others.mesh.borrow_and_update().clone());
        let task = tokio::spawn(async move {
            loop {
                let mut only_mesh_faults = false;
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = changed.notified() => settle(&changed).await,
                    () = tokio::time::sleep(reader.poll_interval()) => {}
                    Ok(()) = others.mesh.changed() => only_mesh_faults = true,
                }
                let mesh_faults = others.mesh.borrow_and_update().clone();
                // Reading may take a while (many files): not on a worker.
                let read = tokio::task::spawn_blocking(move || {
                    if !only_mesh_faults {
                        reader.read();
                    }
                    reader.publish(&mesh_faults);
                    reader
                });
                match read.await {
                    Ok(returned) => reader = returned,
                    Err(error) => {
                        tracing::error!(%error, "reading the manifests failed; changes are no longer followed");
                        return;
                    }
                }
            }
        });
        (directory, task)
    }

    pub fn mesh(&self) -> watch::Receiver<Arc<MeshConfig>> {
        self.mesh.subscribe()
    }
}

impl ConfigSource for ManifestDirectory {
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.subscribe()
    }
}

/// Waits until nothing changed for a moment.
async fn settle(changed: &Notify) {
    let deadline = tokio::time::sleep(PATIENCE);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            () = &mut deadline => return,
            () = tokio::time::sleep(QUIET) => return,
            () = changed.notified() => {}
        }
    }
}

struct Reader {
    root: PathBuf,
    uid: String,
    files: Files,
    assembled: Assembled,
    watches: Watches,
    policies: Arc<PolicySet>,
    said: FaultLog,
    directory: Arc<ManifestDirectory>,
    metrics: Metrics,
    own_faults: Box<dyn Fn() -> Vec<String> + Send>,
}

impl Reader {
    /// Reads until nothing new is to be watched, so that no change falls between reading and watching.
    fn read(&mut self) {
        let mut scan = scan::scan(&self.root);
        for _ in 0..8 {
            if !self.watches.follow(&scan.watch) {
                break;
            }
            scan = scan::scan(&self.root);
        }
        let assembled = self.files.assemble(scan, &self.uid);
        self.metrics.readings.inc();
        if self.directory.snapshot.borrow().generation > 0 && assembled.policies == self.assembled.policies {
            self.assembled = assembled;
            return;
        }
        self.policies = Arc::new(PolicySet::compile(assembled.policies.clone()));
        self.assembled = assembled;
    }

    fn publish(&mut self, mesh_faults: &[String]) {
        let assembled = &self.assembled;
        let mut faults = assembled.faults.clone();
        faults.extend(self.watches.fault.clone());
        faults.extend((self.own_faults)());
        faults.extend_from_slice(mesh_faults);
        self.said.say(&faults, &assembled.warnings);
        self.metrics.faults.set(faults.len() as i64);
        self.metrics.policy_unreadable.set(i64::from(assembled.policy_unreadable));
        self.metrics.stale_files.set(assembled.stale_files as i64);

        let next = Snapshot {
            plane: assembled.plane.clone().map(Arc::new),
            tls: assembled.tls.clone().map(Arc::new),
            policies: self.policies.clone(),
            groups: assembled.groups.iter().map(|(name, group)| (name.clone(), Arc::new(group.clone()))).collect(),
            policy_unreadable: assembled.policy_unreadable,
            faults,
            ..Snapshot::default()
        };
        if let Some(generation) = next.publish(&self.directory.snapshot) {
            self.metrics.generation.set(generation as i64);
            tracing::info!(
                generation,
                policies = assembled.policies.len(),
                groups = assembled.groups.len(),
                sidecars = assembled.mesh.sidecars.len(),
                services = assembled.mesh.services.len() + assembled.mesh.service_entries.len(),
                "the manifests were read"
            );
        }
        self.directory.mesh.send_if_modified(|held| {
            let differs = **held != assembled.mesh;
            if differs {
                *held = Arc::new(assembled.mesh.clone());
            }
            differs
        });
    }

    fn poll_interval(&self) -> Duration {
        if self.watches.fault.is_some() { POLL_UNWATCHED } else { POLL }
    }
}

/// Which directories the kernel reports changes of.
struct Watches {
    watcher: Option<RecommendedWatcher>,
    held: BTreeSet<(PathBuf, u64, u64)>,
    /// Why some can't be watched.
    fault: Option<String>,
}

impl Watches {
    fn new(root: &Path, changed: Arc<Notify>) -> Self {
        let root = root.to_owned();
        let beside = root.parent().and_then(|parent| parent.canonicalize().ok());
        let made = notify::recommended_watcher(move |event: notify::Result<Event>| {
            let matters = event.map_or(true, |event| {
                written(event.kind)
                    && (event.paths.is_empty()
                        || event.paths.iter().any(|path| concerns(&root, beside.as_deref(), path)))
            });
            if matters {
                changed.notify_one();
            }
        });
        match made {
            Ok(watcher) => Self { watcher: Some(watcher), held: BTreeSet::new(), fault: None },
            Err(error) => Self { watcher: None, held: BTreeSet::new(), fault: Some(unwatched(&error)) },
        }
    }

    /// Whether something is watched now that wasn't before.
    fn follow(&mut self, wanted: &BTreeSet<(PathBuf, u64, u64)>) -> bool {
        let Some(watcher) = &mut self.watcher else { return false };
        for (path, ..) in self.held.difference(wanted) {
            // It may be gone, and its watch with it.
            let _ = watcher.unwatch(path);
        }
        self.held.retain(|directory| wanted.contains(directory));
        self.fault = None;
        let mut more = false;
        for directory in wanted {
            if self.held.contains(directory) {
                continue;
            }
            match watcher.watch(&directory.0, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    self.held.insert(directory.clone());
                    more = true;
                }
                Err(error) => self.fault = Some(unwatched(&error)),
            }
        }
        more
    }
}

fn unwatched(error: &notify::Error) -> String {
    format!(
        "changes of the manifests are found only by looking every {POLL_UNWATCHED:?}: {error}; raise fs.inotify.max_user_watches or fs.inotify.max_user_instances"
    )
}

/// Reading is no change (and our own reading least of all).
fn written(kind: EventKind) -> bool {
    !matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

/// Whether an event is about the manifests: of what happens beside the root, only what happens to its own name.
fn concerns(root: &Path, beside: Option<&Path>, path: &Path) -> bool {
    path.parent() != beside || path.file_name() == root.file_name()
}

struct Metrics {
    readings: Counter,
    faults: Gauge,
    policy_unreadable: Gauge,
    stale_files: Gauge,
    generation: Gauge,
}

impl Metrics {
    fn register(registry: &mut prometheus_client::registry::Registry) -> Self {
        let metrics = Self {
            readings: Counter::default(),
            faults: Gauge::default(),
            policy_unreadable: Gauge::default(),
            stale_files: Gauge::default(),
            generation: Gauge::default(),
        };
        registry.register(
            "onboarding_manifests_readings",
            "How often the manifests directory was read",
            metrics.readings.clone(),
        );
        registry.register(
            "onboarding_manifests_faults",
            "What is wrong with the configuration now",
            metrics.faults.clone(),
        );
        registry.register(
            "onboarding_manifests_policy_unreadable",
            "1 while a policy, group or ControlPlane can't be read: nobody is admitted by it, and its sessions are suspended",
            metrics.policy_unreadable.clone(),
        );
        registry.register(
            "onboarding_manifests_stale_files",
            "Files of which the mesh uses an older version, because the newest has faults",
            metrics.stale_files.clone(),
        );
        registry.register(
            "onboarding_manifests_generation",
            "Counts the changes of the configuration",
            metrics.generation.clone(),
        );
        metrics
    }
}
