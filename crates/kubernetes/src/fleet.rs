//! Who is there, and who leads: Leases of `coordination.k8s.io` in the plane's namespace.
//!
//! Each replica keeps `onboarding-plane-<replica>`, and one of them holds `onboarding-plane`. Nobody's clock is compared with another's:
//! a Lease has run out when this replica, by its own monotonic clock, has seen no change of it for as long as it lasts (`times`, in `Seen`).
//! While this replica doesn't hear from the API server it sees no changes, and nobody could make any: that time doesn't count, so that an outage of
//! the API server makes nobody seem gone.
//!
//! The leader gives up leading `LEADS_FOR` after the last renewal that it *began* and that succeeded; others wait for `LASTS` from when
//! they saw it, which was later. What the leader writes is conditional all the same: a process that was stopped by its machine and goes on
//! doesn't know the time at once.
//!
//! Crates that were looked at (kube-lease-manager 0.13, kube-leader-election 0.44, kubert 0.25): they compare the wall clocks of replicas
//! (the last two are of older versions of kube as well), and none tells who else is there.

mod seen;

use crate::names::{FIELD_MANAGER, MANAGED_BY};
use crate::source::follow::{Change, Watched, chain};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DeleteParams, ObjectMeta, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client};
use onboarding_endpoint::backend::Fleet;
use onboarding_runtime::backoff::with_jitter;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use seen::{Observed, Seen};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

/// The Lease of the leader; those of replicas have this, a dash and the replica's name.
pub const LEADER: &str = "onboarding-plane";
/// How long a Lease lasts.
pub const LASTS: Duration = Duration::from_secs(15);
/// How often it is renewed.
const RENEWED: Duration = Duration::from_secs(5);
/// How long a leader leads after it last began a renewal that succeeded.
const LEADS_FOR: Duration = Duration::from_secs(10);
/// One request; less than what a leader has left.
const TRY: Duration = Duration::from_secs(3);
const RETRY: Duration = Duration::from_secs(1);
/// Those who see a leader go don't all ask at the same moment.
const SCATTER: Duration = Duration::from_millis(300);
const TICK: Duration = Duration::from_millis(500);
/// The Lease of a replica that is gone is swept away after this long.
const FORGOTTEN: Duration = Duration::from_secs(10 * 60);
const BACKLOG: usize = 256;

#[derive(Debug, Clone)]
pub struct Options {
    /// The plane's.
    pub namespace: String,
    /// This replica's name (its pod's): a valid part of a resource's name.
    pub replica: String,
}

/// [`Fleet`] by Leases.
pub struct LeaseFleet {
    replica: String,
    leads: watch::Sender<bool>,
    seen: Mutex<Seen>,
    /// Notifies with each change that was seen: the leader's Lease may be free.
    leader: watch::Sender<()>,
}

/// Starts it; the task ends after `stop`, when the Leases are released (or that wasn't possible within `TRY`).
pub fn start(
    client: Client,
    options: Options,
    metrics: &mut prometheus_client::registry::Registry,
    stop: CancellationToken,
) -> (Arc<LeaseFleet>, JoinHandle<anyhow::Result<()>>) {
    let fleet = Arc::new(LeaseFleet {
        replica: options.replica.clone(),
        leads: watch::Sender::new(false),
        seen: Mutex::new(Seen::new()),
        leader: watch::Sender::new(()),
    });
    let keeper = Keeper {
        api: Api::namespaced(client.clone(), &options.namespace),
        own: format!("{LEADER}-{}", options.replica),
        replica: options.replica,
        metrics: Metrics::register(metrics),
    };
    let resource = ApiResource::erase::<Lease>(&());
    let watched = Watched {
        api: Api::namespaced_with(client, &options.namespace, &resource),
        labels: Some(format!("{}={}", MANAGED_BY.0, MANAGED_BY.1)),
        fields: None,
        slim: Arc::new(|object| object.metadata.managed_fields = None),
    };
    let task = tokio::spawn(run(fleet.clone(), Arc::new(keeper), watched, stop));
    (fleet, task)
}

impl LeaseFleet {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The other replicas that are there, by name.
    pub fn others(&self) -> BTreeSet<String> {
        let mut living = self.seen().living();
        living.remove(&self.replica);
        living
    }
}

impl Fleet for LeaseFleet {
    fn leads(&self) -> watch::Receiver<bool> {
        self.leads.subscribe()
    }

    /// Before the Leases were first listed, whoever is on record is there.
    fn is_there(&self, replica: &str) -> bool {
        replica == self.replica || self.seen().is_there(replica)
    }
}

async fn run(
    fleet: Arc<LeaseFleet>,
    keeper: Arc<Keeper>,
    watched: Watched,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let (sender, changes) = mpsc::channel(BACKLOG);
    let mut tasks = JoinSet::new();
    tasks.spawn(watched.follow((), sender));
    tasks.spawn(observe(fleet.clone(), keeper.clone(), changes));
    let mut last = JoinSet::new();
    last.spawn(be_there(keeper.clone(), stop.clone()));
    last.spawn(lead(fleet, keeper, stop.clone()));
    let ended = tokio::select! {
        ended = tasks.join_next() => ended,
        ended = last.join_next() => ended,
    };
    if let Some(Err(error)) = ended {
        return Err(anyhow::Error::new(error).context("a task of the replicas' Leases failed"));
    }
    anyhow::ensure!(stop.is_cancelled(), "a task of the replicas' Leases ended");
    while last.join_next().await.is_some() {}
    Ok(())
}

/// Takes in what is seen, and says who came and went.
async fn observe(fleet: Arc<LeaseFleet>, keeper: Arc<Keeper>, mut changes: mpsc::Receiver<((), Instant, Change)>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut living = None;
    let mut failing = false;
    loop {
        tokio::select! {
            change = changes.recv() => {
                let Some(((), at, change)) = change else { return };
                if let Change::Failing(problem) = &change {
                    if !failing {
                        tracing::warn!(problem, "the Leases of replicas can't be watched; nobody is taken for gone meanwhile");
                    }
                    failing = true;
                    continue;
                }
                failing = false;
                let mut seen = fleet.seen();
                match change {
                    Change::Listed(objects) => seen.listed(at, objects.iter().filter_map(Observed::of).collect()),
                    Change::Put(object) => Observed::of(&object).into_iter().for_each(|lease| seen.put(at, lease)),
                    Change::Gone(object) => seen.gone(at, object.metadata.name.as_deref().unwrap_or_default()),
                    Change::Heard => seen.heard(at),
                    Change::Failing(_) => {}
                }
                drop(seen);
                fleet.leader.send_replace(());
            }
            _ = tick.tick() => {}
        }
        let now = fleet.seen().replicas();
        if living.as_ref() == Some(&now) {
            continue;
        }
        if let (Some(before), Some(now)) = (living.as_ref().and_then(Option::as_ref), now.as_ref()) {
            for replica in now.difference(before) {
                tracing::info!(replica, "a replica came");
            }
            for replica in before.difference(now) {
                tracing::info!(replica, "a replica went");
            }
        }
        keeper.metrics.replicas.set(now.as_ref().map_or(0, |now| now.len() as i64));
        living = Some(now);
        // The same value: somebody came or went.
        fleet.leads.send_modify(|_| {});
    }
}

/// Keeps this replica's own Lease.
async fn be_there(keeper: Arc<Keeper>, stop: CancellationToken) {
    loop {
        let pause = match keeper.renew_own().await {
            Ok(()) => RENEWED,
            Err(problem) => {
                keeper.metrics.failures.inc();
                tracing::warn!(lease = keeper.own, problem, "this replica's Lease can't be renewed; it is tried again");
                RETRY
            }
        };
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(with_jitter(pause).min(RENEWED)) => {}
        }
    }
    match tokio::time::timeout(TRY, keeper.api.delete(&keeper.own, &DeleteParams::default())).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(
            lease = keeper.own,
            problem = chain(&error),
            "this replica's Lease can't be deleted; it runs out"
        ),
        Err(_) => tracing::warn!(lease = keeper.own, "this replica's Lease can't be deleted in time; it runs out"),
    }
}

/// Leads when nobody else does, and stops in time.
async fn lead(fleet: Arc<LeaseFleet>, keeper: Arc<Keeper>, stop: CancellationToken) {
    let mut observed = fleet.leader.subscribe();
    // The Lease as it was last written here, and when that began.
    let mut held: Option<(Lease, Instant)> = None;
    loop {
        let pause = match &held {
            Some((lease, since)) => {
                let since = *since;
                let began = Instant::now();
                let left = LEADS_FOR.saturating_sub(since.elapsed());
                match keeper.renew_leader(lease, left.min(TRY)).await {
                    Ok(renewed) => {
                        held = Some((renewed, began));
                        RENEWED
                    }
                    Err(Failure::Lost) => {
                        tracing::info!("another replica leads now");
                        held = None;
                        RETRY
                    }
                    Err(Failure::Unknown(problem)) => {
                        keeper.metrics.failures.inc();
                        tracing::warn!(problem, "the leader's Lease can't be renewed; it is tried again");
                        if since.elapsed() >= LEADS_FOR {
                            tracing::warn!("this replica leads no more");
                            held = None;
                        }
                        RETRY.min(LEADS_FOR.saturating_sub(since.elapsed()))
                    }
                }
            }
            None => {
                observed.mark_unchanged();
                let free = fleet.seen().free();
                if let Some(free) = free {
                    tokio::time::sleep(with_jitter(SCATTER) - SCATTER).await;
                    let began = Instant::now();
                    match keeper.acquire(free).await {
                        Ok(lease) => {
                            tracing::info!(replica = keeper.replica, "this replica leads");
                            held = Some((lease, began));
                        }
                        Err(Failure::Lost) => {}
                        Err(Failure::Unknown(problem)) => {
                            keeper.metrics.failures.inc();
                            tracing::warn!(problem, "the leader's Lease can't be acquired; it is tried again");
                        }
                    }
                }
                RETRY
            }
        };
        let leads = held.as_ref().is_some_and(|(_, since)| since.elapsed() < LEADS_FOR);
        keeper.metrics.leads.set(i64::from(leads));
        fleet.leads.send_if_modified(|held| std::mem::replace(held, leads) != leads);
        let sweep = async {
            if leads {
                let forgotten = fleet.seen().forgotten(FORGOTTEN);
                keeper.sweep(forgotten).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(pause) => {}
            _ = observed.changed(), if held.is_none() => {}
            () = sweep => {}
        }
    }
    fleet.leads.send_if_modified(|leads| std::mem::replace(leads, false));
    if let Some((lease, _)) = held
        && let Err(Failure::Unknown(problem)) = keeper.release(&lease).await
    {
        tracing::warn!(problem, "the leader's Lease can't be released; it runs out");
    }
}

/// The requests.
struct Keeper {
    api: Api<Lease>,
    /// The name of this replica's own Lease.
    own: String,
    replica: String,
    metrics: Metrics,
}

enum Failure {
    /// Somebody else wrote it.
    Lost,
    /// Nobody knows whether it was written.
    Unknown(String),
}

impl Keeper {
    /// Also makes it again, where somebody deleted it.
    async fn renew_own(&self) -> Result<(), String> {
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self.own, "labels": {MANAGED_BY.0: MANAGED_BY.1}},
            "spec": self.spec(None),
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        match tokio::time::timeout(TRY, self.api.patch(&self.own, &params, &Patch::Apply(&lease))).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(chain(&error)),
            Err(_) => Err(format!("not answered within {TRY:?}")),
        }
    }

    async fn acquire(&self, free: seen::Free) -> Result<Lease, Failure> {
        let Some(version) = free.version else {
            let labels = [(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned())].into();
            let metadata = ObjectMeta { name: Some(LEADER.to_owned()), labels: Some(labels), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(self.spec(Some(0))) };
            return call(TRY, self.api.create(&post(), &lease)).await;
        };
        let mut lease = call(TRY, self.api.get(LEADER)).await?;
        if lease.metadata.resource_version.as_ref() != Some(&version) {
            return Err(Failure::Lost);
        }
        let transitions = lease.spec.as_ref().and_then(|spec| spec.lease_transitions).unwrap_or(0);
        lease.spec = Some(self.spec(Some(transitions.saturating_add(1))));
        call(TRY, self.api.replace(LEADER, &post(), &lease)).await
    }

    async fn renew_leader(&self, held: &Lease, within: Duration) -> Result<Lease, Failure> {
        let mut lease = held.clone();
        lease.spec.get_or_insert_default().renew_time = Some(MicroTime(Timestamp::now()));
        let deadline = Instant::now() + within;
        match call(within, self.api.replace(LEADER, &post(), &lease)).await {
            // It may be our own write of before, whose answer was lost, or somebody touched it (a label).
            Err(Failure::Lost) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let now = call(left, self.api.get(LEADER)).await?;
                let holder = now.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
                if holder != Some(&self.replica) {
                    return Err(Failure::Lost);
                }
                lease.metadata = now.metadata;
                call(deadline.saturating_duration_since(Instant::now()), self.api.replace(LEADER, &post(), &lease))
                    .await
            }
            result => result,
        }
    }

    /// Nobody holds it, as everybody sees at once.
    async fn release(&self, held: &Lease) -> Result<(), Failure> {
        let mut lease = held.clone();
        lease.spec.get_or_insert_default().holder_identity = None;
        call(TRY, self.api.replace(LEADER, &post(), &lease)).await.map(|_| ())
    }

    /// What is left of replicas that are long gone.
    async fn sweep(&self, leases: Vec<Observed>) {
        for lease in leases {
            let preconditions = Preconditions { uid: None, resource_version: Some(lease.version) };
            let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
            if let Err(Failure::Unknown(problem)) = call(TRY, self.api.delete(&lease.name, &params)).await {
                tracing::debug!(lease = lease.name, problem, "the Lease of a replica that is gone can't be deleted");
            }
        }
    }

    fn spec(&self, transitions: Option<i32>) -> LeaseSpec {
        let now = MicroTime(Timestamp::now());
        LeaseSpec {
            holder_identity: Some(self.replica.clone()),
            lease_duration_seconds: i32::try_from(LASTS.as_secs()).ok(),
            renew_time: Some(now.clone()),
            acquire_time: transitions.map(|_| now),
            lease_transitions: transitions,
            ..LeaseSpec::default()
        }
    }
}

fn post() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

async fn call<T>(within: Duration, request: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(within, request).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Err(Failure::Lost),
        Ok(Err(error)) => Err(Failure::Unknown(chain(&error))),
        Err(_) => Err(Failure::Unknown(format!("not answered within {within:?}"))),
    }
}

struct Metrics {
    replicas: Gauge,
    leads: Gauge,
    failures: Counter,
}

impl Metrics {
    fn register(registry: &mut prometheus_client::registry::Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("onboarding_fleet");
        let metrics = Self { replicas: Gauge::default(), leads: Gauge::default(), failures: Counter::default() };
        registry.register(
            "replicas",
            "Replicas of the plane that are there, as this one sees it",
            metrics.replicas.clone(),
        );
        registry.register("leads", "1 while this replica leads", metrics.leads.clone());
        registry.register(
            "lease_failures",
            "Requests for Leases that failed and were tried again",
            metrics.failures.clone(),
        );
        metrics
    }
}
