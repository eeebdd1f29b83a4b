//! Registrations in an SQLite file: durable before the answer, one commit for many concurrent stores.
//!
//! One thread writes. It takes every store that waits, makes one transaction of them (each with its own comparison of versions),
//! and answers when the transaction is on the disk (WAL, `synchronous=FULL`). Reads are served from memory, which changes after the commit.

mod row;
mod schema;

use crate::data_dir::DataDir;
use async_trait::async_trait;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{Live, State};
use onboarding_endpoint::backend::{Registry, RegistryError, Stored};
use onboarding_runtime::batch;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use row::Row;
use rusqlite::{Connection, TransactionBehavior};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;
use tokio::sync::{Notify, mpsc, oneshot};

const FILE: &str = "registry.sqlite";
/// Stores in one transaction.
const MAX_BATCH: usize = 512;
/// Stores that wait; more wait outside.
const QUEUE: usize = 4096;

#[derive(Clone)]
pub struct SqliteRegistry {
    memory: Arc<Memory>,
    changes: Arc<Changes>,
    jobs: mpsc::Sender<Job>,
}

/// What the mesh may have to be told: which registrations became live, changed what the mesh sees of them, or stopped being live.
#[derive(Debug, Default)]
pub struct Changes {
    names: Mutex<BTreeSet<RegistrationName>>,
    wake: Notify,
}

/// All registrations, as of the last commit.
type Memory = RwLock<HashMap<RegistrationName, Arc<Stored>>>;

struct Job {
    name: RegistrationName,
    expected: u64,
    /// `None` for `Absent`.
    row: Option<Box<Row>>,
    state: State,
    answer: oneshot::Sender<Result<u64, RegistryError>>,
}

#[derive(Clone, Default)]
struct Metrics {
    commits: Counter,
    stores: Counter,
    conflicts: Counter,
    failures: Counter,
    registrations: Gauge,
    seconds: Option<Histogram>,
}

impl SqliteRegistry {
    /// Opens or makes the file. The thread that writes ends when the last handle is dropped.
    ///
    /// # Errors
    /// A file that isn't whole or isn't ours: it is left as it is, and the error says what to do.
    pub fn open(data: Arc<DataDir>, metrics: &mut prometheus_client::registry::Registry) -> anyhow::Result<Self> {
        let (connection, sequence, loaded) = schema::open(&data.file(FILE))?;
        let metrics = Metrics::register(metrics);
        metrics.registrations.set(loaded.len() as i64);
        let changes = Changes::default();
        changes.add(loaded.iter().filter(|(_, stored)| live(stored).is_some()).map(|(name, _)| name.clone()));
        let (memory, changes) = (Arc::new(RwLock::new(loaded)), Arc::new(changes));
        let (jobs, queue) = mpsc::channel(QUEUE);
        let writer =
            Writer { connection, sequence, memory: memory.clone(), changes: changes.clone(), metrics, _data: data };
        std::thread::Builder::new().name("registry".to_owned()).spawn(move || writer.run(queue))?;
        Ok(Self { memory, changes, jobs })
    }

    /// A registration that is live now.
    pub fn live(&self, name: &RegistrationName) -> Option<Arc<Stored>> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        memory.get(name).filter(|stored| live(stored).is_some()).cloned()
    }

    pub fn changes(&self) -> Arc<Changes> {
        self.changes.clone()
    }
}

#[async_trait]
impl Registry for SqliteRegistry {
    async fn load(&self, name: &RegistrationName) -> Result<Stored, RegistryError> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        Ok(memory.get(name).map_or(Stored { state: State::Absent, version: 0 }, |stored| Stored::clone(stored)))
    }

    async fn store(&self, name: &RegistrationName, expected: u64, state: &State) -> Result<u64, RegistryError> {
        let row = Row::new(state).map_err(|problem| {
            RegistryError::Unavailable(format!("the registration {name} can't be written as a row: {problem}"))
        })?;
        let (answer, answered) = oneshot::channel();
        let job = Job { name: name.clone(), expected, row: row.map(Box::new), state: state.clone(), answer };
        let gone = || RegistryError::Unavailable("its writer has ended; the plane's log says why".to_owned());
        self.jobs.send(job).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    async fn list(&self) -> Result<Vec<(RegistrationName, Stored)>, RegistryError> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = memory.iter().map(|(name, stored)| (name.clone(), Stored::clone(stored))).collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        Ok(all)
    }
}

impl Changes {
    fn add(&self, names: impl IntoIterator<Item = RegistrationName>) {
        let mut changed = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let before = changed.len();
        changed.extend(names);
        if changed.len() > before {
            self.wake.notify_one();
        }
    }

    /// What changed since the last call.
    pub fn take(&self) -> BTreeSet<RegistrationName> {
        std::mem::take(&mut self.names.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns once something changed; for one waiter.
    pub async fn wait(&self) {
        self.wake.notified().await;
    }
}

struct Writer {
    connection: Connection,
    /// The last version given to anything: a version never comes twice, also when a registration is forgotten in between.
    sequence: u64,
    memory: Arc<Memory>,
    changes: Arc<Changes>,
    metrics: Metrics,
    /// Locked until the last transaction.
    _data: Arc<DataDir>,
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        while let Some(batch) = batch::blocking_next(&mut queue, MAX_BATCH) {
            self.write(batch);
        }
    }

    fn write(&mut self, batch: Vec<Job>) {
        let started = Instant::now();
        match self.commit(&batch) {
            Ok(outcomes) => {
                self.metrics.commits.inc();
                if let Some(seconds) = &self.metrics.seconds {
                    seconds.observe(started.elapsed().as_secs_f64());
                }
                self.publish(batch, outcomes);
            }
            Err(error) => {
                self.metrics.failures.inc();
                tracing::error!(%error, stores = batch.len(), "the registry can't be written; nothing was stored");
                for job in batch {
                    let _ = job.answer.send(Err(RegistryError::Unavailable(format!("writing its file: {error}"))));
                }
            }
        }
    }

    /// Each store's new version, or `None` where somebody else was first. All of them are durable, or none is.
    fn commit(&mut self, batch: &[Job]) -> rusqlite::Result<Vec<Option<u64>>> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner);
        let mut written: HashMap<&RegistrationName, u64> = HashMap::new();
        let mut sequence = self.sequence;
        let mut outcomes = Vec::with_capacity(batch.len());
        let transaction = self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        for job in batch {
            let current = match written.get(&job.name) {
                Some(version) => *version,
                None => memory.get(&job.name).map_or(0, |stored| stored.version),
            };
            if current != job.expected {
                outcomes.push(None);
                continue;
            }
            let version = match &job.row {
                Some(row) => {
                    sequence += 1;
                    row.write(&transaction, &job.name, sequence)?;
                    sequence
                }
                None => {
                    row::delete(&transaction, &job.name)?;
                    0
                }
            };
            written.insert(&job.name, version);
            outcomes.push(Some(version));
        }
        if sequence != self.sequence {
            schema::store_sequence(&transaction, sequence)?;
        }
        transaction.commit()?;
        self.sequence = sequence;
        Ok(outcomes)
    }

    /// What was committed becomes what is read; then those who stored learn of it.
    fn publish(&self, batch: Vec<Job>, outcomes: Vec<Option<u64>>) {
        let mut changed = Vec::new();
        let mut answers = Vec::with_capacity(batch.len());
        {
            let mut memory = self.memory.write().unwrap_or_else(PoisonError::into_inner);
            for (job, outcome) in batch.into_iter().zip(outcomes) {
                let Some(version) = outcome else {
                    self.metrics.conflicts.inc();
                    answers.push((job.answer, Err(RegistryError::Conflict)));
                    continue;
                };
                self.metrics.stores.inc();
                let stored = Arc::new(Stored { state: job.state, version });
                let before = match stored.state {
                    State::Absent => memory.remove(&job.name),
                    State::Ended(_) | State::Live(_) => memory.insert(job.name.clone(), stored.clone()),
                };
                if seen_by_mesh(before.as_deref().and_then(live)) != seen_by_mesh(live(&stored)) {
                    changed.push(job.name);
                }
                answers.push((job.answer, Ok(version)));
            }
            self.metrics.registrations.set(memory.len() as i64);
        }
        self.changes.add(changed);
        for (answer, result) in answers {
            let _ = answer.send(result);
        }
    }
}

fn live(stored: &Stored) -> Option<&Live> {
    match &stored.state {
        State::Live(live) => Some(live),
        State::Absent | State::Ended(_) => None,
    }
}

/// What a WorkloadEntry and its health are made of: neither tokens nor connections are among it.
fn seen_by_mesh(live: Option<&Live>) -> Option<impl PartialEq> {
    live.map(|live| (&live.group, &live.attested.identity, &live.report, live.health.ready))
}

impl Metrics {
    fn register(registry: &mut prometheus_client::registry::Registry) -> Self {
        let seconds = Histogram::new(exponential_buckets(0.0005, 2.0, 14));
        let metrics = Self { seconds: Some(seconds.clone()), ..Self::default() };
        registry.register(
            "onboarding_registry_commits",
            "Transactions of the registry that are on the disk",
            metrics.commits.clone(),
        );
        registry.register("onboarding_registry_stores", "Registrations stored", metrics.stores.clone());
        registry.register(
            "onboarding_registry_conflicts",
            "Stores refused because somebody else stored meanwhile",
            metrics.conflicts.clone(),
        );
        registry.register(
            "onboarding_registry_failures",
            "Transactions that could not be written (disk full, read-only)",
            metrics.failures.clone(),
        );
        registry.register(
            "onboarding_registry_registrations",
            "Registrations on record, live or remembered",
            metrics.registrations.clone(),
        );
        registry.register("onboarding_registry_commit_seconds", "Time of one transaction, fsync included", seconds);
        metrics
    }
}
