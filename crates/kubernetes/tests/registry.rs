//! The registry against a real API server, with the garbage collector: what replicas make of each other's writes, of half-done ends, and of
//! people with kubectl.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(clippy::print_stdout, reason = "how far it is, and how long it took")]

use futures_util::StreamExt;
use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client};
use onboarding_core::group::WorkloadGroup;
use onboarding_core::identity::{Attested, Replay, Thumbprint};
use onboarding_core::name::{GroupName, RegistrationName, registration_name};
use onboarding_core::registration::{
    ConnectedOver, Connection, DisconnectReason, Ended, Event, Health, HostAddress, HostReport, KeyMemory, Live,
    NOT_UP, Refusal, State, admits_key, step,
};
use onboarding_endpoint::backend::{Registry, RegistryError, Stored};
use onboarding_kubernetes::names;
use onboarding_kubernetes::registry::groups::{GroupObject, Groups};
use onboarding_kubernetes::registry::{KubernetesRegistry, Options, start};
use onboarding_testkit::cluster::{self, Cluster};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Of anything that is waited for here; the machine may be busy.
const WITHIN: Duration = Duration::from_secs(60);
/// The planes' namespace.
const PLANE: &str = "istio-system";
/// Another, of which a plane of [`PLANE`] knows nothing.
const ELSEWHERE: &str = "elsewhere";
const LEASE: &str = "onboarding.tetrate.io/lease";

/// One API server for all of these, each in a namespace of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn registrations_in_a_cluster() {
    let cluster = Cluster::start(cluster::Options::default()).unwrap();
    cluster.apply_istio_crds().unwrap();
    let crd = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds/workloadautoregistrations.yaml");
    cluster.apply_crds(&crd).unwrap();
    for namespace in [PLANE, ELSEWHERE] {
        cluster.kubectl(["create", "namespace", namespace]).unwrap();
    }
    what_is_stored_is_what_another_replica_reads(&cluster).await;
    a_store_that_was_decided_on_old_knowledge_is_a_conflict(&cluster).await;
    of_two_first_keys_one_wins(&cluster).await;
    an_end_is_remembered_and_binds_the_next(&cluster).await;
    an_end_that_was_left_half_done_is_finished_by_another(&cluster).await;
    a_registration_made_without_knowing_an_end_is_taken_back(&cluster).await;
    what_people_delete_is_told_and_remembered(&cluster).await;
    owners_clean_up(&cluster).await;
    edits_of_others_survive_and_nothing_is_written_twice(&cluster).await;
    a_group_reaches_its_entries(&cluster).await;
    what_no_plane_made_is_left_alone(&cluster).await;
    an_entry_is_put_back_and_says_when_it_cannot_be_made(&cluster).await;
    many_come_and_go(&cluster).await;
    the_api_server_goes_and_comes(&cluster).await;
}

/// As a user of the cluster, or as its administrator.
async fn client(cluster: &Cluster, user: Option<&str>) -> Client {
    let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig()).unwrap();
    let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    config.default_retry = false;
    config.auth_info.impersonate = user.map(str::to_owned);
    Client::try_from(config).unwrap()
}

/// One replica.
struct Plane {
    registry: Arc<KubernetesRegistry>,
    groups: watch::Sender<Arc<Groups>>,
    metrics: prometheus_client::registry::Registry,
    stop: CancellationToken,
    task: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Plane {
    async fn start(client: Client, namespace: &str, groups: &Groups) -> Self {
        let (groups, receiver) = watch::channel(Arc::new(groups.clone()));
        let stop = CancellationToken::new();
        let mut metrics = prometheus_client::registry::Registry::default();
        let options = Options { namespace: namespace.to_owned() };
        let (registry, task) = start(client, options, receiver, &mut metrics, stop.clone());
        registry.listed(WITHIN).await.unwrap();
        Self { registry, groups, metrics, stop, task: Some(task) }
    }

    async fn stop(mut self) {
        self.stop.cancel();
        self.task.take().unwrap().await.unwrap().unwrap();
    }

    /// Until a load gives what is wanted.
    async fn until(&self, name: &RegistrationName, what: &str, good: impl Fn(&Stored) -> bool) -> Stored {
        let deadline = Instant::now() + WITHIN;
        loop {
            match self.registry.load(name).await {
                Ok(stored) if good(&stored) => return stored,
                last => assert!(Instant::now() < deadline, "{what} never came: {last:?}"),
            }
            pause().await;
        }
    }

    async fn store_live(&self, name: &RegistrationName, live: &Live) -> u64 {
        let stored = self.registry.load(name).await.unwrap();
        self.registry.store(name, stored.version, &State::Live(Box::new(live.clone()))).await.unwrap()
    }

    /// As the endpoint does: decides again where somebody was first, and comes again where the API server can't take more.
    async fn insist(&self, name: &RegistrationName, next: impl Fn(&Stored) -> State) -> u64 {
        let deadline = Instant::now() + WITHIN;
        loop {
            let result = match self.registry.load(name).await {
                Ok(stored) => self.registry.store(name, stored.version, &next(&stored)).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(version) => return version,
                Err(error) => assert!(Instant::now() < deadline, "{name}: {error}"),
            }
            pause().await;
        }
    }

    async fn live(&self, name: &RegistrationName) -> (Live, u64) {
        let stored = self.registry.load(name).await.unwrap();
        match stored.state {
            State::Live(live) => (*live, stored.version),
            other => panic!("{name} is {other:?}"),
        }
    }

    /// How many requests of a kind were made.
    fn requests(&self, request: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.metrics).unwrap();
        let line = format!("onboarding_registry_api_requests_total{{request=\"{request}\",");
        let counts = text.lines().filter(|found| found.starts_with(&line)).filter_map(|found| found.rsplit(' ').next());
        counts.map(|count| count.parse::<u64>().unwrap()).sum()
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Between two looks at something that is waited for.
async fn pause() {
    tokio::time::sleep(Duration::from_millis(20)).await;
}

/// A namespace with one WorkloadGroup, as people would have made it.
struct Home {
    client: Client,
    namespace: String,
    groups: Groups,
}

impl Home {
    async fn new(cluster: &Cluster, namespace: &str) -> Self {
        println!("{namespace}");
        cluster.kubectl(["create", "namespace", namespace]).unwrap();
        let client = client(cluster, None).await;
        let mut home = Self { client, namespace: namespace.to_owned(), groups: Groups::new() };
        home.make_group().await;
        home
    }

    async fn make_group(&mut self) {
        let object: DynamicObject = serde_json::from_value(json!({
            "apiVersion": "networking.istio.io/v1",
            "kind": "WorkloadGroup",
            "metadata": {"name": "ratings", "namespace": self.namespace},
            "spec": {"template": {"serviceAccount": "ratings-vm"}},
        }))
        .unwrap();
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &self.namespace, &names::workload_group());
        let object = api.create(&PostParams::default(), &object).await.unwrap();
        let labels = [("app", "ratings"), ("istio.io/rev", "x")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        let group = WorkloadGroup {
            name: self.group(),
            labels: [].into(),
            workload_labels: labels.into(),
            workload_annotations: [].into(),
            service_account: "ratings-vm".to_owned(),
            network: Some("virtual-machines".to_owned()),
            locality: None,
            weight: None,
            ports: [("http".to_owned(), 8080)].into(),
            address: None,
            probe: None,
        };
        let uid = object.metadata.uid.unwrap();
        self.groups.insert(self.group(), GroupObject { group: Arc::new(group), uid, generation: 1 });
    }

    fn group(&self) -> GroupName {
        GroupName { namespace: self.namespace.clone(), name: "ratings".to_owned() }
    }

    /// The groups after a change of this one.
    fn changed(&self, change: impl FnOnce(&mut WorkloadGroup)) -> Arc<Groups> {
        let mut groups = self.groups.clone();
        let object = groups.get_mut(&self.group()).unwrap();
        change(Arc::make_mut(&mut object.group));
        object.generation += 1;
        Arc::new(groups)
    }

    async fn plane(&self) -> Plane {
        Plane::start(self.client.clone(), PLANE, &self.groups).await
    }

    fn wars(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.namespace, &names::workload_auto_registration())
    }
    fn entries(&self) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &self.namespace, &names::workload_entry())
    }

    /// What is remembered of a name, if anything.
    async fn memory(&self, name: &RegistrationName) -> Option<ConfigMap> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), PLANE);
        let list = ListParams::default().labels("onboarding.tetrate.io/memory=registration");
        let all = api.list(&list).await.unwrap().items;
        all.into_iter().find(|it| {
            let data = it.data.as_ref().unwrap();
            data["namespace"] == name.namespace && data["name"] == name.name
        })
    }

    /// A registration of the host with this number, as the core makes it.
    fn live(&self, host: u32, key: u8) -> (RegistrationName, Live) {
        let identity = json!({"aws": {
            "partition": "aws", "account": "123456789012", "region": "us-east-2", "zone": "us-east-2b",
            "ec2": {"instanceId": format!("i-{host:017x}"), "iamRole": {"name": "ratings-role"}},
        }});
        // Claimed, not proven: it must not become more by being stored.
        let claimed = ["aws.ec2.iamRole".to_owned()];
        let identity = onboarding_kinds::identity::from_json(&identity, &claimed).unwrap();
        let now = Timestamp::now();
        let live = Live {
            group: self.group(),
            attested: Attested { identity, issuer_short_name: None, replay: Replay::Forever },
            key: key_memory(key),
            report: HostReport {
                agent_version: "0.1.0".to_owned(),
                addresses: vec![HostAddress { ip: [10, 0, 0, 4].into(), kind: ConnectedOver::Vpc }],
                labels: [("version".to_owned(), "v3".to_owned())].into(),
                ..HostReport::default()
            },
            created_at: now,
            token_expires_at: now + SignedDuration::from_hours(1),
            connection: Connection::Disconnected { since: now, reason: DisconnectReason::NotYetConnected },
            health: Health { ready: false, message: NOT_UP.to_owned() },
        };
        (registration_name(&live.group, &live.attested.identity, None).unwrap(), live)
    }

    /// How many there are, without reading them.
    async fn count(&self, api: &Api<DynamicObject>) -> usize {
        let one = api.list_metadata(&ListParams::default().limit(1)).await.unwrap();
        one.items.len() + usize::try_from(one.metadata.remaining_item_count.unwrap_or_default()).unwrap()
    }

    /// Until the object is as wanted; `None`: it isn't there.
    async fn until(
        &self,
        api: &Api<DynamicObject>,
        name: &RegistrationName,
        what: &str,
        good: impl Fn(Option<&Value>) -> bool,
    ) -> Option<Value> {
        let deadline = Instant::now() + WITHIN;
        loop {
            let object = api.get_opt(&name.name).await.unwrap().map(|it| serde_json::to_value(it).unwrap());
            if good(object.as_ref()) {
                return object;
            }
            assert!(Instant::now() < deadline, "{what} never came: {object:#?}");
            pause().await;
        }
    }
    async fn until_entry(&self, name: &RegistrationName, what: &str, good: impl Fn(&Value) -> bool) -> Value {
        self.until(&self.entries(), name, what, |entry| entry.is_some_and(&good)).await.unwrap()
    }
    async fn until_war(&self, name: &RegistrationName, what: &str, good: impl Fn(&Value) -> bool) -> Value {
        self.until(&self.wars(), name, what, |war| war.is_some_and(&good)).await.unwrap()
    }
    async fn until_gone(&self, api: &Api<DynamicObject>, name: &RegistrationName) {
        self.until(api, name, "its end", |object| object.is_none()).await;
    }
}

fn key_memory(key: u8) -> KeyMemory {
    KeyMemory { thumbprint: Thumbprint([key; 32]), replay: Replay::Forever }
}

fn connected(live: &Live, session: &str) -> Live {
    let connection = Connection::Connected {
        replica: "onboarding-plane-1".to_owned(),
        session: session.to_owned(),
        since: Timestamp::now(),
    };
    Live { connection, ..live.clone() }
}

fn ready(live: &Live) -> Live {
    Live { health: Health { ready: true, message: String::new() }, ..live.clone() }
}

fn live_state(live: &Live) -> State {
    State::Live(Box::new(live.clone()))
}

fn ended(key: Option<u8>) -> State {
    State::Ended(Ended { key: key.map(key_memory), at: Timestamp::now() })
}

fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    object["status"]["conditions"].as_array()?.iter().find(|it| it["type"] == kind)
}

fn has(object: &Value, kind: &str, status: &str) -> bool {
    condition(object, kind).is_some_and(|it| it["status"] == status)
}

async fn what_is_stored_is_what_another_replica_reads(cluster: &Cluster) {
    let home = Home::new(cluster, "stored").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let mut changes = b.registry.changes();
    let (name, live) = home.live(1, 1);
    a.store_live(&name, &live).await;
    assert_eq!(a.live(&name).await.0, live, "what was stored is what is read, on this replica at once");
    assert_eq!(changes.next().await.unwrap(), name);
    assert_eq!(b.live(&name).await.0, live);

    // Its entry is there, and gets no requests yet: without the condition it is unhealthy.
    let entry = home.until_entry(&name, "the entry", |_| true).await;
    assert_eq!(entry["metadata"]["annotations"]["proxy.istio.io/health-checks-enabled"], "true");
    assert!(condition(&entry, "Healthy").is_none(), "{entry:#}");
    assert_eq!(entry["spec"]["address"], "10.0.0.4");
    assert_eq!(entry["spec"]["labels"], json!({"app": "ratings", "istio.io/rev": "x", "version": "v3"}));
    assert_eq!(
        entry["metadata"]["labels"].get("istio.io/rev"),
        None,
        "which istiod sees it isn't for a workload to say"
    );
    assert_eq!(entry["spec"]["serviceAccount"], "ratings-vm");
    assert_eq!(entry["spec"]["network"], "virtual-machines");
    assert_eq!(entry["spec"]["ports"], json!({"http": 8080}));
    assert_eq!(entry["spec"]["locality"], "us-east-2/us-east-2b");

    // Another replica goes on with it.
    let (read, version) = b.live(&name).await;
    let now = live_state(&ready(&connected(&read, "session-1")));
    let newer = b.registry.store(&name, version, &now).await.unwrap();
    assert!(newer > version);
    a.until(&name, "the session", |stored| stored.state == now).await;
    home.until_entry(&name, "health", |entry| has(entry, "Healthy", "True")).await;
    let war = home.until_war(&name, "the connection", |war| has(war, "AgentConnected", "True")).await;
    assert_eq!(war["status"]["activeAgentConnection"]["connectedTo"], "onboarding-plane-1");
    assert_eq!(
        war["spec"]["identity"]["aws"]["ec2"],
        json!({"instanceId": "i-00000000000000001"}),
        "only what was proven"
    );
    assert_eq!(war["metadata"]["ownerReferences"][0]["uid"], home.groups[&home.group()].uid.as_str());
    assert!(has(&war, "UpToDate", "True"), "{war:#}");

    // It gets worse, and is lost.
    let (read, version) = a.live(&name).await;
    let lost = Live {
        connection: Connection::Disconnected { since: Timestamp::now(), reason: DisconnectReason::PlaneRestarted },
        health: Health { ready: false, message: "the probe says 503".to_owned() },
        ..read
    };
    a.registry.store(&name, version, &live_state(&lost)).await.unwrap();
    b.until(&name, "the loss", |stored| stored.state == live_state(&lost)).await;
    home.until_entry(&name, "ill health", |entry| has(entry, "Healthy", "False")).await;
    let listed = b.registry.list().await.unwrap();
    assert_eq!(listed.iter().filter(|(listed, _)| *listed == name).count(), 1);
    // A replica that starts now reads the same.
    let c = home.plane().await;
    assert_eq!(c.live(&name).await.0, lost);

    // One that registers and never connects says so after a while.
    let (name, live) = home.live(2, 1);
    a.store_live(&name, &live).await;
    let war = home.until_war(&name, "its status", |war| has(war, "AgentConnected", "False")).await;
    assert_eq!(condition(&war, "AgentConnected").unwrap()["reason"], "AgentNotYetConnected");
    b.until(&name, "its status", |stored| json!(stored.version.to_string()) == war["metadata"]["resourceVersion"])
        .await;
    assert_eq!(b.live(&name).await.0, live, "which changes nothing");
}

async fn a_store_that_was_decided_on_old_knowledge_is_a_conflict(cluster: &Cluster) {
    let home = Home::new(cluster, "conflict").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let (name, live) = home.live(1, 1);
    let version = a.store_live(&name, &live).await;
    b.until(&name, "the registration", |stored| stored.version == version).await;
    let [by_a, by_b, by_c] = ["a", "b", "c"].map(|session| live_state(&connected(&live, session)));
    let newer = a.registry.store(&name, version, &by_a).await.unwrap();
    let refused = b.registry.store(&name, version, &by_b).await;
    assert!(matches!(refused, Err(RegistryError::Conflict)), "{refused:?}");
    // What is loaded after a conflict is what was written, without waiting for an informer.
    let stored = b.registry.load(&name).await.unwrap();
    assert_eq!((stored.version, &stored.state), (newer, &by_a));
    b.registry.store(&name, newer, &by_b).await.unwrap();
    // The same for its end.
    let refused = a.registry.store(&name, newer, &ended(Some(1))).await;
    assert!(matches!(refused, Err(RegistryError::Conflict)), "{refused:?}");
    assert_eq!(a.registry.load(&name).await.unwrap().state, by_b);
    let refused = a.registry.store(&name, 0, &by_c).await;
    assert!(matches!(refused, Err(RegistryError::Conflict)), "{refused:?}");
}

async fn of_two_first_keys_one_wins(cluster: &Cluster) {
    let home = Home::new(cluster, "first-keys").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let races = (0..20).map(|host| {
        let ((name, one), (_, two)) = (home.live(host, 1), home.live(host, 2));
        let (a, b) = (&a, &b);
        async move {
            let (one, two) = (live_state(&one), live_state(&two));
            let (by_a, by_b) = tokio::join!(a.registry.store(&name, 0, &one), b.registry.store(&name, 0, &two));
            let winner = match (by_a, by_b) {
                (Ok(_), Err(RegistryError::Conflict)) => one,
                (Err(RegistryError::Conflict), Ok(_)) => two,
                other => panic!("{name}: {other:?}"),
            };
            // The loser decides again, and finds the other's key.
            for plane in [a, b] {
                plane.until(&name, "the winner's key", |stored| stored.version != 0).await;
                assert_eq!(plane.registry.load(&name).await.unwrap().state, winner, "{name}");
            }
        }
    });
    join_all(races).await;
}

async fn an_end_is_remembered_and_binds_the_next(cluster: &Cluster) {
    let home = Home::new(cluster, "remembered").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let (name, live) = home.live(1, 1);
    let version = a.store_live(&name, &live).await;
    home.until_entry(&name, "the entry", |_| true).await;
    let end = ended(Some(1));
    let version = a.registry.store(&name, version, &end).await.unwrap();
    assert_eq!(a.registry.load(&name).await.unwrap().state, end, "at once");
    home.until_gone(&home.entries(), &name).await;
    home.until_gone(&home.wars(), &name).await;
    for plane in [&a, &b] {
        let stored = plane.until(&name, "its memory", |stored| stored.state == end && stored.version > version).await;
        assert!(admits_key(&stored.state, Thumbprint([2; 32]), Replay::Forever, Timestamp::now()).is_err());
    }
    let listed = a.registry.list().await.unwrap();
    assert!(listed.iter().any(|(listed, stored)| *listed == name && stored.state == end));

    // The same key comes back, on the other replica; the memory stays behind the new registration.
    let (_, again) = home.live(1, 1);
    b.store_live(&name, &again).await;
    a.until(&name, "its return", |stored| stored.state == live_state(&again)).await;
    let c = home.plane().await;
    assert_eq!(c.live(&name).await.0, again);

    // It ends again, and is registered anew before, or while, what is left of it is cleaned up.
    let (_, version) = a.live(&name).await;
    a.registry.store(&name, version, &ended(Some(1))).await.unwrap();
    let third = live_state(&home.live(1, 1).1);
    a.insist(&name, |stored| {
        assert!(matches!(stored.state, State::Ended(_)), "{stored:?}");
        third.clone()
    })
    .await;
    b.until(&name, "the third", |stored| stored.state == third).await;

    // Operators say that any key may come, of one that ended; then it is forgotten.
    let (_, version) = b.live(&name).await;
    b.registry.store(&name, version, &ended(Some(1))).await.unwrap();
    home.until_gone(&home.wars(), &name).await;
    a.until(&name, "its end", |stored| matches!(stored.state, State::Ended(_))).await;
    let any_key = ended(None);
    a.insist(&name, |stored| {
        assert!(step(&stored.state, Event::Delete, Timestamp::now(), Duration::ZERO).is_ok());
        any_key.clone()
    })
    .await;
    let stored = b.until(&name, "any key", |stored| stored.state == any_key).await;
    assert_eq!(b.registry.store(&name, stored.version, &State::Absent).await.unwrap(), 0);
    assert_eq!(b.registry.load(&name).await.unwrap().version, 0);
    a.until(&name, "forgetting", |stored| stored.state == State::Absent && stored.version == 0).await;
    assert!(home.memory(&name).await.is_none());
}

/// What each account may do: all but the next step.
const HALF: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: no-memory}
rules:
- apiGroups: ['*']
  resources: [workloadautoregistrations, workloadautoregistrations/status, workloadentries, workloadentries/status]
  verbs: ['*']
- {apiGroups: [''], resources: [configmaps], verbs: [get, list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: no-delete}
rules:
- apiGroups: ['*']
  resources: [workloadautoregistrations, workloadautoregistrations/status]
  verbs: [get, list, watch, create, update, patch]
- {apiGroups: ['*'], resources: [workloadentries, workloadentries/status], verbs: ['*']}
- {apiGroups: [''], resources: [configmaps], verbs: ['*']}
";

/// Replicas that die in the middle: their accounts may not do the next step.
async fn an_end_that_was_left_half_done_is_finished_by_another(cluster: &Cluster) {
    let home = Home::new(cluster, "half-done").await;
    cluster.apply(HALF).unwrap();
    for user in ["no-memory", "no-delete"] {
        let (role, subject) = (format!("--clusterrole={user}"), format!("--user={user}"));
        cluster.kubectl(["create", "clusterrolebinding", user, &role, &subject]).unwrap();
    }
    for (host, user, remembered) in [(1, "no-memory", false), (2, "no-delete", true)] {
        let dying = Plane::start(client(cluster, Some(user)).await, PLANE, &home.groups).await;
        let (name, live) = home.live(host, 1);
        let version = dying.store_live(&name, &live).await;
        let end = ended(Some(1));
        dying.registry.store(&name, version, &end).await.unwrap();
        // The entry goes before what it may not do.
        home.until_gone(&home.entries(), &name).await;
        if remembered {
            let deadline = Instant::now() + WITHIN;
            while home.memory(&name).await.is_none() {
                assert!(Instant::now() < deadline, "{user}: the memory never came");
                pause().await;
            }
        }
        dying.stop().await;
        assert_eq!(home.memory(&name).await.is_some(), remembered, "{user}");
        let war = home.until_war(&name, "the war that ended", |_| true).await;
        assert!(war["metadata"]["annotations"][LEASE].as_str().unwrap().contains("\"ended\""));
        // Whoever comes next knows that it ended, before and after it has finished it.
        let next = home.plane().await;
        assert_eq!(next.registry.load(&name).await.unwrap().state, end, "{user}");
        home.until_gone(&home.wars(), &name).await;
        let stored = next.until(&name, "its memory", |stored| stored.state == end).await;
        assert!(home.memory(&name).await.is_some(), "{user}");
        let refused = admits_key(&stored.state, Thumbprint([2; 32]), Replay::Forever, Timestamp::now());
        assert!(matches!(refused, Err(Refusal::AnotherKey { .. })));
        drop(next);

        // One that comes back while it is half done: `store` does what is left first, beside the reconciler.
        let half = Plane::start(client(cluster, Some(user)).await, PLANE, &home.groups).await;
        half.insist(&name, |_| live_state(&home.live(host, 1).1)).await;
        half.insist(&name, |_| ended(Some(1))).await;
        home.until_gone(&home.entries(), &name).await;
        half.stop().await;
        let brisk = home.plane().await;
        let third = home.live(host, 1).1;
        brisk
            .insist(&name, |stored| {
                assert!(matches!(stored.state, State::Ended(_)), "{stored:?}");
                live_state(&third)
            })
            .await;
        assert_eq!(brisk.live(&name).await.0, third);
    }
}

/// A replica that dies between making a war and looking at what is remembered leaves what one leaves that doesn't know the memory at all.
async fn a_registration_made_without_knowing_an_end_is_taken_back(cluster: &Cluster) {
    let home = Home::new(cluster, "ignorant").await;
    let a = home.plane().await;
    let (name, live) = home.live(1, 1);
    let version = a.store_live(&name, &live).await;
    let end = ended(Some(1));
    a.registry.store(&name, version, &end).await.unwrap();
    home.until_gone(&home.wars(), &name).await;
    let (_, thief) = home.live(1, 2);
    let ignorant = Plane::start(client(cluster, None).await, ELSEWHERE, &home.groups).await;
    ignorant.store_live(&name, &thief).await;
    ignorant.stop().await;
    // Never read as a registration, and gone soon, also where the replica starts only now.
    let b = home.plane().await;
    for plane in [&a, &b] {
        assert_eq!(plane.registry.load(&name).await.unwrap().state, end);
    }
    home.until_gone(&home.wars(), &name).await;
    home.until_gone(&home.entries(), &name).await;
    for plane in [&a, &b] {
        plane.until(&name, "the old memory", |stored| stored.state == end).await;
    }
}

async fn what_people_delete_is_told_and_remembered(cluster: &Cluster) {
    let home = Home::new(cluster, "deleted").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let mut changes = [a.registry.changes(), b.registry.changes()];
    let (name, live) = home.live(1, 1);
    a.store_live(&name, &live).await;
    home.until_entry(&name, "the entry", |_| true).await;
    b.until(&name, "the registration", |stored| stored.version != 0).await;
    let deleted_at = Timestamp::now();
    cluster.kubectl(["delete", "war", &name.name, "-n", &name.namespace]).unwrap();
    for (plane, changes) in [&a, &b].into_iter().zip(&mut changes) {
        tokio::time::timeout(WITHIN, async { while changes.next().await.unwrap() != name {} }).await.unwrap();
        let stored = plane.until(&name, "the deletion", |stored| matches!(stored.state, State::Ended(_))).await;
        let State::Ended(ended) = &stored.state else { unreachable!() };
        assert_eq!(ended.key, None, "any key may come");
        assert!(ended.at.as_second() >= deleted_at.as_second(), "tokens of before are worthless");
    }
    home.until_gone(&home.entries(), &name).await;
    // Both remember the same, once.
    let states = [a.registry.load(&name).await.unwrap().state, b.registry.load(&name).await.unwrap().state];
    assert_eq!(states[0], states[1]);
    let (_, other_key) = home.live(1, 2);
    let other_key = live_state(&other_key);
    b.insist(&name, |_| other_key.clone()).await;
    a.until(&name, "the other key", |stored| stored.state == other_key).await;

    // A finalizer of somebody holds it: it is deleted nevertheless.
    let finalizers = |finalizers: Value| Patch::Merge(json!({"metadata": {"finalizers": finalizers}}));
    home.wars().patch(&name.name, &PatchParams::default(), &finalizers(json!(["example.com/audit"]))).await.unwrap();
    home.wars().delete(&name.name, &DeleteParams::default()).await.unwrap();
    let stored = a.until(&name, "the deletion", |stored| matches!(stored.state, State::Ended(_))).await;
    home.until_gone(&home.entries(), &name).await;
    let held = a.registry.store(&name, stored.version, &other_key).await;
    assert!(matches!(&held, Err(RegistryError::Unavailable(words)) if words.contains("finalizer")), "{held:?}");
    home.wars().patch(&name.name, &PatchParams::default(), &finalizers(json!([]))).await.unwrap();
    home.until_gone(&home.wars(), &name).await;
    a.insist(&name, |_| other_key.clone()).await;
    b.until(&name, "its return", |stored| stored.state == other_key).await;

    // With its group: nobody said that another key may come.
    cluster.kubectl(["delete", "workloadgroup", "ratings", "-n", &name.namespace]).unwrap();
    for plane in [&a, &b] {
        plane.groups.send_replace(Arc::default());
    }
    home.until_gone(&home.wars(), &name).await;
    for plane in [&a, &b] {
        let stored = plane.until(&name, "the end", |stored| matches!(stored.state, State::Ended(_))).await;
        assert!(matches!(&stored.state, State::Ended(end) if end.key == Some(key_memory(2))), "{stored:?}");
    }
}

/// What garbage collection does when no plane is there.
async fn owners_clean_up(cluster: &Cluster) {
    let home = Home::new(cluster, "owners").await;
    let plane = home.plane().await;
    let hosts: Vec<_> = (1..=2).map(|host| home.live(host, 1)).collect();
    for (name, live) in &hosts {
        plane.store_live(name, live).await;
        let entry = home.until_entry(name, "the entry", |_| true).await;
        let war = home.until_war(name, "the war", |_| true).await;
        let owner = &entry["metadata"]["ownerReferences"][0];
        assert_eq!((&owner["kind"], &owner["uid"]), (&json!("WorkloadAutoRegistration"), &war["metadata"]["uid"]));
    }
    plane.stop().await;
    let (first, second) = (&hosts[0].0, &hosts[1].0);
    cluster.kubectl(["delete", "war", &first.name, "-n", &first.namespace]).unwrap();
    home.until_gone(&home.entries(), first).await;
    cluster.kubectl(["delete", "workloadgroup", "ratings", "-n", &second.namespace]).unwrap();
    home.until_gone(&home.wars(), second).await;
    home.until_gone(&home.entries(), second).await;
}

async fn edits_of_others_survive_and_nothing_is_written_twice(cluster: &Cluster) {
    let home = Home::new(cluster, "edits").await;
    let plane = home.plane().await;
    let (name, live) = home.live(1, 1);
    plane.store_live(&name, &live).await;
    let (read, version) = plane.live(&name).await;
    plane.registry.store(&name, version, &live_state(&ready(&connected(&read, "s")))).await.unwrap();
    home.until_entry(&name, "health", |entry| has(entry, "Healthy", "True")).await;

    let edit = json!({"metadata": {"labels": {"team": "red"}, "annotations": {"note": "mine"}}});
    let by_hand = PatchParams { field_manager: Some("kubectl".to_owned()), ..PatchParams::default() };
    home.wars().patch(&name.name, &by_hand, &Patch::Merge(&edit)).await.unwrap();
    let edit = json!({
        "metadata": {"labels": {"team": "red"}},
        "spec": {"weight": 7, "labels": {"mine": "too"}, "address": "10.9.9.9"},
    });
    home.entries().patch(&name.name, &by_hand, &Patch::Merge(&edit)).await.unwrap();
    // What is ours is put back; the rest stays.
    let entry = home.until_entry(&name, "the address", |entry| entry["spec"]["address"] == "10.0.0.4").await;
    assert_eq!(entry["metadata"]["labels"]["team"], "red");
    assert_eq!((&entry["spec"]["weight"], &entry["spec"]["labels"]["mine"]), (&json!(7), &json!("too")));

    // A change of what decides.
    plane
        .insist(&name, |stored| {
            let State::Live(live) = &stored.state else { panic!("{stored:?}") };
            let mut live = live.clone();
            live.report.labels.insert("version".to_owned(), "v4".to_owned());
            live.token_expires_at += SignedDuration::from_hours(1);
            State::Live(live)
        })
        .await;
    let entry = home.until_entry(&name, "the label", |entry| entry["spec"]["labels"]["version"] == "v4").await;
    assert_eq!((&entry["spec"]["weight"], &entry["spec"]["labels"]["mine"]), (&json!(7), &json!("too")));
    let war = home.until_war(&name, "the war", |_| true).await;
    assert_eq!(war["metadata"]["labels"]["team"], "red");
    assert_eq!(war["metadata"]["annotations"]["note"], "mine");
    assert!(has(&war, "AgentConnected", "True"));

    // Nothing changes: nothing is written.
    let versions = |war: &Value, entry: &Value| [war, entry].map(|it| it["metadata"]["resourceVersion"].clone());
    let before = versions(&war, &entry);
    let counts =
        |plane: &Plane| ["apply entry", "update entry status", "update war status"].map(|it| plane.requests(it));
    let counted = counts(&plane);
    let (read, version) = plane.live(&name).await;
    let same = plane.registry.store(&name, version, &live_state(&read)).await.unwrap();
    assert_eq!(same, version);
    plane.groups.send_replace(home.changed(|_| {}));
    // Another registration goes through the same reconciler afterwards, and a replica starts that looks at all of them.
    let other = home.plane().await;
    let (last, live) = home.live(2, 1);
    plane.store_live(&last, &live).await;
    home.until_entry(&last, "the entry", |_| true).await;
    drop(other);
    let war = home.until_war(&name, "the war", |_| true).await;
    let entry = home.until_entry(&name, "the entry", |_| true).await;
    assert_eq!(versions(&war, &entry), before);
    // The other's entry, once.
    assert_eq!(counts(&plane), [counted[0] + 1, counted[1], counted[2]]);
}

async fn a_group_reaches_its_entries(cluster: &Cluster) {
    let home = Home::new(cluster, "group").await;
    let plane = home.plane().await;
    let hosts: Vec<_> = (1..=20).map(|host| home.live(host, 1)).collect();
    for (name, live) in &hosts {
        plane.store_live(name, live).await;
        plane.insist(name, |_| live_state(&connected(live, "s"))).await;
        home.until_entry(name, "the entry", |_| true).await;
    }
    let started = Instant::now();
    plane.groups.send_replace(home.changed(|group| {
        group.weight = Some(3);
        group.network = None;
        group.ports = [("http".to_owned(), 9090)].into();
        group.locality = Some("here/there".to_owned());
        group.workload_labels.insert("tier".to_owned(), "gold".to_owned());
    }));
    for (name, _) in &hosts {
        let entry = home.until_entry(name, "the weight", |entry| entry["spec"]["weight"] == 3).await;
        let spec = &entry["spec"];
        assert_eq!(spec["network"], Value::Null, "what the group no longer sets is gone");
        assert_eq!(spec["ports"], json!({"http": 9090}));
        assert_eq!(spec["locality"], "here/there");
        assert_eq!((&spec["labels"]["tier"], &spec["labels"]["version"]), (&json!("gold"), &json!("v3")));
    }
    println!("  a change of the group reached {} entries in {:?}", hosts.len(), started.elapsed());
    // What a sidecar takes in only when it starts anew.
    plane.groups.send_replace(home.changed(|group| group.service_account = "other".to_owned()));
    for (name, _) in &hosts {
        home.until_entry(name, "the account", |entry| entry["spec"]["serviceAccount"] == "other").await;
        let war = home.until_war(name, "the condition", |war| has(war, "UpToDate", "False")).await;
        let message = condition(&war, "UpToDate").unwrap()["message"].as_str().unwrap();
        assert!(message.contains("\"other\"") && message.contains("\"ratings-vm\""), "{message}");
    }
    // One reports it, another opens a new session: both have it now.
    plane.registry.boot_applied(&hosts[0].0).await.unwrap();
    plane.insist(&hosts[1].0, |_| live_state(&connected(&hosts[1].1, "later"))).await;
    for (name, _) in &hosts[..2] {
        home.until_war(name, "the condition", |war| has(war, "UpToDate", "True")).await;
    }
}

async fn what_no_plane_made_is_left_alone(cluster: &Cluster) {
    let home = Home::new(cluster, "foreign").await;
    let plane = home.plane().await;
    let (model, live) = home.live(9, 1);
    plane.store_live(&model, &live).await;
    let (name, live) = home.live(1, 1);
    let model = home.until_war(&model, "the war", |_| true).await;
    // What a plane would have made of the other host; each case changes one thing in it.
    let with = |change: &dyn Fn(&mut Value)| {
        let text = json!({
            "apiVersion": model["apiVersion"],
            "kind": model["kind"],
            "spec": model["spec"],
            "metadata": {
                "name": name.name,
                "namespace": home.namespace,
                "annotations": {LEASE: model["metadata"]["annotations"][LEASE]},
                "ownerReferences": model["metadata"]["ownerReferences"],
            },
        });
        let mut war: Value =
            serde_json::from_str(&text.to_string().replace("i-00000000000000009", "i-00000000000000001")).unwrap();
        change(&mut war);
        serde_json::from_value::<DynamicObject>(war).unwrap()
    };
    let drop_metadata = |war: &mut Value, field: &str| drop(war["metadata"].as_object_mut().unwrap().remove(field));
    type Change<'a> = &'a dyn Fn(&mut Value);
    let cases: [(&str, Change<'_>, &str); 6] = [
        ("by hand", &|war| drop_metadata(war, "annotations"), "it has no annotation"),
        (
            "another's annotation",
            &|war| war["metadata"]["annotations"][LEASE] = model["metadata"]["annotations"][LEASE].clone(),
            "is of \"foreign/ratings-",
        ),
        ("no owner", &|war| drop_metadata(war, "ownerReferences"), "isn't owned"),
        (
            "another group's",
            &|war| {
                let lease = &mut war["metadata"]["annotations"][LEASE];
                let text = lease.as_str().unwrap().replace("\"group\":\"ratings\"", "\"group\":\"reviews\"");
                *lease = text.into();
            },
            "isn't owned",
        ),
        (
            "another identity",
            &|war| war["spec"]["identity"]["aws"]["account"] = "999999999999".into(),
            "spec.identity isn't that of its annotation",
        ),
        (
            "no JSON",
            &|war| war["metadata"]["annotations"][LEASE] = "{".into(),
            "its annotation onboarding.tetrate.io/lease",
        ),
    ];
    for (what, change, words) in cases {
        let made = home.wars().create(&PostParams::default(), &with(change)).await.unwrap();
        let deadline = Instant::now() + WITHIN;
        let said = loop {
            match plane.registry.load(&name).await {
                Err(RegistryError::Foreign(said)) => break said,
                other => assert!(Instant::now() < deadline, "{what}: {other:?}"),
            }
            pause().await;
        };
        assert!(said.contains(words), "{what}: {said}");
        assert!(said.contains(&format!("kubectl delete war -n foreign {}", name.name)), "{said}");
        assert!(plane.registry.list().await.unwrap().iter().all(|(listed, _)| *listed != name));
        let refused = plane.registry.store(&name, 0, &live_state(&live)).await;
        assert!(matches!(refused, Err(RegistryError::Foreign(_))), "{what}: {refused:?}");
        // Left as it was; without it the name is free, as if it had never been.
        let now = home.wars().get(&name.name).await.unwrap();
        assert_eq!(now.metadata.resource_version, made.metadata.resource_version, "{what}");
        cluster.kubectl(["delete", "war", "-n", "foreign", &name.name]).unwrap();
        plane.until(&name, "the deletion", |stored| stored.state == State::Absent).await;
    }
    // With nothing changed it is one.
    home.wars().create(&PostParams::default(), &with(&|_| {})).await.unwrap();
    plane.until(&name, "the copy", |stored| matches!(stored.state, State::Live(_))).await;
}

async fn an_entry_is_put_back_and_says_when_it_cannot_be_made(cluster: &Cluster) {
    let home = Home::new(cluster, "entry").await;
    let plane = home.plane().await;
    let (name, live) = home.live(1, 1);
    plane.store_live(&name, &live).await;
    plane.insist(&name, |_| live_state(&ready(&connected(&live, "s")))).await;
    let entry = home.until_entry(&name, "health", |entry| has(entry, "Healthy", "True")).await;
    cluster.kubectl(["delete", "workloadentry", &name.name, "-n", &name.namespace]).unwrap();
    let again = |it: &Value| it["metadata"]["uid"] != entry["metadata"]["uid"] && has(it, "Healthy", "True");
    home.until_entry(&name, "another entry", again).await;

    // Somebody has one by that name.
    let (taken, live) = home.live(2, 1);
    let theirs = format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {}, namespace: entry}}\nspec: {{address: 10.7.7.7}}\n",
        taken.name
    );
    cluster.apply(&theirs).unwrap();
    plane.store_live(&taken, &live).await;
    let war = home.until_war(&taken, "the condition", |war| has(war, "Published", "False")).await;
    let published = condition(&war, "Published").unwrap();
    assert_eq!(published["reason"], "WorkloadEntryNotOurs");
    let message = published["message"].as_str().unwrap();
    assert!(message.contains(&format!("kubectl delete workloadentry -n entry {}", taken.name)), "{message}");
    let entry = home.until_entry(&taken, "the other's entry", |_| true).await;
    assert_eq!(
        (&entry["spec"], &entry["metadata"]["ownerReferences"]),
        (&json!({"address": "10.7.7.7"}), &Value::Null)
    );
    // Who is there is said nevertheless, and what is stored next leaves that condition.
    assert!(has(&war, "AgentConnected", "False"), "{war:#}");
    plane.insist(&taken, |_| live_state(&connected(&live, "s"))).await;
    let war = home.until_war(&taken, "the session", |war| has(war, "AgentConnected", "True")).await;
    assert!(has(&war, "Published", "False"), "{war:#}");
    cluster.kubectl(["delete", "workloadentry", &taken.name, "-n", "entry"]).unwrap();
    home.until_entry(&taken, "our entry", |entry| entry["spec"]["address"] == "10.0.0.4").await;
    home.until_war(&taken, "the condition", |war| has(war, "Published", "True")).await;

    // No address of the kind that it wants.
    let (name, mut live) = home.live(3, 1);
    live.report.connected_over = ConnectedOver::Internet;
    plane.store_live(&name, &live).await;
    let war = home.until_war(&name, "the condition", |war| has(war, "Published", "False")).await;
    assert_eq!(condition(&war, "Published").unwrap()["reason"], "NoAddress");
    assert!(home.entries().get_opt(&name.name).await.unwrap().is_none());
}

async fn many_come_and_go(cluster: &Cluster) {
    const HOSTS: u32 = 300;
    let home = Home::new(cluster, "many").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let hosts: Vec<_> = (0..HOSTS).map(|host| home.live(host, 1)).collect();
    let started = Instant::now();
    for round in 0..2 {
        let joins = hosts.iter().enumerate().map(|(i, (name, live))| {
            let plane = if i % 2 == 0 { &a } else { &b };
            let live = live_state(live);
            async move { plane.insist(name, |_| live.clone()).await }
        });
        join_all(joins).await;
        println!("  round {round}: {HOSTS} registered after {:?}", started.elapsed());
        let deadline = Instant::now() + WITHIN;
        while home.count(&home.entries()).await < HOSTS as usize {
            assert!(Instant::now() < deadline, "the entries never came");
            pause().await;
        }
        println!("  round {round}: {HOSTS} entries after {:?}", started.elapsed());
        join_all(hosts.iter().map(|(name, _)| a.insist(name, |_| ended(Some(1))))).await;
        println!("  round {round}: {HOSTS} ended after {:?}", started.elapsed());
    }
    let deadline = Instant::now() + WITHIN * 2;
    loop {
        match (home.count(&home.wars()).await, home.count(&home.entries()).await) {
            (0, 0) => break,
            (wars, entries) => {
                assert!(Instant::now() < deadline, "{wars} wars and {entries} entries are left");
            }
        }
        pause().await;
    }
    println!("  all gone after {:?}", started.elapsed());
    for plane in [&a, &b] {
        let ended = plane.registry.list().await.unwrap().into_iter().filter(|(name, stored)| {
            name.namespace == "many" && matches!(&stored.state, State::Ended(end) if end.key == Some(key_memory(1)))
        });
        assert_eq!(ended.count(), HOSTS as usize);
    }
}

async fn the_api_server_goes_and_comes(cluster: &Cluster) {
    let home = Home::new(cluster, "outage").await;
    let (a, b) = (home.plane().await, home.plane().await);
    let (name, live) = home.live(1, 1);
    let version = a.store_live(&name, &live).await;
    home.until_entry(&name, "the entry", |_| true).await;
    b.until(&name, "the registration", |stored| stored.version == version).await;
    let mut changes = b.registry.changes();

    cluster.kill_api().unwrap();
    // What is known can be read; what can't be stored isn't, within bounds, and says why.
    assert_eq!(a.live(&name).await, (live.clone(), version));
    let started = Instant::now();
    let refused = a.registry.store(&name, version, &live_state(&connected(&live, "s"))).await;
    assert!(matches!(&refused, Err(RegistryError::Unavailable(words)) if words.contains("API server")), "{refused:?}");
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert_eq!(a.live(&name).await.0, live);
    cluster.start_api().unwrap();

    let version = a.insist(&name, |_| live_state(&connected(&live, "s"))).await;
    b.until(&name, "the session", |stored| stored.version == version).await;
    tokio::time::timeout(WITHIN, async { while changes.next().await.unwrap() != name {} }).await.unwrap();

    // Frozen for a while: connections are open, and nothing answers. A store waits it out where it can.
    cluster.freeze_api(true).unwrap();
    let lost = Live {
        connection: Connection::Disconnected { since: Timestamp::now(), reason: DisconnectReason::ConnectionLost },
        ..a.live(&name).await.0
    };
    let state = live_state(&lost);
    let store = a.registry.store(&name, version, &state);
    let thaw = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        cluster.freeze_api(false).unwrap();
    };
    let (stored, ()) = tokio::join!(store, thaw);
    // It may have been written by a try that was given up, which the next one finds.
    assert!(matches!(stored, Ok(_) | Err(RegistryError::Conflict)), "{stored:?}");
    b.until(&name, "the loss", |stored| stored.state == state).await;

    cluster.kubectl(["delete", "war", &name.name, "-n", &name.namespace]).unwrap();
    a.until(&name, "the deletion", |stored| matches!(&stored.state, State::Ended(end) if end.key.is_none())).await;
}
