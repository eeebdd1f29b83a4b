//! What the endpoint needs of the world it runs in. `standalone` has it as files and SQLite, `kubernetes` as an API server and istiod.

mod publish;

pub use publish::FaultLog;

use crate::lifecycle::vouched_for;
use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use onboarding_attest::jwt::{Issuer, KeySource};
use onboarding_core::group::WorkloadGroup;
use onboarding_core::name::{GroupName, RegistrationName};
use onboarding_core::policy::{Decision, PolicySet};
use onboarding_core::registration::{Live, State};
use onboarding_kinds::control_plane::{ControlPlane, JwtIssuer, Onboarding};
use onboarding_wire::onboarding::{BootConfiguration, Certificate, SidecarReport};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// What was configured at one moment: replaced whole, never changed.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Counts the changes; given by [`Snapshot::publish`].
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

/// Who admits a registration, as things are configured in one snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admits {
    /// `rule`: index into `spec.allow`.
    Policy {
        name: String,
        rule: usize,
    },
    /// None of those that can be read, and one can't be.
    Unknown,
    Nobody,
}

impl Snapshot {
    /// Who admits this registration's identity to its group.
    pub fn admits(&self, live: &Live) -> Admits {
        let group = self.groups.get(&live.group).filter(|_| vouched_for(self, &live.attested.identity));
        match group.map(|group| self.policies.decide(&live.attested.identity, group)) {
            Some(Decision::Allowed { policy, rule }) => Admits::Policy { name: policy, rule },
            Some(Decision::Refused) | None if self.policy_unreadable => Admits::Unknown,
            Some(Decision::Refused) | None => Admits::Nobody,
        }
    }
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

impl PlaneSettings {
    /// `uid`: the plane's, where the ControlPlane names none.
    pub fn new(onboarding: &Onboarding, uid: &str) -> Self {
        Self {
            uid: onboarding.uid.clone().unwrap_or_else(|| uid.to_owned()),
            hosts: onboarding.hosts.clone(),
            token_life: onboarding.token_expiration,
            propagation_delay: onboarding.propagation_delay,
            issuers: onboarding.issuers.iter().map(issuer).collect(),
            local_repository: onboarding.local_repository,
        }
    }
}

fn issuer(issuer: &JwtIssuer) -> Issuer {
    Issuer {
        issuer: issuer.issuer.clone(),
        short_name: issuer.short_name.clone(),
        keys: match (&issuer.jwks, &issuer.jwks_uri) {
            (Some(jwks), _) => KeySource::Inline(jwks.clone()),
            (None, Some(uri)) => KeySource::Uri(uri.clone()),
            (None, None) => KeySource::Discovery,
        },
        attributes: issuer.attributes_json_path.clone(),
    }
}

/// The one ControlPlane that enables onboarding. `place`: where they come from, for people (`the manifests`).
///
/// # Errors
/// None does, or several do; in words.
pub fn enabling<'a>(
    planes: impl IntoIterator<Item = &'a ControlPlane>,
    place: &str,
) -> Result<(&'a ControlPlane, &'a Onboarding), String> {
    let enabling: Vec<_> = planes.into_iter().filter_map(|plane| Some((plane, plane.onboarding.as_ref()?))).collect();
    match enabling.as_slice() {
        [one] => Ok(*one),
        [] => Err(format!("onboarding isn't enabled: no ControlPlane in {place} has spec.meshExpansion.onboarding")),
        several => Err(format!(
            "onboarding is enabled by {} ControlPlanes ({}); one must remain",
            several.len(),
            several
                .iter()
                .map(|(plane, _)| format!("{}/{}", plane.namespace, plane.name))
                .collect::<Vec<_>>()
                .join(", ")
        )),
    }
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

    /// The names whose state may have become another without `store` of this process: another replica stored it, or somebody
    /// deleted or edited the object. A name may come more often than that. For one listener; never ends where nobody else can write.
    fn changes(&self) -> BoxStream<'static, RegistrationName> {
        futures_util::stream::pending().boxed()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Somebody else stored meanwhile: load and decide again.
    #[error("the registration changed meanwhile")]
    Conflict,
    /// The registry can't be written or read now (disk full, API server away); nothing was stored.
    #[error("the registry is unavailable: {0}")]
    Unavailable(String),
    /// What is stored under this name isn't a registration that this plane made, and is left alone.
    #[error("{0}")]
    Foreign(String),
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

    /// The mesh's root certificate; `rotate`: begins to replace it first. May write, and so block for a moment.
    fn root(&self, rotate: bool) -> Result<RootStatus, ProvisionError> {
        let _ = rotate;
        Err(ProvisionError::Refused("the mesh's root certificate isn't the plane's, but istiod's".to_owned()))
    }
}

/// Where the mesh is with its root certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootStatus {
    /// `steady`, `introducing` or `retiring`.
    pub stage: &'static str,
    /// Which roots there are, and which of them signs.
    pub roots: String,
    /// When the one that signs ends.
    pub ends_at: Timestamp,
    /// When the next step of a replacement is taken.
    pub next_step_at: Option<Timestamp>,
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

/// The replicas of this endpoint.
pub trait Fleet: Send + Sync + 'static {
    /// Whether this replica does what one must do for all: end leases, forget what need not be remembered,
    /// record that the sessions of a replica that is gone have ended. Also notifies, with the same value, when a replica came or went.
    fn leads(&self) -> watch::Receiver<bool>;

    /// Whether the replica that is on record as holding a session is there. Of this replica: true.
    fn is_there(&self, replica: &str) -> bool;
}

/// A fleet of one.
#[derive(Debug, Clone)]
pub struct Alone {
    pub replica: String,
}

impl Fleet for Alone {
    fn leads(&self) -> watch::Receiver<bool> {
        watch::Sender::new(true).subscribe()
    }
    fn is_there(&self, replica: &str) -> bool {
        replica == self.replica
    }
}

/// A workload that was not let in, or can't be given what its sidecar starts from, for those who look after its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// As the agent named it; it may not exist.
    pub group: GroupName,
    /// What was proven of the host, in one line for people; absent where nothing was.
    pub identity: Option<String>,
    /// Stable, in CamelCase: `NotAuthorized`, `EvidenceRefused`, `AttestationUnavailable`, `RegistrationRefused`,
    /// `RegistrationBelongsToAnother`, `NoBootConfiguration`.
    pub reason: &'static str,
    /// Which rule failed on what, and the way out.
    pub message: String,
}

/// Where operators are told. Must not wait: it is called between an agent's call and its answer.
pub trait Notices: Send + Sync + 'static {
    fn refused(&self, refused: Refused);
}

/// The log and the audit log say it all.
#[derive(Debug, Clone, Copy)]
pub struct LogOnly;

impl Notices for LogOnly {
    fn refused(&self, _: Refused) {}
}

/// The world as one endpoint sees it.
#[derive(Clone)]
pub struct Backend {
    pub config: Arc<dyn ConfigSource>,
    pub registry: Arc<dyn Registry>,
    pub provisioner: Arc<dyn Provisioner>,
    pub keys: Arc<dyn KeyStore>,
    pub fleet: Arc<dyn Fleet>,
    pub notices: Arc<dyn Notices>,
}
