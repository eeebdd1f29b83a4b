//! What the operator renders, taken up by a real istiod and a real Istio gateway: who asks for which name on which port reaches whom.
//!
//! In network namespaces of its own, as the gateway needs port 443. The backends are servers of OpenSSL, told apart by their certificates.
#![allow(clippy::print_stdout, reason = "a test without a harness")]

mod lab;

use anyhow::ensure;
use lab::{MESH, enable, endpoints};
use onboarding_testkit::gateway;
use onboarding_testkit::netns::{Lab, Machine};
use onboarding_testkit::process::{Process, output};
use rcgen::{CertificateParams, DnType, KeyPair};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
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

fn main() -> ExitCode {
    lab::run(NAME, the_way_in)
}

fn the_way_in(lab: &Lab) -> anyhow::Result<()> {
    let (control, cluster) = lab::cluster(lab)?;
    let (gateway, client) = (lab.machine("gateway", 6)?, lab.machine("client", 7)?);
    let istiod = cluster.start_istiod(MESH)?;
    cluster.apply(&endpoints("istiod", "tls-istiod", &control, istiod.secure.port()))?;
    cluster.apply("apiVersion: v1\nkind: Service\nmetadata: {name: istiod, namespace: istio-system, labels: {app: istiod}}\nspec: {ports: [{name: tls-istiod, port: 15012}]}\n")?;
    let _operator = enable(&cluster, &control)?;
    for object in ["virtualservice/vmgateway", "serviceaccount/vmgateway", "configmap/istio-ca-root-cert"] {
        let wait = ["wait", "--for=create", "--timeout=60s", object, "-n", "istio-system"];
        cluster.kubectl(wait)?;
    }
    let envoy = envoy()?;
    let (_plane, _repository) = (backend(&control, "plane", 21443)?, backend(&control, "repository", 28443)?);
    cluster.apply(&endpoints("onboarding-plane", "tls-onboarding", &control, 21443))?;
    cluster.apply(&endpoints("onboarding-repository", "tls-repository", &control, 28443))?;
    let first = gateway::start(&cluster, istiod, &gateway, &envoy, None, None)?;

    let reaches = |port: u16, name: Option<&str>, wanted: &str| -> anyhow::Result<()> {
        let deadline = Instant::now() + WITHIN;
        loop {
            let answer = handshake(&client, &gateway, port, name).unwrap_or_else(|error| format!("{error:#}"));
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
    let _second = gateway::start(&cluster, istiod, &gateway, &envoy, None, Some("pods"))?;
    reaches(15443, Some("outbound_.9080_._.details.istio-system.svc.cluster.local"), "CN=repository")?;
    everybody()
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

/// The Envoy that `dev/envoy` finds or fetches.
fn envoy() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("ENVOY") {
        return Ok(path.into());
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../dev/envoy");
    Ok(output(Command::new(script), Duration::from_secs(300))?.trim().into())
}
