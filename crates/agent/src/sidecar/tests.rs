//! The sidecar with the real Envoy, on loopback addresses and ports of each test's own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a panic is how a test fails")]

use super::{Event, Identity, IstioWay, Options, Sidecar};
use crate::boot::{self, HeldBoot, Standalone, XdsType};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use onboarding_testkit::application;
use onboarding_testkit::port;
use onboarding_wire::onboarding as pb;
use onboarding_wire::xds;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Of anything that is waited for here.
const WITHIN: Duration = Duration::from_secs(20);

fn envoy() -> PathBuf {
    static ENVOY: std::sync::LazyLock<PathBuf> = std::sync::LazyLock::new(|| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../dev/envoy");
        let output = std::process::Command::new(script).output().expect("dev/envoy runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().into()
    });
    ENVOY.clone()
}

fn free() -> SocketAddr {
    port::free_at(Ipv4Addr::LOCALHOST).unwrap()
}

struct Ca {
    issuer: Issuer<'static, KeyPair>,
    root: String,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let root = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), root }
    }

    fn identity(&self, spiffe_id: &str) -> Identity {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(spiffe_id.try_into().unwrap())];
        let key = KeyPair::generate().unwrap();
        Identity {
            certificate_chain: params.signed_by(&key, &self.issuer).unwrap().pem(),
            private_key: key.serialize_pem(),
            roots: self.root.clone(),
        }
    }
}

struct World {
    directory: TempDir,
    options: Options,
    ca: Ca,
    application: SocketAddr,
    ingress: SocketAddr,
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let application = listener.local_addr().unwrap();
        tokio::spawn(application::serve(listener, "one".to_owned()));
        let options = Options {
            binary: envoy(),
            directory: directory.path().join("sidecar"),
            stdout: directory.path().join("stdout"),
            stderr: directory.path().join("stderr"),
            admin: free(),
            istio: IstioWay::Envoy,
            identity: directory.path().join("identity"),
        };
        Self { directory, options, ca: Ca::new(), application, ingress: free() }
    }

    async fn start(&self, boot: &HeldBoot) -> (Sidecar, mpsc::Receiver<Event>) {
        let (sender, receiver) = mpsc::channel(64);
        let identity = self.ca.identity("spiffe://cluster.local/ns/bookinfo/sa/one");
        (Sidecar::start(self.options.clone(), boot, Some(identity), sender).await.unwrap(), receiver)
    }

    /// Live, and its first configuration accepted.
    async fn started(&self, boot: &HeldBoot) -> (Sidecar, mpsc::Receiver<Event>) {
        let (sidecar, mut events) = self.start(boot).await;
        self.ready(&mut events).await;
        assert_eq!(self.next(&mut events).await, Event::Accepted { version: boot.version.clone() });
        (sidecar, events)
    }

    /// On a slow machine it is said meanwhile that it isn't.
    async fn ready(&self, events: &mut mpsc::Receiver<Event>) {
        loop {
            match self.next(events).await {
                Event::NotReady { .. } => {}
                event => break assert_eq!(event, Event::Ready),
            }
        }
    }

    async fn next(&self, events: &mut mpsc::Receiver<Event>) -> Event {
        match tokio::time::timeout(WITHIN, events.recv()).await {
            Ok(event) => event.expect("the sidecar lives"),
            Err(_) => panic!("no event; Envoy's log:\n{}", self.log()),
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("stderr")).unwrap_or_default()
    }

    fn pid(&self) -> i32 {
        let text = std::fs::read_to_string(self.options.directory.join("envoy.pid")).unwrap();
        text.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// One listener, one route, one cluster whose endpoints come by EDS.
    fn boot(&self, version: &str) -> Builder {
        Builder::new(version)
            .listener("in", self.ingress, "route:8080")
            .route("route:8080", "app|8080")
            .cluster("app|8080")
            .endpoint("app|8080", self.application)
    }

    async fn get(&self, path: &str) -> Result<application::Answer, String> {
        let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
        let uri = format!("http://{}{path}", self.ingress).parse().unwrap();
        let response = client.get(uri).await.map_err(|error| format!("{error:?}"))?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|error| error.to_string())?.to_bytes();
        serde_json::from_slice(&body).map_err(|_| format!("{status}: {}", String::from_utf8_lossy(&body)))
    }
}

struct Builder(HeldBoot);

impl Builder {
    fn new(version: &str) -> Self {
        Self(HeldBoot {
            version: version.into(),
            sidecar: boot::Sidecar::Standalone(Standalone {
                node_id: "bookinfo/one".into(),
                cluster: "one".into(),
                ..Standalone::default()
            }),
            ..HeldBoot::default()
        })
    }

    fn put(mut self, kind: XdsType, name: &str, json: &Value) -> Self {
        self.0.resources_mut().insert((kind, name.to_owned()), json.to_string().into());
        self
    }

    fn without(mut self, kind: XdsType, name: &str) -> Self {
        self.0.resources_mut().remove(&(kind, name.to_owned())).unwrap();
        self
    }

    fn listener(self, name: &str, at: SocketAddr, route: &str) -> Self {
        self.listener_with(name, at, route, json!({}))
    }

    fn listener_with(self, name: &str, at: SocketAddr, route: &str, chain: Value) -> Self {
        let file = xds::file(pb::XdsType::Route, route).unwrap();
        let mut chain = chain;
        chain["filters"] = json!([{"name": "hcm", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": format!("{name}:8080"),
            "rds": {"route_config_name": route, "config_source": source(&file)},
            "http_filters": [{"name": "router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
        }}]);
        let listener = json!({
            "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
            "name": name,
            "address": {"socket_address": {"address": at.ip().to_string(), "port_value": at.port()}},
            "filter_chains": [chain],
        });
        self.put(XdsType::Listener, name, &listener)
    }

    fn route(self, name: &str, cluster: &str) -> Self {
        let route = json!({
            "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            "name": name,
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
                {"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "60s"}}]}],
        });
        self.put(XdsType::Route, name, &route)
    }

    fn cluster(self, name: &str) -> Self {
        let file = xds::file(pb::XdsType::Endpoint, name).unwrap();
        let cluster = json!({
            "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            "name": name, "type": "EDS", "connect_timeout": "1s",
            "eds_cluster_config": {"eds_config": source(&file)},
        });
        self.put(XdsType::Cluster, name, &cluster)
    }

    fn endpoint(self, cluster: &str, at: SocketAddr) -> Self {
        let endpoint = json!({
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": cluster,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"socket_address":
                {"address": at.ip().to_string(), "port_value": at.port()}}}}]}],
        });
        self.put(XdsType::Endpoint, cluster, &endpoint)
    }
}

fn source(file: &str) -> Value {
    json!({"path_config_source": {"path": format!("./{file}")}, "resource_api_version": "V3"})
}

async fn another_application(name: &str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(application::serve(listener, name.to_owned()));
    address
}

fn accepted(version: &str) -> Event {
    Event::Accepted { version: version.into() }
}

#[tokio::test]
async fn serves_and_follows_each_kind_of_change() {
    let world = World::new().await;
    let (sidecar, mut events) = world.started(&world.boot("1").0).await;
    assert_eq!(world.get("/").await.unwrap().application, "one");

    // Only endpoints.
    let two = another_application("two").await;
    let boot = world.boot("2").endpoint("app|8080", two).0;
    sidecar.apply(&boot).await.unwrap();
    assert_eq!(world.next(&mut events).await, accepted("2"));
    assert_eq!(world.get("/").await.unwrap().application, "two");

    // Another cluster, and the route to it: the route must not come first.
    let three = another_application("three").await;
    let boot = world.boot("3").cluster("three").endpoint("three", three).route("route:8080", "three").0;
    sidecar.apply(&boot).await.unwrap();
    assert_eq!(world.next(&mut events).await, accepted("3"));
    assert_eq!(world.get("/").await.unwrap().application, "three");

    // The first cluster goes, with its file.
    let gone = world.options.directory.join(xds::file(pb::XdsType::Endpoint, "app|8080").unwrap());
    assert!(gone.exists());
    let boot = Builder(boot).without(XdsType::Cluster, "app|8080").without(XdsType::Endpoint, "app|8080");
    let boot = HeldBoot { version: "4".into(), ..boot.0 };
    sidecar.apply(&boot).await.unwrap();
    assert_eq!(world.next(&mut events).await, accepted("4"));
    assert!(!gone.exists());
    assert_eq!(world.get("/").await.unwrap().application, "three");

    // A second listener with a route of its own.
    let second = free();
    let boot = HeldBoot {
        version: "5".into(),
        ..Builder(boot).listener("second", second, "second").route("second", "three").0
    };
    sidecar.apply(&boot).await.unwrap();
    assert_eq!(world.next(&mut events).await, accepted("5"));
    TcpStream::connect(second).await.unwrap();

    // Nothing that Envoy sees.
    let boot = HeldBoot { version: "6".into(), ..boot };
    sidecar.apply(&boot).await.unwrap();
    assert_eq!(world.next(&mut events).await, accepted("6"));
    sidecar.stop(WITHIN).await;
    assert!(TcpStream::connect(world.ingress).await.is_err());
}

#[tokio::test]
async fn what_is_refused_changes_nothing_and_says_why() {
    let world = World::new().await;
    let good = world.boot("1").0;
    let (sidecar, mut events) = world.started(&good).await;
    let mut bad_listener = world.boot("listener").0;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    bad_listener
        .resources_mut()
        .extend(world.boot("").listener("second", taken.local_addr().unwrap(), "route:8080").0.resources().clone());
    let no_match = json!({"@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration", "name": "route:8080",
        "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"route": {"cluster": "app|8080"}}]}]});
    let no_name = json!({"@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"});
    let no_type =
        json!({"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "app|8080", "type": "EDS"});
    let cases = [
        (bad_listener, "Address already in use"),
        (world.boot("route").put(XdsType::Route, "route:8080", &no_match).0, "Match: value is required"),
        (world.boot("endpoint").put(XdsType::Endpoint, "app|8080", &no_name).0, "ClusterName"),
        (world.boot("cluster").put(XdsType::Cluster, "app|8080", &no_type).0, "app|8080"),
    ];
    for (bad, words) in cases {
        sidecar.apply(&bad).await.unwrap();
        let Event::Rejected { version, message } = world.next(&mut events).await else { panic!("{}", world.log()) };
        assert_eq!(version, bad.version);
        assert!(message.contains(words), "{version}: {message}");
        assert_eq!(world.get("/").await.unwrap().application, "one", "{version}");
        let lds = std::fs::read_to_string(world.options.directory.join(xds::LISTENERS)).unwrap();
        assert!(lds.contains(r#""version_info":"1""#) && !lds.contains("second"), "{lds}");
    }
    // And what comes after is taken.
    let two = another_application("two").await;
    sidecar.apply(&world.boot("2").endpoint("app|8080", two).0).await.unwrap();
    assert_eq!(world.next(&mut events).await, accepted("2"));
    assert_eq!(world.get("/").await.unwrap().application, "two");
}

#[tokio::test]
async fn a_listener_gives_way_only_to_one_that_is_accepted() {
    let world = World::new().await;
    let (sidecar, mut events) = world.started(&world.boot("1").0).await;
    let moved = |version: &str, to: SocketAddr| {
        world.boot(version).without(XdsType::Listener, "in").listener("out", to, "route:8080").0
    };
    let load = calls(&world);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    sidecar.apply(&moved("2", taken.local_addr().unwrap())).await.unwrap();
    let refused = world.next(&mut events).await;
    assert!(matches!(&refused, Event::Rejected { version, .. } if version == "2"), "{refused:?}");
    let outcome = load.stop().await;
    assert!(outcome.sent > 0 && outcome.failed == 0, "{outcome:?}");

    let second = free();
    sidecar.apply(&moved("3", second)).await.unwrap();
    assert_eq!(world.next(&mut events).await, accepted("3"));
    TcpStream::connect(second).await.unwrap();
}

#[tokio::test]
async fn a_port_that_somebody_has_is_said_and_tried_again() {
    let world = World::new().await;
    let taken = std::net::TcpListener::bind(world.ingress).unwrap();
    let (_sidecar, mut events) = world.start(&world.boot("1").0).await;
    world.ready(&mut events).await;
    let Event::Rejected { message, .. } = world.next(&mut events).await else { panic!("{}", world.log()) };
    assert!(message.contains("Address already in use") && message.contains(&world.ingress.to_string()), "{message}");
    drop(taken);
    assert_eq!(world.next(&mut events).await, accepted("1"));
    assert_eq!(world.get("/").await.unwrap().application, "one");
}

#[tokio::test]
async fn the_last_accepted_configuration_outlives_the_agent() {
    let world = World::new().await;
    let (sidecar, _events) = world.started(&world.boot("1").0).await;
    sidecar.stop(WITHIN).await;
    let bad =
        json!({"@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "app|8080", "type": "EDS"});
    let (_sidecar, mut events) = world.start(&world.boot("2").put(XdsType::Cluster, "app|8080", &bad).0).await;
    world.ready(&mut events).await;
    let rejected = world.next(&mut events).await;
    assert!(matches!(&rejected, Event::Rejected { version, .. } if version == "2"), "{rejected:?}");
    assert_eq!(world.get("/").await.unwrap().application, "one");
}

#[tokio::test]
async fn a_configuration_that_envoy_crashes_on_is_refused_too() {
    let mut world = World::new().await;
    let script = world.directory.path().join("envoy");
    let text = "#!/bin/sh\nif grep -q crashing xds/cds.json; then kill -SEGV $$; fi\nexec ENVOY \"$@\"\n";
    std::fs::write(&script, text.replace("ENVOY", envoy().to_str().unwrap())).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    world.options.binary = script;
    let (sidecar, _events) = world.started(&world.boot("1").0).await;
    sidecar.stop(WITHIN).await;
    let (_sidecar, mut events) = world.start(&world.boot("2").cluster("crashing").endpoint("crashing", free()).0).await;
    let mut seen = Vec::new();
    loop {
        match world.next(&mut events).await {
            Event::Ready => break,
            Event::NotReady { .. } => {}
            event => seen.push(event),
        }
    }
    let [Event::Exited { status, .. }, Event::Rejected { version, message }, Event::Exited { .. }] = &seen[..] else {
        panic!("{seen:?}")
    };
    assert!(status.contains("signal: 11") && version == "2" && message.contains("Envoy ended on it"), "{seen:?}");
    assert_eq!(world.get("/").await.unwrap().application, "one");
}

#[tokio::test]
async fn a_file_that_cannot_be_written_is_an_error_and_the_last_configuration_stays() {
    let world = World::new().await;
    let (sidecar, mut events) = world.started(&world.boot("1").0).await;
    let obstacle = world.options.directory.join("xds/lds.json.part");
    std::fs::create_dir(&obstacle).unwrap();
    let second = free();
    let boot = world.boot("2").listener("second", second, "route:8080").0;
    let error = format!("{:#}", sidecar.apply(&boot).await.unwrap_err());
    assert!(error.contains("xds/lds.json"), "{error}");
    assert_eq!(world.get("/").await.unwrap().application, "one");
    std::fs::remove_dir(&obstacle).unwrap();
    sidecar.apply(&boot).await.unwrap();
    assert_eq!(world.next(&mut events).await, accepted("2"));
    TcpStream::connect(second).await.unwrap();
}

#[tokio::test]
async fn a_killed_envoy_is_started_again() {
    let world = World::new().await;
    let (_sidecar, mut events) = world.started(&world.boot("1").0).await;
    kill(world.pid());
    let exited = world.next(&mut events).await;
    let Event::Exited { status, restart_in } = &exited else { panic!("{exited:?}") };
    assert!(status.contains("signal: 9") && *restart_in < Duration::from_secs(1), "{exited:?}");
    world.ready(&mut events).await;
    assert_eq!(world.get("/").await.unwrap().application, "one");
}

#[tokio::test]
async fn an_admin_address_of_somebody_else_is_named_and_waited_for() {
    let world = World::new().await;
    let taken = std::net::TcpListener::bind(world.options.admin).unwrap();
    let (_sidecar, mut events) = world.start(&world.boot("1").0).await;
    let exited = world.next(&mut events).await;
    assert!(matches!(&exited, Event::Exited { status, .. } if status.contains("Address already in use")), "{exited:?}");
    drop(taken);
    loop {
        match world.next(&mut events).await {
            Event::Exited { .. } | Event::NotReady { .. } => {}
            other => break assert_eq!(other, Event::Ready),
        }
    }
}

#[tokio::test]
async fn dropping_kills_it_and_what_a_killed_agent_left_is_ended() {
    let world = World::new().await;
    let (sidecar, _events) = world.started(&world.boot("1").0).await;
    let pid = world.pid();
    let noted = std::fs::read_to_string(world.options.directory.join("envoy.pid")).unwrap();
    drop(sidecar);
    until(|| !runs(pid)).await;

    // As an agent leaves it that dies by SIGKILL: started with the same binary in the same directory, and noted.
    let left = || {
        tokio::process::Command::new(envoy())
            .args(super::bootstrap::arguments(super::bootstrap::DRAIN_SECONDS))
            .current_dir(&world.options.directory)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .kill_on_drop(true)
            .process_group(0)
            .spawn()
            .unwrap()
    };
    let mut orphan = left();
    let admin = super::admin::Admin::new(world.options.admin);
    let live = async || {
        // A port that was free for a moment may have been somebody's, for a moment too.
        if orphan.try_wait().unwrap().is_some() {
            orphan = left();
        }
        admin.ready().await.is_ok()
    };
    becomes(live, "the orphan is live").await;
    let orphan_pid = orphan.id().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{orphan_pid}/stat")).unwrap();
    let started = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().to_owned();

    // Another time of start: another process, left alone; then the ports are taken and Envoy says so.
    let write = |text: String| std::fs::write(world.options.directory.join("envoy.pid"), text).unwrap();
    write(format!("{orphan_pid} {}", noted.split_whitespace().nth(1).unwrap()));
    let (sidecar, mut events) = world.start(&world.boot("1").0).await;
    let exited = world.next(&mut events).await;
    assert!(matches!(exited, Event::Exited { .. }), "{exited:?}");
    drop(sidecar);
    assert!(orphan.try_wait().unwrap().is_none());

    write(format!("{orphan_pid} {started}"));
    let reaper = tokio::spawn(async move { orphan.wait().await.unwrap() });
    let (_sidecar, _events) = world.started(&world.boot("1").0).await;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&reaper.await.unwrap()), Some(9));
}

#[tokio::test]
async fn a_drain_lets_requests_end_and_loses_none() {
    let world = Arc::new(World::new().await);
    let (sidecar, _events) = world.started(&world.boot("1").0).await;
    let slow = tokio::spawn({
        let world = Arc::clone(&world);
        async move { world.get("/slow?ms=2500").await }
    });
    let admin = super::admin::Admin::new(world.options.admin);
    in_flight(&admin).await;
    let load = calls(&world);
    let before = admin.in_flight().await.unwrap().total;
    let begun = std::time::Instant::now();
    // The mesh was told before, so callers go elsewhere while it drains, not at its end.
    let drain = tokio::spawn(async move {
        sidecar.drain(WITHIN).await;
        sidecar
    });
    let served = async || admin.in_flight().await.unwrap().total >= before + 20;
    becomes(served, "it serves while it drains").await;
    let outcome = load.stop().await;
    assert!(outcome.sent > 5 && outcome.failed == 0, "{outcome:?}");
    let sidecar = drain.await.unwrap();
    assert_eq!(admin.in_flight().await.unwrap().active, 0, "the drain ended before the slow request");
    assert!(begun.elapsed() < WITHIN, "it waited for the deadline");
    sidecar.stop(WITHIN).await;
    assert_eq!(slow.await.unwrap().unwrap().application, "one");
}

#[tokio::test]
async fn a_drain_ends_at_its_deadline() {
    let world = Arc::new(World::new().await);
    let (sidecar, _events) = world.started(&world.boot("1").0).await;
    let slow = tokio::spawn({
        let world = Arc::clone(&world);
        async move { world.get("/slow?ms=30000").await }
    });
    in_flight(&super::admin::Admin::new(world.options.admin)).await;
    let begun = std::time::Instant::now();
    sidecar.drain(Duration::from_millis(700)).await;
    assert!(begun.elapsed() >= Duration::from_millis(700) && begun.elapsed() < Duration::from_secs(5));
    sidecar.stop(WITHIN).await;
    assert!(slow.await.unwrap().is_err());
}

#[tokio::test]
async fn a_new_certificate_is_served_without_a_restart_and_a_bad_one_is_not() {
    let world = World::new().await;
    let tls = json!({"transport_socket": {"name": "tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "common_tls_context": {
            "tls_certificate_sds_secret_configs": [{"name": "default", "sds_config": sds()}],
            "combined_validation_context": {
                "default_validation_context": {},
                "validation_context_sds_secret_config": {"name": "ROOTCA", "sds_config": sds()},
            },
        },
        "require_client_certificate": true,
    }}});
    let boot = world.boot("1").listener_with("in", world.ingress, "route:8080", tls).0;
    let (sidecar, mut events) = world.started(&boot).await;
    let pid = world.pid();
    assert_eq!(shown(&world).await.unwrap(), "spiffe://cluster.local/ns/bookinfo/sa/one");

    sidecar.rotate(world.ca.identity("spiffe://cluster.local/ns/bookinfo/sa/two")).await;
    let rotated = async || shown(&world).await.as_deref() == Ok("spiffe://cluster.local/ns/bookinfo/sa/two");
    becomes(rotated, "the new certificate is shown").await;
    assert_eq!(shown(&world).await.unwrap(), "spiffe://cluster.local/ns/bookinfo/sa/two");

    let mut bad = world.ca.identity("spiffe://cluster.local/ns/bookinfo/sa/three");
    bad.private_key = world.ca.identity("spiffe://cluster.local/ns/bookinfo/sa/other").private_key;
    sidecar.rotate(bad).await;
    let refused = world.next(&mut events).await;
    assert!(matches!(&refused, Event::NotReady { why } if why.contains("refused the secret default")), "{refused:?}");
    assert_eq!(shown(&world).await.unwrap(), "spiffe://cluster.local/ns/bookinfo/sa/two");

    sidecar.rotate(world.ca.identity("spiffe://cluster.local/ns/bookinfo/sa/four")).await;
    world.ready(&mut events).await;
    assert_eq!(shown(&world).await.unwrap(), "spiffe://cluster.local/ns/bookinfo/sa/four");
    assert_eq!(world.pid(), pid);
    let socket = std::fs::metadata(world.options.directory.join("sds.sock")).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_long_directory_name_is_no_obstacle() {
    let mut world = World::new().await;
    world.options.directory = world.directory.path().join("x".repeat(120)).join("sidecar");
    let (_sidecar, _events) = world.started(&world.boot("1").0).await;
    assert_eq!(world.get("/").await.unwrap().application, "one");
}

#[tokio::test]
async fn what_cannot_be_started_says_what_and_where() {
    let world = World::new().await;
    let start = async |options: Options| {
        let (sender, _receiver) = mpsc::channel(1);
        match Sidecar::start(options, &world.boot("1").0, Some(world.ca.identity("spiffe://a/b")), sender).await {
            Ok(_) => panic!("it started"),
            Err(error) => format!("{error:#}"),
        }
    };
    let error = start(Options { binary: "/nowhere/envoy".into(), ..world.options.clone() }).await;
    assert!(error.contains("/nowhere/envoy") && error.contains("is the package"), "{error}");
    let error = start(Options { stderr: "/nowhere/log".into(), ..world.options.clone() }).await;
    assert!(error.contains("/nowhere/log"), "{error}");
    let file = world.directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = start(Options { directory: file.join("sidecar"), ..world.options.clone() }).await;
    assert!(error.contains("file/sidecar"), "{error}");
}

fn sds() -> Value {
    json!({"resource_api_version": "V3", "api_config_source": {"api_type": "GRPC", "transport_api_version": "V3",
        "grpc_services": [{"envoy_grpc": {"cluster_name": "sds-grpc"}}]}})
}

/// The SPIFFE ID of the certificate that the listener shows.
async fn shown(world: &World) -> Result<String, String> {
    use rustls_pki_types::pem::PemObject;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    let root = rustls_pki_types::CertificateDer::from_pem_slice(world.ca.root.as_bytes()).unwrap();
    roots.add(root).unwrap();
    let own = world.ca.identity("spiffe://cluster.local/ns/bookinfo/sa/caller");
    let chain = rustls_pki_types::CertificateDer::from_pem_slice(own.certificate_chain.as_bytes()).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::from_pem_slice(own.private_key.as_bytes()).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![chain], key)
        .unwrap();
    config.dangerous().set_certificate_verifier(Arc::new(crate::trust::AnyCertificate));
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let tcp = TcpStream::connect(world.ingress).await.map_err(|error| error.to_string())?;
    let name = rustls_pki_types::ServerName::try_from("one.example").unwrap();
    let stream = connector.connect(name, tcp).await.map_err(|error| error.to_string())?;
    let der = stream.get_ref().1.peer_certificates().unwrap()[0].clone();
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    let x509_parser::extensions::GeneralName::URI(uri) = names.value.general_names[0] else { panic!("no URI") };
    Ok(uri.to_owned())
}

/// Somebody who goes on calling.
struct Calls {
    stop: tokio::sync::watch::Sender<bool>,
    task: tokio::task::JoinHandle<application::Outcome>,
}

impl Calls {
    async fn stop(self) -> application::Outcome {
        self.stop.send(true).unwrap();
        self.task.await.unwrap()
    }
}

fn calls(world: &World) -> Calls {
    let load = application::Load {
        connect_to: world.ingress,
        host: "one.example".into(),
        path: "/".into(),
        per_second: 100,
        timeout: Duration::from_secs(10),
    };
    let (stop, stopped) = tokio::sync::watch::channel(false);
    Calls { stop, task: tokio::spawn(application::call(load, stopped)) }
}

/// Until a request is.
async fn in_flight(admin: &super::admin::Admin) {
    becomes(async || admin.in_flight().await.unwrap().active > 0, "a request arrives").await;
}

async fn until(condition: impl Fn() -> bool) {
    becomes(async || condition(), "it comes true").await;
}

/// Waits until it is so; the interval is how often it is looked.
async fn becomes(mut condition: impl AsyncFnMut() -> bool, what: &str) {
    let begun = std::time::Instant::now();
    let mut look = tokio::time::interval(Duration::from_millis(5));
    while !condition().await {
        assert!(begun.elapsed() < WITHIN, "not within {WITHIN:?}: {what}");
        look.tick().await;
    }
}

fn runs(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.starts_with(" Z"))
}

fn kill(pid: i32) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}
