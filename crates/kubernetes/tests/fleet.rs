//! Replicas, token keys, Events and the status of policies, on a real API server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{DynamicObject, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use onboarding_core::identity::{Attested, Fact, Identity, JwtIdentity, Proven, Replay};
use onboarding_core::name::{GroupName, RegistrationName};
use onboarding_core::registration::{Connection, DisconnectReason, Health, HostReport, KeyMemory, Live, State};
use onboarding_endpoint::backend::{Fleet, KeyStore, Notices, Refused, Registry, RegistryError, Stored};
use onboarding_kubernetes::fleet::{self, LEADER, LeaseFleet};
use onboarding_kubernetes::keys::{SecretKeyStore, TOKEN_KEYS};
use onboarding_kubernetes::{names, notices, policies, source};
use onboarding_testkit::cluster::{Cluster, Options};
use onboarding_testkit::eventually::eventually;
use prometheus_client::registry::Registry as Metrics;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Of anything that is waited for here; the machine may be busy.
const WITHIN: Duration = Duration::from_secs(60);
const NAMESPACE: &str = "istio-system";

async fn admin(cluster: &Cluster) -> kube::Client {
    let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig()).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    kube::Client::try_from(config).unwrap()
}

/// Asks until the answer is good.
async fn until<T: std::fmt::Debug>(what: &str, mut ask: impl AsyncFnMut() -> T, good: impl Fn(&T) -> bool) -> T {
    eventually(what, WITHIN, async || {
        let answer = ask().await;
        if good(&answer) { Ok(answer) } else { Err(answer) }
    })
    .await
}

struct Replica {
    fleet: Arc<LeaseFleet>,
    task: JoinHandle<anyhow::Result<()>>,
    stop: CancellationToken,
}

impl Replica {
    async fn start(cluster: &Cluster, name: &str) -> Self {
        let stop = CancellationToken::new();
        let options = fleet::Options { namespace: NAMESPACE.to_owned(), replica: name.to_owned() };
        let (fleet, task) = fleet::start(admin(cluster).await, options, &mut Metrics::default(), stop.clone());
        Self { fleet, task, stop }
    }

    fn leads(&self) -> bool {
        *self.fleet.leads().borrow()
    }

    async fn end(self) {
        self.stop.cancel();
        tokio::time::timeout(WITHIN, self.task).await.unwrap().unwrap().unwrap();
    }

    /// As a process that is killed: nothing is released.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_keys_events_and_statuses() {
    let cluster = Cluster::start(Options { controllers: false, ..Options::default() }).unwrap();
    for namespace in [NAMESPACE, "bookinfo"] {
        cluster.kubectl(["create", "namespace", namespace]).unwrap();
    }
    cluster.apply_istio_crds().unwrap();
    let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds");
    cluster.apply_crds(&crds.join("onboardingpolicies.yaml")).unwrap();
    cluster.apply_crds(&crds.join("controlplanes.yaml")).unwrap();
    token_keys(&cluster).await;
    refusals_and_policies(&cluster).await;
    one_leads_and_the_others_know_who_is_there(&cluster).await;
}

async fn token_keys(cluster: &Cluster) {
    let client = admin(cluster).await;
    let (one, two) = (SecretKeyStore::new(client.clone(), NAMESPACE), SecretKeyStore::new(client.clone(), NAMESPACE));
    assert_eq!(one.load().await.unwrap(), (Vec::new(), 0));
    let (first, second) = tokio::join!(one.store(0, b"one"), two.store(0, b"two"));
    let version = match (first, second) {
        (Ok(version), Err(RegistryError::Conflict)) | (Err(RegistryError::Conflict), Ok(version)) => version,
        both => panic!("{both:?}"),
    };
    let (keys, loaded) = two.load().await.unwrap();
    assert!(loaded == version && (keys == b"one" || keys == b"two"));
    cluster.kubectl(["label", "secret", TOKEN_KEYS, "-n", NAMESPACE, "whose=ours"]).unwrap();
    assert!(matches!(one.store(version, b"three").await, Err(RegistryError::Conflict)), "it was touched");
    let (_, version) = one.load().await.unwrap();
    let newer = one.store(version, b"\0three").await.unwrap();
    assert!(newer > version);
    assert!(matches!(two.store(version, b"four").await, Err(RegistryError::Conflict)));
    assert_eq!(two.load().await.unwrap(), (b"\0three".to_vec(), newer));
    let secrets: Api<Secret> = Api::namespaced(client, NAMESPACE);
    assert_eq!(secrets.get(TOKEN_KEYS).await.unwrap().metadata.labels.unwrap()["whose"], "ours");
}

/// So many live registrations of one subject.
struct Registrations(usize);

#[async_trait]
impl Registry for Registrations {
    async fn load(&self, _: &RegistrationName) -> Result<Stored, RegistryError> {
        Ok(Stored { state: State::Absent, version: 0 })
    }
    async fn store(&self, _: &RegistrationName, _: u64, _: &State) -> Result<u64, RegistryError> {
        Err(RegistryError::Conflict)
    }
    async fn list(&self) -> Result<Vec<(RegistrationName, Stored)>, RegistryError> {
        let all = (0..self.0).map(|n| {
            let name = RegistrationName { namespace: "bookinfo".to_owned(), name: format!("ratings-{n}") };
            (name, Stored { state: State::Live(Box::new(live())), version: 1 })
        });
        Ok(all.collect())
    }
}

fn proven(value: &str) -> Fact<String> {
    Proven::by_attestor(value.to_owned()).into()
}

fn live() -> Live {
    let identity = Identity::Jwt(JwtIdentity {
        issuer: proven("https://mycompany.corp"),
        subject: proven("vm007"),
        attributes: [].into(),
    });
    Live {
        group: GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() },
        attested: Attested { identity, issuer_short_name: Some("my-corp".to_owned()), replay: Replay::Forever },
        key: KeyMemory { thumbprint: "ab".repeat(32).parse().unwrap(), replay: Replay::Forever },
        report: HostReport::default(),
        created_at: Timestamp::UNIX_EPOCH,
        token_expires_at: Timestamp::MAX,
        connection: Connection::Disconnected {
            since: Timestamp::UNIX_EPOCH,
            reason: DisconnectReason::NotYetConnected,
        },
        health: Health { ready: true, message: String::new() },
        health_since: Timestamp::UNIX_EPOCH,
    }
}

fn policy(name: &str, issuer: &str) -> String {
    format!(
        "apiVersion: authorization.onboarding.tetrate.io/v1alpha1\nkind: OnboardingPolicy\nmetadata: {{name: {name}, namespace: bookinfo}}\n\
         spec: {{allow: [{{workloads: [{{jwt: {{issuer: {issuer}}}}}], onboardTo: [{{workloadGroupSelector: {{}}}}]}}]}}\n---\n"
    )
}

async fn refusals_and_policies(cluster: &Cluster) {
    let client = admin(cluster).await;
    let (stop, mut metrics) = (CancellationToken::new(), Metrics::default());
    let (source, source_task) =
        source::start(client.clone(), source::Options::new(NAMESPACE), &mut metrics, stop.clone());
    let (events, events_task) =
        notices::start(client.clone(), source.cluster(), "replica-1".to_owned(), &mut metrics, stop.clone());
    let leads = watch::Sender::new(false);
    let status_task =
        policies::start(client.clone(), &source, Arc::new(Registrations(7)), leads.subscribe(), stop.clone());
    let group = "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata: {name: ratings, namespace: bookinfo}\nspec: {template: {}}\n---\n";
    cluster
        .apply(
            &(group.to_owned() + &policy("admits", "https://mycompany.corp") + &policy("other", "https://a.example")),
        )
        .unwrap();
    let mut view = source.cluster();
    let seen = view.wait_for(|view| view.groups.len() == 1 && view.policies.len() == 2);
    tokio::time::timeout(WITHIN, seen).await.unwrap().unwrap();

    // The same again and again is one Event; another one is another.
    let refused = |group: &str, message: &str| Refused {
        group: GroupName { namespace: "bookinfo".to_owned(), name: group.to_owned() },
        identity: Some(r#"{"aws":{"account":"123456789012"}}"#.to_owned()),
        reason: "NotAuthorized",
        message: message.to_owned(),
    };
    for _ in 0..50 {
        events.refused(refused("ratings", "no policy admits it"));
        events.refused(refused("nothing", "no such group"));
    }
    events.refused(refused("ratings", "something else"));
    let api: Api<Event> = Api::namespaced(client.clone(), "bookinfo");
    let written =
        until("the Events", async || api.list(&ListParams::default()).await.unwrap().items, |events| events.len() >= 2)
            .await;
    assert_eq!(written.len(), 2);
    let again = written.iter().find(|event| event.note.as_ref().unwrap().ends_with("no policy admits it")).unwrap();
    assert_eq!(again.note.as_deref(), Some(r#"{"aws":{"account":"123456789012"}}: no policy admits it"#));
    assert_eq!((again.type_.as_deref(), again.reason.as_deref()), (Some("Warning"), Some("NotAuthorized")));
    assert_eq!(again.reporting_instance.as_deref(), Some("replica-1"));
    let described = cluster.kubectl(["describe", "workloadgroup", "ratings", "-n", "bookinfo"]).unwrap();
    assert!(described.contains("NotAuthorized") && described.contains("no policy admits it"), "{described}");

    // Only the leader writes.
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), "bookinfo", &names::onboarding_policy());
    assert!(api.get("admits").await.unwrap().data.get("status").is_none());
    leads.send_replace(true);
    let status = async |name: &str| api.get(name).await.unwrap().data["status"].clone();
    let admits = until("a status", async || status("admits").await, |status| status["workloads"] == 7).await;
    assert_eq!(admits["conditions"][0]["type"], "Accepted");
    assert_eq!(admits["conditions"][0]["status"], "True");
    assert_eq!(admits["observedGeneration"], 1);
    until("a status", async || status("other").await, |status| status["workloads"] == 0).await;
    let table = cluster.kubectl(["get", "op", "-n", "bookinfo"]).unwrap();
    assert!(table.contains("ACCEPTED") && table.contains("WORKLOADS"), "{table}");
    // What is written is no reason to write again.
    let version = api.get("admits").await.unwrap().metadata.resource_version;
    cluster.kubectl(["delete", "op", "other", "-n", "bookinfo"]).unwrap();
    cluster.apply(&policy("third", "https://mycompany.corp")).unwrap();
    until("a status", async || status("third").await, |status| status["workloads"] == 0).await;
    assert_eq!(api.get("admits").await.unwrap().metadata.resource_version, version);

    stop.cancel();
    for task in [source_task, events_task, status_task] {
        tokio::time::timeout(WITHIN, task).await.unwrap().unwrap().unwrap();
    }
}

async fn one_leads_and_the_others_know_who_is_there(cluster: &Cluster) {
    let leases: Api<Lease> = Api::namespaced(admin(cluster).await, NAMESPACE);
    let names = async || {
        let mut names: Vec<_> =
            leases.list(&ListParams::default()).await.unwrap().into_iter().filter_map(|it| it.metadata.name).collect();
        names.sort();
        names
    };
    let (a, b, c) =
        (Replica::start(cluster, "a").await, Replica::start(cluster, "b").await, Replica::start(cluster, "c").await);
    for replica in [&a, &b, &c] {
        until("three replicas", async || replica.fleet.others().len(), |others| *others == 2).await;
    }
    assert!(!a.fleet.is_there("never"));
    until("a leader", async || [&a, &b, &c].map(Replica::leads), |leads| leads.iter().any(|leads| *leads)).await;
    let mut all = vec![a, b, c];
    assert_eq!(all.iter().filter(|it| it.leads()).count(), 1);
    assert_eq!(names().await, [LEADER, "onboarding-plane-a", "onboarding-plane-b", "onboarding-plane-c"]);

    // The leader stops in order: another leads at once, and knows that it is gone.
    let leader = all.swap_remove(all.iter().position(Replica::leads).unwrap());
    let name = leader.fleet.others();
    let name = ["a", "b", "c"].into_iter().find(|it| !name.contains(*it)).unwrap();
    let began = Instant::now();
    leader.end().await;
    until("a leader", async || all.iter().filter(|it| it.leads()).count(), |count| *count == 1).await;
    assert!(began.elapsed() < fleet::LASTS, "it waited for a Lease that was released: {:?}", began.elapsed());
    until("one less", async || all.iter().any(|it| it.fleet.is_there(name)), |there| !there).await;

    // The leader is killed: the other one waits until its Lease has run out, and leads.
    let leader = all.swap_remove(all.iter().position(Replica::leads).unwrap());
    let last = all.pop().unwrap();
    let mut told = last.fleet.leads();
    told.mark_unchanged();
    let began = Instant::now();
    leader.kill().await;
    until("the last one leads", async || last.leads(), |leads| *leads).await;
    assert!(began.elapsed() > fleet::LASTS - Duration::from_secs(6), "{:?}", began.elapsed());
    assert!(told.has_changed().unwrap());
    until("nobody else", async || last.fleet.others().len(), |others| *others == 0).await;

    // The API server goes: who leads stops in time, and comes back.
    cluster.kill_api().unwrap();
    until("it leads no more", async || last.leads(), |leads| !leads).await;
    cluster.start_api().unwrap();
    until("it leads again", async || last.leads(), |leads| *leads).await;
    // Somebody deletes its Lease: it is made again.
    cluster.kubectl(["delete", "lease", "--all", "-n", NAMESPACE]).unwrap();
    let own = last.fleet.others();
    assert!(own.is_empty());
    until("its Leases", names, |names| names.len() == 2).await;
    until("it leads again", async || last.leads(), |leads| *leads).await;
    last.end().await;
    let left = leases.list(&ListParams::default()).await.unwrap().items;
    assert!(left.iter().all(|it| it.metadata.name.as_deref() == Some(LEADER)), "{left:?}");
    assert!(left[0].spec.as_ref().unwrap().holder_identity.is_none());
}
