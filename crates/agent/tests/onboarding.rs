//! The agent against a plane that answers as it is told, over real TLS: what is asked in which order, and what a person is told.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

mod plane;

use jiff::Timestamp;
use onboarding_agent::config::Configuration;
use onboarding_agent::key::AgentKey;
use onboarding_agent::run::{Settings, run};
use onboarding_agent::session::{DialError, Endpoint, Link, TlsProblem};
use onboarding_agent::sidecar::IstioWay;
use onboarding_agent::status::Status as AgentStatus;
use onboarding_agent::store::Store;
use onboarding_agent::trust::Trust;
use onboarding_core::name::GroupName;
use onboarding_kinds::agent::{read_agent_configuration, read_onboarding_configuration};
use onboarding_testkit::eventually::eventually;
use onboarding_wire::JWT_CREDENTIAL;
use onboarding_wire::RETRY_PUSHBACK;
use onboarding_wire::onboarding as pb;
use onboarding_wire::onboarding::session_end::Reason;
use plane::{Asked, NAME, Plane};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Of anything that is waited for here.
const WITHIN: Duration = Duration::from_secs(30);

/// A running agent.
struct Agent {
    directory: tempfile::TempDir,
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

fn settings(plane: &Plane, directory: &Path) -> Settings {
    let onboarding = format!(
        "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: OnboardingConfiguration\nonboardingEndpoint:\n  host: {}\n  port: {}\n  transportSecurity: {{tls: {{sni: {NAME}}}}}\nworkloadGroup: {{namespace: bookinfo, name: ratings}}\nworkload: {{labels: {{version: v5}}}}\n",
        plane.address.ip(),
        plane.address.port()
    );
    let credential = r#"printf %s "{\"credential\":{\"@type\":\"x/JwtCredential\",\"token\":\"aa.bb.cc\"},\"expiresAt\":\"2126-01-01T00:00:00Z\"}""#;
    let host_info = r#"printf %s "{\"host\":{\"addresses\":[{\"ip\":\"10.0.0.4\",\"type\":\"VPC\"}]}}""#;
    let agent = format!(
        "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: AgentConfiguration\nhost:\n  custom:\n    credential:\n    - plugin: {{name: my-jwt, path: /bin/sh, args: ['-c', '{credential}']}}\n    hostinfo: {{plugin: {{name: my-host, path: /bin/sh, args: ['-c', '{host_info}']}}}}\nsidecar: {{envoy: {{}}}}\n"
    );
    Settings {
        configuration: Configuration {
            onboarding: read_onboarding_configuration("onboarding.config.yaml", &onboarding).unwrap(),
            agent: read_agent_configuration("agent.config.yaml", &agent).unwrap(),
            origins: ("onboarding.config.yaml".to_owned(), "agent.config.yaml".to_owned()),
        },
        trust: Trust::load(Some(&plane.ca), Path::new("/nonexistent")).unwrap(),
        state_directory: directory.to_owned(),
        binary: "/no/such/envoy".into(),
        admin: "127.0.0.1:1".parse().unwrap(),
        istio: IstioWay::Envoy,
    }
}

impl Agent {
    fn start(plane: &Plane) -> Self {
        Self::start_in(plane, tempfile::tempdir().unwrap())
    }

    fn start_in(plane: &Plane, directory: tempfile::TempDir) -> Self {
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(settings(plane, directory.path()), stop.clone()));
        Self { directory, stop, task }
    }

    fn status(&self) -> Option<AgentStatus> {
        AgentStatus::read(&Store::at(self.directory.path())).unwrap()
    }

    async fn until(&self, what: &str, reached: impl Fn(&AgentStatus) -> bool) -> AgentStatus {
        eventually(what, WITHIN, async || {
            let status = self.status();
            match status {
                Some(status) if reached(&status) => Ok(status),
                status => {
                    assert!(!self.task.is_finished(), "the agent ended before {what}: {status:#?}");
                    Err(status)
                }
            }
        })
        .await
    }

    async fn connected(&self) -> AgentStatus {
        self.until("connected", |status| status.phase == "Connected").await
    }

    async fn stopped(self) -> tempfile::TempDir {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(30), self.task).await.unwrap().unwrap().unwrap();
        self.directory
    }
}

async fn asked(plane: &Plane, what: &str, reached: impl Fn(&[Asked]) -> bool) {
    eventually(what, WITHIN, async || {
        let log = plane.script().asked.clone();
        if reached(&log) { Ok(()) } else { Err(log) }
    })
    .await;
}

fn names(log: &[Asked]) -> Vec<&'static str> {
    log.iter()
        .filter_map(|asked| {
            Some(match asked {
                Asked::Discover => "discover",
                Asked::Authorize { .. } => "authorize",
                Asked::Register { proven: false, .. } => "register",
                Asked::Register { proven: true, .. } => "register with proof",
                Asked::Session { .. } => "session",
                Asked::Unregister { proven: false } => "unregister",
                Asked::Unregister { proven: true } => "unregister with proof",
                Asked::TokenRenewed => "token renewed",
                Asked::Health { .. } | Asked::CertificateRequest | Asked::SidecarReport { .. } => return None,
            })
        })
        .collect()
}

#[tokio::test]
async fn joins_in_order_and_leaves_in_order() {
    let plane = Plane::start().await;
    let agent = Agent::start(&plane);
    let status = agent.connected().await;
    assert_eq!(status.registration.as_deref(), Some("bookinfo/ratings-jwt-test--vm"));
    assert_eq!(status.last_error, None);
    asked(&plane, "asked for a certificate", |log| log.contains(&Asked::CertificateRequest)).await;
    let status = agent.until("has a certificate", |status| status.spiffe_id.is_some()).await;
    assert_eq!(status.spiffe_id.as_deref(), Some(plane::SPIFFE_ID));
    let log = plane.script().asked.clone();
    assert_eq!(log[1], Asked::Authorize { type_url: JWT_CREDENTIAL.to_owned() });
    let Asked::Register { report, .. } = &log[2] else { panic!("{log:?}") };
    assert_eq!(report.addresses, [pb::HostAddress { ip: "10.0.0.4".to_owned(), kind: pb::AddressKind::Vpc.into() }]);
    assert_eq!(report.labels.get("version").map(String::as_str), Some("v5"));
    let directory = agent.stopped().await;
    assert_eq!(names(&plane.script().asked), ["discover", "authorize", "register", "session", "unregister"]);
    let status = AgentStatus::read(&Store::at(directory.path())).unwrap().unwrap();
    assert_eq!(status.phase, "Stopped");
    assert!(!status.agent_runs());
    assert!(Store::at(directory.path()).token().is_none(), "the token of an ended registration is kept");
}

#[tokio::test]
async fn a_refusal_is_said_and_the_pushback_is_obeyed() {
    let plane = Plane::start().await;
    let mut busy = Status::resource_exhausted("too many at once");
    busy.metadata_mut().insert(RETRY_PUSHBACK, "2000".parse().unwrap());
    plane
        .script()
        .refuse_authorize
        .extend([busy, Status::permission_denied("Not authorized by OnboardingPolicy: the role is wrong")]);
    let started = Instant::now();
    let agent = Agent::start(&plane);
    let status = agent
        .until("refused", |status| status.last_error.as_deref().is_some_and(|error| error.contains("Not authorized")))
        .await;
    assert!(started.elapsed() >= Duration::from_secs(2), "{:?}", started.elapsed());
    assert_eq!(
        status.last_error.as_deref(),
        Some("PermissionDenied: Not authorized by OnboardingPolicy: the role is wrong")
    );
    agent.connected().await;
    agent.stopped().await;
}

#[tokio::test]
async fn a_kept_token_is_used_first_and_proven_on_the_new_connection() {
    let plane = Plane::start().await;
    let agent = Agent::start(&plane);
    agent.connected().await;
    plane.end(Reason::PlaneStopping).await;
    asked(&plane, "back", |log| names(log).iter().filter(|name| **name == "session").count() == 2).await;
    agent.connected().await;
    assert_eq!(
        names(&plane.script().asked),
        ["discover", "authorize", "register", "session", "discover", "register with proof", "session"]
    );
    agent.stopped().await;
}

#[tokio::test]
async fn a_kept_token_that_is_refused_is_replaced() {
    let plane = Plane::start().await;
    let agent = Agent::start(&plane);
    agent.connected().await;
    plane.script().refuse_register.push_back(Status::unauthenticated("the registration ended"));
    plane.end(Reason::Replaced).await;
    asked(&plane, "back", |log| names(log).iter().filter(|name| **name == "session").count() == 2).await;
    agent.connected().await;
    assert_eq!(
        names(&plane.script().asked)[4..],
        ["discover", "register with proof", "discover", "authorize", "register", "session"]
    );
    agent.stopped().await;
}

#[tokio::test]
async fn an_agent_that_starts_again_uses_what_it_kept() {
    let plane = Plane::start().await;
    let agent = Agent::start(&plane);
    agent.connected().await;
    // Killed, not stopped: nothing is said.
    agent.task.abort();
    let directory = agent.directory;
    plane.script().asked.clear();
    let agent = Agent::start_in(&plane, directory);
    asked(&plane, "back", |log| names(log) == ["discover", "register with proof", "session"]).await;
    agent.connected().await;
    agent.stopped().await;
}

#[tokio::test]
async fn a_deleted_registration_is_onboarded_anew() {
    let plane = Plane::start().await;
    let agent = Agent::start(&plane);
    agent.connected().await;
    plane.end(Reason::Deleted).await;
    asked(&plane, "back", |log| names(log).iter().filter(|name| **name == "authorize").count() == 2).await;
    agent.connected().await;
    agent.stopped().await;
}

#[tokio::test]
async fn the_token_is_renewed_beside_the_session() {
    let plane = Plane::start().await;
    plane.script().token_life = Duration::from_secs(4);
    let agent = Agent::start(&plane);
    asked(&plane, "renewed", |log| names(log).iter().filter(|name| **name == "token renewed").count() == 2).await;
    let names = names(&plane.script().asked);
    assert_eq!(names[..7], ["discover", "authorize", "register", "session", "discover", "authorize", "token renewed"]);
    assert_eq!(names.iter().filter(|name| **name == "session").count(), 1, "{names:?}");
    agent.stopped().await;
}

#[tokio::test]
async fn a_difference_to_what_is_not_held_asks_for_all_of_it() {
    let plane = Plane::start().await;
    let agent = Agent::start(&plane);
    agent.connected().await;
    let envoy = pb::EnvoyBoot { base_version: "41".to_owned(), ..Default::default() };
    let boot = pb::BootConfiguration {
        version: "42".to_owned(),
        sidecar: Some(pb::boot_configuration::Sidecar::Envoy(envoy)),
        ..Default::default()
    };
    plane.say(pb::plane_message::Message::Boot(boot)).await;
    asked(&plane, "asked for all of it", |log| {
        log.iter().filter(|asked| **asked == Asked::Session { boot_version: String::new() }).count() == 2
    })
    .await;
    agent.connected().await;
    agent.stopped().await;
}

#[tokio::test]
async fn a_goodbye_is_said_also_without_a_session() {
    let plane = Plane::start().await;
    let agent = Agent::start(&plane);
    agent.connected().await;
    // The plane is busy: the agent waits, and is told to stop meanwhile.
    let mut busy = Status::resource_exhausted("too many at once");
    busy.metadata_mut().insert(RETRY_PUSHBACK, "60000".parse().unwrap());
    plane.script().refuse_register.push_back(busy);
    plane.end(Reason::Replaced).await;
    agent
        .until("waits", |status| {
            status.next_retry.is_some() && status.last_error.as_deref() == Some("ResourceExhausted: too many at once")
        })
        .await;
    agent.stopped().await;
    assert_eq!(names(&plane.script().asked).last(), Some(&"unregister with proof"));
}

#[tokio::test]
async fn a_skewed_clock_is_in_the_status() {
    let plane = Plane::start().await;
    plane.script().ahead = Duration::from_secs(600);
    let agent = Agent::start(&plane);
    let status = agent.connected().await;
    let skew = status.clock_skew_seconds.unwrap();
    assert!((-600..=-570).contains(&skew), "{skew}");
    // The token lives an hour on this host's clock too.
    let life = status.token_expires_at.unwrap().duration_since(Timestamp::now()).as_secs();
    assert!((3570..=3630).contains(&life), "{life}");
    agent.stopped().await;
}

/// Gathering evidence may take minutes.
#[tokio::test]
async fn a_token_ends_when_the_plane_says_however_long_ago_it_was_discovered() {
    let plane = Plane::start().await;
    let trust = Trust::load(Some(&plane.ca), Path::new("/nonexistent")).unwrap();
    let link = Link::connect(&endpoint(&plane, &trust, "127.0.0.1", "sni: localhost")).await.unwrap();
    let discovery = link.discover().await.unwrap();
    let gathering = Duration::from_secs(120);
    plane.script().ahead = gathering;
    let directory = tempfile::tempdir().unwrap();
    let key = AgentKey::load_or_create(&directory.path().join("key")).unwrap();
    let group = GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() };
    let then = Timestamp::now() + gathering;
    let token = link.authorize(&key, &discovery, &group, prost_types::Any::default(), then).await.unwrap();
    let life = token.expires_at.duration_since(then).as_secs();
    assert!((3600..=3630).contains(&life), "{life}");
}

fn endpoint(plane: &Plane, trust: &Trust, host: &str, sni: &str) -> Endpoint {
    let text = format!(
        "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: OnboardingConfiguration\nonboardingEndpoint: {{host: {host}, port: {}, transportSecurity: {{tls: {{{sni}}}}}}}\nworkloadGroup: {{namespace: bookinfo, name: ratings}}\n",
        plane.address.port()
    );
    Endpoint::new(&read_onboarding_configuration("f", &text).unwrap(), trust).unwrap()
}

#[tokio::test]
async fn what_is_wrong_with_a_connection_is_told_apart() {
    let plane = Plane::start().await;
    let good = Trust::load(Some(&plane.ca), Path::new("/nonexistent")).unwrap();
    let link = Link::connect(&endpoint(&plane, &good, "127.0.0.1", "sni: localhost")).await.unwrap();
    assert_eq!(link.discover().await.unwrap().plane_uid, plane::UID);

    let error = Link::connect(&endpoint(&plane, &good, "127.0.0.1", "sni: other.example")).await.unwrap_err();
    assert!(
        matches!(&error, DialError::Trust(TlsProblem::WrongName { name, .. }) if name == "other.example"),
        "{error}"
    );
    assert!(error.to_string().contains("localhost"), "{error}");

    let other = Trust::load(Some(&Plane::start().await.ca), Path::new("/nonexistent")).unwrap();
    let error = Link::connect(&endpoint(&plane, &other, "127.0.0.1", "sni: localhost")).await.unwrap_err();
    assert!(matches!(error, DialError::Trust(TlsProblem::UnknownCa)), "{error}");
    assert!(error.to_string().contains("/etc/onboarding-agent/root-certs.pem"), "{error}");

    let insecure = endpoint(&plane, &other, "127.0.0.1", "sni: other.example, insecureSkipVerify: true");
    Link::connect(&insecure).await.unwrap().discover().await.unwrap();

    let error = Link::connect(&endpoint(&plane, &good, "no-such-host.invalid", "")).await.unwrap_err();
    assert!(matches!(error, DialError::Resolve { .. }), "{error}");

    let mut closed = endpoint(&plane, &good, "127.0.0.1", "sni: localhost");
    closed.port = 1;
    let error = Link::connect(&closed).await.unwrap_err();
    assert!(matches!(error, DialError::Connect { .. }), "{error}");
}

#[test]
fn what_is_not_a_certificate_is_no_ca() {
    for text in ["", "garbage", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let error = Trust::load(Some(text), Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(error.contains("ONBOARDING_AGENT_ROOT_CERTS has no certificate"), "{text:?}: {error}");
    }
}
