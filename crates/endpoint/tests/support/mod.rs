//! A running endpoint over a backend in memory, and an agent that can be told to misbehave.

mod agent;

pub use agent::*;
use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use onboarding_attest::Attestors;
use onboarding_attest::jwt::{Issuer, KeySource};
use onboarding_core::group::WorkloadGroup;
use onboarding_core::label::{LabelSelector, Labels};
use onboarding_core::name::{GroupName, RegistrationName};
use onboarding_core::policy::{AttributeMatcher, JwtMatcher, Matcher, Policy, PolicySet, Rule};
use onboarding_core::registration::State;
use onboarding_endpoint::audit::Audit;
use onboarding_endpoint::backend::*;
use onboarding_endpoint::limits::Limits;
use onboarding_endpoint::{Options, Running};
use onboarding_runtime::readiness::Readiness;
use onboarding_testkit::oidc::{self, Oidc};
use onboarding_wire::onboarding as pb;
use rustls_pki_types::ServerName;
use std::collections::{BTreeSet, HashMap};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{broadcast, watch};
use tokio_stream::wrappers::BroadcastStream;
use tokio_util::sync::CancellationToken;

pub const UID: &str = "https://onboarding-endpoint.your-company.corp";
pub const HOST: &str = "onboarding-endpoint.your-company.corp";

// ---- the backend ----

pub struct Memory {
    states: Mutex<HashMap<RegistrationName, Stored>>,
    keys: Mutex<(Vec<u8>, u64)>,
    pub changes: broadcast::Sender<RegistrationName>,
    /// Every store fails as long as this holds.
    pub broken: std::sync::atomic::AtomicBool,
    /// No store goes on while a test holds this.
    pub gate: tokio::sync::Mutex<()>,
    /// Nor is one answered while a test holds this.
    pub answers: tokio::sync::Mutex<()>,
    /// Loads and stores that were begun.
    pub begun: [std::sync::atomic::AtomicUsize; 2],
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            states: Mutex::default(),
            keys: Mutex::default(),
            changes: broadcast::Sender::new(1000),
            broken: Default::default(),
            gate: Default::default(),
            answers: Default::default(),
            begun: Default::default(),
        }
    }
}

#[async_trait]
impl Registry for Memory {
    async fn load(&self, name: &RegistrationName) -> Result<Stored, RegistryError> {
        self.begun[0].fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let states = self.states.lock().unwrap();
        Ok(states.get(name).cloned().unwrap_or(Stored { state: State::Absent, version: 0 }))
    }
    async fn store(&self, name: &RegistrationName, expected: u64, state: &State) -> Result<u64, RegistryError> {
        self.begun[1].fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let _open = self.gate.lock().await;
        if self.broken.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(RegistryError::Unavailable("no space left on device".to_owned()));
        }
        let next = {
            let mut states = self.states.lock().unwrap();
            let version = states.get(name).map_or(0, |stored| stored.version);
            if version != expected {
                return Err(RegistryError::Conflict);
            }
            states.insert(name.clone(), Stored { state: state.clone(), version: version + 1 });
            version + 1
        };
        // Nobody may be listening.
        let _ = self.changes.send(name.clone());
        let _answered = self.answers.lock().await;
        Ok(next)
    }
    fn changes(&self) -> BoxStream<'static, RegistrationName> {
        BroadcastStream::new(self.changes.subscribe()).map(Result::unwrap).boxed()
    }
    async fn list(&self) -> Result<Vec<(RegistrationName, Stored)>, RegistryError> {
        Ok(self.states.lock().unwrap().iter().map(|(name, stored)| (name.clone(), stored.clone())).collect())
    }
}

#[async_trait]
impl KeyStore for Memory {
    async fn load(&self) -> Result<(Vec<u8>, u64), RegistryError> {
        Ok(self.keys.lock().unwrap().clone())
    }
    async fn store(&self, expected: u64, bytes: &[u8]) -> Result<u64, RegistryError> {
        let mut keys = self.keys.lock().unwrap();
        if keys.1 != expected {
            return Err(RegistryError::Conflict);
        }
        *keys = (bytes.to_vec(), expected + 1);
        Ok(keys.1)
    }
}

/// The replicas that are there, and which of them leads.
pub struct Crew {
    there: Mutex<BTreeSet<String>>,
    leader: watch::Sender<String>,
}

impl Crew {
    /// All of them there, the first leading.
    pub fn new(replicas: &[&str]) -> Arc<Self> {
        let there = replicas.iter().map(|name| (*name).to_owned()).collect();
        Arc::new(Self { there: Mutex::new(there), leader: watch::Sender::new(replicas[0].to_owned()) })
    }
    /// The others take this one for gone, or for back.
    pub fn set_there(&self, replica: &str, there: bool) {
        if there {
            self.there.lock().unwrap().insert(replica.to_owned());
        } else {
            self.there.lock().unwrap().remove(replica);
        }
        self.leader.send_modify(|_| ());
    }
    pub fn elect(&self, replica: &str) {
        self.leader.send_replace(replica.to_owned());
    }
}

struct Member {
    replica: String,
    crew: Arc<Crew>,
    leads: watch::Sender<bool>,
}

impl Member {
    fn join(replica: &str, crew: Arc<Crew>) -> Arc<Self> {
        let leads = watch::Sender::new(*crew.leader.borrow() == replica);
        let member = Arc::new(Self { replica: replica.to_owned(), crew, leads });
        let (mut leader, follower) = (member.crew.leader.subscribe(), member.clone());
        tokio::spawn(async move {
            while leader.changed().await.is_ok() {
                follower.leads.send_replace(*leader.borrow_and_update() == follower.replica);
            }
        });
        member
    }
}

impl Fleet for Member {
    fn leads(&self) -> watch::Receiver<bool> {
        self.leads.subscribe()
    }
    fn is_there(&self, replica: &str) -> bool {
        replica == self.replica || self.crew.there.lock().unwrap().contains(replica)
    }
}

struct Config(watch::Sender<Arc<Snapshot>>);

impl ConfigSource for Config {
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.0.subscribe()
    }
}

/// A workload of this subject gets its boot configuration once what is in the way was said.
pub const WITHOUT_MESH: &str = "vm-without-mesh";
pub const NO_MESH: &str = "there is no such revision; install it";

/// The version of such a workload's boot configuration is this long: more than a connection takes before its agent reads.
pub const IN_LARGE_MESH: &str = "vm-in-large-mesh";
pub const LARGE: usize = 4 * 1024 * 1024;

/// One boot configuration, then nothing; certificates are not issued.
struct Bare;

/// What operators were told.
#[derive(Clone, Default)]
pub struct Told(Arc<Mutex<Vec<Refused>>>);

impl Told {
    pub fn all(&self) -> Vec<Refused> {
        self.0.lock().unwrap().clone()
    }
}

impl Notices for Told {
    fn refused(&self, refused: Refused) {
        self.0.lock().unwrap().push(refused);
    }
}

#[async_trait]
impl Provisioner for Bare {
    fn boot(&self, workload: &Workload, _: &str) -> BoxStream<'static, Result<pb::BootConfiguration, ProvisionError>> {
        let version = if workload.name.name.contains(IN_LARGE_MESH) { "1".repeat(LARGE) } else { "1".to_owned() };
        let boot = pb::BootConfiguration { version, spiffe_id: workload.name.to_string(), ..Default::default() };
        let problem = Err(ProvisionError::Refused(NO_MESH.to_owned()));
        let problem = workload.name.name.ends_with(WITHOUT_MESH).then_some(problem);
        let items = problem.into_iter().chain([Ok(boot)]);
        futures_util::stream::iter(items).chain(futures_util::stream::pending()).boxed()
    }
    async fn certificate(&self, _: &Workload, _: &[u8]) -> Result<pb::Certificate, ProvisionError> {
        Err(ProvisionError::Refused("no mesh here".to_owned()))
    }
    fn reported(&self, _: &Workload, _: &pb::SidecarReport) {}
}

/// Where audit lines end up; can be made to fail.
#[derive(Clone, Default)]
pub struct Lines(Arc<Mutex<(Vec<u8>, bool)>>);

impl Lines {
    pub fn break_down(&self) {
        self.0.lock().unwrap().1 = true;
    }
    pub fn read(&self) -> Vec<serde_json::Value> {
        let bytes = self.0.lock().unwrap().0.clone();
        String::from_utf8(bytes).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let mut lines = self.0.lock().unwrap();
        if lines.1 {
            return Err(std::io::Error::other("the disk is full"));
        }
        lines.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

// ---- the plane ----

pub struct Plane {
    pub address: SocketAddr,
    pub registry: Arc<Memory>,
    pub audit: Lines,
    pub told: Told,
    pub readiness: Readiness,
    pub metrics: Arc<Mutex<prometheus_client::registry::Registry>>,
    pub directory: tempfile::TempDir,
    pub oidc: Arc<Oidc>,
    config: watch::Sender<Arc<Snapshot>>,
    /// CAs that were used for the endpoint's certificate.
    roots: Mutex<String>,
    stop: CancellationToken,
    running: Option<Running>,
}

pub fn group() -> GroupName {
    GroupName { namespace: GROUP.0.to_owned(), name: GROUP.1.to_owned() }
}

pub fn policy(issuer: &str) -> Policy {
    Policy {
        namespace: "bookinfo".to_owned(),
        name: "allow-our-vms".to_owned(),
        rules: vec![Rule {
            workloads: vec![Matcher::Jwt(JwtMatcher {
                issuer: issuer.to_owned(),
                subjects: Vec::new(),
                attributes: vec![AttributeMatcher { name: "role".to_owned(), values: vec!["ratings".to_owned()] }],
            })],
            onboard_to: vec![LabelSelector::default()],
        }],
    }
}

impl Plane {
    pub async fn start() -> Self {
        Self::start_with(Duration::from_secs(300), Limits::default()).await
    }

    pub async fn start_with(grace: Duration, limits: Limits) -> Self {
        let oidc = Arc::new(oidc::start().await.unwrap());
        let made = oidc::make_tls(&[HOST]).unwrap();
        let workload_group = WorkloadGroup {
            name: group(),
            labels: Labels::new(),
            workload_labels: Labels::new(),
            workload_annotations: Default::default(),
            service_account: "ratings-vm".to_owned(),
            network: None,
            locality: None,
            weight: None,
            ports: Default::default(),
            address: None,
            probe: None,
        };
        let snapshot = Snapshot {
            generation: 1,
            plane: Some(Arc::new(PlaneSettings {
                uid: UID.to_owned(),
                hosts: vec![HOST.to_owned()],
                token_life: Duration::from_secs(3600),
                propagation_delay: Duration::from_secs(10),
                issuers: vec![Issuer {
                    issuer: oidc.issuer.clone(),
                    short_name: "my-corp".to_owned(),
                    keys: KeySource::Inline(oidc.jwks().to_string()),
                    attributes: Some("$.custom_attributes".to_owned()),
                }],
                local_repository: false,
            })),
            tls: Some(Arc::new(TlsMaterial {
                certificate_chain: made.certificate_chain,
                private_key: made.private_key,
            })),
            policies: Arc::new(PolicySet::compile(vec![policy(&oidc.issuer)])),
            groups: HashMap::from([(group(), Arc::new(workload_group))]),
            ..Snapshot::default()
        };
        let (config, _) = watch::channel(Arc::new(snapshot));
        let alone = Crew::new(&["plane-0"]);
        Self::serve(config, Arc::default(), oidc, made.ca, grace, limits, ("plane-0", alone)).await
    }

    /// One more on the same registry, keys and configuration, as if this one had been killed.
    pub async fn another(&self, grace: Duration) -> Self {
        self.replica("plane-0", Crew::new(&["plane-0"]), grace).await
    }

    /// One more replica beside this one.
    pub async fn replica(&self, name: &str, crew: Arc<Crew>, grace: Duration) -> Self {
        let (registry, oidc) = (self.registry.clone(), self.oidc.clone());
        let roots = self.roots.lock().unwrap().clone();
        Self::serve(self.config.clone(), registry, oidc, roots, grace, Limits::default(), (name, crew)).await
    }

    async fn serve(
        config: watch::Sender<Arc<Snapshot>>,
        registry: Arc<Memory>,
        oidc: Arc<Oidc>,
        roots: String,
        grace: Duration,
        limits: Limits,
        (replica, crew): (&str, Arc<Crew>),
    ) -> Self {
        let (audit, told) = (Lines::default(), Told::default());
        let readiness = Readiness::default();
        let directory = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let mut metrics = prometheus_client::registry::Registry::default();
        let running = onboarding_endpoint::start(
            Options {
                listen: "127.0.0.1:0".parse().unwrap(),
                admin_socket: Some(directory.path().join("admin.sock")),
                replica: replica.to_owned(),
                grace,
                limits,
                audit: Audit::new(Box::new(audit.clone())).unwrap(),
            },
            Backend {
                config: Arc::new(Config(config.clone())),
                registry: registry.clone(),
                provisioner: Arc::new(Bare),
                keys: registry.clone(),
                fleet: Member::join(replica, crew),
                notices: Arc::new(told.clone()),
            },
            Arc::new(Attestors::new(Default::default()).unwrap()),
            &mut metrics,
            readiness.clone(),
            stop.clone(),
        )
        .await
        .unwrap();
        Self {
            address: running.address,
            registry,
            audit,
            told,
            readiness,
            metrics: Arc::new(Mutex::new(metrics)),
            directory,
            oidc,
            config,
            roots: Mutex::new(roots),
            stop,
            running: Some(running),
        }
    }

    /// Replaces the configuration by a changed one.
    pub fn change(&self, change: impl FnOnce(&mut Snapshot)) {
        let now = self.config.borrow().clone();
        let mut next = Snapshot {
            generation: now.generation + 1,
            plane: now.plane.clone(),
            tls: now.tls.clone(),
            policies: now.policies.clone(),
            groups: now.groups.clone(),
            policy_unreadable: now.policy_unreadable,
            faults: now.faults.clone(),
        };
        change(&mut next);
        self.config.send_replace(Arc::new(next));
    }

    pub fn withdraw_policies(&self) {
        self.change(|snapshot| snapshot.policies = Arc::new(PolicySet::default()));
    }

    /// A new certificate under a new CA; the names of the old one.
    pub fn renew_certificate(&self) -> String {
        let made = oidc::make_tls(&[HOST]).unwrap();
        self.roots.lock().unwrap().push_str(&made.ca);
        self.change(|snapshot| {
            snapshot.tls = Some(Arc::new(TlsMaterial {
                certificate_chain: made.certificate_chain.clone(),
                private_key: made.private_key,
            }));
        });
        made.certificate_chain
    }

    pub fn jwt(&self, subject: &str, role: &str) -> String {
        let now = jiff::Timestamp::now().as_second();
        self.oidc
            .mint(
                jsonwebtoken::Algorithm::ES256,
                serde_json::json!({
                    "sub": subject, "aud": UID, "iat": now, "exp": now + 600,
                    "custom_attributes": { "role": role },
                }),
            )
            .unwrap()
    }

    /// What trusts this plane.
    pub fn client_config(&self) -> Arc<rustls::ClientConfig> {
        self.client_of(rustls::ALL_VERSIONS)
    }

    pub fn client_of(&self, versions: &[&'static rustls::SupportedProtocolVersion]) -> Arc<rustls::ClientConfig> {
        client_config(&self.roots.lock().unwrap(), versions)
    }

    /// The certificate that a new connection sees, PEM-free.
    pub async fn served_certificate(&self) -> Vec<u8> {
        let tcp = TcpStream::connect(self.address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(self.client_config());
        let stream = connector.connect(ServerName::try_from(HOST).unwrap(), tcp).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
    }

    pub async fn agent(&self) -> Agent {
        self.agent_with(Key::new()).await
    }

    /// A connection of its own.
    pub async fn agent_with(&self, key: Key) -> Agent {
        connect(self.address, HOST, self.client_config(), key).await
    }

    pub async fn stop(mut self) {
        self.stop.cancel();
        self.running.take().unwrap().wait().await.unwrap();
    }
}

/// Waits until a state is as wanted; fails with the last one.
pub async fn until(plane: &Plane, what: &str, wanted: impl Fn(&[(RegistrationName, Stored)]) -> bool) {
    becomes(what, async || Registry::list(plane.registry.as_ref()).await.unwrap(), |all| wanted(all)).await;
}

/// Waits until what `look` sees is as wanted; fails with what it saw last.
pub async fn becomes<T: std::fmt::Debug>(what: &str, look: impl AsyncFn() -> T, wanted: impl Fn(&T) -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    let mut pause = tokio::time::interval(Duration::from_millis(10));
    loop {
        let seen = look().await;
        if wanted(&seen) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{what}: still {seen:?}");
        pause.tick().await;
    }
}

impl Plane {
    /// A line of `/metrics`, by its name and labels.
    pub fn metric(&self, name: &str) -> Option<String> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.metrics.lock().unwrap()).unwrap();
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned))
    }

    /// Waits until so many connections failed for this reason.
    pub async fn failed_connections(&self, reason: &str, wanted: u64) {
        let name = format!("onboarding_connections_failed_total{{reason=\"{reason}\"}}");
        let count = async || self.metric(&name).map_or(0, |count| count.parse().unwrap());
        becomes(&name, count, |count: &u64| *count == wanted).await;
    }

    /// The decisions of the audit log so far.
    pub fn decisions(&self) -> Vec<serde_json::Value> {
        self.audit.read().iter().map(|line| line["decision"].clone()).collect()
    }
}

/// What the admin socket answers: the status, and the JSON.
pub async fn ask(plane: &Plane, request: &str) -> (u16, serde_json::Value) {
    let mut socket = tokio::net::UnixStream::connect(plane.directory.path().join("admin.sock")).await.unwrap();
    let request = format!("{request} HTTP/1.1\r\nHost: plane\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
}
