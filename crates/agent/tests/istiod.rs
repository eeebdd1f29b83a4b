//! The sidecar of an Istio mesh against a real istiod: with Envoy alone, and with pilot-agent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

#[allow(dead_code, reason = "not all of it is of use here")]
mod plane;

use jiff::Timestamp;
use onboarding_agent::boot::{Address, HeldBoot};
use onboarding_agent::config::Configuration;
use onboarding_agent::run::{Settings, run};
use onboarding_agent::sidecar::{Event, IstioWay, Options, PilotAgent, Sidecar};
use onboarding_agent::status::Status;
use onboarding_agent::store::Store;
use onboarding_agent::trust::Trust;
use onboarding_kinds::agent::{read_agent_configuration, read_onboarding_configuration};
use onboarding_testkit::application;
use onboarding_testkit::cluster::{self, Cluster, Istiod};
use onboarding_testkit::eventually::eventually;
use onboarding_testkit::port;
use onboarding_wire::onboarding as pb;
use plane::{Asked, Plane};
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

const ID: &str = "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm";
/// Of anything that is waited for here.
const WITHIN: Duration = Duration::from_secs(60);

/// The mesh that the workloads are in.
struct Mesh {
    cluster: Cluster,
    istiod: Istiod,
    root: String,
}

/// One workload, with an address of its own.
struct Workload<'a> {
    mesh: &'a Mesh,
    name: &'static str,
    ip: IpAddr,
    /// Reads of its application's.
    arrived: Arc<AtomicUsize>,
    ingress: u16,
    egress: u16,
    admin: SocketAddr,
    directory: tempfile::TempDir,
    way: IstioWay,
}

fn mesh() -> Mesh {
    let cluster = Cluster::start(cluster::Options::default()).unwrap();
    cluster.apply_istio_crds().unwrap();
    let istiod = cluster.start_istiod("trustDomain: cluster.local\n").unwrap();
    cluster.kubectl(["create", "namespace", "bookinfo"]).unwrap();
    cluster.kubectl(["create", "serviceaccount", "ratings-vm", "-n", "bookinfo"]).unwrap();
    let wait = ["wait", "--for=create", "--timeout=60s", "configmap/istio-ca-root-cert", "-n", "bookinfo"];
    cluster.kubectl(wait).unwrap();
    let path = "jsonpath={.data.root-cert\\.pem}";
    let root = cluster.kubectl(["get", "configmap", "istio-ca-root-cert", "-n", "bookinfo", "-o", path]).unwrap();
    Mesh { cluster, istiod, root }
}

impl Mesh {
    fn token(&self) -> String {
        let create = ["create", "token", "ratings-vm", "-n", "bookinfo", "--audience=istio-ca", "--duration=1h"];
        self.cluster.kubectl(create).unwrap().trim().to_owned()
    }

    /// The workload, its service, and a Sidecar with an ingress listener on its address and an egress listener for the service.
    fn add(&self, name: &str, ip: IpAddr, application: u16, ingress: u16, egress: u16) {
        self.cluster
            .apply(&format!(
                "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: {name}, namespace: bookinfo}}\n\
                 spec: {{address: {ip}, labels: {{app: {name}}}, serviceAccount: ratings-vm}}\n---\n\
                 apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: bookinfo}}\n\
                 spec: {{selector: {{app: {name}}}, ports: [{{name: http, port: {egress}, targetPort: {ingress}}}]}}\n---\n\
                 apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: {name}, namespace: bookinfo}}\n\
                 spec:\n  workloadSelector: {{labels: {{app: {name}}}}}\n  \
                 ingress: [{{defaultEndpoint: '127.0.0.1:{application}', port: {{name: http, number: {ingress}, protocol: HTTP}}}}]\n  \
                 egress: [{{bind: 127.0.0.2, port: {{name: http, number: {egress}, protocol: HTTP}}, hosts: ['bookinfo/{name}.bookinfo.svc.cluster.local']}}]\n",
            ))
            .unwrap();
    }
}

/// istiod has listeners bound to the first address that is not loopback, if pilot-agent finds one.
fn own_address() -> IpAddr {
    let mut addresses = getifaddrs::getifaddrs().unwrap().filter_map(|interface| interface.address.ip_addr());
    addresses
        .find(|ip| ip.is_ipv4() && !ip.is_loopback())
        .expect("this test needs an address besides loopback; `ip addr` has none")
}

/// The application, behind somebody who notes when a request arrives, which the application itself does when it answers.
async fn serve(listener: tokio::net::TcpListener, name: &'static str, arrived: Arc<AtomicUsize>) {
    let inner = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = inner.local_addr().unwrap();
    tokio::spawn(application::serve(inner, name.to_owned()));
    while let Ok((stream, _)) = listener.accept().await {
        let arrived = arrived.clone();
        tokio::spawn(async move {
            let (mut from, mut to) = stream.into_split();
            let (mut answers, mut requests) = tokio::net::TcpStream::connect(address).await.unwrap().into_split();
            let back = tokio::spawn(async move { tokio::io::copy(&mut answers, &mut to).await });
            let mut buffer = vec![0; 16 * 1024];
            while let Ok(size @ 1..) = from.read(&mut buffer).await {
                arrived.fetch_add(1, Ordering::SeqCst);
                requests.write_all(&buffer[..size]).await.unwrap();
            }
            drop(requests);
            let _ = back.await;
        });
    }
}

impl<'a> Workload<'a> {
    async fn new(mesh: &'a Mesh, name: &'static str, ip: IpAddr, way: IstioWay) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (application, ingress, egress) =
            (listener.local_addr().unwrap(), port::free().unwrap(), port::free().unwrap());
        mesh.add(name, ip, application.port(), ingress, egress);
        let arrived = Arc::new(AtomicUsize::new(0));
        tokio::spawn(serve(listener, name, arrived.clone()));
        Self {
            mesh,
            name,
            ip,
            arrived,
            ingress,
            egress,
            admin: port::free_at(Ipv4Addr::LOCALHOST).unwrap(),
            directory: tempfile::tempdir().unwrap(),
            way,
        }
    }

    fn options(&self) -> Options {
        Options {
            binary: envoy(),
            directory: self.directory.path().join("sidecar"),
            stdout: self.directory.path().join("log"),
            stderr: self.directory.path().join("log"),
            admin: self.admin,
            istio: self.way.clone(),
            identity: self.directory.path().join("mesh-identity.json"),
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    /// What a plane would send.
    fn message(&self, version: &str, token: String) -> pb::BootConfiguration {
        let name = self.name;
        let labels = json!({"app": name});
        let node = json!({
            "id": format!("sidecar~{{{{HOST_IP}}}}~{name}.bookinfo~bookinfo.svc.cluster.local"),
            "cluster": format!("{name}.bookinfo"),
            "metadata": {
                "NAMESPACE": "bookinfo", "NAME": name, "WORKLOAD_NAME": name, "SERVICE_ACCOUNT": "ratings-vm",
                "CLUSTER_ID": "Kubernetes", "MESH_ID": "cluster.local", "LABELS": labels, "INTERCEPTION_MODE": "NONE",
                "ISTIO_VERSION": "1.28.0", "ENVOY_STATUS_PORT": port::free().unwrap(), "ENVOY_PROMETHEUS_PORT": 0,
            },
        });
        let (status, prometheus, envoy_status) = (port::free().unwrap(), port::free().unwrap(), port::free().unwrap());
        let files = [(
            "./etc/istio/config/mesh".to_owned(),
            format!("defaultConfig: {{discoveryAddress: '{}', statusPort: {status}}}\n", self.mesh.istiod.secure)
                .into_bytes(),
        )];
        let environment = [
            // Nobody is asked which cloud this is.
            ("CLOUD_PLATFORM", "none".to_owned()),
            ("INSTANCE_IP", "{{HOST_IP}}".to_owned()),
            ("POD_NAME", name.to_owned()),
            ("POD_NAMESPACE", "bookinfo".to_owned()),
            ("SERVICE_ACCOUNT", "ratings-vm".to_owned()),
            ("TRUST_DOMAIN", "cluster.local".to_owned()),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes".to_owned()),
            ("ISTIO_META_WORKLOAD_NAME", name.to_owned()),
            ("ISTIO_METAJSON_LABELS", labels.to_string()),
            ("ISTIO_META_INTERCEPTION_MODE", "NONE".to_owned()),
            ("ENVOY_PROMETHEUS_PORT", prometheus.to_string()),
            ("ENVOY_STATUS_PORT", envoy_status.to_string()),
        ];
        let in_an_hour = Timestamp::now().as_second() + 3600;
        let istio = pb::IstioBoot {
            files: files.into(),
            environment: environment.map(|(name, value)| (name.to_owned(), value)).into(),
            discovery_address: String::new(),
            istiod_san: "istiod.istio-system.svc".to_owned(),
            root_certificates: self.mesh.root.clone(),
            token,
            token_expires_at: Some(prost_types::Timestamp { seconds: in_an_hour, nanos: 0 }),
            node: node.to_string().into_bytes(),
            drain_duration: None,
        };
        pb::BootConfiguration {
            version: version.to_owned(),
            spiffe_id: ID.to_owned(),
            trust_domain: "cluster.local".to_owned(),
            sidecar: Some(pb::boot_configuration::Sidecar::Istio(istio)),
            ..Default::default()
        }
    }

    fn place(&self, held: &HeldBoot) -> HeldBoot {
        // The agent's own endpoint, where no address is given: here it is istiod's.
        let istiod = self.mesh.istiod.secure;
        held.placed(Some(self.ip), &Address { host: istiod.ip().to_string(), port: istiod.port() }).unwrap()
    }

    async fn start(&self, held: &HeldBoot) -> (Sidecar, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(64);
        (Sidecar::start(self.options(), &self.place(held), None, sender).await.unwrap(), receiver)
    }

    /// What comes until this event does.
    async fn until(&self, events: &mut mpsc::Receiver<Event>, wanted: impl Fn(&Event) -> bool) -> Vec<Event> {
        let mut seen = Vec::new();
        loop {
            match tokio::time::timeout(WITHIN, events.recv()).await {
                Ok(event) => seen.push(event.expect("the sidecar lives")),
                Err(_) => panic!("{seen:?}; the sidecar's log:\n{}", self.log()),
            }
            if seen.last().is_some_and(&wanted) {
                return seen;
            }
        }
    }

    async fn live(&self, events: &mut mpsc::Receiver<Event>, version: &str) -> Vec<Event> {
        self.until(events, |event| *event == Event::Accepted { version: version.to_owned() }).await
    }

    fn pid(&self) -> String {
        std::fs::read_to_string(self.options().directory.join("envoy.pid")).unwrap()
    }

    /// Through the egress listener, over the mesh, to the application behind the same sidecar's ingress listener.
    async fn calls_itself(&self) {
        let uri = format!("http://127.0.0.2:{}/", self.egress);
        let host = format!("{}.bookinfo.svc.cluster.local:{}", self.name, self.egress);
        let seen = async || {
            let curl = tokio::process::Command::new("curl")
                .args(["-sS", "--max-time", "5", "-H", &format!("Host: {host}"), &uri])
                .output()
                .await
                .unwrap();
            let text = String::from_utf8_lossy(&curl.stdout).into_owned();
            serde_json::from_str::<application::Answer>(&text).map_err(|_| {
                let error = String::from_utf8_lossy(&curl.stderr).into_owned();
                format!("{text} {error}; the sidecar's log:\n{}", self.log())
            })
        };
        let answer = eventually("an answer", WITHIN, seen).await;
        assert_eq!(answer.application, self.name);
    }
}

async fn curl(arguments: &[&str]) -> String {
    let output = tokio::process::Command::new("curl").args(["-sS", "--max-time", "20"]).args(arguments).output();
    String::from_utf8(output.await.unwrap().stdout).unwrap()
}

/// What is in flight when the sidecar is told to go is answered, and then nothing listens any more.
async fn leaves_gracefully(workload: &Workload<'_>, sidecar: Sidecar) {
    let before = workload.arrived.load(Ordering::SeqCst);
    let uri = format!("http://127.0.0.2:{}/slow?ms=2000", workload.egress);
    let host = format!("Host: {}.bookinfo.svc.cluster.local:{}", workload.name, workload.egress);
    let slow = tokio::spawn(async move { curl(&["-o", "/dev/null", "-w", "%{http_code}", "-H", &host, &uri]).await });
    eventually("the request arrives", WITHIN, async || {
        let now = workload.arrived.load(Ordering::SeqCst);
        if now > before { Ok(()) } else { Err(now) }
    })
    .await;
    assert!(!slow.is_finished());
    sidecar.drain(Duration::from_secs(10)).await;
    sidecar.stop(Duration::from_secs(5)).await;
    assert_eq!(slow.await.unwrap(), "200");
    tokio::net::TcpStream::connect((workload.ip, workload.ingress)).await.unwrap_err();
    tokio::net::TcpStream::connect(workload.admin).await.unwrap_err();
}

fn envoy() -> PathBuf {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../dev/envoy");
    let output = std::process::Command::new(script).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_of_a_real_mesh() {
    let mesh = tokio::task::spawn_blocking(mesh).await.unwrap();
    envoy_alone(&mesh).await;
    with_pilot_agent(&mesh).await;
    a_whole_agent(&mesh).await;
}

async fn envoy_alone(mesh: &Mesh) {
    let workload = Workload::new(mesh, "alone", "127.0.0.1".parse().unwrap(), IstioWay::Envoy).await;
    let first = workload.message("1", mesh.token());
    let held = HeldBoot::apply(None, first.clone()).unwrap();
    let (sidecar, mut events) = workload.start(&held).await;
    let mut seen = workload.live(&mut events, "1").await;
    // On a slow machine it is said meanwhile that it isn't ready.
    seen.retain(|event| !matches!(event, Event::NotReady { .. }));
    assert!(
        matches!(&seen[..], [Event::Certificate { spiffe_id, .. }, Event::Ready, Event::Accepted { .. }] if spiffe_id == ID),
        "{seen:?}"
    );
    workload.calls_itself().await;
    let identity = workload.options().identity;
    assert_eq!(std::fs::metadata(&identity).unwrap().permissions().mode() & 0o777, 0o600);
    let pid = workload.pid();

    // A new token restarts nothing.
    let token = pb::IstioBoot {
        token: mesh.token(),
        token_expires_at: Some(prost_types::Timestamp { seconds: Timestamp::now().as_second() + 3600, nanos: 0 }),
        ..Default::default()
    };
    let sidecar_of = |istio| Some(pb::boot_configuration::Sidecar::Istio(istio));
    let renewed = pb::BootConfiguration { sidecar: sidecar_of(token), ..first.clone() };
    let held = HeldBoot::apply(Some(&held), renewed).unwrap();
    sidecar.apply(&workload.place(&held)).await.unwrap();
    // Nor do roots or a version.
    let Some(pb::boot_configuration::Sidecar::Istio(istio)) = first.sidecar.clone() else { unreachable!() };
    let roots = pb::IstioBoot { root_certificates: format!("{}{}", mesh.root, mesh.cluster.ca()), ..istio.clone() };
    let next = pb::BootConfiguration { version: "2".to_owned(), sidecar: sidecar_of(roots), ..first.clone() };
    let held = HeldBoot::apply(Some(&held), next).unwrap();
    sidecar.apply(&workload.place(&held)).await.unwrap();
    workload.live(&mut events, "2").await;
    assert_eq!(workload.pid(), pid);
    workload.calls_itself().await;

    // Another node does.
    let mut node: serde_json::Value = serde_json::from_slice(&istio.node).unwrap();
    node["metadata"]["LABELS"]["version"] = "v2".into();
    let other = pb::IstioBoot { node: node.to_string().into_bytes(), ..istio };
    let next = pb::BootConfiguration { version: "3".to_owned(), sidecar: sidecar_of(other), ..first };
    let mut held = HeldBoot::apply(Some(&held), next).unwrap();
    sidecar.apply(&workload.place(&held)).await.unwrap();
    workload.live(&mut events, "3").await;
    assert_ne!(workload.pid(), pid);
    workload.calls_itself().await;
    leaves_gracefully(&workload, sidecar).await;

    // A reboot when the token has expired: the certificate is on the disk.
    if let onboarding_agent::boot::Sidecar::Istio(istio) = &mut held.sidecar {
        istio.token_expires_at = Timestamp::now();
    }
    let (sidecar, mut events) = workload.start(&held).await;
    workload.live(&mut events, "3").await;
    workload.calls_itself().await;
    sidecar.stop(Duration::from_secs(5)).await;
    // And without a certificate nothing starts, and the reason is said.
    std::fs::remove_file(&identity).unwrap();
    let (sidecar, mut events) = workload.start(&held).await;
    let seen = workload.until(&mut events, |event| matches!(event, Event::NotReady { .. })).await;
    assert!(matches!(&seen[..], [Event::NotReady { why }] if why.contains("the token for istiod")), "{seen:?}");
    sidecar.stop(Duration::from_secs(5)).await;
}

async fn with_pilot_agent(mesh: &Mesh) {
    let pilot_agent = PilotAgent {
        binary: mesh.cluster.binary("pilot-agent"),
        template: mesh.cluster.binary("envoy_bootstrap_tmpl.json"),
    };
    let workload = Workload::new(mesh, "piloted", own_address(), IstioWay::PilotAgent(pilot_agent)).await;
    let first = workload.message("1", mesh.token());
    let held = HeldBoot::apply(None, first.clone()).unwrap();
    let (sidecar, mut events) = workload.start(&held).await;
    let mut seen = workload.live(&mut events, "1").await;
    assert!(seen.contains(&Event::Ready), "{seen:?}");
    if !seen.iter().any(|event| matches!(event, Event::Certificate { .. })) {
        seen = workload.until(&mut events, |event| matches!(event, Event::Certificate { .. })).await;
    }
    assert!(
        seen.iter().any(|event| matches!(event, Event::Certificate { spiffe_id, .. } if spiffe_id == ID)),
        "{seen:?}"
    );
    workload.calls_itself().await;
    let pid = workload.pid();

    // A new token is put in place; nothing restarts.
    let token = mesh.token();
    let renewed = pb::IstioBoot {
        token: token.clone(),
        token_expires_at: Some(prost_types::Timestamp { seconds: Timestamp::now().as_second() + 3600, nanos: 0 }),
        ..Default::default()
    };
    let sidecar_of = |istio| Some(pb::boot_configuration::Sidecar::Istio(istio));
    let held =
        HeldBoot::apply(Some(&held), pb::BootConfiguration { sidecar: sidecar_of(renewed), ..first.clone() }).unwrap();
    sidecar.apply(&workload.place(&held)).await.unwrap();
    let path = workload.options().directory.join("var/run/secrets/tokens/istio-token");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), token);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(workload.pid(), pid);

    // Another environment restarts it.
    let Some(pb::boot_configuration::Sidecar::Istio(mut istio)) = first.sidecar.clone() else { unreachable!() };
    istio.environment.insert("ISTIO_META_NETWORK".to_owned(), "vms".to_owned());
    let next = pb::BootConfiguration { version: "2".to_owned(), sidecar: sidecar_of(istio), ..first };
    let held = HeldBoot::apply(Some(&held), next).unwrap();
    sidecar.apply(&workload.place(&held)).await.unwrap();
    workload.live(&mut events, "2").await;
    assert_ne!(workload.pid(), pid);
    workload.calls_itself().await;

    // pilot-agent that is killed takes its Envoy along, and both come back.
    let pid: i32 = workload.pid().split_whitespace().next().unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    workload.until(&mut events, |event| matches!(event, Event::Exited { .. })).await;
    workload.until(&mut events, |event| *event == Event::Ready).await;
    workload.calls_itself().await;
    leaves_gracefully(&workload, sidecar).await;
}

fn settings(plane: &Plane, workload: &Workload<'_>) -> Settings {
    let onboarding = format!(
        "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: OnboardingConfiguration\nonboardingEndpoint:\n  host: {}\n  port: {}\n  transportSecurity: {{tls: {{sni: {}}}}}\nworkloadGroup: {{namespace: bookinfo, name: ratings}}\n",
        plane.address.ip(),
        plane.address.port(),
        plane::NAME,
    );
    let credential = r#"printf %s "{\"credential\":{\"@type\":\"x/JwtCredential\",\"token\":\"aa.bb.cc\"},\"expiresAt\":\"2126-01-01T00:00:00Z\"}""#;
    let host_info =
        format!(r#"printf %s "{{\"host\":{{\"addresses\":[{{\"ip\":\"{}\",\"type\":\"VPC\"}}]}}}}""#, workload.ip);
    let log = workload.directory.path().join("log");
    let agent = format!(
        "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: AgentConfiguration\nhost:\n  custom:\n    credential:\n    - plugin: {{name: my-jwt, path: /bin/sh, args: ['-c', '{credential}']}}\n    hostinfo: {{plugin: {{name: my-host, path: /bin/sh, args: ['-c', '{host_info}']}}}}\nsidecar:\n  envoy: {{}}\n  stdout: {{filename: {log}}}\n  stderr: {{filename: {log}}}\n",
        log = log.display(),
    );
    Settings {
        configuration: Configuration {
            onboarding: read_onboarding_configuration("onboarding.config.yaml", &onboarding).unwrap(),
            agent: read_agent_configuration("agent.config.yaml", &agent).unwrap(),
            origins: ("onboarding.config.yaml".to_owned(), "agent.config.yaml".to_owned()),
        },
        trust: Trust::load(Some(&plane.ca), Path::new("/nonexistent")).unwrap(),
        state_directory: workload.directory.path().join("state"),
        binary: envoy(),
        admin: workload.admin,
        istio: IstioWay::Envoy,
    }
}

async fn until_status(settings: &Settings, what: &str, reached: impl Fn(&Status) -> bool) -> Status {
    eventually(what, WITHIN, async || match Status::read(&Store::at(&settings.state_directory)).unwrap() {
        Some(status) if reached(&status) => Ok(status),
        status => Err(status),
    })
    .await
}

async fn a_whole_agent(mesh: &Mesh) {
    let workload = Workload::new(mesh, "whole", "127.0.0.1".parse().unwrap(), IstioWay::Envoy).await;
    let plane = Plane::start().await;
    let mut boot = workload.message("1", mesh.token());
    if let Some(pb::boot_configuration::Sidecar::Istio(istio)) = &mut boot.sidecar {
        // This plane isn't istiod's gateway.
        istio.discovery_address = mesh.istiod.secure.to_string();
    }
    // It was enrolled with a standalone mesh before, and moves.
    let envoy =
        pb::EnvoyBoot { node_id: "bookinfo/whole".to_owned(), cluster: "whole".to_owned(), ..Default::default() };
    let standalone = pb::BootConfiguration {
        version: "0".to_owned(),
        spiffe_id: ID.to_owned(),
        sidecar: Some(pb::boot_configuration::Sidecar::Envoy(envoy)),
        ..Default::default()
    };
    plane.script().boots = vec![standalone];
    let settings = settings(&plane, &workload);
    let agent = tokio::spawn(run(settings.clone(), CancellationToken::new()));
    until_status(&settings, "live in the standalone mesh", |status| status.sidecar == "Live").await;
    plane.script().boots = vec![boot.clone()];
    plane.say(pb::plane_message::Message::Boot(boot)).await;
    until_status(&settings, "of the Istio mesh", |status| status.boot_version.as_deref() == Some("1")).await;
    let reported = Asked::SidecarReport { boot_version: "1".to_owned(), accepted: true };
    eventually("its report and its health", WITHIN, async || {
        let asked = plane.script().asked.clone();
        let all = [&reported, &Asked::Health { ready: true }].into_iter().all(|it| asked.contains(it));
        if all { Ok(()) } else { Err(asked) }
    })
    .await;
    let status = until_status(&settings, "live", |status| status.sidecar == "Live").await;
    assert_eq!(status.spiffe_id.as_deref(), Some(ID));
    assert_eq!(status.last_error, None);
    workload.calls_itself().await;
    for kept in ["boot", "istiod-identity.json"] {
        let mode = std::fs::metadata(settings.state_directory.join(kept)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{kept}");
    }

    // The power goes, and the plane.
    agent.abort();
    let _ = agent.await;
    drop(plane);
    std::fs::remove_file(Store::at(&settings.state_directory).status_path()).unwrap();
    let stop = CancellationToken::new();
    let agent = tokio::spawn(run(settings.clone(), stop.clone()));
    let status = until_status(&settings, "live without the plane", |status| status.sidecar == "Live").await;
    assert_eq!(status.spiffe_id.as_deref(), Some(ID));
    assert_ne!(status.phase, "Connected");
    workload.calls_itself().await;
    stop.cancel();
    tokio::time::timeout(WITHIN, agent).await.unwrap().unwrap().unwrap();
    tokio::net::TcpStream::connect((workload.ip, workload.ingress)).await.unwrap_err();
}
