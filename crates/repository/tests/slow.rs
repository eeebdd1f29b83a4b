//! Clients that take their time, or too many places: each is ended, and counted.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use onboarding_endpoint::backend::{ConfigSource, Snapshot, TlsMaterial};
use onboarding_repository::{Limits, Metrics, Options, Running};
use onboarding_runtime::readiness::Readiness;
use onboarding_testkit::eventually::eventually;
use onboarding_testkit::oidc::make_tls;
use prometheus_client::registry::Registry;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

const GET: &str = "GET /install/deb/amd64/onboarding-agent.deb HTTP/1.1\r\nHost: x\r\n";

struct Fixed(watch::Sender<Arc<Snapshot>>);

impl ConfigSource for Fixed {
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.0.subscribe()
    }
}

struct Server {
    running: Running,
    registry: Registry,
    tls: TlsConnector,
    _dir: tempfile::TempDir,
}

impl Server {
    async fn start(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "deb/amd64/onboarding-agent.deb", &deb(&noise(40 << 20, 1)));
        let made = make_tls(&[HOST]).unwrap();
        let tls = TlsMaterial { certificate_chain: made.certificate_chain, private_key: made.private_key };
        let snapshot = Snapshot { tls: Some(Arc::new(tls)), ..Snapshot::default() };
        let config = Arc::new(Fixed(watch::Sender::new(Arc::new(snapshot))));
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        let listen = "127.0.0.1:0".parse().unwrap();
        let options = Options { packages: dir.path().to_owned(), listen, limits };
        let running =
            onboarding_repository::start(options, config, metrics, Readiness::default(), CancellationToken::new())
                .await
                .unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(made.ca.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Self { running, registry, tls: TlsConnector::from(Arc::new(client)), _dir: dir }
    }

    fn address(&self) -> SocketAddr {
        self.running.address
    }

    async fn connect(&self) -> std::io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(self.address()).await?;
        self.tls.connect(ServerName::try_from(HOST).unwrap(), tcp).await
    }

    /// Waits until so many connections were ended for this reason.
    async fn failed(&self, reason: &str, times: u32) {
        let line = format!("onboarding_repository_connections_failed_total{{reason=\"{reason}\"}} {times}\n");
        eventually(&line, Duration::from_secs(30), async || {
            let mut all = String::new();
            prometheus_client::encoding::text::encode(&mut all, &self.registry).unwrap();
            if all.contains(&line) { Ok(()) } else { Err(all) }
        })
        .await;
    }
}

/// What is read until the other side ends it; that must come.
async fn to_the_end(stream: &mut TlsStream<TcpStream>) -> usize {
    let mut all = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut all)).await;
    // Ended by the protocol's goodbye or without it.
    let _ = read.expect("the connection is ended");
    all.len()
}

fn patient_for(patience: Duration) -> Limits {
    Limits { patience, ..Limits::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_nothing_of_a_download_is_ended() {
    let server = Server::start(patient_for(Duration::from_secs(3))).await;
    let mut stream = server.connect().await.unwrap();
    stream.write_all(format!("{GET}\r\n").as_bytes()).await.unwrap();
    server.failed("stalled", 1).await;
    assert!(to_the_end(&mut stream).await < 30 << 20, "what the network held, and no more");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_nothing_is_ended() {
    let server = Server::start(patient_for(Duration::from_secs(3))).await;
    let mut silent = server.connect().await.unwrap();
    assert_eq!(to_the_end(&mut silent).await, 0);
    let mut idle = server.connect().await.unwrap();
    idle.write_all(b"HEAD /install/ HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    assert!(to_the_end(&mut idle).await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_come_and_a_handshake_that_does_not_come_are_ended() {
    let short = Duration::from_secs(2);
    let server = Server::start(Limits { head_timeout: short, handshake_timeout: short, ..Limits::default() }).await;
    let mut half = server.connect().await.unwrap();
    half.write_all(GET.as_bytes()).await.unwrap();
    to_the_end(&mut half).await;
    let mut tcp = TcpStream::connect(server.address()).await.unwrap();
    server.failed("handshake_timeout", 1).await;
    let mut none = Vec::new();
    tokio::time::timeout(Duration::from_secs(30), tcp.read_to_end(&mut none)).await.unwrap().unwrap();
    assert!(none.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_has_its_time_and_an_address_its_number() {
    let limits = Limits { connections_per_address: 2, longest: Duration::from_secs(5), ..Limits::default() };
    let server = Server::start(limits).await;
    let (mut first, second) = (server.connect().await.unwrap(), server.connect().await.unwrap());
    assert!(server.connect().await.is_err(), "a third one");
    server.failed("too_many_of_address", 1).await;
    first.write_all(format!("{GET}\r\n").as_bytes()).await.unwrap();
    server.failed("too_long", 2).await;
    to_the_end(&mut first).await;
    drop(second);
    server.connect().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_too_large_is_refused() {
    let server = Server::start(Limits::default()).await;
    let mut stream = server.connect().await.unwrap();
    let filler = "x".repeat(300 << 10);
    // It may be refused before it was written whole.
    let _ = stream.write_all(format!("{GET}X-Filler: {filler}\r\n\r\n").as_bytes()).await;
    let mut start = [0; 12];
    match stream.read_exact(&mut start).await {
        Ok(_) => assert_eq!(&start, b"HTTP/1.1 431"),
        // Reset, since what was sent was not read.
        Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::TimedOut, "{error}"),
    }
}
