//! Registrations as objects of the cluster.
//!
//! # What is where
//! - A live registration is a WorkloadAutoRegistration (*war*). What decides is in its spec and its annotation `onboarding.tetrate.io/lease`;
//!   connection and health are in its status. A war whose status was never written is not yet connected.
//! - A registration that ended is remembered in a ConfigMap of the plane's namespace (`onboarding-memory-...`), as its war is gone: the key
//!   that may come back, and when it ended. Whoever deletes that ConfigMap forgets it: any key may come then.
//! - What the mesh is told is a WorkloadEntry of the same name, owned by the war, which is owned by the WorkloadGroup.
//!
//! # How replicas agree
//! Every write is conditional. A version is the `resourceVersion` of the war, or of the memory where there is no war, or 0.
//! - **A live registration changes** by an update conditional on the war's resourceVersion: one request for what decides, one for the
//!   status, each of them only where it changed.
//! - **It ends** when its annotation says so, by such an update. Then it is remembered, then the war is deleted (this uid and
//!   resourceVersion only). Each of these can be done twice, and any replica that sees such a war does what is left.
//! - **It begins** with the creation of the war, which only one can win. Creation alone can't be conditional on what is
//!   remembered, so a new war names the memory it was made in knowledge of (`after`: the memory's id, another with each write), and
//!   the memory is read once more after the creation, before anybody is answered. A registration that ended in between left its memory before its war
//!   could go, and its war had to go before another could be made; so this reading shows it, the new war is taken back, and the caller told to decide
//!   again. If the process dies before that, every reader sees that war and memory don't belong together, and whoever sees it first deletes the war.
//!   So no registration is ever acknowledged that was decided upon without what is remembered.
//! - **Somebody deletes a war**: whoever sees it remembers that any key may come (or, if the war went with its WorkloadGroup, the key that it had),
//!   before this replica reads that name as gone. If no plane was there to see it, nothing is remembered: any key may come just the same,
//!   and a token of before, which is still tied to its key, may bring the registration back while it lives.
//!
//! A store that was not answered in time is unavailable to its caller, and may have been written nevertheless: whoever comes next finds either
//! the one or the other, never half of what decides.
//!
//! Reads are answered from what the informers and the own writes have shown. That may be old, which is harmless: a store that was decided upon
//! old knowledge is a conflict, and what is then read was fetched from the API server.

mod api;
mod cache;
mod entry;
pub mod groups;
mod informers;
mod memory;
mod object;
mod reconcile;
mod standing;
mod store;

pub(crate) use memory::LABEL as MEMORY_LABEL;
pub use standing::{Behind, BehindReason, Standing, Standings};

use api::{Requests, Urgency};
use async_trait::async_trait;
use cache::Cache;
use futures_util::stream::{self, BoxStream, StreamExt};
use groups::Groups;
use informers::Progress;
use kube::Client;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::State;
use onboarding_endpoint::backend::{Registry, RegistryError, Snapshot, Stored};
use standing::Known;
use std::sync::Arc;
use std::time::Duration;
use store::Store;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

/// How long a caller waits for the first lists.
const LISTED_WITHIN: Duration = Duration::from_secs(5);
/// Registrations that have to be looked up one by one in a list.
const LOOKS_AT_ONCE: usize = 16;

#[derive(Debug, Clone)]
pub struct Options {
    /// The plane's namespace: where it remembers what ended.
    pub namespace: String,
}

/// [`Registry`] on an API server.
pub struct KubernetesRegistry {
    store: Arc<Store>,
    progress: watch::Sender<Progress>,
}

/// Starts the informers and the reconciler, which run until `stop`. `snapshots`: which policy admits whom, for the wars to say. The task's error says which of them ended by itself.
///
/// The client should not retry by itself (`Config::default_retry = false`): the registry does, within bounds.
pub fn start(
    client: Client,
    options: Options,
    groups: watch::Receiver<Arc<Groups>>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    metrics: &mut prometheus_client::registry::Registry,
    stop: CancellationToken,
) -> (Arc<KubernetesRegistry>, JoinHandle<anyhow::Result<()>>) {
    let metrics = metrics.sub_registry_with_prefix("onboarding_registry");
    let store = Arc::new(Store {
        cache: Cache::default(),
        requests: Requests::new(client, options.namespace, metrics),
        groups,
        snapshots,
        standings: Known::default(),
    });
    let registry = Arc::new(KubernetesRegistry { store, progress: watch::Sender::new(Progress::default()) });
    let task = tokio::spawn(run(registry.clone(), stop));
    (registry, task)
}

async fn run(registry: Arc<KubernetesRegistry>, stop: CancellationToken) -> anyhow::Result<()> {
    let mut tasks = JoinSet::new();
    let it = registry.clone();
    tasks.spawn(async move {
        informers::watch_all(&it.store, &it.progress).await;
        "the informers"
    });
    let it = registry.clone();
    tasks.spawn(async move {
        // Before everything was listed, an entry that is there would seem to be missing.
        let _ = it.progress.subscribe().wait_for(Progress::is_complete).await;
        match reconcile::work(&it.store).await {}
    });
    let it = registry.clone();
    tasks.spawn(async move { match reconcile::follow_policies(&it.store).await {} });
    tasks.spawn(async move { match reconcile::follow_groups(&registry.store).await {} });
    tokio::select! {
        () = stop.cancelled() => Ok(()),
        ended = tasks.join_next() => match ended {
            Some(Ok(what)) => Err(anyhow::anyhow!("{what} of the registry ended")),
            Some(Err(error)) => Err(anyhow::Error::new(error).context("a task of the registry failed")),
            None => Ok(()),
        },
    }
}

impl KubernetesRegistry {
    /// Returns once everything was listed.
    ///
    /// # Errors
    /// Not within `within`; says what last went wrong.
    pub async fn listed(&self, within: Duration) -> Result<(), RegistryError> {
        if self.progress.borrow().is_complete() {
            return Ok(());
        }
        let mut progress = self.progress.subscribe();
        if let Ok(Ok(_)) = tokio::time::timeout(within, progress.wait_for(Progress::is_complete)).await {
            return Ok(());
        }
        let problem = self.progress.borrow().problem.clone();
        let problem = problem.unwrap_or_else(|| "no answer yet".to_owned());
        Err(RegistryError::Unavailable(format!("the registrations have not been listed yet: {problem}")))
    }
}

/// The war's condition `UpToDate` follows.
impl Standings for KubernetesRegistry {
    fn stands(&self, name: &RegistrationName, standing: Option<Standing>) {
        if self.store.standings.put(name, standing) {
            self.store.cache.work.add(name.clone());
        }
    }
}

#[async_trait]
impl Registry for KubernetesRegistry {
    async fn load(&self, name: &RegistrationName) -> Result<Stored, RegistryError> {
        self.listed(LISTED_WITHIN).await?;
        self.store.load(Urgency::Join, name).await
    }

    async fn store(&self, name: &RegistrationName, expected: u64, state: &State) -> Result<u64, RegistryError> {
        self.listed(LISTED_WITHIN).await?;
        self.store.store(name, expected, state).await
    }

    async fn list(&self) -> Result<Vec<(RegistrationName, Stored)>, RegistryError> {
        self.listed(LISTED_WITHIN).await?;
        let names = self.store.cache.names(|_| true);
        let loads = stream::iter(names).map(|name| async move {
            let stored = self.store.glance(&name).await;
            (name, stored)
        });
        let mut loads = loads.buffer_unordered(LOOKS_AT_ONCE);
        let mut all = Vec::new();
        while let Some((name, stored)) = loads.next().await {
            match stored {
                Ok(Stored { state: State::Absent, .. }) | Err(RegistryError::Foreign(_)) => {}
                Ok(stored) => all.push((name, stored)),
                Err(error) => return Err(error),
            }
        }
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(all)
    }

    fn changes(&self) -> BoxStream<'static, RegistrationName> {
        self.store.cache.changes.clone().stream()
    }
}
