//! The manifests directory: what is configured follows the files, and fails closed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use onboarding_core::name::GroupName;
use onboarding_endpoint::backend::{ConfigSource, Snapshot};
use onboarding_standalone::directory::{ManifestDirectory, OtherFaults};
use onboarding_standalone::mesh::MeshConfig;
use prometheus_client::registry::Registry;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const UID: &str = "11111111-2222-3333-4444-555555555555";
const WITHIN: Duration = Duration::from_secs(20);

struct Followed {
    snapshot: watch::Receiver<Arc<Snapshot>>,
    mesh: watch::Receiver<Arc<MeshConfig>>,
    mesh_faults: watch::Sender<Vec<String>>,
    metrics: Registry,
    _stop: tokio_util::sync::DropGuard,
}

fn follow(root: &Path) -> Followed {
    let stop = CancellationToken::new();
    let mesh_faults = watch::Sender::new(Vec::new());
    let others = OtherFaults { own: Box::new(Vec::new), mesh: mesh_faults.subscribe() };
    let mut metrics = Registry::default();
    let (directory, _task) = ManifestDirectory::start(root, UID.to_owned(), others, &mut metrics, stop.clone());
    Followed { snapshot: directory.watch(), mesh: directory.mesh(), mesh_faults, metrics, _stop: stop.drop_guard() }
}

impl Followed {
    fn now(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    async fn until(&mut self, what: &str, wanted: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
        let waited = tokio::time::timeout(WITHIN, self.snapshot.wait_for(|snapshot| wanted(snapshot))).await;
        let found = waited.map(|found| found.unwrap().clone());
        found.unwrap_or_else(|_| panic!("not within {WITHIN:?}: {what}; last: {:#?}", self.snapshot.borrow()))
    }

    async fn until_mesh(&mut self, what: &str, wanted: impl Fn(&MeshConfig) -> bool) -> Arc<MeshConfig> {
        let waited = tokio::time::timeout(WITHIN, self.mesh.wait_for(|mesh| wanted(mesh))).await;
        let found = waited.map(|found| found.unwrap().clone());
        found.unwrap_or_else(|_| panic!("not within {WITHIN:?}: {what}; last: {:#?}", self.mesh.borrow()))
    }

    /// The metric `onboarding_manifests_<name>`.
    fn metric(&self, name: &str) -> u32 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.metrics).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("onboarding_manifests_{name} ")));
        line.unwrap_or_else(|| panic!("{name}\n{text}")).parse().unwrap()
    }

    /// Set before a snapshot is seen.
    fn alarms(&self) -> (u32, u32) {
        (self.metric("policy_unreadable"), self.metric("stale_files"))
    }
}

fn policies(snapshot: &Snapshot) -> Vec<&str> {
    snapshot.policies.policies().iter().map(|policy| policy.name.as_str()).collect()
}

fn services(mesh: &MeshConfig) -> Vec<&str> {
    mesh.services.iter().map(|service| service.name.as_str()).collect()
}

fn ratings() -> GroupName {
    GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() }
}

fn policy(name: &str) -> String {
    format!(
        "apiVersion: authorization.onboarding.tetrate.io/v1alpha1
kind: OnboardingPolicy
metadata: {{name: {name}, namespace: bookinfo}}
spec:
  allow:
  - workloads:
    - aws: {{accounts: ['123456789012'], ec2: {{}}}}
    onboardTo:
    - workloadGroupSelector: {{}}
"
    )
}

const GROUP: &str = "apiVersion: networking.istio.io/v1alpha3
kind: WorkloadGroup
metadata: {name: ratings, namespace: bookinfo, labels: {app: ratings}}
spec: {template: {labels: {app: ratings}, serviceAccount: ratings-vm}}
";

fn service(name: &str) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: bookinfo}}
spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: 8080}}]}}
"
    )
}

fn control_plane(uid: &str) -> String {
    format!(
        "apiVersion: install.tetrate.io/v1alpha1
kind: ControlPlane
metadata: {{name: controlplane, namespace: istio-system}}
spec:
  meshExpansion:
    onboarding:
      endpoint: {{hosts: [onboarding.example], secretName: endpoint-tls}}
{uid}
"
    )
}

fn secret() -> String {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["onboarding.example".to_owned()]).unwrap().self_signed(&key).unwrap();
    let secret = serde_json::json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": "endpoint-tls", "namespace": "istio-system"},
        "stringData": {"tls.crt": certificate.pem(), "tls.key": key.serialize_pem()},
    });
    secret.to_string()
}

fn write(root: &Path, file: &str, text: &str) {
    std::fs::write(root.join(file), text).unwrap();
}

/// As an editor does.
fn replace(root: &Path, file: &str, text: &str) {
    let part = root.join(format!(".{file}.swp"));
    std::fs::write(&part, text).unwrap();
    std::fs::rename(part, root.join(file)).unwrap();
}

#[tokio::test]
async fn the_demos_manifests_are_read() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/manifests");
    let followed = follow(&root);
    let snapshot = followed.now();
    let plane = snapshot.plane.clone().unwrap();
    assert_eq!(plane.uid, UID);
    assert_eq!(plane.hosts, ["onboarding-endpoint.your-company.corp"]);
    assert_eq!(plane.issuers.len(), 1);
    assert_eq!(policies(&snapshot), ["allow-frontends-of-the-datacenter", "allow-narrow-subset-of-aws-ec2-instances"]);
    assert_eq!(snapshot.groups.len(), 2);
    assert!(!snapshot.policy_unreadable);
    assert!(snapshot.tls.is_none());
    let [fault] = snapshot.faults.as_slice() else { panic!("{:?}", snapshot.faults) };
    assert!(fault.contains("Secret istio-system/onboarding-endpoint-tls"), "{fault}");
    let mesh = followed.mesh.borrow().clone();
    assert_eq!(services(&mesh), ["productpage", "ratings"]);
    assert_eq!(mesh.sidecars.len(), 2);
    assert_eq!(mesh.propagation_delay, plane.propagation_delay);
}

#[tokio::test]
async fn settings_and_certificate_follow_their_files() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let mut followed = follow(root);
    let said = |snapshot: &Snapshot, wanted: &str| snapshot.faults.iter().any(|fault| fault.contains(wanted));
    assert!(followed.now().plane.is_none() && said(&followed.now(), "onboarding isn't enabled"));
    write(root, "plane.yaml", &control_plane(""));
    let snapshot = followed.until("enabled", |snapshot| snapshot.plane.is_some()).await;
    assert!(said(&snapshot, "isn't in the manifests"));
    write(root, "secret.json", &secret());
    let first = followed.until("a certificate", |snapshot| snapshot.tls.is_some()).await;
    assert!(first.faults.is_empty(), "{:?}", first.faults);
    // Renewed in place.
    replace(root, "secret.json", &secret());
    followed.until("another certificate", |snapshot| snapshot.tls.is_some() && snapshot.tls != first.tls).await;
    // Half of a certificate: the last whole one stays, and it is said.
    write(root, "secret.json", &secret().replace("BEGIN CERTIFICATE", "BEGIN NOTHING"));
    let snapshot = followed.until("a fault", |snapshot| !snapshot.faults.is_empty()).await;
    assert!(snapshot.tls.is_some());
    // Another UID takes effect at once.
    replace(root, "plane.yaml", &control_plane("      uid: https://onboarding.example"));
    followed
        .until("its UID", |snapshot| {
            snapshot.plane.as_ref().is_some_and(|plane| plane.uid == "https://onboarding.example")
        })
        .await;
    // Two that enable it: nobody can say which is meant.
    write(root, "plane2.yaml", &control_plane("").replace("name: controlplane", "name: other"));
    let snapshot = followed.until("none", |snapshot| snapshot.plane.is_none()).await;
    assert!(said(&snapshot, "2 ControlPlanes"), "{:?}", snapshot.faults);
}

#[tokio::test]
async fn every_way_of_changing_a_file_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    write(root, "group.yaml", GROUP);
    let mut followed = follow(root);
    assert_eq!(followed.now().groups.len(), 1);

    write(root, "a.yaml", &policy("a"));
    followed.until("written", |snapshot| policies(snapshot) == ["a"]).await;
    replace(root, "a.yaml", &policy("b"));
    followed.until("renamed over", |snapshot| policies(snapshot) == ["b"]).await;
    // In place, in two halves: whatever is seen in between admits nobody, and the whole is what counts in the end.
    let text = policy("c");
    let (start, rest) = text.split_at(text.len() - 40);
    write(root, "a.yaml", start);
    followed.until("half", |snapshot| policies(snapshot).is_empty() && snapshot.policy_unreadable).await;
    write(root, "a.yaml", &format!("{start}{rest}"));
    followed.until("whole", |snapshot| policies(snapshot) == ["c"] && !snapshot.policy_unreadable).await;
    // A new directory, and what is put into it later.
    std::fs::create_dir(root.join("sub")).unwrap();
    write(root, "sub/d.yml", &policy("d"));
    followed.until("in a new directory", |snapshot| policies(snapshot) == ["c", "d"]).await;
    write(root, "sub/e.json", &policy("e"));
    followed.until("later in it", |snapshot| policies(snapshot) == ["c", "d", "e"]).await;
    std::fs::remove_file(root.join("a.yaml")).unwrap();
    let snapshot = followed.until("deleted", |snapshot| policies(snapshot) == ["d", "e"]).await;
    assert!(!snapshot.policy_unreadable, "what is deleted is withdrawn");
    std::fs::remove_dir_all(root.join("sub")).unwrap();
    followed.until("deleted with its directory", |snapshot| policies(snapshot).is_empty()).await;
}

#[tokio::test]
async fn a_config_map_is_swapped_without_a_moment_of_both() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let put = |version: &str, name: &str| {
        std::fs::create_dir(root.join(version)).unwrap();
        std::fs::write(root.join(version).join("policy.yaml"), policy(name)).unwrap();
    };
    put("..1", "a");
    symlink("..1", root.join("..data")).unwrap();
    symlink("..data/policy.yaml", root.join("policy.yaml")).unwrap();
    let mut followed = follow(root);
    assert_eq!(policies(&followed.now()), ["a"]);
    for (old, new, name) in [("..1", "..2", "b"), ("..2", "..3", "c")] {
        put(new, name);
        symlink(new, root.join("..data_tmp")).unwrap();
        std::fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
        std::fs::remove_dir_all(root.join(old)).unwrap();
        let snapshot = followed.until(name, |snapshot| policies(snapshot) == [name]).await;
        assert!(!snapshot.policy_unreadable);
    }
}

#[tokio::test]
async fn a_root_that_is_replaced_or_comes_later_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("manifests");
    let mut followed = follow(&root);
    assert!(followed.now().policy_unreadable, "a directory that isn't there may have had policies");
    std::fs::create_dir(&root).unwrap();
    write(&root, "a.yaml", &policy("a"));
    followed.until("there", |snapshot| policies(snapshot) == ["a"] && !snapshot.policy_unreadable).await;
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    write(&other, "a.yaml", &policy("b"));
    std::fs::rename(&root, dir.path().join("old")).unwrap();
    std::fs::rename(&other, &root).unwrap();
    followed.until("another", |snapshot| policies(snapshot) == ["b"]).await;
    write(&root, "a.yaml", &policy("c"));
    followed.until("followed there", |snapshot| policies(snapshot) == ["c"]).await;
}

#[tokio::test]
async fn what_cannot_be_read_admits_nobody_while_the_mesh_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let all = |policy: &str| format!("{policy}---\n{GROUP}---\n{}", service("ratings"));
    write(root, "all.yaml", &all(&policy("a")));
    write(root, "other.yaml", &policy("other"));
    let mut followed = follow(root);
    assert_eq!(policies(&followed.now()), ["a", "other"]);
    let before = followed.mesh.borrow().clone();
    assert_eq!(followed.alarms(), (0, 0));

    // A rule that is wrong: that policy alone is absent; the mesh's part of the file is whole.
    replace(root, "all.yaml", &all(&policy("a").replace("'123456789012'", "'12'")));
    let snapshot = followed.until("suspended", |snapshot| snapshot.policy_unreadable).await;
    assert_eq!(policies(&snapshot), ["other"]);
    assert!(snapshot.faults.iter().any(|fault| fault.contains("OnboardingPolicy bookinfo/a")), "{:?}", snapshot.faults);
    assert!(snapshot.groups.contains_key(&ratings()));
    assert_eq!(followed.alarms(), (1, 0));

    // Rubbish: all of the file is absent for authorization, and the mesh stays what it was.
    replace(root, "all.yaml", "a: [b\n");
    let snapshot = followed.until("absent", |snapshot| !snapshot.groups.contains_key(&ratings())).await;
    assert!(snapshot.policy_unreadable && policies(&snapshot) == ["other"]);
    assert_eq!(*followed.mesh.borrow(), before);
    assert_eq!(followed.alarms(), (1, 1));

    // Not even a file.
    std::fs::remove_file(root.join("all.yaml")).unwrap();
    symlink("nowhere", root.join("all.yaml")).unwrap();
    let snapshot = followed
        .until("dangling", |snapshot| snapshot.faults.iter().any(|fault| fault.contains("can't be read")))
        .await;
    assert!(snapshot.policy_unreadable);
    assert_eq!(*followed.mesh.borrow(), before);

    // A Service that is wrong leaves policies alone, and the mesh with the last good one.
    replace(root, "all.yaml", &all(&policy("a")).replace("port: 8080", "port: 80800"));
    let snapshot = followed.until("readable", |snapshot| policies(snapshot) == ["a", "other"]).await;
    assert!(!snapshot.policy_unreadable && !snapshot.faults.is_empty(), "{:?}", snapshot.faults);
    assert_eq!(*followed.mesh.borrow(), before);
    assert_eq!(followed.alarms(), (0, 1));

    // Right again; then gone, which is meant.
    replace(root, "all.yaml", &all(&policy("a")).replace("port: 8080", "port: 8081"));
    followed.until_mesh("the new port", |mesh| mesh.services[0].ports[0].number == 8081).await;
    assert_eq!(followed.alarms(), (0, 0));
    std::fs::remove_file(root.join("all.yaml")).unwrap();
    followed.until_mesh("gone", |mesh| mesh.services.is_empty() && mesh.groups.is_empty()).await;
}

#[tokio::test]
async fn of_two_with_one_name_neither_admits() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    write(root, "a.yaml", &policy("a"));
    write(root, "group.yaml", GROUP);
    let mut followed = follow(root);
    write(root, "b.yaml", &format!("{}---\n{GROUP}", policy("a")));
    let snapshot = followed.until("absent", |snapshot| snapshot.policy_unreadable).await;
    assert!(policies(&snapshot).is_empty() && snapshot.groups.is_empty());
    assert!(snapshot.faults.iter().any(|fault| fault.contains("twice")), "{:?}", snapshot.faults);
    assert!(followed.mesh.borrow().groups.contains_key(&ratings()), "the mesh goes on with the first");
}

#[tokio::test]
async fn nothing_changed_is_no_news() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    write(root, "a.yaml", &policy("a"));
    let mut followed = follow(root);
    let (generation, readings) = (followed.now().generation, followed.metric("readings_total"));
    // The same again, a comment, a file of somebody else's; then one real change.
    replace(root, "a.yaml", &policy("a"));
    replace(root, "a.yaml", &format!("# for the datacenter\n{}", policy("a")));
    write(root, "notes.txt", "nothing");
    let read = async {
        while followed.metric("readings_total") == readings {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(WITHIN, read).await.expect("it is read");
    followed.mesh_faults.send_replace(vec!["a fault of the mesh".to_owned()]);
    let snapshot =
        followed.until("said", |snapshot| !snapshot.faults.iter().all(|fault| fault != "a fault of the mesh")).await;
    assert_eq!(snapshot.generation, generation + 1);
    replace(root, "a.yaml", &policy("b"));
    let snapshot = followed.until("changed", |snapshot| policies(snapshot) == ["b"]).await;
    assert_eq!(snapshot.generation, generation + 2);
}
