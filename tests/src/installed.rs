//! A cluster with Istio in which onboarding is installed as an operator of it would: by helm, kubectl and a ControlPlane.
//!
//! There is nothing in it that isn't real but the node ([`crate::node`]), and istiod's own installation: istiod is a process, with a Service.

use crate::node::{Node, Options as NodeOptions};
use crate::until::until;
use crate::world::World;
use anyhow::{Context, ensure};
use onboarding_testkit::cluster::{Cluster, Istiod, Options};
use onboarding_testkit::netns::{Lab, Machine};
use onboarding_testkit::process;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

const CONTROL: u8 = 5;
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/chart/onboarding");
const RELEASE: &str = "onboarding-system";
const MESH: &str = "trustDomain: cluster.local\ndefaultConfig:\n  discoveryAddress: istiod.istio-system.svc:15012\n";
/// Of anything that is waited for here; the machine may be busy.
const WITHIN: Duration = Duration::from_secs(100);
/// Of a pod that is waited for: then it doesn't come up any more.
const MOST_RESTARTS: u32 = 3;
/// What a cluster with Istio has, and this one without its charts doesn't.
const ISTIOD: &str = "\
apiVersion: v1
kind: Service
metadata: {name: istiod, namespace: istio-system, labels: {app: istiod}}
spec:
  ports:
  - {name: tls-istiod, port: 15012, protocol: TCP}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: istiod-lab, namespace: istio-system, labels: {kubernetes.io/service-name: istiod}}
addressType: IPv4
endpoints: [{addresses: [ISTIOD_IP], conditions: {ready: true}}]
ports: [{name: tls-istiod, port: ISTIOD_PORT, protocol: TCP}]
";

/// API server, controllers and istiod on one machine, and a node for pods. In the order in which they end.
pub struct Installed {
    node: Node,
    pub cluster: Arc<Cluster>,
    pub istiod: Istiod,
    pub control: Arc<Machine>,
    directory: PathBuf,
}

impl Installed {
    /// An API server with Istio's kinds and istiod; nothing of onboarding yet.
    pub(crate) fn start(lab: &Lab, hosts: Vec<(Ipv4Addr, String)>, plane_flags: Vec<String>) -> anyhow::Result<Self> {
        let control = Arc::new(lab.machine("control", CONTROL)?);
        let cluster = Arc::new(Cluster::start(Options::on(control.clone()))?);
        cluster.apply_istio_crds()?;
        let istiod = cluster.start_istiod(MESH)?;
        cluster.apply(
            &ISTIOD
                .replace("ISTIOD_IP", &istiod.secure.ip().to_string())
                .replace("ISTIOD_PORT", &istiod.secure.port().to_string()),
        )?;
        let wait = ["wait", "--for=create", "--timeout=60s", "configmap/istio-ca-root-cert", "-n", "istio-system"];
        cluster.kubectl(wait)?;
        let options = NodeOptions { lab: lab.clone(), cluster: Arc::clone(&cluster), istiod, hosts, plane_flags };
        Ok(Self { node: Node::start(options)?, cluster, istiod, control, directory: lab.directory().to_owned() })
    }

    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The real helm, in the release's namespace.
    pub fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(self.cluster.binary("helm"));
        command.args(arguments).args(["--namespace", RELEASE]).env("KUBECONFIG", self.cluster.kubeconfig());
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, self.directory.join("helm"));
        }
        process::output(command, WITHIN)
    }

    /// The chart, and the operator available. One replica of each Deployment: `kubectl scale` makes more.
    pub fn install(&self) -> anyhow::Result<()> {
        self.helm(&["install", "onboarding", CHART, "--create-namespace", "--set", "replicas.min=1"])?;
        self.available("onboarding-operator", RELEASE)
    }

    /// Until a Deployment is Available; an error at once where its program doesn't stay up.
    pub fn available(&self, deployment: &str, namespace: &str) -> anyhow::Result<()> {
        let name = format!("deployment/{deployment}");
        until(&format!("{name} is Available"), WITHIN, || {
            let failing =
                self.node.pods().into_iter().find(|pod| pod.program == deployment && pod.restarts > MOST_RESTARTS);
            if let Some(pod) = failing {
                return Ok(Err(anyhow::anyhow!("{} ends again and again; its log: {}", pod.name, last_of(&pod.log))));
            }
            let wait = ["wait", "--for=condition=Available", "--timeout=2s", &name, "-n", namespace];
            self.kubectl(&wait).map(|_| Ok(()))
        })
        .with_context(|| {
            let there = self.kubectl(&["get", "pods,events", "-n", namespace]).unwrap_or_default();
            format!("in the namespace is:\n{there}the node {}, and has {:?}", self.node.doing(), self.node.pods())
        })?
    }

    pub fn kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        // What waits for a pod waits for the node.
        self.cluster.kubectl(arguments).with_context(|| format!("the node {}", self.node.doing()))
    }

    /// Reason and message of a condition of the ControlPlane.
    pub fn condition(&self, kind: &str) -> anyhow::Result<(String, String)> {
        let path = |field: &str| format!("{{.status.conditions[?(@.type==\"{kind}\")].{field}}}");
        let output = format!("jsonpath={}{{\"\\n\"}}{}", path("reason"), path("message"));
        let text = self.kubectl(&["get", "controlplane", "controlplane", "-n", "istio-system", "-o", &output])?;
        let (reason, message) = text.split_once('\n').context("no condition")?;
        ensure!(!reason.is_empty(), "the ControlPlane has no condition {kind} yet");
        Ok((reason.to_owned(), message.to_owned()))
    }

    /// Until a condition has this reason; its message.
    pub fn wait_condition(&self, kind: &str, wanted: &str) -> anyhow::Result<String> {
        until(&format!("the ControlPlane's {kind} is {wanted}"), WITHIN, || {
            let (reason, message) = self.condition(kind)?;
            ensure!(reason == wanted, "{reason}: {message}");
            Ok(message)
        })
    }

    /// The ControlPlane is `Ready`, and so are the Deployments of the requirement.
    pub fn wait_enabled(&self) -> anyhow::Result<()> {
        ["vmgateway", "onboarding-plane", "onboarding-repository"]
            .into_iter()
            .try_for_each(|deployment| self.available(deployment, "istio-system"))?;
        until("the ControlPlane is Ready", WITHIN, || {
            let (reason, message) = self.condition("Ready")?;
            let status = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
            let status = self.kubectl(&["get", "controlplane", "controlplane", "-n", "istio-system", "-o", status])?;
            ensure!(status == "True", "{status}, {reason}: {message}");
            Ok(())
        })
    }

    /// What istiod says of each proxy, as `istioctl proxy-status` shows it.
    pub fn sync_status(&self) -> anyhow::Result<serde_json::Value> {
        let url = format!("http://{}/debug/syncz", self.istiod.http);
        Ok(serde_json::from_str(&self.control.check("curl", ["-fsS", "-m", "5", &url])?)?)
    }
}

impl World {
    /// `kubectl create secret tls onboarding-endpoint-tls ...`, as the requirement has it, with a certificate of the company's CA.
    pub fn create_endpoint_secret(&self) -> anyhow::Result<()> {
        let (certificate, key) = self.issue_endpoint_certificate()?;
        let file = |name: &str, text: String| -> anyhow::Result<String> {
            let path = self.lab().directory().join(name);
            std::fs::write(&path, text)?;
            Ok(path.to_str().context("a path that isn't text")?.to_owned())
        };
        let certificate = format!("--cert={}", file("endpoint.crt", certificate)?);
        let key = format!("--key={}", file("endpoint.key", key)?);
        let create = ["create", "secret", "tls", "onboarding-endpoint-tls", "-n", "istio-system", &certificate, &key];
        self.installed()?.kubectl(&create).map(drop)
    }

    /// `kubectl apply` of a file of the demo's.
    pub fn apply_demo(&self, name: &str) -> anyhow::Result<()> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/manifests/").to_owned() + name;
        self.installed()?.kubectl(&["apply", "-f", &file]).map(drop)
    }

    /// ControlPlane, Secret, and the accounts that the groups of the demo name: what an operator of a cluster does once.
    pub fn enable(&self) -> anyhow::Result<()> {
        self.apply_demo("controlplane.yaml")?;
        self.create_endpoint_secret()?;
        self.installed()?.cluster.apply(include_str!("../istio/accounts.yaml"))?;
        self.installed()?.wait_enabled()
    }

    /// `onboardctl` where the endpoint's name resolves and its CA is known, with the administrator's kubeconfig.
    pub fn onboardctl_command(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        let installed = self.installed()?;
        let mut command = self.plane_machine.command(crate::world::binary("onboardctl")?);
        command.args(arguments).env("KUBECONFIG", installed.cluster.kubeconfig());
        Ok(command)
    }
}

fn last_of(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
