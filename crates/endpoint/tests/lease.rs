//! What happens without an agent: the registry fails, the plane starts again, time passes; and how long a connection may be idle.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use onboarding_core::policy::PolicySet;
use onboarding_core::registration::{Connection, DisconnectReason, Live, State};
use onboarding_endpoint::limits::Limits;
use onboarding_wire::onboarding as pb;
use pb::session_end::Reason;
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

const GRACE: Duration = Duration::from_secs(300);

fn live(state: &State) -> Option<&Live> {
    match state {
        State::Live(live) => Some(live),
        _ => None,
    }
}

fn disconnected(state: &State, why: DisconnectReason) -> bool {
    live(state).is_some_and(|live| matches!(live.connection, Connection::Disconnected { reason, .. } if reason == why))
}

#[tokio::test]
async fn a_withdrawal_ends_the_session_also_where_the_registry_can_not_be_written() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    plane.registry.broken.store(true, Ordering::SeqCst);
    plane.withdraw_policies();
    assert_eq!(session.end().await.reason(), Reason::Withdrawn);
    let reasons = async || plane.readiness.reasons();
    becomes("not ready", reasons, |reasons| reasons.iter().any(|it| it.starts_with("registry: "))).await;
    // It is on record as soon as the registry can be written.
    until(&plane, "live", |all| matches!(all[0].1.state, State::Live(_))).await;
    plane.registry.broken.store(false, Ordering::SeqCst);
    until(&plane, "ended", |all| matches!(all[0].1.state, State::Ended(_))).await;
    becomes("ready", reasons, Vec::is_empty).await;
    becomes("audited", async || plane.decisions(), |all| *all == ["allowed", "withdrawn"]).await;
    assert_eq!(plane.audit.read()[1]["identity"]["jwt"]["subject"], "vm7");
}

#[tokio::test]
async fn whoever_is_suspended_comes_back_when_the_policy_can_be_read_again() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    let mut policies = Default::default();
    plane.change(|snapshot| {
        policies = std::mem::take(&mut snapshot.policies);
        snapshot.policy_unreadable = true;
    });
    assert_eq!(session.end().await.reason(), Reason::PolicyUnreadable);
    plane.change(|snapshot| {
        snapshot.policies = policies;
        snapshot.policy_unreadable = false;
    });
    // The same registration: neither ended nor made anew.
    agent.session().await.unwrap().boot().await;
    becomes("audited", async || plane.decisions(), |all| *all == ["allowed", "suspended"]).await;
}

#[tokio::test]
async fn whoever_is_suspended_too_long_is_removed() {
    let plane = Plane::start_with(Duration::from_secs(3), Limits::default()).await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    plane.change(|snapshot| {
        snapshot.policies = Default::default();
        snapshot.policy_unreadable = true;
    });
    assert_eq!(session.end().await.reason(), Reason::PolicyUnreadable);
    until(&plane, "ended", |all| matches!(all[0].1.state, State::Ended(_))).await;
    let policies = PolicySet::compile(vec![policy(&plane.oidc.issuer)]);
    plane.change(|snapshot| {
        snapshot.policies = std::sync::Arc::new(policies);
        snapshot.policy_unreadable = false;
    });
    assert_refused(agent.session().await.map(|_| ()), Code::NotFound, "the registration is gone; onboard again");
}

#[tokio::test]
async fn who_admits_a_workload_is_shown_as_it_is_now() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    let admitted = async || {
        let (_, listed) = ask(&plane, "GET /v1/workloads").await;
        let conditions = listed["items"][0]["status"]["conditions"].as_array().unwrap().clone();
        let of_kind = conditions.iter().find(|it| it["type"] == "Admitted").unwrap();
        assert_eq!(of_kind["lastTransitionTime"], listed["items"][0]["metadata"]["creationTimestamp"]);
        ["status", "reason", "message"].map(|field| of_kind[field].as_str().unwrap().to_owned())
    };
    assert_eq!(admitted().await, ["True", "AllowedByPolicy", "OnboardingPolicy allow-our-vms, rule spec.allow[0]"]);
    let (ours, mut first) = (policy(&plane.oidc.issuer), policy("https://another.example"));
    first.name = "a-first".to_owned();
    first.rules.extend(ours.rules.clone());
    plane.change(|snapshot| snapshot.policies = std::sync::Arc::new(PolicySet::compile(vec![first, ours])));
    assert_eq!(admitted().await[2], "OnboardingPolicy a-first, rule spec.allow[1]");
    plane.change(|snapshot| {
        snapshot.policies = Default::default();
        snapshot.policy_unreadable = true;
    });
    assert_eq!(admitted().await[..2], ["Unknown", "PolicyUnreadable"]);
    assert_eq!(session.end().await.reason(), Reason::PolicyUnreadable);
}

#[tokio::test]
async fn a_plane_that_was_killed_knows_at_its_next_start_that_nobody_is_connected() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    session.boot().await;
    let restarted = plane.another(GRACE).await;
    until(&restarted, "disconnected", |all| disconnected(&all[0].1.state, DisconnectReason::PlaneRestarted)).await;
    // Its token and its key are still good there.
    let mut again = restarted.agent_with(agent.key.clone()).await;
    again.token = agent.token.clone();
    let proof = again.token_proof().await;
    again.session_with(Some(proof)).await.unwrap().boot().await;
}

#[tokio::test]
async fn a_connection_lives_on_after_its_time_to_prove_a_key() {
    let limits = Limits { time_to_prove: Duration::from_secs(2), ..Limits::default() };
    let plane = Plane::start_with(GRACE, limits).await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    session.boot().await;
    // Another connection, opened later, is closed: then the time of the first one is over too.
    let idle = plane.agent().await;
    idle.discover().await;
    plane.failed_connections("nothing_proven", 1).await;
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    let health = pb::Health { ready: false, message: String::new() };
    session.say(pb::agent_message::Message::Health(health)).await;
    until(&plane, "not ready", |all| live(&all[0].1.state).is_some_and(|live| !live.health.ready)).await;
    assert_eq!(plane.metric("onboarding_sessions").as_deref(), Some("1"));
}

#[tokio::test]
async fn a_key_that_anybody_can_make_keeps_no_connection_open() {
    let limits = Limits { time_to_prove: Duration::from_secs(1), ..Limits::default() };
    let plane = Plane::start_with(GRACE, limits).await;
    let mut stranger = plane.agent().await;
    stranger.token = "no token".to_owned();
    let proof = stranger.token_proof().await;
    assert_refused(stranger.session_with(Some(proof)).await.map(|_| ()), Code::Unauthenticated, "it is no JWT");
    plane.failed_connections("nothing_proven", 1).await;
}

#[tokio::test]
async fn an_address_has_no_more_connections_than_it_may() {
    let limits = Limits { connections_per_address: 1, ..Limits::default() };
    let plane = Plane::start_with(GRACE, limits).await;
    let agent = plane.agent().await;
    agent.discover().await;
    let mut second = tokio::net::TcpStream::connect(plane.address).await.unwrap();
    let read = second.read_u8();
    tokio::time::timeout(Duration::from_secs(10), read).await.expect("it is closed").unwrap_err();
    plane.failed_connections("too_many_of_address", 1).await;
    // The first one goes on.
    agent.discover().await;
}

#[tokio::test]
async fn an_agent_that_says_too_much_is_cut_off() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    for round in 0..200 {
        let health = pb::Health { ready: round % 2 == 0, message: String::new() };
        let message = pb::AgentMessage { message: Some(pb::agent_message::Message::Health(health)) };
        if session.say.send(message).await.is_err() {
            break;
        }
    }
    until(&plane, "cut off", |all| disconnected(&all[0].1.state, DisconnectReason::ConnectionLost)).await;
}

#[tokio::test]
async fn a_plane_without_a_certificate_says_so_and_serves_nobody() {
    let plane = Plane::start().await;
    // What was served goes on being served; a plane that starts without one has none.
    plane.change(|snapshot| snapshot.tls = None);
    plane.agent().await.discover().await;
    let bare = plane.another(GRACE).await;
    let reasons = bare.readiness.reasons();
    assert!(reasons.iter().any(|it| it.starts_with("certificate: ") && it.contains("secretName")), "{reasons:?}");
    let mut tcp = tokio::net::TcpStream::connect(bare.address).await.unwrap();
    let mut answer = Vec::new();
    tcp.write_all(&CLIENT_HELLO_PREFIX).await.unwrap();
    let read = tcp.read_to_end(&mut answer);
    let _ = tokio::time::timeout(Duration::from_secs(20), read).await.expect("it is closed");
    assert!(answer.is_empty() || answer[0] == 21, "at most an alert: {answer:?}");
}

/// A record that begins like a ClientHello and isn't one.
const CLIENT_HELLO_PREFIX: [u8; 9] = [22, 3, 1, 0, 4, 1, 0, 0, 0];
