//! The objects of the cluster as they were last seen, each read as lint reads it. Pure.

use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Service};
use kube::ResourceExt;
use kube::api::{ApiResource, DynamicObject};
use onboarding_core::group::WorkloadGroup;
use onboarding_core::policy::Policy;
use onboarding_endpoint::backend::TlsMaterial;
use onboarding_kinds::control_plane::ControlPlane;
use onboarding_kinds::manifest::{self, Object};
use onboarding_kinds::mesh::Sidecar;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use crate::istio::{EXPORT_TO_ANNOTATION, Named, Names, REVISION_LABEL};
use crate::names;

/// The ConfigMap of the plane's namespace that keeps the plane's UID where the ControlPlane names none.
pub const PLANE_CONFIG: &str = "onboarding-plane-config";
/// Its key, YAML with `uid`.
pub const PLANE_CONFIG_KEY: &str = "config.yaml";
/// On Istio's MutatingWebhookConfigurations: a name of a revision.
pub(crate) const TAG_LABEL: &str = "istio.io/tag";
const ROOT_CERTIFICATES: &str = "istio-ca-root-cert";
const ROOT_CERTIFICATES_KEY: &str = "root-cert.pem";
const MESH: &str = "istio";
const MESH_KEY: &str = "mesh";
const INJECTOR: &str = "istio-sidecar-injector";
const INJECTOR_KEY: &str = "values";
/// An object with more than this many faults says no more of them.
const MOST_FAULTS: usize = 20;

/// Each is one list and watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Kind {
    Policies,
    Groups,
    ControlPlanes,
    Secret,
    ConfigMaps,
    Sidecars,
    Namespaces,
    Services,
    ServiceEntries,
    /// Istio's MutatingWebhookConfigurations that give a revision a tag.
    Tags,
}

impl Kind {
    /// All that are watched from the start; the Secret is once the ControlPlane names it.
    pub(crate) const FIRST: [Self; 9] = [
        Self::Policies,
        Self::Groups,
        Self::ControlPlanes,
        Self::ConfigMaps,
        Self::Sidecars,
        Self::Namespaces,
        Self::Services,
        Self::ServiceEntries,
        Self::Tags,
    ];

    /// Without it nobody can say who is admitted.
    pub(crate) fn admits(self) -> bool {
        matches!(self, Self::Policies | Self::Groups | Self::ControlPlanes)
    }

    /// As a metric's label.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Policies => "onboardingpolicies",
            Self::Groups => "workloadgroups",
            Self::ControlPlanes => "controlplanes",
            Self::Secret => "secrets",
            Self::ConfigMaps => "configmaps",
            Self::Sidecars => "sidecars",
            Self::Namespaces => "namespaces",
            Self::Services => "services",
            Self::ServiceEntries => "serviceentries",
            Self::Tags => "mutatingwebhookconfigurations",
        }
    }

    /// For people.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Policies => "OnboardingPolicies",
            Self::Groups => "WorkloadGroups",
            Self::ControlPlanes => "ControlPlanes",
            Self::Secret => "the endpoint's Secret",
            Self::ConfigMaps => "ConfigMaps",
            Self::Sidecars => "Sidecars",
            Self::Namespaces => "Namespaces",
            Self::Services => "Services",
            Self::ServiceEntries => "ServiceEntries",
            Self::Tags => "revision tags (MutatingWebhookConfigurations)",
        }
    }

    pub(crate) fn resource(self) -> ApiResource {
        match self {
            Self::Policies => names::onboarding_policy(),
            Self::Groups => names::workload_group(),
            Self::ControlPlanes => names::control_plane(),
            Self::Secret => ApiResource::erase::<k8s_openapi::api::core::v1::Secret>(&()),
            Self::ConfigMaps => ApiResource::erase::<ConfigMap>(&()),
            Self::Sidecars => names::sidecar(),
            Self::Namespaces => ApiResource::erase::<Namespace>(&()),
            Self::Services => ApiResource::erase::<Service>(&()),
            Self::ServiceEntries => names::service_entry(),
            Self::Tags => {
                ApiResource::erase::<k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration>(&())
            }
        }
    }
}

/// What of an object is kept on its way to where it is read: of ten thousand Services, a page at a time is whole in memory.
pub(crate) fn slim(kind: Kind, object: &mut DynamicObject) {
    object.metadata.managed_fields = None;
    if !matches!(kind, Kind::Services | Kind::ServiceEntries) {
        return;
    }
    object.metadata.labels = None;
    if let Some(annotations) = &mut object.metadata.annotations {
        annotations.retain(|key, _| key == EXPORT_TO_ANNOTATION);
    }
    let used = ["clusterIP", "type", "ports", "hosts", "exportTo"];
    if let Some(fields) = object.data.as_object_mut() {
        fields.retain(|field, _| field == "spec");
    }
    if let Some(spec) = object.data.get_mut("spec").and_then(Value::as_object_mut) {
        spec.retain(|field, _| used.contains(&field.as_str()));
    }
}

/// Namespace and name. The namespace is empty where there is none, or only one.
pub(crate) type Key = (String, String);

pub(crate) fn key(kind: Kind, object: &DynamicObject) -> Key {
    let namespace = match kind {
        Kind::ConfigMaps | Kind::Namespaces | Kind::Tags => String::new(),
        _ => object.namespace().unwrap_or_default(),
    };
    (namespace, object.name_any())
}

/// One object, as it is now and as it was when it was last right.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Held<T> {
    pub uid: String,
    pub generation: i64,
    /// RFC 3339, to the second; Istio's order of Sidecars.
    pub created: String,
    /// `None`: it has faults, or is being deleted.
    pub now: Option<T>,
    pub faults: Vec<Fault>,
    pub warnings: Vec<Fault>,
    /// What the mesh goes on with while `now` has faults.
    pub good: Option<T>,
    /// `status` of an OnboardingPolicy; null of others.
    pub status: Value,
}

/// What is wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// `OnboardingPolicy bookinfo/narrow: spec.allow: is required`
    pub of_object: String,
    /// `spec.allow: is required`
    pub of_field: String,
}

impl From<&onboarding_kinds::fault::Fault> for Fault {
    fn from(fault: &onboarding_kinds::fault::Fault) -> Self {
        Self { of_object: fault.of_object(), of_field: fault.of_field() }
    }
}

/// What a ConfigMap is to the plane.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Config {
    /// `istio[-<revision>]`
    Mesh {
        revision: String,
        yaml: String,
    },
    /// `istio-sidecar-injector[-<revision>]`
    Injector {
        revision: String,
        values: String,
    },
    RootCertificates(String),
    Plane(PlaneConfig),
}

/// The ConfigMap that keeps the UID.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PlaneConfig {
    pub version: String,
    /// `None`: it has no such key.
    pub yaml: Option<String>,
}

/// Everything that was seen.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    pub policies: BTreeMap<Key, Held<Arc<Policy>>>,
    pub groups: BTreeMap<Key, Held<Arc<WorkloadGroup>>>,
    pub planes: BTreeMap<Key, Held<ControlPlane>>,
    pub secrets: BTreeMap<Key, Held<Option<TlsMaterial>>>,
    pub sidecars: BTreeMap<Key, Held<Arc<Sidecar>>>,
    /// By name: the plane's namespace only.
    pub configs: BTreeMap<String, Config>,
    /// With a label `istio.io/rev`.
    pub revisions: BTreeMap<String, String>,
    /// Name of the webhook configuration: tag and revision.
    pub tags: BTreeMap<String, (String, String)>,
    services: BTreeMap<Key, Named>,
    service_entries: BTreeMap<Key, Named>,
    /// Of both, made when they are asked for.
    names: OnceLock<Arc<Names>>,
}

impl Objects {
    /// `before`: the last answer.
    pub(crate) fn names(&self, before: &Arc<Names>) -> Arc<Names> {
        let made = || {
            let all = self.services.values().chain(self.service_entries.values()).cloned().collect();
            Arc::new(Names::new(all, before))
        };
        self.names.get_or_init(made).clone()
    }

    /// Whether anything that matters changed.
    pub(crate) fn listed(&mut self, kind: Kind, objects: Vec<DynamicObject>) -> bool {
        let there: BTreeSet<Key> = objects.iter().map(|object| key(kind, object)).collect();
        let mut changed = false;
        for gone in self.keys(kind).into_iter().filter(|key| !there.contains(key)) {
            changed |= self.gone(kind, &gone);
        }
        for object in objects {
            changed |= self.put(kind, object);
        }
        changed
    }

    /// Whether anything that matters changed.
    pub(crate) fn put(&mut self, kind: Kind, object: DynamicObject) -> bool {
        let key = key(kind, &object);
        match kind {
            Kind::Policies => put(&mut self.policies, key, kind, object, |object| match object {
                Some(Object::OnboardingPolicy(policy)) => Some(Arc::new(policy)),
                _ => None,
            }),
            Kind::Groups => put(&mut self.groups, key, kind, object, |object| match object {
                Some(Object::WorkloadGroup(group)) => Some(Arc::new(group)),
                _ => None,
            }),
            Kind::ControlPlanes => put(&mut self.planes, key, kind, object, |object| match object {
                Some(Object::ControlPlane(plane)) => Some(plane),
                _ => None,
            }),
            Kind::Sidecars => put(&mut self.sidecars, key, kind, object, |object| match object {
                Some(Object::Sidecar(sidecar)) => Some(Arc::new(sidecar)),
                _ => None,
            }),
            Kind::Secret => put(&mut self.secrets, key, kind, object, |object| match object {
                Some(Object::Secret(secret)) => {
                    Some(Some(TlsMaterial { certificate_chain: secret.certificate, private_key: secret.private_key }))
                }
                // Not one of TLS.
                _ => Some(None),
            }),
            Kind::ConfigMaps => replace(&mut self.configs, key.1.clone(), config(&key.1, &object)),
            Kind::Namespaces => replace(&mut self.revisions, key.1, object.labels().get(REVISION_LABEL).cloned()),
            Kind::Services => {
                let export_to = Named::export_to_of(object.annotations());
                let named = Named::service(&key.0, &key.1, export_to, &object.data["spec"]);
                let changed = replace(&mut self.services, key, named);
                self.renamed(changed)
            }
            Kind::ServiceEntries => {
                let named = Named::service_entry(&key.0, &object.data["spec"]);
                let changed = replace(&mut self.service_entries, key, named);
                self.renamed(changed)
            }
            Kind::Tags => {
                let labels = object.labels();
                let tag = labels.get(TAG_LABEL).zip(labels.get(REVISION_LABEL));
                replace(&mut self.tags, key.1, tag.map(|(tag, revision)| (tag.clone(), revision.clone())))
            }
        }
    }

    /// Whether it was known.
    pub(crate) fn gone(&mut self, kind: Kind, key: &Key) -> bool {
        match kind {
            Kind::Policies => self.policies.remove(key).is_some(),
            Kind::Groups => self.groups.remove(key).is_some(),
            Kind::ControlPlanes => self.planes.remove(key).is_some(),
            Kind::Sidecars => self.sidecars.remove(key).is_some(),
            Kind::Secret => self.secrets.remove(key).is_some(),
            Kind::ConfigMaps => self.configs.remove(&key.1).is_some(),
            Kind::Namespaces => self.revisions.remove(&key.1).is_some(),
            Kind::Services => {
                let changed = self.services.remove(key).is_some();
                self.renamed(changed)
            }
            Kind::ServiceEntries => {
                let changed = self.service_entries.remove(key).is_some();
                self.renamed(changed)
            }
            Kind::Tags => self.tags.remove(&key.1).is_some(),
        }
    }

    fn renamed(&mut self, changed: bool) -> bool {
        if changed {
            self.names = OnceLock::new();
        }
        changed
    }

    fn keys(&self, kind: Kind) -> Vec<Key> {
        let unnamespaced = |name: &String| (String::new(), name.clone());
        match kind {
            Kind::Policies => self.policies.keys().cloned().collect(),
            Kind::Groups => self.groups.keys().cloned().collect(),
            Kind::ControlPlanes => self.planes.keys().cloned().collect(),
            Kind::Sidecars => self.sidecars.keys().cloned().collect(),
            Kind::Secret => self.secrets.keys().cloned().collect(),
            Kind::Services => self.services.keys().cloned().collect(),
            Kind::ServiceEntries => self.service_entries.keys().cloned().collect(),
            Kind::Namespaces => self.revisions.keys().map(unnamespaced).collect(),
            Kind::Tags => self.tags.keys().map(unnamespaced).collect(),
            Kind::ConfigMaps => self.configs.keys().map(unnamespaced).collect(),
        }
    }
}

fn replace<K: Ord, V: PartialEq>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) -> bool {
    match value {
        Some(value) if map.get(&key) == Some(&value) => false,
        Some(value) => {
            map.insert(key, value);
            true
        }
        None => map.remove(&key).is_some(),
    }
}

fn put<T: Clone + PartialEq>(
    map: &mut BTreeMap<Key, Held<T>>,
    key: Key,
    kind: Kind,
    object: DynamicObject,
    pick: impl Fn(Option<Object>) -> Option<T>,
) -> bool {
    let mut held = read(kind, object, pick);
    if held.good.is_none()
        && let Some(before) = map.get(&key).filter(|before| before.uid == held.uid)
    {
        held.good.clone_from(&before.good);
    }
    replace(map, key, Some(held))
}

/// As lint reads it. An object that is being deleted is as good as gone, whoever still holds it up by a finalizer.
fn read<T: Clone>(kind: Kind, object: DynamicObject, pick: impl Fn(Option<Object>) -> Option<T>) -> Held<T> {
    let (uid, generation) = (object.uid().unwrap_or_default(), object.metadata.generation.unwrap_or_default());
    let created = object.creation_timestamp().map(|time| time.0.to_string()).unwrap_or_default();
    let status = match kind {
        Kind::Policies => object.data.get("status").cloned().unwrap_or_default(),
        _ => Value::Null,
    };
    let mut held =
        Held { uid, generation, created, now: None, faults: Vec::new(), warnings: Vec::new(), good: None, status };
    if object.metadata.deletion_timestamp.is_some() {
        return held;
    }
    let mut manifests = manifest::read("", &text(kind, object));
    held.faults = manifests.faults.iter().take(MOST_FAULTS).map(Fault::from).collect();
    held.warnings = manifests.warnings.iter().take(MOST_FAULTS).map(Fault::from).collect();
    if held.faults.is_empty() {
        held.now = pick(manifests.items.pop().map(|item| item.object));
    }
    held.good.clone_from(&held.now);
    held
}

/// The object as a manifest: what the API server adds for itself is left out.
fn text(kind: Kind, object: DynamicObject) -> String {
    let resource = kind.resource();
    let mut manifest = json!({
        "apiVersion": resource.api_version,
        "kind": resource.kind,
        "metadata": {"namespace": object.metadata.namespace, "name": object.metadata.name},
    });
    if let Some(labels) = object.metadata.labels {
        manifest["metadata"]["labels"] = json!(labels);
    }
    if let Value::Object(fields) = object.data {
        for (field, value) in fields {
            if !matches!(field.as_str(), "apiVersion" | "kind" | "metadata" | "status") {
                manifest[field] = value;
            }
        }
    }
    manifest.to_string()
}

fn config(name: &str, object: &DynamicObject) -> Option<Config> {
    let text = |key: &str| object.data.get("data")?.get(key)?.as_str().map(str::to_owned);
    if name == PLANE_CONFIG {
        let version = object.resource_version().unwrap_or_default();
        return Some(Config::Plane(PlaneConfig { version, yaml: text(PLANE_CONFIG_KEY) }));
    }
    if name == ROOT_CERTIFICATES {
        return text(ROOT_CERTIFICATES_KEY).map(Config::RootCertificates);
    }
    if let Some(revision) = revision(name, INJECTOR)
        && let Some(values) = text(INJECTOR_KEY)
    {
        return Some(Config::Injector { revision, values });
    }
    let revision = revision(name, MESH)?;
    Some(Config::Mesh { revision, yaml: text(MESH_KEY)? })
}

/// `default` for the bare name.
fn revision(name: &str, base: &str) -> Option<String> {
    let rest = name.strip_prefix(base)?;
    match rest.strip_prefix('-') {
        Some(revision) if !revision.is_empty() => Some(revision.to_owned()),
        None if rest.is_empty() => Some(crate::istio::DEFAULT_REVISION.to_owned()),
        _ => None,
    }
}
