//! The WorkloadEntry of a live registration.
//!
//! Applied server-side: what others add to it (labels, annotations, a locality that the group doesn't set) stays.
//!
//! Its annotation `proxy.istio.io/health-checks-enabled` makes istiod take only entries with the condition `Healthy=True` for endpoints;
//! one without the condition is unhealthy (`isHealthy` in istio/pilot/pkg/serviceregistry/serviceentry/conversion.go), so a new entry gets no
//! requests before its agent says that it is ready. Istio reads `spec.labels`, never the labels of the object (except `istio.io/rev`, which
//! says which istiod sees the object, and which an agent must not choose): the group's labels are on the object for people.

use super::groups::short_digest;
use super::object::{name_of, seconds, version_of};
use crate::names::{MANAGED_BY, workload_auto_registration, workload_entry};
use jiff::Timestamp;
use kube::api::DynamicObject;
use onboarding_core::group::{EntryError, WorkloadEntry, WorkloadGroup};
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{Health, Live};
use serde_json::{Map, Value, json};

const HEALTH_CHECKS: &str = "proxy.istio.io/health-checks-enabled";
/// A digest of what was applied: tells a field that isn't wanted any more from one that somebody added.
const APPLIED: &str = "onboarding.tetrate.io/applied";
const REVISION: &str = "istio.io/rev";

/// An entry as it was read or written.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub uid: String,
    pub version: u64,
    pub owner: Owner,
    object: Box<[u8]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The uid of the war of its name.
    War(String),
    /// Whose it is, for people.
    Other(String),
}

impl Entry {
    pub(crate) fn read(mut object: DynamicObject) -> Result<(RegistrationName, Self), String> {
        object.metadata.managed_fields = None;
        let name = name_of(&object.metadata).ok_or("it has no name")?;
        let kind = workload_auto_registration().kind;
        let owners = || object.metadata.owner_references.iter().flatten();
        let owner = match owners().find(|owner| owner.kind == kind && owner.name == name.name) {
            Some(owner) => Owner::War(owner.uid.clone()),
            None => Owner::Other(match owners().next() {
                Some(owner) => format!("{} {}", owner.kind, owner.name),
                None => "nobody".to_owned(),
            }),
        };
        let entry = Self {
            uid: object.metadata.uid.clone().ok_or("it has no uid")?,
            version: version_of(&object.metadata)?,
            object: match owner {
                Owner::War(_) => serde_json::to_vec(&object).map_err(|error| error.to_string())?.into_boxed_slice(),
                Owner::Other(_) => Box::default(),
            },
            owner,
        };
        Ok((name, entry))
    }

    fn object(&self) -> Value {
        serde_json::from_slice(&self.object).unwrap_or_default()
    }

    /// Whether all of `wanted` is there, and nothing that was applied before is no longer wanted.
    pub(crate) fn is(&self, wanted: &Value) -> bool {
        within(wanted, &self.object())
    }

    /// The patch of the status that makes this entry as healthy as its registration; `None` if it is.
    pub(crate) fn health_patch(&self, health: &Health, now: Timestamp) -> Option<Value> {
        let object = self.object();
        let old = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let before = old.iter().find(|it| it["type"] == "Healthy");
        let (status, reason) = if health.ready { ("True", "ApplicationReady") } else { ("False", "ProbeFailed") };
        if before
            .is_some_and(|it| it["status"] == status && it["message"].as_str().unwrap_or_default() == health.message)
        {
            return None;
        }
        // What was never healthy need not be said to be unhealthy.
        if before.is_none() && !health.ready {
            return None;
        }
        let since = before.filter(|it| it["status"] == status).map(|it| it["lastTransitionTime"].clone());
        let condition = json!({
            "type": "Healthy",
            "status": status,
            "reason": reason,
            "message": health.message,
            "lastTransitionTime": since.unwrap_or_else(|| seconds(now).into()),
        });
        let mut conditions: Vec<_> = old.into_iter().filter(|it| it["type"] != "Healthy").collect();
        conditions.push(condition);
        Some(json!({
            "metadata": { "resourceVersion": self.version.to_string() },
            "status": { "conditions": conditions },
        }))
    }
}

/// What is applied.
pub(crate) fn wanted(
    name: &RegistrationName,
    war_uid: &str,
    group: &WorkloadGroup,
    live: &Live,
) -> Result<Value, EntryError> {
    let entry = WorkloadEntry::new(name.clone(), group, &live.attested.identity, &live.report)?;
    let (kind, war) = (workload_entry(), workload_auto_registration());
    let mut labels: Map<String, Value> = group
        .workload_labels
        .iter()
        .filter(|(key, _)| *key != REVISION)
        .map(|(key, value)| (key.clone(), value.as_str().into()))
        .collect();
    labels.insert(MANAGED_BY.0.to_owned(), MANAGED_BY.1.into());
    let mut spec = json!({
        "address": entry.address,
        "labels": entry.labels,
        "serviceAccount": entry.service_account,
    });
    let optional = [
        ("network", entry.network.map(Value::from)),
        ("locality", entry.locality.map(Value::from)),
        ("weight", entry.weight.map(Value::from)),
        ("ports", (!entry.ports.is_empty()).then(|| json!(entry.ports))),
    ];
    for (field, value) in optional {
        if let Some(value) = value {
            spec[field] = value;
        }
    }
    let mut object = json!({
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {
            "namespace": name.namespace,
            "name": name.name,
            "labels": labels,
            "annotations": { HEALTH_CHECKS: "true" },
            "ownerReferences": [{
                "apiVersion": war.api_version,
                "kind": war.kind,
                "name": name.name,
                "uid": war_uid,
                "controller": true,
            }],
        },
        "spec": spec,
    });
    object["metadata"]["annotations"][APPLIED] = short_digest(object.to_string().as_bytes()).into();
    Ok(object)
}

/// Whether every value of `part` is at its place in `whole`; of lists, every item somewhere in it.
fn within(part: &Value, whole: &Value) -> bool {
    match (part, whole) {
        (Value::Object(part), Value::Object(whole)) => {
            part.iter().all(|(key, value)| whole.get(key).is_some_and(|other| within(value, other)))
        }
        (Value::Array(part), Value::Array(whole)) => {
            part.iter().all(|item| whole.iter().any(|other| within(item, other)))
        }
        (part, whole) => part == whole,
    }
}
