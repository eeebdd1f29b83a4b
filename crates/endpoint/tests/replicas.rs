//! Several replicas on one registry.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{Connection, DisconnectReason, State};
use onboarding_wire::onboarding as pb;
use pb::session_end::Reason;
use std::sync::atomic::Ordering;
use std::time::Duration;
use support::*;

const GRACE: Duration = Duration::from_secs(300);
const SHORT: Duration = Duration::from_millis(300);

fn connected_to(state: &State, wanted: &str) -> bool {
    matches!(state, State::Live(live) if matches!(&live.connection, Connection::Connected { replica, .. } if replica == wanted))
}

#[tokio::test]
async fn a_session_that_another_replica_replaced_ends() {
    let crew = Crew::new(&["plane-0", "plane-1"]);
    let first = Plane::start().await.replica("plane-0", crew.clone(), GRACE).await;
    let second = first.replica("plane-1", crew, GRACE).await;
    let key = Key::new();
    let mut old = first.agent_with(key.clone()).await.join(&first.jwt("vm7", "ratings")).await.unwrap();
    let _new = second.agent_with(key).await.join(&second.jwt("vm7", "ratings")).await.unwrap();
    assert_eq!(old.end().await.reason(), Reason::Replaced);
    until(&second, "with the second", |all| connected_to(&all[0].1.state, "plane-1")).await;
}

/// What is on record then is about the session that it replaces.
#[tokio::test]
async fn a_session_is_not_ended_before_it_is_on_record() {
    let crew = Crew::new(&["plane-0", "plane-1"]);
    let first = Plane::start().await.replica("plane-0", crew.clone(), GRACE).await;
    let second = first.replica("plane-1", crew, GRACE).await;
    let key = Key::new();
    let _old = first.agent_with(key.clone()).await.join(&first.jwt("vm7", "ratings")).await.unwrap();
    let mut agent = second.agent_with(key).await;
    agent.authorize(&second.jwt("vm7", "ratings")).await.unwrap();
    let name = agent.register().await.unwrap();
    let (namespace, name) = name.split_once('/').unwrap();
    let name = RegistrationName { namespace: namespace.to_owned(), name: name.to_owned() };

    let registry = second.registry.clone();
    let begun = |which: usize| registry.begun[which].load(Ordering::SeqCst);
    let gate = registry.gate.lock().await;
    let before = begun(1);
    let opening = tokio::spawn(async move { agent.session().await });
    becomes("it is being put on record", async || begun(1), |stores| *stores > before).await;
    let before = begun(0);
    registry.changes.send(name).unwrap();
    // By both.
    becomes("the change was looked at", async || begun(0), |loads| *loads >= before + 2).await;
    drop(gate);
    let session = opening.await.unwrap().unwrap();
    session.say(pb::agent_message::Message::Health(pb::Health { ready: true, message: String::new() })).await;
    until(&second, "the session goes on", |all| {
        connected_to(&all[0].1.state, "plane-1") && matches!(&all[0].1.state, State::Live(live) if live.health.ready)
    })
    .await;
}

#[tokio::test]
async fn a_registration_that_is_deleted_elsewhere_ends_the_session_here() {
    let crew = Crew::new(&["plane-0", "plane-1"]);
    let first = Plane::start().await.replica("plane-0", crew.clone(), GRACE).await;
    let second = first.replica("plane-1", crew, GRACE).await;
    let mut session = first.agent().await.join(&first.jwt("vm7", "ratings")).await.unwrap();
    let (status, answer) = ask(&second, "DELETE /v1/workloads/bookinfo/ratings-jwt-my-corp--vm7").await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(session.end().await.reason(), Reason::Deleted);
}

#[tokio::test]
async fn the_leader_says_that_the_sessions_of_a_lost_replica_have_ended_and_a_replica_that_was_not_lost_puts_it_right()
{
    let crew = Crew::new(&["plane-0", "plane-1"]);
    let leader = Plane::start().await.replica("plane-0", crew.clone(), GRACE).await;
    let other = leader.replica("plane-1", crew.clone(), GRACE).await;
    let session = other.agent().await.join(&other.jwt("vm7", "ratings")).await.unwrap();
    let mut seen = Vec::new();
    let mut changes = onboarding_endpoint::backend::Registry::changes(leader.registry.as_ref());
    crew.set_there("plane-1", false);
    // Both happen, one after the other: what is on record follows the fact.
    while seen.len() < 2 {
        let name = futures_util::StreamExt::next(&mut changes).await.unwrap();
        let stored = onboarding_endpoint::backend::Registry::load(leader.registry.as_ref(), &name).await.unwrap();
        seen.push(stored.state);
    }
    until(&leader, "with the one that holds it", |all| connected_to(&all[0].1.state, "plane-1")).await;
    session.say(pb::agent_message::Message::Health(pb::Health { ready: true, message: String::new() })).await;
    until(&leader, "the session goes on", |all| matches!(&all[0].1.state, State::Live(live) if live.health.ready))
        .await;
}

#[tokio::test]
async fn a_lease_is_ended_by_the_leader_alone() {
    let crew = Crew::new(&["plane-9", "plane-0"]);
    let plane = Plane::start().await.replica("plane-0", crew.clone(), SHORT).await;
    let session = plane.agent().await.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    drop(session);
    until(&plane, "disconnected", |all| {
        matches!(&all[0].1.state, State::Live(live) if matches!(live.connection, Connection::Disconnected { reason: DisconnectReason::ConnectionLost, .. }))
    })
    .await;
    let until_then = jiff::Timestamp::now() + SHORT + SHORT;
    becomes("the lease is over", async || jiff::Timestamp::now(), |now| *now > until_then).await;
    let all = onboarding_endpoint::backend::Registry::list(plane.registry.as_ref()).await.unwrap();
    assert!(matches!(all[0].1.state, State::Live(_)), "{all:?}");
    crew.elect("plane-0");
    until(&plane, "ended", |all| matches!(all[0].1.state, State::Ended(_))).await;
}

#[tokio::test]
async fn an_issuer_that_is_struck_off_vouches_for_nobody() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    plane.change(|snapshot| {
        let mut settings = (**snapshot.plane.as_ref().unwrap()).clone();
        settings.issuers.clear();
        snapshot.plane = Some(std::sync::Arc::new(settings));
    });
    assert_eq!(session.end().await.reason(), Reason::Withdrawn);
    // Neither does a token of before.
    assert_refused(agent.register().await, tonic::Code::PermissionDenied, "the issuer of this workload's JWT isn't in");
}
