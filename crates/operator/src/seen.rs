//! The ControlPlanes that there are, and what they ask for together. Pure.

use crate::objects::{CONTROL_PLANE, FIELD_MANAGER};
use crate::status::{self, Condition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use kube::ResourceExt;
use kube::api::DynamicObject;
use onboarding_kinds::control_plane::{ControlPlane, Onboarding};
use onboarding_kinds::manifest::{self, Object};
use serde_json::{Value, json};

/// More faults than anybody reads.
const MOST_FAULTS: usize = 20;

/// A ControlPlane, read as lint reads it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub name: String,
    pub uid: String,
    pub generation: i64,
    /// `None`: it has faults.
    pub object: Option<ControlPlane>,
    /// `spec.meshExpansion.onboarding.endpoint: is required`
    pub faults: Vec<String>,
    pub status: Value,
    /// Whether this operator has written into its status.
    pub has_our_status: bool,
}

impl Seen {
    /// `None`: it is being deleted.
    pub fn read(object: &DynamicObject) -> Option<Self> {
        if object.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let manifest = json!({
            "apiVersion": CONTROL_PLANE.api_version(),
            "kind": CONTROL_PLANE.kind,
            "metadata": {"name": object.metadata.name, "namespace": object.metadata.namespace},
            "spec": object.data["spec"],
        });
        let mut manifests = manifest::read("", &manifest.to_string());
        let faults: Vec<String> = manifests.faults.iter().take(MOST_FAULTS).map(|fault| fault.of_field()).collect();
        let read = match manifests.items.pop().map(|item| item.object) {
            Some(Object::ControlPlane(plane)) if faults.is_empty() => Some(plane),
            _ => None,
        };
        let is_ours = |entry: &ManagedFieldsEntry| {
            entry.manager.as_deref() == Some(FIELD_MANAGER) && entry.subresource.as_deref() == Some("status")
        };
        Some(Self {
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            object: read,
            faults,
            status: object.data["status"].clone(),
            has_our_status: object.managed_fields().iter().any(is_ours),
        })
    }

    pub fn enabling(&self) -> Option<&Onboarding> {
        self.object.as_ref()?.onboarding.as_ref()
    }
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// What the one at this place asks for.
    Run(usize),
    /// Nobody enables it: what there is goes.
    Nothing,
    /// Nobody can say what is wanted; what there is stays as it is.
    Keep,
    /// As before; these enable it, and one must remain.
    Several(Vec<String>),
}

pub fn verdict(seen: &[Seen]) -> Verdict {
    let enabling: Vec<(usize, &Seen)> = seen.iter().enumerate().filter(|(_, it)| it.enabling().is_some()).collect();
    match enabling.as_slice() {
        [(one, _)] => Verdict::Run(*one),
        [] if seen.iter().any(|plane| plane.object.is_none()) => Verdict::Keep,
        [] => Verdict::Nothing,
        several => Verdict::Several(several.iter().map(|(_, plane)| plane.name.clone()).collect()),
    }
}

impl Verdict {
    /// What is said of a ControlPlane that isn't run.
    pub fn of_another(&self, plane: &Seen) -> Vec<Condition> {
        if plane.object.is_none() {
            let faults = plane.faults.join("; ");
            let message = format!("the ControlPlane can't be read, and what was made before stays as it is: {faults}");
            return vec![Condition::fails(status::VALID, "Invalid", message)];
        }
        match self {
            Self::Several(names) if plane.enabling().is_some() => {
                let message = format!(
                    "onboarding is enabled by several ControlPlanes ({}), and what was made before stays as it is; one must remain",
                    names.join(", ")
                );
                vec![Condition::fails(status::VALID, "SeveralControlPlanes", message)]
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(name: &str, onboarding: Value) -> Seen {
        let object = json!({
            "apiVersion": "install.tetrate.io/v1alpha1", "kind": "ControlPlane",
            "metadata": {"name": name, "namespace": "istio-system", "uid": name},
            "spec": {"meshExpansion": {"onboarding": onboarding}, "hub": "of others"},
        });
        Seen::read(&serde_json::from_value(object).unwrap()).unwrap()
    }

    fn enabling(name: &str) -> Seen {
        seen(name, json!({"endpoint": {"hosts": ["a.corp"], "secretName": "tls"}}))
    }

    #[test]
    fn one_is_run_whoever_else_there_is() {
        let (other, faulty) = (seen("other", Value::Null), seen("faulty", json!({"endpoint": {"hosts": []}})));
        assert_eq!(verdict(&[]), Verdict::Nothing);
        assert_eq!(verdict(std::slice::from_ref(&other)), Verdict::Nothing);
        assert_eq!(verdict(&[other.clone(), enabling("one")]), Verdict::Run(1));
        assert_eq!(verdict(&[faulty.clone(), enabling("one")]), Verdict::Run(1));
        assert_eq!(verdict(&[faulty, other]), Verdict::Keep);
    }

    #[test]
    fn faults_are_said_of_the_one_that_has_them() {
        let faulty = seen("faulty", json!({"endpoint": {"hosts": []}, "uuid": "x"}));
        let conditions = verdict(std::slice::from_ref(&faulty)).of_another(&faulty);
        assert_eq!((conditions.len(), conditions[0].reason), (1, "Invalid"));
        let message = &conditions[0].message;
        for words in ["onboarding.endpoint.hosts: ", "onboarding.endpoint.secretName: is required", "onboarding.uuid: "]
        {
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn several_are_named_to_each_of_them() {
        let planes = [enabling("a"), seen("other", Value::Null), enabling("b")];
        let judged = verdict(&planes);
        assert_eq!(judged, Verdict::Several(vec!["a".to_owned(), "b".to_owned()]));
        assert!(judged.of_another(&planes[0])[0].message.contains("several ControlPlanes (a, b)"));
        assert_eq!(judged.of_another(&planes[1]), []);
    }
}
