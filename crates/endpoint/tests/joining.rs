//! From a challenge to a session, and each way not to get there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use onboarding_core::registration::{Connection, State};
use onboarding_endpoint::limits::Limits;
use onboarding_wire::RETRY_PUSHBACK;
use onboarding_wire::onboarding as pb;
use onboarding_wire::proof::Purpose;
use std::num::NonZeroU32;
use std::time::Duration;
use support::*;
use tonic::Code;

#[tokio::test]
async fn a_join() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let authorized = agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    assert_eq!(authorized.registration, "bookinfo/ratings-jwt-my-corp--vm7");
    assert_eq!(agent.register().await.unwrap(), "bookinfo/ratings-jwt-my-corp--vm7");
    let mut session = agent.session().await.unwrap();
    assert_eq!(session.boot().await.version, "1");
    until(&plane, "connected", |all| {
        matches!(&all[0].1.state, State::Live(live) if matches!(&live.connection, Connection::Connected { replica, .. } if replica == "plane-0"))
    })
    .await;

    let lines = plane.audit.read();
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["decision"], "allowed");
    assert_eq!(lines[0]["policy"], "allow-our-vms");
    assert_eq!(lines[0]["rule"], 0);
    assert_eq!(lines[0]["registration"], "bookinfo/ratings-jwt-my-corp--vm7");
    assert_eq!(lines[0]["identity"]["jwt"]["subject"], "vm7");

    // The claims of the reference, section 7.
    let payload = agent.token.split('.').nth(1).unwrap();
    let claims: serde_json::Value = serde_json::from_slice(
        &base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, payload).unwrap(),
    )
    .unwrap();
    for name in ["iss", "azp", "aud"] {
        assert_eq!(claims[name], UID, "{name}");
    }
    assert_eq!(claims["sub"], "bookinfo/ratings-jwt-my-corp--vm7");
    assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 3600);
    assert_eq!(claims["jti"], lines[0]["tokenId"]);
    assert_eq!(claims["claims"]["workload"]["jwt"]["subject"], "vm7");
    assert_eq!(claims["claims"]["workload_group"], serde_json::json!({"namespace": "bookinfo", "name": "ratings"}));

    assert_eq!(agent.unregister().await.unwrap().propagation_delay.unwrap().seconds, 10);
    assert_eq!(session.end().await.reason(), pb::session_end::Reason::Unregistered);
    // Again, as an agent does that lost the answer.
    agent.unregister().await.unwrap();
    plane.stop().await;
}

#[tokio::test]
async fn the_same_registration_again_is_the_same_answer() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    let first = agent.register().await.unwrap();
    let stored = plane_versions(&plane).await;
    assert_eq!(agent.register().await.unwrap(), first);
    assert_eq!(plane_versions(&plane).await, stored, "nothing was stored the second time");
}

async fn plane_versions(plane: &Plane) -> Vec<u64> {
    let all = onboarding_endpoint::backend::Registry::list(plane.registry.as_ref()).await.unwrap();
    all.into_iter().map(|(_, stored)| stored.version).collect()
}

#[tokio::test]
async fn a_challenge_serves_once() {
    let plane = Plane::start().await;
    let agent = plane.agent().await;
    let request = agent.request(&plane.jwt("vm7", "ratings")).await;
    agent.authorize_with(request.clone()).await.unwrap();
    assert_refused(agent.authorize_with(request).await, Code::FailedPrecondition, "call Discover first");
}

#[tokio::test]
async fn a_captured_authorization_is_worth_nothing_on_another_connection() {
    let plane = Plane::start().await;
    let captured = plane.agent().await.request(&plane.jwt("vm7", "ratings")).await;
    let thief = plane.agent().await;
    assert_refused(thief.authorize_with(captured.clone()).await, Code::FailedPrecondition, "no challenge");
    thief.discover().await;
    assert_refused(thief.authorize_with(captured).await, Code::Unauthenticated, "signature does not fit");
}

#[tokio::test]
async fn a_proof_fits_one_key_one_group_one_evidence_and_one_purpose() {
    let plane = Plane::start().await;
    let agent = plane.agent().await;
    let jwt = plane.jwt("vm7", "ratings");

    let mut another_key = agent.request(&jwt).await;
    another_key.proof.as_mut().unwrap().public_key = Key::new().public;
    assert_refused(agent.authorize_with(another_key).await, Code::Unauthenticated, "signature does not fit");

    let mut another_group = agent.request(&jwt).await;
    another_group.workload_group.as_mut().unwrap().name = "details".to_owned();
    assert_refused(agent.authorize_with(another_group).await, Code::Unauthenticated, "signature does not fit");

    let mut another_evidence = agent.request(&jwt).await;
    another_evidence.credential = agent.request(&plane.jwt("vm8", "ratings")).await.credential;
    assert_refused(agent.authorize_with(another_evidence).await, Code::Unauthenticated, "signature does not fit");

    let mut another_purpose = agent.request(&jwt).await;
    let discovered = agent.discover().await;
    another_purpose.proof = Some(agent.key.proof(UID, &discovered.challenge, Purpose::UseToken { token: "x" }));
    assert_refused(agent.authorize_with(another_purpose).await, Code::Unauthenticated, "signature does not fit");

    let mut no_proof = agent.request(&jwt).await;
    no_proof.proof = None;
    assert_refused(agent.authorize_with(no_proof).await, Code::Unauthenticated, "proof of the agent's key is missing");

    let mut no_point = agent.request(&jwt).await;
    no_point.proof.as_mut().unwrap().public_key[60] ^= 1;
    assert_refused(agent.authorize_with(no_point).await, Code::Unauthenticated, "");

    let mut long = agent.request(&jwt).await;
    long.proof.as_mut().unwrap().public_key.resize(4000, 0);
    assert_refused(agent.authorize_with(long).await, Code::Unauthenticated, "no P-256 SubjectPublicKeyInfo");
}

#[tokio::test]
async fn what_is_missing_or_unknown_is_named() {
    let plane = Plane::start().await;
    let agent = plane.agent().await;
    let jwt = plane.jwt("vm7", "ratings");
    let mut no_group = agent.request(&jwt).await;
    no_group.workload_group = None;
    assert_refused(agent.authorize_with(no_group).await, Code::InvalidArgument, "workload_group: is missing");
    let mut no_credential = agent.request(&jwt).await;
    no_credential.credential = None;
    assert_refused(agent.authorize_with(no_credential).await, Code::InvalidArgument, "credential");
    let mut unknown = agent.request(&jwt).await;
    unknown.credential.as_mut().unwrap().type_url = "type.googleapis.com/other".to_owned();
    assert_refused(agent.authorize_with(unknown).await, Code::InvalidArgument, "type.googleapis.com/other");
}

#[tokio::test]
async fn a_refusal_says_which_rule_failed_on_what() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let refused = agent.authorize(&plane.jwt("vm7", "details")).await;
    let status = assert_refused(refused, Code::PermissionDenied, "Not authorized by OnboardingPolicy");
    let why = "policy allow-our-vms: spec.allow[0].workloads[0].jwt.attributes[0]: is \"details\", wanted the attribute \"role\" to be \"ratings\"";
    assert!(status.message().contains(why), "{}", status.message());
    let lines = plane.audit.read();
    assert_eq!(lines[0]["decision"], "refused");
    assert!(lines[0]["reasons"][0].as_str().unwrap().contains("jwt.attributes[0]"), "{}", lines[0]);

    plane.withdraw_policies();
    let refused = agent.authorize(&plane.jwt("vm7", "ratings")).await;
    assert_refused(refused, Code::PermissionDenied, "there is no OnboardingPolicy in namespace bookinfo");

    plane.change(|snapshot| snapshot.groups.clear());
    let refused = agent.authorize(&plane.jwt("vm7", "ratings")).await;
    assert_refused(refused, Code::PermissionDenied, "there is no WorkloadGroup bookinfo/ratings");

    plane.change(|snapshot| snapshot.plane = None);
    let refused = agent.authorize_with(pb::AuthorizeOnboardingRequest {
        workload_group: Some(pb::WorkloadGroupRef { namespace: "a".to_owned(), name: "b".to_owned() }),
        ..Default::default()
    });
    assert_refused(refused.await, Code::Unavailable, "no valid ControlPlane");
}

#[tokio::test]
async fn evidence_that_proves_nothing_is_refused_with_the_attestors_words_and_written_down() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let now = jiff::Timestamp::now().as_second();
    let mint = |changed: serde_json::Value| {
        let mut claims = serde_json::json!({
            "sub": "vm7", "aud": UID, "iat": now, "exp": now + 600, "custom_attributes": { "role": "ratings" },
        });
        claims.as_object_mut().unwrap().extend(changed.as_object().unwrap().clone());
        plane.oidc.mint(jsonwebtoken::Algorithm::ES256, claims).unwrap()
    };
    let good = mint(serde_json::json!({}));
    agent.authorize(&good).await.unwrap();
    let payload = good.split('.').nth(1).unwrap();
    let header = base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, r#"{"alg":"none"}"#);
    let cases = [
        (format!("{header}.{payload}."), "algorithm \"none\" isn't accepted"),
        (mint(serde_json::json!({ "exp": now - 61 })), "the token expired at "),
        (mint(serde_json::json!({ "nbf": now + 90 })), "the token's \"nbf\" says "),
        (
            mint(serde_json::json!({ "aud": "another" })),
            "the token's audience is \"another\" but must contain this plane's UID \"https://onboarding-endpoint.your-company.corp\"",
        ),
    ];
    for (token, words) in &cases {
        assert_refused(agent.authorize(token).await, Code::Unauthenticated, words);
    }
    let lines = plane.audit.read();
    assert_eq!(lines.len(), 1 + cases.len());
    for (line, (_, words)) in lines[1..].iter().zip(&cases) {
        assert_eq!(line["decision"], "refused");
        assert!(line["reasons"][0].as_str().unwrap().contains(words), "{line}");
        // Nothing was proven of the host; the key was.
        assert!(line["identity"].is_null() && line["agentKey"].is_string(), "{line}");
    }
}

#[tokio::test]
async fn a_token_is_bound_to_its_key() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    agent.join(&plane.jwt("vm7", "ratings")).await.unwrap();

    // The same key on a new connection proves itself anew.
    let mut again = plane.agent_with(agent.key.clone()).await;
    again.token = agent.token.clone();
    assert_refused(again.session().await.map(|_| ()), Code::FailedPrecondition, "call Discover first");
    let proof = again.token_proof().await;
    let mut session = again.session_with(Some(proof)).await.unwrap();
    session.boot().await;

    // Another key, proven, is not the token's.
    let mut thief = plane.agent().await;
    thief.token = agent.token.clone();
    let proof = thief.token_proof().await;
    assert_refused(thief.session_with(Some(proof)).await.map(|_| ()), Code::Unauthenticated, "another key");
    assert_refused(thief.register().await, Code::Unauthenticated, "another key");
    assert_refused(thief.unregister().await, Code::Unauthenticated, "another key");
}

#[tokio::test]
async fn tokens_that_are_not_ours() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    let good = agent.token.clone();
    for (token, words) in [
        ("", "it is no JWT"),
        ("a.b.c", "it is no JWT"),
        (&good[..good.len() - 6], "signature is wrong"),
        (&plane.jwt("vm7", "ratings"), "a key that isn't ours"),
    ] {
        agent.token = token.to_owned();
        assert_refused(agent.register().await, Code::Unauthenticated, words);
    }
    agent.token = good;
    agent.register().await.unwrap();
}

#[tokio::test]
async fn another_plane_uid_makes_tokens_worthless() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    plane.change(|snapshot| {
        let mut settings = snapshot.plane.as_deref().unwrap().clone();
        settings.uid = "another".to_owned();
        snapshot.plane = Some(std::sync::Arc::new(settings));
    });
    assert_refused(agent.register().await, Code::Unauthenticated, "this is \"another\"");
    let refused = agent.authorize_with(agent.request(&plane.jwt("vm7", "ratings")).await).await;
    let status = assert_refused(refused, Code::Unauthenticated, "another");
    assert!(status.message().contains(UID), "both values: {}", status.message());
}

#[tokio::test]
async fn two_keys_race_for_one_identity_and_one_wins() {
    let plane = Plane::start().await;
    let mut agents = [plane.agent().await, plane.agent().await];
    for agent in &mut agents {
        agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    }
    let outcomes = tokio::join!(agents[0].register(), agents[1].register());
    let (won, lost) = match outcomes {
        (Ok(name), Err(status)) | (Err(status), Ok(name)) => (name, status),
        both => panic!("{both:?}"),
    };
    assert_eq!(won, "bookinfo/ratings-jwt-my-corp--vm7");
    assert_refused(Err::<(), _>(lost), Code::FailedPrecondition, "delete the registration");
    // Early as well as late.
    let mut third = plane.agent().await;
    assert_refused(third.authorize(&plane.jwt("vm7", "ratings")).await, Code::FailedPrecondition, "another key");
}

#[tokio::test]
async fn nothing_is_allowed_that_can_not_be_written_down() {
    let plane = Plane::start().await;
    plane.audit.break_down();
    let mut agent = plane.agent().await;
    assert_refused(agent.authorize(&plane.jwt("vm7", "ratings")).await, Code::Unavailable, "audit log");
}

#[tokio::test]
async fn a_registry_that_can_not_be_written_acknowledges_nothing() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    plane.registry.broken.store(true, std::sync::atomic::Ordering::SeqCst);
    assert_refused(agent.register().await, Code::Unavailable, "no space left on device");
    assert_refused(agent.session().await.map(|_| ()), Code::NotFound, "registration is gone");
    // That it can be read doesn't make it ready again; that it was written does.
    let reasons = plane.readiness.reasons();
    assert_eq!(reasons, ["registry: the registry is unavailable: no space left on device"]);
    plane.registry.broken.store(false, std::sync::atomic::Ordering::SeqCst);
    agent.register().await.unwrap();
    assert_eq!(plane.readiness.reasons(), Vec::<String>::new());
}

#[tokio::test]
async fn a_host_that_has_no_address_to_give_is_told_so() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    assert_refused(agent.register_at("10.0.0", None).await, Code::InvalidArgument, "not an IP address");
}

#[tokio::test]
async fn too_many_authorizations_are_sent_away_with_a_delay() {
    let limits = Limits {
        authorization_burst: NonZeroU32::new(2).unwrap(),
        authorizations_per_second: NonZeroU32::MIN,
        ..Limits::default()
    };
    let plane = Plane::start_with(Duration::from_secs(300), limits).await;
    let mut agent = plane.agent().await;
    for _ in 0..2 {
        agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    }
    // A second may have passed on a busy machine, and one more is allowed then.
    let mut refused = Ok(());
    for _ in 0..50 {
        refused = agent.authorize(&plane.jwt("vm7", "ratings")).await.map(|_| ());
        if refused.is_err() {
            break;
        }
    }
    let status = assert_refused(refused, Code::ResourceExhausted, "too many authorizations");
    let wait: u64 = status.metadata().get(RETRY_PUSHBACK).unwrap().to_str().unwrap().parse().unwrap();
    assert!((100..=1000).contains(&wait), "{wait}");
}

/// Behind a gateway all have its address: one that asks in a loop is told to wait, and the others aren't.
#[tokio::test]
async fn one_connection_does_not_use_up_what_its_address_may() {
    let limits = Limits { authorizations_per_connection: 2, ..Limits::default() };
    let plane = Plane::start_with(Duration::from_secs(300), limits).await;
    let mut looping = plane.agent().await;
    for _ in 0..2 {
        looping.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    }
    let refused = looping.authorize(&plane.jwt("vm7", "ratings")).await;
    let status = assert_refused(refused, Code::ResourceExhausted, "too many authorizations on this connection");
    let wait: u64 = status.metadata().get(RETRY_PUSHBACK).unwrap().to_str().unwrap().parse().unwrap();
    assert!((1000..=60_000).contains(&wait), "{wait}");
    plane.agent().await.authorize(&plane.jwt("vm8", "ratings")).await.unwrap();
    plane.stop().await;
}

#[tokio::test]
async fn a_workload_without_a_boot_configuration_is_told_and_its_operators_are() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    let mut session = agent.join(&plane.jwt(WITHOUT_MESH, "ratings")).await.unwrap();
    match session.hear.message().await.unwrap().unwrap().message {
        Some(pb::plane_message::Message::BootRefused(refused)) => assert_eq!(refused.message, NO_MESH),
        other => panic!("{other:?}"),
    }
    let told = plane.told.all();
    assert_eq!((told.len(), told[0].reason, &told[0].group), (1, "NoBootConfiguration", &group()));
    assert!(told[0].message.starts_with(NO_MESH), "{}", told[0].message);
    // On the same session, once it is put right.
    assert_eq!(session.boot().await.version, "1");
    plane.stop().await;
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused() {
    let plane = Plane::start().await;
    let agent = plane.agent().await;
    let mut request = agent.request(&plane.jwt("vm7", "ratings")).await;
    request.credential.as_mut().unwrap().value = vec![0; 100 * 1024];
    assert_refused(agent.authorize_with(request).await, Code::OutOfRange, "too large");
}
