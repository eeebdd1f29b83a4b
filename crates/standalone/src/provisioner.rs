//! Boot configurations and certificates of the sidecars of this mesh.
//!
//! One task follows the configuration and the registrations and makes the next [`World`]; each agent's stream looks at its own part of it.

use crate::ca::{self, CaError, MeshCa, RotateError};
use crate::mesh::MeshConfig;
use crate::sqlite::SqliteRegistry;
use crate::world::{Look, Rendered, World};
use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, StreamExt};
use jiff::Timestamp;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::State;
use onboarding_endpoint::backend::{ProvisionError, Provisioner, RootStatus, Workload};
use onboarding_wire::onboarding::{BootConfiguration, Certificate, SidecarReport};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Between two worlds: while ten thousand agents come back, one world takes in hundreds of them.
const GAP: Duration = Duration::from_millis(100);
/// Between two looks for what is wrong with the mesh: each looks at everybody in it.
const FAULTS_GAP: Duration = Duration::from_secs(1);
/// Versions of one workload to which a difference can be made when it comes back.
const REMEMBERED: usize = 3;

pub struct MeshProvisioner {
    ca: Arc<MeshCa>,
    registry: SqliteRegistry,
    worlds: watch::Receiver<Arc<World>>,
    history: Arc<History>,
    metrics: Metrics,
}

/// What each workload was given last.
#[derive(Default)]
struct History(Mutex<HashMap<RegistrationName, VecDeque<Rendered>>>);

impl MeshProvisioner {
    /// Makes the first world, and starts a task that follows the changes until `stop`. `faults` gets what is wrong with the mesh.
    pub fn start(
        ca: Arc<MeshCa>,
        registry: SqliteRegistry,
        mut mesh: watch::Receiver<Arc<MeshConfig>>,
        faults: watch::Sender<Vec<String>>,
        metrics: &mut prometheus_client::registry::Registry,
        stop: CancellationToken,
    ) -> (Arc<Self>, tokio::task::JoinHandle<()>) {
        let metrics = Metrics::register(metrics);
        let (world, _) = next(&World::empty(ca.trust_domain()), mesh.borrow_and_update().clone(), &registry);
        say(&faults, world.faults());
        metrics.members.set(world.population() as i64);
        let worlds = watch::Sender::new(Arc::new(world));
        let history = Arc::new(History::default());
        let provisioner = Arc::new(Self {
            ca,
            registry: registry.clone(),
            worlds: worlds.subscribe(),
            history: history.clone(),
            metrics: metrics.clone(),
        });
        let seen = worlds.subscribe();
        let maker = Maker { registry, mesh, worlds, history, metrics };
        let task = tokio::spawn(async move {
            stop.run_until_cancelled(async { tokio::join!(maker.run(), tell(seen, faults)) }).await;
        });
        (provisioner, task)
    }
}

/// Makes one world after the other.
struct Maker {
    registry: SqliteRegistry,
    mesh: watch::Receiver<Arc<MeshConfig>>,
    worlds: watch::Sender<Arc<World>>,
    history: Arc<History>,
    metrics: Metrics,
}

impl Maker {
    async fn run(mut self) {
        let changes = self.registry.changes();
        loop {
            tokio::select! {
                changed = self.mesh.changed() => if changed.is_err() { return },
                () = changes.wait() => {}
            }
            let started = Instant::now();
            let before = self.worlds.borrow().clone();
            let (config, registry) = (self.mesh.borrow_and_update().clone(), self.registry.clone());
            let (world, gone) = match tokio::task::spawn_blocking(move || next(&before, config, &registry)).await {
                Ok(made) => made,
                Err(error) => {
                    tracing::error!(%error, "making the mesh's configuration failed; it is no longer followed");
                    return;
                }
            };
            self.metrics.worlds.observe(started.elapsed().as_secs_f64());
            self.metrics.members.set(world.population() as i64);
            self.worlds.send_replace(Arc::new(world));
            // After that: who was given something meanwhile sees by the new world that it is to forget it itself.
            self.history.forget(&gone);
            tokio::time::sleep(GAP).await;
        }
    }
}

/// The next world, and who is in it no more.
fn next(before: &World, mesh: Arc<MeshConfig>, registry: &SqliteRegistry) -> (World, Vec<RegistrationName>) {
    let look = |name: RegistrationName| {
        let live = registry.live(&name);
        (name, live)
    };
    let changed: Vec<_> = registry.changes().take().into_iter().map(look).collect();
    let gone = changed.iter().filter(|(_, live)| live.is_none()).map(|(name, _)| name.clone()).collect();
    (before.next(mesh, changed), gone)
}

/// What is wrong with each world that isn't replaced at once.
async fn tell(mut worlds: watch::Receiver<Arc<World>>, faults: watch::Sender<Vec<String>>) {
    while worlds.changed().await.is_ok() {
        let world = worlds.borrow_and_update().clone();
        match tokio::task::spawn_blocking(move || world.faults()).await {
            Ok(found) => say(&faults, found),
            Err(error) => tracing::error!(%error, "looking for what is wrong with the mesh failed"),
        }
        tokio::time::sleep(FAULTS_GAP).await;
    }
}

fn say(faults: &watch::Sender<Vec<String>>, found: Vec<String>) {
    faults.send_if_modified(|held| {
        let differs = *held != found;
        *held = found;
        differs
    });
}

#[async_trait]
impl Provisioner for MeshProvisioner {
    fn boot(&self, workload: &Workload, held: &str) -> BoxStream<'static, Result<BootConfiguration, ProvisionError>> {
        let follower = Follower {
            name: workload.name.clone(),
            worlds: self.worlds.clone(),
            registry: self.registry.clone(),
            history: self.history.clone(),
            metrics: self.metrics.clone(),
            held: held.to_owned(),
            had: None,
            problem: None,
        };
        stream::unfold(follower, |mut follower| async { follower.next().await.map(|item| (item, follower)) }).boxed()
    }

    async fn certificate(&self, workload: &Workload, csr: &[u8]) -> Result<Certificate, ProvisionError> {
        let issued = self.issue(workload, csr);
        let outcome = if issued.is_ok() { "issued" } else { "refused" };
        self.metrics.certificates.get_or_create(&Outcome { outcome }).inc();
        issued
    }

    fn root(&self, rotate: bool) -> Result<RootStatus, ProvisionError> {
        let now = Timestamp::now();
        match rotate {
            false => Ok(self.ca.root_status(now)),
            true => self.ca.rotate(now).map_err(|error| match &error {
                RotateError::UnderWay { .. } => ProvisionError::Refused(error.to_string()),
                RotateError::Failed(_) => ProvisionError::Unavailable(error.to_string()),
            }),
        }
    }

    fn reported(&self, workload: &Workload, report: &SidecarReport) {
        let outcome = if report.accepted { "accepted" } else { "rejected" };
        self.metrics.reports.get_or_create(&Outcome { outcome }).inc();
        if !report.accepted {
            let message: String = report.message.chars().take(1000).collect();
            tracing::error!(
                registration = %workload.name,
                version = report.boot_version,
                why = %message.escape_debug(),
                "a sidecar refused its configuration and keeps the last good one"
            );
        }
    }
}

impl MeshProvisioner {
    fn issue(&self, workload: &Workload, csr: &[u8]) -> Result<Certificate, ProvisionError> {
        let refused = |problem: String| Err(ProvisionError::Refused(problem));
        let stored = self.registry.live(&workload.name);
        match stored.as_ref().map(|stored| &stored.state) {
            Some(State::Live(live)) if live.group == workload.group => {}
            _ => return refused(format!("{} isn't registered in the group {}", workload.name, workload.group)),
        }
        let mesh = self.worlds.borrow().mesh.clone();
        let Some(group) = mesh.groups.get(&workload.group) else {
            return Err(ProvisionError::Unavailable(format!(
                "the WorkloadGroup {} isn't in the manifests, and the identity in the mesh is its service account's",
                workload.group
            )));
        };
        let spiffe_id = ca::spiffe_id(self.ca.trust_domain(), &workload.group.namespace, &group.service_account);
        match self.ca.issue(csr, &spiffe_id, Timestamp::now()) {
            Ok(issued) => {
                tracing::info!(registration = %workload.name, spiffe_id, expires_at = %issued.expires_at, "issued a certificate");
                Ok(Certificate {
                    chain: issued.chain,
                    roots: issued.roots,
                    expires_at: Some(prost_types::Timestamp {
                        seconds: issued.expires_at.as_second(),
                        nanos: issued.expires_at.subsec_nanosecond(),
                    }),
                })
            }
            Err(error @ CaError::BadRequest(_)) => refused(error.to_string()),
            Err(error) => Err(ProvisionError::Unavailable(error.to_string())),
        }
    }
}

/// One agent's view of the worlds.
struct Follower {
    name: RegistrationName,
    worlds: watch::Receiver<Arc<World>>,
    registry: SqliteRegistry,
    history: Arc<History>,
    metrics: Metrics,
    /// The version that the agent came with, until something was sent.
    held: String,
    had: Option<Rendered>,
    /// The last thing that was said to be impossible.
    problem: Option<String>,
}

impl Follower {
    async fn next(&mut self) -> Option<Result<BootConfiguration, ProvisionError>> {
        loop {
            let world = self.worlds.borrow_and_update().clone();
            match world.look(&self.name, self.had.as_ref()) {
                Look::Same => {
                    if let (Some(_), Some(had)) = (self.problem.take(), &self.had) {
                        return Some(Ok(nothing_new(had)));
                    }
                }
                // A world may be a moment behind the registry.
                Look::Gone => drop(self.registry.live(&self.name)?),
                Look::Impossible(problem) => {
                    if self.problem.as_ref() != Some(&problem) {
                        self.problem = Some(problem.clone());
                        return Some(Err(ProvisionError::Unavailable(problem)));
                    }
                }
                Look::New(rendered) => {
                    if let Some(boot) = self.give(*rendered) {
                        return Some(Ok(boot));
                    }
                }
            }
            drop(world);
            self.worlds.changed().await.ok()?;
        }
    }

    /// The difference to what the agent has; `None` where it has just this.
    fn give(&mut self, rendered: Rendered) -> Option<BootConfiguration> {
        let was_told = self.problem.take().is_some();
        let held = match &self.had {
            Some(had) => had.version.clone(),
            None => std::mem::take(&mut self.held),
        };
        let boot = if held == rendered.version {
            was_told.then(|| nothing_new(&rendered))
        } else {
            let base = self.had.take().or_else(|| self.history.find(&self.name, &held));
            let kind = if base.is_some() { "difference" } else { "complete" };
            self.metrics.boots.get_or_create(&Outcome { outcome: kind }).inc();
            Some(rendered.message(base.as_ref()))
        };
        self.history.remember(&self.name, &rendered);
        if !self.worlds.borrow().has(&self.name) {
            self.history.forget(std::slice::from_ref(&self.name));
        }
        self.had = Some(rendered);
        boot
    }
}

/// An agent that was told of a problem hears that it is gone: a difference without any.
fn nothing_new(rendered: &Rendered) -> BootConfiguration {
    rendered.message(Some(rendered))
}

impl History {
    fn find(&self, name: &RegistrationName, version: &str) -> Option<Rendered> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(name)?.iter().find(|rendered| rendered.version == version).cloned()
    }

    fn remember(&self, name: &RegistrationName, rendered: &Rendered) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_this = all.entry(name.clone()).or_default();
        of_this.retain(|held| held.version != rendered.version);
        of_this.push_back(rendered.clone());
        while of_this.len() > REMEMBERED {
            of_this.pop_front();
        }
    }

    fn forget(&self, gone: &[RegistrationName]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for name in gone {
            all.remove(name);
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone)]
struct Metrics {
    boots: Family<Outcome, Counter>,
    certificates: Family<Outcome, Counter>,
    reports: Family<Outcome, Counter>,
    members: Gauge,
    worlds: Histogram,
}

impl Metrics {
    fn register(registry: &mut prometheus_client::registry::Registry) -> Self {
        let metrics = Self {
            boots: Family::default(),
            certificates: Family::default(),
            reports: Family::default(),
            members: Gauge::default(),
            worlds: Histogram::new(exponential_buckets(0.0005, 2.0, 14)),
        };
        registry.register(
            "onboarding_mesh_boot_configurations",
            "Boot configurations sent to agents, complete or as a difference",
            metrics.boots.clone(),
        );
        registry.register(
            "onboarding_mesh_certificates",
            "Certificates of the mesh that were asked for",
            metrics.certificates.clone(),
        );
        registry.register(
            "onboarding_mesh_sidecar_reports",
            "What sidecars made of their configurations",
            metrics.reports.clone(),
        );
        registry.register("onboarding_mesh_workloads", "Workloads in the mesh", metrics.members.clone());
        registry.register(
            "onboarding_mesh_update_seconds",
            "Time to work out the mesh after a change",
            metrics.worlds.clone(),
        );
        metrics
    }
}
