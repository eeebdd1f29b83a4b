//! Each kind of certificate that an endpoint may have by mistake, once, over a real connection.

use crate::session::{DialError, Endpoint, Link, Security};
use crate::store::with_source;
use crate::trust::Trust;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa, Issuer, KeyPair,
    NameConstraints, date_time_ymd,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::process::Command;
use std::sync::Arc;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

const HOST: &str = "localhost";

/// Presents what it is told to, whether it fits the key or not.
#[derive(Debug)]
struct Presents(Arc<rustls::sign::CertifiedKey>);

impl rustls::server::ResolvesServerCert for Presents {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// What an agent that trusts these CAs says of a server with this chain.
async fn said(chain: Vec<Vec<u8>>, key: Vec<u8>, roots: &str) -> Result<(), DialError> {
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&PrivateKeyDer::try_from(key).unwrap()).unwrap();
    let chain = chain.into_iter().map(CertificateDer::from).collect();
    let presents = Presents(Arc::new(rustls::sign::CertifiedKey::new(chain, key)));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_no_client_auth().with_cert_resolver(Arc::new(presents));
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = async {
        let (stream, _) = listener.accept().await.unwrap();
        // It ends with the agent's refusal.
        let _ = acceptor.accept(stream).await;
    };
    tokio::join!(dialled(port, roots), server).0
}

async fn dialled(port: u16, roots: &str) -> Result<(), DialError> {
    let trust = Trust::load(Some(roots), std::path::Path::new("/nowhere")).unwrap();
    let security = Security::Tls { name: HOST.to_owned(), config: Arc::new(trust.client_config(false).unwrap()) };
    let endpoint = Endpoint { host: "127.0.0.1".to_owned(), port, security };
    Link::connect(&endpoint).await.map(|_| ())
}

fn ca_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "a CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

fn params(name: &str) -> CertificateParams {
    CertificateParams::new([name.to_owned()]).unwrap()
}

struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new(params: CertificateParams) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self { pem: certificate.pem(), issuer: Issuer::new(params, key) }
    }

    /// The certificate, and its key.
    fn sign(&self, params: &CertificateParams) -> (Vec<u8>, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().der().to_vec(), key.serialize_der())
    }
}

#[tokio::test]
async fn each_fault_of_a_certificate_is_said_with_the_way_out() {
    let ca = Ca::new(ca_params());
    let (good, good_key) = ca.sign(&params(HOST));
    type Case = (&'static str, Vec<Vec<u8>>, Vec<u8>, String, &'static [&'static str]);
    let of = |what: &'static str, params: &CertificateParams, words: &'static [&'static str]| -> Case {
        let (certificate, key) = ca.sign(params);
        (what, vec![certificate], key, ca.pem.clone(), words)
    };
    let mut expired = params(HOST);
    (expired.not_before, expired.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 2, 3));
    let mut future = params(HOST);
    (future.not_before, future.not_after) = (date_time_ymd(2090, 1, 1), date_time_ymd(2091, 1, 1));
    let mut for_clients = params(HOST);
    for_clients.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let mut unnamed = CertificateParams::default();
    unnamed.distinguished_name.push(rcgen::DnType::CommonName, HOST);
    // A CA that signed itself, as its own server: what people make first.
    let mut own = ca_params();
    own.subject_alt_names = params(HOST).subject_alt_names;
    let key = KeyPair::generate().unwrap();
    let own_certificate = own.self_signed(&key).unwrap();
    let self_signed: Case = (
        "a CA as a server",
        vec![own_certificate.der().to_vec()],
        key.serialize_der(),
        own_certificate.pem(),
        &["is one of a CA", "CA:FALSE"],
    );
    // Signed by a certificate that is a server's.
    let server_key = KeyPair::generate().unwrap();
    let server = params("other.example").signed_by(&server_key, &ca.issuer).unwrap();
    let (by_server, by_server_key) =
        Ca { pem: String::new(), issuer: Issuer::new(params("other.example"), server_key) }.sign(&params(HOST));
    // A CA for other names alone.
    let mut constrained = ca_params();
    constrained.name_constraints = Some(NameConstraints {
        permitted_subtrees: vec![GeneralSubtree::DnsName("example.com".to_owned())],
        excluded_subtrees: Vec::new(),
    });
    let narrow = Ca::new(constrained);
    let (beyond, beyond_key) = narrow.sign(&params(HOST));
    let version_1 = CertificateDer::from_pem_slice(include_bytes!("../../tests/data/x509-v1.pem")).unwrap().to_vec();
    let (sha1, sha1_key, sha1_ca) = sha1();
    let others = Ca::new(ca_params());
    let cases: Vec<Case> = vec![
        of("another name", &params("other.example"), &["not for localhost", "other.example", "tls.sni"]),
        of("no name", &unnamed, &["not for localhost", "no name at all"]),
        of("expired", &expired, &["has expired (2021-02-03", "clock", "renew it in the Secret"]),
        of("of the future", &future, &["not valid yet (2090-01-01", "time service"]),
        of("for clients", &for_clients, &["not meant for servers", "serverAuth"]),
        (
            "another CA",
            vec![good.clone()],
            good_key.clone(),
            others.pem,
            &["does not know", "root-certs.pem", "tls.crt"],
        ),
        self_signed,
        ("by no CA", vec![by_server, server.der().to_vec()], by_server_key, ca.pem.clone(), &["no CA's", "tls.crt"]),
        ("beyond its CA", vec![beyond], beyond_key, narrow.pem, &["not allowed to sign", "nameConstraints"]),
        ("version 1", vec![version_1], good_key.clone(), ca.pem.clone(), &["can't be read", "version 1", "version 3"]),
        ("no DER", vec![b"nonsense".to_vec()], good_key.clone(), ca.pem.clone(), &["can't be read", "DER"]),
        ("SHA-1", vec![sha1], sha1_key, sha1_ca, &["SHA-1", "issued anew"]),
    ];
    for (what, chain, key, roots, words) in cases {
        let error = said(chain, key, &roots).await.unwrap_err();
        let text = with_source(&error);
        assert!(matches!(error, DialError::Trust(_)), "{what}: {text}");
        for word in words {
            assert!(text.contains(word), "{what}: {text:?} doesn't say {word:?}");
        }
        for jargon in ["UnknownIssuer", "CaUsedAsEndEntity", "NotValidForName", "invalid peer certificate"] {
            assert!(!text.contains(jargon), "{what}: {text:?}");
        }
    }
    // And one without a fault. What is wrong then is that it speaks no gRPC, which may show only later.
    let ended = said(vec![good], good_key, &ca.pem).await;
    assert!(!matches!(ended, Err(DialError::Trust(_))), "{ended:?}");
}

/// Certificate, key and CA: rcgen makes none that is so old.
fn sha1() -> (Vec<u8>, Vec<u8>, String) {
    let directory = tempfile::tempdir().unwrap();
    let openssl = |arguments: &[&str]| {
        let output = Command::new("openssl").args(arguments).current_dir(directory.path()).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
    std::fs::write(directory.path().join("names"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
        .unwrap();
    openssl(&[
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=old",
    ]);
    openssl(&[
        "req",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "key.pem",
        "-out",
        "csr.pem",
        "-subj",
        "/CN=localhost",
    ]);
    openssl(&[
        "x509",
        "-req",
        "-in",
        "csr.pem",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-sha1",
        "-extfile",
        "names",
        "-outform",
        "DER",
        "-out",
        "leaf.der",
    ]);
    openssl(&["pkcs8", "-topk8", "-nocrypt", "-in", "key.pem", "-outform", "DER", "-out", "key.der"]);
    (read("leaf.der"), read("key.der"), String::from_utf8(read("ca.pem")).unwrap())
}

#[tokio::test]
async fn what_answers_without_a_certificate_is_named() {
    let ca = Ca::new(ca_params());
    let alert = |description: u8| vec![21, 3, 3, 0, 2, 2, description];
    let cases: [(Vec<u8>, &[&str]); 4] = [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), &["does not speak TLS", "onboardingEndpoint.port"]),
        (alert(70), &["no version of TLS from 1.2 on"]),
        (alert(112), &["nobody at 127.0.0.1", "localhost", "endpoint.hosts"]),
        (Vec::new(), &["closed the connection", "localhost", "onboarding-plane"]),
    ];
    for (answer, words) in cases {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut hello = [0; 16 * 1024];
            assert!(stream.read(&mut hello).await.unwrap() > 0);
            stream.write_all(&answer).await.unwrap();
        };
        let error = tokio::join!(dialled(port, &ca.pem), server).0.unwrap_err();
        let text = with_source(&error);
        for word in words {
            assert!(text.contains(word), "{answer:?}: {text:?} doesn't say {word:?}");
        }
    }
}
