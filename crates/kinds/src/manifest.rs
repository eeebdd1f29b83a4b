//! A stream of YAML documents to typed manifests.

use crate::control_plane::ControlPlane;
use crate::fault::Fault;
use crate::mesh::{Secret, Service, ServiceEntry, Sidecar};
use onboarding_core::group::WorkloadGroup;
use onboarding_core::policy::Policy;

/// What a file holds: the documents that are valid, the faults of those that aren't, and what is allowed but unwise.
#[derive(Debug, Default)]
pub struct Manifests {
    pub items: Vec<Manifest>,
    pub faults: Vec<Fault>,
    pub warnings: Vec<Fault>,
    /// Faults are in, or may be in, an OnboardingPolicy (a policy document with faults, or a syntax error that hides what it is).
    pub policy_unreadable: bool,
}

#[derive(Debug, Clone)]
pub struct Manifest {
    pub file: String,
    pub line: usize,
    pub object: Object,
}

/// Kinds of others are skipped and not listed.
#[derive(Debug, Clone)]
pub enum Object {
    OnboardingPolicy(Policy),
    ControlPlane(ControlPlane),
    WorkloadGroup(WorkloadGroup),
    Sidecar(Sidecar),
    ServiceEntry(ServiceEntry),
    Service(Service),
    /// `kubernetes.io/tls` only.
    Secret(Secret),
    /// Also one of the agent's files is recognised, so that `lint` checks it.
    OnboardingConfiguration(Box<crate::agent::OnboardingConfiguration>),
    AgentConfiguration(Box<crate::agent::AgentConfiguration>),
    WorkloadAutoRegistration(Box<crate::war::WorkloadAutoRegistration>),
}

/// Reads every document of `text` (YAML, of which JSON is a part). `file` only names it in faults.
pub fn read(file: &str, text: &str) -> Manifests {
    let _ = (file, text);
    unimplemented!()
}

/// What is wrong between objects: two of one name, a ControlPlane whose Secret is missing is NOT a fault here (it may come later).
pub fn cross_check(items: &[Manifest]) -> Vec<Fault> {
    let _ = items;
    unimplemented!()
}
