//! A mesh of Istio around a plane: API server and istiod on one machine, an Istio gateway on another, nothing of it pretended.

use crate::world::{ENDPOINT, envoy};
use onboarding_testkit::cluster::{Cluster, Istiod, Options};
use onboarding_testkit::gateway;
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

/// Starts it, and waits until istiod has told it of the way in.
fn start_gateway(cluster: &Cluster, istiod: Istiod, machine: &Machine) -> anyhow::Result<Process> {
    let process = gateway::start(cluster, istiod, machine, &envoy()?, None)?;
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
