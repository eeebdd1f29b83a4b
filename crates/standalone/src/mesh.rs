//! What the manifests say about the mesh: the last good version of each file.

use onboarding_core::group::WorkloadGroup;
use onboarding_core::name::GroupName;
use onboarding_kinds::mesh::{Service, ServiceEntry, Sidecar};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// Each list in the order of namespace, then name; a name occurs once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MeshConfig {
    pub groups: BTreeMap<GroupName, Arc<WorkloadGroup>>,
    pub sidecars: Vec<Sidecar>,
    pub services: Vec<Service>,
    pub service_entries: Vec<ServiceEntry>,
    /// `deregistration.propagationDelay` of the ControlPlane.
    pub propagation_delay: Duration,
}
