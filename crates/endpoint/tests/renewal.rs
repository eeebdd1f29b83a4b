//! A token that is renewed beside its session: what is attested then is what the policies are asked about from then on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use onboarding_core::identity::Identity;
use onboarding_core::policy::{Matcher, Policy, PolicySet};
use onboarding_core::registration::{Connection, DisconnectReason, Live, State};
use onboarding_wire::onboarding as pb;
use pb::agent_message::Message;
use pb::session_end::Reason;
use std::sync::Arc;
use support::*;
use tonic::Code;

/// Admits those whose role is `role`.
fn policy_for(plane: &Plane, role: &str) -> Policy {
    let mut policy = policy(&plane.oidc.issuer);
    policy.name = format!("allow-{role}");
    let Matcher::Jwt(jwt) = &mut policy.rules[0].workloads[0] else { panic!("{policy:?}") };
    jwt.attributes[0].values = vec![role.to_owned()];
    policy
}

fn allow(plane: &Plane, roles: &[&str]) {
    let policies = roles.iter().map(|role| policy_for(plane, role)).collect();
    plane.change(|snapshot| snapshot.policies = Arc::new(PolicySet::compile(policies)));
}

async fn renew(session: &Session, token: &str) {
    session.say(Message::TokenRenewed(pb::TokenRenewed { token: token.to_owned() })).await;
}

fn live(state: &State) -> Option<&Live> {
    match state {
        State::Live(live) => Some(live),
        State::Absent | State::Ended(_) => None,
    }
}

fn role(live: &Live) -> String {
    let Identity::Jwt(jwt) = &live.attested.identity else { panic!("{live:?}") };
    format!("{:?}", jwt.attributes)
}

/// Whether the session is still there: what it says of its health is on record.
async fn goes_on(plane: &Plane, session: &Session, message: &str) {
    session.say(Message::Health(pb::Health { ready: true, message: message.to_owned() })).await;
    until(plane, "its health", |all| live(&all[0].1.state).is_some_and(|live| live.health.message == message)).await;
    assert_eq!(plane.metric("onboarding_sessions").as_deref(), Some("1"));
}

#[tokio::test]
async fn a_renewed_token_that_proves_the_same_goes_on() {
    let plane = Plane::start().await;
    allow(&plane, &["ratings", "details"]);
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    session.boot().await;
    let first = agent.token.clone();
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    assert_ne!(agent.token, first);
    allow(&plane, &["ratings"]);
    renew(&session, &agent.token).await;
    goes_on(&plane, &session, "renewed").await;
}

#[tokio::test]
async fn a_renewed_token_that_proves_less_than_the_policy_wants_ends_the_session() {
    let plane = Plane::start().await;
    allow(&plane, &["ratings", "details"]);
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    // The same identity has another role now, and that is admitted too, for the moment.
    agent.authorize(&plane.jwt("vm7", "details")).await.unwrap();
    allow(&plane, &["ratings"]);
    // What the session proved when it began is admitted still.
    goes_on(&plane, &session, "not renewed").await;
    renew(&session, &agent.token).await;
    let end = session.end().await;
    assert_eq!(end.reason(), Reason::Withdrawn);
    assert_eq!(end.message, "Not authorized by OnboardingPolicy any more: the workload leaves the mesh");
    until(&plane, "ended", |all| matches!(all[0].1.state, State::Ended(_))).await;
    becomes("audited", async || plane.decisions(), |all| *all == ["allowed", "allowed", "withdrawn"]).await;
    let words = "allow-ratings: spec.allow[0].workloads[0].jwt.attributes[0]: is \"details\"";
    assert_refused(agent.register().await, Code::PermissionDenied, words);
}

#[tokio::test]
async fn what_is_attested_last_is_what_a_withdrawal_is_about() {
    let plane = Plane::start().await;
    allow(&plane, &["ratings", "details"]);
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    agent.authorize(&plane.jwt("vm7", "details")).await.unwrap();
    renew(&session, &agent.token).await;
    until(&plane, "the new role", |all| live(&all[0].1.state).is_some_and(|live| role(live).contains("details"))).await;
    goes_on(&plane, &session, "renewed").await;
    // What it proved first doesn't keep it in.
    allow(&plane, &["ratings"]);
    assert_eq!(session.end().await.reason(), Reason::Withdrawn);
}

#[tokio::test]
async fn a_renewal_that_is_refused_ends_nothing_before_the_token_does() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let session = agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();
    let refused = agent.authorize(&plane.jwt("vm7", "details")).await;
    assert_refused(refused, Code::PermissionDenied, "is \"details\", wanted the attribute \"role\" to be \"ratings\"");
    goes_on(&plane, &session, "not renewed").await;
}

#[tokio::test]
async fn a_session_is_renewed_by_a_token_of_its_own_registration_alone() {
    let plane = Plane::start().await;
    let mut other = plane.agent().await;
    other.authorize(&plane.jwt("vm8", "ratings")).await.unwrap();
    // Of another host; of another key; of nobody.
    for (subject, token) in [("a", None), ("b", Some(other.token.clone())), ("c", Some("no token".to_owned()))] {
        let mut agent = plane.agent().await;
        let mut session = agent.join(&plane.jwt(subject, "ratings")).await.unwrap();
        session.boot().await;
        if token.is_none() {
            agent.authorize(&plane.jwt("another-host", "ratings")).await.unwrap();
        }
        renew(&session, token.as_deref().unwrap_or(&agent.token)).await;
        until(&plane, "disconnected", |all| {
            all.iter().any(|(name, stored)| {
                let lost = |live: &Live| matches!(live.connection, Connection::Disconnected { reason, .. } if reason == DisconnectReason::ConnectionLost);
                name.name.ends_with(subject) && live(&stored.state).is_some_and(lost)
            })
        })
        .await;
    }
}
