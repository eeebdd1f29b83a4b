//! `onboardctl attest`: evidence made as AWS and an issuer make it, and changed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod tool;

use jiff::Timestamp;
use jsonwebtoken::Algorithm;
use onboarding_testkit::cms::RegionKey;
use onboarding_testkit::imds::Instance;
use onboarding_testkit::oidc::{self, Oidc};
use serde_json::{Value, json};
use tool::{Dir, GROUP, NARROW, control_plane};

const UID: &str = "https://onboarding-endpoint.your-company.corp";

fn content() -> String {
    Instance {
        account: "123456789012".to_owned(),
        region: "us-east-2".to_owned(),
        zone: "us-east-2b".to_owned(),
        instance_id: "i-1234567890abcdef0".to_owned(),
        role: None,
        private_ip: "10.0.0.1".to_owned(),
    }
    .document()
}

/// A document, and the certificate to verify it with.
fn document() -> Dir {
    let key = RegionKey::generate("us-east-2").unwrap();
    let document = key.document(content().as_bytes()).unwrap();
    Dir::with(&[("document.txt", &document), ("region.pem", &key.pinned())])
}

#[test]
fn a_document_proves_the_instance() {
    let dir = document();
    let arguments = ["attest", "document.txt", "--aws-extra-certificates", "region.pem"];
    let ended = dir.run(&[&arguments[..], &["-o", "json"]].concat()).is(0);
    assert_eq!(
        ended.json(),
        json!({ "aws": {
            "partition": "aws",
            "account": "123456789012",
            "region": "us-east-2",
            "zone": "us-east-2b",
            "ec2": { "instanceId": "i-1234567890abcdef0" },
        }})
    );
    // What is said to people is what `explain` reads.
    let text = dir.run(&arguments).is(0).says("# Whoever has a copy can present it for ever").stdout;
    assert!(text.starts_with("# Not proven: aws.ec2.iamRole, "), "{text}");
    dir.write("m/group.yaml", GROUP);
    dir.write("m/policy.yaml", NARROW);
    let explain = ["explain", "-f", "m", "--identity", "-", "--group", "bookinfo/ratings"];
    dir.run_with(&explain, &text, &[]).is(2).says("aws.ec2.iamRoleNames: nothing was proven");
    dir.write("m/policy.yaml", NARROW.replace("ec2:\n          iamRoleNames:\n          - ratings-role", "ec2: {}"));
    dir.run_with(&explain, &text, &[]).is(0);
}

#[test]
fn a_document_that_proves_nothing_says_why() {
    let dir = document();
    let refused = |why| {
        dir.run(&["attest", "document.txt", "--aws-extra-certificates", "region.pem", "-o", "json"])
            .is(1)
            .silent()
            .complains("onboardctl: document.txt proves nothing: ")
            .complains(why)
    };
    dir.run(&["attest", "document.txt"]).is(1).silent().complains("isn't the one pinned for that region");

    let document = std::fs::read_to_string(dir.path("document.txt")).unwrap();
    let truncated: String = document.split_whitespace().collect();
    dir.write("document.txt", &truncated[..400]);
    refused("isn't CMS SignedData");
    dir.write("document.txt", format!("-----BEGIN PKCS7-----\n{document}\n-----END PKCS7-----\n"));
    refused("without PEM lines");
    dir.write("document.txt", "");
    refused("is empty");
    let forger = RegionKey::generate("us-east-2").unwrap();
    dir.write("document.txt", forger.document(content().as_bytes()).unwrap());
    refused("region us-east-2");

    dir.run(&["attest", "nowhere"]).is(1).silent().complains("reading nowhere: No such file");
    dir.run(&["attest", "document.txt", "--aws-extra-certificates", "document.txt"]).is(1).silent();
    dir.run(&["attest"]).is(1).silent().complains("Usage:");
}

/// An issuer whose keys are in the ControlPlane `plane.yaml`.
async fn issuer() -> (Oidc, Dir) {
    let oidc = oidc::start().await.unwrap();
    let dir = Dir::with(&[("plane.yaml", &plane(&oidc, &format!("      uid: {UID}\n")))]);
    (oidc, dir)
}

fn plane(oidc: &Oidc, uid: &str) -> String {
    let issuer = json!([{
        "issuer": oidc.issuer,
        "shortName": "my-corp",
        "jwks": oidc.jwks().to_string(),
        "tokenFields": { "attributes": { "jsonPath": ".custom_attributes" } },
    }]);
    control_plane(uid, &issuer.to_string())
}

fn claims() -> Value {
    let now = Timestamp::now().as_second();
    json!({
        "sub": "us-east-datacenter1-vm007",
        "aud": UID,
        "iat": now,
        "exp": now + 600,
        "custom_attributes": { "region": "us-east", "roles": ["a", "b"] },
    })
}

#[tokio::test]
async fn a_token_proves_its_subject_and_attributes() {
    let (oidc, dir) = issuer().await;
    dir.write("token", oidc.mint(Algorithm::ES256, claims()).unwrap() + "\n");
    let arguments = ["attest", "token", "--jwt-issuers", "plane.yaml"];
    let wanted = json!({ "jwt": {
        "issuer": oidc.issuer,
        "subject": "us-east-datacenter1-vm007",
        "attributes": { "region": "us-east", "roles": ["a", "b"] },
    }});
    assert_eq!(dir.run(&[&arguments[..], &["-o", "json"]].concat()).is(0).json(), wanted);
    let text = dir.run(&arguments).is(0).says("# Whoever has a copy can present it until ").stdout;
    assert_eq!(serde_yaml_ng::from_str::<Value>(&text).unwrap(), wanted);
    assert!(text.starts_with("# Not proven: which host presents this.\n"), "{text}");
    let mut plain = claims();
    plain.as_object_mut().unwrap().remove("custom_attributes");
    dir.write("plain", oidc.mint(Algorithm::ES256, plain).unwrap());
    dir.run(&["attest", "plain", "--jwt-issuers", "plane.yaml"])
        .is(0)
        .says("# Not proven: which host presents this; jwt.attributes, as there are none");

    // The plane made its UID itself.
    dir.write("plane.yaml", plane(&oidc, ""));
    let ended = dir.run(&[&arguments[..], &["-o", "json"]].concat()).is(0);
    assert_eq!(ended.json(), wanted);
    let unchecked = format!("warning: whether this token is for this plane isn't checked: it is for {UID:?}");
    ended.complains(&unchecked).complains("--audience");
    let ended = dir.run(&[&arguments[..], &["--audience", UID]].concat()).is(0);
    assert_eq!(ended.stderr, "");
    dir.run(&[&arguments[..], &["--audience", "another"]].concat()).is(1).silent().complains("\"another\"");
    // Nothing else is passed over.
    for (field, value, why) in [
        ("aud", Value::Null, "it has no \"aud\""),
        ("aud", json!([UID, 7]), "\"aud\""),
        ("exp", json!(1000), "the token expired at"),
    ] {
        let mut changed = claims();
        changed[field] = value;
        dir.write("changed", oidc.mint(Algorithm::ES256, changed).unwrap());
        dir.run(&["attest", "changed", "--jwt-issuers", "plane.yaml"]).is(1).silent().complains(why);
    }
}

#[tokio::test]
async fn a_token_that_proves_nothing_says_why() {
    let (oidc, dir) = issuer().await;
    let refused = |change: &dyn Fn(&mut Value), why: &[&str]| {
        let mut claims = claims();
        change(&mut claims);
        dir.write("token", oidc.mint(Algorithm::ES256, claims).unwrap());
        let ended = dir.run(&["attest", "token", "--jwt-issuers", "plane.yaml"]).is(1).silent();
        why.iter().fold(ended, |ended, why| ended.complains(why));
        // Nobody finds a credential in a terminal's history.
        let token = std::fs::read_to_string(dir.path("token")).unwrap();
        let ended = dir.run(&["attest", "token", "--jwt-issuers", "plane.yaml"]);
        assert!(!ended.stderr.contains(token.rsplit('.').next().unwrap()), "{ended:?}");
    };
    refused(&|claims| claims["aud"] = json!("another"), &["\"another\"", UID]);
    refused(&|claims| claims["exp"] = json!(1000), &["the token expired at 1970-01-01T00:16:40Z"]);
    refused(&|claims| claims["iss"] = json!("https://elsewhere"), &["isn't among the ControlPlane's issuers"]);
    refused(&|claims| claims["sub"] = json!(7), &["\"sub\""]);

    let good = oidc.mint(Algorithm::ES256, claims()).unwrap();
    let other = oidc.mint(Algorithm::ES256, json!({ "aud": UID })).unwrap();
    let (content, _) = good.rsplit_once('.').unwrap();
    dir.write("token", format!("{content}.{}", other.rsplit('.').next().unwrap()));
    dir.run(&["attest", "token", "--jwt-issuers", "plane.yaml"]).is(1).complains("signature isn't that of issuer");
}

#[tokio::test]
async fn a_token_needs_a_control_plane_that_can_be_read() {
    let (oidc, dir) = issuer().await;
    dir.write("token", oidc.mint(Algorithm::ES256, claims()).unwrap());
    let refused = |manifest: &str, why: &str| {
        dir.write("other.yaml", manifest);
        dir.run(&["attest", "token", "--jwt-issuers", "other.yaml"]).is(1).silent().complains(why);
    };
    dir.run(&["attest", "token"]).is(1).silent().complains("--jwt-issuers");
    refused(GROUP, "other.yaml: no ControlPlane with spec.meshExpansion.onboarding in it");
    refused("kind: [", "other.yaml:1");
    refused(&plane(&oidc, "      uidd: x\n"), "spec.meshExpansion.onboarding.uidd: is unknown here");
    let uid = format!("      uid: {UID}\n");
    let two = format!("{}---\n{}", plane(&oidc, &uid), plane(&oidc, &uid).replace("name: controlplane", "name: other"));
    refused(&two, "another ControlPlane enables onboarding");
}
