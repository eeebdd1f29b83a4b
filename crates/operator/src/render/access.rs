//! Accounts and what they may do: each rule is what the plane's code asks for, and no more.

use super::{Objects, PLANE};
use serde_json::{Value, json};

/// The keys that sign tokens. It is made here, empty, so that the plane needn't be allowed to create Secrets: whoever may can have
/// the token of any account of the namespace.
const TOKEN_KEYS: &str = "onboarding-plane-token-keys";

const RBAC_GROUP: &str = "rbac.authorization.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io/v1";

pub(super) fn render(all: &Objects<'_>) -> Vec<Value> {
    let of_cluster = format!("{PLANE}-{}", all.namespace());
    let subject = json!([{"kind": "ServiceAccount", "name": PLANE, "namespace": all.namespace()}]);
    let binding = |kind: &str, name: &str| json!({"roleRef": {"apiGroup": RBAC_GROUP, "kind": kind, "name": name}, "subjects": subject});
    let mut objects = vec![
        all.service_account(PLANE),
        all.cluster_object(PLANE, RBAC, "ClusterRole", &of_cluster, json!({"rules": in_cluster()})),
        all.cluster_object(PLANE, RBAC, "ClusterRoleBinding", &of_cluster, binding("ClusterRole", &of_cluster)),
        all.object(PLANE, RBAC, "Role", PLANE, json!({"rules": in_namespace(&all.enabled.onboarding.secret_name)})),
        all.object(PLANE, RBAC, "RoleBinding", PLANE, binding("Role", PLANE)),
        // Without data: that is the plane's.
        all.object(PLANE, "v1", "Secret", TOKEN_KEYS, json!({"type": "Opaque"})),
    ];
    objects.extend(all.plane_config());
    objects
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
}

fn named(mut rule: Value, name: &str) -> Value {
    rule["resourceNames"] = json!([name]);
    rule
}

const READ: &[&str] = &["get", "list", "watch"];
const ALL: &[&str] = &["get", "list", "watch", "create", "update", "patch", "delete"];

fn in_cluster() -> Value {
    json!([
        rule("authorization.onboarding.tetrate.io", &["onboardingpolicies"], READ),
        rule("authorization.onboarding.tetrate.io", &["onboardingpolicies/status"], &["patch"]),
        rule("runtime.onboarding.tetrate.io", &["workloadautoregistrations"], ALL),
        rule("runtime.onboarding.tetrate.io", &["workloadautoregistrations/status"], &["get", "update", "patch"]),
        rule("networking.istio.io", &["workloadgroups", "sidecars", "serviceentries"], READ),
        rule("networking.istio.io", &["workloadentries"], ALL),
        rule("networking.istio.io", &["workloadentries/status"], &["get", "update", "patch"]),
        // Where OwnerReferencesPermissionEnforcement is on: an owner whose deletion waits.
        rule("networking.istio.io", &["workloadgroups/finalizers"], &["update"]),
        rule("runtime.onboarding.tetrate.io", &["workloadautoregistrations/finalizers"], &["update"]),
        // istio-tokens for the accounts that WorkloadGroups name.
        rule("", &["serviceaccounts/token"], &["create"]),
        rule("events.k8s.io", &["events"], &["create", "patch"]),
        // Which Istio revision a namespace or a tag stands for; the names that `onboarding-agent hosts` maps.
        rule("", &["namespaces", "services"], READ),
        rule("admissionregistration.k8s.io", &["mutatingwebhookconfigurations"], READ),
    ])
}

fn in_namespace(secret_name: &str) -> Value {
    json!([
        rule("install.tetrate.io", &["controlplanes"], READ),
        named(rule("", &["secrets"], READ), secret_name),
        named(rule("", &["secrets"], &["get", "update"]), TOKEN_KEYS),
        // Istio's mesh configuration and root certificate are read; what is remembered of registrations that ended is written. Which names
        // those are RBAC can't say; the chart's ValidatingAdmissionPolicy does.
        rule("", &["configmaps"], &["get", "list", "watch", "create", "update", "delete"]),
        rule("coordination.k8s.io", &["leases"], ALL),
    ])
}
