//! A real mesh of Istio on loopback: API server, istiod, and a workload like the agent's, whose sidecar pilot-agent runs.

use anyhow::Context;
use onboarding_testkit::cluster::{Cluster, Istiod, Options};
use onboarding_testkit::gateway::{self, Ports};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;

const MESH: &str = "trustDomain: cluster.local\ndefaultConfig: {discoveryAddress: 'istiod.istio-system.svc:15012'}\n";
const NAMESPACE: &str = "bookinfo";
/// The workload, and its account.
const WORKLOAD: &str = "ratings";
const MANIFESTS: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: bookinfo}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: ratings, namespace: bookinfo}
---
apiVersion: networking.istio.io/v1
kind: Sidecar
metadata: {name: ratings, namespace: bookinfo}
spec:
  workloadSelector: {labels: {app: ratings}}
  ingress:
  - {bind: 127.0.0.3, defaultEndpoint: '127.0.0.1:8080', port: {number: 8080, name: http, protocol: HTTP}}
  egress:
  - {bind: 127.0.0.2, port: {number: 8080, name: http, protocol: HTTP}, hosts: ['./*']}
";

/// Ends with this value.
pub struct Istio {
    cluster: Cluster,
    istiod: Istiod,
}

impl Istio {
    /// # Errors
    /// What `dev/kubernetes` builds isn't there, or a part of it doesn't come up.
    pub fn start() -> anyhow::Result<Self> {
        let cluster = Cluster::start(Options::default())?;
        cluster.apply_istio_crds()?;
        let istiod = cluster.start_istiod(MESH)?;
        cluster.apply(MANIFESTS)?;
        let roots = "configmap/istio-ca-root-cert";
        cluster.kubectl(["wait", "--for=create", "--timeout=60s", roots, "-n", NAMESPACE])?;
        Ok(Self { cluster, istiod })
    }

    pub fn pilot_agent(&self) -> PathBuf {
        self.cluster.binary("pilot-agent")
    }

    /// What starts pilot-agent, with its token and its files in this directory, and where its Envoy says whether it is live.
    ///
    /// # Errors
    /// The API server gives no token, or a file can't be written.
    pub fn sidecar(&self, directory: &Path, envoy: &Path) -> anyhow::Result<(Command, SocketAddr)> {
        // Ports that nobody listens on now; each other one while these are held.
        let all: Vec<_> = (0..4).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<_, _>>()?;
        let ports: Vec<_> = all.iter().map(|one| one.local_addr().map(|it| it.port())).collect::<Result<_, _>>()?;
        let [admin, status, ready, metrics] = ports[..] else { anyhow::bail!("four ports") };
        let ports = Ports { admin, status, ready, metrics };
        let workload = (NAMESPACE, WORKLOAD);
        let command = gateway::sidecar_on_loopback(&self.cluster, self.istiod, directory, envoy, workload, ports)
            .context("laying out pilot-agent's files")?;
        Ok((command, (Ipv4Addr::LOCALHOST, admin).into()))
    }
}
