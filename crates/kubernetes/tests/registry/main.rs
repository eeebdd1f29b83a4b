//! The registry against a real API server, with the garbage collector: what replicas make of each other's writes, of half-done ends, and of
//! people with kubectl.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(clippy::print_stdout, reason = "how far it is, and how long it took")]

mod crowds;
mod ending;
mod entries;
mod storing;

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
use onboarding_endpoint::backend::{Registry, RegistryError, Snapshot, Stored};
use onboarding_kubernetes::names;
use onboarding_kubernetes::registry::groups::{GroupObject, Groups};
use onboarding_kubernetes::registry::{Behind, BehindReason, KubernetesRegistry, Options, Standing, Standings, start};
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
    storing::what_is_stored_is_what_another_replica_reads(&cluster).await;
    storing::a_store_that_was_decided_on_old_knowledge_is_a_conflict(&cluster).await;
    storing::of_two_first_keys_one_wins(&cluster).await;
    ending::an_end_is_remembered_and_binds_the_next(&cluster).await;
    ending::an_end_that_was_left_half_done_is_finished_by_another(&cluster).await;
    ending::a_registration_made_without_knowing_an_end_is_taken_back(&cluster).await;
    ending::what_people_delete_is_told_and_remembered(&cluster).await;
    ending::owners_clean_up(&cluster).await;
    entries::edits_of_others_survive_and_nothing_is_written_twice(&cluster).await;
    entries::a_group_reaches_its_entries(&cluster).await;
    entries::a_war_says_how_far_its_sidecar_is(&cluster).await;
    entries::a_war_says_which_policy_admits_it(&cluster).await;
    entries::what_no_plane_made_is_left_alone(&cluster).await;
    entries::an_entry_is_put_back_and_says_when_it_cannot_be_made(&cluster).await;
    crowds::many_come_and_go(&cluster).await;
    crowds::the_api_server_goes_and_comes(&cluster).await;
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
    snapshots: watch::Sender<Arc<Snapshot>>,
    metrics: prometheus_client::registry::Registry,
    stop: CancellationToken,
    task: Option<JoinHandle<anyhow::Result<()>>>,
}

impl Plane {
    async fn start(client: Client, namespace: &str, groups: &Groups) -> Self {
        let (groups, receiver) = watch::channel(Arc::new(groups.clone()));
        let (snapshots, admitting) = watch::channel(Arc::default());
        let stop = CancellationToken::new();
        let mut metrics = prometheus_client::registry::Registry::default();
        let options = Options { namespace: namespace.to_owned() };
        let (registry, task) = start(client, options, receiver, admitting, &mut metrics, stop.clone());
        registry.listed(WITHIN).await.unwrap();
        Self { registry, groups, snapshots, metrics, stop, task: Some(task) }
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

    /// The sum of the registry's metrics whose line begins so, and has this in it.
    fn metric(&self, line: &str, with: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.metrics).unwrap();
        let line = format!("onboarding_registry_{line}");
        let found = text.lines().filter(|it| it.starts_with(&line) && it.contains(with));
        found.map(|it| it.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// How many tries to write a war were given up and made again.
    fn retried(&self) -> u64 {
        self.metric("api_requests_total{request=\"update war", "outcome=\"retried\"")
    }

    /// How many requests of each kind were made. What others can see already may not be counted yet: none is under way.
    async fn requests<const N: usize>(&self, kinds: [&str; N]) -> [u64; N] {
        let deadline = Instant::now() + WITHIN;
        while self.metric("api_requests_in_flight ", "") > 0 {
            assert!(Instant::now() < deadline, "requests never end");
            pause().await;
        }
        kinds.map(|kind| self.metric(&format!("api_requests_total{{request=\"{kind}\","), ""))
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
            health_since: now,
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
