//! What is remembered of a registration that ended, after its war is gone: a ConfigMap in the plane's namespace.

use super::groups::short_digest;
use super::object::{WrittenEnd, version_of};
use crate::names::MANAGED_BY;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::ObjectMeta;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::Ended;

/// On each of them, so that they are found.
pub(crate) const LABEL: (&str, &str) = ("onboarding.tetrate.io/memory", "registration");

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Memory {
    pub name: RegistrationName,
    pub uid: String,
    pub version: u64,
    pub content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content {
    /// Another with each write: what a war that comes after refers to.
    pub id: String,
    /// The uid of the war that ended.
    pub war: String,
    pub ended: Ended,
}

/// `onboarding-memory-` and 32 hexadecimal digits, so that it is a valid name for any registration.
pub(crate) fn object_name(name: &RegistrationName) -> String {
    format!("onboarding-memory-{}", short_digest(name.to_string().as_bytes()))
}

/// `version`: that of the object to replace; `None`: it is to be created.
pub(crate) fn to_object(name: &RegistrationName, content: &Content, version: Option<u64>) -> ConfigMap {
    let data = [
        ("namespace", name.namespace.clone()),
        ("name", name.name.clone()),
        ("id", content.id.clone()),
        ("war", content.war.clone()),
        ("lease", serde_json::json!(WrittenEnd::new(&content.ended)).to_string()),
    ];
    ConfigMap {
        metadata: ObjectMeta {
            name: Some(object_name(name)),
            labels: Some([LABEL, MANAGED_BY].map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
            resource_version: version.map(|version| version.to_string()),
            ..ObjectMeta::default()
        },
        data: Some(data.map(|(key, value)| (key.to_owned(), value)).into()),
        ..ConfigMap::default()
    }
}

/// Whose memory this is; `None` for a ConfigMap that is none.
pub(crate) fn registration_of(object: &ConfigMap) -> Option<RegistrationName> {
    let data = object.data.as_ref()?;
    let name = RegistrationName { namespace: data.get("namespace")?.clone(), name: data.get("name")?.clone() };
    (object.metadata.name.as_deref() == Some(object_name(&name).as_str())).then_some(name)
}

pub(crate) fn from_object(name: &RegistrationName, object: &ConfigMap) -> Result<Memory, String> {
    if registration_of(object).as_ref() != Some(name) {
        return Err("it doesn't say that it is of this registration".to_owned());
    }
    let field = |key: &str| {
        let value = object.data.as_ref().and_then(|data| data.get(key));
        value.cloned().ok_or_else(|| format!("{key} is missing"))
    };
    let lease: WrittenEnd = serde_json::from_str(&field("lease")?).map_err(|error| format!("lease: {error}"))?;
    Ok(Memory {
        name: name.clone(),
        uid: object.metadata.uid.clone().ok_or("it has no uid")?,
        version: version_of(&object.metadata)?,
        content: Content { id: field("id")?, war: field("war")?, ended: lease.read()? },
    })
}
