//! The snapshot of a real API server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::config::{KubeConfigOptions, Kubeconfig};
use onboarding_core::name::GroupName;
use onboarding_endpoint::backend::{ConfigSource, Snapshot};
use onboarding_kubernetes::istio::{DEFAULT_REVISION, Named, Names};
use onboarding_kubernetes::source::{self, ClusterSource, Options, PLANE_CONFIG, PLANE_CONFIG_KEY};
use onboarding_testkit::cluster::{Cluster, Options as ClusterOptions};
use prometheus_client::registry::Registry as Metrics;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Of anything that is waited for here; the machine may be busy.
const WITHIN: Duration = Duration::from_secs(60);

async fn admin(cluster: &Cluster) -> kube::Client {
    let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig()).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    kube::Client::try_from(config).unwrap()
}

/// One that runs, and what it says now.
struct Reading {
    source: Arc<ClusterSource>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    metrics: Metrics,
    task: JoinHandle<anyhow::Result<()>>,
    stop: CancellationToken,
}

impl Reading {
    async fn of(cluster: &Cluster, longest_stale: Duration) -> Self {
        Self::with(admin(cluster).await, longest_stale)
    }

    fn with(client: kube::Client, longest_stale: Duration) -> Self {
        let (mut metrics, stop) = (Metrics::default(), CancellationToken::new());
        let options = Options { longest_stale, ..Options::new("istio-system") };
        let (source, task) = source::start(client, options, &mut metrics, stop.clone());
        Self { snapshots: source.watch(), source, metrics, task, stop }
    }

    async fn until(&mut self, what: &str, good: impl FnMut(&Arc<Snapshot>) -> bool) -> Arc<Snapshot> {
        let last = self.snapshots.borrow().clone();
        match tokio::time::timeout(WITHIN, self.snapshots.wait_for(good)).await {
            Ok(found) => found.unwrap().clone(),
            Err(_) => panic!("{what} never came; at first {last:?}; at last {:?}", self.source.watch().borrow()),
        }
    }

    fn metric(&self, line: &str) -> Option<i64> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.metrics).unwrap();
        text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok())
    }

    async fn end(self) {
        self.stop.cancel();
        tokio::time::timeout(WITHIN, self.task).await.unwrap().unwrap().unwrap();
    }
}

fn says(snapshot: &Snapshot, words: &str) -> bool {
    snapshot.faults.iter().any(|fault| fault.contains(words))
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds")
}

fn policy(name: &str, account: &str) -> String {
    format!(
        "apiVersion: authorization.onboarding.tetrate.io/v1alpha1\nkind: OnboardingPolicy\nmetadata: {{name: {name}, namespace: bookinfo}}\n\
         spec: {{allow: [{{workloads: [{{aws: {{accounts: [{account}], ec2: {{}}}}}}], onboardTo: [{{workloadGroupSelector: {{}}}}]}}]}}\n---\n"
    )
}

fn group(name: &str, weight: u32) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata: {{name: {name}, namespace: bookinfo}}\n\
         spec: {{template: {{serviceAccount: ratings-vm, weight: {weight}}}}}\n---\n"
    )
}

fn control_plane(onboarding: &str) -> String {
    format!(
        "apiVersion: install.tetrate.io/v1alpha1\nkind: ControlPlane\nmetadata: {{name: controlplane, namespace: istio-system}}\n\
         spec: {{hub: example, meshExpansion: {{onboarding: {onboarding}}}}}\n---\n"
    )
}

fn secret(name: &str, certificate: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata: {{name: {name}, namespace: istio-system}}\nstringData:\n  \
         tls.crt: \"-----BEGIN CERTIFICATE-----\\n{certificate}\\n-----END CERTIFICATE-----\\n\"\n  \
         tls.key: \"-----BEGIN PRIVATE KEY-----\\nAA==\\n-----END PRIVATE KEY-----\\n\"\n---\n"
    )
}

fn name(group: &str) -> GroupName {
    GroupName { namespace: "bookinfo".to_owned(), name: group.to_owned() }
}

fn policies(snapshot: &Snapshot) -> Vec<&str> {
    snapshot.policies.policies().iter().map(|policy| policy.name.as_str()).collect()
}

/// Each goes on where the last one ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_snapshot_follows_the_cluster() {
    let cluster = Cluster::start(ClusterOptions { controllers: false, ..ClusterOptions::default() }).unwrap();
    for namespace in ["istio-system", "bookinfo"] {
        cluster.kubectl(["create", "namespace", namespace]).unwrap();
    }
    let mut reading = Reading::of(&cluster, Duration::from_secs(300)).await;
    crds_come_later(&cluster, &mut reading).await;
    objects_of_before_the_schema(&cluster, &mut reading).await;
    a_uid_is_made_once(&cluster, &mut reading).await;
    only_the_secret_that_is_named(&cluster, &mut reading).await;
    changes_come_within_a_second(&cluster, &mut reading).await;
    a_group_that_waits_for_its_dependents(&cluster, &mut reading).await;
    what_the_provisioner_needs(&cluster, &reading).await;
    the_api_server_stands_still(&cluster, &mut reading).await;
    what_went_while_nobody_listened(&cluster).await;
    the_api_server_goes_and_comes(&cluster, &mut reading).await;
    reading.end().await;
}

async fn crds_come_later(cluster: &Cluster, reading: &mut Reading) {
    let snapshot = reading.until("a word about CRDs", |it| says(it, "CustomResourceDefinitions")).await;
    assert!(snapshot.policy_unreadable && snapshot.plane.is_none() && snapshot.policies.policies().is_empty());
    assert!(says(&snapshot, "OnboardingPolicies haven't been read from the API server yet"), "{:?}", snapshot.faults);
    cluster.apply_istio_crds().unwrap();
    cluster.apply_crds(&deploy().join("controlplanes.yaml")).unwrap();
}

/// A schema that takes anything, then the real one.
async fn objects_of_before_the_schema(cluster: &Cluster, reading: &mut Reading) {
    let lax = "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\n\
        metadata: {name: onboardingpolicies.authorization.onboarding.tetrate.io}\n\
        spec:\n  group: authorization.onboarding.tetrate.io\n  scope: Namespaced\n  \
        names: {kind: OnboardingPolicy, listKind: OnboardingPolicyList, plural: onboardingpolicies, singular: onboardingpolicy}\n  \
        versions: [{name: v1alpha1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}]\n";
    let file = cluster.directory().join("lax.yaml");
    std::fs::write(&file, lax).unwrap();
    cluster.apply_crds(&file).unwrap();
    let everybody = policy("everybody", "'123456789012'").replace("accounts: ['123456789012']", "accounts: []");
    cluster.apply(&(everybody + &policy("narrow", "'123456789012'"))).unwrap();
    cluster.apply_crds(&deploy().join("onboardingpolicies.yaml")).unwrap();
    let snapshot = reading.until("the policies", |it| policies(it) == ["narrow"]).await;
    assert!(snapshot.policy_unreadable);
    assert!(
        says(&snapshot, "OnboardingPolicy bookinfo/everybody: spec.allow[0].workloads[0].aws.accounts"),
        "{:?}",
        snapshot.faults
    );
    cluster.kubectl(["delete", "onboardingpolicy", "everybody", "-n", "bookinfo"]).unwrap();
    reading.until("no faulty policy", |it| !it.policy_unreadable && policies(it) == ["narrow"]).await;
}

async fn a_uid_is_made_once(cluster: &Cluster, reading: &mut Reading) {
    // The operator was first, and says nothing of a UID.
    cluster
        .apply(&format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {PLANE_CONFIG}, namespace: istio-system}}\ndata: {{config.yaml: \"replicas: 2\\n\", other: kept}}\n"
        ))
        .unwrap();
    let mut second = Reading::of(cluster, Duration::from_secs(300)).await;
    cluster.apply(&control_plane("{endpoint: {hosts: [onboarding.example], secretName: first}}")).unwrap();
    let snapshot = reading.until("a UID", |it| it.plane.is_some()).await;
    let uid = snapshot.plane.as_ref().unwrap().uid.clone();
    assert_eq!(uid.len(), 36, "{uid}");
    let other = second.until("a UID", |it| it.plane.is_some()).await;
    assert_eq!(other.plane.as_ref().unwrap().uid, uid);
    second.end().await;
    let api: Api<ConfigMap> = Api::namespaced(admin(cluster).await, "istio-system");
    let data = api.get(PLANE_CONFIG).await.unwrap().data.unwrap();
    assert_eq!(data[PLANE_CONFIG_KEY], format!("replicas: 2\nuid: {uid}\n"));
    assert_eq!(data["other"], "kept");

    cluster.apply(&control_plane("{endpoint: {hosts: [onboarding.example], secretName: first}, uid: named}")).unwrap();
    reading.until("the UID of the ControlPlane", |it| it.plane.as_ref().is_some_and(|it| it.uid == "named")).await;
    cluster.apply(&control_plane("{endpoint: {hosts: [onboarding.example], secretName: first}}")).unwrap();
    reading.until("the UID that was kept", |it| it.plane.as_ref().is_some_and(|it| it.uid == uid)).await;
}

async fn only_the_secret_that_is_named(cluster: &Cluster, reading: &mut Reading) {
    let certificate = |it: &Snapshot| it.tls.as_ref().map(|tls| tls.certificate_chain.clone()).unwrap_or_default();
    reading.until("a word about the Secret", |it| says(it, "the Secret istio-system/first")).await;
    cluster.apply(&secret("second", "Ag==")).unwrap();
    cluster.apply(&secret("first", "AQ==")).unwrap();
    reading.until("the certificate", |it| certificate(it).contains("AQ==") && !says(it, "Secret")).await;
    cluster.apply(&secret("first", "Aw==")).unwrap();
    reading.until("the renewed certificate", |it| certificate(it).contains("Aw==")).await;
    cluster.apply(&control_plane("{endpoint: {hosts: [onboarding.example], secretName: second}}")).unwrap();
    reading.until("the other certificate", |it| certificate(it).contains("Ag==")).await;
    // The first isn't followed any more, and the third isn't there.
    cluster.apply(&secret("first", "AQ==")).unwrap();
    cluster.apply(&control_plane("{endpoint: {hosts: [onboarding.example], secretName: third}}")).unwrap();
    reading.until("no certificate", |it| it.tls.is_none() && says(it, "istio-system/third")).await;
    cluster.apply(&control_plane("{endpoint: {hosts: [onboarding.example], secretName: first}}")).unwrap();
    reading.until("the first certificate", |it| certificate(it).contains("AQ==")).await;
}

async fn changes_come_within_a_second(cluster: &Cluster, reading: &mut Reading) {
    let mut quickest = Duration::MAX;
    for weight in 1..=3 {
        cluster.apply(&group("ratings", weight)).unwrap();
        // From when kubectl is done.
        let done = Instant::now();
        let is = |it: &Arc<Snapshot>| it.groups.get(&name("ratings")).is_some_and(|it| it.weight == Some(weight));
        reading.until("the group", is).await;
        quickest = quickest.min(done.elapsed());
    }
    assert!(quickest < Duration::from_secs(1), "{quickest:?}");
    let owner = reading.source.groups().borrow()[&name("ratings")].clone();
    assert_eq!((owner.group.weight, owner.generation, owner.uid.len()), (Some(3), 3, 36));
    // What only the API server writes is no change.
    let generation = reading.snapshots.borrow().generation;
    cluster.kubectl(["annotate", "workloadgroup", "ratings", "-n", "bookinfo", "touched=true"]).unwrap();
    cluster.apply(&policy("later", "'210987654321'")).unwrap();
    let snapshot = reading.until("the policy", |it| policies(it) == ["later", "narrow"]).await;
    assert_eq!(snapshot.generation, generation + 1);
    cluster.kubectl(["delete", "onboardingpolicy", "later", "-n", "bookinfo"]).unwrap();
    reading.until("no policy", |it| policies(it) == ["narrow"]).await;
}

async fn a_group_that_waits_for_its_dependents(cluster: &Cluster, reading: &mut Reading) {
    cluster.apply(&group("held", 1).replace("name: held,", "name: held, finalizers: [example.com/held],")).unwrap();
    reading.until("the group", |it| it.groups.contains_key(&name("held"))).await;
    cluster.kubectl(["delete", "workloadgroup", "held", "-n", "bookinfo", "--wait=false"]).unwrap();
    let snapshot = reading.until("no group", |it| !it.groups.contains_key(&name("held"))).await;
    assert!(!snapshot.policy_unreadable);
    let still = cluster.kubectl(["get", "workloadgroup", "held", "-n", "bookinfo", "-o", "name"]).unwrap();
    assert!(still.contains("held"), "{still}");
    let freed = r#"{"metadata": {"finalizers": null}}"#;
    cluster.kubectl(["patch", "workloadgroup", "held", "-n", "bookinfo", "--type=merge", "-p", freed]).unwrap();
}

async fn what_the_provisioner_needs(cluster: &Cluster, reading: &Reading) {
    let mut inputs = reading.source.inputs();
    cluster
        .apply(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio, namespace: istio-system}\ndata: {mesh: \"trustDomain: example.org\\n\"}\n---\n\
             apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio-canary, namespace: istio-system}\ndata: {mesh: \"\"}\n---\n\
             apiVersion: v1\nkind: ConfigMap\nmetadata: {name: istio-ca-root-cert, namespace: istio-system}\ndata: {root-cert.pem: PEM}\n---\n\
             apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {name: bookinfo-ratings-no-iptables, namespace: bookinfo}\n\
             spec: {egress: [{bind: 127.0.0.2, port: {number: 8080}, hosts: ['./*']}]}\n---\n\
             apiVersion: v1\nkind: Service\nmetadata: {name: details, namespace: bookinfo, annotations: {networking.istio.io/exportTo: '.'}}\n\
             spec: {ports: [{port: 8080}], selector: {app: details}}\n---\n\
             apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: example, namespace: bookinfo}\n\
             spec: {hosts: [example.org], resolution: DNS, ports: [{number: 8080, name: http, protocol: HTTP}], exportTo: ['*']}\n",
        )
        .unwrap();
    cluster.kubectl(["label", "namespace", "bookinfo", "istio.io/rev=canary"]).unwrap();
    let service = |namespace, name, export_to, port| {
        Named::service(namespace, name, export_to, &serde_json::json!({"ports": [{"port": port}]}))
    };
    let entry = serde_json::json!({"hosts": ["example.org"], "ports": [{"number": 8080}], "exportTo": ["*"]});
    let named = [
        service("bookinfo", "details", Some("."), 8080),
        service("default", "kubernetes", None, 443),
        Named::service_entry("bookinfo", &entry),
    ];
    let expected = Names::new(named.into_iter().flatten().collect(), &Names::default());
    let complete = inputs.wait_for(|it| {
        let bookinfo = it.namespaces.get("bookinfo");
        it.meshes.by_revision.len() == 2
            && bookinfo.is_some_and(|it| it.sidecars.len() == 1 && it.revision.as_deref() == Some("canary"))
            && it.namespaces.get("istio-system").is_some_and(|it| it.root_certificates.is_some())
            && *it.names == expected
    });
    let inputs = tokio::time::timeout(WITHIN, complete).await.unwrap().unwrap().clone();
    assert_eq!(inputs.meshes.by_revision[DEFAULT_REVISION].as_ref().unwrap().trust_domain, "example.org");
    assert!(inputs.groups.contains_key(&name("ratings")));
    // What nobody asks of a Service changes nothing; a Service that is gone does.
    let names = inputs.names.clone();
    cluster.kubectl(["label", "service", "details", "-n", "bookinfo", "touched=true"]).unwrap();
    cluster.kubectl(["delete", "serviceentry", "example", "-n", "bookinfo"]).unwrap();
    let mut inputs = reading.source.inputs();
    let fewer = inputs.wait_for(|it| !Arc::ptr_eq(&it.names, &names));
    let inputs = tokio::time::timeout(WITHIN, fewer).await.unwrap().unwrap().clone();
    let named = [service("bookinfo", "details", Some("."), 8080), service("default", "kubernetes", None, 443)];
    assert_eq!(*inputs.names, Names::new(named.into_iter().flatten().collect(), &Names::default()));
}

/// Its connections stay open, and nothing comes by them; what changes afterwards does.
async fn the_api_server_stands_still(cluster: &Cluster, reading: &mut Reading) {
    cluster.freeze_api(true).unwrap();
    let asked = Instant::now();
    cluster.kubectl(["get", "--raw", "/readyz", "--request-timeout=10s"]).unwrap_err();
    assert!(asked.elapsed() >= Duration::from_secs(10), "it answered after {:?}", asked.elapsed());
    let snapshot = reading.snapshots.borrow().clone();
    assert_eq!((policies(&snapshot), snapshot.policy_unreadable), (vec!["narrow"], false), "who is known may come");
    cluster.freeze_api(false).unwrap();
    cluster.apply(&policy("thawed", "'210987654321'")).unwrap();
    let done = Instant::now();
    reading.until("the new policy", |it| policies(it) == ["narrow", "thawed"]).await;
    assert!(done.elapsed() < Duration::from_secs(5), "{:?}", done.elapsed());
    cluster.kubectl(["delete", "onboardingpolicy", "thawed", "-n", "bookinfo"]).unwrap();
    reading.until("no policy", |it| policies(it) == ["narrow"]).await;
}

/// A line to the API server that can be cut.
struct Line {
    address: SocketAddr,
    whole: watch::Sender<bool>,
}

impl Line {
    async fn to(server: SocketAddr) -> Self {
        let listener = TcpListener::bind((server.ip(), 0)).await.unwrap();
        let (address, whole) = (listener.local_addr().unwrap(), watch::Sender::new(true));
        let state = whole.subscribe();
        tokio::spawn(async move {
            while let Ok((mut here, _)) = listener.accept().await {
                let mut state = state.clone();
                tokio::spawn(async move {
                    let carry = async {
                        let mut there = TcpStream::connect(server).await?;
                        copy_bidirectional(&mut here, &mut there).await
                    };
                    tokio::select! {
                        _ = carry => {}
                        _ = state.wait_for(|whole| !whole) => {}
                    }
                });
            }
        });
        Self { address, whole }
    }
}

/// While its line was cut a policy was deleted, and then everything forgotten by which that could be told: it is listed anew.
async fn what_went_while_nobody_listened(cluster: &Cluster) {
    cluster.apply(&policy("doomed", "'210987654321'")).unwrap();
    let line = Line::to(cluster.api_address()).await;
    let kubeconfig = std::fs::read_to_string(cluster.kubeconfig()).unwrap();
    let kubeconfig = kubeconfig.replace(&cluster.api_address().to_string(), &line.address.to_string());
    let kubeconfig = Kubeconfig::from_yaml(&kubeconfig).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    let mut reading = Reading::with(kube::Client::try_from(config).unwrap(), Duration::from_secs(300));
    reading.until("both", |it| policies(it) == ["doomed", "narrow"]).await;
    line.whole.send_replace(false);
    reading.until("a word about age", |it| says(it, "what is known of OnboardingPolicies is as of")).await;
    cluster.kubectl(["delete", "onboardingpolicy", "doomed", "-n", "bookinfo"]).unwrap();
    cluster.apply(&group("ratings", 9)).unwrap();
    cluster.kill_api().unwrap();
    cluster.compact().unwrap();
    cluster.start_api().unwrap();
    assert_eq!(policies(&reading.snapshots.borrow()), ["doomed", "narrow"]);
    line.whole.send_replace(true);
    reading.until("what is left", |it| policies(it) == ["narrow"] && it.faults.is_empty()).await;
    reading.end().await;
}

async fn the_api_server_goes_and_comes(cluster: &Cluster, reading: &mut Reading) {
    let mut impatient = Reading::of(cluster, Duration::from_secs(5)).await;
    impatient.until("everything", |it| policies(it) == ["narrow"] && it.tls.is_some()).await;
    cluster.kill_api().unwrap();
    let snapshot = impatient.until("too old", |it| it.policy_unreadable).await;
    assert!(snapshot.policies.policies().is_empty());
    assert!(snapshot.plane.is_some() && snapshot.tls.is_some() && !snapshot.groups.is_empty());
    assert!(says(&snapshot, "too old to let anybody in by it"), "{:?}", snapshot.faults);
    assert!(impatient.source.groups().borrow().contains_key(&name("ratings")), "the mesh goes on");
    assert_eq!(impatient.metric("onboarding_cluster_policy_unreadable"), Some(1));
    assert!(impatient.metric("onboarding_cluster_staleness_seconds{objects=\"onboardingpolicies\"}").unwrap() >= 5);

    // Who is patient lets in by what is known, and says that it is old.
    let snapshot =
        reading.until("a word about age", |it| says(it, "what is known of OnboardingPolicies is as of")).await;
    assert_eq!((policies(&snapshot), snapshot.policy_unreadable), (vec!["narrow"], false));

    cluster.start_api().unwrap();
    cluster.kubectl(["delete", "onboardingpolicy", "narrow", "-n", "bookinfo"]).unwrap();
    cluster.apply(&policy("after", "'123456789012'")).unwrap();
    for reading in [&mut impatient, reading] {
        let is_well = |it: &Arc<Snapshot>| policies(it) == ["after"] && !it.policy_unreadable && it.faults.is_empty();
        reading.until("what is new", is_well).await;
    }
    impatient.end().await;
}
