//! What the plane reads of a cluster, as one snapshot.
//!
//! Each kind of object is listed and watched (`follow`), read as lint reads it (`objects`), and put together (`assemble`, which is
//! pure). A change is in the snapshot after `QUIET` of silence, at the latest after `PATIENCE`.
//!
//! # What isn't known now
//! - **An object with faults** counts as absent for authorization at once, and suspends (`policy_unreadable`): the API server may hold
//!   what a stricter schema would refuse today.
//! - **An API server that doesn't answer** isn't a policy that can't be read: nothing says that anything changed, and if each restart
//!   of an API server ended every session, it would be an outage of everything that was onboarded, caused by what has nothing to do
//!   with it. So what is known stays, and new workloads are let in by it, and staleness is said in `faults` and in a metric.
//! - **For so long, and no longer** (`Options::longest_stale`): whoever withdraws a policy trusts that it takes effect, and
//!   a plane that is cut off from the API server alone (its own network, its permissions) must not go on for ever on what was once
//!   true. After that, no policy counts, which refuses whoever comes, and suspends the sessions: their sidecars run on, and
//!   the entries live for the grace period from when somebody can again write into the cluster. Five minutes is longer than an API server takes to restart or to be
//!   upgraded, and no longer than the grace period.
//! - **Before the first lists** it is the same: nobody is admitted, nothing is withdrawn.
//! - **What is being deleted** (a group that waits for its dependents) is gone.

mod assemble;
pub(crate) mod follow;
mod objects;
mod uid;

pub use objects::{Fault, PLANE_CONFIG, PLANE_CONFIG_KEY};

use crate::istio::Inputs;

use crate::registry::MEMORY_LABEL;
use crate::registry::groups::Groups;
use assemble::{Assembled, Trouble, assemble};
use follow::{Change, Watched};
use jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject};
use kube::{Api, Client};
use objects::{Config, Kind, Objects, key};
use onboarding_core::name::GroupName;
use onboarding_core::policy::PolicySet;
use onboarding_endpoint::backend::{ConfigSource, FaultLog, Snapshot};
use onboarding_kinds::control_plane::ControlPlane;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

/// A change is taken in when this long nothing followed it: objects come in bursts.
const QUIET: Duration = Duration::from_millis(30);
/// Or this long after it at the latest.
const PATIENCE: Duration = Duration::from_millis(100);
/// How often it is looked how old what is known is.
const TICK: Duration = Duration::from_secs(1);
/// A watch that breaks and stands again within this isn't worth a word.
const HICCUP: Duration = Duration::from_secs(10);
/// A sign of life comes once a minute.
const SILENCE: Duration = Duration::from_secs(90);
const BETWEEN_UIDS: Duration = Duration::from_secs(2);
const BACKLOG: usize = 1024;

#[derive(Debug, Clone)]
pub struct Options {
    /// The plane's own: of its ControlPlane, the endpoint's Secret, the ConfigMaps of Istio. `istio-system`.
    pub namespace: String,
    /// How long it is let in by what is known while the API server says nothing. Counted from the last sign of life, of which one comes
    /// in a minute; it counts once watching failed for ten seconds or nothing came for 90.
    pub longest_stale: Duration,
}

impl Options {
    pub fn new(namespace: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), longest_stale: Duration::from_secs(5 * 60) }
    }
}

/// [`ConfigSource`] on an API server.
pub struct ClusterSource {
    snapshot: watch::Sender<Arc<Snapshot>>,
    view: watch::Sender<Arc<ClusterView>>,
    groups: watch::Sender<Arc<Groups>>,
    inputs: watch::Sender<Arc<Inputs>>,
}

/// What is known of the objects themselves.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClusterView {
    /// In (namespace, name) order; also those that can't be read.
    pub policies: Vec<PolicyObject>,
    /// Every WorkloadGroup that there is, also one that can't be read.
    pub groups: HashMap<GroupName, GroupRef>,
    /// The last good one, also where it doesn't enable onboarding.
    pub control_plane: Option<ControlPlane>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PolicyObject {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub generation: i64,
    /// Whether it counts; not if it has faults, or is being deleted.
    pub is_read: bool,
    /// `spec.allow[0].workloads: is required`
    pub faults: Vec<String>,
    pub warnings: Vec<String>,
    /// `status` as it is in the cluster; null: none.
    pub status: serde_json::Value,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRef {
    /// `metadata.uid`
    pub uid: String,
}

impl ClusterSource {
    pub fn cluster(&self) -> watch::Receiver<Arc<ClusterView>> {
        self.view.subscribe()
    }
    /// For the registry: each group as it was when it could last be read.
    pub fn groups(&self) -> watch::Receiver<Arc<Groups>> {
        self.groups.subscribe()
    }
    /// For the provisioner: the last good version of each object.
    pub fn inputs(&self) -> watch::Receiver<Arc<Inputs>> {
        self.inputs.subscribe()
    }
}

impl ConfigSource for ClusterSource {
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.snapshot.subscribe()
    }
}

/// Starts the informers, which run until `stop`. Until what decides who is admitted has been listed, the snapshot admits nobody and has
/// `policy_unreadable`. The task's error says what ended by itself.
pub fn start(
    client: Client,
    options: Options,
    metrics: &mut prometheus_client::registry::Registry,
    stop: CancellationToken,
) -> (Arc<ClusterSource>, JoinHandle<anyhow::Result<()>>) {
    let nothing = Snapshot {
        policy_unreadable: true,
        faults: vec!["the objects of the cluster haven't been read yet".to_owned()],
        ..Snapshot::default()
    };
    let source = Arc::new(ClusterSource {
        snapshot: watch::Sender::new(Arc::new(nothing)),
        view: watch::Sender::default(),
        groups: watch::Sender::default(),
        inputs: watch::Sender::default(),
    });
    let (sender, changes) = mpsc::channel(BACKLOG);
    let mut informers =
        Informers { client, namespace: options.namespace.clone(), sender, tasks: JoinSet::new(), secret: None };
    for kind in Kind::FIRST {
        informers.start(Tag { kind, epoch: 0 }, None);
    }
    let reader = Reader {
        options,
        objects: Objects::default(),
        ages: Kind::FIRST.into_iter().map(|kind| (kind, Age::default())).collect(),
        epoch: 0,
        trouble: Trouble::default(),
        assembled: Assembled::default(),
        policies: Arc::default(),
        said: FaultLog::default(),
        source: source.clone(),
        metrics: Metrics::register(metrics),
    };
    let task = tokio::spawn(run(reader, informers, changes, stop));
    (source, task)
}

/// Which list and watch something comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag {
    kind: Kind,
    /// Another with each Secret that is followed: what is still on its way of the last one is worth nothing.
    epoch: u64,
}

type Told = (Tag, Instant, Change);

async fn run(
    mut reader: Reader,
    mut informers: Informers,
    mut changes: mpsc::Receiver<Told>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut making: Option<(Instant, JoinHandle<Result<(), String>>)> = None;
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            Some(ended) = informers.tasks.join_next() => match ended {
                // That of a Secret which isn't named any more.
                Err(error) if error.is_cancelled() => {}
                Err(error) => return Err(anyhow::Error::new(error).context("a watch on the cluster failed")),
                Ok(()) => anyhow::bail!("a watch on the cluster ended"),
            },
            Some(change) = changes.recv() => {
                batch.push(change);
                settle(&mut changes, &mut batch).await;
            }
            _ = tick.tick() => {}
        }
        // Many objects may take a while: not on a worker.
        let work = tokio::task::spawn_blocking(move || {
            reader.take_in(batch);
            reader
        });
        reader =
            work.await.map_err(|error| anyhow::Error::new(error).context("reading the cluster's objects failed"))?;
        if informers.follow_secret(&reader.assembled.secret_name, reader.epoch + 1) {
            reader.another_secret(informers.secret.is_some());
        }
        if let Some((_, task)) = making.take_if(|(_, task)| task.is_finished())
            && let Ok(Err(problem)) = task.await
        {
            tracing::error!(
                problem,
                config_map = PLANE_CONFIG,
                "a UID of the plane can't be stored; it is tried again"
            );
        }
        let rested = making.as_ref().is_none_or(|(since, task)| task.is_finished() && since.elapsed() > BETWEEN_UIDS);
        if reader.assembled.wants_uid && rested {
            let (client, namespace) = (informers.client.clone(), informers.namespace.clone());
            let held = reader.plane_config();
            let task = tokio::spawn(async move { uid::make(client, &namespace, held.as_ref()).await });
            making = Some((Instant::now(), task));
        }
    }
}

/// Takes what follows at once.
async fn settle(changes: &mut mpsc::Receiver<Told>, batch: &mut Vec<Told>) {
    let deadline = tokio::time::sleep(PATIENCE);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            () = &mut deadline => return,
            () = tokio::time::sleep(QUIET) => return,
            Some(change) = changes.recv() => batch.push(change),
        }
    }
}

struct Informers {
    client: Client,
    namespace: String,
    sender: mpsc::Sender<Told>,
    tasks: JoinSet<()>,
    /// The one that is followed, and what ends that.
    secret: Option<(String, AbortHandle)>,
}

impl Informers {
    fn start(&mut self, tag: Tag, name: Option<&str>) -> AbortHandle {
        let resource = tag.kind.resource();
        let api = match tag.kind {
            Kind::ControlPlanes | Kind::Secret | Kind::ConfigMaps => self.own(&resource),
            Kind::Policies
            | Kind::Groups
            | Kind::Sidecars
            | Kind::Namespaces
            | Kind::Services
            | Kind::ServiceEntries
            | Kind::Tags => Api::all_with(self.client.clone(), &resource),
        };
        let labels = match tag.kind {
            // What the registry remembers is in ConfigMaps too, and may be much.
            Kind::ConfigMaps => Some(format!("!{}", MEMORY_LABEL.0)),
            Kind::Namespaces => Some(crate::istio::REVISION_LABEL.to_owned()),
            Kind::Tags => Some(objects::TAG_LABEL.to_owned()),
            _ => None,
        };
        let kind = tag.kind;
        let watched = Watched {
            api,
            labels,
            fields: name.map(|name| format!("metadata.name={name}")),
            slim: Arc::new(move |object| objects::slim(kind, object)),
        };
        self.tasks.spawn(watched.follow(tag, self.sender.clone()))
    }

    fn own(&self, resource: &ApiResource) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.namespace, resource)
    }

    /// Whether it is another one now.
    fn follow_secret(&mut self, wanted: &Option<String>, epoch: u64) -> bool {
        if self.secret.as_ref().map(|(name, _)| name) == wanted.as_ref() {
            return false;
        }
        if let Some((_, task)) = self.secret.take() {
            task.abort();
        }
        self.secret =
            wanted.clone().map(|name| (name.clone(), self.start(Tag { kind: Kind::Secret, epoch }, Some(&name))));
        true
    }
}

/// How old what is known of a kind is.
#[derive(Debug, Default)]
struct Age {
    /// As of when it is true, on both clocks; `None`: it was never listed.
    as_of: Option<(Instant, Timestamp)>,
    problem: Option<String>,
}

struct Reader {
    options: Options,
    objects: Objects,
    ages: BTreeMap<Kind, Age>,
    /// Of the Secret that is followed.
    epoch: u64,
    trouble: Trouble,
    assembled: Assembled,
    policies: Arc<PolicySet>,
    said: FaultLog,
    source: Arc<ClusterSource>,
    metrics: Metrics,
}

impl Reader {
    fn take_in(&mut self, batch: Vec<Told>) {
        let mut changed = self.source.snapshot.borrow().generation == 0;
        for (tag, at, change) in batch {
            if tag.kind == Kind::Secret && tag.epoch != self.epoch {
                continue;
            }
            let age = self.ages.entry(tag.kind).or_default();
            if let Change::Failing(problem) = change {
                self.metrics.failures.get_or_create(&Which { objects: tag.kind.label() }).inc();
                age.problem = Some(problem);
                continue;
            }
            let wall = Timestamp::now().checked_sub(at.elapsed()).unwrap_or(Timestamp::MIN);
            age.as_of = Some((at, wall));
            age.problem = None;
            changed |= match change {
                Change::Listed(objects) => self.objects.listed(tag.kind, objects),
                Change::Put(object) => self.objects.put(tag.kind, *object),
                Change::Gone(object) => self.objects.gone(tag.kind, &key(tag.kind, &object)),
                Change::Heard | Change::Failing(_) => false,
            };
        }
        let trouble = self.trouble(Instant::now());
        if changed || trouble != self.trouble {
            self.trouble = trouble;
            self.assemble();
        }
    }

    fn another_secret(&mut self, followed: bool) {
        self.epoch += 1;
        self.objects.secrets.clear();
        self.ages.remove(&Kind::Secret);
        if followed {
            self.ages.insert(Kind::Secret, Age::default());
        }
        self.trouble = self.trouble(Instant::now());
        self.assemble();
    }

    fn plane_config(&self) -> Option<objects::PlaneConfig> {
        match self.objects.configs.get(PLANE_CONFIG) {
            Some(Config::Plane(config)) => Some(config.clone()),
            _ => None,
        }
    }

    fn trouble(&self, now: Instant) -> Trouble {
        let mut trouble = Trouble::default();
        for (&kind, age) in &self.ages {
            let problem = age.problem.as_deref();
            let Some((as_of, wall)) = age.as_of else {
                trouble.unlisted.insert(kind);
                trouble.unknown |= kind.admits();
                let why = problem.unwrap_or("no answer yet");
                trouble.faults.push(format!("{} haven't been read from the API server yet: {why}", kind.words()));
                continue;
            };
            let silent = now.saturating_duration_since(as_of);
            self.metrics
                .staleness
                .get_or_create(&Which { objects: kind.label() })
                .set(i64::try_from(silent.as_secs()).unwrap_or(i64::MAX));
            if silent > SILENCE || (silent > HICCUP && problem.is_some()) {
                let why = problem.unwrap_or("the API server says nothing");
                let mut words = format!("what is known of {} is as of {wall:.0}: {why}", kind.words());
                if kind.admits() && silent > self.options.longest_stale {
                    trouble.unknown = true;
                    words.push_str("; it is too old to let anybody in by it, and sessions are suspended");
                }
                trouble.faults.push(words);
            }
        }
        trouble
    }

    fn assemble(&mut self) {
        let next = assemble(&self.objects, &self.trouble, &self.options.namespace, &self.assembled);
        if self.source.snapshot.borrow().generation == 0 || next.policies != self.assembled.policies {
            self.policies = Arc::new(PolicySet::compile(next.policies.clone()));
        }
        self.assembled = next;
        self.publish();
    }

    fn publish(&mut self) {
        let assembled = &self.assembled;
        self.said.say(&assembled.faults, &assembled.warnings);
        self.metrics.faults.set(assembled.faults.len() as i64);
        self.metrics.policy_unreadable.set(i64::from(assembled.policy_unreadable));
        // Before the snapshot that may speak of them.
        replace(&self.source.groups, &assembled.owners);
        replace(&self.source.inputs, &assembled.inputs);
        replace(&self.source.view, &assembled.view);
        let next = Snapshot {
            plane: assembled.plane.clone().map(Arc::new),
            tls: assembled.tls.clone().map(Arc::new),
            policies: self.policies.clone(),
            groups: assembled.groups.clone(),
            policy_unreadable: assembled.policy_unreadable,
            faults: assembled.faults.clone(),
            ..Snapshot::default()
        };
        if let Some(generation) = next.publish(&self.source.snapshot) {
            self.metrics.generation.set(generation as i64);
            tracing::info!(
                generation,
                policies = assembled.policies.len(),
                groups = assembled.groups.len(),
                policy_unreadable = assembled.policy_unreadable,
                "the configuration of the cluster was read"
            );
        }
    }
}

fn replace<T: Clone + PartialEq>(held: &watch::Sender<Arc<T>>, next: &T) {
    held.send_if_modified(|held| {
        let differs = **held != *next;
        if differs {
            *held = Arc::new(next.clone());
        }
        differs
    });
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Which {
    objects: &'static str,
}

struct Metrics {
    staleness: Family<Which, Gauge>,
    failures: Family<Which, Counter>,
    faults: Gauge,
    policy_unreadable: Gauge,
    generation: Gauge,
}

impl Metrics {
    fn register(registry: &mut prometheus_client::registry::Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("onboarding_cluster");
        let metrics = Self {
            staleness: Family::default(),
            failures: Family::default(),
            faults: Gauge::default(),
            policy_unreadable: Gauge::default(),
            generation: Gauge::default(),
        };
        registry.register(
            "staleness_seconds",
            "How long ago the API server last gave a sign of life about these objects; up to a minute is normal",
            metrics.staleness.clone(),
        );
        registry.register(
            "watch_failures",
            "Lists and watches that failed and were tried again",
            metrics.failures.clone(),
        );
        registry.register("faults", "What is wrong with the configuration now", metrics.faults.clone());
        registry.register(
            "policy_unreadable",
            "1 while a policy, group or ControlPlane can't be read or what is known is too old: nobody is admitted by it, and its sessions are suspended",
            metrics.policy_unreadable.clone(),
        );
        registry.register("generation", "Counts the changes of the configuration", metrics.generation.clone());
        metrics
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
