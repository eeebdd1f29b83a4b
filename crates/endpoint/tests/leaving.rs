//! How sessions end, and what the way in does while they live.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use jiff::Timestamp;
use onboarding_core::registration::{Connection, DisconnectReason, Ended, State};
use onboarding_endpoint::backend::Registry;
use onboarding_endpoint::limits::Limits;
use onboarding_wire::onboarding as pb;
use pb::session_end::Reason;
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::*;
use tonic::Code;

#[tokio::test]
async fn a_policy_that_is_withdrawn_ends_the_session_and_the_registration() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    plane.withdraw_policies();
    let end = session.end().await;
    assert_eq!(end.reason(), Reason::Withdrawn);
    assert!(end.message.contains("Not authorized by OnboardingPolicy"), "{}", end.message);
    until(&plane, "ended", |all| matches!(all[0].1.state, State::Ended(_))).await;
    assert_refused(agent.register().await, Code::PermissionDenied, "Not authorized by OnboardingPolicy");
    assert_refused(agent.session().await.map(|_| ()), Code::PermissionDenied, "Not authorized by OnboardingPolicy");
}

#[tokio::test]
async fn a_group_that_is_gone_ends_the_registration() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    plane.change(|snapshot| snapshot.groups.clear());
    assert_eq!(session.end().await.reason(), Reason::Withdrawn);
}

#[tokio::test]
async fn a_policy_that_can_not_be_read_ends_the_session_and_leaves_the_entry() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    plane.change(|snapshot| {
        snapshot.policies = Default::default();
        snapshot.policy_unreadable = true;
    });
    assert_eq!(session.end().await.reason(), Reason::PolicyUnreadable);
    until(&plane, "suspended", |all| {
        matches!(&all[0].1.state, State::Live(live) if matches!(live.connection, Connection::Disconnected { reason: DisconnectReason::PolicyUnreadable, .. }))
    })
    .await;
    let refused = agent.session().await.map(|_| ());
    assert_refused(refused, Code::PermissionDenied, "a policy can't be read");
}

#[tokio::test]
async fn who_unregisters_is_told_so_also_where_the_registry_says_first_that_it_is_gone() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    let registry = plane.registry.clone();
    let loads = || registry.begun[0].load(Ordering::SeqCst);
    let answers = registry.answers.lock().await;
    let before = loads();
    let unregistering = tokio::spawn(async move { agent.unregister().await });
    until(&plane, "it has ended", |all| matches!(all[0].1.state, State::Ended(_))).await;
    // By the call, and by who hears of the change.
    becomes("the change was looked at", async || loads(), |loads| *loads >= before + 2).await;
    drop(answers);
    unregistering.await.unwrap().unwrap();
    assert_eq!(session.end().await.reason(), Reason::Unregistered);
}

#[tokio::test]
async fn a_session_whose_end_can_not_be_stored_learns_of_the_next_change() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    plane.registry.broken.store(true, Ordering::SeqCst);
    assert_refused(agent.unregister().await, Code::Unavailable, "no space left");
    plane.registry.broken.store(false, Ordering::SeqCst);
    let registry = plane.registry.as_ref();
    let (name, stored) = Registry::list(registry).await.unwrap().remove(0);
    let deleted = State::Ended(Ended { key: None, at: Timestamp::now() });
    Registry::store(registry, &name, stored.version, &deleted).await.unwrap();
    assert_eq!(session.end().await.reason(), Reason::Deleted);
}

#[tokio::test]
async fn a_newer_session_takes_over() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut first = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    let mut second = agent.session().await.unwrap();
    assert_eq!(first.end().await.reason(), Reason::Replaced);
    second.boot().await;
}

#[tokio::test]
async fn a_lost_connection_is_known_at_once_and_the_lease_ends_it() {
    let plane = Plane::start_with(Duration::from_secs(2), Limits::default()).await;
    let mut agent = plane.agent().await;
    let session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    drop(session);
    drop(agent);
    until(&plane, "disconnected", |all| {
        matches!(&all[0].1.state, State::Live(live) if matches!(live.connection, Connection::Disconnected { reason: DisconnectReason::ConnectionLost, .. }))
    })
    .await;
    until(&plane, "reaped", |all| matches!(all[0].1.state, State::Ended(_))).await;
}

#[tokio::test]
async fn a_token_that_is_not_renewed_ends_the_session_and_a_renewed_one_does_not() {
    let plane = Plane::start().await;
    plane.change(|snapshot| {
        let mut settings = snapshot.plane.as_deref().unwrap().clone();
        settings.token_life = Duration::from_secs(4);
        snapshot.plane = Some(std::sync::Arc::new(settings));
    });
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    plane.change(|snapshot| {
        let mut settings = snapshot.plane.as_deref().unwrap().clone();
        settings.token_life = Duration::from_secs(6);
        snapshot.plane = Some(std::sync::Arc::new(settings));
    });
    let renewed = agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    let token = renewed.token;
    session.say(pb::agent_message::Message::TokenRenewed(pb::TokenRenewed { token })).await;
    let expires = renewed.expires_at.unwrap().seconds;
    assert_eq!(session.end().await.reason(), Reason::TokenExpired);
    let now = jiff::Timestamp::now().as_second();
    assert!(now >= expires, "the session ended at {now}, its renewed token at {expires}");
    assert_refused(agent.register().await, Code::Unauthenticated, "expired");
}

#[tokio::test]
async fn a_session_begins_with_hello() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    agent.register().await.unwrap();
    let health = pb::Health { ready: true, message: String::new() };
    let first = pb::AgentMessage { message: Some(pb::agent_message::Message::Health(health)) };
    let outcome = pb::session_service_client::SessionServiceClient::new(agent.channel.clone())
        .session(agent.bearer(tokio_stream::iter([first])))
        .await;
    assert_refused(outcome.map(|_| ()), Code::InvalidArgument, "first message of a session is hello");
}

#[tokio::test]
async fn health_reaches_the_registration() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    let health = pb::Health { ready: false, message: "503\nfrom /ready".to_owned() };
    session.say(pb::agent_message::Message::Health(health)).await;
    until(&plane, "not ready", |all| {
        matches!(&all[0].1.state, State::Live(live) if !live.health.ready && live.health.message == "503from /ready")
    })
    .await;
}

#[tokio::test]
async fn a_stopping_plane_says_so() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    let registry = plane.registry.clone();
    let stopped = tokio::spawn(plane.stop());
    assert_eq!(session.end().await.reason(), Reason::PlaneStopping);
    drop((session, agent));
    stopped.await.unwrap();
    // Ten thousand sessions aren't written one by one while the plane stops: its next start does it.
    let all = onboarding_endpoint::backend::Registry::list(registry.as_ref()).await.unwrap();
    assert!(matches!(&all[0].1.state, State::Live(live) if matches!(live.connection, Connection::Connected { .. })));
}

#[tokio::test]
async fn a_new_certificate_is_served_without_dropping_a_connection() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    session.boot().await;
    let before = plane.served_certificate().await;
    plane.renew_certificate();
    becomes("the new certificate", async || plane.served_certificate().await, |served| *served != before).await;
    // The connection of before goes on.
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();

    // One that can't be used changes nothing.
    let now = plane.served_certificate().await;
    plane.change(|snapshot| {
        snapshot.tls = Some(std::sync::Arc::new(onboarding_endpoint::backend::TlsMaterial {
            certificate_chain: "nonsense".to_owned(),
            private_key: "nonsense".to_owned(),
        }));
    });
    agent.discover().await;
    assert_eq!(plane.served_certificate().await, now);
}

#[tokio::test]
async fn a_connection_that_proves_nothing_is_closed() {
    let limits = Limits { time_to_prove: Duration::from_secs(1), ..Limits::default() };
    let plane = Plane::start_with(Duration::from_secs(300), limits).await;
    let agent = plane.agent().await;
    agent.discover().await;
    plane.failed_connections("nothing_proven", 1).await;
}

#[tokio::test]
async fn an_operator_lists_and_deletes() {
    use std::os::unix::fs::PermissionsExt;
    let plane = Plane::start().await;
    let mode = std::fs::metadata(plane.directory.path().join("admin.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let name = "bookinfo/ratings-jwt-my-corp--vm7";
    let (code, body) = ask(&plane, &format!("DELETE /v1/workloads/{name}")).await;
    assert_eq!(
        (code, body["message"].as_str().unwrap()),
        (404, format!("there is no registration {name}, and no key is remembered for it").as_str())
    );

    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    let (_, listed) = ask(&plane, "GET /v1/workloads").await;
    assert_eq!(listed["items"][0]["metadata"]["name"], "ratings-jwt-my-corp--vm7");
    assert_eq!(listed["items"][0]["status"]["activeAgentConnection"]["connectedTo"], "plane-0");
    assert_eq!(listed["items"][0]["status"]["admitted"], true);
    let (code, shown) = ask(&plane, &format!("GET /v1/workloads/{name}")).await;
    assert_eq!((code, &shown), (200, &listed["items"][0]), "one is shown as it is listed");
    let (_, status) = ask(&plane, "GET /v1/status").await;
    assert_eq!((status["sessions"].as_u64(), status["uid"].as_str()), (Some(1), Some(UID)));

    let (code, body) = ask(&plane, &format!("DELETE /v1/workloads/{name}")).await;
    assert_eq!((code, &body), (200, &serde_json::json!({"deleted": true, "keyForgotten": true})));
    assert_eq!(session.end().await.reason(), Reason::Deleted);
    let (code, body) = ask(&plane, &format!("GET /v1/workloads/{name}")).await;
    assert_eq!((code, body["message"].as_str().unwrap()), (404, format!("there is no registration {name}").as_str()));
    // The token of before is worthless; a new key may come.
    assert_refused(agent.register().await, Code::Unauthenticated, "issued before the registration ended");
    let mut rebuilt = plane.agent().await;
    rebuilt.join(&plane.jwt("vm7", "ratings")).await.unwrap();
}
