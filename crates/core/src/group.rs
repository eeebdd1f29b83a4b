//! The WorkloadGroup as onboarding sees it, and the entry of the mesh that a registration becomes.

use crate::identity::{AwsCompute, Identity};
use crate::label::Labels;
use crate::name::{GroupName, RegistrationName};
use crate::registration::HostReport;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadGroup {
    pub name: GroupName,
    /// `metadata.labels`: what an OnboardingPolicy's selector looks at.
    pub labels: Labels,
    /// `spec.metadata.labels` and `spec.template.labels`, the latter winning.
    pub workload_labels: Labels,
    /// `spec.metadata.annotations`.
    pub workload_annotations: BTreeMap<String, String>,
    /// `spec.template.serviceAccount`, or `default`.
    pub service_account: String,
    pub network: Option<String>,
    /// `region/zone/subzone`.
    pub locality: Option<String>,
    pub weight: Option<u32>,
    /// Port name to port number.
    pub ports: BTreeMap<String, u16>,
    /// `spec.template.address`.
    pub address: Option<String>,
    pub probe: Option<Probe>,
}

/// `spec.probe`: how the agent finds out whether the application is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    pub initial_delay: Duration,
    pub timeout: Duration,
    pub period: Duration,
    pub success_threshold: u32,
    pub failure_threshold: u32,
    pub action: ProbeAction,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeAction {
    HttpGet { path: String, port: u16, host: Option<String>, https: bool, headers: Vec<(String, String)> },
    TcpSocket { host: Option<String>, port: u16 },
    Exec { command: Vec<String> },
}

/// Istio's WorkloadEntry: what the mesh is told about one registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadEntry {
    pub name: RegistrationName,
    pub address: String,
    pub labels: Labels,
    pub service_account: String,
    pub network: Option<String>,
    pub locality: Option<String>,
    pub weight: Option<u32>,
    pub ports: BTreeMap<String, u16>,
}

/// Why a registration can't become an entry of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    #[error(
        "no {wanted} address among those that the host reports ({reported}); set settings.connectedOver, or give the agent a hostinfo plugin that reports one"
    )]
    NoAddress { wanted: &'static str, reported: String },
}

impl WorkloadEntry {
    /// The template's fields, the merged labels (the group wins over the agent), the address that `connectedOver` chose,
    /// the locality that the identity proves where the template sets none.
    pub fn new(
        name: RegistrationName,
        group: &WorkloadGroup,
        identity: &Identity,
        report: &HostReport,
    ) -> Result<Self, EntryError> {
        let mut labels = report.labels.clone();
        labels.extend(group.workload_labels.clone());
        Ok(Self {
            name,
            address: match &group.address {
                Some(address) => address.clone(),
                None => report.mesh_address()?.to_string(),
            },
            labels,
            service_account: group.service_account.clone(),
            network: group.network.clone(),
            locality: group.locality.clone().or_else(|| proven_locality(identity)),
            weight: group.weight,
            ports: group.ports.clone(),
        })
    }
}

/// `<region>/<zone>` where both are proven.
pub fn proven_locality(identity: &Identity) -> Option<String> {
    let (region, zone) = match identity {
        Identity::Aws(aws) => match aws.compute {
            AwsCompute::Ec2 { .. } | AwsCompute::Ecs { .. } => (aws.region.proven()?, aws.zone.proven()?),
        },
        Identity::Gcp(gcp) => (gcp.region.proven()?, gcp.zone.proven()?),
        Identity::Azure(_) | Identity::Jwt(_) => return None,
    };
    Some(format!("{region}/{zone}"))
}

impl HostReport {
    /// The address by which the mesh reaches this host.
    pub fn mesh_address(&self) -> Result<IpAddr, EntryError> {
        let wanted = self.connected_over;
        self.addresses.iter().find(|address| address.kind == wanted).map(|address| address.ip).ok_or_else(|| {
            EntryError::NoAddress {
                wanted: wanted.word(),
                reported: if self.addresses.is_empty() {
                    "none".to_owned()
                } else {
                    self.addresses.iter().map(|address| address.ip.to_string()).collect::<Vec<_>>().join(", ")
                },
            }
        })
    }
}

#[cfg(test)]
#[path = "group_tests.rs"]
mod tests;
