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

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(conditions: Value) -> Entry {
        let object = json!({
            "metadata": {"name": "ratings-1", "namespace": "bookinfo", "uid": "e", "resourceVersion": "5", "ownerReferences": [
                {"apiVersion": "runtime.onboarding.tetrate.io/v1alpha1", "kind": "WorkloadAutoRegistration", "name": "ratings-1", "uid": "w"},
            ], "labels": {"theirs": "x"}},
            "spec": {"address": "10.0.0.4", "weight": 7},
            "status": {"conditions": conditions},
        });
        Entry::read(serde_json::from_value(object).unwrap()).unwrap().1
    }

    fn health(ready: bool, message: &str) -> Health {
        Health { ready, message: message.to_owned() }
    }

    #[test]
    fn what_others_added_is_no_difference() {
        let entry = entry(json!([]));
        assert_eq!(entry.owner, Owner::War("w".to_owned()));
        assert!(entry.is(&json!({"spec": {"address": "10.0.0.4"}, "metadata": {"ownerReferences": [{"uid": "w"}]}})));
        assert!(!entry.is(&json!({"spec": {"address": "10.0.0.5"}})));
        assert!(!entry.is(&json!({"spec": {"network": "vms"}})));
        assert!(!entry.is(&json!({"metadata": {"ownerReferences": [{"uid": "other"}]}})));
    }

    #[test]
    fn health_is_written_where_it_differs_and_nothing_else_is_lost() {
        let now = Timestamp::from_second(1000).unwrap();
        let patch = |conditions: Value, health: Health| entry(conditions).health_patch(&health, now);
        assert_eq!(patch(json!([]), health(false, "not up")), None, "without the condition it is unhealthy");
        let theirs = json!({"type": "Reconciled", "status": "True"});
        let healthy = patch(json!([theirs]), health(true, "")).unwrap();
        assert_eq!(healthy["metadata"]["resourceVersion"], "5");
        assert_eq!(healthy["status"]["conditions"][0], theirs);
        let condition = healthy["status"]["conditions"][1].clone();
        assert_eq!(
            (&condition["status"], &condition["lastTransitionTime"]),
            (&json!("True"), &json!("1970-01-01T00:16:40Z"))
        );
        assert_eq!(patch(json!([theirs, condition]), health(true, "")), None);
        let ill = patch(json!([condition]), health(false, "503")).unwrap();
        assert_eq!(ill["status"]["conditions"][0]["status"], "False");
        // Another message of the same state: since when stays.
        let mut before = ill["status"]["conditions"][0].clone();
        before["lastTransitionTime"] = json!("1970-01-01T00:00:01Z");
        let other = patch(json!([before]), health(false, "504")).unwrap();
        assert_eq!(other["status"]["conditions"][0]["lastTransitionTime"], "1970-01-01T00:00:01Z");
    }

    #[test]
    fn an_entry_of_that_name_is_ours_only_by_its_owner() {
        let object =
            json!({"metadata": {"name": "ratings-1", "namespace": "bookinfo", "uid": "e", "resourceVersion": "5"}});
        let read = |object: &Value| Entry::read(serde_json::from_value(object.clone()).unwrap()).unwrap().1.owner;
        assert_eq!(read(&object), Owner::Other("nobody".to_owned()));
        let mut owned = object;
        owned["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "v1", "kind": "WorkloadGroup", "name": "ratings", "uid": "g"}]);
        assert_eq!(read(&owned), Owner::Other("WorkloadGroup ratings".to_owned()));
    }
}
