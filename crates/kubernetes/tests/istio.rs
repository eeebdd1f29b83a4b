//! Tokens and boot configurations against a real API server, and what the real pilot-agent makes of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

#[path = "../src/istio/fixtures.rs"]
mod fixtures;

use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::api::{Api, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use onboarding_agent::boot::{Address, HeldBoot};
use onboarding_agent::sidecar::{self, Event, IstioWay, Sidecar};
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{SidecarReport as Reported, State};
use onboarding_endpoint::backend::{ProvisionError, Provisioner, Registry, RegistryError, Stored, Workload};
use onboarding_kubernetes::istio::{
    AT_ONCE_ANNOTATION, Account, DEFAULT_REVISION, Inputs, IstioProvisioner, Mesh, Meshes, Namespace, TokenOptions,
    TokenStatus, Tokens,
};
use onboarding_kubernetes::registry::{Standing, Standings};
use onboarding_testkit::cluster::{Cluster, Options};
use onboarding_testkit::eventually::eventually;
use onboarding_testkit::port;
use onboarding_testkit::process::Process;
use onboarding_wire::onboarding as pb;
use prometheus_client::registry::Registry as Metrics;
use serde_json::{Value, json};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Of anything that is waited for here; the machine may be busy.
const WITHIN: Duration = Duration::from_secs(60);

async fn client(kubeconfig: &str) -> kube::Client {
    let kubeconfig = Kubeconfig::from_yaml(kubeconfig).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    kube::Client::try_from(config).unwrap()
}

async fn admin(cluster: &Cluster) -> kube::Client {
    client(&std::fs::read_to_string(cluster.kubeconfig()).unwrap()).await
}

fn account(namespace: &str, name: &str) -> Account {
    Account { namespace: namespace.to_owned(), name: name.to_owned() }
}

/// Tokens, and the metrics about them as text.
struct Asked {
    tokens: Tokens,
    metrics: Metrics,
    stop: CancellationToken,
}

impl Asked {
    fn new(client: kube::Client, options: TokenOptions) -> Self {
        let (mut metrics, stop) = (Metrics::default(), CancellationToken::new());
        let tokens = Tokens::new(client, options, &mut metrics, stop.clone());
        Self { tokens, metrics, stop }
    }

    fn requests(&self, outcome: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.metrics).unwrap();
        let line = format!("onboarding_istio_token_requests_total{{outcome=\"{outcome}\"}} ");
        text.lines().find_map(|found| found.strip_prefix(&line)?.parse().ok()).unwrap_or(0)
    }
}

async fn until(
    receiver: &mut watch::Receiver<TokenStatus>,
    what: &str,
    good: impl FnMut(&TokenStatus) -> bool,
) -> TokenStatus {
    let status = tokio::time::timeout(WITHIN, receiver.wait_for(good)).await;
    status.unwrap_or_else(|_| panic!("{what} never came")).unwrap().clone()
}

async fn until_true(what: &str, mut good: impl FnMut() -> bool) {
    eventually(what, WITHIN, async || good().then_some(()).ok_or("not yet")).await;
}

fn value(status: &TokenStatus) -> String {
    status.token.as_ref().unwrap().value().to_owned()
}

fn claims(token: &str) -> Value {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap()).unwrap()
}

async fn review(client: &kube::Client, token: &str, audience: &str) -> (bool, Option<String>) {
    let spec = TokenReviewSpec { token: Some(token.to_owned()), audiences: Some(vec![audience.to_owned()]) };
    let reviews: Api<TokenReview> = Api::all(client.clone());
    let review = TokenReview { spec, ..TokenReview::default() };
    let status = reviews.create(&PostParams::default(), &review).await.unwrap().status.unwrap();
    (status.authenticated == Some(true), status.user.and_then(|user| user.username))
}

/// One API server for all of these, each in a namespace of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_and_boot_configurations() {
    let cluster = Cluster::start(Options { controllers: false, ..Options::default() }).unwrap();
    for namespace in ["bookinfo", "later", "renewed", "idle", "away"] {
        cluster.kubectl(["create", "namespace", namespace]).unwrap();
    }
    for namespace in ["bookinfo", "renewed", "idle", "away"] {
        cluster.kubectl(["create", "serviceaccount", "ratings-vm", "-n", namespace]).unwrap();
    }
    a_token_is_for_istiods_ca_alone(&cluster).await;
    an_account_that_is_made_later(&cluster).await;
    a_token_is_renewed_and_forgotten(&cluster).await;
    what_the_api_server_refuses_is_said(&cluster).await;
    boot_configurations_follow(&cluster).await;
    what_is_in_the_way_is_said(&cluster).await;
    a_token_outlives_the_api_server(&cluster).await;
}

async fn a_token_is_for_istiods_ca_alone(cluster: &Cluster) {
    let client = admin(cluster).await;
    let asked = Asked::new(client.clone(), TokenOptions::default());
    let mut first = asked.tokens.follow(&account("bookinfo", "ratings-vm"));
    let mut second = asked.tokens.follow(&account("bookinfo", "ratings-vm"));
    let status = until(&mut first, "a token", |status| status.token.is_some()).await;
    let token = value(&status);
    let claims = claims(&token);
    assert_eq!(claims["aud"], json!(["istio-ca"]));
    assert_eq!(claims["sub"], "system:serviceaccount:bookinfo:ratings-vm");
    assert_eq!(claims["exp"].as_i64().unwrap() - claims["iat"].as_i64().unwrap(), 3600);
    // The API server looks at its clock for either.
    let later = claims["exp"].as_i64().unwrap() - status.token.as_ref().unwrap().expires_at.as_second();
    assert!((0..=1).contains(&later), "{later}");
    assert!(status.token.unwrap().is_valid());
    assert_eq!(
        review(&client, &token, "istio-ca").await,
        (true, Some("system:serviceaccount:bookinfo:ratings-vm".to_owned()))
    );
    assert!(!review(&client, &token, "https://kubernetes.default.svc").await.0);
    // Shared by all workloads of the account.
    assert_eq!(value(&until(&mut second, "the token", |status| status.token.is_some()).await), token);
    assert_eq!(value(&asked.tokens.follow(&account("bookinfo", "ratings-vm")).borrow().clone()), token);
    assert_eq!((asked.requests("issued"), asked.tokens.accounts()), (1, 1));
    asked.stop.cancel();
    tokio::time::timeout(WITHIN, asked.tokens.stopped()).await.unwrap();
}

async fn an_account_that_is_made_later(cluster: &Cluster) {
    let asked = Asked::new(admin(cluster).await, TokenOptions::default());
    let mut status = asked.tokens.follow(&account("later", "ratings-vm"));
    let missing = until(&mut status, "a problem", |status| status.problem.is_some()).await;
    assert_eq!(
        missing.problem.unwrap().to_string(),
        "the ServiceAccount later/ratings-vm, which the WorkloadGroup names, doesn't exist; make it (kubectl create serviceaccount ratings-vm -n later), or change spec.template.serviceAccount"
    );
    assert!(missing.token.is_none() && asked.requests("no_account") > 0);
    cluster.kubectl(["create", "serviceaccount", "ratings-vm", "-n", "later"]).unwrap();
    let made = until(&mut status, "a token", |status| status.token.is_some()).await;
    assert!(made.problem.is_none());
    asked.stop.cancel();
}

async fn a_token_is_renewed_and_forgotten(cluster: &Cluster) {
    let options = TokenOptions { life: Some(Duration::from_secs(600)), renew_after: Some(Duration::from_secs(1)) };
    let asked = Asked::new(admin(cluster).await, options);
    let mut status = asked.tokens.follow(&account("renewed", "ratings-vm"));
    let first = until(&mut status, "a token", |status| status.token.is_some()).await;
    let next = until(&mut status, "the next", |status| value(status) != value(&first)).await;
    let life = claims(&value(&next));
    assert_eq!(life["exp"].as_i64().unwrap() - life["iat"].as_i64().unwrap(), 600);
    // The one before is good to its end.
    assert!(first.token.unwrap().is_valid());
    // Nobody follows: nobody asks.
    drop(status);
    until_true("the end of its task", || asked.tokens.accounts() == 0).await;
    asked.stop.cancel();
    tokio::time::timeout(WITHIN, asked.tokens.stopped()).await.unwrap();
    // After the end there are none.
    let mut late = asked.tokens.follow(&account("renewed", "ratings-vm"));
    assert!(tokio::time::timeout(WITHIN, late.changed()).await.unwrap().is_err());
}

async fn what_the_api_server_refuses_is_said(cluster: &Cluster) {
    let short = TokenOptions { life: Some(Duration::from_secs(60)), renew_after: None };
    let asked = Asked::new(admin(cluster).await, short);
    let mut status = asked.tokens.follow(&account("idle", "ratings-vm"));
    let refused = until(&mut status, "a refusal", |status| status.problem.is_some()).await.problem.unwrap();
    let words = refused.to_string();
    assert!(words.starts_with("the API server gave no token of the ServiceAccount idle/ratings-vm: "), "{words}");
    assert!(words.contains("10 minutes") && asked.requests("refused") > 0, "{words}");
    asked.stop.cancel();
    // Of an account without a role.
    let token = cluster.kubectl(["create", "token", "ratings-vm", "-n", "idle"]).unwrap();
    let nobody = client(&cluster.kubeconfig_with_token(token.trim())).await;
    let asked = Asked::new(nobody, TokenOptions::default());
    let mut status = asked.tokens.follow(&account("bookinfo", "ratings-vm"));
    let refused = until(&mut status, "a refusal", |status| status.problem.is_some()).await.problem.unwrap();
    let words = refused.to_string();
    assert!(words.contains("it needs the verb create on serviceaccounts/token in that namespace"), "{words}");
    assert!(asked.requests("forbidden") > 0);
    asked.stop.cancel();
}

async fn a_token_outlives_the_api_server(cluster: &Cluster) {
    let options = TokenOptions { life: None, renew_after: Some(Duration::from_secs(1)) };
    let asked = Asked::new(admin(cluster).await, options);
    let mut status = asked.tokens.follow(&account("away", "ratings-vm"));
    until(&mut status, "a token", |status| status.token.is_some()).await;
    cluster.kill_api().unwrap();
    let away = until(&mut status, "a problem", |status| status.problem.is_some()).await;
    let words = away.problem.as_ref().unwrap().to_string();
    assert_eq!(words, "can't ask the API server for a token of the ServiceAccount away/ratings-vm");
    assert!(away.token.as_ref().unwrap().is_valid());
    cluster.start_api().unwrap();
    let back = until(&mut status, "the next", |status| status.problem.is_none()).await;
    assert_ne!(value(&back), value(&away));
    asked.stop.cancel();
}

/// One registration, in memory.
struct One(Mutex<State>);

#[async_trait]
impl Registry for One {
    async fn load(&self, name: &RegistrationName) -> Result<Stored, RegistryError> {
        let state = if *name == fixtures::name() { self.0.lock().unwrap().clone() } else { State::Absent };
        Ok(Stored { state, version: 1 })
    }
    async fn store(&self, _: &RegistrationName, _: u64, _: &State) -> Result<u64, RegistryError> {
        Err(RegistryError::Conflict)
    }
    async fn list(&self) -> Result<Vec<(RegistrationName, Stored)>, RegistryError> {
        Ok(Vec::new())
    }
}

const MESH: &str = "defaultConfig: {proxyMetadata: {ISTIO_META_DNS_CAPTURE: 'false'}, meshId: mesh1}";

fn inputs() -> Inputs {
    let namespace = Namespace { root_certificates: Some(fixtures::ROOT.to_owned()), ..Namespace::default() };
    let meshes =
        Meshes { by_revision: [(DEFAULT_REVISION.to_owned(), Mesh::read(MESH, None))].into(), ..Meshes::default() };
    let group = fixtures::group();
    Inputs {
        meshes: Arc::new(meshes),
        namespaces: [("bookinfo".to_owned(), Arc::new(namespace))].into(),
        groups: [(group.name.clone(), Arc::new(group))].into(),
        propagation_delay: Duration::from_secs(10),
        ..Inputs::default()
    }
}

/// How far the workload is, as it was told last; empty: unknown.
#[derive(Default)]
struct Stands(Mutex<&'static str>);

impl Standings for Stands {
    fn stands(&self, _: &RegistrationName, standing: Option<Standing>) {
        *self.0.lock().unwrap() = match standing {
            None => "",
            Some(Standing::Applied(_)) => "Applied",
            Some(Standing::Behind(behind)) => behind.reason.as_str(),
        };
    }
}

/// The provisioner, and everything that it looks at.
struct Provided {
    provisioner: IstioProvisioner,
    inputs: watch::Sender<Arc<Inputs>>,
    registry: Arc<One>,
    standings: Arc<Stands>,
    stop: CancellationToken,
}

type Boots = BoxStream<'static, Result<pb::BootConfiguration, ProvisionError>>;

impl Provided {
    async fn new(cluster: &Cluster, options: TokenOptions) -> Self {
        let asked = Asked::new(admin(cluster).await, options);
        let inputs = watch::Sender::new(Arc::new(inputs()));
        let registry = Arc::new(One(Mutex::new(State::Live(Box::new(fixtures::live())))));
        let standings = Arc::new(Stands::default());
        let provisioner = IstioProvisioner::new(
            inputs.subscribe(),
            registry.clone(),
            standings.clone(),
            asked.tokens,
            &mut Metrics::default(),
        );
        Self { provisioner, inputs, registry, standings, stop: asked.stop }
    }

    fn boots(&self) -> Boots {
        self.provisioner.boot(&workload(), "")
    }

    fn change(&self, change: impl FnOnce(&mut Inputs)) {
        self.inputs.send_modify(|held| change(Arc::make_mut(held)));
    }
}

fn workload() -> Workload {
    Workload { name: fixtures::name(), group: fixtures::group().name }
}

async fn next(boots: &mut Boots) -> Result<pb::BootConfiguration, String> {
    let item = tokio::time::timeout(WITHIN, boots.next()).await.expect("something comes").expect("it goes on");
    item.map_err(|error| format!("{error:?}"))
}

fn istio(boot: &pb::BootConfiguration) -> &pb::IstioBoot {
    match &boot.sidecar {
        Some(pb::boot_configuration::Sidecar::Istio(istio)) => istio,
        other => panic!("{other:?}"),
    }
}

async fn boot_configurations_follow(cluster: &Cluster) {
    let still = TokenOptions::default();
    let provided = Provided::new(cluster, still).await;
    let mut boots = provided.boots();
    let first = next(&mut boots).await.unwrap();
    assert_eq!(claims(&istio(&first).token)["sub"], "system:serviceaccount:bookinfo:ratings-vm");
    assert_eq!(istio(&first).environment["ISTIO_META_WORKLOAD_ENTRY"], fixtures::name().name);
    // What others have to do with isn't sent; what is the workload's own is.
    provided.change(|inputs| drop(inputs.namespaces.insert("elsewhere".to_owned(), Arc::default())));
    provided.change(|inputs| inputs.propagation_delay = Duration::from_secs(3));
    let second = next(&mut boots).await.unwrap();
    assert_eq!(second.propagation_delay.unwrap().seconds, 3);
    assert_ne!(second.version, first.version);
    assert_eq!(istio(&second).token, istio(&first).token);
    // What needs a restart waits for the next session, and the token is still the one that the sidecar was started for.
    cluster.kubectl(["create", "serviceaccount", "other", "-n", "bookinfo"]).unwrap();
    let with_account = |at_once: &str| {
        let mut group = fixtures::group();
        group.service_account = "other".to_owned();
        group.workload_annotations.insert(AT_ONCE_ANNOTATION.to_owned(), at_once.to_owned());
        Arc::new(group)
    };
    assert!(provided.provisioner.is_newest(&fixtures::name(), &second.version));
    let stands = || *provided.standings.0.lock().unwrap();
    let report = |boot: &pb::BootConfiguration, accepted| {
        let report = pb::SidecarReport { boot_version: boot.version.clone(), accepted, message: "no\u{1b}".to_owned() };
        provided.provisioner.reported(&workload(), &report);
        stands()
    };
    assert_eq!(report(&first, true), "NotApplied", "that is an old one");
    assert_eq!(report(&second, true), "Applied");
    provided.change(|inputs| {
        inputs.groups.insert(workload().group, with_account("false"));
        inputs.propagation_delay = Duration::from_secs(4);
    });
    let waiting = next(&mut boots).await.unwrap();
    assert_eq!(waiting.propagation_delay.unwrap().seconds, 4);
    assert_eq!((&waiting.spiffe_id, &istio(&waiting).environment), (&second.spiffe_id, &istio(&second).environment));
    assert_eq!(istio(&waiting).token, istio(&second).token);
    assert!(!provided.provisioner.is_newest(&fixtures::name(), &waiting.version));
    assert_eq!(report(&waiting, true), "WaitsForRestart");
    // The next session has it.
    let third = next(&mut provided.boots()).await.unwrap();
    assert_eq!(third.spiffe_id, "spiffe://cluster.local/ns/bookinfo/sa/other");
    assert_eq!(claims(&istio(&third).token)["sub"], "system:serviceaccount:bookinfo:other");
    assert!(provided.provisioner.is_newest(&fixtures::name(), &third.version));
    // Unless the operator wants it now.
    provided.change(|inputs| drop(inputs.groups.insert(workload().group, with_account("true"))));
    let now = next(&mut boots).await.unwrap();
    assert_eq!(now, third);
    // An agent that has this version gets a token, and nothing else.
    let held = provided.provisioner.boot(&workload(), &third.version).next().await.unwrap().unwrap();
    assert_eq!((&held.version, &istio(&held).token), (&third.version, &istio(&third).token));
    assert!(istio(&held).files.is_empty() && held.spiffe_id.is_empty());

    // Reports are kept for those who are connected.
    assert_eq!(report(&third, false), "Refused");
    let last = provided.provisioner.last_report(&fixtures::name()).unwrap();
    assert_eq!((last.accepted, last.message.as_str(), &last.boot_version), (false, "no", &third.version));
    drop(boots);
    assert_eq!(provided.provisioner.last_report(&fixtures::name()), None);
    assert_eq!(report(&third, true), "", "nobody is connected");
    assert_eq!(provided.provisioner.last_report(&fixtures::name()), None);

    // istiod signs.
    let error = provided.provisioner.certificate(&workload(), b"").await.unwrap_err();
    assert!(matches!(&error, ProvisionError::Refused(words) if words.contains("istiod's CA does")), "{error}");
    provided.stop.cancel();

    // A renewed token comes with the version that is held.
    let provided = Provided::new(cluster, TokenOptions { renew_after: Some(Duration::from_secs(1)), life: None }).await;
    let mut boots = provided.boots();
    let (first, second) = (next(&mut boots).await.unwrap(), next(&mut boots).await.unwrap());
    assert_eq!(first.version, second.version);
    assert_ne!(istio(&first).token, istio(&second).token);
    assert!(istio(&second).files.is_empty());
    // Even while nobody can say what else the sidecar would be given.
    provided.change(|inputs| inputs.meshes = Arc::default());
    let (mut error, mut renewed) = (None, 0);
    while error.is_none() || renewed < 2 {
        match next(&mut boots).await {
            Ok(boot) => {
                assert_eq!(boot.version, first.version);
                renewed += usize::from(error.is_some());
            }
            Err(words) => assert!(error.replace(words).is_none(), "it is said once"),
        }
    }
    assert!(error.unwrap().contains("is Istio installed?"));
    assert!(istio(&first).token_expires_at.unwrap().seconds <= istio(&second).token_expires_at.unwrap().seconds);
    // It ends with the plane.
    provided.stop.cancel();
    let end = async { while boots.next().await.is_some() {} };
    tokio::time::timeout(WITHIN, end).await.unwrap();
}

async fn what_is_in_the_way_is_said(cluster: &Cluster) {
    let provided = Provided::new(cluster, TokenOptions::default()).await;
    let set = |state: State| *provided.registry.0.lock().unwrap() = state;
    // An unknown revision: until it is there.
    let mut live = fixtures::live();
    live.report.sidecar = Reported::Istio { version: String::new(), revision: Some("canary".to_owned()) };
    set(State::Live(Box::new(live)));
    let mut boots = provided.boots();
    let error = next(&mut boots).await.unwrap_err();
    assert!(error.starts_with("Refused(") && error.contains("there are: default"), "{error}");
    assert_eq!(*provided.standings.0.lock().unwrap(), "NoBootConfiguration");
    provided.change(|inputs| {
        let canary = Mesh::read("", None);
        Arc::make_mut(&mut inputs.meshes).by_revision.insert("canary".to_owned(), canary);
    });
    let boot = next(&mut boots).await.unwrap();
    assert_eq!(istio(&boot).istiod_san, "istiod-canary.istio-system.svc");
    // It goes, and comes back as it was: the agent hears that nothing is in the way any more, and nothing else.
    let canary = provided.inputs.borrow().meshes.by_revision["canary"].clone();
    provided.change(|inputs| drop(Arc::make_mut(&mut inputs.meshes).by_revision.remove("canary")));
    next(&mut boots).await.unwrap_err();
    provided.change(|inputs| drop(Arc::make_mut(&mut inputs.meshes).by_revision.insert("canary".to_owned(), canary)));
    let again = next(&mut boots).await.unwrap();
    assert!(again.version == boot.version && istio(&again).files.is_empty(), "{again:?}");
    assert_eq!(*provided.standings.0.lock().unwrap(), "NotApplied");

    // Not registered: until it is, without being told.
    set(State::Absent);
    let mut boots = provided.boots();
    let error = next(&mut boots).await.unwrap_err();
    assert!(error.starts_with("Unavailable(") && error.contains("isn't registered in the group"), "{error}");
    set(State::Live(Box::new(fixtures::live())));
    next(&mut boots).await.unwrap();

    // No account: until it is made.
    provided.change(|inputs| {
        let mut group = fixtures::group();
        group.service_account = "not-yet".to_owned();
        inputs.groups.insert(group.name.clone(), Arc::new(group));
    });
    let mut boots = provided.boots();
    let error = next(&mut boots).await.unwrap_err();
    assert!(error.contains("kubectl create serviceaccount not-yet -n bookinfo"), "{error}");
    cluster.kubectl(["create", "serviceaccount", "not-yet", "-n", "bookinfo"]).unwrap();
    next(&mut boots).await.unwrap();

    // No group: until there is one.
    provided.change(|inputs| inputs.groups.clear());
    let error = next(&mut boots).await.unwrap_err();
    assert!(error.contains("the WorkloadGroup bookinfo/ratings doesn't exist"), "{error}");
    provided.change(|inputs| *inputs = Inputs { propagation_delay: Duration::from_secs(5), ..self::inputs() });
    assert_eq!(next(&mut boots).await.unwrap().propagation_delay.unwrap().seconds, 5);
    provided.stop.cancel();
}

/// The node of our boot configuration is what pilot-agent says of itself when it is started from it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_is_what_pilot_agent_makes_of_it() {
    let cluster = Cluster::start(Options { controllers: false, ..Options::default() }).unwrap();
    cluster.kubectl(["create", "namespace", "bookinfo"]).unwrap();
    cluster.kubectl(["create", "serviceaccount", "ratings-vm", "-n", "bookinfo"]).unwrap();
    let provided = Provided::new(&cluster, TokenOptions::default()).await;
    provided.change(|inputs| {
        let namespace = Arc::make_mut(inputs.namespaces.get_mut("bookinfo").unwrap());
        namespace.root_certificates = Some(cluster.ca().to_owned());
        let group = fixtures::group_with(
            "metadata: {annotations: {proxy.istio.io/config: 'tracingServiceName: CANONICAL_NAME_AND_NAMESPACE'}}",
        );
        inputs.groups.insert(group.name.clone(), Arc::new(group));
    });
    let boot = next(&mut provided.boots()).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let theirs = pilot_agents_node(&cluster, istio(&boot), directory.path()).await;
    let ours = String::from_utf8(istio(&boot).node.clone()).unwrap().replace("{{HOST_IP}}", HOST_IP);
    let ours: Value = serde_json::from_str(&ours).unwrap();
    for field in ["id", "cluster", "locality"] {
        assert_eq!(theirs[field], ours[field], "{field}");
    }
    let (mut theirs, mut ours) = (theirs["metadata"].clone(), ours["metadata"].clone());
    // What only a running pilot-agent has.
    let more = |value: &mut Value, field: &str| value.as_object_mut().unwrap().shift_remove(field);
    let addresses = more(&mut theirs, "INSTANCE_IPS").unwrap();
    assert!(addresses.as_str().unwrap().starts_with(more(&mut ours, "INSTANCE_IPS").unwrap().as_str().unwrap()));
    for field in [
        "ISTIO_VERSION",
        "ISTIO_PROXY_SHA",
        "WORKLOAD_IDENTITY_SOCKET_FILE",
        "OUTLIER_LOG_PATH",
        "ENVOY_SKIP_DEPRECATED_LOGS",
    ] {
        more(&mut theirs, field);
    }
    for field in ["binaryPath", "proxyBootstrapTemplatePath", "discoveryAddress", "statusPort"] {
        more(&mut theirs["PROXY_CONFIG"], field);
    }
    more(&mut ours["PROXY_CONFIG"], "statusPort");
    // The discovery address there, although ISTIOD_SAN is what it verifies.
    more(&mut theirs, "PILOT_SAN");
    more(&mut ours, "PILOT_SAN");
    for (field, value) in ours["LABELS"].as_object().unwrap() {
        // pilot-agent puts each label beside the metadata as well.
        assert_eq!(more(&mut theirs, field).as_ref(), Some(value));
    }
    for labels in ["LABELS", "STATIC_LABELS"] {
        more(&mut theirs[labels], "istio-locality");
    }
    more(&mut theirs, "istio-locality");
    [&mut theirs, &mut ours].into_iter().for_each(Value::sort_all_objects);
    assert_eq!(serde_json::to_string_pretty(&theirs).unwrap(), serde_json::to_string_pretty(&ours).unwrap());
    provided.stop.cancel();
}

/// From our boot configuration to requests through a mesh of the real istiod, by the real agent's sidecar, Envoy alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_comes_up_from_it() {
    let cluster = Cluster::start(Options::default()).unwrap();
    cluster.apply_istio_crds().unwrap();
    let istiod = cluster.start_istiod("trustDomain: cluster.local\n").unwrap();
    cluster.kubectl(["create", "namespace", "bookinfo"]).unwrap();
    cluster.kubectl(["create", "serviceaccount", "ratings-vm", "-n", "bookinfo"]).unwrap();
    cluster
        .kubectl(["wait", "--for=create", "--timeout=60s", "configmap/istio-ca-root-cert", "-n", "bookinfo"])
        .unwrap();
    let path = "jsonpath={.data.root-cert\\.pem}";
    let root = cluster.kubectl(["get", "configmap", "istio-ca-root-cert", "-n", "bookinfo", "-o", path]).unwrap();
    let listener = tokio::net::TcpListener::bind((HOST_IP, 0)).await.unwrap();
    let (application, ingress, egress, admin) =
        (listener.local_addr().unwrap().port(), port::free().unwrap(), port::free().unwrap(), port::free().unwrap());
    tokio::spawn(onboarding_testkit::application::serve(listener, "ratings".to_owned()));
    let name = fixtures::name().name;
    cluster
        .apply(&format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: bookinfo}}\n\
             spec: {{address: {HOST_IP}, labels: {{app: ratings, class: vm, version: v5}}, serviceAccount: ratings-vm, network: virtual-machines}}\n---\n\
             apiVersion: v1\nkind: Service\nmetadata: {{name: ratings, namespace: bookinfo}}\n\
             spec: {{selector: {{app: ratings}}, ports: [{{name: http, port: {egress}, targetPort: {ingress}}}]}}\n---\n\
             apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: vm, namespace: bookinfo}}\n\
             spec:\n  workloadSelector: {{labels: {{app: ratings, class: vm}}}}\n  \
             ingress: [{{defaultEndpoint: '{HOST_IP}:{application}', port: {{name: http, number: {ingress}, protocol: HTTP}}}}]\n  \
             egress: [{{bind: 127.0.0.2, port: {{number: {egress}}}, hosts: ['./*']}}]\n",
        ))
        .unwrap();
    let provided = Provided::new(&cluster, TokenOptions::default()).await;
    provided.change(|inputs| {
        let namespace = Arc::make_mut(inputs.namespaces.get_mut("bookinfo").unwrap());
        namespace.root_certificates = Some(root);
        // Other tests on this machine have the usual ports.
        let ports = format!(
            "{{ENVOY_STATUS_PORT: '{}', ENVOY_PROMETHEUS_PORT: '{}'}}",
            port::free().unwrap(),
            port::free().unwrap()
        );
        let annotation = format!("metadata: {{annotations: {{proxy.istio.io/config: \"proxyMetadata: {ports}\"}}}}");
        let group = fixtures::group_with(&annotation);
        inputs.groups.insert(group.name.clone(), Arc::new(group));
    });
    let boot = next(&mut provided.boots()).await.unwrap();
    let address = Address { host: istiod.secure.ip().to_string(), port: istiod.secure.port() };
    let held = HeldBoot::apply(None, boot).unwrap().placed(Some(HOST_IP.parse().unwrap()), &address).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    let options = sidecar::Options {
        binary: envoy(),
        directory: directory.path().join("sidecar"),
        stdout: log.clone(),
        stderr: log.clone(),
        admin: ([127, 0, 0, 1], admin).into(),
        istio: IstioWay::Envoy,
        identity: directory.path().join("identity.json"),
    };
    let (sender, mut events) = tokio::sync::mpsc::channel(64);
    let sidecar = Sidecar::start(options, &held, None, sender).await.unwrap();
    let log = || std::fs::read_to_string(&log).unwrap_or_default();
    loop {
        match tokio::time::timeout(WITHIN, events.recv()).await {
            Ok(Some(Event::Accepted { version })) => break assert_eq!(version, held.version),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => panic!("the sidecar's log:\n{}", log()),
        }
    }
    let uri = format!("http://127.0.0.2:{egress}/");
    let host = format!("Host: ratings.bookinfo:{egress}");
    let answer = eventually("an answer of ratings", WITHIN, async || {
        let arguments = ["-sS", "--max-time", "5", "-H", &host, &uri];
        let curl = tokio::process::Command::new("curl").args(arguments).output().await.unwrap();
        let answer = serde_json::from_slice::<onboarding_testkit::application::Answer>(&curl.stdout);
        answer.map_err(|_| format!("{curl:?}; the sidecar's log:\n{}", log()))
    });
    assert_eq!(answer.await.application, "ratings");
    sidecar.stop(Duration::from_secs(5)).await;
    provided.stop.cancel();
}

fn envoy() -> PathBuf {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../dev/envoy");
    let output = Command::new(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().into()
}

const HOST_IP: &str = "127.0.0.1";

/// From the bootstrap that it writes for Envoy.
async fn pilot_agents_node(cluster: &Cluster, boot: &pb::IstioBoot, directory: &Path) -> Value {
    let write = |path: &str, bytes: &[u8]| {
        let path = directory.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    };
    for (path, bytes) in &boot.files {
        write(path, bytes);
    }
    write("etc/certs/root-cert.pem", boot.root_certificates.as_bytes());
    write("var/run/secrets/tokens/istio-token", boot.token.as_bytes());
    let template = std::fs::read(cluster.binary("envoy_bootstrap_tmpl.json")).unwrap();
    write("var/lib/istio/envoy/envoy_bootstrap_tmpl.json", &template);
    // In the place of Envoy: it keeps the bootstrap, which pilot-agent removes at its end. `$2` is what comes after `-c`.
    write("envoy", b"#!/bin/sh\ncp \"$2\" kept.part && mv kept.part kept && exec sleep 600\n");
    std::fs::set_permissions(directory.join("envoy"), std::fs::Permissions::from_mode(0o700)).unwrap();
    let proxy_config = json!({
        "binaryPath": directory.join("envoy"),
        "proxyBootstrapTemplatePath": "./var/lib/istio/envoy/envoy_bootstrap_tmpl.json",
        "discoveryAddress": format!("{HOST_IP}:{}", port::free().unwrap()),
        // Other tests have others.
        "statusPort": port::free().unwrap(),
    });
    let mut command = Command::new(cluster.binary("pilot-agent"));
    command.args(["proxy", "sidecar"]).current_dir(directory).env_clear();
    command.envs(boot.environment.iter().map(|(name, value)| (name, value.replace("{{HOST_IP}}", HOST_IP))));
    command.env("PROXY_CONFIG", proxy_config.to_string()).env("PATH", "/usr/bin:/bin");
    let process = Process::start("pilot-agent", command, None).unwrap();
    let bootstrap = eventually("the bootstrap of pilot-agent", WITHIN, async || {
        assert!(process.status().is_none(), "{}", process.tail());
        std::fs::read(directory.join("kept")).map_err(|error| format!("{error}\n{}", process.tail()))
    });
    serde_json::from_slice::<Value>(&bootstrap.await).unwrap()["node"].clone()
}
