//! The whole backend: from a stored registration to what its agent is sent.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod fixture;

use fixture::{live, name};
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use onboarding_core::name::GroupName;
use onboarding_core::registration::{ConnectedOver, State};
use onboarding_endpoint::backend::{ProvisionError, Workload};
use onboarding_standalone::{Backend, Options};
use onboarding_wire::onboarding::{BootConfiguration, EnvoyBoot, SidecarReport, boot_configuration};
use std::path::Path;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

type Boots = BoxStream<'static, Result<BootConfiguration, ProvisionError>>;

const BOUND: Duration = Duration::from_secs(5);

struct Plane {
    backend: Backend,
    metrics: prometheus_client::registry::Registry,
    stop: CancellationToken,
}

impl Plane {
    fn open(manifests: &Path, data_dir: &Path) -> Self {
        let options = Options {
            manifests: manifests.to_owned(),
            data_dir: data_dir.to_owned(),
            trust_domain: Options::DEFAULT_TRUST_DOMAIN.to_owned(),
            certificate_life: Options::DEFAULT_CERTIFICATE_LIFE,
        };
        let mut metrics = prometheus_client::registry::Registry::default();
        let stop = CancellationToken::new();
        let backend = onboarding_standalone::open(options, &mut metrics, stop.clone()).unwrap();
        Self { backend, metrics, stop }
    }

    /// As a restart does.
    async fn close(self) {
        self.stop.cancel();
        for task in self.backend.tasks {
            tokio::time::timeout(BOUND, task).await.unwrap().unwrap();
        }
    }

    async fn store(&self, group: &str, host: &str, state: &State) {
        let name = name(&format!("{group}-{host}"));
        let version = self.backend.registry.load(&name).await.unwrap().version;
        self.backend.registry.store(&name, version, state).await.unwrap();
    }

    fn boot(&self, group: &str, host: &str, held: &str) -> Boots {
        self.backend.provisioner.boot(&workload(group, host), held)
    }
}

fn workload(group: &str, host: &str) -> Workload {
    Workload {
        name: name(&format!("{group}-{host}")),
        group: GroupName { namespace: "bookinfo".to_owned(), name: group.to_owned() },
    }
}

async fn next(boots: &mut Boots) -> BootConfiguration {
    let item = tokio::time::timeout(BOUND, boots.next()).await.expect("nothing came");
    item.expect("the stream ended").unwrap_or_else(|error| panic!("{error}"))
}

fn envoy(boot: &BootConfiguration) -> &EnvoyBoot {
    match &boot.sidecar {
        Some(boot_configuration::Sidecar::Envoy(envoy)) => envoy,
        other => panic!("{other:?}"),
    }
}

fn manifests() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/manifests")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

fn edit(manifests: &Path, file: &str, change: impl Fn(&str) -> String) {
    let path = manifests.join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    let changed = change(&text);
    assert_ne!(text, changed);
    let part = manifests.join(".part");
    std::fs::write(&part, changed).unwrap();
    std::fs::rename(part, path).unwrap();
}

#[tokio::test]
async fn an_agent_is_sent_all_then_what_changes_then_the_end() {
    let (manifests, data) = (manifests(), tempfile::tempdir().unwrap());
    let plane = Plane::open(manifests.path(), data.path());
    plane.store("ratings", "vm1", &live("ratings", "vm1", "10.0.0.1", true)).await;
    let mut boots = plane.boot("ratings", "vm1", "");
    let first = next(&mut boots).await;
    assert_eq!(envoy(&first).base_version, "");
    assert!(envoy(&first).changed.iter().any(|resource| resource.name == "10.0.0.1_8080"));
    assert_eq!(first.propagation_delay.unwrap().seconds, 2);
    assert_eq!(first.spiffe_id, "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm");
    assert_eq!(first.probe, None);

    // Another joins: its endpoint comes, and nothing else. Its own group has a probe.
    plane.store("productpage", "vm2", &live("productpage", "vm2", "10.0.0.2", true)).await;
    let second = next(&mut boots).await;
    assert_eq!(envoy(&second).base_version, first.version);
    let changed: Vec<&str> = envoy(&second).changed.iter().map(|resource| resource.name.as_str()).collect();
    assert_eq!(changed, ["outbound|8080||productpage.bookinfo.svc.cluster.local"]);
    assert!(next(&mut plane.boot("productpage", "vm2", "")).await.probe.is_some());

    // Who comes back with what it was sent last is sent nothing until something changes; with an older version the difference; else all.
    let mut again = plane.boot("ratings", "vm1", &second.version);
    let from_first = next(&mut plane.boot("ratings", "vm1", &first.version)).await;
    assert_eq!((&envoy(&from_first).base_version, &from_first.version), (&first.version, &second.version));
    assert_eq!(envoy(&from_first).changed.len(), 1);
    let unknown = next(&mut plane.boot("ratings", "vm1", "of another plane")).await;
    assert_eq!(envoy(&unknown).base_version, "");

    // The configuration changes: the first thing that the one that came back is sent.
    std::fs::remove_file(manifests.path().join("example-org.yaml")).unwrap();
    let third = next(&mut again).await;
    assert_eq!(envoy(&third).base_version, second.version);
    assert_eq!(envoy(&third).removed[0].name, "outbound|8080||example.org");

    // A group's labels and weight follow at once: entries of the same group.
    edit(manifests.path(), "ratings.yaml", |text| {
        text.replace("    network: virtual-machines # (3)", "    network: virtual-machines\n    weight: 7")
    });
    let fourth = next(&mut again).await;
    // Of a resource that it has, what differs in it.
    let changed = &envoy(&fourth).changed[0];
    let inserted: Vec<u8> = changed.splices.iter().flat_map(|splice| splice.insert.clone()).collect();
    assert!(String::from_utf8_lossy(&inserted).contains("\"load_balancing_weight\":7"), "{fourth:?}");
    assert!(
        changed.json.is_empty() && envoy(&fourth).host_aliases_kept && fourth.host_aliases.is_empty(),
        "{fourth:?}"
    );

    // It leaves.
    plane.store("ratings", "vm1", &State::Absent).await;
    assert!(tokio::time::timeout(BOUND, again.next()).await.unwrap().is_none());
    assert!(plane.boot("ratings", "vm1", "").next().await.is_none(), "who isn't registered gets nothing");
    plane.close().await;
}

#[tokio::test]
async fn a_restart_sends_nothing_that_an_agent_has() {
    let (manifests, data) = (manifests(), tempfile::tempdir().unwrap());
    let plane = Plane::open(manifests.path(), data.path());
    let uid = plane.backend.config.watch().borrow().plane.clone().unwrap().uid.clone();
    plane.store("ratings", "vm1", &live("ratings", "vm1", "10.0.0.1", true)).await;
    let first = next(&mut plane.boot("ratings", "vm1", "")).await;
    let keys = plane.backend.keys.store(0, b"keys").await.unwrap();
    plane.close().await;

    // The lock goes with the last of the first plane's threads.
    let deadline = std::time::Instant::now() + BOUND;
    while onboarding_standalone::data_dir::DataDir::open(data.path()).is_err() {
        assert!(std::time::Instant::now() < deadline, "the data directory is still locked");
        tokio::task::yield_now().await;
    }
    let plane = Plane::open(manifests.path(), data.path());
    assert_eq!(plane.backend.config.watch().borrow().plane.clone().unwrap().uid, uid);
    assert_eq!(plane.backend.keys.load().await.unwrap(), (b"keys".to_vec(), keys));
    let mut boots = plane.boot("ratings", "vm1", &first.version);
    assert!(boots.next().now_or_never().is_none(), "a repetition");
    plane.store("productpage", "vm2", &live("productpage", "vm2", "10.0.0.2", true)).await;
    let second = next(&mut boots).await;
    assert_eq!(envoy(&second).base_version, first.version);
    assert_eq!(envoy(&second).changed.len(), 1);
}

#[tokio::test]
async fn a_certificate_is_the_groups_and_only_for_who_is_in_it() {
    let (manifests, data) = (manifests(), tempfile::tempdir().unwrap());
    let plane = Plane::open(manifests.path(), data.path());
    let provisioner = &plane.backend.provisioner;
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
    let refused = provisioner.certificate(&workload("ratings", "vm1"), csr.der()).await.unwrap_err();
    assert!(matches!(&refused, ProvisionError::Refused(why) if why.contains("isn't registered")), "{refused}");
    plane.store("ratings", "vm1", &live("ratings", "vm1", "10.0.0.1", true)).await;
    let issued = provisioner.certificate(&workload("ratings", "vm1"), csr.der()).await.unwrap();
    let leaf = pem::parse(&issued.chain).unwrap();
    let (_, leaf) = x509_parser::parse_x509_certificate(leaf.contents()).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap().value.general_names.clone();
    let id = x509_parser::extensions::GeneralName::URI("spiffe://cluster.local/ns/bookinfo/sa/ratings-vm");
    assert_eq!(names, [id]);
    assert!(issued.roots.contains("BEGIN CERTIFICATE") && !issued.roots.contains("PRIVATE"));

    let mut other = workload("ratings", "vm1");
    other.group.name = "productpage".to_owned();
    let refused = provisioner.certificate(&other, csr.der()).await.unwrap_err();
    assert!(matches!(refused, ProvisionError::Refused(_)), "{refused}");
    let refused = provisioner.certificate(&workload("ratings", "vm1"), b"rubbish").await.unwrap_err();
    assert!(matches!(&refused, ProvisionError::Refused(why) if why.contains("PKCS #10")), "{refused}");

    let report = SidecarReport { boot_version: "1".to_owned(), accepted: false, message: "no".to_owned() };
    provisioner.reported(&workload("ratings", "vm1"), &report);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &plane.metrics).unwrap();
    for wanted in [
        "onboarding_mesh_certificates_total{outcome=\"issued\"} 1",
        "onboarding_mesh_certificates_total{outcome=\"refused\"} 3",
        "onboarding_mesh_sidecar_reports_total{outcome=\"rejected\"} 1",
    ] {
        assert!(text.contains(wanted), "{wanted} in\n{text}");
    }
}

#[tokio::test]
async fn what_is_wrong_with_the_mesh_is_said() {
    let (manifests, data) = (manifests(), tempfile::tempdir().unwrap());
    let plane = Plane::open(manifests.path(), data.path());
    let mut snapshots = plane.backend.config.watch();
    let mut until = async |wanted: &str| {
        let waited = tokio::time::timeout(
            BOUND,
            snapshots.wait_for(|snapshot| snapshot.faults.iter().any(|fault| fault.contains(wanted))),
        );
        let found = waited.await.map(|found| found.map(|_| ()));
        found
            .unwrap_or_else(|_| panic!("{wanted}: not said: {:?}", plane.backend.config.watch().borrow().faults))
            .unwrap();
    };
    // One that reports only an address outside, but is to be reached inside.
    let State::Live(mut lost) = live("ratings", "vm1", "10.0.0.1", true) else { panic!() };
    lost.report.addresses[0].kind = ConnectedOver::Internet;
    plane.store("ratings", "vm1", &State::Live(lost)).await;
    until("no VPC address among those").await;
    let error = plane.boot("ratings", "vm1", "").next().await.unwrap().unwrap_err();
    assert!(matches!(&error, ProvisionError::Unavailable(why) if why.contains("no VPC address")), "{error}");

    plane.store("ratings", "vm3", &live("ratings", "vm3", "10.0.0.3", true)).await;
    plane.store("ratings", "vm4", &live("ratings", "vm4", "10.0.0.3", true)).await;
    until("its address 10.0.0.3 is also that of").await;

    edit(manifests.path(), "ratings.yaml", |text| {
        text.replace("      app: ratings\n      class: vm\n  ingress", "      app: rating\n      class: vm\n  ingress")
    });
    until("no Sidecar of the namespace selects its workloads").await;
    // It is in the mesh without listeners.
    let boot = next(&mut plane.boot("ratings", "vm3", "")).await;
    assert!(envoy(&boot).changed.is_empty() && boot.ingress.is_empty());
}

#[tokio::test]
async fn a_data_directory_of_another_mesh_is_refused() {
    let (manifests, data) = (manifests(), tempfile::tempdir().unwrap());
    let options = |trust_domain: &str| Options {
        manifests: manifests.path().to_owned(),
        data_dir: data.path().to_owned(),
        trust_domain: trust_domain.to_owned(),
        certificate_life: Options::DEFAULT_CERTIFICATE_LIFE,
    };
    let open = |trust_domain: &str| {
        let mut metrics = prometheus_client::registry::Registry::default();
        let opened = onboarding_standalone::open(options(trust_domain), &mut metrics, CancellationToken::new());
        opened.map(|_| ()).map_err(|error| format!("{error:#}"))
    };
    let error = open("Not A Domain").unwrap_err();
    assert!(error.contains("is not a trust domain"), "{error}");
    let plane = Plane::open(manifests.path(), data.path());
    assert!(open("cluster.local").unwrap_err().contains("another plane uses"));
    plane.close().await;
    let deadline = std::time::Instant::now() + BOUND;
    while onboarding_standalone::data_dir::DataDir::open(data.path()).is_err() {
        assert!(std::time::Instant::now() < deadline, "the data directory is still locked");
        tokio::task::yield_now().await;
    }
    assert!(open("other.example").unwrap_err().contains("another trust domain"));
}
