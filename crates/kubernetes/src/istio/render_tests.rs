#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

use super::*;
use crate::istio::fixtures::{ROOT, group, group_with, live, name, sidecar};
use crate::istio::hosts::{Named, Names};
use crate::istio::inputs::{DEFAULT_REVISION, Inputs, Meshes, Namespace};
use jiff::Timestamp;
use onboarding_core::registration::SidecarReport;
use onboarding_kinds::control_plane::CustomGateway;
use std::sync::Arc;

const MESH: &str = "
trustDomain: example.org
accessLogFile: /dev/stdout
defaultConfig:
  discoveryAddress: istiod.istio-system.svc:15012
  configPath: /etc/istio/proxy
  image: {imageType: distroless}
  meshId: mesh1
  drainDuration: 20s
  proxyMetadata: {ISTIO_META_DNS_CAPTURE: 'true', LD_PRELOAD: /x.so, http_proxy: 'http://p', CA_ADDR: elsewhere, GODEBUG: a=1}
  tracing: {zipkin: {address: 'zipkin:9411'}, sampling: 1}
";

const SIDECAR: &str = "
workloadSelector: {labels: {app: ratings, class: vm}}
ingress:
- defaultEndpoint: 127.0.0.1:8080
  port: {name: http, number: 8080, protocol: HTTP}
egress:
- bind: 127.0.0.2
  port: {number: 8080}
  hosts: ['./*']
";

fn inputs() -> Inputs {
    let mesh = Mesh::read(MESH, Some(r#"{"global":{"multiCluster":{"clusterName":"east"}}}"#));
    let group = group();
    let service =
        Named::service("bookinfo", "details", None, &json!({"ports": [{"port": 8080}]})).into_iter().collect();
    Inputs {
        meshes: Arc::new(Meshes { by_revision: [(DEFAULT_REVISION.to_owned(), mesh)].into(), tags: [].into() }),
        namespaces: [(
            "bookinfo".to_owned(),
            Arc::new(Namespace {
                revision: None,
                root_certificates: Some(ROOT.to_owned()),
                sidecars: vec![sidecar(SIDECAR)],
            }),
        )]
        .into(),
        groups: [(group.name.clone(), Arc::new(group))].into(),
        custom_gateway: None,
        propagation_delay: Duration::from_secs(10),
        names: Arc::new(Names::new(service, &Names::default())),
    }
}

fn made(inputs: &Inputs, live: &Live) -> Result<Rendered, RenderError> {
    render(&name(), live, &Part::of(inputs, &live.group))
}

fn with_group(group: WorkloadGroup) -> Inputs {
    Inputs { groups: [(group.name.clone(), Arc::new(group))].into(), ..inputs() }
}

fn json_of(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

#[test]
fn the_requirement() {
    let rendered = made(&inputs(), &live()).unwrap();
    assert_eq!(rendered.root_certificates, ROOT);
    let start = &rendered.start;
    insta::assert_yaml_snapshot!(
        "requirement",
        json!({
            "service_account": start.service_account,
            "spiffe_id": start.spiffe_id,
            "mesh": json_of(&start.files["./etc/istio/config/mesh"]),
            "environment": start.environment,
            "discovery_address": start.discovery_address,
            "istiod_san": start.istiod_san,
            "node": json_of(&start.node),
            "drain_duration": start.drain_duration,
            "left_out": rendered.left_out,
        })
    );
    insta::assert_debug_snapshot!("requirement_head", rendered.head);
    // The files that an agent takes: relative, in etc or var.
    assert!(start.files.keys().all(|path| path.starts_with("./etc/")));
    assert!(!start.environment.contains_key("CA_ADDR"));
}

#[test]
fn the_message_has_all_of_it_and_the_token() {
    let rendered = made(&inputs(), &live()).unwrap();
    let end = Timestamp::new(4_000_000_000, 0).unwrap();
    let boot = rendered.message(&Token::for_tests("a.b.c", end));
    assert_eq!(boot.version, rendered.version);
    assert_eq!(boot.spiffe_id, "spiffe://example.org/ns/bookinfo/sa/ratings-vm");
    let Some(pb::boot_configuration::Sidecar::Istio(istio)) = boot.sidecar else { panic!("{boot:?}") };
    assert_eq!((istio.token.as_str(), istio.token_expires_at.unwrap().seconds), ("a.b.c", 4_000_000_000));
    assert_eq!(istio.environment.len(), rendered.start.environment.len());
    assert_eq!(istio.files.len(), 1);
    assert_eq!(istio.root_certificates, ROOT);
    assert_eq!(istio.drain_duration.unwrap().seconds, 20);
}

#[test]
fn a_token_alone_is_that() {
    let boot = token_alone("v", &Token::for_tests("a.b.c", Timestamp::new(7, 0).unwrap()));
    assert_eq!((boot.version.as_str(), boot.spiffe_id.as_str()), ("v", ""));
    let Some(pb::boot_configuration::Sidecar::Istio(istio)) = boot.sidecar else { panic!("{boot:?}") };
    assert_eq!((istio.token.as_str(), istio.token_expires_at.unwrap().seconds), ("a.b.c", 7));
    assert_eq!(istio.encoded_len(), "a.b.c".len() + 2 + 4);
}

#[test]
fn a_sidecar_that_runs_keeps_what_it_was_started_with() {
    let before = made(&inputs(), &live()).unwrap();
    let mut changed = with_group(group_with("metadata: {annotations: {proxy.istio.io/config: 'drainDuration: 21s'}}"));
    assert!(!made(&changed, &live()).unwrap().at_once);
    assert_eq!(made(&changed, &live()).unwrap().started_with(&before.start), before);
    // What needs no restart is new all the same.
    changed.propagation_delay = Duration::from_secs(1);
    let next = made(&changed, &live()).unwrap().started_with(&before.start);
    assert_eq!((&next.start, next.head.propagation_delay.unwrap().seconds), (&before.start, 1));
    assert_ne!(next.version, before.version);
    for (value, at_once) in [("true", true), ("false", false), ("yes", false)] {
        let more = format!("metadata: {{annotations: {{{AT_ONCE_ANNOTATION}: '{value}'}}}}");
        assert_eq!(made(&with_group(group_with(&more)), &live()).unwrap().at_once, at_once);
    }
}

/// Whether the version becomes another.
fn differs(change: impl FnOnce(&mut Inputs, &mut Live)) -> bool {
    let (mut inputs, mut live) = (inputs(), live());
    let before = made(&inputs, &live).unwrap().version;
    change(&mut inputs, &mut live);
    before != made(&inputs, &live).unwrap().version
}

fn namespace(inputs: &mut Inputs) -> &mut Namespace {
    Arc::make_mut(inputs.namespaces.get_mut("bookinfo").unwrap())
}

#[test]
fn the_version_changes_with_what_an_agent_gets_and_nothing_else() {
    assert!(differs(|_, live| drop(live.report.labels.insert("a".to_owned(), "b".to_owned()))));
    assert!(differs(|inputs, _| namespace(inputs).root_certificates = Some(ROOT.replace("AAAA", "BBBB"))));
    assert!(differs(|inputs, _| namespace(inputs).sidecars.clear()));
    assert!(differs(|inputs, _| inputs.names = Arc::default()));
    assert!(differs(|inputs, _| inputs.propagation_delay = Duration::from_secs(1)));
    assert!(differs(|inputs, _| {
        inputs.custom_gateway = Some(CustomGateway { host: "gateway".to_owned(), port: 15443 });
    }));
    for more in ["metadata: {annotations: {proxy.istio.io/config: 'drainDuration: 21s'}}", "# nothing"] {
        let changed = differs(|inputs, _| *inputs = with_group(group_with(more)));
        assert_eq!(changed, more.starts_with("metadata"), "{more}");
    }
    assert!(!differs(|_, live| live.report.agent_version = "2".to_owned()));
    assert!(!differs(|_, live| live.health.ready = true));
    assert!(!differs(|_, live| live.report.addresses[0].ip = "10.0.0.5".parse().unwrap()));
    assert!(!differs(|inputs, _| drop(inputs.namespaces.insert("other".to_owned(), Arc::default()))));
    // The same mesh in another order.
    assert!(!differs(|inputs, _| {
        let reversed = "
defaultConfig:
  tracing: {sampling: 1, zipkin: {address: 'zipkin:9411'}}
  proxyMetadata: {GODEBUG: a=1, CA_ADDR: elsewhere, http_proxy: 'http://p', LD_PRELOAD: /x.so, ISTIO_META_DNS_CAPTURE: 'true'}
  drain_duration: 20s
  meshId: mesh1
trustDomain: example.org
";
        let mesh = Mesh::read(reversed, Some(r#"{"global":{"multiCluster":{"clusterName":"east"}}}"#));
        Arc::make_mut(&mut inputs.meshes).by_revision.insert(DEFAULT_REVISION.to_owned(), mesh);
    }));
}

#[test]
fn canonical_names_as_istio_has_them() {
    let of = |labels: &[(&str, &str)]| {
        let labels: Labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let (name, revision) = canonical(&labels, "workload");
        (name.to_owned(), revision.to_owned())
    };
    let pair = |name: &str, revision: &str| (name.to_owned(), revision.to_owned());
    assert_eq!(of(&[]), pair("workload", "latest"));
    assert_eq!(of(&[("app", "a"), ("version", "1")]), pair("a", "1"));
    let more = [("app", "a"), ("app.kubernetes.io/name", "b"), ("version", "1"), ("app.kubernetes.io/version", "2")];
    assert_eq!(of(&more), pair("b", "2"));
    let most = [&more[..], &[(CANONICAL_NAME, "c"), (CANONICAL_REVISION, "3")]].concat();
    assert_eq!(of(&most), pair("c", "3"));
}

#[test]
fn the_clusters_name_as_pilot_agent_computes_it() {
    let cluster = |annotation: &str, labels: &str| {
        let more = format!("metadata: {{annotations: {{proxy.istio.io/config: '{annotation}'}}, labels: {labels}}}");
        let rendered = made(&with_group(group_with(&more)), &live()).unwrap();
        json_of(&rendered.start.node)["cluster"].as_str().unwrap().to_owned()
    };
    let named = "{app.kubernetes.io/name: other}";
    assert_eq!(cluster("", "{}"), "ratings.bookinfo");
    assert_eq!(cluster("", named), "ratings.bookinfo");
    assert_eq!(cluster("serviceCluster: mine", named), "mine");
    assert_eq!(cluster("tracingServiceName: CANONICAL_NAME_ONLY", named), "other");
    assert_eq!(cluster("tracingServiceName: CANONICAL_NAME_AND_NAMESPACE", named), "other.bookinfo");
    assert_eq!(cluster("tracingServiceName: APP_LABEL_AND_NAMESPACE", named), "ratings.bookinfo");
}

#[test]
fn where_istiod_is_reached() {
    let address = |annotations: &str, gateway: Option<(&str, u16)>| {
        let group = group_with(&format!("metadata: {{annotations: {{{annotations}}}}}"));
        let custom_gateway = gateway.map(|(host, port)| CustomGateway { host: host.to_owned(), port });
        made(&Inputs { custom_gateway, ..with_group(group) }, &live())
            .map(|rendered| rendered.start.discovery_address.clone())
    };
    assert_eq!(address("", None).unwrap(), "");
    assert_eq!(address("", Some(("gateway.example.org", 443))).unwrap(), "gateway.example.org:443");
    assert_eq!(address("", Some(("fd00::1", 443))).unwrap(), "[fd00::1]:443");
    let own = "proxy.istio.io/config: 'discoveryAddress: east-west:15443'";
    assert_eq!(address(own, Some(("gateway", 443))).unwrap(), "east-west:15443");
    let nearer = format!("{own}, sidecar.istio.io/discoveryAddress: '10.0.0.1:15012'");
    assert_eq!(address(&nearer, None).unwrap(), "10.0.0.1:15012");
    for (annotations, words) in [
        ("sidecar.istio.io/discoveryAddress: nowhere", "\"nowhere\" is not host:port"),
        ("sidecar.istio.io/discoveryAddress: 'a b:1'", "is not host:port"),
        ("proxy.istio.io/config: 'discoveryAddress: x:0'", "discoveryAddress is \"x:0\""),
        ("proxy.istio.io/config: '['", "proxy.istio.io/config can't be read"),
        ("proxy.istio.io/config: 'proxyMetadata: {A: []}'", "proxyMetadata.A is not a text"),
    ] {
        let error = address(annotations, None).unwrap_err();
        assert!(error.is_refusal());
        assert!(error.to_string().contains("of the WorkloadGroup bookinfo/ratings can't be used"), "{error}");
        assert!(error.to_string().contains(words), "{annotations}: {error}");
    }
}

#[test]
fn hosts_and_ports() {
    for good in ["a:1", "a.b-c.d:65535", "10.0.0.1:15012", "[fd00::1]:1", "istiod_x:1"] {
        assert!(is_host_port(good), "{good}");
    }
    for bad in ["", "a", ":1", "a:", "a:0", "a:65536", "a:+1", "fd00::1:1", "[a]:1", "a b:1", "-a:1", "a..b:1", "a/b:1"]
    {
        assert!(!is_host_port(bad), "{bad}");
    }
}

#[test]
fn a_network_is_the_groups_alone() {
    let mesh = "defaultConfig: {proxyMetadata: {ISTIO_META_NETWORK: pods, ISTIO_META_AUTO_REGISTER_GROUP: x}}";
    let network = |group: WorkloadGroup| {
        let mut inputs = with_group(group);
        Arc::make_mut(&mut inputs.meshes).by_revision.insert(DEFAULT_REVISION.to_owned(), Mesh::read(mesh, None));
        let rendered = made(&inputs, &live()).unwrap();
        assert!(!rendered.start.environment.contains_key("ISTIO_META_AUTO_REGISTER_GROUP"));
        assert!(!String::from_utf8_lossy(&rendered.start.files["./etc/istio/config/mesh"]).contains("AUTO_REGISTER"));
        let of_node = json_of(&rendered.start.node)["metadata"].get("NETWORK").cloned();
        assert_eq!(of_node, rendered.start.environment.get("ISTIO_META_NETWORK").map(|network| json!(network)));
        of_node
    };
    assert_eq!(network(group()), Some(json!("virtual-machines")));
    assert_eq!(network(WorkloadGroup { network: None, ..group() }), None);
}

#[test]
fn a_revision_names_its_istiod() {
    let mut inputs = inputs();
    Arc::make_mut(&mut inputs.meshes).by_revision.insert("canary".to_owned(), Mesh::read("", None));
    let mut live = live();
    live.report.sidecar = SidecarReport::Istio { version: "1.30".to_owned(), revision: Some("canary".to_owned()) };
    let rendered = made(&inputs, &live).unwrap();
    assert_eq!(rendered.start.istiod_san, "istiod-canary.istio-system.svc");
    assert_eq!(rendered.start.environment["ISTIOD_SAN"], "istiod-canary.istio-system.svc");
    assert_eq!(rendered.start.environment["TRUST_DOMAIN"], "cluster.local");
    assert_eq!(rendered.start.spiffe_id, "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm");
    live.report.sidecar = SidecarReport::Istio { version: String::new(), revision: Some("other".to_owned()) };
    let error = made(&inputs, &live).unwrap_err();
    assert!(error.is_refusal());
    assert!(error.to_string().contains("isn't in the cluster; there are: canary, default;"), "{error}");
}

#[test]
fn what_is_missing_is_said() {
    let error = made(&Inputs { groups: [].into(), ..inputs() }, &live()).unwrap_err();
    assert_eq!(error.to_string(), "the WorkloadGroup bookinfo/ratings doesn't exist, or can't be read");
    assert!(!error.is_refusal());
    let error = made(&Inputs { meshes: Arc::default(), ..inputs() }, &live()).unwrap_err();
    assert!(error.to_string().contains("is Istio installed?"), "{error}");
    let mut nowhere = live();
    nowhere.report.addresses.clear();
    let error = made(&inputs(), &nowhere).unwrap_err();
    assert!(error.to_string().starts_with("the host has no address for the mesh: no VPC address"), "{error}");
    for bundle in
        [None, Some(""), Some("nonsense"), Some("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----")]
    {
        let mut inputs = inputs();
        namespace(&mut inputs).root_certificates = bundle.map(str::to_owned);
        let error = made(&inputs, &live()).unwrap_err();
        assert!(error.to_string().contains("neither namespace bookinfo nor istio-system"), "{error}");
        // istiod's own namespace has it.
        let own = Namespace { root_certificates: Some(ROOT.to_owned()), ..Namespace::default() };
        inputs.namespaces.insert("istio-system".to_owned(), Arc::new(own));
        assert_eq!(made(&inputs, &live()).unwrap().root_certificates, ROOT);
    }
}

#[test]
fn durations_of_protobuf() {
    let drain = |text: &str| {
        let proxy = ProxyConfig::default().with_annotation(&format!("drainDuration: {text}")).unwrap();
        let mut left_out = Vec::new();
        (drain_duration(&proxy, &mut left_out), left_out.len())
    };
    assert_eq!(drain("45s"), (Some(Duration::from_secs(45)), 0));
    assert_eq!(drain("0.5s"), (Some(Duration::from_millis(500)), 0));
    assert_eq!(drain("7200s"), (Some(LONGEST_DRAIN), 1));
    for bad in ["1m", "-1s", "NaNs", "infs", "s", "1e300s"] {
        assert_eq!(drain(bad), (None, 1), "{bad}");
    }
    assert_eq!(drain_duration(&ProxyConfig::default(), &mut Vec::new()), None);
}

#[test]
fn no_more_than_an_agent_takes() {
    let metadata: String = (0..300).map(|n| format!("    V{n}: '{}'\n", "x".repeat(2000))).collect();
    let more = format!("    LARGE: '{}'\n", "x".repeat(LONGEST_METADATA + 1));
    let mesh = format!("defaultConfig:\n  proxyMetadata:\n{metadata}{more}");
    let mut inputs = inputs();
    Arc::make_mut(&mut inputs.meshes).by_revision.insert(DEFAULT_REVISION.to_owned(), Mesh::read(&mesh, None));
    let rendered = made(&inputs, &live()).unwrap();
    assert!(rendered.start.environment.len() <= 256);
    let size: usize = rendered.start.environment.iter().map(|(name, value)| name.len() + value.len()).sum();
    assert!(size < 512 << 10, "{size}");
    assert!(rendered.left_out.contains(&"proxyMetadata.LARGE".to_owned()));
}
