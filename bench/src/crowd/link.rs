//! One agent's connection, and the calls on it.

use anyhow::{Context, anyhow};
use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use futures_util::future::BoxFuture;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use onboarding_wire::onboarding as pb;
use onboarding_wire::parts::Incoming;
use onboarding_wire::proof::{Purpose, signed_bytes};
use pb::discovery_service_client::DiscoveryServiceClient;
use pb::onboarding_authorization_service_client::OnboardingAuthorizationServiceClient;
use pb::session_service_client::SessionServiceClient;
use pb::workload_registration_service_client::WorkloadRegistrationServiceClient;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::net::TcpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

/// A plane, as an agent's configuration names it. With several addresses an agent takes the next one each time it connects.
#[derive(Debug, Clone)]
pub struct Target {
    pub addresses: Vec<SocketAddr>,
    /// Sent as SNI, and verified.
    pub server_name: String,
    /// PEM.
    pub ca: String,
}

const CALL_WITHIN: Duration = Duration::from_secs(20);
const DIAL_WITHIN: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(10);
/// What an agent of a crowd takes at a time: there are thousands of them in one process.
const WINDOW: u32 = 64 * 1024;
/// Agents that come from one loopback address, well below its ephemeral ports.
const PER_SOURCE: usize = 10_000;

/// An agent's key.
#[derive(Clone)]
pub struct Key {
    pair: Arc<EcdsaKeyPair>,
    public: Vec<u8>,
}

impl Key {
    pub(crate) fn generate() -> anyhow::Result<Self> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).context("generating a key")?;
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der()?;
        let public = public.as_ref().to_vec();
        Ok(Self { pair: Arc::new(pair), public })
    }

    fn prove(&self, discovered: &pb::DiscoverResponse, purpose: Purpose<'_>) -> anyhow::Result<pb::KeyProof> {
        let message = signed_bytes(&discovered.plane_uid, &discovered.challenge, purpose);
        let signature = self.pair.sign(&SystemRandom::new(), &message).context("signing a proof")?;
        Ok(pb::KeyProof { public_key: self.public.clone(), signature: signature.as_ref().to_vec() })
    }
}

/// How every agent of a crowd connects.
pub(crate) struct Dialler {
    addresses: Vec<SocketAddr>,
    name: ServerName<'static>,
    origin: http::Uri,
    tls: TlsConnector,
}

impl Dialler {
    pub(crate) fn new(target: &Target) -> anyhow::Result<Self> {
        anyhow::ensure!(!target.addresses.is_empty(), "a crowd needs an address to connect to");
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(target.ca.as_bytes()) {
            roots.add(certificate.context("reading the plane's CA")?).context("trusting the plane's CA")?;
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec()];
        // As many hosts: none knows what another was given.
        tls.resumption = rustls::client::Resumption::disabled();
        let server_name = target.server_name.clone();
        Ok(Self {
            addresses: target.addresses.clone(),
            origin: format!("https://{server_name}:15443").parse().context("the plane's name")?,
            name: ServerName::try_from(server_name).context("the plane's name")?,
            tls: TlsConnector::from(Arc::new(tls)),
        })
    }

    /// `attempt`: how often this agent has connected.
    pub(crate) async fn dial(&self, number: usize, attempt: usize) -> anyhow::Result<Link> {
        let address = self.addresses[(number + attempt) % self.addresses.len()];
        tokio::time::timeout(DIAL_WITHIN, self.connect(number, address))
            .await
            .unwrap_or_else(|_| Err(anyhow!("{address} did not finish connecting within {DIAL_WITHIN:?}")))
    }

    async fn connect(&self, number: usize, address: SocketAddr) -> anyhow::Result<Link> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if address.ip().is_loopback() && address.is_ipv4() {
            // Several hosts, and more ports than one address has.
            let host = u8::try_from(number / PER_SOURCE % 250).unwrap_or(0) + 2;
            socket.set_reuseaddr(true)?;
            let source = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 1, host)), 0);
            bind(&socket, source)?;
        }
        let stream = socket.connect(address).await.with_context(|| format!("connecting to {address}"))?;
        stream.set_nodelay(true)?;
        // Boxed: what a handshake needs isn't kept for as long as the connection lives.
        let stream = Box::pin(self.tls.connect(self.name.clone(), stream)).await.context("the TLS handshake")?;
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .max_send_buf_size(16 * 1024)
            .keep_alive_interval(KEEPALIVE_EVERY)
            .keep_alive_timeout(KEEPALIVE_WITHIN)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(stream))
            .await
            .context("the HTTP/2 handshake")?;
        let driver = tokio::spawn(async move {
            // What ends it is seen by the calls.
            let _ = connection.await;
        });
        Ok(Link { wire: Wire(sender), origin: self.origin.clone(), driver: Driver(driver), address })
    }
}

/// Binds to an address and leaves the port to `connect`, which can then reuse one for another destination.
fn bind(socket: &TcpSocket, source: SocketAddr) -> anyhow::Result<()> {
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)
        .context("leaving the choice of a port to connect")?;
    socket.bind(source).with_context(|| format!("coming from {source}"))
}

/// The connection ends with this value.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An open connection to a plane.
pub struct Link {
    wire: Wire,
    origin: http::Uri,
    #[allow(dead_code, reason = "dropping it ends the connection")]
    driver: Driver,
    /// Which of the target's.
    pub address: SocketAddr,
}

/// An open session.
pub(crate) struct Session {
    pub(crate) say: mpsc::Sender<pb::AgentMessage>,
    pub(crate) hear: Incoming,
}

impl Link {
    pub(crate) async fn discover(&self) -> anyhow::Result<pb::DiscoverResponse> {
        let mut client = DiscoveryServiceClient::with_origin(self.wire.clone(), self.origin.clone());
        bounded(client.discover(pb::DiscoverRequest {})).await.context("Discover")
    }

    /// The token.
    pub(crate) async fn authorize(
        &mut self,
        key: &Key,
        credential: prost_types::Any,
        group: pb::WorkloadGroupRef,
    ) -> anyhow::Result<String> {
        let discovered = self.discover().await?;
        let name = format!("{}/{}", group.namespace, group.name);
        let proof = key.prove(&discovered, Purpose::Authorize { evidence: &credential.value, group: &name })?;
        let request = pb::AuthorizeOnboardingRequest {
            credential: Some(credential),
            workload_group: Some(group),
            proof: Some(proof),
        };
        let mut client = OnboardingAuthorizationServiceClient::with_origin(self.wire.clone(), self.origin.clone());
        Ok(bounded(client.authorize_onboarding(request)).await.context("AuthorizeOnboarding")?.token)
    }

    /// The registration's name. `key`: proves it here, where AuthorizeOnboarding hasn't.
    pub(crate) async fn register(
        &mut self,
        token: &str,
        registration: pb::Registration,
        key: Option<&Key>,
    ) -> anyhow::Result<String> {
        let proof = match key {
            Some(key) => Some(key.prove(&self.discover().await?, Purpose::UseToken { token })?),
            None => None,
        };
        let request = with_token(pb::RegisterWorkloadRequest { registration: Some(registration), proof }, token)?;
        let mut client = WorkloadRegistrationServiceClient::with_origin(self.wire.clone(), self.origin.clone());
        Ok(bounded(client.register_workload(request)).await.context("RegisterWorkload")?.name)
    }

    /// `held`: the version of the boot configuration that the agent has.
    pub(crate) async fn session(&self, token: &str, held: &str) -> anyhow::Result<Session> {
        let (say, messages) = mpsc::channel(4);
        let hello = pb::Hello { proof: None, boot_version: held.to_owned() };
        let hello = pb::AgentMessage { message: Some(pb::agent_message::Message::Hello(hello)) };
        say.send(hello).await?;
        let request = with_token(ReceiverStream::new(messages), token)?;
        let mut client = SessionServiceClient::with_origin(self.wire.clone(), self.origin.clone());
        let hear = Incoming::new(bounded(client.session(request)).await.context("Session")?);
        Ok(Session { say, hear })
    }
}

fn with_token<T>(message: T, token: &str) -> anyhow::Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().context("a token in a header")?);
    Ok(request)
}

async fn bounded<T>(call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> anyhow::Result<T> {
    match tokio::time::timeout(CALL_WITHIN, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        // The status stays the source, for whoever wants its code.
        Ok(Err(status)) => Err(anyhow::Error::new(status)),
        Err(_) => Err(anyhow!("no answer within {CALL_WITHIN:?}")),
    }
}

/// hyper's connection as tonic's clients want it: without the tasks and buffers of a channel that connects again by itself.
#[derive(Clone)]
struct Wire(http2::SendRequest<tonic::body::Body>);

impl tower::Service<http::Request<tonic::body::Body>> for Wire {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<tonic::body::Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
