//! Whoever is refused after it was authorized: who is told, and what is written down.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use onboarding_attest::jwt::KeySource;
use onboarding_endpoint::backend::PlaneSettings;
use onboarding_endpoint::limits::Limits;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use support::*;
use tonic::Code;

/// The newest refusal, as operators are told of it and as the audit log has it.
fn last(plane: &Plane) -> (&'static str, String) {
    let told = plane.told.all().pop().unwrap();
    let line = plane.audit.read().pop().unwrap();
    assert_eq!(line["decision"], "refused", "{line}");
    assert_eq!(line["workloadGroup"], "bookinfo/ratings");
    assert_eq!(line["reasons"].as_array().unwrap().len(), 1, "{line}");
    assert!(told.message.contains(line["reasons"][0].as_str().unwrap()), "{told:?} {line}");
    assert_eq!(told.group, group());
    if told.reason != "AttestationUnavailable" {
        assert_eq!(line["registration"], "bookinfo/ratings-jwt-my-corp--vm7");
        assert_eq!(line["identity"]["jwt"]["subject"], "vm7");
        assert!(line["agentKey"].is_string() && line["peer"] == "127.0.0.1", "{line}");
        assert!(told.identity.as_ref().unwrap().contains("\"subject\":\"vm7\""), "{told:?}");
    }
    (told.reason, told.message)
}

#[tokio::test]
async fn a_registration_that_is_refused_is_told_and_written_down() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    assert_refused(agent.register_at("127.0.0.1", None).await, Code::InvalidArgument, "can't be reached");
    let (reason, message) = last(&plane);
    assert!(
        reason == "RegistrationRefused" && message.contains("127.0.0.1 can't be reached by another host"),
        "{message}"
    );

    let labels = HashMap::from([("security.istio.io/tlsMode".to_owned(), "disabled".to_owned())]);
    let refused = agent.register_as("10.0.0.4", labels, None).await;
    assert_refused(refused, Code::InvalidArgument, "for the mesh to decide by");
    let (reason, message) = last(&plane);
    assert!(
        reason == "RegistrationRefused" && message.contains("spec.template.labels of the WorkloadGroup"),
        "{message}"
    );

    // Two came at once, and the other one was first.
    let mut other = plane.agent().await;
    other.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    other.register().await.unwrap();
    assert_refused(agent.register().await, Code::FailedPrecondition, "with another key");
    let (reason, message) = last(&plane);
    assert!(reason == "RegistrationBelongsToAnother" && message.contains("kubectl delete war"), "{message}");
    let told = plane.told.all().len();
    assert_refused(agent.session().await.map(|_| ()), Code::FailedPrecondition, "with another key");
    assert_eq!((last(&plane).0, plane.told.all().len()), ("RegistrationBelongsToAnother", told + 1));

    plane.withdraw_policies();
    assert_refused(agent.register().await, Code::PermissionDenied, "Not authorized by OnboardingPolicy");
    let (reason, message) = last(&plane);
    assert!(
        reason == "NotAuthorized" && message.contains("there is no OnboardingPolicy in namespace bookinfo"),
        "{message}"
    );
    let told = plane.told.all().len();
    assert_refused(other.session().await.map(|_| ()), Code::PermissionDenied, "Not authorized by OnboardingPolicy");
    assert_eq!((last(&plane).0, plane.told.all().len()), ("NotAuthorized", told + 1));
    plane.stop().await;
}

/// What an agent gets over by onboarding again needs nobody.
#[tokio::test]
async fn a_registration_that_is_gone_bothers_nobody() {
    let plane = Plane::start().await;
    let mut agent = plane.agent().await;
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    assert_refused(agent.session().await.map(|_| ()), Code::NotFound, "onboard again");
    assert_eq!((plane.told.all().len(), plane.decisions()), (0, vec!["allowed".into()]));
    plane.stop().await;
}

#[tokio::test]
async fn one_that_is_refused_in_a_loop_fills_no_log() {
    let limits = Limits { authorizations_per_connection: 3, ..Limits::default() };
    let plane = Plane::start_with(Duration::from_secs(300), limits).await;
    let mut agent = plane.agent().await;
    agent.authorize(&plane.jwt("vm7", "ratings")).await.unwrap();
    for _ in 0..20 {
        assert_refused(agent.register_at("127.0.0.1", None).await, Code::InvalidArgument, "can't be reached");
    }
    assert_eq!((plane.told.all().len(), plane.decisions().len()), (2, 3));
    plane.stop().await;
}

#[tokio::test]
async fn an_issuer_that_does_not_answer_is_told_of() {
    let plane = Plane::start().await;
    plane.change(|snapshot| {
        let mut settings = PlaneSettings::clone(snapshot.plane.as_ref().unwrap());
        // A port on which nobody listens.
        settings.issuers[0].keys = KeySource::Uri("https://127.0.0.1:1/keys".to_owned());
        snapshot.plane = Some(Arc::new(settings));
    });
    let mut agent = plane.agent().await;
    let refused = agent.authorize(&plane.jwt("vm7", "ratings")).await;
    assert_refused(refused, Code::Unavailable, "127.0.0.1:1");
    let (reason, message) = last(&plane);
    assert!(reason == "AttestationUnavailable" && message.contains("https://127.0.0.1:1/keys"), "{message}");
    assert_eq!(plane.told.all()[0].identity, None, "nothing was proven");
    plane.stop().await;
}
