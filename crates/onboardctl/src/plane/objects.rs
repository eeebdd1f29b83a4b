//! The kinds of objects that are asked for, and how their JSON is read.

use serde_json::Value;

/// A kind, and where the API server serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resource {
    /// Empty: Kubernetes' own first group.
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub plural: &'static str,
}

/// The namespace of Istio, and of the plane.
pub const ISTIO_SYSTEM: &str = "istio-system";

pub const POLICIES: Resource =
    resource("authorization.onboarding.tetrate.io", "v1alpha1", "OnboardingPolicy", "onboardingpolicies");
pub const WARS: Resource =
    resource("runtime.onboarding.tetrate.io", "v1alpha1", "WorkloadAutoRegistration", "workloadautoregistrations");
pub const CONTROL_PLANES: Resource = resource("install.tetrate.io", "v1alpha1", "ControlPlane", "controlplanes");
pub const GROUPS: Resource = resource("networking.istio.io", "v1", "WorkloadGroup", "workloadgroups");
pub const ENTRIES: Resource = resource("networking.istio.io", "v1", "WorkloadEntry", "workloadentries");
pub const SECRETS: Resource = resource("", "v1", "Secret", "secrets");
pub const SERVICES: Resource = resource("", "v1", "Service", "services");
pub const CONFIG_MAPS: Resource = resource("", "v1", "ConfigMap", "configmaps");
pub const ACCOUNTS: Resource = resource("", "v1", "ServiceAccount", "serviceaccounts");
pub const DEPLOYMENTS: Resource = resource("apps", "v1", "Deployment", "deployments");

const fn resource(group: &'static str, version: &'static str, kind: &'static str, plural: &'static str) -> Resource {
    Resource { group, version, kind, plural }
}

impl Resource {
    /// Of one namespace, or of all.
    pub fn path(&self, namespace: Option<&str>) -> String {
        let Self { group, version, plural, .. } = self;
        let root = if group.is_empty() { format!("/api/{version}") } else { format!("/apis/{group}/{version}") };
        match namespace {
            Some(namespace) => format!("{root}/namespaces/{namespace}/{plural}"),
            None => format!("{root}/{plural}"),
        }
    }

    /// As kubectl and RBAC name it.
    pub fn name(&self) -> String {
        match self.group {
            "" => self.plural.to_owned(),
            group => format!("{}.{group}", self.plural),
        }
    }

    /// What brings it, where the API server doesn't know it.
    pub fn way_to_have_it(&self) -> &'static str {
        match self.group {
            "networking.istio.io" => "is Istio installed in this cluster?",
            group if group.ends_with("tetrate.io") => {
                "is Workload Onboarding installed in this cluster? Its chart is in deploy/, its definitions are in deploy/crds/"
            }
            _ => "is this the API server of a Kubernetes cluster?",
        }
    }
}

/// A text somewhere in an object; empty where there is none.
pub fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

pub fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

pub fn namespace(object: &Value) -> &str {
    text(object, "/metadata/namespace")
}

/// A label or an annotation: their keys have slashes.
pub fn keyed<'a>(object: &'a Value, field: &str, key: &str) -> &'a str {
    object["metadata"][field][key].as_str().unwrap_or_default()
}

pub fn items<'a>(object: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    object.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}

pub fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    items(object, "/status/conditions").find(|condition| text(condition, "/type") == kind)
}

/// The conditions that are False; `Ready`, which repeats the words of the others, only where it is the only one.
pub fn failing(object: &Value) -> Vec<&Value> {
    let is_false = |condition: &&Value| text(condition, "/status") == "False";
    let (ready, others): (Vec<_>, Vec<_>) =
        items(object, "/status/conditions").filter(is_false).partition(|condition| text(condition, "/type") == "Ready");
    if others.is_empty() { ready } else { others }
}

pub fn is_true(object: &Value, kind: &str) -> bool {
    condition(object, kind).is_some_and(|condition| text(condition, "/status") == "True")
}
