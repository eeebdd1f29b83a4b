//! What a newcomer can cost: handshakes, their time, streams of a connection, authorizations under way.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use onboarding_attest::jwt::{Issuer, KeySource};
use onboarding_endpoint::backend::PlaneSettings;
use onboarding_endpoint::limits::Limits;
use onboarding_wire::{RETRY_PUSHBACK, onboarding as pb};
use rustls_pki_types::ServerName;
use std::sync::Arc;
use std::time::Duration;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tonic::Code;

const GRACE: Duration = Duration::from_secs(300);
/// For what must happen, on a busy machine, and less than any of the limits' defaults.
const SOON: Duration = Duration::from_secs(8);

#[tokio::test]
async fn a_peer_that_never_shakes_hands_is_closed() {
    let limits = Limits { handshake_timeout: Duration::from_millis(200), ..Limits::default() };
    let plane = Plane::start_with(GRACE, limits).await;
    let mut silent = TcpStream::connect(plane.address).await.unwrap();
    let read = timeout(SOON, silent.read(&mut [0; 1])).await.expect("the plane closes a silent connection");
    assert_eq!(read.unwrap(), 0);
    plane.failed_connections("handshake_timeout", 1).await;
}

#[tokio::test]
async fn handshakes_beyond_the_limit_wait_for_their_turn() {
    let limits = Limits { handshakes: 1, handshake_timeout: Duration::from_secs(4), ..Limits::default() };
    let plane = Plane::start_with(GRACE, limits).await;
    // The plane's queue is in order: once this is through, nothing else has a turn.
    plane.agent().await.discover().await;
    let mut silent = TcpStream::connect(plane.address).await.unwrap();
    let mut closed = tokio::spawn(async move { silent.read(&mut [0; 1]).await.unwrap() });
    let waiting = timeout(Duration::from_secs(2), plane.agent()).await;
    assert!(waiting.is_err(), "a handshake had its turn beside the silent peer's");
    assert!(!closed.is_finished());
    // This one is young enough to outlast the silent peer.
    let agent = timeout(SOON, plane.agent()).await.expect("the next handshake has its turn");
    agent.discover().await;
    assert_eq!(timeout(SOON, &mut closed).await.unwrap().unwrap(), 0);
    plane.failed_connections("handshake_timeout", 1).await;
}

#[tokio::test]
async fn a_large_configuration_waits_until_another_agent_has_taken_its_own() {
    let limits = Limits { configurations: LARGE, ..Limits::default() };
    let plane = Plane::start_with(GRACE, limits).await;
    let (mut first, mut second, mut third) = (plane.agent().await, plane.agent().await, plane.agent().await);
    let mut slow = first.join(&plane.jwt(&format!("1-{IN_LARGE_MESH}"), "ratings")).await.unwrap();
    first.discover().await;
    let mut waiting = second.join(&plane.jwt(&format!("2-{IN_LARGE_MESH}"), "ratings")).await.unwrap();
    // What is small passes by.
    waiting.say(pb::agent_message::Message::CertificateRequest(pb::CertificateRequest { csr: Vec::new() })).await;
    let answer = waiting.hear.message().await.unwrap().unwrap().message;
    assert!(matches!(answer, Some(pb::plane_message::Message::CertificateRefused(_))), "{answer:?}");
    third.join(&plane.jwt("vm3", "ratings")).await.unwrap().boot().await;
    assert!(timeout(Duration::from_secs(1), waiting.boot()).await.is_err(), "there is room for one");
    assert_eq!(slow.boot().await.version.len(), LARGE);
    assert_eq!(timeout(SOON, waiting.boot()).await.unwrap().version.len(), LARGE);
    plane.stop().await;
}

/// The value that the plane's first SETTINGS frame has for an identifier (RFC 9113, section 6.5).
async fn setting(plane: &Plane, identifier: u16) -> Option<u32> {
    let tcp = TcpStream::connect(plane.address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(plane.client_config());
    let mut stream = connector.connect(ServerName::try_from(HOST).unwrap(), tcp).await.unwrap();
    let empty_settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    stream.write_all(&empty_settings).await.unwrap();
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "not SETTINGS");
    let mut settings = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
    stream.read_exact(&mut settings).await.unwrap();
    settings.chunks_exact(6).find_map(|one| {
        let value = [one[2], one[3], one[4], one[5]];
        (u16::from_be_bytes([one[0], one[1]]) == identifier).then(|| u32::from_be_bytes(value))
    })
}

#[tokio::test]
async fn a_connection_has_so_many_streams() {
    const MAX_CONCURRENT_STREAMS: u16 = 3;
    let limits = Limits { streams_per_connection: 1, ..Limits::default() };
    let plane = Plane::start_with(GRACE, limits).await;
    assert_eq!(setting(&plane, MAX_CONCURRENT_STREAMS).await, Some(1));

    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    session.boot().await;
    let further = tokio::spawn({
        let agent = Agent { channel: agent.channel.clone(), key: agent.key.clone(), token: String::new() };
        async move { agent.try_discover().await }
    });
    // Meanwhile others come and go.
    for _ in 0..5 {
        plane.agent().await.discover().await;
    }
    assert!(!further.is_finished(), "a second stream was opened beside the session");
    drop(session);
    timeout(SOON, further).await.expect("the session's stream is free").unwrap().unwrap();
}

/// Beside the plane: takes connections, and answers nothing.
async fn busy_issuer(plane: &Plane) -> TcpListener {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let keys = KeySource::Uri(format!("https://{}/jwks.json", silent.local_addr().unwrap()));
    plane.change(|snapshot| {
        let settings = snapshot.plane.as_deref().unwrap();
        let issuers = settings.issuers.iter().map(|issuer| Issuer { keys: keys.clone(), ..issuer.clone() }).collect();
        snapshot.plane = Some(Arc::new(PlaneSettings { issuers, ..settings.clone() }));
    });
    silent
}

#[tokio::test]
async fn authorizations_beyond_the_limit_are_sent_away_with_a_delay() {
    let limits = Limits { authorizations: 1, ..Limits::default() };
    let plane = Plane::start_with(GRACE, limits).await;
    let silent = busy_issuer(&plane).await;
    let mut first = plane.agent().await;
    let jwt = plane.jwt("vm7", "ratings");
    let under_way = tokio::spawn(async move { first.authorize(&jwt).await });
    // The plane asks for the issuer's keys, and waits.
    let (asked, _) = timeout(SOON, silent.accept()).await.expect("the issuer is asked").unwrap();

    let mut second = plane.agent().await;
    let refused = second.authorize(&plane.jwt("vm8", "ratings")).await;
    let status = assert_refused(refused, Code::ResourceExhausted, "the plane is busy with other agents");
    assert_eq!(status.metadata().get(RETRY_PUSHBACK).unwrap(), "1000");
    assert!(!under_way.is_finished());

    // The issuer goes away: the first is refused, and its place is free.
    drop((asked, silent));
    assert_refused(timeout(SOON, under_way).await.unwrap().unwrap(), Code::Unavailable, "");
    let next = second.authorize(&plane.jwt("vm8", "ratings")).await;
    assert_refused(next, Code::Unavailable, "");
}
