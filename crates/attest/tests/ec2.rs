//! An EC2 instance attests itself: papers from the metadata emulator, requests signed by AWS's own library, an STS that verifies them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod signing;

use jiff::{SignedDuration, Timestamp};
use onboarding_attest::aws::sts::Request;
use onboarding_attest::{AttestError, Attestors, Context, Evidence, Options};
use onboarding_core::identity::{Attested, AwsCompute, AwsIdentity, Identity, Replay, Thumbprint};
use onboarding_testkit::cms::RegionKey;
use onboarding_testkit::imds::{Config, Instance};
use onboarding_testkit::sts::{self, Cloud, Credentials, Mode, Sts};
use onboarding_wire::onboarding::{AwsEc2Credential, SignedCallerIdentity};
use onboarding_wire::proof::STS_BINDING_HEADER;
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};

const REGION: &str = "us-east-2";
const ACCOUNT: &str = "123456789012";
const INSTANCE: &str = "i-1234567890abcdef0";
const UID: &str = "https://onboarding-endpoint.your-company.corp";
const CHALLENGE: &[u8] = b"challenge of this connection";
const KEY: Thumbprint = Thumbprint([7; 32]);

/// RSA keys take their time.
static REGION_KEY: LazyLock<RegionKey> = LazyLock::new(|| RegionKey::generate(REGION).unwrap());

struct World {
    sts: Sts,
    cloud: Cloud,
    imds: Config,
    attestors: Attestors,
}

impl World {
    async fn new() -> Self {
        let cloud = Cloud::generate().unwrap();
        let sts = sts::start(cloud.clone()).await.unwrap();
        let imds = Config::new(&instance(INSTANCE), &REGION_KEY, &cloud).unwrap();
        let attestors = Attestors::new(Options {
            extra_aws_certificates: Some(REGION_KEY.pinned()),
            sts_endpoint: Some(sts.url()),
            extra_roots_pem: None,
        })
        .unwrap();
        Self { sts, cloud, imds, attestors }
    }

    fn instance_credentials(&self) -> &Credentials {
        self.imds.instance_credentials.as_ref().unwrap()
    }

    fn role_credentials(&self) -> &Credentials {
        &self.imds.role.as_ref().unwrap().credentials
    }

    /// Everything that the instance has, for the context of [`context`].
    fn evidence(&self) -> AwsEc2Credential {
        AwsEc2Credential {
            identity_document: self.imds.signed_document.clone(),
            instance: Some(signed(self.instance_credentials(), UID, CHALLENGE, KEY)),
            role: Some(signed(self.role_credentials(), UID, CHALLENGE, KEY)),
        }
    }

    async fn attest(&self, evidence: AwsEc2Credential) -> Result<Attested, AttestError> {
        self.attestors.attest(&Evidence::AwsEc2(evidence), context(Timestamp::now())).await
    }

    async fn refused(&self, evidence: AwsEc2Credential) -> String {
        match self.attest(evidence).await {
            Err(AttestError::Refused(why)) => why,
            other => panic!("not refused: {other:?}"),
        }
    }

    async fn unavailable(&self, evidence: AwsEc2Credential) -> String {
        match self.attest(evidence).await {
            Err(AttestError::Unavailable(why)) => why,
            other => panic!("not unavailable: {other:?}"),
        }
    }
}

fn instance(id: &str) -> Instance {
    Instance {
        account: ACCOUNT.to_owned(),
        region: REGION.to_owned(),
        zone: "us-east-2b".to_owned(),
        instance_id: id.to_owned(),
        role: Some("ratings-role".to_owned()),
        private_ip: "10.0.0.1".to_owned(),
    }
}

fn context(now: Timestamp) -> Context<'static> {
    Context { plane_uid: UID, challenge: CHALLENGE, key: KEY, now, issuers: &[] }
}

fn signed(credentials: &Credentials, uid: &str, challenge: &[u8], key: Thumbprint) -> SignedCallerIdentity {
    signing::signed(credentials, REGION, uid, challenge, key)
}

fn aws(attested: Attested) -> (AwsIdentity, String, Option<String>, Replay) {
    let Identity::Aws(identity) = attested.identity else { panic!("not AWS") };
    let AwsCompute::Ec2 { instance_id, iam_role } = identity.compute.clone() else { panic!("not EC2") };
    let role = iam_role.map(|role| role.proven().unwrap().clone());
    (identity, instance_id.proven().unwrap().clone(), role, attested.replay)
}

#[tokio::test]
async fn the_document_and_both_callers_prove_everything() {
    let world = World::new().await;
    let attested = world.attest(world.evidence()).await.unwrap();
    assert_eq!(attested.issuer_short_name, None);
    let (identity, instance, role, replay) = aws(attested);
    for (fact, value) in [
        (identity.partition, "aws"),
        (identity.account, ACCOUNT),
        (identity.region, REGION),
        (identity.zone, "us-east-2b"),
    ] {
        assert_eq!(fact.proven().map(String::as_str), Some(value));
    }
    assert_eq!((instance.as_str(), role.as_deref()), (INSTANCE, Some("ratings-role")));
    assert_eq!(replay, Replay::BoundToKey);
}

#[tokio::test]
async fn what_is_not_presented_is_not_proven() {
    let world = World::new().await;
    let alone = AwsEc2Credential { instance: None, role: None, ..world.evidence() };
    let (_, instance, role, replay) = aws(world.attest(alone).await.unwrap());
    assert_eq!((instance.as_str(), role, replay), (INSTANCE, None, Replay::Forever));
    assert_eq!(world.sts.asked(), 0);

    // A role's session is what its holder calls it: the document can still be a copy.
    let with_role = AwsEc2Credential { instance: None, ..world.evidence() };
    let (_, _, role, replay) = aws(world.attest(with_role).await.unwrap());
    assert_eq!((role.as_deref(), replay), (Some("ratings-role"), Replay::Forever));

    let alive = AwsEc2Credential { role: None, ..world.evidence() };
    let (_, _, role, replay) = aws(world.attest(alive).await.unwrap());
    assert_eq!((role, replay), (None, Replay::BoundToKey));
}

#[tokio::test]
async fn a_request_signed_for_another_plane_challenge_or_key_is_refused() {
    for (uid, challenge, key) in [
        ("https://other.example", CHALLENGE, KEY),
        (UID, b"another challenge".as_slice(), KEY),
        (UID, CHALLENGE, Thumbprint([8; 32])),
    ] {
        for role in [false, true] {
            // A new one each time: an answer that this key was given before is remembered.
            let world = World::new().await;
            let mut evidence = world.evidence();
            if role {
                evidence.role = Some(signed(world.role_credentials(), uid, challenge, key));
            } else {
                evidence.instance = Some(signed(world.instance_credentials(), uid, challenge, key));
            }
            let why = world.refused(evidence).await;
            let of = if role { "its role" } else { "the instance" };
            assert_eq!(
                why,
                format!(
                    "asking AWS who signed for {of}: sts.us-east-2.amazonaws.com refused the request (SignatureDoesNotMatch): it wasn't signed for this plane, challenge and key, or the host's clock is wrong"
                )
            );
        }
    }
}

#[tokio::test]
async fn each_part_of_a_request_is_what_it_must_be() {
    let world = World::new().await;
    type Change = fn(&mut SignedCallerIdentity);
    let changes: [(Change, &str); 12] = [
        (
            |parts| parts.region = "us-east-1".into(),
            "it is made for region \"us-east-1\", but the host is in \"us-east-2\"",
        ),
        (|parts| parts.region = "evil.example/".into(), "it is made for region \"evil.example/\""),
        (|parts| parts.amz_date = "2026-11-24T11:00:00Z".into(), "its date isn't of the form"),
        (|parts| parts.amz_date.push_str("\r\nx-evil: 1"), "its date isn't of the form"),
        (
            |parts| parts.amz_date = "20201124T110000Z".into(),
            "it was signed at 2020-11-24T11:00:00Z, but here it is 20",
        ),
        (|parts| parts.access_key_id = "AKID".into(), "its access key ID isn't one"),
        (|parts| parts.access_key_id = "AKIAAAAAAAAAAAAAAAA/x".into(), "its access key ID isn't one"),
        (|parts| parts.session_token = String::new(), "its session token isn't one"),
        (|parts| parts.session_token = "a b".into(), "its session token isn't one"),
        (|parts| parts.session_token = "a".repeat(9000), "its session token isn't one"),
        (|parts| parts.signature = "A".repeat(64), "its signature isn't 64 hexadecimal digits"),
        (
            |parts| {
                parts.signature.pop();
            },
            "its signature isn't 64 hexadecimal digits",
        ),
    ];
    for (change, problem) in changes {
        let mut evidence = world.evidence();
        change(evidence.instance.as_mut().unwrap());
        let why = world.refused(evidence).await;
        assert!(
            why.starts_with("the GetCallerIdentity request signed by the instance can't be used: ")
                && why.contains(problem),
            "{problem}: {why}"
        );
    }
    // The other request may have been asked already; this one never.
    assert!(world.sts.asked() <= 12);
}

#[tokio::test]
async fn another_instance_account_or_role_session_is_refused_with_both_values() {
    let world = World::new().await;
    let until = Timestamp::now() + SignedDuration::from_hours(1);
    let other = "i-0000000000000000f";
    let instance_of = |account: &str, id: &str| {
        let credentials = world.cloud.instance_credentials(REGION, account, id, until).unwrap();
        Some(signed(&credentials, UID, CHALLENGE, KEY))
    };
    let role_of = |account: &str, session: &str| {
        let credentials = world.cloud.role_credentials(REGION, account, "ratings-role", session, until).unwrap();
        Some(signed(&credentials, UID, CHALLENGE, KEY))
    };
    let user = world.cloud.credentials("arn:aws:iam::123456789012:user/eve", "AIDAEXAMPLE", ACCOUNT, until).unwrap();
    let good = world.evidence();
    for (evidence, problem) in [
        (
            AwsEc2Credential { instance: instance_of(ACCOUNT, other), ..good.clone() },
            "the identity document is of instance i-1234567890abcdef0, but the caller is instance i-0000000000000000f",
        ),
        (
            AwsEc2Credential { instance: instance_of("999999999999", INSTANCE), ..good.clone() },
            "the identity document is of account 123456789012 (aws), but the caller for the instance is of account 999999999999 (aws)",
        ),
        (
            AwsEc2Credential { instance: role_of(ACCOUNT, INSTANCE), ..good.clone() },
            "the caller that should be instance i-1234567890abcdef0 is role \"ratings-role\"",
        ),
        (
            AwsEc2Credential { role: role_of(ACCOUNT, "me"), ..good.clone() },
            "the identity document is of instance i-1234567890abcdef0, but the session of role \"ratings-role\" is called \"me\"",
        ),
        (
            AwsEc2Credential { role: role_of("999999999999", INSTANCE), ..good.clone() },
            "the identity document is of account 123456789012 (aws), but the caller for its role is of account 999999999999 (aws)",
        ),
        (
            AwsEc2Credential { role: instance_of(ACCOUNT, INSTANCE), ..good.clone() },
            "the caller that should be a role is instance i-1234567890abcdef0 itself",
        ),
        (
            AwsEc2Credential { role: Some(signed(&user, UID, CHALLENGE, KEY)), ..good.clone() },
            "\"arn:aws:iam::123456789012:user/eve\", which is neither an instance nor an assumed role",
        ),
    ] {
        let why = world.refused(evidence).await;
        assert!(why.contains(problem), "{problem}: {why}");
    }
}

#[tokio::test]
async fn credentials_that_expired_or_that_aws_does_not_know_are_refused() {
    let world = World::new().await;
    let expired = world.cloud.instance_credentials(REGION, ACCOUNT, INSTANCE, Timestamp::now()).unwrap();
    let unknown = Cloud::generate()
        .unwrap()
        .instance_credentials(REGION, ACCOUNT, INSTANCE, Timestamp::now() + SignedDuration::from_hours(1))
        .unwrap();
    for (credentials, problem) in [(expired, "(ExpiredToken)"), (unknown, "(InvalidClientTokenId)")] {
        let evidence =
            AwsEc2Credential { instance: Some(signed(&credentials, UID, CHALLENGE, KEY)), ..world.evidence() };
        let why = world.refused(evidence).await;
        assert!(why.contains(problem), "{problem}: {why}");
    }
}

#[tokio::test]
async fn a_clock_that_is_wrong_is_named() {
    let world = World::new().await;
    for ago in [-400_i64, 400] {
        let at = if ago > 0 {
            SystemTime::now() - Duration::from_secs(ago.unsigned_abs())
        } else {
            SystemTime::now() + Duration::from_secs(ago.unsigned_abs())
        };
        let parts = signing::signed_at(world.instance_credentials(), REGION, UID, CHALLENGE, KEY, at);
        let why = world.refused(AwsEc2Credential { instance: Some(parts), ..world.evidence() }).await;
        assert!(why.contains("set the clock of the host"), "{why}");
    }
}

#[tokio::test]
async fn an_sts_that_misbehaves_is_unavailable_and_says_how() {
    let world = World::new().await;
    // A place that would answer, if a redirect were followed.
    let elsewhere = sts::start(world.cloud.clone()).await.unwrap();
    let answer = |account: &str, arn: &str| {
        format!(
            "<GetCallerIdentityResponse><GetCallerIdentityResult><Arn>{arn}</Arn><UserId>{account}:aws:ec2-instance:{INSTANCE}</UserId><Account>{account}</Account></GetCallerIdentityResult></GetCallerIdentityResponse>"
        )
    };
    let arn = format!("arn:aws:sts::{ACCOUNT}:assumed-role/aws:ec2-instance/{INSTANCE}");
    let good = answer(ACCOUNT, &arn);
    for (mode, problem) in [
        (Mode::Redirect(elsewhere.url()), "answered with a redirect (302), which isn't followed"),
        (Mode::Huge(70_000), "answered with more than 65536 bytes"),
        (Mode::Huge(50), "STS's answer hasn't one GetCallerIdentityResponse/GetCallerIdentityResult/Arn"),
        (Mode::Fixed(503, "busy".into()), "answered 503: no answer of GetCallerIdentity"),
        (Mode::Fixed(403, "no XML".into()), "answered 403: no error that AWS documents"),
        (
            Mode::Fixed(400, "<ErrorResponse><Error><Code>Throttling</Code></Error></ErrorResponse>".into()),
            "answered 400: it has too much to do",
        ),
        (Mode::Fixed(200, good[..good.len() - 5].into()), "answered 200: not its XML"),
        (Mode::Fixed(200, format!("<!DOCTYPE a [<!ENTITY b \"c\">]>{good}")), "answered 200: not its XML"),
        (Mode::Fixed(200, good.repeat(2)), "answered 200: not its XML (not one whole element)"),
        (
            Mode::Fixed(200, good.replace("<Account>", "<Account>999999999999</Account><Account>")),
            "hasn't one GetCallerIdentityResponse/GetCallerIdentityResult/Account",
        ),
        (Mode::Fixed(200, answer("999999999999", &arn)), "STS's answer contradicts itself: account 999999999999"),
        (Mode::Fixed(200, good.replace("</UserId>", "x</UserId>")), "STS's answer contradicts itself: user ID"),
        (Mode::Fixed(200, good.replace(INSTANCE, "i-&amp;")), "STS's answer contradicts itself"),
    ] {
        world.sts.set_mode(mode.clone());
        let why = world.unavailable(AwsEc2Credential { role: None, ..world.evidence() }).await;
        assert!(why.contains(problem), "{mode:?}: {why}");
    }
    assert_eq!(elsewhere.asked(), 0);
    // None of it is remembered.
    world.sts.set_mode(Mode::Honest);
    world.attest(world.evidence()).await.unwrap();
}

#[tokio::test]
async fn an_sts_that_speaks_of_another_account_is_refused() {
    let world = World::new().await;
    world.sts.set_mode(Mode::OtherAccount("999999999999".into()));
    let why = world.refused(world.evidence()).await;
    assert!(why.contains("account 123456789012") && why.contains("account 999999999999"), "{why}");
}

#[tokio::test]
async fn a_silent_sts_is_waited_for_no_longer_than_five_seconds() {
    let world = World::new().await;
    world.sts.set_mode(Mode::Silent);
    let started = Instant::now();
    let why = world.unavailable(world.evidence()).await;
    assert!(why.contains("did not answer within 5 s"), "{why}");
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
}

#[tokio::test]
async fn sts_is_asked_once_per_key_and_credentials() {
    let world = World::new().await;
    world.attest(world.evidence()).await.unwrap();
    assert_eq!(world.sts.asked(), 2);
    world.attest(world.evidence()).await.unwrap();
    assert_eq!(world.sts.asked(), 2);

    // Another key gets nothing out of it.
    let mut other = context(Timestamp::now());
    other.key = Thumbprint([8; 32]);
    let outcome = world.attestors.attest(&Evidence::AwsEc2(world.evidence()), other).await;
    assert!(matches!(outcome, Err(AttestError::Refused(_))), "{outcome:?}");
    assert!(world.sts.asked() > 2);

    // Nor does anybody after five minutes.
    let asked = world.sts.asked();
    let later = SystemTime::now() + Duration::from_secs(301);
    let evidence = AwsEc2Credential {
        instance: Some(signing::signed_at(world.instance_credentials(), REGION, UID, CHALLENGE, KEY, later)),
        role: None,
        ..world.evidence()
    };
    let now = Timestamp::now() + SignedDuration::from_secs(301);
    world.attestors.attest(&Evidence::AwsEc2(evidence), context(now)).await.unwrap();
    assert_eq!(world.sts.asked(), asked + 1);
}

#[test]
fn options_that_cannot_be_used_are_named() {
    for (options, problem) in [
        (Options { extra_aws_certificates: Some("# us-east-2\nhello".into()), ..Options::default() }, "line 2"),
        (Options { sts_endpoint: Some("localhost".into()), ..Options::default() }, "the STS endpoint \"localhost\""),
        (
            Options { sts_endpoint: Some("http://a/b".into()), ..Options::default() },
            "isn't of the form http://HOST:PORT",
        ),
        (Options { extra_roots_pem: Some("hello".into()), ..Options::default() }, "no certificate in PEM"),
    ] {
        let error = Attestors::new(options).err().unwrap().to_string();
        assert!(error.contains(problem), "{problem}: {error}");
    }
}

proptest::proptest! {
    /// Whatever the parts are, a request that is rebuilt says what it must, to whom it must, in one line a header.
    #[test]
    fn a_rebuilt_request_is_always_the_same_request(
        access_key_id in "[A-Z0-9]{16,18}|[A-Z0-9]{16,18}|.{0,20}",
        session_token in "[A-Za-z0-9+/=]{1,40}|\\PC{0,40}|.{0,40}",
        signature in "[0-9a-f]{64}|[0-9a-f]{64}|.{64}",
        amz_date in "20261124T150[0-4]00Z|20261124T150[0-4]00Z|.{16}",
    ) {
        let parts = SignedCallerIdentity { region: REGION.to_owned(), amz_date, access_key_id, session_token, signature };
        let now = "2026-11-24T15:00:00Z".parse().unwrap();
        if let Ok(request) = Request::rebuild(&parts, REGION, "binding".to_owned(), now) {
            proptest::prop_assert_eq!(&request.host, "sts.us-east-2.amazonaws.com");
            for (name, value) in request.headers() {
                proptest::prop_assert!(value.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()));
                if name == "authorization" {
                    proptest::prop_assert!(value.contains("SignedHeaders=content-type;host;x-amz-date;x-amz-security-token;x-onboarding-binding, Signature="));
                    proptest::prop_assert_eq!(value.matches(", ").count(), 2);
                }
                if name == STS_BINDING_HEADER {
                    proptest::prop_assert_eq!(value, "binding");
                }
            }
        }
    }
}
