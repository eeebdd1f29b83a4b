//! `runtime.onboarding.tetrate.io/v1alpha1` WorkloadAutoRegistration: what a registration looks like to people.

use onboarding_core::name::RegistrationName;
use onboarding_core::registration::Live;
use serde_json::Value;

/// One of a manifests directory or of a cluster, read (spec only): not trusted, shown and linted.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkloadAutoRegistration {
    pub namespace: String,
    pub name: String,
    pub spec: Value,
}

/// The resource: `spec.identity`, `spec.registration`, and `status` with the conditions `AgentConnected` and `Healthy`,
/// and `activeAgentConnection` while connected. `ownerReferences` names the WorkloadGroup (uid only where one is given).
pub fn resource(name: &RegistrationName, live: &Live, group_uid: Option<&str>) -> Value {
    let _ = (name, live, group_uid);
    unimplemented!()
}

/// `spec.registration` of a war, and back: how a registry stores what an agent said of itself.
pub mod report {
    use onboarding_core::registration::HostReport;
    use serde_json::Value;

    pub fn to_json(report: &HostReport) -> Value {
        let _ = report;
        unimplemented!()
    }
    pub fn from_json(value: &Value) -> Result<HostReport, String> {
        let _ = value;
        unimplemented!()
    }
}
