//! A mesh of Istio around a plane: API server and istiod on one machine, an Istio gateway on another, nothing of it pretended.

use crate::until::{until, was_prompt};
use crate::world::{ENDPOINT, envoy};
use anyhow::{Context, ensure};
use onboarding_testkit::cluster::{Cluster, Istiod, Options};
use onboarding_testkit::gateway;
use onboarding_testkit::netns::{Lab, Machine};
use onboarding_testkit::process::Process;
use serde_json::Value;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CONTROL: u8 = 5;
const GATEWAY: u8 = 6;
const MESH: &str = "trustDomain: cluster.local\ndefaultConfig:\n  discoveryAddress: istiod.istio-system.svc:15012\n";
/// Of what the gateway stands in front of.
pub const POD_NETWORK: &str = "pods";

pub struct Mesh {
    pub cluster: Cluster,
    pub istiod: Istiod,
    pub control: Arc<Machine>,
    pub gateway: Arc<Machine>,
    gateway_process: Process,
    plane_kubeconfig: PathBuf,
}

/// What the operator renders; its own tests see to it that this is so.
const RENDERED: &str =
    include_str!("../../crates/operator/src/render/snapshots/onboarding_operator__render__tests__everything.snap");
/// Of that, what the plane's account is and may.
const ACCESS: [&str; 6] = ["ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "Secret"];

impl Mesh {
    /// Everything up, with the CRDs of Istio and ours, and the way in to a plane at `plane`.
    pub fn start(lab: &Lab, plane: Ipv4Addr) -> anyhow::Result<Self> {
        let control = Arc::new(lab.machine("control", CONTROL)?);
        let gateway = Arc::new(lab.machine("gateway", GATEWAY)?);
        let cluster = Cluster::start(Options::on(control.clone()))?;
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
        let plane_kubeconfig = plane_account(&cluster)?;
        Ok(Self { cluster, istiod, control, gateway, gateway_process, plane_kubeconfig })
    }

    /// Of the account that the plane has in a cluster: it may no more than there.
    pub fn plane_kubeconfig(&self) -> &Path {
        &self.plane_kubeconfig
    }

    /// What istiod says of each proxy, as `istioctl proxy-status` shows it.
    pub fn sync_status(&self) -> anyhow::Result<serde_json::Value> {
        self.sync_status_of(self.istiod)
    }

    /// The same of another istiod of this cluster.
    pub fn sync_status_of(&self, istiod: Istiod) -> anyhow::Result<serde_json::Value> {
        let text = self.control.check("curl", ["-fsS", "-m", "5", &format!("http://{}/debug/syncz", istiod.http)])?;
        Ok(serde_json::from_str(&text)?)
    }

    /// What proxies are started with gets these lines (`proxyMetadata: ...`), or none.
    pub fn set_proxy_config(&self, added: &str) -> anyhow::Result<()> {
        let added: String = added.lines().map(|line| format!("  {line}\n")).collect();
        let patch = serde_json::json!({"data": {"mesh": format!("{MESH}{added}")}}).to_string();
        self.cluster.kubectl(["patch", "configmap", "istio", "-n", "istio-system", "--type=merge", "-p", &patch])?;
        Ok(())
    }

    /// An istiod of this revision, and the way to it through the gateway.
    pub fn start_revision(&self, revision: &str) -> anyhow::Result<(Process, Istiod)> {
        let (process, istiod) = self.cluster.start_istiod_of(revision, MESH)?;
        let way_in = include_str!("../istio/way-in-revision.yaml")
            .replace("ISTIOD_IP", &istiod.secure.ip().to_string())
            .replace("ISTIOD_PORT", &istiod.secure.port().to_string())
            .replace("REVISION", revision);
        self.cluster.apply(&way_in)?;
        Ok((process, istiod))
    }

    /// Waits until what was changed by kubectl has its effect, which must be within a second; how long it took.
    pub fn takes_effect(&self, what: &str, look: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<Duration> {
        let changed = Instant::now();
        until(what, Duration::from_secs(60), look)?;
        let took = changed.elapsed();
        was_prompt(what, took, || self.cluster.kubectl(["get", "--raw", "/version"]).map(drop))?;
        Ok(took)
    }

    /// These planes are ready, as the EndpointSlice of their Service would say.
    pub fn route_to_planes(&self, planes: &[Ipv4Addr]) -> anyhow::Result<()> {
        let endpoints: Vec<_> = planes
            .iter()
            .map(|plane| serde_json::json!({"addresses": [plane], "conditions": {"ready": true}}))
            .collect();
        let patch = serde_json::json!({ "endpoints": endpoints }).to_string();
        let patch =
            ["patch", "endpointslice", "onboarding-plane-test", "-n", "istio-system", "--type=merge", "-p", &patch];
        self.cluster.kubectl(patch).map(drop)
    }

    pub fn gateway_log(&self) -> String {
        self.gateway_process.tail()
    }
}

/// Makes the plane's account as the operator does, with its rights; gives a kubeconfig for it.
fn plane_account(cluster: &Cluster) -> anyhow::Result<PathBuf> {
    let (_, rendered) =
        RENDERED.split_once("---\n").and_then(|(_, rest)| rest.split_once("---\n")).context("no snapshot")?;
    // It may read one Secret, which in our ControlPlane has another name.
    let rendered = rendered.replace("endpoint-tls", "onboarding-endpoint-tls");
    let file = cluster.directory().join("rendered.yaml");
    std::fs::write(&file, format!("apiVersion: v1\nkind: List\nitems:\n{rendered}"))?;
    let file = file.display().to_string();
    let listed = cluster.kubectl(["create", "--dry-run=client", "--validate=false", "-o", "json", "-f", &file])?;
    let mut made = Vec::new();
    // One after the other.
    for object in serde_json::Deserializer::from_str(&listed).into_iter::<Value>() {
        let mut object = object?;
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        if name.starts_with("onboarding-plane") && ACCESS.iter().any(|kind| object["kind"] == *kind) {
            // Its owner isn't there, so it would be collected.
            object["metadata"].as_object_mut().context("an object without metadata")?.remove("ownerReferences");
            made.push(object["kind"].clone());
            cluster.apply(&object.to_string())?;
        }
    }
    anyhow::ensure!(made.len() == ACCESS.len(), "of the plane's account there is only {made:?}");
    let token = cluster.kubectl(["create", "token", "onboarding-plane", "-n", "istio-system", "--duration=4h"])?;
    let kubeconfig = cluster.directory().join("plane.kubeconfig");
    std::fs::write(&kubeconfig, cluster.kubeconfig_with_token(token.trim()))?;
    Ok(kubeconfig)
}

/// Starts it, and waits until istiod has told it of the way in.
fn start_gateway(cluster: &Cluster, istiod: Istiod, machine: &Machine) -> anyhow::Result<Process> {
    let process = gateway::start(cluster, istiod, machine, &envoy()?, None, Some(POD_NETWORK))?;
    until("the gateway listens on 15443", Duration::from_secs(60), || {
        if let Some(status) = process.status() {
            return Ok(Err(anyhow::anyhow!("it ended ({status}):\n{}", process.tail())));
        }
        let listeners = machine.check("curl", ["-fsS", "-m", "3", "http://127.0.0.1:15000/listeners"])?;
        ensure!(listeners.contains("15443"), "listeners: {listeners}");
        Ok(Ok(()))
    })??;
    Ok(process)
}
