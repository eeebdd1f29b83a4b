//! The CustomResourceDefinitions of our kinds, so that `kubectl apply` refuses what `onboardctl lint` refuses, in its words.
//!
//! `deploy/crds/*.yaml` are these, printed (`cargo run -p onboarding-kinds --example crds`); a test compares them.
//! Needs Kubernetes 1.31 or later (`isIP`); tested with 1.36.
//!
//! What an API server can't be told, or says in other words (the corpus of the tests has each of its answers):
//! - **Unknown fields** are refused by strict field validation, which kubectl asks for unless it is told otherwise
//!   (`--validate=ignore`); without it the API server drops them. Other faults are then told only after these, and most only after those of
//!   missing fields and wrong types.
//! - **A key that occurs twice, merge keys, tags**: kubectl reads YAML before anybody is asked, and takes them without a word.
//! - **A key without a value** (null) is an absent field to lint, and of the wrong type to an API server.
//! - **The content of a JWKS, the whole grammar of a JSONPath**: only what is plainly wrong.
//! - **Items of lists deep in a policy** (subjects, attribute values, values of label expressions, `gcp`, `azure`) are held to a pattern,
//!   which is then the message too: an API server estimates what rules may cost before it takes them, from how many items there may be.
//!   How many there may be (32 rules, 16 matchers each, 256 accounts, 1024 subjects, 100 of most others) follows from that;
//!   to the plane there are no such limits, and lint warns of what is beyond them (`limits`). More rules are more policies.
//! - **What is wrong between objects.**
//!
//! The plane reads what comes from an API server as lint does, so what passes here and not there admits nobody.

mod control_plane;
mod grammar;
pub mod limits;
mod policy;
mod schema;
mod war;

use schema::Schema;
use serde_json::{Value, json};

/// OnboardingPolicy, WorkloadAutoRegistration and ControlPlane, each with the name of its file in `deploy/crds/`, without `.yaml`.
pub fn all() -> [(&'static str, Value); 3] {
    [
        ("onboardingpolicies", onboarding_policy()),
        ("workloadautoregistrations", workload_auto_registration()),
        ("controlplanes", control_plane()),
    ]
}

pub fn onboarding_policy() -> Value {
    let names = json!({
        "kind": "OnboardingPolicy", "listKind": "OnboardingPolicyList",
        "plural": "onboardingpolicies", "singular": "onboardingpolicy", "shortNames": ["op"],
    });
    let columns = json!([
        { "name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Accepted\")].status" },
        { "name": "Workloads", "type": "integer", "jsonPath": ".status.workloads", "description": "How many it admits." },
        age(),
    ]);
    definition("authorization.onboarding.tetrate.io", &names, Some(columns), policy::schema())
}

pub fn workload_auto_registration() -> Value {
    let names = json!({
        "kind": "WorkloadAutoRegistration", "listKind": "WorkloadAutoRegistrationList",
        "plural": "workloadautoregistrations", "singular": "workloadautoregistration", "shortNames": ["war"],
    });
    let columns = json!([
        {
            "name": "Agent Connected", "type": "string",
            "jsonPath": ".status.conditions[?(@.type==\"AgentConnected\")].status",
        },
        age(),
    ]);
    definition("runtime.onboarding.tetrate.io", &names, Some(columns), war::schema())
}

pub fn control_plane() -> Value {
    let names = json!({
        "kind": "ControlPlane", "listKind": "ControlPlaneList", "plural": "controlplanes", "singular": "controlplane",
    });
    definition("install.tetrate.io", &names, None, control_plane::schema())
}

fn age() -> Value {
    json!({ "name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp" })
}

fn definition(group: &str, names: &Value, columns: Option<Value>, schema: Schema) -> Value {
    let mut version = json!({ "name": "v1alpha1", "served": true, "storage": true, "subresources": { "status": {} } });
    if let Some(columns) = columns {
        version["additionalPrinterColumns"] = columns;
    }
    version["schema"] = json!({ "openAPIV3Schema": Value::from(schema) });
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": { "name": format!("{}.{group}", names["plural"].as_str().unwrap_or_default()) },
        "spec": { "group": group, "names": names, "scope": "Namespaced", "versions": [version] },
    })
}

/// The schema of a whole object.
fn root<'a>(says: &str, fields: impl IntoIterator<Item = (&'a str, Schema)>) -> Schema {
    let heading =
        [("apiVersion", Schema::any_text("")), ("kind", Schema::any_text("")), ("metadata", Schema::object("", []))];
    Schema::object(says, heading.into_iter().chain(fields))
}

fn observed_generation() -> Schema {
    Schema::integer("The generation of the spec that this status is about.", 0, None)
}

fn conditions(says: &str) -> Schema {
    const MOST_CONDITIONS: u32 = 64;
    let condition = Schema::object(
        "",
        [
            ("type", Schema::any_text("")),
            ("status", Schema::word("", &["True", "False", "Unknown"])),
            ("reason", Schema::any_text("For programs.")),
            ("message", Schema::any_text("For people.")),
            ("lastTransitionTime", Schema::time("")),
            ("observedGeneration", observed_generation()),
        ],
    )
    .requires(&["type", "status"]);
    Schema::list_by(says, "type", condition, MOST_CONDITIONS)
}
