#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]

use super::*;
use crate::boot::Address;
use crate::boot::fixtures::{a_root, boot, message};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;

fn istio(change: impl FnOnce(&mut onboarding_wire::onboarding::IstioBoot)) -> Istio {
    let mut message = message(&a_root());
    change(&mut message);
    let held = HeldBoot::apply(None, boot("1", message)).unwrap();
    let endpoint = Address { host: "onboarding.example.org".to_owned(), port: 15443 };
    match held.placed(Some("10.0.0.4".parse().unwrap()), &endpoint).unwrap().sidecar {
        boot::Sidecar::Istio(istio) => *istio,
        boot::Sidecar::Standalone(_) => unreachable!(),
    }
}

fn options(directory: &Path, way: IstioWay) -> Options {
    Options {
        binary: "/usr/local/bin/envoy".into(),
        directory: directory.to_owned(),
        stdout: "/dev/stdout".into(),
        stderr: "/dev/stderr".into(),
        admin: "127.0.0.1:15000".parse().unwrap(),
        istio: way,
        identity: directory.join("identity"),
    }
}

#[test]
fn a_certificate_lives_as_long_as_the_mesh_says() {
    let day = Duration::from_secs(24 * 3600);
    for (said, asked) in [
        (None, day),
        (Some("90s"), Duration::from_secs(90)),
        (Some("1h30m"), Duration::from_secs(5400)),
        (Some("soon"), day),
        (Some("20ms"), day),
    ] {
        let istio = istio(|message| {
            message.environment.extend(said.map(|said| ("SECRET_TTL".to_owned(), said.to_owned())));
        });
        let credentials = Credentials::of(&istio, "spiffe://cluster.local/ns/a/sa/b").unwrap();
        assert_eq!(credentials.validity, asked, "{said:?}");
    }
}

#[test]
fn envoy_takes_the_bootstrap() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../dev/envoy");
    let envoy = std::process::Command::new(script).output().unwrap();
    let envoy = String::from_utf8(envoy.stdout).unwrap();
    let name = istio(|_| {});
    let ip = istio(|message| message.discovery_address = "10.1.2.3:15012".to_owned());
    let six = istio(|message| {
        message.discovery_address = "[fd00::1]:15012".to_owned();
        message.node = br#"{"id":"sidecar~fd00::4~a.b~b.svc.cluster.local","cluster":"a"}"#.to_vec();
    });
    for istio in [name, ip, six] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bootstrap.json");
        let bootstrap = bootstrap::json("127.0.0.1:15000".parse().unwrap(), &istio, "instance").unwrap();
        std::fs::write(&path, bootstrap.to_string()).unwrap();
        let output = std::process::Command::new(envoy.trim())
            .args(["--mode", "validate", "--base-id", "0", "--disable-hot-restart", "-l", "warning", "-c"])
            .arg(&path)
            .current_dir(directory.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}\n{bootstrap:#}");
        assert!(!text.contains("runtime") && !text.contains("eprecated"), "{text}");
    }
}

#[test]
fn the_bootstrap_is_about_istiod_and_this_proxy() {
    let admin = "127.0.0.1:15000".parse().unwrap();
    let bootstrap = bootstrap::json(admin, &istio(|_| {}), "i").unwrap();
    assert_eq!(bootstrap["node"]["id"], "sidecar~10.0.0.4~a.b~b.svc.cluster.local");
    assert_eq!(bootstrap["node"]["metadata"]["ONBOARDING_INSTANCE"], "i");
    let clusters = bootstrap["static_resources"]["clusters"].as_array().unwrap();
    let xds = clusters.iter().find(|cluster| cluster["name"] == "xds-grpc").unwrap();
    assert_eq!(xds["type"], "STRICT_DNS");
    let socket = &xds["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"];
    assert_eq!(*socket, serde_json::json!({"address": "vmgateway.example.org", "port_value": 15443}));
    assert_eq!(xds["transport_socket"]["typed_config"]["sni"], "istiod.istio-system.svc");
    let ports = |istio: &Istio| {
        let bootstrap = bootstrap::json(admin, istio, "i").unwrap();
        let listeners = bootstrap["static_resources"]["listeners"].as_array().unwrap().clone();
        listeners.iter().map(|listener| listener["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ports(&istio(|_| {})), ["0.0.0.0:15090", "0.0.0.0:15021"]);
    let other = istio(|message| {
        let node = r#"{"id":"sidecar~fd00::4~a~b","cluster":"a","metadata":{"ENVOY_STATUS_PORT":0,"ENVOY_PROMETHEUS_PORT":"9000"}}"#;
        message.node = node.as_bytes().to_vec();
    });
    assert_eq!(ports(&other), ["[::]:9000"]);
}

#[test]
fn lays_pilot_agents_directory_out_privately_and_leaves_nothing_stale() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let template = path("template.json");
    let pilot_agent = PilotAgent { binary: "/usr/local/bin/pilot-agent".into(), template: template.clone() };
    let here = directory.path().join("sidecar");
    let first = istio(|_| {});
    let error = layout::lay_out(&here, &first, &pilot_agent).unwrap_err().to_string();
    assert!(error.contains("template.json is missing"), "{error}");
    std::fs::write(&template, "{}").unwrap();
    std::fs::create_dir_all(here.join("etc/istio/config")).unwrap();
    std::fs::write(here.join("etc/istio/config/stale"), "").unwrap();
    layout::lay_out(&here, &first, &pilot_agent).unwrap();
    let read = |name: &str| std::fs::read_to_string(here.join(name)).unwrap();
    assert_eq!(read("etc/istio/config/mesh"), "defaultConfig: {x: '10.0.0.4'}\n");
    assert_eq!(read("var/run/secrets/tokens/istio-token"), "aaa.the-tokens-payload.ccc");
    assert_eq!(read("var/lib/istio/envoy/envoy_bootstrap_tmpl.json"), "{}");
    assert!(read("etc/certs/root-cert.pem").contains("BEGIN CERTIFICATE"));
    assert!(!here.join("etc/istio/config/stale").exists());
    for name in ["etc/istio/config/mesh", "var/run/secrets/tokens/istio-token"] {
        assert_eq!(std::fs::metadata(here.join(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
    }
    assert_eq!(std::fs::metadata(here.join("etc")).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn which_program_runs_is_this_hosts_to_say() {
    let directory = Path::new("/var/lib/onboarding-agent/sidecar");
    let pilot_agent = PilotAgent { binary: "/usr/local/bin/pilot-agent".into(), template: "/x".into() };
    let options = options(directory, IstioWay::PilotAgent(pilot_agent.clone()));
    let istio = istio(|message| {
        let config = r#"{"binaryPath":"/bin/sh","customConfigFile":"/etc/shadow","concurrency":3}"#;
        message.environment.insert("PROXY_CONFIG".to_owned(), config.to_owned());
        message.environment.insert("OUTPUT_CERTS".to_owned(), "./etc/other".to_owned());
    });
    let launch = layout::launch(&options, &pilot_agent, &istio, "instance");
    assert_eq!(launch.arguments, ["proxy", "sidecar"]);
    let environment: BTreeMap<_, _> = launch.environment.unwrap();
    let get = |name: &str| environment.get(name).map(|value| value.to_str().unwrap().to_owned());
    let config: serde_json::Value = serde_json::from_str(&get("PROXY_CONFIG").unwrap()).unwrap();
    assert_eq!(config["binaryPath"], "/usr/local/bin/envoy");
    assert_eq!(config["customConfigFile"], "");
    assert_eq!(config["concurrency"], 3);
    assert_eq!(config["discoveryAddress"], "vmgateway.example.org:15443");
    assert_eq!(get("INSTANCE_IP").as_deref(), Some("10.0.0.4"));
    assert_eq!(get("ISTIO_META_ONBOARDING_INSTANCE").as_deref(), Some("instance"));
    assert_eq!(get("ISTIOD_SAN").as_deref(), Some("istiod.istio-system.svc"));
    assert_eq!(get("OUTPUT_CERTS").as_deref(), Some("./etc/other"));
    // Nothing else of the agent's environment, where an endpoint's CA or a credential may be.
    let known = [
        "EXIT_ON_ZERO_ACTIVE_CONNECTIONS",
        "HOME",
        "INSTANCE_IP",
        "ISTIOD_SAN",
        "ISTIO_META_ONBOARDING_INSTANCE",
        "MINIMUM_DRAIN_DURATION",
        "OUTPUT_CERTS",
        "PATH",
        "POD_NAMESPACE",
        "PROV_CERT",
        "PROXY_CONFIG",
    ];
    assert_eq!(environment.keys().map(String::as_str).collect::<Vec<_>>(), known);
}

#[tokio::test]
async fn a_pilot_agent_that_is_missing_says_the_way_out() {
    let directory = tempfile::tempdir().unwrap();
    let pilot_agent = PilotAgent { binary: "/no/such/pilot-agent".into(), template: "/no/such".into() };
    let options = options(directory.path(), IstioWay::PilotAgent(pilot_agent));
    let held = HeldBoot { sidecar: boot::Sidecar::Istio(Box::new(istio(|_| {}))), ..HeldBoot::default() };
    let (events, _) = mpsc::channel(1);
    let error = super::super::Sidecar::start(options, &held, None, events).await.err().unwrap().to_string();
    assert!(error.contains("/no/such/pilot-agent is missing") && error.contains("sidecar: {envoy: {}}"), "{error}");
}
