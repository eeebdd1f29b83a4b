//! The agent's loop: everything that happens is one `News`, the machine says what to do about it, and this carries it out.
//!
//! What takes time runs in tasks that this loop owns; each ends by itself in bounded time, or with the connection that it was for.

use crate::boot::{BootError, HeldBoot};
use crate::config::Configuration;
use crate::host::{self, Audience, Evidence, Host, HostError};
use crate::keeper;
use crate::key::AgentKey;
use crate::machine::{self, Boot, Call, Effect, Event, Phase, SessionEnd, State, Token, Wait};
use crate::mesh::Pending;
use crate::probe;
use crate::session::{CallError, Discovery, Endpoint, Link, Session};
use crate::sidecar;
use crate::status::{About, Status};
use crate::store::{Store, StoredIdentity, StoredToken, with_source};
use crate::trust::Trust;
use jiff::Timestamp;
use onboarding_kinds::agent::SidecarKind;
use onboarding_runtime::backoff::{Backoff, with_jitter};
use onboarding_wire::onboarding as pb;
use sd_notify::NotifyState;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OnceCell, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
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
}

/// Everything that can happen.
enum News {
    Linked(Link, Discovery),
    Rediscovered(Discovery),
    Evidence(Evidence),
    Token(StoredToken),
    Session(mpsc::Sender<pb::AgentMessage>),
    Plane(Box<pb::PlaneMessage>),
    Host(Arc<dyn Host>),
    Keeper(keeper::News),
    Probe(probe::Event),
    /// What needs no value beside it.
    Plain(Event),
}

/// News with the connection that it is of; what comes of an earlier one is dropped.
struct Envelope {
    connection: Option<u64>,
    news: News,
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
    /// Asked of the binary while the first connection is made; the sidecar's start doesn't wait for it.
    sidecar_version: Arc<OnceCell<String>>,

    connection: u64,
    /// Of the connection; aborted with it.
    tasks: JoinSet<()>,
    link: Option<Link>,
    discovery: Option<Discovery>,
    evidence: Option<Evidence>,
    session: Option<mpsc::Sender<pb::AgentMessage>>,
    pending: Option<Pending>,

    token: Option<StoredToken>,
    held: Option<Arc<HeldBoot>>,
    identity: Option<StoredIdentity>,

    probe: Option<(pb::Probe, tokio::task::AbortHandle)>,
    probes: JoinSet<()>,
    said_ready: bool,
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
/// Gathering evidence: plugins with their retries.
const GATHER_WITHIN: Duration = Duration::from_secs(150);
const GOODBYE_WITHIN: Duration = Duration::from_secs(4);
/// Timers are looked at this often at least: a suspended VM's clock jumps.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// Runs until `stop`, and leaves in order.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    settings.configuration.print();
    let endpoint = Endpoint::new(&settings.configuration.onboarding, &settings.trust)?;
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
    };
    let mut owned = JoinSet::new();
    owned.spawn(keeper::keep(options, commands, keeper_news));
    owned.spawn(forward(keeper_incoming, news.clone(), News::Keeper));

    let mut driver = Driver::new(settings, endpoint, store, key, news, keeper);
    driver.happened(Event::Begin);
    driver.ask_version();
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

/// Empty: unknown.
async fn sidecar_version(binary: &std::path::Path) -> String {
    match crate::version::envoy(binary).await {
        Ok(version) => {
            tracing::info!(version, "the sidecar's version is known");
            version
        }
        Err(error) => {
            tracing::warn!(error = %error, "the sidecar's version is unknown");
            String::new()
        }
    }
}

async fn forward<T>(mut from: mpsc::Receiver<T>, to: mpsc::Sender<Envelope>, wrap: fn(T) -> News) {
    while let Some(item) = from.recv().await {
        if to.send(Envelope { connection: None, news: wrap(item) }).await.is_err() {
            return;
        }
    }
}

impl Driver {
    fn new(
        settings: Settings,
        endpoint: Endpoint,
        store: Store,
        key: Arc<AgentKey>,
        news: mpsc::Sender<Envelope>,
        keeper: mpsc::UnboundedSender<keeper::Command>,
    ) -> Self {
        let (token, held, identity) = (store.token(), store.boot().map(Arc::new), store.identity());
        let state = State::new(
            Timestamp::now(),
            token.as_ref().map(token_facts),
            identity.as_ref().map(StoredIdentity::facts),
            held.as_deref().map(boot_facts),
        );
        let about = About {
            endpoint: format!("{}:{}", endpoint.host, endpoint.port),
            workload_group: settings.configuration.onboarding.group.to_string(),
            configuration_problem: None,
        };
        Self {
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
            sidecar_version: Arc::default(),
            connection: 0,
            tasks: JoinSet::new(),
            link: None,
            discovery: None,
            evidence: None,
            session: None,
            pending: None,
            token,
            held,
            identity,
            probe: None,
            probes: JoinSet::new(),
            said_ready: false,
            said: String::new(),
            shown: None,
        }
    }

    fn ask_version(&mut self) {
        let (version, binary) = (self.sidecar_version.clone(), self.settings.binary.clone());
        self.tasks.spawn(async move {
            version.get_or_init(|| sidecar_version(&binary)).await;
        });
    }

    fn sleep(&self) -> Duration {
        let until = self.state.wakes_at().map_or(LONGEST_SLEEP, |at| {
            // Rounded up: a timer that fires a moment early would find nothing due.
            let left = at.duration_since(Timestamp::now()).as_millis() + 1;
            Duration::from_millis(u64::try_from(left).unwrap_or(0))
        });
        until.min(LONGEST_SLEEP)
    }

    /// Keeps the values, tells the machine the facts.
    fn receive(&mut self, envelope: Envelope) {
        if envelope.connection.is_some_and(|connection| connection != self.connection) {
            return;
        }
        // Finished ones; the set would grow.
        while self.tasks.try_join_next().is_some() {}
        match envelope.news {
            News::Linked(link, discovery) => {
                tracing::info!(peer = %link.peer, plane_uid = discovery.plane_uid, "connected to the endpoint");
                self.link = Some(link);
                self.discovered(discovery);
            }
            News::Rediscovered(discovery) => self.discovered(discovery),
            News::Host(host) => {
                tracing::info!(host = host.describe(), "this host's platform is known");
                self.host = Some(host);
            }
            News::Evidence(evidence) => {
                tracing::info!(origin = evidence.origin, "gathered evidence of this host");
                self.evidence = Some(evidence);
                self.happened(Event::EvidenceReady);
            }
            News::Token(token) => {
                tracing::info!(
                    registration = token.registration,
                    expires_at = %token.expires_at,
                    evidence = self.evidence.as_ref().map(|evidence| evidence.origin.as_str()),
                    "authorized: got a Workload Onboarding Token"
                );
                let facts = token_facts(&token);
                self.token = Some(token);
                self.kept("token", |driver| match &driver.token {
                    Some(token) => driver.store.keep_token(token),
                    None => Ok(()),
                });
                self.happened(Event::Authorized(facts));
            }
            News::Session(outgoing) => {
                tracing::info!("the session is open");
                self.session = Some(outgoing);
                self.happened(Event::SessionOpened);
            }
            News::Plane(message) => self.plane_says(*message),
            News::Keeper(news) => self.keeper_says(news),
            News::Probe(event) => {
                let probe::Event { ready, message } = event;
                tracing::info!(ready, message, "the application's readiness changed");
                self.happened(Event::ProbeResult(machine::Health { ready, message }));
            }
            News::Plain(event) => {
                if let Event::Refused { call: Call::Authorize | Call::Renew, .. } = &event
                    && let Some(host) = &self.host
                {
                    host.refused();
                }
                self.happened(event);
            }
        }
    }

    fn discovered(&mut self, discovery: Discovery) {
        let clock_skew = Timestamp::now().duration_since(discovery.time);
        if clock_skew.abs() > machine::CLOCK_SKEW {
            tracing::warn!(
                seconds_ahead = clock_skew.as_secs(),
                "this host's clock differs from the plane's; credentials may be refused: run a time service (chrony, systemd-timesyncd)"
            );
        }
        self.discovery = Some(discovery);
        self.happened(Event::Discovered { clock_skew });
    }

    fn plane_says(&mut self, message: pb::PlaneMessage) {
        match message.message {
            Some(pb::plane_message::Message::Boot(boot)) => self.boot_received(boot),
            Some(pb::plane_message::Message::Certificate(answer)) => {
                let Some(pending) = self.pending.take() else { return };
                match pending.accept(answer, Timestamp::now()) {
                    Ok(identity) => {
                        tracing::info!(
                            spiffe_id = identity.spiffe_id,
                            expires_at = %identity.expires_at,
                            "got a certificate of the mesh"
                        );
                        let facts = identity.facts();
                        self.identity = Some(identity);
                        self.kept("certificate", |driver| match &driver.identity {
                            Some(identity) => driver.store.keep_identity(identity),
                            None => Ok(()),
                        });
                        self.happened(Event::CertificateIssued(facts));
                    }
                    Err(error) => self.certificate_refused(with_source(&error)),
                }
            }
            Some(pb::plane_message::Message::CertificateRefused(refused)) => {
                self.pending = None;
                self.certificate_refused(refused.message);
            }
            Some(pb::plane_message::Message::End(end)) => {
                let reason = session_end(end.reason());
                tracing::warn!(reason = ?reason, message = end.message, "the plane ended the session");
                self.happened(Event::SessionEnded { reason, message: end.message });
            }
            // Of a newer plane.
            None => tracing::debug!("the plane sent a message that this version does not know"),
        }
    }

    fn certificate_refused(&mut self, why: String) {
        tracing::warn!(why, "no certificate of the mesh");
        self.happened(Event::CertificateRefused { why });
    }

    fn boot_received(&mut self, message: pb::BootConfiguration) {
        match HeldBoot::apply(self.held.as_deref(), message) {
            Ok(boot) => {
                tracing::info!(
                    version = boot.version,
                    spiffe_id = boot.spiffe_id,
                    resources = boot.resources.len(),
                    "got a boot configuration"
                );
                let facts = boot_facts(&boot);
                self.held = Some(Arc::new(boot));
                self.kept("boot configuration", |driver| match &driver.held {
                    Some(held) => driver.store.keep_boot(held),
                    None => Ok(()),
                });
                self.happened(Event::BootReceived(facts));
            }
            Err(error) => {
                let why = error.to_string();
                let complete = matches!(error, BootError::AnotherBase { .. });
                tracing::warn!(why, ask_for_all_of_it = complete, "a boot configuration can't be used");
                self.happened(Event::BootUnusable { why, complete });
            }
        }
    }

    fn keeper_says(&mut self, news: keeper::News) {
        match news {
            keeper::News::Gone => {
                tracing::info!("the sidecar is stopped");
                self.happened(Event::SidecarGone);
            }
            keeper::News::Failed { why, retry_in } => {
                tracing::error!(why, ?retry_in, "the sidecar can't be started or configured");
                self.happened(Event::SidecarNotLive { why });
            }
            keeper::News::Sidecar(sidecar::Event::Ready) => {
                tracing::info!("the sidecar is live");
                self.happened(Event::SidecarLive);
            }
            keeper::News::Sidecar(sidecar::Event::NotReady { why }) => {
                tracing::warn!(why, "the sidecar is not live");
                self.happened(Event::SidecarNotLive { why });
            }
            keeper::News::Sidecar(sidecar::Event::Exited { status, restart_in }) => {
                tracing::error!(status, ?restart_in, "the sidecar ended by itself");
                let why = format!("ended by itself ({status}); it is started again");
                self.happened(Event::SidecarNotLive { why });
            }
            keeper::News::Sidecar(sidecar::Event::Accepted { version }) => {
                tracing::info!(version, "the sidecar accepted a configuration");
                self.about.configuration_problem = None;
                self.report_sidecar(version, true, String::new());
            }
            keeper::News::Sidecar(sidecar::Event::Rejected { version, message }) => {
                tracing::error!(version, message, "the sidecar refused a configuration; the last good one stays");
                self.about.configuration_problem = Some(message.clone());
                self.report_sidecar(version, false, message);
            }
        }
    }

    fn report_sidecar(&mut self, boot_version: String, accepted: bool, message: String) {
        let report = pb::SidecarReport { boot_version, accepted, message };
        self.say(pb::agent_message::Message::SidecarReport(report));
        self.show();
    }

    /// A failure to write is said, and does not end what works: the disk may be full for a while.
    fn kept(&self, what: &str, write: impl Fn(&Self) -> Result<(), crate::store::StoreError>) {
        if let Err(error) = write(self) {
            tracing::error!(
                what,
                error = %with_source(&error),
                "can't keep this on disk; after a reboot the plane must be reachable"
            );
        }
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

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Connect => self.connect(),
            Effect::Discover => self.discover(),
            Effect::GatherEvidence => self.gather(),
            Effect::Authorize => self.authorize(),
            Effect::Register { prove } => self.register(prove),
            Effect::OpenSession { complete } => self.open_session(complete),
            Effect::Disconnect => self.disconnect(),
            Effect::RenewToken => self.renew(),
            Effect::AnnounceToken => {
                if let Some(token) = &self.token {
                    let renewed = pb::TokenRenewed { token: token.token.clone() };
                    self.say(pb::agent_message::Message::TokenRenewed(renewed));
                }
            }
            Effect::RequestCertificate => match Pending::new() {
                Ok(pending) => {
                    let request = pb::CertificateRequest { csr: pending.csr.clone() };
                    self.pending = Some(pending);
                    self.say(pb::agent_message::Message::CertificateRequest(request));
                }
                Err(error) => tracing::error!(error = %with_source(&error), "no request for a certificate"),
            },
            Effect::StartSidecar => {
                if let (Some(boot), Some(identity)) = (&self.held, &self.identity) {
                    tracing::info!(version = boot.version, spiffe_id = identity.spiffe_id, "starting the sidecar");
                    let boot = boot.clone();
                    self.ask_keeper(keeper::Command::Start { boot, identity: identity.for_sidecar() });
                }
            }
            Effect::ApplyBoot => {
                if let Some(boot) = &self.held {
                    self.ask_keeper(keeper::Command::Apply(boot.clone()));
                }
            }
            Effect::RotateCertificate => {
                if let Some(identity) = &self.identity {
                    self.ask_keeper(keeper::Command::Rotate(identity.for_sidecar()));
                }
            }
            Effect::StopSidecar => {
                tracing::info!("draining and stopping the sidecar");
                self.ask_keeper(keeper::Command::Stop);
            }
            Effect::WatchApplication => self.watch_application(),
            Effect::ReportHealth(machine::Health { ready, message }) => {
                self.say(pb::agent_message::Message::Health(pb::Health { ready, message }));
            }
            Effect::ForgetToken => {
                self.token = None;
                self.kept("that the token is gone", |driver| driver.store.forget_token());
            }
            Effect::ForgetBoot => {
                self.held = None;
                self.identity = None;
                self.about.configuration_problem = None;
                self.stop_probe();
                self.kept("that the boot configuration is gone", |driver| driver.store.forget_boot());
            }
            Effect::Unregister => self.unregister(),
        }
    }

    fn ask_keeper(&self, command: keeper::Command) {
        // Its end ends the loop, which says so.
        let _ = self.keeper.send(command);
    }

    /// Over the session, if there is one. A session that takes nothing any more is about to be reported as lost.
    fn say(&self, message: pb::agent_message::Message) {
        if let Some(session) = &self.session
            && session.try_send(pb::AgentMessage { message: Some(message) }).is_err()
        {
            tracing::warn!("a message to the plane could not be sent");
        }
    }

    /// Runs beside the loop, with the connection; what it gives is dropped when the connection is another by then.
    fn spawn(&mut self, future: impl Future<Output = News> + Send + 'static) {
        let (news, connection) = (self.news.clone(), self.connection);
        self.tasks.spawn(async move {
            let found = future.await;
            // The loop has ended.
            let _ = news.send(Envelope { connection: Some(connection), news: found }).await;
        });
    }

    fn disconnect(&mut self) {
        self.tasks.abort_all();
        self.connection += 1;
        self.link = None;
        self.discovery = None;
        self.session = None;
        self.pending = None;
    }

    fn connect(&mut self) {
        self.disconnect();
        let endpoint = self.endpoint.clone();
        self.spawn(async move {
            let link = match Link::connect(&endpoint).await {
                Ok(link) => link,
                Err(error) => return lost(with_source(&error)),
            };
            match link.discover().await {
                Ok(discovery) => News::Linked(link, discovery),
                Err(error) => refused(Call::Discover, &error),
            }
        });
    }

    fn discover(&mut self) {
        let Some(link) = self.link.clone() else { return };
        self.spawn(async move {
            match link.discover().await {
                Ok(discovery) => News::Rediscovered(discovery),
                Err(error) => refused(Call::Discover, &error),
            }
        });
    }

    /// What every task about this host needs.
    fn witness(&self) -> Witness {
        Witness {
            host: self.host.clone(),
            configuration: self.settings.configuration.clone(),
            news: self.news.clone(),
            key: self.key.clone(),
        }
    }

    fn gather(&mut self) {
        let Some(discovery) = self.discovery.clone() else { return };
        let witness = self.witness();
        self.spawn(async move {
            match witness.evidence(&discovery).await {
                Ok(evidence) => News::Evidence(evidence),
                Err(why) => News::Plain(Event::EvidenceFailed { why }),
            }
        });
    }

    fn authorize(&mut self) {
        let (Some(link), Some(discovery), Some(evidence)) =
            (self.link.clone(), self.discovery.clone(), self.evidence.clone())
        else {
            return;
        };
        let (key, group) = (self.key.clone(), self.settings.configuration.onboarding.group.clone());
        self.spawn(async move {
            match link.authorize(&key, &discovery, &group, evidence.credential, Timestamp::now()).await {
                Ok(token) => News::Token(token),
                Err(error) => refused(Call::Authorize, &error),
            }
        });
    }

    fn renew(&mut self) {
        let Some(link) = self.link.clone() else { return };
        let (witness, group) = (self.witness(), self.settings.configuration.onboarding.group.clone());
        self.spawn(async move {
            let discovery = match link.discover().await {
                Ok(discovery) => discovery,
                Err(error) => return refused(Call::Renew, &error),
            };
            let evidence = match witness.evidence(&discovery).await {
                Ok(evidence) => evidence,
                Err(why) => return News::Plain(Event::EvidenceFailed { why }),
            };
            let answer = link.authorize(&witness.key, &discovery, &group, evidence.credential, Timestamp::now()).await;
            match answer {
                Ok(token) => News::Token(token),
                Err(error) => refused(Call::Renew, &error),
            }
        });
    }

    fn register(&mut self, prove: bool) {
        let (Some(link), Some(token)) = (self.link.clone(), self.token.clone()) else { return };
        let proof = self.discovery.take().filter(|_| prove);
        let (witness, version, binary) = (self.witness(), self.sidecar_version.clone(), self.settings.binary.clone());
        self.spawn(async move {
            let addresses = match witness.addresses().await {
                Ok(addresses) => addresses,
                Err(why) => {
                    return News::Plain(Event::Refused {
                        call: Call::Register,
                        code: machine::Code::Other,
                        why,
                        pushback: None,
                    });
                }
            };
            let version = version.get_or_init(|| sidecar_version(&binary)).await;
            let registration = registration(&witness.configuration, addresses, version.clone());
            match link.register(&witness.key, &token, registration, proof.as_ref()).await {
                Ok(name) => {
                    tracing::info!(registration = name, "registered");
                    News::Plain(Event::Registered)
                }
                Err(error) => refused(Call::Register, &error),
            }
        });
    }

    fn open_session(&mut self, complete: bool) {
        let (Some(link), Some(token)) = (self.link.clone(), self.token.clone()) else { return };
        self.session = None;
        let held = self.held.as_ref().filter(|_| !complete).map(|held| held.version.clone());
        let (news, connection) = (self.news.clone(), self.connection);
        self.tasks.spawn(async move {
            let say = async |found| news.send(Envelope { connection: Some(connection), news: found }).await.is_ok();
            match link.open_session(&token, held.unwrap_or_default()).await {
                Err(error) => {
                    say(refused(Call::Session, &error)).await;
                }
                Ok(Session { outgoing, mut incoming }) => {
                    if !say(News::Session(outgoing)).await {
                        return;
                    }
                    let why = loop {
                        match incoming.message().await {
                            Ok(Some(message)) => {
                                if !say(News::Plane(Box::new(message))).await {
                                    return;
                                }
                            }
                            Ok(None) => break "the plane closed the session".to_owned(),
                            Err(status) => {
                                break format!("the session broke: {}", CallError::Refused(status).describe());
                            }
                        }
                    };
                    say(lost(why)).await;
                }
            }
        });
    }

    fn unregister(&mut self) {
        let Some(token) = self.token.clone() else { return };
        // The connection is only of use where the key was proven on it, as it was for a session.
        let link = self.link.clone().filter(|_| self.session.is_some());
        let (endpoint, key) = (self.endpoint.clone(), self.key.clone());
        self.spawn(async move {
            let goodbye = async {
                match link {
                    Some(link) => link.unregister(&key, &token, None).await.map_err(|error| error.describe()),
                    None => {
                        let link = Link::connect(&endpoint).await.map_err(|error| with_source(&error))?;
                        let discovery = link.discover().await.map_err(|error| error.describe())?;
                        link.unregister(&key, &token, Some(&discovery)).await.map_err(|error| error.describe())
                    }
                }
            };
            let answer = timeout(GOODBYE_WITHIN, goodbye)
                .await
                .unwrap_or_else(|_| Err(format!("no answer within {} s", GOODBYE_WITHIN.as_secs())));
            let propagation_delay = match answer {
                Ok(delay) => {
                    tracing::info!(?delay, "unregistered; the sidecar serves on while the mesh learns of it");
                    Some(delay)
                }
                Err(why) => {
                    tracing::warn!(why, "can't unregister; the registration ends with its grace period");
                    None
                }
            };
            News::Plain(Event::Unregistered { propagation_delay })
        });
    }

    fn stop_probe(&mut self) {
        if let Some((_, task)) = self.probe.take() {
            task.abort();
        }
    }

    fn watch_application(&mut self) {
        let wanted = self.held.as_ref().and_then(|held| held.probe.clone());
        if self.probe.as_ref().map(|(probe, _)| probe) == wanted.as_ref() {
            return;
        }
        self.stop_probe();
        while self.probes.try_join_next().is_some() {}
        self.state.health = None;
        if let Some(probe) = wanted {
            let (events, incoming) = mpsc::channel(8);
            let news = self.news.clone();
            let of = probe.clone();
            let task = self.probes.spawn(async move {
                tokio::join!(probe::run(of, events), forward(incoming, news, News::Probe));
            });
            self.probe = Some((probe, task));
        }
    }

    /// `status.json`, and the service manager's line.
    fn show(&mut self) {
        let status = Status::of(&self.state, &self.about);
        if self.shown.as_ref() != Some(&status) {
            self.kept("status", |driver| status.write(&driver.store));
            let line = status.line();
            if line != self.said {
                notify(&[NotifyState::Status(&line)]);
                self.said = line;
            }
            if status.sidecar == "Live" && !self.said_ready {
                self.said_ready = true;
                notify(&[NotifyState::Ready]);
            }
            if status.phase == "Draining" && self.shown.as_ref().is_none_or(|shown| shown.phase != "Draining") {
                notify(&[NotifyState::Stopping]);
            }
            self.shown = Some(status);
        }
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager can't be told");
    }
}

/// What tasks ask of this host.
struct Witness {
    host: Option<Arc<dyn Host>>,
    configuration: Configuration,
    news: mpsc::Sender<Envelope>,
    key: Arc<AgentKey>,
}

impl Witness {
    async fn host(&self) -> Result<Arc<dyn Host>, HostError> {
        if let Some(host) = &self.host {
            return Ok(host.clone());
        }
        let host: Arc<dyn Host> = host::open(&self.configuration.agent).await?.into();
        // The loop has ended.
        let _ = self.news.send(Envelope { connection: None, news: News::Host(host.clone()) }).await;
        Ok(host)
    }

    async fn evidence(&self, discovery: &Discovery) -> Result<Evidence, String> {
        let audience = Audience {
            plane_uid: discovery.plane_uid.clone(),
            challenge: discovery.challenge.clone(),
            key: self.key.thumbprint(),
        };
        let gather = async { self.host().await?.evidence(&audience, Timestamp::now()).await };
        bounded_by_gather(gather).await
    }

    async fn addresses(&self) -> Result<Vec<onboarding_core::registration::HostAddress>, String> {
        bounded_by_gather(async { self.host().await?.addresses().await }).await
    }
}

async fn bounded_by_gather<T>(work: impl Future<Output = Result<T, HostError>>) -> Result<T, String> {
    match timeout(GATHER_WITHIN, work).await {
        Ok(found) => found.map_err(|error| with_source(&error)),
        Err(_) => Err(format!("this host did not say who it is within {} s", GATHER_WITHIN.as_secs())),
    }
}

fn registration(
    configuration: &Configuration,
    addresses: Vec<onboarding_core::registration::HostAddress>,
    version: String,
) -> pb::Registration {
    use onboarding_core::registration::{HostReport, SidecarReport};
    let onboarding = &configuration.onboarding;
    let sidecar = match &configuration.agent.sidecar.kind {
        Some(SidecarKind::Istio { revision }) => SidecarReport::Istio { version, revision: revision.clone() },
        Some(SidecarKind::Envoy) | None => SidecarReport::Envoy { version },
    };
    pb::Registration::from(&HostReport {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        sidecar,
        addresses,
        labels: onboarding.labels.clone(),
        connected_over: onboarding.connected_over,
    })
}

fn lost(why: String) -> News {
    News::Plain(Event::ConnectionLost { why })
}

fn refused(call: Call, error: &CallError) -> News {
    News::Plain(Event::Refused { call, code: error.code(), why: error.describe(), pushback: error.pushback() })
}

fn token_facts(token: &StoredToken) -> Token {
    Token { registration: token.registration.clone(), issued_at: token.issued_at, expires_at: token.expires_at }
}

fn boot_facts(boot: &HeldBoot) -> Boot {
    Boot { version: boot.version.clone(), spiffe_id: boot.spiffe_id.clone(), probed: boot.probe.is_some() }
}

fn session_end(reason: pb::session_end::Reason) -> SessionEnd {
    use pb::session_end::Reason;
    match reason {
        Reason::Replaced => SessionEnd::Replaced,
        Reason::Withdrawn => SessionEnd::Withdrawn,
        Reason::PolicyUnreadable => SessionEnd::PolicyUnreadable,
        Reason::Deleted => SessionEnd::Deleted,
        Reason::Unregistered => SessionEnd::Unregistered,
        Reason::TokenExpired => SessionEnd::TokenExpired,
        Reason::PlaneStopping => SessionEnd::PlaneStopping,
        Reason::Unspecified => SessionEnd::Unspecified,
    }
}
