//! The agent's loop: everything that happens is one `News`, the machine says what to do about it, and this carries it out.
//!
//! `news` turns what happened into the machine's events, `effects` carries out what the machine wants, `calls` are the tasks that talk to
//! the plane, `witness` asks this host who it is, `show` tells people and the service manager. What takes time runs in tasks that the
//! loop owns; each ends by itself in bounded time, or with the connection that it was for.

mod calls;
mod effects;
mod news;
mod show;
mod witness;

pub(crate) use show::tell_service_manager;

use crate::boot::{self, HeldBoot};
use crate::config::Configuration;
use crate::host::{Evidence, Host};
use crate::keeper;
use crate::key::AgentKey;
use crate::machine::{self, Event, Phase, State, Wait};
use crate::mesh::Pending;
use crate::session::{Discovery, Endpoint, Link};
use crate::sidecar;
use crate::status::{About, Status};
use crate::store::{Store, StoredIdentity, StoredToken};
use crate::trust::Trust;
use jiff::Timestamp;
use news::{Envelope, News, boot_facts, forward, token_facts};
use onboarding_runtime::backoff::{Backoff, with_jitter};
use onboarding_wire::onboarding as pb;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// What an agent is started with.
#[derive(Debug, Clone)]
pub struct Settings {
    pub configuration: Configuration,
    pub trust: Trust,
    pub state_directory: PathBuf,
    /// Of Envoy.
    pub binary: PathBuf,
    /// Envoy's admin address, which is also where `/ready` is asked.
    pub admin: std::net::SocketAddr,
    /// How a sidecar of an Istio mesh is run.
    pub istio: sidecar::IstioWay,
}

struct Driver {
    settings: Settings,
    endpoint: Endpoint,
    store: Store,
    key: Arc<AgentKey>,
    state: State,
    pace: Pace,
    about: About,
    news: mpsc::Sender<Envelope>,
    keeper: mpsc::UnboundedSender<keeper::Command>,
    /// Opened at the first use: recognising a platform may fail, and is tried again.
    host: Option<Arc<dyn Host>>,
    /// Asked of the binary from the beginning on; the registration waits for it, the sidecar's start doesn't.
    sidecar_version: Arc<OnceCell<String>>,

    connection: u64,
    /// Of the connection; aborted with it.
    tasks: JoinSet<()>,
    link: Option<Link>,
    discovery: Option<Discovery>,
    evidence: Option<Evidence>,
    session: Option<mpsc::Sender<pb::AgentMessage>>,
    pending: Option<Pending>,
    /// What the sidecar made of a boot configuration last.
    last_report: Option<pb::SidecarReport>,

    token: Option<StoredToken>,
    held: Option<Arc<HeldBoot>>,
    /// Of the standalone mesh.
    identity: Option<StoredIdentity>,
    /// Of this host, as it was registered last.
    address: Option<std::net::IpAddr>,

    probe: Option<(pb::Probe, tokio::task::AbortHandle)>,
    probes: JoinSet<()>,
    said_ready: bool,
    began: Instant,
    said: String,
    shown: Option<Status>,
}

/// The machine's dice.
struct Pace {
    backoff: Backoff,
}

impl machine::Delays for Pace {
    fn delay(&mut self, wait: Wait) -> Duration {
        match wait {
            Wait::Next => self.backoff.next_delay(),
            Wait::First => {
                self.backoff.reset();
                self.backoff.next_delay()
            }
            Wait::Pushback(asked) => with_jitter(asked),
            Wait::AtOnce => {
                self.backoff.reset();
                Duration::from_secs(1).mul_f64(rand::random::<f64>())
            }
        }
    }
}

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);
/// Timers are looked at this often at least: a suspended VM's clock jumps.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// Runs until `stop`, and leaves in order.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    settings.configuration.print();
    let endpoint = Endpoint::new(&settings.configuration.onboarding, &settings.trust)?;
    // Before the disk is waited for: it takes as long as Envoy takes to start.
    let version = witness::ask_version(&settings).await;
    let store = Store::open(&settings.state_directory)?;
    let key = Arc::new(AgentKey::load_or_create(&store.key_path())?);
    tracing::info!(
        agent_version = env!("CARGO_PKG_VERSION"),
        key = %key.thumbprint(),
        trusted_cas = settings.trust.described,
        state_directory = %settings.state_directory.display(),
        sidecar = %settings.binary.display(),
        "the agent starts"
    );
    let (news, mut incoming) = mpsc::channel(64);
    let (keeper, commands) = mpsc::unbounded_channel();
    let (keeper_news, keeper_incoming) = mpsc::channel(64);
    let options = sidecar::Options {
        binary: settings.binary.clone(),
        directory: store.sidecar_directory(),
        stdout: settings.configuration.agent.sidecar.stdout.clone().into(),
        stderr: settings.configuration.agent.sidecar.stderr.clone().into(),
        admin: settings.admin,
        istio: settings.istio.clone(),
        identity: store.istiod_identity_path(),
    };
    let mut owned = JoinSet::new();
    owned.spawn(keeper::keep(options, commands, keeper_news));
    owned.spawn(forward(keeper_incoming, news.clone(), News::Keeper));

    let mut driver = Driver::new(settings, endpoint, store, key, version, news, keeper);
    driver.happened(Event::Begin);
    let mut asked_to_stop = false;
    while driver.state.phase != Phase::Stopped {
        let sleep = driver.sleep();
        tokio::select! {
            Some(envelope) = incoming.recv() => driver.receive(envelope),
            () = tokio::time::sleep(sleep) => driver.happened(Event::Tick),
            () = stop.cancelled(), if !asked_to_stop => {
                asked_to_stop = true;
                driver.happened(Event::StopRequested);
            }
            Some(ended) = owned.join_next() => {
                ended?;
                anyhow::bail!("the task that owns the sidecar ended by itself");
            }
        }
    }
    tracing::info!("the agent has left the mesh and ends");
    Ok(())
}

impl Driver {
    fn new(
        settings: Settings,
        endpoint: Endpoint,
        store: Store,
        key: Arc<AgentKey>,
        sidecar_version: Arc<OnceCell<String>>,
        news: mpsc::Sender<Envelope>,
        keeper: mpsc::UnboundedSender<keeper::Command>,
    ) -> Self {
        let (token, held, identity) = (store.token(), store.boot().map(Arc::new), store.identity());
        let certificate = match (held.as_deref().map(|held| &held.sidecar), &settings.istio) {
            (Some(boot::Sidecar::Istio(_)), sidecar::IstioWay::PilotAgent(_)) => {
                sidecar::pilot_agents_certificate(&store.sidecar_directory())
            }
            (Some(boot::Sidecar::Istio(_)), sidecar::IstioWay::Envoy) => {
                store.istiod_identity().as_ref().map(StoredIdentity::facts)
            }
            (Some(boot::Sidecar::Standalone(_)) | None, _) => identity.as_ref().map(StoredIdentity::facts),
        };
        let state =
            State::new(Timestamp::now(), token.as_ref().map(token_facts), certificate, held.as_deref().map(boot_facts));
        let about = About {
            endpoint: format!("{}:{}", endpoint.host, endpoint.port),
            workload_group: settings.configuration.onboarding.group.to_string(),
            configuration_problem: None,
            boot_problem: None,
        };
        let address = store.address();
        Self {
            address,
            settings,
            endpoint,
            store,
            key,
            state,
            pace: Pace { backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY) },
            about,
            news,
            keeper,
            host: None,
            sidecar_version,
            connection: 0,
            tasks: JoinSet::new(),
            link: None,
            discovery: None,
            evidence: None,
            session: None,
            pending: None,
            last_report: None,
            token,
            held,
            identity,
            probe: None,
            probes: JoinSet::new(),
            said_ready: false,
            began: Instant::now(),
            said: String::new(),
            shown: None,
        }
    }

    fn sleep(&self) -> Duration {
        let until = self.state.wakes_at().map_or(LONGEST_SLEEP, |at| {
            // Rounded up: a timer that fires a moment early would find nothing due.
            let left = at.duration_since(Timestamp::now()).as_millis() + 1;
            Duration::from_millis(u64::try_from(left).unwrap_or(0))
        });
        until.min(LONGEST_SLEEP)
    }

    /// The machine's turn.
    fn happened(&mut self, event: Event) {
        let before = self.state.phase.clone();
        let now = Timestamp::now();
        let effects = machine::step(&mut self.state, event, now, &mut self.pace);
        if self.state.phase != before {
            match &self.state.phase {
                Phase::WaitingToRetry { until, why } => tracing::warn!(
                    why,
                    retry_in_ms = until.duration_since(now).as_millis(),
                    "onboarding is tried again"
                ),
                phase => tracing::debug!(?phase, "the agent's phase changed"),
            }
        }
        for effect in effects {
            self.perform(effect);
        }
        self.show();
    }
}
