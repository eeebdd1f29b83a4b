//! Tokens of a real issuer, and of everybody who would like to be one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::{SignedDuration, Timestamp};
use jsonwebtoken::Algorithm;
use onboarding_attest::jwt::{Issuer, KeySource};
use onboarding_attest::{AttestError, Attestors, Context, Evidence, Options};
use onboarding_core::identity::{Attested, AttributeValue, Identity, Replay, Thumbprint};
use onboarding_testkit::oidc::{self, Mode, Oidc};
use onboarding_wire::onboarding::JwtCredential;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const UID: &str = "https://onboarding-endpoint.your-company.corp";

struct World {
    oidc: Oidc,
    attestors: Attestors,
    issuers: Vec<Issuer>,
}

impl World {
    async fn new(keys: fn(&Oidc) -> KeySource) -> Self {
        let oidc = oidc::start().await.unwrap();
        let attestors =
            Attestors::new(Options { extra_roots_pem: Some(oidc.ca.clone()), ..Options::default() }).unwrap();
        let issuer = Issuer {
            issuer: oidc.issuer.clone(),
            short_name: "my-corp".to_owned(),
            keys: keys(&oidc),
            attributes: Some("$.custom_attributes".to_owned()),
        };
        Self { oidc, attestors, issuers: vec![issuer] }
    }

    async fn inline() -> Self {
        Self::new(|oidc| KeySource::Inline(oidc.jwks().to_string())).await
    }

    async fn remote() -> Self {
        Self::new(|oidc| KeySource::Uri(oidc.jwks_uri())).await
    }

    async fn at(&self, token: &str, now: Timestamp) -> Result<Attested, AttestError> {
        let context =
            Context { plane_uid: UID, challenge: b"c", key: Thumbprint([7; 32]), now, issuers: &self.issuers };
        self.attestors.attest(&Evidence::Jwt(JwtCredential { token: token.to_owned() }), context).await
    }

    async fn attest(&self, token: &str) -> Result<Attested, AttestError> {
        self.at(token, Timestamp::now()).await
    }

    async fn refused(&self, token: &str) -> String {
        match self.attest(token).await {
            Err(AttestError::Refused(why)) => why,
            other => panic!("not refused: {other:?}"),
        }
    }

    async fn unavailable(&self, token: &str) -> String {
        match self.attest(token).await {
            Err(AttestError::Unavailable(why)) => why,
            other => panic!("not unavailable: {other:?}"),
        }
    }

    fn mint(&self, claims: Value) -> String {
        self.oidc.mint(Algorithm::ES256, claims).unwrap()
    }
}

/// Claims of a good token, changed by `changed` (null removes).
fn claims(changed: Value) -> Value {
    let now = Timestamp::now().as_second();
    let mut claims = json!({
        "sub": "us-east-datacenter1-vm007",
        "aud": UID,
        "iat": now,
        "exp": now + 600,
        "custom_attributes": {"region": "us-east", "instance_role": "app-ratings"},
    });
    for (name, value) in changed.as_object().unwrap() {
        match value {
            Value::Null => claims.as_object_mut().unwrap().remove(name),
            value => claims.as_object_mut().unwrap().insert(name.clone(), value.clone()),
        };
    }
    claims
}

fn encode(part: &Value) -> String {
    URL_SAFE_NO_PAD.encode(part.to_string())
}

/// The header of `token`, replaced by itself with members changed.
fn with_header(token: &str, changed: &Value) -> String {
    let (header, rest) = token.split_once('.').unwrap();
    let mut header: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(header).unwrap()).unwrap();
    for (name, value) in changed.as_object().unwrap() {
        match value {
            Value::Null => header.as_object_mut().unwrap().remove(name),
            value => header.as_object_mut().unwrap().insert(name.clone(), value.clone()),
        };
    }
    format!("{}.{rest}", encode(&header))
}

#[tokio::test]
async fn a_token_proves_issuer_subject_and_attributes() {
    for keys in [
        |oidc: &Oidc| KeySource::Inline(oidc.jwks().to_string()),
        |oidc: &Oidc| KeySource::Uri(oidc.jwks_uri()),
        |_: &Oidc| KeySource::Discovery,
    ] {
        let world = World::new(keys).await;
        for algorithm in [Algorithm::RS256, Algorithm::RS512, Algorithm::PS256, Algorithm::ES256, Algorithm::EdDSA] {
            let claims = claims(json!({}));
            let token = world.oidc.mint(algorithm, claims.clone()).unwrap();
            let attested = world.attest(&token).await.unwrap();
            assert_eq!(attested.issuer_short_name.as_deref(), Some("my-corp"));
            let expires = Timestamp::from_second(claims["exp"].as_i64().unwrap() + 60).unwrap();
            assert_eq!(attested.replay, Replay::Until(expires));
            let Identity::Jwt(identity) = attested.identity else { panic!("not a JWT's") };
            assert_eq!(identity.issuer.proven(), Some(&world.oidc.issuer));
            assert_eq!(identity.subject.proven().map(String::as_str), Some("us-east-datacenter1-vm007"));
            let role = identity.attributes["instance_role"].proven();
            assert_eq!(role, Some(&AttributeValue::One("app-ratings".to_owned())));
            assert_eq!(identity.attributes.len(), 2);
        }
    }
}

#[tokio::test]
async fn attributes_are_scalars_and_arrays_of_scalars_and_nothing_else() {
    let mut world = World::inline().await;
    let token = world.mint(claims(json!({
        "custom_attributes": {
            "text": "a", "number": 7, "real": 1.5, "yes": true, "many": ["a", 1, false], "none": [],
            "null": null, "object": {"a": "b"}, "mixed": ["a", {"b": "c"}], "nested": [["a"]],
        },
        "google": {"compute_engine": {"zone": "z1"}},
        "list": [{"a": "b"}],
    })));
    let found = async |world: &World| match world.attest(&token).await.unwrap().identity {
        Identity::Jwt(identity) => identity
            .attributes
            .into_iter()
            .map(|(name, fact)| (name, fact.proven().unwrap().clone()))
            .collect::<Vec<_>>(),
        _ => panic!("not a JWT's"),
    };
    let one = |name: &str, value: &str| (name.to_owned(), AttributeValue::One(value.to_owned()));
    let any = |name: &str, values: &[&str]| {
        (name.to_owned(), AttributeValue::Any(values.iter().map(|value| (*value).to_owned()).collect()))
    };
    assert_eq!(
        found(&world).await,
        [
            any("many", &["a", "1", "false"]),
            any("none", &[]),
            one("number", "7"),
            one("real", "1.5"),
            one("text", "a"),
            one("yes", "true"),
        ]
    );
    for (path, expected) in [
        (Some("$['google'].compute_engine"), vec![one("zone", "z1")]),
        // Not one object there: no attributes, and still a good token.
        (Some("$.missing"), vec![]),
        (Some("$.list"), vec![]),
        (Some("$.sub"), vec![]),
        (Some("$.google.*"), vec![one("zone", "z1")]),
        (Some("$..*"), vec![]),
        (None, vec![]),
    ] {
        world.issuers[0].attributes = path.map(str::to_owned);
        assert_eq!(found(&world).await, expected, "{path:?}");
    }
    world.issuers[0].attributes = Some("no path".to_owned());
    assert!(world.refused(&token).await.contains("isn't RFC 9535"));
}

#[tokio::test]
async fn each_claim_is_what_it_must_be() {
    let world = World::inline().await;
    let now = Timestamp::now().as_second();
    for (changed, problem) in [
        (
            json!({"iss": "https://evil.example"}),
            "the token's issuer \"https://evil.example\" isn't among the ControlPlane's issuers",
        ),
        (json!({"iss": format!("{}/", world.oidc.issuer)}), "isn't among the ControlPlane's issuers"),
        (json!({"iss": 7}), "the token's \"iss\" is missing"),
        (
            json!({"aud": "https://other.example"}),
            "the token's audience is \"https://other.example\" but must contain this plane's UID \"https://onboarding-endpoint.your-company.corp\": have the issuer put the UID into \"aud\"",
        ),
        (json!({"aud": ["a", "b"]}), "the token's audience is [\"a\",\"b\"] but must contain this plane's UID"),
        (json!({"aud": null}), "the token's audience is missing but must contain this plane's UID"),
        (json!({"aud": [UID, 7]}), "the token's \"aud\" is missing or isn't"),
        (json!({"aud": {"a": UID}}), "the token's \"aud\" is missing or isn't"),
        (json!({"exp": now - 61}), "the token expired at "),
        (json!({"exp": null}), "the token's \"exp\" is missing"),
        (json!({"exp": "tomorrow"}), "the token's \"exp\" is missing or isn't"),
        (json!({"exp": 1e300}), "the token's \"exp\" is missing or isn't"),
        (json!({"nbf": now + 90}), "the token's \"nbf\" says "),
        (json!({"iat": now + 90}), "the token's \"iat\" says "),
        (json!({"iat": "now"}), "the token's \"iat\" is missing or isn't"),
        (json!({"sub": null}), "the token's \"sub\" is missing"),
        (json!({"sub": ""}), "the token's \"sub\" is missing"),
        (json!({"sub": "a\nb"}), "the token's \"sub\" is missing or isn't"),
        (json!({"sub": "a".repeat(1025)}), "the token's \"sub\" is missing or isn't"),
        (json!({"filler": "a".repeat(16 * 1024)}), "more than the 16384 that are accepted"),
    ] {
        let why = world.refused(&world.mint(claims(changed))).await;
        assert!(why.contains(problem), "{problem}: {why}");
    }
    // Within the leeway, and the UID among others.
    for changed in [
        json!({"exp": now - 50}),
        json!({"exp": now as f64 + 10.5}),
        json!({"exp": 253_402_207_200_i64}),
        json!({"nbf": now + 50, "iat": now + 50}),
        json!({"iat": null}),
        json!({"aud": ["a", UID]}),
    ] {
        world.attest(&world.mint(claims(changed))).await.unwrap();
    }
}

#[tokio::test]
async fn a_message_is_a_line_whatever_the_token_says() {
    let world = World::inline().await;
    let long = format!("\n\u{1b}[31m\u{85}{}", "a".repeat(5000));
    let good = world.mint(claims(json!({})));
    for token in [
        world.mint(claims(json!({"iss": long}))),
        world.mint(claims(json!({"aud": long}))),
        with_header(&good, &json!({"kid": long})),
        with_header(&good, &json!({"alg": long})),
    ] {
        let why = world.refused(&token).await;
        assert!(why.len() < 800 && !why.contains(char::is_control), "{why:?}");
    }
}

#[tokio::test]
async fn a_token_ends_at_its_time() {
    let world = World::inline().await;
    let claims = claims(json!({}));
    let token = world.mint(claims.clone());
    let expires = Timestamp::from_second(claims["exp"].as_i64().unwrap()).unwrap();
    world.at(&token, expires + SignedDuration::from_secs(59)).await.unwrap();
    let error = world.at(&token, expires + SignedDuration::from_secs(60)).await.unwrap_err();
    assert!(error.to_string().starts_with("the token expired at "), "{error}");
}

#[tokio::test]
async fn no_algorithm_and_no_key_but_the_issuers_own_is_accepted() {
    let world = World::inline().await;
    let good = world.mint(claims(json!({})));
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let (header, payload) = signed.split_once('.').unwrap();

    let none = format!("{}.{payload}.", encode(&json!({"alg": "none", "typ": "JWT"})));
    assert!(world.refused(&none).await.contains("algorithm \"none\" isn't accepted"));
    let none = format!("{}.{payload}.", encode(&json!({"alg": "NoNe", "kid": "p256-0"})));
    assert!(world.refused(&none).await.contains("algorithm \"NoNe\" isn't accepted"));

    // HMAC with what everybody knows: the public key, in each form that a library might take it.
    let jwks = world.oidc.jwks();
    let rsa = jwks["keys"].as_array().unwrap().iter().find(|key| key["kty"] == "RSA").unwrap();
    for secret in [rsa["n"].as_str().unwrap().as_bytes().to_vec(), rsa.to_string().into_bytes()] {
        let signed = format!("{}.{payload}", encode(&json!({"alg": "HS256", "kid": rsa["kid"]})));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &secret), signed.as_bytes());
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag));
        assert!(world.refused(&token).await.contains("algorithm \"HS256\" isn't accepted"));
    }

    // Another issuer's key under the same name.
    let other = World::inline().await;
    let forged = other.mint(claims(json!({"iss": world.oidc.issuer})));
    assert!(world.refused(&forged).await.contains("the token's signature isn't that of issuer"));

    for (token, problem) in [
        (with_header(&good, &json!({"kid": "p256-9"})), "the token's key \"p256-9\" isn't among the keys of issuer"),
        (with_header(&good, &json!({"kid": null})), "the token's header names no key"),
        (with_header(&good, &json!({"kid": 7})), "its \"kid\" isn't a string"),
        (
            with_header(&good, &json!({"kid": "rsa-0"})),
            "the token's algorithm ES256 doesn't fit the issuer's key \"rsa-0\"",
        ),
        (with_header(&good, &json!({"alg": "ES384"})), "the token's algorithm ES384 doesn't fit"),
        (with_header(&good, &json!({"alg": "RS256", "kid": "rsa-0"})), "the token's signature isn't that of issuer"),
        (with_header(&good, &json!({"crit": ["exp"]})), "demands extensions"),
        // Keys that the token itself brings are not looked at.
        (
            with_header(&good, &json!({"jwk": rsa, "jku": "https://evil.example"})),
            "the token's signature isn't that of issuer",
        ),
        (
            format!("{header}.{}.{signature}", encode(&claims(json!({"iss": world.oidc.issuer, "sub": "other"})))),
            "the token's signature isn't",
        ),
        (format!("{signed}.{}", URL_SAFE_NO_PAD.encode([0; 64])), "the token's signature isn't"),
        (format!("{signed}."), "the token's signature isn't"),
        (signed.to_owned(), "it hasn't three parts"),
        (format!("{good}.x"), "it hasn't three parts"),
        (String::new(), "it hasn't three parts"),
        (format!("{header}.!.{signature}"), "its claims can't be decoded as base64url"),
        (format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode("[]")), "its claims: it isn't a JSON object"),
        (
            format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode(r#"{"sub":"a","sub":"b"}"#)),
            "its claims: a name occurs twice",
        ),
        (
            format!("{}.{payload}.{signature}", URL_SAFE_NO_PAD.encode(r#"{"alg":"ES256","alg":"none"}"#)),
            "its header: a name occurs twice",
        ),
    ] {
        let why = world.refused(&token).await;
        assert!(why.contains(problem), "{problem}: {why}");
    }
}

#[tokio::test]
async fn keys_that_are_not_for_signatures_verify_none() {
    let mut world = World::inline().await;
    let good = world.mint(claims(json!({})));
    let p256 = |change: fn(&mut Value)| {
        let mut jwks = world.oidc.jwks();
        let keys = jwks["keys"].as_array_mut().unwrap();
        keys.retain(|key| key["kid"] == "p256-0");
        change(&mut keys[0]);
        jwks.to_string()
    };
    let cases = [
        (p256(|_| {}), None),
        (p256(|key| key["use"] = json!("enc")), Some("isn't among the keys")),
        (p256(|key| key["key_ops"] = json!(["sign"])), Some("isn't among the keys")),
        (p256(|key| key["alg"] = json!("ES384")), Some("doesn't fit")),
        (p256(|key| key["kty"] = json!("XX")), Some("isn't among the keys")),
        (p256(|key| key["crv"] = json!("P-384")), Some("doesn't fit")),
        (p256(|key| key["x"] = json!("AAAA")), Some("signature isn't that of issuer")),
        (p256(|key| *key = json!({"kty": "oct", "kid": "p256-0", "k": "c2VjcmV0"})), Some("isn't among the keys")),
    ];
    for (jwks, problem) in cases {
        world.issuers[0].keys = KeySource::Inline(jwks.clone());
        match problem {
            None => drop(world.attest(&good).await.unwrap()),
            Some(problem) => {
                let why = world.refused(&good).await;
                assert!(why.contains(problem), "{jwks}: {problem}: {why}");
            }
        }
    }
    for broken in ["", "[]", "{}", r#"{"keys": [], "keys": []}"#] {
        world.issuers[0].keys = KeySource::Inline(broken.to_owned());
        let why = world.unavailable(&good).await;
        assert!(why.contains("the JWKS in the ControlPlane can't be used"), "{broken}: {why}");
    }
}

#[tokio::test]
async fn a_rotated_key_is_fetched_when_it_is_first_seen() {
    let world = World::remote().await;
    let old = world.mint(claims(json!({})));
    world.attest(&old).await.unwrap();
    assert_eq!(world.oidc.fetched(), 1);
    world.attest(&old).await.unwrap();
    assert_eq!(world.oidc.fetched(), 1);

    world.oidc.rotate().unwrap();
    let new = world.mint(claims(json!({})));
    world.attest(&new).await.unwrap();
    world.attest(&old).await.unwrap();
    assert_eq!(world.oidc.fetched(), 2);
}

#[tokio::test]
async fn a_flood_of_unknown_keys_asks_the_issuer_a_few_times() {
    let world = World::remote().await;
    let good = world.mint(claims(json!({})));
    world.attest(&good).await.unwrap();
    let started = std::time::Instant::now();
    for number in 0..200 {
        let token = with_header(&good, &json!({"kid": format!("flood-{number}")}));
        let error = world.attest(&token).await.unwrap_err();
        let why = error.to_string();
        assert!(
            matches!(error, AttestError::Refused(_)) && why.contains("isn't among the keys")
                || matches!(error, AttestError::Unavailable(_)) && why.contains("at most every 10 s"),
            "{why}"
        );
    }
    let (fetched, seconds) = (world.oidc.fetched(), started.elapsed().as_secs());
    assert!(fetched <= 3 + seconds / 10, "{fetched} in {seconds} s");
    // Who has a known key doesn't notice.
    world.attest(&good).await.unwrap();
}

#[tokio::test]
async fn many_at_once_fetch_once() {
    let world = World::remote().await;
    let token = world.mint(claims(json!({})));
    let mut all = Vec::new();
    for _ in 0..50 {
        all.push(world.attest(&token));
    }
    for outcome in futures_util::future::join_all(all).await {
        outcome.unwrap();
    }
    assert_eq!(world.oidc.fetched(), 1);
}

#[tokio::test]
async fn keys_stay_in_use_while_the_issuer_is_away_for_a_day() {
    let world = World::remote().await;
    let token = world.mint(claims(json!({"exp": Timestamp::now().as_second() + 200_000})));
    let now = Timestamp::now();
    world.at(&token, now).await.unwrap();
    world.oidc.set_mode(Mode::Fixed(500, String::new()));
    world.at(&token, now + SignedDuration::from_hours(23)).await.unwrap();
    assert_eq!(world.oidc.fetched(), 2);
    let error = world.at(&token, now + SignedDuration::from_hours(25)).await.unwrap_err();
    assert!(matches!(error, AttestError::Unavailable(_)), "{error}");
    assert!(error.to_string().ends_with("/jwks.json answered 500"), "{error}");
}

#[tokio::test]
async fn a_withdrawn_key_is_soon_no_key() {
    let world = World::remote().await;
    let token = world.mint(claims(json!({"exp": Timestamp::now().as_second() + 2000})));
    let now = Timestamp::now();
    world.at(&token, now).await.unwrap();
    world.oidc.rotate().unwrap();
    world.oidc.rotate().unwrap();
    world.at(&token, now + SignedDuration::from_secs(299)).await.unwrap();
    let error = world.at(&token, now + SignedDuration::from_secs(301)).await.unwrap_err();
    assert!(error.to_string().contains("isn't among the keys"), "{error}");
}

#[tokio::test]
async fn an_issuer_that_misbehaves_is_unavailable_and_says_how() {
    let elsewhere = oidc::start().await.unwrap();
    for (mode, problem) in [
        (Mode::Redirect(elsewhere.jwks_uri()), "answered with a redirect (302), which isn't followed"),
        (Mode::Fixed(404, "no".into()), "answered 404"),
        (Mode::Fixed(200, "x".repeat(300_000)), "answered with more than 262144 bytes"),
        (Mode::Fixed(200, "{\"keys\": 7}".into()), "has no JWKS: it has no \"keys\""),
        (Mode::Fixed(200, json!({"keys": vec![json!({}); 201]}).to_string()), "it has 201 keys"),
        (Mode::Fixed(200, "{\"keys\": []}".into()), "has no key that could be used"),
    ] {
        let world = World::remote().await;
        world.oidc.set_mode(mode.clone());
        let why = world.unavailable(&world.mint(claims(json!({})))).await;
        assert!(why.contains(problem), "{mode:?}: {why}");
    }
    assert_eq!(elsewhere.fetched(), 0);

    for (document, problem) in [
        (
            json!({"issuer": "https://evil.example", "jwks_uri": elsewhere.jwks_uri()}),
            "is of another issuer: \"https://evil.example\"",
        ),
        (json!({"jwks_uri": elsewhere.jwks_uri()}), "is of another issuer: nobody"),
        (json!({"issuer": "ISSUER", "jwks_uri": "http://localhost/jwks"}), "names no jwks_uri with https"),
        (json!({"issuer": "ISSUER"}), "names no jwks_uri with https"),
    ] {
        let world = World::new(|_| KeySource::Discovery).await;
        let document = serde_json::from_str(&document.to_string().replace("ISSUER", &world.oidc.issuer)).unwrap();
        world.oidc.set_mode(Mode::Discovery(document));
        let why = world.unavailable(&world.mint(claims(json!({})))).await;
        assert!(why.contains(problem), "{problem}: {why}");
    }
}

#[tokio::test]
async fn a_silent_issuer_is_waited_for_no_longer_than_five_seconds() {
    let world = World::remote().await;
    world.oidc.set_mode(Mode::Silent);
    let started = Instant::now();
    let why = world.unavailable(&world.mint(claims(json!({})))).await;
    assert!(why.contains("did not answer within 5 s"), "{why}");
    assert!(started.elapsed() < Duration::from_secs(8));
}

#[tokio::test]
async fn keys_come_over_verified_tls_or_not_at_all() {
    let mut world = World::remote().await;
    let token = world.mint(claims(json!({})));
    world.attestors = Attestors::new(Options::default()).unwrap();
    let why = world.unavailable(&token).await;
    assert!(why.contains("can't be asked") && why.contains("certificate"), "{why}");

    world.issuers[0].keys = KeySource::Uri(world.oidc.jwks_uri().replace("https://", "http://"));
    let why = world.unavailable(&token).await;
    assert!(why.contains("can't be asked: URL scheme is not allowed"), "{why}");
    assert_eq!(world.oidc.fetched(), 0);
}

#[tokio::test]
async fn a_change_of_the_issuer_takes_effect_at_once() {
    let mut world = World::remote().await;
    let token = world.mint(claims(json!({})));
    world.attest(&token).await.unwrap();
    let other = oidc::start().await.unwrap();
    world.issuers[0].keys = KeySource::Inline(other.jwks().to_string());
    assert!(world.refused(&token).await.contains("signature isn't that of issuer"));
    world.issuers[0].short_name = "renamed".to_owned();
    world.issuers[0].keys = KeySource::Uri(world.oidc.jwks_uri());
    assert_eq!(world.attest(&token).await.unwrap().issuer_short_name.as_deref(), Some("renamed"));
    world.issuers.clear();
    assert!(world.refused(&token).await.contains("isn't among the ControlPlane's issuers"));
}
