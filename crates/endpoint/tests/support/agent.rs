//! An agent that can be told to misbehave. Tests of other crates that need one include this file.

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use onboarding_wire::JWT_CREDENTIAL;
use onboarding_wire::onboarding as pb;
use onboarding_wire::parts::Incoming;
use onboarding_wire::proof::{Purpose, signed_bytes};
use pb::discovery_service_client::DiscoveryServiceClient;
use pb::onboarding_authorization_service_client::OnboardingAuthorizationServiceClient;
use pb::session_service_client::SessionServiceClient;
use pb::workload_registration_service_client::WorkloadRegistrationServiceClient;
use prost::Message;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// The group that the agent asks for.
pub const GROUP: (&str, &str) = ("bookinfo", "ratings");

/// A client of whoever has a certificate of these CAs.
pub fn client_config(roots: &str, versions: &[&'static rustls::SupportedProtocolVersion]) -> Arc<rustls::ClientConfig> {
    let mut store = rustls::RootCertStore::empty();
    for ca in CertificateDer::pem_slice_iter(roots.as_bytes()) {
        store.add(ca.unwrap()).unwrap();
    }
    let mut config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(store)
            .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// A connection of its own.
pub async fn connect(address: SocketAddr, host: &'static str, tls: Arc<rustls::ClientConfig>, key: Key) -> Agent {
    dial(address, host, tls, key).await.unwrap()
}

/// The same where nobody may be there.
pub async fn dial(
    address: SocketAddr,
    host: &'static str,
    tls: Arc<rustls::ClientConfig>,
    key: Key,
) -> Result<Agent, tonic::transport::Error> {
    let connector = tower::service_fn(move |_: http::Uri| {
        let tls = tls.clone();
        async move {
            let tcp = TcpStream::connect(address).await?;
            let name = ServerName::try_from(host).map_err(std::io::Error::other)?;
            let stream = tokio_rustls::TlsConnector::from(tls).connect(name, tcp).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    let channel = tonic::transport::Endpoint::from_shared(format!("https://{host}:15443"))
        .unwrap()
        .connect_with_connector(connector)
        .await?;
    Ok(Agent { channel, key, token: String::new() })
}

#[derive(Clone)]
pub struct Key {
    pair: Arc<EcdsaKeyPair>,
    pub public: Vec<u8>,
}

impl Key {
    pub fn new() -> Self {
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new()).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, document.as_ref()).unwrap();
        let public: PublicKeyX509Der<'_> = pair.public_key().as_der().unwrap();
        let public = public.as_ref().to_vec();
        Self { pair: Arc::new(pair), public }
    }

    /// Hex of the SHA-256 of the public key, as refusals and registrations name it.
    pub fn thumbprint(&self) -> String {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &self.public);
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
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
    pub hear: Incoming,
}

impl Agent {
    pub async fn discover(&self) -> pb::DiscoverResponse {
        self.try_discover().await.unwrap()
    }

    pub async fn try_discover(&self) -> Result<pb::DiscoverResponse, Status> {
        let mut client = DiscoveryServiceClient::new(self.channel.clone());
        client.discover(pb::DiscoverRequest {}).await.map(tonic::Response::into_inner)
    }

    /// What a well-behaved agent would send.
    pub async fn request(&self, jwt: &str) -> pb::AuthorizeOnboardingRequest {
        self.request_after(&self.discover().await, jwt)
    }

    pub fn request_after(&self, discovered: &pb::DiscoverResponse, jwt: &str) -> pb::AuthorizeOnboardingRequest {
        let value = pb::JwtCredential { token: jwt.to_owned() }.encode_to_vec();
        let (namespace, name) = GROUP;
        let group = format!("{namespace}/{name}");
        let purpose = Purpose::Authorize { evidence: &value, group: &group };
        let proof = self.key.proof(&discovered.plane_uid, &discovered.challenge, purpose);
        pb::AuthorizeOnboardingRequest {
            credential: Some(prost_types::Any { type_url: JWT_CREDENTIAL.to_owned(), value }),
            workload_group: Some(pb::WorkloadGroupRef { namespace: namespace.to_owned(), name: name.to_owned() }),
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
        self.register_as(ip, HashMap::new(), proof).await
    }

    pub async fn register_as(
        &self,
        ip: &str,
        labels: HashMap<String, String>,
        proof: Option<pb::KeyProof>,
    ) -> Result<String, Status> {
        let registration = pb::Registration {
            agent_version: "1.0.0".to_owned(),
            sidecar: Some(pb::registration::Sidecar::Envoy(pb::EnvoySidecar { version: "1.40.0".to_owned() })),
            addresses: vec![pb::HostAddress { ip: ip.to_owned(), kind: pb::AddressKind::Vpc.into() }],
            labels,
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
        Ok(Session { say, hear: Incoming::new(hear) })
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
        self.token_proof_after(&self.discover().await)
    }

    pub fn token_proof_after(&self, discovered: &pb::DiscoverResponse) -> pb::KeyProof {
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
