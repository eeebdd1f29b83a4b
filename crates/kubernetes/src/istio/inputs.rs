//! What sidecars are provisioned from, as it is in the cluster at one moment.

use super::hosts::{Aliases, Names};
use super::mesh::Mesh;
use onboarding_core::group::WorkloadGroup;
use onboarding_core::name::GroupName;
use onboarding_kinds::control_plane::CustomGateway;
use onboarding_kinds::mesh::Sidecar;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// The namespace of istiod and of the ConfigMaps that it is configured by.
pub const ISTIO_SYSTEM: &str = "istio-system";
/// The revision of ConfigMap `istio` (those of others are `istio-<revision>`).
pub const DEFAULT_REVISION: &str = "default";
/// On a WorkloadGroup or a namespace: which revision, or which tag of one.
pub const REVISION_LABEL: &str = "istio.io/rev";

/// Replaced whole, never changed. A part that is the same as before is best the same `Arc`: then nothing is rendered anew for it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Inputs {
    pub meshes: Arc<Meshes>,
    pub namespaces: BTreeMap<String, Arc<Namespace>>,
    /// Those that can be read.
    pub groups: HashMap<GroupName, Arc<WorkloadGroup>>,
    /// `spec.meshExpansion.customGateway` of the ControlPlane.
    pub custom_gateway: Option<CustomGateway>,
    /// `deregistration.propagationDelay` of the ControlPlane.
    pub propagation_delay: Duration,
    /// For `onboarding-agent hosts` alone.
    pub names: Arc<Names>,
}

/// The control planes of the cluster.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Meshes {
    /// By revision; that of ConfigMap `istio` is [`DEFAULT_REVISION`]. `Err`: it can't be read, and why.
    pub by_revision: BTreeMap<String, Result<Mesh, String>>,
    /// Tag to revision (label `istio.io/tag` of Istio's MutatingWebhookConfigurations).
    pub tags: BTreeMap<String, String>,
}

/// What one namespace contributes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Namespace {
    /// Its label [`REVISION_LABEL`].
    pub revision: Option<String>,
    /// Key `root-cert.pem` of its ConfigMap `istio-ca-root-cert`, PEM.
    pub root_certificates: Option<String>,
    /// Where several select a workload, the first counts: Istio's order is that of their creation.
    pub sidecars: Vec<Sidecar>,
}

/// What of [`Inputs`] one workload depends on.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub meshes: Arc<Meshes>,
    /// `None`: it doesn't exist, or can't be read.
    pub group: Option<Arc<WorkloadGroup>>,
    pub namespace: Arc<Namespace>,
    pub istio_system: Arc<Namespace>,
    pub custom_gateway: Option<CustomGateway>,
    pub propagation_delay: Duration,
    /// Of the Sidecars of `namespace`, then of those of `istio_system`, in their order.
    aliases: Vec<Arc<Aliases>>,
}

impl Part {
    pub fn of(inputs: &Inputs, group: &GroupName) -> Self {
        let namespace = |name: &str| inputs.namespaces.get(name).cloned().unwrap_or_default();
        let (own, root) = (namespace(&group.namespace), namespace(ISTIO_SYSTEM));
        let sidecars = own.sidecars.iter().chain(&root.sidecars);
        let aliases = sidecars.map(|sidecar| inputs.names.aliases(&group.namespace, sidecar)).collect();
        Self {
            meshes: inputs.meshes.clone(),
            group: inputs.groups.get(group).cloned(),
            namespace: own,
            istio_system: root,
            custom_gateway: inputs.custom_gateway.clone(),
            propagation_delay: inputs.propagation_delay,
            aliases,
        }
    }

    /// Of one of its Sidecars.
    pub fn aliases(&self, sidecar: &Sidecar) -> Option<&Aliases> {
        let mut sidecars = self.namespace.sidecars.iter().chain(&self.istio_system.sidecars);
        let position = sidecars.position(|one| std::ptr::eq(one, sidecar))?;
        self.aliases.get(position).map(Arc::as_ref)
    }
}

impl PartialEq for Part {
    fn eq(&self, other: &Self) -> bool {
        same(&self.meshes, &other.meshes)
            && match (&self.group, &other.group) {
                (Some(one), Some(two)) => same(one, two),
                (None, None) => true,
                _ => false,
            }
            && same(&self.namespace, &other.namespace)
            && same(&self.istio_system, &other.istio_system)
            && self.custom_gateway == other.custom_gateway
            && self.propagation_delay == other.propagation_delay
            && self.aliases.len() == other.aliases.len()
            && self.aliases.iter().zip(&other.aliases).all(|(one, two)| same(one, two))
    }
}

/// `Arc` compares by address first only where `T` is `Eq`.
fn same<T: PartialEq>(one: &Arc<T>, two: &Arc<T>) -> bool {
    Arc::ptr_eq(one, two) || one == two
}
