//! A running endpoint over a backend in memory, and an agent that can be told to misbehave.

use async_trait::async_trait;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
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
use onboarding_wire::JWT_CREDENTIAL;
use onboarding_wire::onboarding as pb;
use onboarding_wire::proof::{Purpose, signed_bytes};
use pb::discovery_service_client::DiscoveryServiceClient;
use pb::onboarding_authorization_service_client::OnboardingAuthorizationServiceClient;
use pb::session_service_client::SessionServiceClient;
use pb::workload_registration_service_client::WorkloadRegistrationServiceClient;
use prost::Message;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use std::collections::HashMap;
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

pub const UID: &str = "https://onboarding-endpoint.your-company.corp";
pub const HOST: &str = "onboarding-endpoint.your-company.corp";

// ---- the backend ----

#[derive(Default)]
pub struct Memory {
    states: Mutex<HashMap<RegistrationName, Stored>>,
    keys: Mutex<(Vec<u8>, u64)>,
    /// Every store fails as long as this holds.
    pub broken: std::sync::atomic::AtomicBool,
}

#[async_trait]
impl Registry for Memory {
    async fn load(&self, name: &RegistrationName) -> Result<Stored, RegistryError> {
        let states = self.states.lock().unwrap();
        Ok(states.get(name).cloned().unwrap_or(Stored { state: State::Absent, version: 0 }))
    }
    async fn store(&self, name: &RegistrationName, expected: u64, state: &State) -> Result<u64, RegistryError> {
        if self.broken.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(RegistryError::Unavailable("no space left on device".to_owned()));
        }
        let mut states = self.states.lock().unwrap();
        let version = states.get(name).map_or(0, |stored| stored.version);
        if version != expected {
            return Err(RegistryError::Conflict);
        }
        states.insert(name.clone(), Stored { state: state.clone(), version: version + 1 });
        Ok(version + 1)
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

struct Config(watch::Sender<Arc<Snapshot>>);

impl ConfigSource for Config {
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.0.subscribe()
    }
}

/// One boot configuration, then nothing; certificates are not issued.
struct Bare;

#[async_trait]
impl Provisioner for Bare {
    fn boot(&self, workload: &Workload, _: &str) -> BoxStream<'static, Result<pb::BootConfiguration, ProvisionError>> {
        let boot = pb::BootConfiguration {
            version: "1".to_owned(),
            spiffe_id: workload.name.to_string(),
            ..Default::default()
        };
        futures_util::stream::iter([Ok(boot)]).chain(futures_util::stream::pending()).boxed()
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
    GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() }
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
        Self::serve(config, Arc::default(), oidc, made.ca, grace, limits).await
    }

    /// One more on the same registry, keys and configuration, as if this one had been killed.
    pub async fn another(&self, grace: Duration) -> Self {
        let (registry, oidc) = (self.registry.clone(), self.oidc.clone());
        let roots = self.roots.lock().unwrap().clone();
        Self::serve(self.config.clone(), registry, oidc, roots, grace, Limits::default()).await
    }

    async fn serve(
        config: watch::Sender<Arc<Snapshot>>,
        registry: Arc<Memory>,
        oidc: Arc<Oidc>,
        roots: String,
        grace: Duration,
        limits: Limits,
    ) -> Self {
        let audit = Lines::default();
        let readiness = Readiness::default();
        let directory = tempfile::tempdir().unwrap();
        let stop = CancellationToken::new();
        let mut metrics = prometheus_client::registry::Registry::default();
        let running = onboarding_endpoint::start(
            Options {
                listen: "127.0.0.1:0".parse().unwrap(),
                admin_socket: Some(directory.path().join("admin.sock")),
                replica: "plane-0".to_owned(),
                grace,
                limits,
                audit: Audit::new(Box::new(audit.clone())).unwrap(),
            },
            Backend {
                config: Arc::new(Config(config.clone())),
                registry: registry.clone(),
                provisioner: Arc::new(Bare),
                keys: registry.clone(),
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

    fn client_config(&self) -> Arc<rustls::ClientConfig> {
        let mut roots = rustls::RootCertStore::empty();
        for ca in CertificateDer::pem_slice_iter(self.roots.lock().unwrap().as_bytes()) {
            roots.add(ca.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
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
        let (address, tls) = (self.address, self.client_config());
        let connector = tower::service_fn(move |_: http::Uri| {
            let tls = tls.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                let name = ServerName::try_from(HOST).map_err(std::io::Error::other)?;
                let stream = tokio_rustls::TlsConnector::from(tls).connect(name, tcp).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let channel = tonic::transport::Endpoint::from_static("https://onboarding-endpoint.your-company.corp:15443")
            .connect_with_connector(connector)
            .await
            .unwrap();
        Agent { channel, key, token: String::new() }
    }

    pub async fn stop(mut self) {
        self.stop.cancel();
        self.running.take().unwrap().wait().await.unwrap();
    }
}

// ---- the agent ----

#[derive(Clone)]
pub struct Key {
    pair: Arc<EcdsaKeyPair>,
    pub public: Vec<u8>,
}

impl Key {
    pub fn new() -> Self {
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new()).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, document.as_ref()).unwrap();
        use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
        let public = public.as_ref().to_vec();
        Self { pair: Arc::new(pair), public }
    }

    pub fn proof(&self, uid: &str, challenge: &[u8], purpose: Purpose<'_>) -> pb::KeyProof {
        let signature = self.pair.sign(&SystemRandom::new(), &signed_bytes(uid, challenge, purpose)).unwrap();
        pb::KeyProof { public_key: self.public.clone(), signature: signature.as_ref().to_vec() }
    }
}

pub struct Agent {
    pub channel: Channel,
    pub key: Key,
    pub token: String,
}

pub struct Session {
    pub say: mpsc::Sender<pb::AgentMessage>,
    pub hear: Streaming<pb::PlaneMessage>,
}

impl Agent {
    pub async fn discover(&self) -> pb::DiscoverResponse {
        DiscoveryServiceClient::new(self.channel.clone()).discover(pb::DiscoverRequest {}).await.unwrap().into_inner()
    }

    /// What a well-behaved agent would send.
    pub async fn request(&self, jwt: &str) -> pb::AuthorizeOnboardingRequest {
        let discovered = self.discover().await;
        let value = pb::JwtCredential { token: jwt.to_owned() }.encode_to_vec();
        let purpose = Purpose::Authorize { evidence: &value, group: &group().to_string() };
        let proof = self.key.proof(&discovered.plane_uid, &discovered.challenge, purpose);
        pb::AuthorizeOnboardingRequest {
            credential: Some(prost_types::Any { type_url: JWT_CREDENTIAL.to_owned(), value }),
            workload_group: Some(pb::WorkloadGroupRef { namespace: group().namespace, name: group().name }),
            proof: Some(proof),
        }
    }

    pub async fn authorize_with(
        &self,
        request: pb::AuthorizeOnboardingRequest,
    ) -> Result<pb::AuthorizeOnboardingResponse, Status> {
        OnboardingAuthorizationServiceClient::new(self.channel.clone())
            .authorize_onboarding(request)
            .await
            .map(tonic::Response::into_inner)
    }

    pub async fn authorize(&mut self, jwt: &str) -> Result<pb::AuthorizeOnboardingResponse, Status> {
        let response = self.authorize_with(self.request(jwt).await).await?;
        self.token = response.token.clone();
        Ok(response)
    }

    pub fn bearer<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer {}", self.token).parse().unwrap());
        request
    }

    pub async fn register_at(&self, ip: &str, proof: Option<pb::KeyProof>) -> Result<String, Status> {
        let registration = pb::Registration {
            agent_version: "1.0.0".to_owned(),
            sidecar: Some(pb::registration::Sidecar::Envoy(pb::EnvoySidecar { version: "1.40.0".to_owned() })),
            addresses: vec![pb::HostAddress { ip: ip.to_owned(), kind: pb::AddressKind::Vpc.into() }],
            labels: HashMap::new(),
            connected_over: pb::AddressKind::Vpc.into(),
        };
        let request = self.bearer(pb::RegisterWorkloadRequest { registration: Some(registration), proof });
        WorkloadRegistrationServiceClient::new(self.channel.clone())
            .register_workload(request)
            .await
            .map(|response| response.into_inner().name)
    }

    pub async fn register(&self) -> Result<String, Status> {
        self.register_at("10.0.0.4", None).await
    }

    pub async fn unregister(&self) -> Result<pb::UnregisterWorkloadResponse, Status> {
        WorkloadRegistrationServiceClient::new(self.channel.clone())
            .unregister_workload(self.bearer(pb::UnregisterWorkloadRequest { proof: None }))
            .await
            .map(tonic::Response::into_inner)
    }

    pub async fn session_with(&self, proof: Option<pb::KeyProof>) -> Result<Session, Status> {
        let (say, messages) = mpsc::channel(4);
        let hello = pb::Hello { proof, boot_version: String::new() };
        say.send(pb::AgentMessage { message: Some(pb::agent_message::Message::Hello(hello)) }).await.unwrap();
        let hear = SessionServiceClient::new(self.channel.clone())
            .session(self.bearer(ReceiverStream::new(messages)))
            .await?
            .into_inner();
        Ok(Session { say, hear })
    }

    pub async fn session(&self) -> Result<Session, Status> {
        self.session_with(None).await
    }

    /// All of it.
    pub async fn join(&mut self, jwt: &str) -> Result<Session, Status> {
        self.authorize(jwt).await?;
        self.register().await?;
        self.session().await
    }

    /// A proof over a fresh challenge for the use of the token.
    pub async fn token_proof(&self) -> pb::KeyProof {
        let discovered = self.discover().await;
        self.key.proof(&discovered.plane_uid, &discovered.challenge, Purpose::UseToken { token: &self.token })
    }
}

impl Session {
    pub async fn say(&self, message: pb::agent_message::Message) {
        self.say.send(pb::AgentMessage { message: Some(message) }).await.unwrap();
    }

    /// The end that the plane announces, whatever comes before it.
    pub async fn end(&mut self) -> pb::SessionEnd {
        let end = async {
            loop {
                match self.hear.message().await.unwrap().expect("the session broke off without a word").message {
                    Some(pb::plane_message::Message::End(end)) => return end,
                    _ => continue,
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(10), end).await.expect("the session should have ended")
    }

    pub async fn boot(&mut self) -> pb::BootConfiguration {
        match self.hear.message().await.unwrap().unwrap().message {
            Some(pb::plane_message::Message::Boot(boot)) => boot,
            other => panic!("{other:?} instead of a boot configuration"),
        }
    }
}

#[track_caller]
pub fn assert_refused<T: std::fmt::Debug>(outcome: Result<T, Status>, code: Code, words: &str) -> Status {
    let status = outcome.expect_err("should have been refused");
    assert_eq!(status.code(), code, "{}", status.message());
    assert!(status.message().contains(words), "{:?} does not say {words:?}", status.message());
    status
}

/// Waits until a state is as wanted; fails with the last one.
pub async fn until(plane: &Plane, what: &str, wanted: impl Fn(&[(RegistrationName, Stored)]) -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    let mut pause = tokio::time::interval(Duration::from_millis(10));
    loop {
        let all = Registry::list(plane.registry.as_ref()).await.unwrap();
        if wanted(&all) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "{what}: still {all:?}");
        pause.tick().await;
    }
}
