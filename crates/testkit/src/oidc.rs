//! An OpenID Connect issuer as far as a relying party sees it: discovery and keys over TLS. It also mints whatever it is asked for.

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, PublicKeyData};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// As it can be written to a file for another process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `iss` of its tokens, and where it is found.
    pub issuer: String,
    /// PEM.
    pub certificate_chain: String,
    pub private_key: String,
}

/// A server's certificate under a CA made for it.
pub struct MadeTls {
    /// PEM.
    pub ca: String,
    pub certificate_chain: String,
    pub private_key: String,
}

/// A CA, and a certificate under it for these names.
pub fn make_tls(names: &[&str]) -> anyhow::Result<MadeTls> {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(rcgen::DnType::CommonName, "onboarding-testkit CA");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let names = names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let certificate = CertificateParams::new(names)?.signed_by(&key, &ca)?;
    Ok(MadeTls { ca: ca.pem(), certificate_chain: certificate.pem(), private_key: key.serialize_pem() })
}

/// A running issuer; it ends with this value.
pub struct Oidc {
    pub address: SocketAddr,
    /// `https://localhost:PORT`
    pub issuer: String,
    /// PEM of the CA to trust for it.
    pub ca: String,
    service: Arc<Service>,
    task: tokio::task::JoinHandle<()>,
}

impl Oidc {
    /// A token with these claims; `iss` is added where it is missing. Signed with the newest key of the algorithm's kind.
    pub fn mint(&self, algorithm: Algorithm, claims: Value) -> anyhow::Result<String> {
        self.service.mint(algorithm, claims)
    }
    /// New keys; the last one's predecessors are published until two rotations later.
    pub fn rotate(&self) -> anyhow::Result<()> {
        let made = Keys::generate(self.service.made.fetch_add(1, Ordering::SeqCst))?;
        let mut keys = lock(&self.service.keys);
        keys.push_front(made);
        keys.truncate(2);
        Ok(())
    }
    /// What `/jwks.json` says.
    pub fn jwks(&self) -> Value {
        self.service.jwks()
    }
    pub fn jwks_uri(&self) -> String {
        format!("{}/jwks.json", self.issuer)
    }
    /// How often the keys were fetched.
    pub fn fetched(&self) -> u64 {
        self.service.fetched.load(Ordering::SeqCst)
    }
    pub fn set_mode(&self, mode: Mode) {
        *lock(&self.service.mode) = mode;
    }
}

impl Drop for Oidc {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How it answers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Mode {
    #[default]
    Honest,
    /// This status and body, to whatever is asked.
    Fixed(u16, String),
    /// A redirect to this address.
    Redirect(String),
    /// Accepts and never answers.
    Silent,
    /// Discovery names another issuer, and keys elsewhere.
    Discovery(Value),
}

/// At `https://localhost:PORT` on a free port, under a CA of its own.
pub async fn start() -> anyhow::Result<Oidc> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let tls = make_tls(&["localhost"])?;
    let issuer = format!("https://localhost:{}", address.port());
    let config =
        Config { issuer: issuer.clone(), certificate_chain: tls.certificate_chain, private_key: tls.private_key };
    let service = Arc::new(Service::new(issuer.clone())?);
    let acceptor = acceptor(&config)?;
    let task = tokio::spawn(accept(listener, acceptor, router(service.clone())));
    Ok(Oidc { address, issuer, ca: tls.ca, service, task })
}

/// Until the process ends. `POST /token?alg=ES256` with claims in JSON answers with a token: a real issuer asks who wants it, this one doesn't.
pub async fn serve(listener: TcpListener, config: Config) -> anyhow::Result<()> {
    let service = Arc::new(Service::new(config.issuer.clone())?);
    let acceptor = acceptor(&config)?;
    accept(listener, acceptor, router(service)).await;
    Ok(())
}

struct Service {
    issuer: String,
    /// Newest first.
    keys: Mutex<VecDeque<Keys>>,
    made: AtomicU64,
    fetched: AtomicU64,
    mode: Mutex<Mode>,
}

struct Keys {
    rsa: SigningKey,
    p256: SigningKey,
    ed25519: SigningKey,
}

struct SigningKey {
    kid: String,
    encoding: EncodingKey,
    jwk: Value,
}

impl Keys {
    fn generate(number: u64) -> anyhow::Result<Self> {
        let rsa = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048)?;
        let pkcs8 = AsDer::<Pkcs8V1Der<'_>>::as_der(&rsa)?;
        let rsa = pem::encode(&pem::Pem::new("PRIVATE KEY", pkcs8.as_ref()));
        let rsa = EncodingKey::from_rsa_pem(rsa.as_bytes())?;
        let p256 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?.serialize_pem();
        let p256 = EncodingKey::from_ec_pem(p256.as_bytes())?;
        let ed25519 = KeyPair::generate_for(&rcgen::PKCS_ED25519)?;
        let public = ed25519.der_bytes();
        Ok(Self {
            rsa: SigningKey::new(
                format!("rsa-{number}"),
                serde_json::to_value(Jwk::from_encoding_key(&rsa, Algorithm::RS256)?)?,
                rsa,
            ),
            p256: SigningKey::new(
                format!("p256-{number}"),
                serde_json::to_value(Jwk::from_encoding_key(&p256, Algorithm::ES256)?)?,
                p256,
            ),
            ed25519: SigningKey::new(
                format!("ed25519-{number}"),
                json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(public)}),
                EncodingKey::from_ed_der(ed25519.serialized_der()),
            ),
        })
    }
}

impl SigningKey {
    fn new(kid: String, mut jwk: Value, encoding: EncodingKey) -> Self {
        // An RSA key is published without "alg", so that PS256 may use it too.
        if let Some(members) = jwk.as_object_mut() {
            members.remove("alg");
            members.insert("kid".to_owned(), Value::from(kid.clone()));
            members.insert("use".to_owned(), Value::from("sig"));
        }
        Self { kid, encoding, jwk }
    }
}

impl Service {
    fn new(issuer: String) -> anyhow::Result<Self> {
        Ok(Self {
            issuer,
            keys: Mutex::new(VecDeque::from([Keys::generate(0)?])),
            made: AtomicU64::new(1),
            fetched: AtomicU64::new(0),
            mode: Mutex::default(),
        })
    }

    fn mint(&self, algorithm: Algorithm, mut claims: Value) -> anyhow::Result<String> {
        let object = claims.as_object_mut().ok_or_else(|| anyhow::anyhow!("claims are an object"))?;
        object.entry("iss").or_insert_with(|| Value::from(self.issuer.clone()));
        let keys = lock(&self.keys);
        let newest = keys.front().ok_or_else(|| anyhow::anyhow!("no keys"))?;
        let key = match algorithm {
            Algorithm::ES256 => &newest.p256,
            Algorithm::EdDSA => &newest.ed25519,
            _ => &newest.rsa,
        };
        let header = Header { kid: Some(key.kid.clone()), ..Header::new(algorithm) };
        Ok(jsonwebtoken::encode(&header, &claims, &key.encoding)?)
    }

    fn jwks(&self) -> Value {
        let keys: Vec<_> = lock(&self.keys)
            .iter()
            .flat_map(|keys| [keys.rsa.jwk.clone(), keys.p256.jwk.clone(), keys.ed25519.jwk.clone()])
            .collect();
        json!({ "keys": keys })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/.well-known/openid-configuration", get(discovery))
        .route("/jwks.json", get(keys))
        .route("/token", post(token))
        .with_state(service)
}

async fn misbehave(mode: Mode) -> Option<Response> {
    match mode {
        Mode::Honest | Mode::Discovery(_) => None,
        Mode::Fixed(status, body) => {
            Some((StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), body).into_response())
        }
        Mode::Redirect(location) => Some((StatusCode::FOUND, [("location", location)]).into_response()),
        Mode::Silent => std::future::pending().await,
    }
}

async fn discovery(State(service): State<Arc<Service>>) -> Response {
    let mode = lock(&service.mode).clone();
    if let Mode::Discovery(document) = mode {
        return Json(document).into_response();
    }
    if let Some(response) = misbehave(mode).await {
        return response;
    }
    let issuer = &service.issuer;
    Json(json!({
        "issuer": issuer,
        "jwks_uri": format!("{}/jwks.json", issuer.trim_end_matches('/')),
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["RS256", "ES256", "EdDSA"],
    }))
    .into_response()
}

async fn keys(State(service): State<Arc<Service>>) -> Response {
    service.fetched.fetch_add(1, Ordering::SeqCst);
    let mode = lock(&service.mode).clone();
    if let Some(response) = misbehave(mode).await {
        return response;
    }
    Json(service.jwks()).into_response()
}

#[derive(Deserialize)]
struct Wanted {
    #[serde(default = "es256")]
    alg: Algorithm,
}

fn es256() -> Algorithm {
    Algorithm::ES256
}

async fn token(
    State(service): State<Arc<Service>>,
    axum::extract::Query(wanted): axum::extract::Query<Wanted>,
    body: Bytes,
) -> Response {
    let minted =
        serde_json::from_slice(&body).map_err(anyhow::Error::from).and_then(|claims| service.mint(wanted.alg, claims));
    match minted {
        Ok(token) => token.into_response(),
        Err(error) => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    }
}

fn acceptor(config: &Config) -> anyhow::Result<TlsAcceptor> {
    let chain = CertificateDer::pem_slice_iter(config.certificate_chain.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(config.private_key.as_bytes())?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(tls)))
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, router: Router) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (acceptor, router) = (acceptor.clone(), router.clone());
        connections.spawn(async move {
            let Ok(Ok(stream)) = tokio::time::timeout(Duration::from_secs(10), acceptor.accept(stream)).await else {
                return;
            };
            let _ = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
                .await;
        });
        while connections.try_join_next().is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jsonwebtoken::{DecodingKey, Validation, decode};

    #[test]
    fn a_token_is_verified_by_the_published_key_that_it_names() {
        let service = Service::new("https://a.example".to_owned()).unwrap();
        for algorithm in [Algorithm::RS256, Algorithm::PS256, Algorithm::ES256, Algorithm::EdDSA] {
            let token = service.mint(algorithm, json!({"aud": "x", "exp": 4_000_000_000_u64})).unwrap();
            let keys: jsonwebtoken::jwk::JwkSet = serde_json::from_value(service.jwks()).unwrap();
            let kid = jsonwebtoken::decode_header(&token).unwrap().kid.unwrap();
            let key = DecodingKey::from_jwk(keys.find(&kid).unwrap()).unwrap();
            let mut validation = Validation::new(algorithm);
            validation.set_audience(&["x"]);
            let claims = decode::<Value>(&token, &key, &validation).unwrap().claims;
            assert_eq!(claims["iss"], "https://a.example");
        }
    }
}
