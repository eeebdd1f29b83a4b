//! What pods of an Istio mesh run, on a machine each: a gateway (`pilot-agent proxy router`), as the Deployment `vmgateway` has it, or the
//! sidecar of a workload.

use crate::cluster::{Cluster, Istiod};
use crate::netns::Machine;
use crate::process::Process;
use anyhow::Context;
use std::path::Path;

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
    let pod = Pod { kind: "router", name, app: "vmgateway", namespace: "istio-system", network };
    run(cluster, istiod, machine, envoy, &pod)
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
    let &Pod { kind, name, app, namespace, network } = pod;
    let directory = machine.directory().join("gateway");
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
        "discoveryAddress: {}\nbinaryPath: {}\nproxyBootstrapTemplatePath: ./var/lib/istio/envoy/envoy_bootstrap_tmpl.json\nstatusPort: 15020\n",
        istiod.secure,
        envoy.display()
    );
    let mut labels = serde_json::json!({ "istio": app, "app": app });
    if let Some(network) = network {
        labels["topology.istio.io/network"] = network.into();
    }
    // Entering a machine leaves the working directory behind.
    let mut command = machine.command("sh");
    command
        .args(["-c", r#"cd "$0" && exec "$@""#])
        .arg(&directory)
        .arg(cluster.binary("pilot-agent"))
        .args(["proxy", kind, "--domain", &format!("{namespace}.svc.cluster.local")])
        .arg("--log_output_level=default:warn")
        .envs([
            ("INSTANCE_IP", machine.address().to_string().as_str()),
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
        ]);
    if let Some(network) = network {
        // By injection, from the label.
        command.env("ISTIO_META_NETWORK", network);
        if kind == "router" {
            // By its Deployment: what is of another network isn't behind it.
            command.env("ISTIO_META_REQUESTED_NETWORK_VIEW", network);
        }
    }
    Process::start(app, command, Some(&machine.directory().join("gateway.log")))
}
