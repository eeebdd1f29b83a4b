//! Planes of one cluster: what each makes of the other's tokens, before and after a new key, and what people with kubectl see of refusals.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "all of it is tests")]
#![allow(dead_code, reason = "the agent is shared with other tests")]

#[path = "../../endpoint/tests/support/agent.rs"]
mod agent;
mod support;

use agent::{Agent, Key, assert_refused, client_config, connect};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jiff::{SignedDuration, Timestamp};
use onboarding_testkit::cluster::{Cluster, Options};
use onboarding_testkit::eventually::eventually;
use onboarding_testkit::oidc::{self, Oidc};
use onboarding_testkit::process::Process;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use support::get;
use tonic::Code;

const HOST: &str = "onboarding-endpoint.your-company.corp";
const SECRET: &str = "onboarding-plane-token-keys";
const WITHIN: Duration = Duration::from_secs(60);

struct World {
    cluster: Cluster,
    issuer: Oidc,
    ca: String,
}

struct Plane {
    _process: Process,
    address: SocketAddr,
}

impl World {
    async fn new() -> Self {
        let cluster = Cluster::start(Options { controllers: false, ..Options::default() }).unwrap();
        cluster.apply_istio_crds().unwrap();
        cluster.apply_crds(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds")).unwrap();
        for namespace in ["istio-system", "bookinfo"] {
            cluster.kubectl(["create", "namespace", namespace]).unwrap();
        }
        let (issuer, tls) = (oidc::start().await.unwrap(), oidc::make_tls(&[HOST]).unwrap());
        let manifests = format!(
            r#"
apiVersion: install.tetrate.io/v1alpha1
kind: ControlPlane
metadata: {{name: controlplane, namespace: istio-system}}
spec:
  meshExpansion:
    onboarding:
      uid: the-plane
      endpoint: {{hosts: [{HOST}], secretName: endpoint-tls}}
      workloads: {{authentication: {{jwt: {{issuers: [{{issuer: '{issuer}', shortName: my-corp, jwks: '{jwks}'}}]}}}}}}
---
apiVersion: v1
kind: Secret
type: kubernetes.io/tls
metadata: {{name: endpoint-tls, namespace: istio-system}}
data: {{tls.crt: {certificate}, tls.key: {key}}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {{name: ratings, namespace: bookinfo, labels: {{app: ratings}}}}
spec: {{template: {{serviceAccount: ratings-vm}}}}
---
apiVersion: authorization.onboarding.tetrate.io/v1alpha1
kind: OnboardingPolicy
metadata: {{name: allow-our-vms, namespace: bookinfo}}
spec: {{allow: [{{workloads: [{{jwt: {{issuer: '{issuer}'}}}}], onboardTo: [{{workloadGroupSelector: {{}}}}]}}]}}
"#,
            issuer = issuer.issuer,
            jwks = issuer.jwks(),
            certificate = STANDARD.encode(tls.certificate_chain),
            key = STANDARD.encode(tls.private_key),
        );
        cluster.apply(&manifests).unwrap();
        Self { cluster, issuer, ca: tls.ca }
    }

    async fn plane(&self, replica: &str) -> Plane {
        let mut command = Command::new(env!("CARGO_BIN_EXE_onboarding-plane"));
        command.args(["kubernetes", "--replica", replica, "--log-format", "json", "--audit-log", "-"]);
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        command.arg("--kubeconfig").arg(self.cluster.kubeconfig());
        let process = Process::start(replica, command, None).unwrap();
        let line = process.wait_for_line(WITHIN, |line| line.contains("the endpoint listens")).unwrap();
        let fields: Value = serde_json::from_str(&line).unwrap();
        let address = fields["address"].as_str().unwrap().parse().unwrap();
        let line = process.wait_for_line(WITHIN, |line| line.contains("metrics and readiness are served")).unwrap();
        let fields: Value = serde_json::from_str(&line).unwrap();
        // The configuration was read, the certificate of its Secret too.
        let admin = fields["address"].as_str().unwrap();
        eventually("the plane is ready", WITHIN, async || match get(admin, "/readyz") {
            answer if answer.starts_with("HTTP/1.1 200") => Ok(()),
            answer => Err(answer),
        })
        .await;
        Plane { _process: process, address }
    }

    /// A connection to this plane; `of`: by an agent that is there already, with its token.
    async fn agent(&self, plane: &Plane, key: Key, token: &str) -> Agent {
        let tls = client_config(&self.ca, rustls::ALL_VERSIONS);
        let mut agent = connect(plane.address, HOST, tls, key).await;
        agent.token = token.to_owned();
        agent
    }

    /// By a token that may be of a key which this plane doesn't know yet: it asks for the keys once a second.
    async fn registered(&self, plane: &Plane, holder: &(Key, String)) -> String {
        eventually("the token is accepted", WITHIN, async || self.register(plane, holder).await).await
    }

    /// A token of this plane for a new host, and the host's key.
    async fn authorized(&self, plane: &Plane, subject: &str) -> (Key, String) {
        let now = Timestamp::now().as_second();
        let claims = json!({"sub": subject, "aud": "the-plane", "iat": now, "exp": now + 600});
        let jwt = self.issuer.mint(jsonwebtoken::Algorithm::ES256, claims).unwrap();
        let key = Key::new();
        let mut agent = self.agent(plane, key.clone(), "").await;
        agent.authorize(&jwt).await.unwrap();
        (key, agent.token)
    }

    /// Registers by another connection, with a token of before.
    async fn register(&self, plane: &Plane, (key, token): &(Key, String)) -> Result<String, tonic::Status> {
        let agent = self.agent(plane, key.clone(), token).await;
        agent.register_at("10.0.0.4", Some(agent.token_proof().await)).await
    }

    fn keys(&self) -> Vec<Value> {
        let text = self.cluster.kubectl(["get", "secret", SECRET, "-n", "istio-system", "-o", "json"]).unwrap();
        let secret: Value = serde_json::from_str(&text).unwrap();
        serde_json::from_slice(&STANDARD.decode(secret["data"]["keys"].as_str().unwrap()).unwrap()).unwrap()
    }

    fn put_keys(&self, keys: &[u8]) {
        let patch = json!({"data": {"keys": STANDARD.encode(keys)}}).to_string();
        let patch = ["patch", "secret", SECRET, "-n", "istio-system", "--type=merge", "-p", &patch];
        self.cluster.kubectl(patch).unwrap();
    }
}

fn key_of(token: &str) -> Value {
    let header = URL_SAFE_NO_PAD.decode(token.split('.').next().unwrap()).unwrap();
    serde_json::from_slice::<Value>(&header).unwrap()["kid"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn planes_take_each_others_tokens_across_a_rotation() {
    let world = World::new().await;
    let (one, two) = (world.plane("plane-1").await, world.plane("plane-2").await);
    let first = world.authorized(&one, "vm1").await;
    assert_eq!(world.registered(&two, &first).await, "bookinfo/ratings-jwt-my-corp--vm1");
    assert_eq!(world.keys().len(), 1);

    // A day later: who starts makes the next key, and the one before verifies what it signed.
    let mut keys = world.keys();
    keys[0]["created_at"] = (Timestamp::now() - SignedDuration::from_hours(25)).to_string().into();
    world.put_keys(&serde_json::to_vec(&keys).unwrap());
    drop(one);
    let one = world.plane("plane-1").await;
    assert_eq!(world.keys().len(), 2);
    let second = world.authorized(&one, "vm2").await;
    assert_ne!(key_of(&first.1), key_of(&second.1));
    for (plane, holder, vm) in [(&two, &second, "vm2"), (&one, &first, "vm1"), (&two, &first, "vm1")] {
        assert_eq!(world.registered(plane, holder).await, format!("bookinfo/ratings-jwt-my-corp--{vm}"));
    }

    // Forced, as the document says: what was signed before is worth nothing where the new key is known, and its holder onboards again.
    world.put_keys(b"");
    drop(one);
    let one = world.plane("plane-1").await;
    assert_eq!(world.keys().len(), 1);
    let third = world.authorized(&one, "vm3").await;
    world.registered(&two, &third).await;
    for plane in [&one, &two] {
        assert_refused(world.register(plane, &first).await, Code::Unauthenticated, "isn't ours, or is ours no longer");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_events_of_the_group() {
    let world = World::new().await;
    let plane = world.plane("plane-1").await;
    let holder = world.authorized(&plane, "vm1").await;
    let agent = world.agent(&plane, holder.0.clone(), &holder.1).await;
    let refused = agent.register_at("127.0.0.1", Some(agent.token_proof().await)).await;
    assert_refused(refused, Code::InvalidArgument, "can't be reached by another host");

    world.cluster.kubectl(["delete", "onboardingpolicy", "allow-our-vms", "-n", "bookinfo"]).unwrap();
    eventually("the policy is gone for the plane", WITHIN, async || match world.register(&plane, &holder).await {
        Err(status) if status.code() == Code::PermissionDenied => Ok(()),
        other => Err(other),
    })
    .await;
    let described = eventually("both Events", WITHIN, async || {
        let described = world.cluster.kubectl(["describe", "workloadgroup", "ratings", "-n", "bookinfo"]).unwrap();
        let both = ["RegistrationRefused", "NotAuthorized"].iter().all(|reason| described.contains(reason));
        if both { Ok(described) } else { Err(described) }
    })
    .await;
    for words in [
        r#""subject":"vm1""#,
        "127.0.0.1 can't be reached by another host",
        "there is no OnboardingPolicy in namespace bookinfo",
    ] {
        assert!(described.contains(words), "{words:?} isn't in {described}");
    }
}
