//! The kinds of objects that the operator makes, and how its own are told from others.

use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use kube::core::DynamicResourceScope;
use kube::{Api, Client, Resource};
use serde_json::Value;

/// Who writes, in `metadata.managedFields`.
pub const FIELD_MANAGER: &str = "onboarding-operator";
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Namespace of the ControlPlane that an object is made for: objects of the whole cluster have it as a label, as they can't have an owner in a namespace.
pub const OF_NAMESPACE: &str = "onboarding.tetrate.io/control-plane-namespace";
/// What the plane writes on what it makes for itself; some of that the operator takes over.
pub const OF_PLANE: &str = "onboarding-plane";

/// A kind, where it is served, and whether its objects live in a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub plural: &'static str,
    pub namespaced: bool,
}

const fn kind(group: &'static str, version: &'static str, kind: &'static str, plural: &'static str) -> Kind {
    Kind { group, version, kind, plural, namespaced: true }
}

pub const CONTROL_PLANE: Kind = kind("install.tetrate.io", "v1alpha1", "ControlPlane", "controlplanes");
pub const SERVICE: Kind = kind("", "v1", "Service", "services");
pub const SECRET: Kind = kind("", "v1", "Secret", "secrets");
pub const CONFIG_MAP: Kind = kind("", "v1", "ConfigMap", "configmaps");
pub const DEPLOYMENT: Kind = kind("apps", "v1", "Deployment", "deployments");
pub const NAMESPACE: Kind = Kind { namespaced: false, ..kind("", "v1", "Namespace", "namespaces") };
const RBAC: &str = "rbac.authorization.k8s.io";
const ISTIO: &str = "networking.istio.io";

/// All that is rendered, in the order in which it is removed: what others refer to goes last.
pub const RENDERED: [Kind; 15] = [
    kind(ISTIO, "v1", "VirtualService", "virtualservices"),
    kind(ISTIO, "v1", "Gateway", "gateways"),
    kind(ISTIO, "v1", "DestinationRule", "destinationrules"),
    kind("autoscaling", "v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers"),
    kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets"),
    DEPLOYMENT,
    kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies"),
    SERVICE,
    kind(RBAC, "v1", "RoleBinding", "rolebindings"),
    kind(RBAC, "v1", "Role", "roles"),
    Kind { namespaced: false, ..kind(RBAC, "v1", "ClusterRoleBinding", "clusterrolebindings") },
    Kind { namespaced: false, ..kind(RBAC, "v1", "ClusterRole", "clusterroles") },
    SECRET,
    CONFIG_MAP,
    kind("", "v1", "ServiceAccount", "serviceaccounts"),
];

impl Kind {
    pub fn resource(self) -> ApiResource {
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(self.group, self.version, self.kind), self.plural)
    }
    pub fn api_version(self) -> String {
        match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        }
    }
    /// Whole objects, or only what is said about them.
    pub fn api<K: Resource<DynamicType = ApiResource, Scope = DynamicResourceScope>>(
        self,
        client: &Client,
        namespace: &str,
    ) -> Api<K> {
        match self.namespaced {
            true => Api::namespaced_with(client.clone(), namespace, &self.resource()),
            false => Api::all_with(client.clone(), &self.resource()),
        }
    }
    /// The kind of a rendered object.
    pub fn of(object: &Value) -> Option<Self> {
        RENDERED.into_iter().find(|kind| object["kind"] == kind.kind && object["apiVersion"] == kind.api_version())
    }
}

/// The labels by which what was made for this namespace is found again.
pub fn selector(namespace: &str) -> String {
    format!("{MANAGED_BY}={FIELD_MANAGER},{OF_NAMESPACE}={namespace}")
}

/// Whether the object is the operator's to change: it has its label, or the plane's, which makes some of the same objects when it is first.
pub fn may_be_taken(object: &DynamicObject) -> bool {
    let labels = object.metadata.labels.as_ref();
    let managed_by = labels.and_then(|labels| labels.get(MANAGED_BY)).map(String::as_str);
    matches!(managed_by, Some(FIELD_MANAGER | OF_PLANE))
}
