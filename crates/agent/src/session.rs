//! The connection to the Workload Onboarding Endpoint: dialling it, the calls, and the session's stream. Every call ends in time.

mod tls;

pub use tls::TlsProblem;

use crate::key::{AgentKey, KeyError};
use crate::machine::Code;
use crate::store::StoredToken;
use crate::trust::{self, Trust};
use hyper_util::rt::TokioIo;
use jiff::{SignedDuration, Timestamp};
use onboarding_core::name::GroupName;
use onboarding_kinds::agent::{OnboardingConfiguration, TransportSecurity};
use onboarding_wire::RETRY_PUSHBACK;
use onboarding_wire::onboarding as pb;
use onboarding_wire::onboarding::discovery_service_client::DiscoveryServiceClient;
use onboarding_wire::onboarding::onboarding_authorization_service_client::OnboardingAuthorizationServiceClient;
use onboarding_wire::onboarding::session_service_client::SessionServiceClient;
use onboarding_wire::onboarding::workload_registration_service_client::WorkloadRegistrationServiceClient;
use onboarding_wire::parts::Incoming;
use onboarding_wire::proof::Purpose;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tonic::Request;
use tonic::transport::{Channel, Uri};

/// Where the endpoint is and how it is trusted.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
    pub security: Security,
}

#[derive(Clone)]
pub enum Security {
    Tls {
        /// Sent as SNI and verified.
        name: String,
        config: Arc<rustls::ClientConfig>,
    },
    PlainText,
}

impl std::fmt::Debug for Security {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tls { name, .. } => write!(f, "Tls({name})"),
            Self::PlainText => f.write_str("PlainText"),
        }
    }
}

impl Endpoint {
    pub fn new(configuration: &OnboardingConfiguration, trust: &Trust) -> Result<Self, trust::TrustError> {
        let security = match &configuration.transport {
            TransportSecurity::Tls { sni, insecure_skip_verify } => Security::Tls {
                name: sni.clone().unwrap_or_else(|| configuration.host.clone()),
                config: Arc::new(trust.client_config(*insecure_skip_verify)?),
            },
            TransportSecurity::None => Security::PlainText,
        };
        Ok(Self { host: configuration.host.clone(), port: configuration.port, security })
    }
}

/// Why there is no connection. `Display` says what was tried and the way out.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("can't resolve the endpoint's name {host}; check onboardingEndpoint.host and this host's DNS")]
    Resolve {
        host: String,
        #[source]
        source: io::Error,
    },
    #[error("the endpoint's name {host} has no address")]
    NoAddress { host: String },
    #[error(
        "can't connect to the endpoint at {address}; is it running, and does the network let this host through to that port?"
    )]
    Connect {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("{name} is neither a host name nor an IP address; check onboardingEndpoint.transportSecurity.tls.sni")]
    Name { name: String },
    #[error(transparent)]
    Trust(#[from] TlsProblem),
    #[error("the TLS handshake with {address} failed")]
    Tls {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the endpoint at {address} did not finish connecting within {seconds} s")]
    TooSlow { address: String, seconds: u64 },
    #[error("{address} answers, but not as a gRPC server")]
    NotGrpc {
        address: SocketAddr,
        #[source]
        source: tonic::transport::Error,
    },
}

/// A call that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The plane's words.
    #[error("{}", .0.message())]
    Refused(tonic::Status),
    #[error("the endpoint's answer to {call} lacks {what}")]
    Incomplete { call: &'static str, what: &'static str },
    #[error("the endpoint did not answer {call} within {seconds} s")]
    TooSlow { call: &'static str, seconds: u64 },
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl CallError {
    pub fn code(&self) -> Code {
        match self {
            Self::Refused(status) => match status.code() {
                tonic::Code::Unauthenticated | tonic::Code::NotFound => Code::Unauthenticated,
                tonic::Code::PermissionDenied => Code::PermissionDenied,
                _ => Code::Other,
            },
            _ => Code::Other,
        }
    }

    /// How long the plane asked to wait, at most ten minutes.
    pub fn pushback(&self) -> Option<Duration> {
        let Self::Refused(status) = self else { return None };
        let milliseconds = status.metadata().get(RETRY_PUSHBACK)?.to_str().ok()?.parse::<u64>().ok()?;
        Some(Duration::from_millis(milliseconds).min(LONGEST_PUSHBACK))
    }

    /// For people: the code and the plane's words.
    pub fn describe(&self) -> String {
        match self {
            Self::Refused(status) if status.message().is_empty() => format!("{:?}", status.code()),
            Self::Refused(status) => format!("{:?}: {}", status.code(), status.message()),
            other => other.to_string(),
        }
    }
}

/// Who the plane is, and what it wants signed.
#[derive(Debug, Clone)]
pub struct Discovery {
    pub plane_uid: String,
    pub challenge: Vec<u8>,
    /// By how much this host's clock is ahead of the plane's.
    pub clock_skew: SignedDuration,
}

/// One connection. A challenge lives on it, so it is never replaced behind the caller's back.
#[derive(Debug, Clone)]
pub struct Link {
    channel: Channel,
    pub peer: SocketAddr,
}

/// The open session: what is sent, and what comes.
#[derive(Debug)]
pub struct Session {
    pub outgoing: mpsc::Sender<pb::AgentMessage>,
    pub incoming: Incoming,
}

const DIAL_WITHIN: Duration = Duration::from_secs(10);
const CALL_WITHIN: Duration = Duration::from_secs(20);
const LONGEST_PUSHBACK: Duration = Duration::from_secs(600);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
const KEEPALIVE_WITHIN: Duration = Duration::from_secs(10);

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// TCP and TLS.
async fn dial(endpoint: &Endpoint) -> Result<(Box<dyn Io>, SocketAddr), DialError> {
    let host = &endpoint.host;
    let addresses: Vec<SocketAddr> = match host.parse::<IpAddr>() {
        Ok(ip) => vec![SocketAddr::new(ip, endpoint.port)],
        Err(_) => tokio::net::lookup_host((host.as_str(), endpoint.port))
            .await
            .map_err(|source| DialError::Resolve { host: host.clone(), source })?
            .collect(),
    };
    let mut last = DialError::NoAddress { host: host.clone() };
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                // Small messages that somebody waits for; an option that can't be set changes only the speed.
                let _ = stream.set_nodelay(true);
                return Ok((secure(endpoint, stream, address).await?, address));
            }
            Err(source) => last = DialError::Connect { address, source },
        }
    }
    Err(last)
}

async fn secure(endpoint: &Endpoint, stream: TcpStream, address: SocketAddr) -> Result<Box<dyn Io>, DialError> {
    let Security::Tls { name, config } = &endpoint.security else { return Ok(Box::new(stream)) };
    let server_name =
        rustls_pki_types::ServerName::try_from(name.clone()).map_err(|_| DialError::Name { name: name.clone() })?;
    match tokio_rustls::TlsConnector::from(config.clone()).connect(server_name, stream).await {
        Ok(stream) => Ok(Box::new(stream)),
        Err(source) => Err(match TlsProblem::of(&source, name, address) {
            Some(problem) => problem.into(),
            None => DialError::Tls { address, source },
        }),
    }
}

async fn bounded<T>(
    call: &'static str,
    future: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, CallError> {
    match timeout(CALL_WITHIN, future).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(CallError::Refused(status)),
        Err(_) => Err(CallError::TooSlow { call, seconds: CALL_WITHIN.as_secs() }),
    }
}

fn with_token<T>(message: T, token: &StoredToken) -> Result<Request<T>, CallError> {
    let mut request = Request::new(message);
    let mut value: tonic::metadata::AsciiMetadataValue = format!("Bearer {}", token.token)
        .parse()
        .map_err(|_| CallError::Incomplete { call: "AuthorizeOnboarding", what: "a token that fits a header" })?;
    value.set_sensitive(true);
    request.metadata_mut().insert("authorization", value);
    Ok(request)
}

impl Link {
    /// Connects within ten seconds, TLS and HTTP/2 included.
    pub async fn connect(endpoint: &Endpoint) -> Result<Self, DialError> {
        let attempt = async {
            let (stream, peer) = dial(endpoint).await?;
            let mut once = Some(stream);
            let connector = tower::service_fn(move |_: Uri| {
                // The channel would connect again by itself, and the challenge would be another connection's.
                let stream = once.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
                std::future::ready(stream.map(TokioIo::new))
            });
            let scheme = if matches!(endpoint.security, Security::Tls { .. }) { "https" } else { "http" };
            let authority = match endpoint.host.parse::<std::net::Ipv6Addr>() {
                Ok(ip) => format!("[{ip}]:{}", endpoint.port),
                Err(_) => format!("{}:{}", endpoint.host, endpoint.port),
            };
            let not_grpc = |source| DialError::NotGrpc { address: peer, source };
            let mut builder =
                tonic::transport::Endpoint::from_shared(format!("http://{authority}")).map_err(not_grpc)?;
            if let Ok(origin) = format!("{scheme}://{authority}").parse() {
                builder = builder.origin(origin);
            }
            let channel = builder
                .http2_keep_alive_interval(KEEPALIVE_EVERY)
                .keep_alive_timeout(KEEPALIVE_WITHIN)
                .keep_alive_while_idle(true)
                .connect_with_connector(connector)
                .await
                .map_err(not_grpc)?;
            Ok(Self { channel, peer })
        };
        timeout(DIAL_WITHIN, attempt).await.unwrap_or_else(|_| {
            Err(DialError::TooSlow {
                address: format!("{}:{}", endpoint.host, endpoint.port),
                seconds: DIAL_WITHIN.as_secs(),
            })
        })
    }

    pub async fn discover(&self) -> Result<Discovery, CallError> {
        let mut client = DiscoveryServiceClient::new(self.channel.clone());
        let answer = bounded("Discover", client.discover(pb::DiscoverRequest {})).await?;
        let lacks = |what| CallError::Incomplete { call: "Discover", what };
        if answer.plane_uid.is_empty() {
            return Err(lacks("the plane's UID"));
        }
        if answer.challenge.len() < 16 {
            return Err(lacks("a challenge"));
        }
        let time = answer.time.and_then(timestamp).ok_or_else(|| lacks("the plane's time"))?;
        let clock_skew = Timestamp::now().duration_since(time);
        Ok(Discovery { plane_uid: answer.plane_uid, challenge: answer.challenge, clock_skew })
    }

    /// Evidence in, token out.
    pub async fn authorize(
        &self,
        key: &AgentKey,
        discovery: &Discovery,
        group: &GroupName,
        credential: prost_types::Any,
        now: Timestamp,
    ) -> Result<StoredToken, CallError> {
        let name = group.to_string();
        let purpose = Purpose::Authorize { evidence: &credential.value, group: &name };
        let proof = key.prove(&discovery.plane_uid, &discovery.challenge, purpose)?;
        let request = pb::AuthorizeOnboardingRequest {
            credential: Some(credential),
            workload_group: Some(pb::WorkloadGroupRef { namespace: group.namespace.clone(), name: group.name.clone() }),
            proof: Some(proof),
        };
        let mut client = OnboardingAuthorizationServiceClient::new(self.channel.clone());
        let answer = bounded("AuthorizeOnboarding", client.authorize_onboarding(request)).await?;
        let lacks = |what| CallError::Incomplete { call: "AuthorizeOnboarding", what };
        if answer.token.is_empty() {
            return Err(lacks("a token"));
        }
        // Said by the plane's clock, and needed by this host's.
        let ends = answer.expires_at.and_then(timestamp).ok_or_else(|| lacks("the token's end"))?;
        let expires_at = ends.checked_add(discovery.clock_skew).unwrap_or(Timestamp::MAX);
        Ok(StoredToken { token: answer.token, issued_at: now, expires_at, registration: answer.registration })
    }

    /// `proof`: a challenge of this connection that the key has not been proven on yet.
    pub async fn register(
        &self,
        key: &AgentKey,
        token: &StoredToken,
        registration: pb::Registration,
        proof: Option<&Discovery>,
    ) -> Result<String, CallError> {
        let proof = proof.map(|discovery| prove_token(key, token, discovery)).transpose()?;
        let request = with_token(pb::RegisterWorkloadRequest { registration: Some(registration), proof }, token)?;
        let mut client = WorkloadRegistrationServiceClient::new(self.channel.clone());
        Ok(bounded("RegisterWorkload", client.register_workload(request)).await?.name)
    }

    /// How long the mesh takes to learn of it.
    pub async fn unregister(
        &self,
        key: &AgentKey,
        token: &StoredToken,
        proof: Option<&Discovery>,
    ) -> Result<Duration, CallError> {
        let proof = proof.map(|discovery| prove_token(key, token, discovery)).transpose()?;
        let request = with_token(pb::UnregisterWorkloadRequest { proof }, token)?;
        let mut client = WorkloadRegistrationServiceClient::new(self.channel.clone());
        let answer = bounded("UnregisterWorkload", client.unregister_workload(request)).await?;
        Ok(answer.propagation_delay.and_then(|delay| delay.try_into().ok()).unwrap_or_default())
    }

    /// The connection must have proven the key before.
    pub async fn open_session(&self, token: &StoredToken, boot_version: String) -> Result<Session, CallError> {
        let (outgoing, messages) = mpsc::channel(16);
        let hello = pb::Hello { proof: None, boot_version };
        let hello = pb::AgentMessage { message: Some(pb::agent_message::Message::Hello(hello)) };
        // The channel is empty and has room.
        let _ = outgoing.try_send(hello);
        let request = with_token(tokio_stream::wrappers::ReceiverStream::new(messages), token)?;
        let mut client = SessionServiceClient::new(self.channel.clone());
        let incoming = Incoming::new(bounded("Session", client.session(request)).await?);
        Ok(Session { outgoing, incoming })
    }
}

fn prove_token(key: &AgentKey, token: &StoredToken, discovery: &Discovery) -> Result<pb::KeyProof, KeyError> {
    key.prove(&discovery.plane_uid, &discovery.challenge, Purpose::UseToken { token: &token.token })
}

/// `None`: out of range.
pub fn timestamp(time: prost_types::Timestamp) -> Option<Timestamp> {
    Timestamp::new(time.seconds, time.nanos).ok()
}
