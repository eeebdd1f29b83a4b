//! A task of ECS attests itself: what the metadata emulator says, a request signed by AWS's own library, an STS that verifies it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod signing;

use jiff::{SignedDuration, Timestamp};
use onboarding_attest::aws::ecs::TaskClaims;
use onboarding_attest::{AttestError, Attestors, Context, Evidence, Options};
use onboarding_core::identity::{Attested, AwsCompute, Fact, Identity, Replay, Thumbprint};
use onboarding_testkit::sts::{self, Cloud, Credentials, Mode, Sts};
use onboarding_wire::onboarding::{AwsEcsCredential, SignedCallerIdentity};
use signing::signed;

const REGION: &str = "us-east-2";
const ACCOUNT: &str = "123456789012";
const TASK: &str = "16aeded318d842bb8226e5bc678cd446";
const UID: &str = "https://onboarding-endpoint.your-company.corp";
const CHALLENGE: &[u8] = b"challenge of this connection";
const KEY: Thumbprint = Thumbprint([7; 32]);

struct World {
    sts: Sts,
    cloud: Cloud,
    attestors: Attestors,
}

impl World {
    async fn new() -> Self {
        let cloud = Cloud::generate().unwrap();
        let sts = sts::start(cloud.clone()).await.unwrap();
        let options = Options { sts_endpoint: Some(sts.url()), ..Options::default() };
        Self { sts, cloud, attestors: Attestors::new(options).unwrap() }
    }

    fn role(&self, account: &str, session: &str) -> Credentials {
        let until = Timestamp::now() + SignedDuration::from_hours(1);
        self.cloud.role_credentials(REGION, account, "ratings-role", session, until).unwrap()
    }

    fn by(&self, credentials: &Credentials) -> Option<SignedCallerIdentity> {
        Some(signed(credentials, REGION, UID, CHALLENGE, KEY))
    }

    fn evidence(&self) -> AwsEcsCredential {
        AwsEcsCredential {
            task_arn: format!("arn:aws:ecs:{REGION}:{ACCOUNT}:task/bookinfo/{TASK}"),
            cluster: "bookinfo".to_owned(),
            availability_zone: "us-east-2b".to_owned(),
            role: self.by(&self.role(ACCOUNT, TASK)),
        }
    }

    async fn attest(&self, evidence: AwsEcsCredential) -> Result<Attested, AttestError> {
        let context = Context { plane_uid: UID, challenge: CHALLENGE, key: KEY, now: Timestamp::now(), issuers: &[] };
        self.attestors.attest(&Evidence::AwsEcs(evidence), context).await
    }

    async fn refused(&self, evidence: AwsEcsCredential) -> String {
        match self.attest(evidence).await {
            Err(AttestError::Refused(why)) => why,
            other => panic!("not refused: {other:?}"),
        }
    }
}

#[tokio::test]
async fn account_and_role_are_proven_and_the_rest_is_claimed() {
    let world = World::new().await;
    let attested = world.attest(world.evidence()).await.unwrap();
    assert_eq!((attested.issuer_short_name, attested.replay), (None, Replay::BoundToKey));
    let Identity::Aws(identity) = attested.identity else { panic!("not AWS") };
    let AwsCompute::Ecs { task_id, cluster, iam_role } = identity.compute else { panic!("not ECS") };
    for (fact, value) in [(identity.partition, "aws"), (identity.account, ACCOUNT), (iam_role.unwrap(), "ratings-role")]
    {
        assert_eq!(fact.proven().map(String::as_str), Some(value));
    }
    for (fact, value) in
        [(identity.region, REGION), (identity.zone, "us-east-2b"), (cluster, "bookinfo"), (task_id, TASK)]
    {
        assert_eq!(fact, Fact::claimed(value.to_owned()));
    }
}

#[tokio::test]
async fn a_task_is_read_in_each_form_that_ecs_gives() {
    let uuid = "9781c248-0edd-4cdb-9a93-f63cb662a5d3";
    let credential = |arn: &str, cluster: &str, zone: &str| AwsEcsCredential {
        task_arn: arn.to_owned(),
        cluster: cluster.to_owned(),
        availability_zone: zone.to_owned(),
        role: None,
    };
    for (arn, cluster, zone, partition, id) in [
        (format!("arn:aws:ecs:us-east-2:{ACCOUNT}:task/b_-1/{TASK}"), "b_-1", "us-east-2b", "aws", TASK),
        (
            format!("arn:aws:ecs:us-east-2:{ACCOUNT}:task/b/{TASK}"),
            "arn:aws:ecs:us-east-2:123456789012:cluster/b",
            "us-east-2b",
            "aws",
            TASK,
        ),
        (format!("arn:aws-cn:ecs:cn-north-1:{ACCOUNT}:task/{uuid}"), "default", "cn-north-1a", "aws-cn", uuid),
        (format!("arn:aws:ecs:us-west-2:{ACCOUNT}:task/b/{TASK}"), "b", "us-west-2-lax-1a", "aws", TASK),
    ] {
        let task = TaskClaims::read(&credential(&arn, cluster, zone)).unwrap();
        assert_eq!((task.partition, task.task_id.as_str(), task.zone.as_str()), (partition, id, zone), "{arn}");
        assert_eq!(task.cluster, cluster.rsplit('/').next().unwrap());
    }
}

#[tokio::test]
async fn each_claim_has_the_form_that_aws_would_give_it_or_nobody_is_asked() {
    let world = World::new().await;
    type Change = fn(&mut AwsEcsCredential);
    let changes: [(Change, &str); 18] = [
        (|task| task.task_arn = String::new(), "the task's ARN \"\" isn't one"),
        (|task| task.task_arn = task.task_arn.replace(":ecs:", ":ec2:"), "isn't one"),
        (|task| task.task_arn = task.task_arn.replace("arn:aws:", "arn:aws-cn:"), "isn't one"),
        (|task| task.task_arn = task.task_arn.replace("us-east-2", "us-east-2.evil.example/"), "isn't one"),
        (|task| task.task_arn = task.task_arn.replace(ACCOUNT, "12345"), "isn't one"),
        (|task| task.task_arn = task.task_arn.replace(":task/", ":service/"), "isn't one"),
        (|task| task.task_arn = task.task_arn.replace(TASK, "x"), "isn't one"),
        (|task| task.task_arn = task.task_arn.replace(TASK, "16AEDED318D842BB8226E5BC678CD446"), "isn't one"),
        (|task| task.task_arn.push_str("/more"), "isn't one"),
        (|task| task.task_arn.push_str(&"x".repeat(5000)), "(5081 characters) isn't one"),
        (
            |task| task.cluster = "other".into(),
            "the task's ARN names the cluster \"bookinfo\", but the task says that it is in \"other\"",
        ),
        (|task| task.cluster = String::new(), "the task's cluster \"\" isn't one"),
        (|task| task.cluster = "a/b".into(), "the task's cluster \"a/b\" isn't one"),
        (
            |task| task.cluster = "arn:aws:ecs:us-east-2:999999999999:cluster/bookinfo".into(),
            "the task's cluster \"arn:aws:ecs:us-east-2:999999999999:cluster/bookinfo\" isn't one",
        ),
        (
            |task| task.availability_zone = String::new(),
            "the task's availability zone \"\" isn't one of region us-east-2",
        ),
        (|task| task.availability_zone = "us-east-1a".into(), "isn't one of region us-east-2"),
        (|task| task.availability_zone = "us-east-2b\n".into(), "zone \"us-east-2b\\n\" isn't one of region us-east-2"),
        (|task| task.role = None, "the task has no IAM role, and nothing else proves who it is: set taskRoleArn"),
    ];
    for (change, problem) in changes {
        let mut evidence = world.evidence();
        change(&mut evidence);
        let why = world.refused(evidence).await;
        assert!(why.contains(problem), "{problem}: {why}");
    }
    let signed_elsewhere = {
        let role = signed(&world.role(ACCOUNT, TASK), "us-east-1", UID, CHALLENGE, KEY);
        AwsEcsCredential { role: Some(role), ..world.evidence() }
    };
    let why = world.refused(signed_elsewhere).await;
    assert!(
        why.contains(
            "signed by the task's role can't be used: it is made for region \"us-east-1\", but the host is in"
        ),
        "{why}"
    );
    assert_eq!(world.sts.asked(), 0);
}

#[tokio::test]
async fn another_account_role_session_or_caller_is_refused_with_both_values() {
    let world = World::new().await;
    let until = Timestamp::now() + SignedDuration::from_hours(1);
    let instance = world.cloud.instance_credentials(REGION, ACCOUNT, "i-1234567890abcdef0", until).unwrap();
    let user = world.cloud.credentials("arn:aws:iam::123456789012:user/eve", "AIDAEXAMPLE", ACCOUNT, until).unwrap();
    for (credentials, problem) in [
        (
            world.role("999999999999", TASK),
            "the task says that it is of account 123456789012 (aws), but its role is of account 999999999999 (aws)",
        ),
        (
            world.role(ACCOUNT, "eve"),
            "the task says that it is 16aeded318d842bb8226e5bc678cd446, but the session of role \"ratings-role\" is called \"eve\": it isn't the task's",
        ),
        (
            instance,
            "the caller that should be the role of task 16aeded318d842bb8226e5bc678cd446 is instance i-1234567890abcdef0",
        ),
        (user, "\"arn:aws:iam::123456789012:user/eve\", which is neither an instance nor an assumed role"),
    ] {
        let why = world.refused(AwsEcsCredential { role: world.by(&credentials), ..world.evidence() }).await;
        assert!(why.contains(problem), "{problem}: {why}");
    }
    world.attest(world.evidence()).await.unwrap();
}

#[tokio::test]
async fn a_request_for_another_plane_challenge_or_key_is_refused() {
    for (uid, challenge, key) in [
        ("https://other.example", CHALLENGE, KEY),
        (UID, b"another challenge".as_slice(), KEY),
        (UID, CHALLENGE, Thumbprint([8; 32])),
    ] {
        let world = World::new().await;
        let role = Some(signed(&world.role(ACCOUNT, TASK), REGION, uid, challenge, key));
        let why = world.refused(AwsEcsCredential { role, ..world.evidence() }).await;
        assert_eq!(
            why,
            "asking AWS who signed for the task's role: sts.us-east-2.amazonaws.com refused the request (SignatureDoesNotMatch): it wasn't signed for this plane, challenge and key, or the host's clock is wrong"
        );
    }
}

#[tokio::test]
async fn without_an_answer_of_sts_nobody_is_anybody() {
    let world = World::new().await;
    world.sts.set_mode(Mode::Fixed(503, String::new()));
    match world.attest(world.evidence()).await {
        Err(AttestError::Unavailable(why)) => {
            assert!(why.starts_with("asking AWS who signed for the task's role: "), "{why}");
        }
        other => panic!("{other:?}"),
    }
}
