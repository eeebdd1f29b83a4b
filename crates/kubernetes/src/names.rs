//! Group versions, labels and annotations of the objects that this backend reads and writes.

use kube::api::{ApiResource, GroupVersionKind};

/// The field manager of what the plane writes.
pub const FIELD_MANAGER: &str = "onboarding-plane";
/// On every object that the plane makes.
pub const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "onboarding-plane");

pub fn onboarding_policy() -> ApiResource {
    resource("authorization.onboarding.tetrate.io", "v1alpha1", "OnboardingPolicy", "onboardingpolicies")
}
pub fn workload_auto_registration() -> ApiResource {
    resource("runtime.onboarding.tetrate.io", "v1alpha1", "WorkloadAutoRegistration", "workloadautoregistrations")
}
pub fn control_plane() -> ApiResource {
    resource("install.tetrate.io", "v1alpha1", "ControlPlane", "controlplanes")
}
pub fn workload_group() -> ApiResource {
    resource("networking.istio.io", "v1", "WorkloadGroup", "workloadgroups")
}
pub fn workload_entry() -> ApiResource {
    resource("networking.istio.io", "v1", "WorkloadEntry", "workloadentries")
}
pub fn sidecar() -> ApiResource {
    resource("networking.istio.io", "v1", "Sidecar", "sidecars")
}
pub fn service_entry() -> ApiResource {
    resource("networking.istio.io", "v1", "ServiceEntry", "serviceentries")
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}
