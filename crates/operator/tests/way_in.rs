//! What the operator renders, taken up by a real istiod and a real Istio gateway: who asks for which name on which port reaches whom.
//!
//! In network namespaces of its own, as the gateway needs port 443. The backends are servers of OpenSSL, told apart by their certificates.
#![allow(clippy::print_stdout, reason = "a test without a harness")]

use anyhow::{Context, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use onboarding_testkit::cluster::{Cluster, Istiod, Options};
use onboarding_testkit::netns::{Lab, Machine, inside};
use onboarding_testkit::process::{Process, output};
use rcgen::{CertificateParams, DnType, KeyPair};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Of the mesh, with a sidecar: the gateway sends to no other.
const DETAILS: &str = "\
apiVersion: v1
kind: Service
metadata: {name: details, namespace: istio-system}
spec: {ports: [{name: tcp, port: 9080}], selector: {app: details}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: details, namespace: istio-system}
";
const NAME: &str = "each_name_reaches_whom_it_is_of";
const WITHIN: Duration = Duration::from_secs(60);
const MESH: &str = "trustDomain: cluster.local\ndefaultConfig:\n  discoveryAddress: istiod.istio-system.svc:15012\n";
const CONTROL_PLANE: &str = "\
apiVersion: install.tetrate.io/v1alpha1
kind: ControlPlane
metadata: {name: controlplane, namespace: istio-system}
spec: {meshExpansion: {onboarding: {endpoint: {hosts: [onboarding.corp], secretName: endpoint-tls}, localRepository: {}}}}
";

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, vec![Trial::test(NAME, || Ok(()))]).exit_code();
    }
    let ran = inside(|lab| {
        let lab = lab.clone();
        let trial = Trial::test(NAME, move || the_way_in(&lab).map_err(|error| Failed::from(format!("{error:#}"))));
        libtest_mimic::run(&arguments, vec![trial]).exit_code()
    });
    match ran {
        Ok(code) => code,
        Err(unavailable) if std::env::var_os("CI").is_none() => {
            println!("skipped: {unavailable}");
            ExitCode::SUCCESS
        }
        Err(unavailable) => {
            println!("failed: {unavailable}");
            ExitCode::FAILURE
        }
    }
}

fn the_way_in(lab: &Lab) -> anyhow::Result<()> {
    let control = Arc::new(lab.machine("control", 5)?);
    let (gateway, client) = (lab.machine("gateway", 6)?, lab.machine("client", 7)?);
    let machine = control.clone();
    let cluster = Cluster::start(Options {
        address: control.address().into(),
        controllers: true,
        command: Box::new(move |program| machine.command(program)),
    })?;
    cluster.apply_istio_crds()?;
    cluster.apply_crds(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/crds")))?;
    let istiod = cluster.start_istiod(MESH)?;
    cluster.apply(&endpoints("istiod", "tls-istiod", &control, istiod.secure.port()))?;
    cluster.apply("apiVersion: v1\nkind: Service\nmetadata: {name: istiod, namespace: istio-system, labels: {app: istiod}}\nspec: {ports: [{name: tls-istiod, port: 15012}]}\n")?;
    cluster.apply(CONTROL_PLANE)?;
    let _operator = operator(&cluster, &control)?;
    for object in ["virtualservice/vmgateway", "serviceaccount/vmgateway", "configmap/istio-ca-root-cert"] {
        let wait = ["wait", "--for=create", "--timeout=60s", object, "-n", "istio-system"];
        cluster.kubectl(wait)?;
    }
    let (_plane, _repository) = (backend(&control, "plane", 21443)?, backend(&control, "repository", 28443)?);
    cluster.apply(&endpoints("onboarding-plane", "tls-onboarding", &control, 21443))?;
    cluster.apply(&endpoints("onboarding-repository", "tls-repository", &control, 28443))?;
    let first = router(&cluster, istiod, &gateway, None)?;

    let reaches = |port: u16, name: Option<&str>, wanted: &str| -> anyhow::Result<()> {
        let deadline = Instant::now() + WITHIN;
        loop {
            let answer = handshake(&client, &gateway, port, name)?;
            if answer.contains(wanted) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{port}, {name:?} doesn't reach {wanted}:\n{answer}");
            std::thread::park_timeout(Duration::from_millis(200));
        }
    };
    let everybody = || {
        reaches(15443, Some("onboarding.corp"), "CN=plane")?;
        reaches(15443, Some("istiod.istio-system.svc"), "O=cluster.local")?;
        // A client that was given an IP sends no name; another name is the plane's to refuse.
        reaches(15443, None, "CN=plane")?;
        reaches(15443, Some("elsewhere.corp"), "CN=plane")?;
        reaches(443, Some("onboarding.corp"), "CN=repository")?;
        reaches(443, None, "CN=repository")
    };
    everybody()?;
    // Another revision is routed to as soon as it is there.
    cluster.apply(&endpoints("istiod-canary", "tls-istiod", &control, 28443))?;
    cluster.apply("apiVersion: v1\nkind: Service\nmetadata: {name: istiod-canary, namespace: istio-system, labels: {app: istiod}}\nspec: {ports: [{name: tls-istiod, port: 15012}]}\n")?;
    reaches(15443, Some("istiod-canary.istio-system.svc"), "CN=repository")?;
    everybody()?;
    drop(first);
    // Pods in a network of their own: one of their services, by the name that a sidecar asks for, and all the rest as before.
    cluster.apply(&format!("{DETAILS}spec: {{address: {}, network: pods, serviceAccount: details, ports: {{tcp: 28443}}, labels: {{app: details, security.istio.io/tlsMode: istio}}}}\n", control.address()))?;
    cluster.kubectl(["label", "namespace", "istio-system", "topology.istio.io/network=pods"])?;
    let _second = router(&cluster, istiod, &gateway, Some("pods"))?;
    reaches(15443, Some("outbound_.9080_._.details.istio-system.svc.cluster.local"), "CN=repository")?;
    everybody()
}

fn operator(cluster: &Cluster, machine: &Machine) -> anyhow::Result<Process> {
    let mut command = machine.command(env!("CARGO_BIN_EXE_onboarding-operator"));
    command.args(["--admin-listen", "127.0.0.1:0"]).env("KUBECONFIG", cluster.kubeconfig());
    Process::start("onboarding-operator", command, None)
}

/// As if pods of this Service ran on the machine.
fn endpoints(service: &str, port_name: &str, machine: &Machine, port: u16) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {service}-test, namespace: istio-system, labels: {{kubernetes.io/service-name: {service}}}}}\n\
         addressType: IPv4\nendpoints: [{{addresses: [{}], conditions: {{ready: true}}}}]\n\
         ports: [{{name: {port_name}, port: {port}, protocol: TCP}}]\n",
        machine.address()
    )
}

/// A TLS server whose certificate says `CN=<name>`.
fn backend(machine: &Machine, name: &str, port: u16) -> anyhow::Result<Process> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![format!("{name}.corp")])?;
    params.distinguished_name.push(DnType::CommonName, name);
    let file = |extension: &str, text: String| -> anyhow::Result<PathBuf> {
        let path = machine.directory().join(format!("{name}.{extension}"));
        std::fs::write(&path, text)?;
        Ok(path)
    };
    let certificate = file("crt", params.self_signed(&key)?.pem())?;
    let key = file("key", key.serialize_pem())?;
    let mut command = machine.command("openssl");
    command.args(["s_server", "-quiet", "-accept", &port.to_string(), "-cert"]).arg(certificate).arg("-key").arg(key);
    Process::start(name, command, None)
}

/// What OpenSSL says of whoever answers: among it, the subject of the certificate.
fn handshake(client: &Machine, gateway: &Machine, port: u16, name: Option<&str>) -> anyhow::Result<String> {
    let mut command = client.command("openssl");
    command.args(["s_client", "-connect", &format!("{}:{port}", gateway.address())]);
    match name {
        // Sidecars say that they speak mutual TLS of the mesh, and the gateway passes nothing else on to pods.
        Some(name) if name.starts_with("outbound_") => command.args(["-servername", name, "-alpn", "istio"]),
        Some(name) => command.args(["-servername", name]),
        None => command.arg("-noservername"),
    };
    command.stdin(Stdio::null());
    let ended = onboarding_testkit::process::run(command, Duration::from_secs(10))?;
    // With and without spaces, by OpenSSL's version.
    Ok((ended.stdout + &ended.stderr).replace(" = ", "="))
}

/// `pilot-agent proxy router`, as the Deployment `vmgateway` would run it. `network`: that of the pods, if they have one.
fn router(cluster: &Cluster, istiod: Istiod, machine: &Machine, network: Option<&str>) -> anyhow::Result<Process> {
    let directory = machine.directory().join("gateway");
    let write = |path: &str, text: &str| -> anyhow::Result<()> {
        let path = directory.join(path);
        std::fs::create_dir_all(path.parent().context("a file has a directory")?)?;
        Ok(std::fs::write(path, text)?)
    };
    let token = cluster.kubectl(["create", "token", "vmgateway", "-n", "istio-system", "--audience=istio-ca"])?;
    let root = "jsonpath={.data.root-cert\\.pem}";
    let root = cluster.kubectl(["get", "configmap", "istio-ca-root-cert", "-n", "istio-system", "-o", root])?;
    write("var/run/secrets/tokens/istio-token", token.trim())?;
    write("var/run/secrets/istio/root-cert.pem", &root)?;
    write("etc/certs/root-cert.pem", &root)?;
    let template = std::fs::read_to_string(cluster.binary("envoy_bootstrap_tmpl.json"))?;
    write("var/lib/istio/envoy/envoy_bootstrap_tmpl.json", &template)?;
    let config = format!(
        "discoveryAddress: {}\nbinaryPath: {}\nproxyBootstrapTemplatePath: ./var/lib/istio/envoy/envoy_bootstrap_tmpl.json\nstatusPort: 15020\n",
        istiod.secure,
        envoy()?
    );
    let labels = match network {
        Some(network) => format!(r#"{{"istio":"vmgateway","topology.istio.io/network":"{network}"}}"#),
        None => r#"{"istio":"vmgateway"}"#.to_owned(),
    };
    // Entering a machine leaves the working directory behind.
    let mut command = machine.command("sh");
    command
        .args(["-c", r#"cd "$0" && exec "$@""#])
        .arg(&directory)
        .arg(cluster.binary("pilot-agent"))
        .args(["proxy", "router", "--domain", "istio-system.svc.cluster.local", "--log_output_level=default:warn"])
        .envs([
            ("INSTANCE_IP", machine.address().to_string().as_str()),
            ("POD_NAME", "vmgateway-test"),
            ("POD_NAMESPACE", "istio-system"),
            ("SERVICE_ACCOUNT", "vmgateway"),
            ("TRUST_DOMAIN", "cluster.local"),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            ("ISTIO_META_WORKLOAD_NAME", "vmgateway"),
            ("ISTIO_METAJSON_LABELS", labels.as_str()),
            ("ISTIOD_SAN", "istiod.istio-system.svc"),
            ("PROXY_CONFIG", config.as_str()),
        ]);
    if let Some(network) = network {
        // The first by injection, from the label; the second by the Deployment.
        command.envs([("ISTIO_META_NETWORK", network), ("ISTIO_META_REQUESTED_NETWORK_VIEW", network)]);
    }
    Process::start("vmgateway", command, None)
}

/// The Envoy that `dev/envoy` finds or fetches.
fn envoy() -> anyhow::Result<String> {
    if let Ok(path) = std::env::var("ENVOY") {
        return Ok(path);
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../dev/envoy");
    Ok(output(Command::new(script), Duration::from_secs(300))?.trim().to_owned())
}
