//! What pods of an Istio mesh run, each on a machine of its own or all on loopback: a gateway (`pilot-agent proxy router`), as the
//! Deployment `vmgateway` has it, or the sidecar of a workload.

use crate::cluster::{Cluster, Istiod};
use crate::netns::Machine;
use crate::process::Process;
use anyhow::Context;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;

/// Starts it on a machine. The ServiceAccount `vmgateway` and the ConfigMap `istio-ca-root-cert` of `istio-system` must be there.
/// `envoy`: a stock one. `name`: its pod's, where there is one: by it istiod finds the Service, whose target ports it listens on. `network`:
/// that of the pods behind it, if they have one of their own. Its output is in `gateway.log` of the machine.
pub fn start(
    cluster: &Cluster,
    istiod: Istiod,
    machine: &Machine,
    envoy: &Path,
    name: Option<&str>,
    network: Option<&str>,
) -> anyhow::Result<Process> {
    let name = name.unwrap_or("vmgateway-test");
    run(
        cluster,
        istiod,
        machine,
        envoy,
        &Pod { kind: "router", name, app: "vmgateway", namespace: "istio-system", network },
    )
}

/// The sidecar of a pod of `app`, with the ServiceAccount of that name, as injection would start it but for the redirection of what
/// comes and goes: a Sidecar has to say where it listens. Its output is in `gateway.log` of the machine.
pub fn start_sidecar(
    cluster: &Cluster,
    istiod: Istiod,
    machine: &Machine,
    envoy: &Path,
    (namespace, app): (&str, &str),
    network: Option<&str>,
) -> anyhow::Result<Process> {
    let name = format!("{app}-test");
    run(cluster, istiod, machine, envoy, &Pod { kind: "sidecar", name: &name, app, namespace, network })
}

/// The same on loopback, with its files in this directory: what starts it.
pub fn sidecar_on_loopback(
    cluster: &Cluster,
    istiod: Istiod,
    directory: &Path,
    envoy: &Path,
    (namespace, app): (&str, &str),
    ports: Ports,
) -> anyhow::Result<Command> {
    let command = |program: &Path| {
        let mut command = Command::new(program);
        command.env_clear().env("HOME", directory).env("PATH", "/usr/local/bin:/usr/bin:/bin");
        command
    };
    let place = Place { directory, address: Ipv4Addr::LOCALHOST, ports, command: &command };
    let pod = Pod { kind: "sidecar", name: &format!("{app}-test"), app, namespace, network: None };
    prepare(cluster, istiod, &place, envoy, &pod)
}

/// What it listens on beside the traffic.
#[derive(Debug, Clone, Copy)]
pub struct Ports {
    /// Envoy's.
    pub admin: u16,
    /// pilot-agent's.
    pub status: u16,
    /// Envoy's, with nothing but `/healthz/ready`, and nothing but `/stats/prometheus`.
    pub ready: u16,
    pub metrics: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self { admin: 15000, status: 15020, ready: 15021, metrics: 15090 }
    }
}

/// Where it runs.
struct Place<'a> {
    directory: &'a Path,
    address: Ipv4Addr,
    ports: Ports,
    command: &'a dyn Fn(&Path) -> Command,
}

struct Pod<'a> {
    /// Of proxy.
    kind: &'a str,
    name: &'a str,
    /// The workload and its ServiceAccount.
    app: &'a str,
    namespace: &'a str,
    network: Option<&'a str>,
}

fn run(cluster: &Cluster, istiod: Istiod, machine: &Machine, envoy: &Path, pod: &Pod<'_>) -> anyhow::Result<Process> {
    let place = Place {
        directory: machine.directory(),
        address: machine.address(),
        ports: Ports::default(),
        command: &|program| machine.command(program),
    };
    let command = prepare(cluster, istiod, &place, envoy, pod)?;
    Process::start(pod.app, command, Some(&machine.directory().join("gateway.log")))
}

fn prepare(
    cluster: &Cluster,
    istiod: Istiod,
    place: &Place<'_>,
    envoy: &Path,
    pod: &Pod<'_>,
) -> anyhow::Result<Command> {
    let &Pod { kind, name, app, namespace, network } = pod;
    let ports = place.ports;
    let directory = place.directory.join("gateway");
    let write = |path: &str, text: &str| -> anyhow::Result<()> {
        let path = directory.join(path);
        std::fs::create_dir_all(path.parent().context("a file has a directory")?)?;
        Ok(std::fs::write(path, text)?)
    };
    let token = cluster.kubectl(["create", "token", app, "-n", namespace, "--audience=istio-ca"])?;
    let root = "jsonpath={.data.root-cert\\.pem}";
    let root = cluster.kubectl(["get", "configmap", "istio-ca-root-cert", "-n", namespace, "-o", root])?;
    write("var/run/secrets/tokens/istio-token", token.trim())?;
    write("var/run/secrets/istio/root-cert.pem", &root)?;
    write("etc/certs/root-cert.pem", &root)?;
    let template = std::fs::read_to_string(cluster.binary("envoy_bootstrap_tmpl.json"))?;
    write("var/lib/istio/envoy/envoy_bootstrap_tmpl.json", &template)?;
    let config = format!(
        "discoveryAddress: {}\nbinaryPath: {}\nproxyBootstrapTemplatePath: ./var/lib/istio/envoy/envoy_bootstrap_tmpl.json\nstatusPort: {}\nproxyAdminPort: {}\n",
        istiod.secure,
        envoy.display(),
        ports.status,
        ports.admin,
    );
    let mut labels = serde_json::json!({ "istio": app, "app": app });
    if let Some(network) = network {
        labels["topology.istio.io/network"] = network.into();
    }
    // Entering a machine leaves the working directory behind.
    let mut command = (place.command)(Path::new("sh"));
    command
        .args(["-c", r#"cd "$0" && exec "$@""#])
        .arg(&directory)
        .arg(cluster.binary("pilot-agent"))
        .args(["proxy", kind, "--domain", &format!("{namespace}.svc.cluster.local")])
        .arg("--log_output_level=default:warn")
        .envs([
            ("INSTANCE_IP", place.address.to_string().as_str()),
            ("POD_NAME", name),
            ("POD_NAMESPACE", namespace),
            ("SERVICE_ACCOUNT", app),
            ("TRUST_DOMAIN", "cluster.local"),
            // Nobody is asked which cloud this is.
            ("CLOUD_PLATFORM", "none"),
            ("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            ("ISTIO_META_INTERCEPTION_MODE", "NONE"),
            ("ISTIO_META_WORKLOAD_NAME", app),
            ("ISTIO_METAJSON_LABELS", labels.to_string().as_str()),
            ("ISTIOD_SAN", "istiod.istio-system.svc"),
            ("PROXY_CONFIG", config.as_str()),
            ("ENVOY_STATUS_PORT", ports.ready.to_string().as_str()),
            ("ENVOY_PROMETHEUS_PORT", ports.metrics.to_string().as_str()),
        ]);
    if let Some(network) = network {
        // By injection, from the label.
        command.env("ISTIO_META_NETWORK", network);
        if kind == "router" {
            // By its Deployment: what is of another network isn't behind it.
            command.env("ISTIO_META_REQUESTED_NETWORK_VIEW", network);
        }
    }
    Ok(command)
}
