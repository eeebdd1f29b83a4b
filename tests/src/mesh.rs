//! A mesh of Istio around a plane: API server and istiod on one machine, an Istio gateway on another, nothing of it pretended.

use crate::world::{ENDPOINT, envoy};
use anyhow::Context;
use onboarding_testkit::cluster::{Cluster, Istiod, Options};
use onboarding_testkit::netns::{Lab, Machine};
use onboarding_testkit::process::Process;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const CONTROL: u8 = 5;
const GATEWAY: u8 = 6;
const MESH: &str = "trustDomain: cluster.local\ndefaultConfig:\n  discoveryAddress: istiod.istio-system.svc:15012\n";

pub struct Mesh {
    pub cluster: Cluster,
    pub istiod: Istiod,
    pub control: Arc<Machine>,
    pub gateway: Arc<Machine>,
    gateway_process: Process,
}

impl Mesh {
    /// Everything up, with the CRDs of Istio and ours, and the way in to a plane at `plane`.
    pub fn start(lab: &Lab, plane: Ipv4Addr) -> anyhow::Result<Self> {
        let control = Arc::new(lab.machine("control", CONTROL)?);
        let gateway = Arc::new(lab.machine("gateway", GATEWAY)?);
        let machine = control.clone();
        let cluster = Cluster::start(Options {
            address: control.address().into(),
            controllers: true,
            command: Box::new(move |program| machine.command(program)),
        })?;
        cluster.apply_istio_crds()?;
        cluster.apply_crds(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/crds")))?;
        let istiod = cluster.start_istiod(MESH)?;
        let way_in = include_str!("../istio/way-in.yaml")
            .replace("ISTIOD_IP", &istiod.secure.ip().to_string())
            .replace("ISTIOD_PORT", &istiod.secure.port().to_string())
            .replace("PLANE_IP", &plane.to_string())
            .replace("ENDPOINT_HOST", ENDPOINT);
        cluster.apply(&way_in)?;
        let wait = ["wait", "--for=create", "--timeout=60s", "configmap/istio-ca-root-cert", "-n", "istio-system"];
        cluster.kubectl(wait)?;
        let gateway_process = start_gateway(&cluster, istiod, &gateway)?;
        Ok(Self { cluster, istiod, control, gateway, gateway_process })
    }

    /// What istiod says of each proxy, as `istioctl proxy-status` shows it.
    pub fn sync_status(&self) -> anyhow::Result<serde_json::Value> {
        let text =
            self.control.check("curl", ["-fsS", "-m", "5", &format!("http://{}/debug/syncz", self.istiod.http)])?;
        Ok(serde_json::from_str(&text)?)
    }

    pub fn gateway_log(&self) -> String {
        self.gateway_process.tail()
    }
}

/// `pilot-agent proxy router`, as the Deployment `vmgateway` would run it.
fn start_gateway(cluster: &Cluster, istiod: Istiod, machine: &Machine) -> anyhow::Result<Process> {
    let directory = machine.directory().join("gateway");
    let write = |path: &str, text: &str| -> anyhow::Result<()> {
        let path = directory.join(path);
        std::fs::create_dir_all(path.parent().context("a file has a directory")?)?;
        Ok(std::fs::write(path, text)?)
    };
    let token = cluster.kubectl(["create", "token", "vmgateway", "-n", "istio-system", "--audience=istio-ca"])?;
    let root = cluster.kubectl([
        "get",
        "configmap",
        "istio-ca-root-cert",
        "-n",
        "istio-system",
        "-o",
        "jsonpath={.data.root-cert\\.pem}",
    ])?;
    write("var/run/secrets/tokens/istio-token", token.trim())?;
    write("var/run/secrets/istio/root-cert.pem", &root)?;
    write("etc/certs/root-cert.pem", &root)?;
    let template = std::fs::read_to_string(cluster.binary("envoy_bootstrap_tmpl.json"))?;
    write("var/lib/istio/envoy/envoy_bootstrap_tmpl.json", &template)?;
    let config = format!(
        "discoveryAddress: {}\nbinaryPath: {}\nproxyBootstrapTemplatePath: ./var/lib/istio/envoy/envoy_bootstrap_tmpl.json\nstatusPort: 15020\n",
        istiod.secure,
        envoy()?.display()
    );
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
            // Nobody is asked which cloud this is.
            ("CLOUD_PLATFORM", "none"),
            ("ISTIO_META_WORKLOAD_NAME", "vmgateway"),
            ("ISTIO_METAJSON_LABELS", r#"{"istio":"vmgateway","app":"vmgateway"}"#),
            ("ISTIOD_SAN", "istiod.istio-system.svc"),
            ("PROXY_CONFIG", config.as_str()),
        ]);
    let process = Process::start("vmgateway", command, Some(&machine.directory().join("gateway.log")))?;
    crate::until::until("the gateway listens on 15443", Duration::from_secs(60), || {
        if let Some(status) = process.status() {
            return Ok(Err(anyhow::anyhow!("it ended ({status}):\n{}", process.tail())));
        }
        let listeners = machine.check("curl", ["-fsS", "-m", "3", "http://127.0.0.1:15000/listeners"])?;
        anyhow::ensure!(listeners.contains("15443"), "listeners: {listeners}");
        Ok(Ok(()))
    })??;
    Ok(process)
}
