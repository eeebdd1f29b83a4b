//! What may speak to the endpoint: TLS 1.2 or later with HTTP/2. To anything else it says nothing of itself.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use rustls_pki_types::ServerName;
use std::time::Duration;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn agents_join_by_tls_1_2_and_by_1_3() {
    let plane = Plane::start().await;
    let mut joined = Vec::new();
    for (version, subject) in [(&rustls::version::TLS12, "old"), (&rustls::version::TLS13, "new")] {
        let mut agent = connect(plane.address, HOST, plane.client_of(&[version]), Key::new()).await;
        let mut session = agent.join(&plane.jwt(subject, "ratings")).await.unwrap();
        session.boot().await;
        joined.push((agent, session));
    }
    assert_eq!(plane.metric("onboarding_sessions").as_deref(), Some("2"));
}

#[tokio::test]
async fn tls_1_1_is_refused_before_a_certificate_is_shown() {
    let plane = Plane::start().await;
    // Our own library speaks nothing so old.
    let s_client = async |version: &str| {
        let mut openssl = tokio::process::Command::new("openssl");
        openssl
            .args(["s_client", "-connect", &plane.address.to_string(), "-servername", HOST, "-alpn", "h2"])
            .args([version, "-cipher", "DEFAULT@SECLEVEL=0"])
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true);
        let output = tokio::time::timeout(Duration::from_secs(20), openssl.output()).await.unwrap().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    };
    let (connected, said) = s_client("-tls1_2").await;
    assert!(connected && said.contains("-----BEGIN CERTIFICATE-----"), "{said}");
    let (connected, said) = s_client("-tls1_1").await;
    assert!(!connected, "{said}");
    assert!(said.contains("no peer certificate available"), "{said}");
    // An alert, so that the client can tell this from a broken line: TLS 1.1 names no signature algorithms.
    assert!(said.contains("alert handshake failure"), "{said}");
    plane.failed_connections("handshake", 1).await;
}

#[tokio::test]
async fn plain_text_http_2_is_refused() {
    let plane = Plane::start().await;
    // A client that would be content with any answer.
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", plane.address)).unwrap();
    let asked = async {
        let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
        let mut client = onboarding_wire::onboarding::discovery_service_client::DiscoveryServiceClient::new(channel);
        client.discover(onboarding_wire::onboarding::DiscoverRequest {}).await.map_err(|error| error.to_string())
    };
    tokio::time::timeout(Duration::from_secs(20), asked).await.expect("it ends").unwrap_err();

    // And what it got: the preface and empty SETTINGS (RFC 9113, section 3.4) are answered with an alert at most.
    let failed: u64 =
        plane.metric("onboarding_connections_failed_total{reason=\"handshake\"}").unwrap().parse().unwrap();
    let mut stream = TcpStream::connect(plane.address).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
    // Closed, or reset because it had not read all.
    let _ = read.expect("the connection is closed");
    assert!(answer.is_empty() || (answer[0] == 21 && answer.len() == 7), "more than one alert: {answer:?}");
    plane.failed_connections("handshake", failed + 1).await;
}

#[tokio::test]
async fn a_client_that_wants_http_1_is_refused_in_the_handshake() {
    let plane = Plane::start().await;
    let name = || ServerName::try_from(HOST).unwrap();
    let connect = async |protocol: &[u8]| {
        let mut tls = (*plane.client_config()).clone();
        tls.alpn_protocols = vec![protocol.to_vec()];
        let tcp = TcpStream::connect(plane.address).await.unwrap();
        tokio_rustls::TlsConnector::from(std::sync::Arc::new(tls)).connect(name(), tcp).await
    };
    connect(b"h2").await.unwrap();
    let refused = connect(b"http/1.1").await.unwrap_err().to_string();
    assert!(refused.contains("NoApplicationProtocol"), "{refused}");
}
