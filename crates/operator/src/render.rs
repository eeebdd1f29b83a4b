//! ControlPlane to the objects that run it. Pure: the same input gives the same list, in the same order.
//!
//! Applied in this order, what others refer to comes first.

mod access;
mod gateway;
mod plane;
mod pod;
mod repository;

use crate::config;
use crate::objects::{CONTROL_PLANE, FIELD_MANAGER, MANAGED_BY, OF_NAMESPACE};
use onboarding_kinds::control_plane::{ControlPlane, Onboarding};
use serde_json::{Map, Value, json};

/// The endpoint's port, on the plane and on the gateway.
const ENDPOINT_PORT: u16 = 15443;
/// `/healthz`, `/readyz`, `/metrics` of the plane and the repository; `/healthz/ready` of the gateway.
const ADMIN_PORT: u16 = 15021;
/// HTTPS as clients see it, and where an unprivileged process listens for it.
const HTTPS_PORT: u16 = 443;
const HTTPS_TARGET_PORT: u16 = 8443;

/// Every address of a pod, IPv6 or IPv4.
const ANY: &str = "[::]";
/// Of Services: both families where the cluster has both, else the one that it has.
const IP_FAMILIES: &str = "PreferDualStack";

const PLANE: &str = "onboarding-plane";
const GATEWAY: &str = "vmgateway";
const REPOSITORY: &str = "onboarding-repository";

/// The revision of the Service `istiod`.
pub const DEFAULT_REVISION: &str = "default";

/// What the operator itself was told.
#[derive(Debug, Clone)]
pub struct Settings {
    pub plane_image: String,
    /// Beside those that are rendered.
    pub plane_arguments: Vec<String>,
    pub repository_image: String,
    /// `auto`: Istio's injection puts its own in.
    pub gateway_image: String,
    /// `Always`, `IfNotPresent`, `Never`; absent: what Kubernetes makes of the tag.
    pub pull_policy: Option<String>,
    pub packages: Packages,
    /// Names of Secrets with which images are pulled.
    pub pull_secrets: Vec<String>,
    /// Of each Deployment: at least, and at most.
    pub replicas: (u32, u32),
    /// `cluster.local`
    pub cluster_domain: String,
    /// Which Istio the gateway belongs to; absent: the default one, else the first that there is.
    pub gateway_revision: Option<String>,
    pub version: String,
}

/// Where the repository's packages are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packages {
    /// In the image of the repository, where it looks by itself.
    InRepositoryImage,
    /// In a volume that somebody fills (a PersistentVolumeClaim's name).
    Claim(String),
    /// In an image of their own, mounted as a volume.
    Image(String),
}

/// An istiod that there is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Istiod {
    /// [`DEFAULT_REVISION`] for the one without.
    pub revision: String,
    /// `istiod` or `istiod-<revision>`
    pub service: String,
}

/// What was found in the cluster.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    /// Sorted.
    pub istiods: Vec<Istiod>,
    /// The label `topology.istio.io/network` of the namespace: pods are in a network of their own, and VMs reach them through the gateway.
    pub network: Option<String>,
    /// What `onboarding-plane-config` is to hold; `None`: it is somebody else's and stays as it is.
    pub config_yaml: Option<String>,
}

/// A ControlPlane that enables onboarding.
#[derive(Debug, Clone, Copy)]
pub struct Enabled<'a> {
    pub plane: &'a ControlPlane,
    pub onboarding: &'a Onboarding,
    /// `metadata.uid` of the ControlPlane.
    pub uid: &'a str,
}

/// All objects, each with `apiVersion`, `kind` and whole metadata.
pub fn render(enabled: Enabled<'_>, settings: &Settings, facts: &Facts) -> Vec<Value> {
    let all = Objects { enabled, settings, facts };
    let mut objects = access::render(&all);
    objects.extend(plane::render(&all));
    objects.extend(gateway::render(&all));
    if enabled.onboarding.local_repository {
        objects.extend(repository::render(&all));
    }
    objects
}

/// What each part renders from.
struct Objects<'a> {
    enabled: Enabled<'a>,
    settings: &'a Settings,
    facts: &'a Facts,
}

impl Objects<'_> {
    fn namespace(&self) -> &str {
        &self.enabled.plane.namespace
    }
    /// `onboarding-plane.istio-system.svc.cluster.local`
    fn host_of(&self, service: &str) -> String {
        format!("{service}.{}.svc.{}", self.namespace(), self.settings.cluster_domain)
    }

    /// What pods are selected by, for ever: selectors can't be changed.
    fn selector(&self, name: &str) -> Value {
        let mut labels = json!({"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": "workload-onboarding"});
        if name == GATEWAY {
            labels["istio"] = GATEWAY.into();
        }
        labels
    }

    fn labels(&self, name: &str) -> Map<String, Value> {
        let component = match name {
            GATEWAY => "gateway",
            REPOSITORY => "repository",
            _ => "endpoint",
        };
        let labels = [
            ("app.kubernetes.io/name", name),
            ("app.kubernetes.io/component", component),
            ("app.kubernetes.io/part-of", "workload-onboarding"),
            ("app.kubernetes.io/version", self.settings.version.as_str()),
            (MANAGED_BY, FIELD_MANAGER),
            (OF_NAMESPACE, self.namespace()),
        ];
        labels.into_iter().map(|(key, value)| (key.to_owned(), value.into())).collect()
    }

    /// An object of the namespace, owned by the ControlPlane. `part`: whose it is (`onboarding-plane`). `rest`: all but its heading.
    fn object(&self, part: &str, api_version: &str, kind: &str, name: &str, rest: Value) -> Value {
        let owner = json!({
            "apiVersion": CONTROL_PLANE.api_version(),
            "kind": CONTROL_PLANE.kind,
            "name": self.enabled.plane.name,
            "uid": self.enabled.uid,
            "controller": true,
            // The ControlPlane goes when it is deleted, whatever is slow to follow.
            "blockOwnerDeletion": false,
        });
        let metadata = json!({
            "name": name, "namespace": self.namespace(), "labels": self.labels(part), "ownerReferences": [owner],
        });
        with_heading(api_version, kind, metadata, rest)
    }

    /// An object of the whole cluster: it can't have an owner that lives in a namespace.
    fn cluster_object(&self, part: &str, api_version: &str, kind: &str, name: &str, rest: Value) -> Value {
        with_heading(api_version, kind, json!({"name": name, "labels": self.labels(part)}), rest)
    }

    fn service_account(&self, name: &str) -> Value {
        // Pods that need a token ask for it.
        self.object(name, "v1", "ServiceAccount", name, json!({"automountServiceAccountToken": false}))
    }

    fn disruption_budget(&self, name: &str) -> Value {
        let spec = json!({"maxUnavailable": 1, "selector": {"matchLabels": self.selector(name)}});
        self.object(name, "policy/v1", "PodDisruptionBudget", name, json!({"spec": spec}))
    }

    fn autoscaler(&self, name: &str) -> Value {
        let (least, most) = self.settings.replicas;
        let spec = json!({
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": least,
            "maxReplicas": most.max(least),
            "metrics": [{
                "type": "Resource",
                "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}},
            }],
            // Each replica that goes sends its agents to the others.
            "behavior": {"scaleDown": {
                "stabilizationWindowSeconds": 600,
                "policies": [{"type": "Pods", "value": 1, "periodSeconds": 120}],
            }},
        });
        self.object(name, "autoscaling/v2", "HorizontalPodAutoscaler", name, json!({"spec": spec}))
    }

    /// `ingress`, `egress`: rules as in a NetworkPolicy; no `egress`: it isn't limited.
    fn network_policy(&self, name: &str, ingress: Value, egress: Option<Value>) -> Value {
        let mut spec = json!({
            "podSelector": {"matchLabels": self.selector(name)}, "policyTypes": ["Ingress"], "ingress": ingress,
        });
        if let Some(egress) = egress {
            spec["policyTypes"] = json!(["Ingress", "Egress"]);
            spec["egress"] = egress;
        }
        self.object(name, "networking.k8s.io/v1", "NetworkPolicy", name, json!({"spec": spec}))
    }

    /// To this port from the gateway; from anywhere where there is another one beside it, which may be anywhere.
    fn ingress_of_gateway(&self, port: u16) -> Value {
        let mut rule = json!({"ports": [{"port": port, "protocol": "TCP"}]});
        if self.enabled.plane.custom_gateway.is_none() {
            rule["from"] = json!([{"podSelector": {"matchLabels": self.selector(GATEWAY)}}]);
        }
        rule
    }

    /// The plane's ConfigMap.
    fn plane_config(&self) -> Option<Value> {
        let yaml = self.facts.config_yaml.as_deref()?;
        Some(self.object(PLANE, "v1", "ConfigMap", config::NAME, json!({"data": {config::KEY: yaml}})))
    }

    /// `None`: that of the default one, which needs no label.
    fn gateway_revision(&self) -> Option<&str> {
        let istiods = &self.facts.istiods;
        let found = || match istiods.iter().any(|istiod| istiod.revision == DEFAULT_REVISION) {
            true => None,
            false => istiods.first().map(|istiod| istiod.revision.as_str()),
        };
        let chosen = self.settings.gateway_revision.as_deref();
        chosen.or_else(found).filter(|revision| *revision != DEFAULT_REVISION)
    }
}

/// Metrics and readiness, for whoever scrapes them in the cluster.
fn ingress_of_cluster(ports: &[u16]) -> Value {
    let ports: Vec<Value> = ports.iter().map(|port| json!({"port": port, "protocol": "TCP"})).collect();
    json!({"from": [{"namespaceSelector": {}}], "ports": ports})
}

fn with_heading(api_version: &str, kind: &str, metadata: Value, rest: Value) -> Value {
    let mut object = json!({"apiVersion": api_version, "kind": kind, "metadata": metadata});
    if let (Value::Object(object), Value::Object(rest)) = (&mut object, rest) {
        object.extend(rest);
    }
    object
}

#[cfg(test)]
mod tests;
