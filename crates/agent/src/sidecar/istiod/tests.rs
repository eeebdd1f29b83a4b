//! Against a certificate authority that speaks as istiod's does, over real TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

use super::*;
use onboarding_wire::istio_ca::IstioCertificateResponse;
use onboarding_wire::istio_ca::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use rcgen::{BasicConstraints, CertificateParams, CertificateSigningRequestParams, IsCa, Issuer, KeyPair, SanType};
use std::sync::Mutex;
use std::time::SystemTime;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status};

const NAME: &str = "istiod.istio-system.svc";
const ID: &str = "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm";

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: String,
}

fn ca() -> Ca {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = parameters.self_signed(&key).unwrap().pem();
    Ca { issuer: Issuer::new(parameters, key), root }
}

/// What the authority does, and what it was asked.
#[derive(Default)]
struct Script {
    /// `Bearer ...` of each call; empty: none, so the client's certificate has to do.
    asked: Vec<(String, String)>,
    requested_id: String,
    requested_life: i64,
    refuse: Option<Status>,
    signs_for: Option<String>,
    life: Duration,
}

struct Authority {
    ca: Arc<Ca>,
    script: Arc<Mutex<Script>>,
}

#[tonic::async_trait]
impl IstioCertificateService for Authority {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let header = |name: &str| {
            request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
        };
        let asked = (header("authorization"), header("clusterid"));
        let mut script = self.script.lock().unwrap();
        script.asked.push(asked);
        if let Some(status) = &script.refuse {
            return Err(status.clone());
        }
        script.requested_life = request.get_ref().validity_duration;
        let mut csr = CertificateSigningRequestParams::from_pem(&request.get_ref().csr).unwrap();
        if let Some(SanType::URI(uri)) = csr.params.subject_alt_names.first() {
            script.requested_id = uri.to_string();
        }
        let id = script.signs_for.clone().unwrap_or_else(|| ID.to_owned());
        csr.params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        csr.params.not_before = (SystemTime::now() - Duration::from_secs(60)).into();
        csr.params.not_after = (SystemTime::now() + script.life).into();
        let leaf = csr.signed_by(&self.ca.issuer).unwrap().pem();
        Ok(Response::new(IstioCertificateResponse { cert_chain: vec![leaf, self.ca.root.clone()] }))
    }
}

struct Server {
    address: Address,
    ca: Arc<Ca>,
    script: Arc<Mutex<Script>>,
    _task: AbortOnDropHandle<()>,
}

async fn server(name: &str) -> Server {
    let ca = Arc::new(ca());
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &ca.issuer).unwrap();
    let script = Arc::new(Mutex::new(Script { life: Duration::from_secs(3600), ..Script::default() }));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(ca.root.as_bytes()).flatten());
    // As istiod: a client's certificate is verified where there is one.
    let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .unwrap();
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap(),
        )
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (connections, incoming) = tokio::sync::mpsc::channel(8);
    let accept = async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else { return };
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let (inner, mut outer) = tokio::io::duplex(64 * 1024);
                tokio::spawn(async move { tokio::io::copy_bidirectional(&mut stream, &mut outer).await });
                let _ = connections.send(Ok::<_, io::Error>(inner)).await;
            }
        }
    };
    let authority = IstioCertificateServiceServer::new(Authority { ca: ca.clone(), script: script.clone() });
    let serve = tonic::transport::Server::builder()
        .add_service(authority)
        .serve_with_incoming(tokio_stream::wrappers::ReceiverStream::new(incoming));
    let task = tokio::spawn(async move {
        let _ = tokio::join!(accept, serve);
    });
    let address = Address { host: address.ip().to_string(), port: address.port() };
    Server { address, ca, script, _task: AbortOnDropHandle::new(task) }
}

impl Server {
    fn credentials(&self) -> Credentials {
        Credentials {
            address: self.address.clone(),
            name: NAME.to_owned(),
            roots: self.ca.root.clone(),
            token: Secret("aaa.the-tokens-payload.ccc".to_owned()),
            token_expires_at: Timestamp::from_second(4_000_000_000).unwrap(),
            spiffe_id: ID.to_owned(),
            cluster: "Kubernetes".to_owned(),
            validity: Duration::from_secs(600),
        }
    }
}

#[tokio::test]
async fn a_certificate_is_signed_by_the_token() {
    let server = server(NAME).await;
    let identity = certificate(&server.credentials(), None).await.unwrap();
    assert_eq!(identity.spiffe_id, ID);
    assert_eq!(identity.roots, union(&server.ca.root, ""));
    assert!(identity.certificate_chain.contains("BEGIN CERTIFICATE") && !identity.certificate_chain.contains("\n\n"));
    let script = server.script.lock().unwrap();
    assert_eq!(script.asked, [("Bearer aaa.the-tokens-payload.ccc".to_owned(), "Kubernetes".to_owned())]);
    assert_eq!((script.requested_id.as_str(), script.requested_life), (ID, 600));
}

#[tokio::test]
async fn a_token_that_has_expired_is_not_shown_and_a_valid_certificate_does_instead() {
    let server = server(NAME).await;
    let first = certificate(&server.credentials(), None).await.unwrap();
    let old = Credentials { token_expires_at: Timestamp::now(), ..server.credentials() };
    assert!(matches!(certificate(&old, None).await, Err(IstiodError::TokenExpired(_))));
    let second = certificate(&old, Some(&first)).await.unwrap();
    assert_ne!(second.private_key, first.private_key);
    let expired = StoredIdentity { expires_at: Timestamp::now(), ..first };
    assert!(matches!(certificate(&old, Some(&expired)).await, Err(IstiodError::TokenExpired(_))));
    assert_eq!(server.script.lock().unwrap().asked.last().unwrap().0, "");
}

#[tokio::test]
async fn whoever_is_not_istiod_gets_no_token() {
    let good = server(NAME).await;
    let refused = async |credentials: Credentials| certificate(&credentials, None).await.err().unwrap();
    let other_name = server("istiod.elsewhere.svc").await;
    let error = refused(other_name.credentials()).await;
    assert!(matches!(&error, IstiodError::Tls { .. }), "{error}");
    assert!(error.to_string().contains(NAME), "{error}");
    let other_ca = Credentials { roots: ca().root, ..good.credentials() };
    assert!(matches!(refused(other_ca).await, IstiodError::Tls { .. }));
    let nobody = Address { host: "127.0.0.1".to_owned(), port: 1 };
    let nobody = Credentials { address: nobody, ..good.credentials() };
    assert!(matches!(refused(nobody).await, IstiodError::Connect { .. }));
    assert!(good.script.lock().unwrap().asked.is_empty() && other_name.script.lock().unwrap().asked.is_empty());
}

#[tokio::test]
async fn what_istiod_says_is_said_and_what_it_signs_is_checked() {
    let server = server(NAME).await;
    server.script.lock().unwrap().refuse = Some(Status::unauthenticated("request authenticate failure"));
    let error = certificate(&server.credentials(), None).await.err().unwrap().to_string();
    assert!(error.contains("Unauthenticated: request authenticate failure"), "{error}");
    assert!(!error.contains("the-tokens-payload"), "{error}");
    {
        let mut script = server.script.lock().unwrap();
        script.refuse = None;
        script.signs_for = Some("spiffe://cluster.local/ns/bookinfo/sa/other".to_owned());
    }
    let error = certificate(&server.credentials(), None).await.err().unwrap();
    assert!(matches!(error, IstiodError::Certificate(CertificateError::AnotherIdentity { .. })), "{error}");
}

async fn until(standing: &mut tokio::sync::watch::Receiver<Standing>, wanted: impl Fn(&Standing) -> bool) -> Standing {
    let reached = tokio::time::timeout(Duration::from_secs(20), standing.wait_for(wanted)).await;
    reached.expect("in time").expect("it is being renewed").clone()
}

#[tokio::test]
async fn is_renewed_at_half_of_its_life_and_kept() {
    let server = server(NAME).await;
    server.script.lock().unwrap().life = Duration::from_secs(10);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("identity.json");
    let renewal = Renewal::start(server.credentials(), path.clone());
    let mut standing = renewal.standing.clone();
    let first = until(&mut standing, |standing| standing.identity.is_some()).await.identity.unwrap();
    // The next one comes while the first is valid, though nothing can be signed for a while.
    server.script.lock().unwrap().refuse = Some(Status::unavailable("busy"));
    tokio::time::timeout(Duration::from_secs(20), standing.changed()).await.expect("in time").unwrap();
    assert_eq!(server.script.lock().unwrap().asked.len(), 2);
    assert!(standing.borrow().problem.is_none(), "what is valid stays in use");
    {
        let mut script = server.script.lock().unwrap();
        script.refuse = None;
        script.life = Duration::from_secs(3600);
    }
    let second = until(&mut standing, |standing| {
        standing.identity.as_ref().is_some_and(|now| now.private_key != first.private_key)
    });
    let second = second.await.identity.unwrap();
    drop(renewal);
    // After a reboot it is there at once, and istiod isn't asked.
    let calls = server.script.lock().unwrap().asked.len();
    let renewal = Renewal::start(server.credentials(), path.clone());
    let mut standing = renewal.standing.clone();
    let kept = until(&mut standing, |standing| standing.identity.is_some()).await.identity.unwrap();
    assert_eq!(kept.private_key, second.private_key);
    assert_eq!(server.script.lock().unwrap().asked.len(), calls);
    // Another workload's is none.
    drop(renewal);
    let other =
        Credentials { spiffe_id: "spiffe://cluster.local/ns/bookinfo/sa/other".to_owned(), ..server.credentials() };
    let renewal = Renewal::start(other, path);
    let mut standing = renewal.standing.clone();
    let refused = until(&mut standing, |standing| standing.problem.is_some()).await;
    assert!(refused.identity.is_none() && refused.problem.unwrap().contains("came for"));
}

#[tokio::test]
async fn a_new_token_is_tried_at_once() {
    let server = server(NAME).await;
    let directory = tempfile::tempdir().unwrap();
    let old = Credentials { token_expires_at: Timestamp::now(), ..server.credentials() };
    let renewal = Renewal::start(old, directory.path().join("identity.json"));
    let mut standing = renewal.standing.clone();
    let problem = until(&mut standing, |standing| standing.problem.is_some()).await.problem.unwrap();
    assert!(problem.contains("the plane sends a new one"), "{problem}");
    renewal.with(server.credentials());
    until(&mut standing, |standing| standing.identity.is_some() && standing.problem.is_none()).await;
}
