//! A plane on loopback that answers as it is told: real TLS, real gRPC, and proofs that are really checked.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use onboarding_wire::onboarding as pb;
use onboarding_wire::onboarding::discovery_service_server::{DiscoveryService, DiscoveryServiceServer};
use onboarding_wire::onboarding::onboarding_authorization_service_server::{
    OnboardingAuthorizationService, OnboardingAuthorizationServiceServer,
};
use onboarding_wire::onboarding::session_service_server::{SessionService, SessionServiceServer};
use onboarding_wire::onboarding::workload_registration_service_server::{
    WorkloadRegistrationService, WorkloadRegistrationServiceServer,
};
use onboarding_wire::proof::{Purpose, signed_bytes};
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair, SanType};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use x509_parser::prelude::FromDer;

pub const UID: &str = "https://plane.test";
pub const SPIFFE_ID: &str = "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm";
/// The name in the certificate.
pub const NAME: &str = "localhost";

/// What the plane was asked, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum Asked {
    Discover,
    Authorize { type_url: String },
    Register { proven: bool, report: Box<pb::Registration> },
    Session { boot_version: String },
    Unregister { proven: bool },
    Health { ready: bool },
    TokenRenewed,
    CertificateRequest,
    SidecarReport { boot_version: String, accepted: bool },
}

pub struct Script {
    pub asked: Vec<Asked>,
    pub refuse_authorize: VecDeque<Status>,
    pub refuse_register: VecDeque<Status>,
    pub token_life: Duration,
    /// How far the plane's clock is ahead.
    pub ahead: Duration,
    pub boots: Vec<pb::BootConfiguration>,
    pub sessions: Vec<mpsc::Sender<Result<pb::PlaneMessage, Status>>>,
    challenges: Vec<Vec<u8>>,
    counter: u64,
}

pub struct Plane {
    pub address: SocketAddr,
    /// PEM.
    pub ca: String,
    script: Arc<Mutex<Script>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

fn make_ca() -> Ca {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pem = parameters.self_signed(&key).unwrap().pem();
    Ca { issuer: Issuer::new(parameters, key), pem }
}

impl Plane {
    pub async fn start() -> Self {
        let ca = make_ca();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![NAME.to_owned()]).unwrap().signed_by(&key, &ca.issuer).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key.serialize_der().try_into().unwrap())
            .unwrap();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (accepted, connections) = mpsc::channel(16);
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                // tonic wants a transport that it knows.
                let (mut inner, outer) = tokio::io::duplex(64 * 1024);
                tokio::spawn(async move { tokio::io::copy_bidirectional(&mut stream, &mut inner).await.ok() });
                if accepted.send(Ok::<_, std::io::Error>(outer)).await.is_err() {
                    return;
                }
            }
        });
        let script = Arc::new(Mutex::new(Script {
            asked: Vec::new(),
            refuse_authorize: VecDeque::new(),
            refuse_register: VecDeque::new(),
            token_life: Duration::from_secs(3600),
            ahead: Duration::ZERO,
            boots: Vec::new(),
            sessions: Vec::new(),
            challenges: Vec::new(),
            counter: 0,
        }));
        let services = Services { script: script.clone(), mesh: Arc::new(make_ca()) };
        let serving = tokio::spawn(async move {
            tonic::transport::Server::builder()
                .add_service(DiscoveryServiceServer::new(services.clone()))
                .add_service(OnboardingAuthorizationServiceServer::new(services.clone()))
                .add_service(WorkloadRegistrationServiceServer::new(services.clone()))
                .add_service(SessionServiceServer::new(services))
                .serve_with_incoming(ReceiverStream::new(connections))
                .await
                .unwrap();
        });
        Self { address, ca: ca.pem, script, tasks: vec![accepting, serving] }
    }

    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// To the newest session.
    pub async fn say(&self, message: pb::plane_message::Message) {
        let session = self.script().sessions.last().cloned().unwrap();
        session.send(Ok(pb::PlaneMessage { message: Some(message) })).await.unwrap();
    }

    /// The plane's last word, and the end of the stream.
    pub async fn end(&self, reason: pb::session_end::Reason) {
        let end = pb::SessionEnd { reason: reason.into(), message: "the test says so".to_owned() };
        self.say(pb::plane_message::Message::End(end)).await;
        self.script().sessions.clear();
    }
}

#[derive(Clone)]
struct Services {
    script: Arc<Mutex<Script>>,
    mesh: Arc<Ca>,
}

fn time(time: SystemTime) -> Option<prost_types::Timestamp> {
    Some(time.into())
}

impl Services {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    fn asked(&self, asked: Asked) {
        self.script().asked.push(asked);
    }

    /// Over a challenge that was given out and not used yet.
    fn check(&self, proof: Option<&pb::KeyProof>, purpose: Purpose<'_>) -> Result<(), Status> {
        let proof = proof.ok_or_else(|| Status::unauthenticated("no proof"))?;
        let (_, key) = x509_parser::x509::SubjectPublicKeyInfo::from_der(&proof.public_key).unwrap();
        let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &*key.subject_public_key.data);
        let mut script = self.script();
        let found = script
            .challenges
            .iter()
            .position(|challenge| key.verify(&signed_bytes(UID, challenge, purpose), &proof.signature).is_ok());
        let index = found.ok_or_else(|| Status::unauthenticated("the proof is over no challenge of ours"))?;
        script.challenges.remove(index);
        Ok(())
    }

    fn token<T>(&self, request: &Request<T>) -> Result<String, Status> {
        let value = request.metadata().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        match value.strip_prefix("Bearer ") {
            Some(token) if token.starts_with("token-") => Ok(token.to_owned()),
            _ => Err(Status::unauthenticated("no token")),
        }
    }
}

#[tonic::async_trait]
impl DiscoveryService for Services {
    async fn discover(&self, _: Request<pb::DiscoverRequest>) -> Result<Response<pb::DiscoverResponse>, Status> {
        self.asked(Asked::Discover);
        let mut script = self.script();
        script.counter += 1;
        let challenge = script.counter.to_be_bytes().repeat(4);
        script.challenges.push(challenge.clone());
        let now = SystemTime::now() + script.ahead;
        Ok(Response::new(pb::DiscoverResponse { plane_uid: UID.to_owned(), challenge, time: time(now) }))
    }
}

#[tonic::async_trait]
impl OnboardingAuthorizationService for Services {
    async fn authorize_onboarding(
        &self,
        request: Request<pb::AuthorizeOnboardingRequest>,
    ) -> Result<Response<pb::AuthorizeOnboardingResponse>, Status> {
        let request = request.into_inner();
        let credential = request.credential.unwrap();
        let group = request.workload_group.unwrap();
        let group = format!("{}/{}", group.namespace, group.name);
        self.check(request.proof.as_ref(), Purpose::Authorize { evidence: &credential.value, group: &group })?;
        self.asked(Asked::Authorize { type_url: credential.type_url });
        let mut script = self.script();
        if let Some(status) = script.refuse_authorize.pop_front() {
            return Err(status);
        }
        script.counter += 1;
        Ok(Response::new(pb::AuthorizeOnboardingResponse {
            token: format!("token-{}", script.counter),
            expires_at: time(SystemTime::now() + script.ahead + script.token_life),
            registration: "bookinfo/ratings-jwt-test--vm".to_owned(),
        }))
    }
}

#[tonic::async_trait]
impl WorkloadRegistrationService for Services {
    async fn register_workload(
        &self,
        request: Request<pb::RegisterWorkloadRequest>,
    ) -> Result<Response<pb::RegisterWorkloadResponse>, Status> {
        let token = self.token(&request)?;
        let request = request.into_inner();
        if request.proof.is_some() {
            self.check(request.proof.as_ref(), Purpose::UseToken { token: &token })?;
        }
        let report = Box::new(request.registration.unwrap());
        self.asked(Asked::Register { proven: request.proof.is_some(), report });
        if let Some(status) = self.script().refuse_register.pop_front() {
            return Err(status);
        }
        Ok(Response::new(pb::RegisterWorkloadResponse { name: "bookinfo/ratings-jwt-test--vm".to_owned() }))
    }

    async fn unregister_workload(
        &self,
        request: Request<pb::UnregisterWorkloadRequest>,
    ) -> Result<Response<pb::UnregisterWorkloadResponse>, Status> {
        let token = self.token(&request)?;
        let proof = request.into_inner().proof;
        if proof.is_some() {
            self.check(proof.as_ref(), Purpose::UseToken { token: &token })?;
        }
        self.asked(Asked::Unregister { proven: proof.is_some() });
        let delay = Duration::from_millis(100).try_into().ok();
        Ok(Response::new(pb::UnregisterWorkloadResponse { propagation_delay: delay }))
    }
}

#[tonic::async_trait]
impl SessionService for Services {
    type SessionStream = ReceiverStream<Result<pb::PlaneMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.token(&request)?;
        let mut incoming = request.into_inner();
        let Some(pb::AgentMessage { message: Some(pb::agent_message::Message::Hello(hello)) }) =
            incoming.message().await?
        else {
            return Err(Status::invalid_argument("no hello"));
        };
        self.asked(Asked::Session { boot_version: hello.boot_version });
        let (outgoing, stream) = mpsc::channel(16);
        let boots = {
            let mut script = self.script();
            script.sessions.push(outgoing.clone());
            script.boots.clone()
        };
        for boot in boots {
            let message = Some(pb::plane_message::Message::Boot(boot));
            outgoing.try_send(Ok(pb::PlaneMessage { message })).unwrap();
        }
        let services = self.clone();
        let weak = outgoing.downgrade();
        drop(outgoing);
        tokio::spawn(async move {
            while let Some(Ok(message)) = incoming.next().await {
                use pb::agent_message::Message;
                match message.message.unwrap() {
                    Message::Hello(_) => {}
                    Message::Health(health) => services.asked(Asked::Health { ready: health.ready }),
                    Message::TokenRenewed(_) => services.asked(Asked::TokenRenewed),
                    Message::SidecarReport(report) => services
                        .asked(Asked::SidecarReport { boot_version: report.boot_version, accepted: report.accepted }),
                    Message::CertificateRequest(request) => {
                        services.asked(Asked::CertificateRequest);
                        let answer = services.sign(request.csr);
                        if let Some(outgoing) = weak.upgrade() {
                            let message = Some(pb::plane_message::Message::Certificate(answer));
                            outgoing.send(Ok(pb::PlaneMessage { message })).await.ok();
                        }
                    }
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

impl Services {
    fn sign(&self, csr: Vec<u8>) -> pb::Certificate {
        let mut request = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
        let now = SystemTime::now();
        request.params.not_before = (now - Duration::from_secs(60)).into();
        request.params.not_after = (now + Duration::from_secs(86_400)).into();
        request.params.subject_alt_names = vec![SanType::URI(SPIFFE_ID.try_into().unwrap())];
        let chain = request.signed_by(&self.mesh.issuer).unwrap().pem();
        pb::Certificate { chain, roots: self.mesh.pem.clone(), expires_at: None }
    }
}
