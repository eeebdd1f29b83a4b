//! The parts of Istio's and Kubernetes' kinds that the standalone mesh uses. Fields that it doesn't use are allowed and ignored.

use onboarding_core::label::Labels;
use std::collections::BTreeMap;

/// `networking.istio.io` Sidecar.
#[derive(Debug, Clone, PartialEq)]
pub struct Sidecar {
    pub namespace: String,
    pub name: String,
    /// `spec.workloadSelector.labels`; empty: every workload of the namespace.
    pub workload_selector: Labels,
    pub ingress: Vec<IngressListener>,
    pub egress: Vec<EgressListener>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct IngressListener {
    pub port: Port,
    /// `bind`; absent: the workload's address.
    pub bind: Option<String>,
    /// `127.0.0.1:8080`, `0.0.0.0:8080`, `[::1]:8080` or `unix:///path`.
    pub default_endpoint: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct EgressListener {
    pub port: Option<Port>,
    pub bind: Option<String>,
    /// `namespace/dnsName` as Istio defines it: `./*`, `*/*`, `~/*`, `bookinfo/ratings.bookinfo.svc.cluster.local`.
    pub hosts: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Port {
    pub number: u16,
    pub name: Option<String>,
    pub protocol: Option<Protocol>,
    pub target_port: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Http,
    Http2,
    Grpc,
    Tcp,
    Tls,
    Https,
}

/// `v1` Service.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    pub namespace: String,
    pub name: String,
    pub selector: Labels,
    pub cluster_ip: Option<String>,
    pub ports: Vec<ServicePort>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ServicePort {
    pub number: u16,
    pub name: Option<String>,
    /// From `appProtocol`, or the name's prefix as Istio reads it; TCP where neither says.
    pub protocol: Protocol,
    /// A number; a name refers to the workload's `ports`.
    pub target_port: Option<TargetPort>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum TargetPort {
    Number(u16),
    Name(String),
}

/// `networking.istio.io` ServiceEntry.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceEntry {
    pub namespace: String,
    pub name: String,
    pub hosts: Vec<String>,
    pub addresses: Vec<String>,
    pub ports: Vec<Port>,
    pub mesh_external: bool,
    pub resolution: Resolution,
    pub endpoints: Vec<Endpoint>,
    /// `workloadSelector.labels`.
    pub workload_selector: Labels,
    pub export_to: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    None,
    Static,
    Dns,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    pub address: String,
    pub ports: BTreeMap<String, u16>,
    pub locality: Option<String>,
    pub weight: Option<u32>,
}

/// `v1` Secret of type `kubernetes.io/tls`. PEM, decoded.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    pub namespace: String,
    pub name: String,
    pub certificate: String,
    pub private_key: String,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret {}/{}", self.namespace, self.name)
    }
}
