//! What the endpoint needs of the world it runs in. `standalone` has it as files and SQLite, `kubernetes` as an API server and istiod.

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use onboarding_attest::jwt::Issuer;
use onboarding_core::group::WorkloadGroup;
use onboarding_core::name::{GroupName, RegistrationName};
use onboarding_core::policy::PolicySet;
use onboarding_core::registration::State;
use onboarding_wire::onboarding::{BootConfiguration, Certificate, SidecarReport};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// What was configured at one moment: replaced whole, never changed.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Counts the changes.
    pub generation: u64,
    /// `spec.meshExpansion.onboarding` of the ControlPlane; `None`: onboarding isn't enabled, and why.
    pub plane: Option<Arc<PlaneSettings>>,
    /// The certificate of the Secret that the ControlPlane names.
    pub tls: Option<Arc<TlsMaterial>>,
    pub policies: Arc<PolicySet>,
    pub groups: HashMap<GroupName, Arc<WorkloadGroup>>,
    /// A policy can't be read, so its absence may be an accident: what lived by it is suspended, not withdrawn.
    pub policy_unreadable: bool,
    /// What couldn't be read or is missing, for people: readiness, status, log.
    pub faults: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PlaneSettings {
    /// The plane's UID: the audience of every credential.
    pub uid: String,
    pub hosts: Vec<String>,
    pub token_life: Duration,
    pub propagation_delay: Duration,
    pub issuers: Vec<Issuer>,
    pub local_repository: bool,
}

/// A certificate chain and its key, PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct TlsMaterial {
    pub certificate_chain: String,
    pub private_key: String,
}

impl std::fmt::Debug for TlsMaterial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsMaterial")
    }
}

/// The newest snapshot, and when it is replaced.
pub trait ConfigSource: Send + Sync + 'static {
    fn watch(&self) -> watch::Receiver<Arc<Snapshot>>;
}

/// A state as it was read, to be replaced only if it is still the one.
#[derive(Debug, Clone)]
pub struct Stored {
    pub state: State,
    /// Opaque; 0 for what was never stored.
    pub version: u64,
}

/// Durable registrations, and what the mesh is told about them: an entry of a `Live` state is published, any other retracted.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    async fn load(&self, name: &RegistrationName) -> Result<Stored, RegistryError>;

    /// Replaces the state that has `expected` as its version. When this returns, the state is durable, and the mesh is
    /// about to learn of it. Returns the new version.
    async fn store(&self, name: &RegistrationName, expected: u64, state: &State) -> Result<u64, RegistryError>;

    /// Everything that isn't `Absent`.
    async fn list(&self) -> Result<Vec<(RegistrationName, Stored)>, RegistryError>;
}

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Somebody else stored meanwhile: load and decide again.
    #[error("the registration changed meanwhile")]
    Conflict,
    /// The registry can't be written or read now (disk full, API server away); nothing was stored.
    #[error("the registry is unavailable: {0}")]
    Unavailable(String),
}

/// Which workload a sidecar is provisioned for.
#[derive(Debug, Clone)]
pub struct Workload {
    pub name: RegistrationName,
    pub group: GroupName,
}

/// Boot configuration and certificates of sidecars.
#[async_trait]
pub trait Provisioner: Send + Sync + 'static {
    /// The configuration of this workload now, then each later one, for as long as it is registered.
    /// `held`: the version that the agent has; where it is known, the first item may be a difference to it, or be left out if nothing changed.
    fn boot(&self, workload: &Workload, held: &str) -> BoxStream<'static, Result<BootConfiguration, ProvisionError>>;

    /// A certificate of the mesh for the key of this request (PKCS #10, DER), in the identity of the workload's group.
    async fn certificate(&self, workload: &Workload, csr: &[u8]) -> Result<Certificate, ProvisionError>;

    /// What a sidecar made of a configuration.
    fn reported(&self, workload: &Workload, report: &SidecarReport);
}

#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Unavailable(String),
}

/// Where the keys that sign tokens are kept, so that every replica signs and verifies with the same.
#[async_trait]
pub trait KeyStore: Send + Sync + 'static {
    /// The bytes last stored and their version; empty and 0 before the first time.
    async fn load(&self) -> Result<(Vec<u8>, u64), RegistryError>;
    /// Durable and readable by nobody else when it returns.
    async fn store(&self, expected: u64, keys: &[u8]) -> Result<u64, RegistryError>;
}

/// The world as one endpoint sees it.
#[derive(Clone)]
pub struct Backend {
    pub config: std::sync::Arc<dyn ConfigSource>,
    pub registry: std::sync::Arc<dyn Registry>,
    pub provisioner: std::sync::Arc<dyn Provisioner>,
    pub keys: std::sync::Arc<dyn KeyStore>,
}
