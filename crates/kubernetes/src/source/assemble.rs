//! From the objects of the cluster to what is configured. Pure.
//!
//! Two answers from one set of objects, as everywhere: for authorization, what can't be read counts as absent, never as its
//! previous version; for the mesh and the endpoint's certificate, the last good version of an object stays in use while its
//! newest has faults.

use super::objects::{Config, Fault, Held, Key, Kind, Objects, PLANE_CONFIG, PLANE_CONFIG_KEY};
use super::uid;
use super::{ClusterView, GroupRef, PolicyObject};
use crate::istio::{ISTIO_SYSTEM, Inputs, Mesh, Meshes, Namespace};
use crate::registry::groups::{GroupObject, Groups};
use onboarding_core::group::WorkloadGroup;
use onboarding_core::name::GroupName;
use onboarding_core::policy::Policy;
use onboarding_endpoint::backend::{PlaneSettings, TlsMaterial, enabling};
use onboarding_kinds::control_plane::{ControlPlane, Onboarding};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

const DEFAULT_PROPAGATION_DELAY: Duration = Duration::from_secs(10);

/// What stands in the way of trusting the objects, whatever is in them.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Trouble {
    /// Not yet seen, or too long ago: nobody can say who is admitted.
    pub unknown: bool,
    /// Not yet seen: what isn't there may be there.
    pub unlisted: BTreeSet<Kind>,
    pub faults: Vec<String>,
}

/// What a set of objects means.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Assembled {
    pub plane: Option<PlaneSettings>,
    pub tls: Option<TlsMaterial>,
    pub policies: Vec<Policy>,
    pub groups: HashMap<GroupName, Arc<WorkloadGroup>>,
    pub policy_unreadable: bool,
    pub faults: Vec<String>,
    pub warnings: Vec<String>,
    pub inputs: Inputs,
    pub owners: Groups,
    pub view: ClusterView,
    /// Which Secret the ControlPlane names.
    pub secret_name: Option<String>,
    /// The ControlPlane names no UID and none is kept.
    pub wants_uid: bool,
    pub onboarding: Option<Onboarding>,
}

/// `namespace`: the plane's. `before`: the last answer, whose parts are used again where they are the same.
pub(crate) fn assemble(objects: &Objects, trouble: &Trouble, namespace: &str, before: &Assembled) -> Assembled {
    let mut out = Assembled { faults: trouble.faults.clone(), ..Assembled::default() };
    faults(objects, &mut out);
    admission(objects, trouble, &mut out);
    plane(objects, trouble, namespace, before, &mut out);
    out.inputs = inputs(objects, namespace, &out, &before.inputs);
    out.owners = owners(objects);
    out.view = view(objects);
    out
}

fn faults(objects: &Objects, out: &mut Assembled) {
    let mut say = |faults: &[Fault], warnings: &[Fault]| {
        out.faults.extend(faults.iter().map(|fault| fault.of_object.clone()));
        out.warnings.extend(warnings.iter().map(|warning| warning.of_object.clone()));
    };
    objects.planes.values().for_each(|held| say(&held.faults, &held.warnings));
    objects.secrets.values().for_each(|held| say(&held.faults, &held.warnings));
    objects.policies.values().for_each(|held| say(&held.faults, &held.warnings));
    objects.groups.values().for_each(|held| say(&held.faults, &held.warnings));
    objects.sidecars.values().for_each(|held| say(&held.faults, &held.warnings));
}

/// Who may join what: only what is right now.
fn admission(objects: &Objects, trouble: &Trouble, out: &mut Assembled) {
    out.policy_unreadable =
        trouble.unknown || any_faults(&objects.policies) || any_faults(&objects.groups) || any_faults(&objects.planes);
    if !trouble.unknown {
        out.policies = objects.policies.values().filter_map(|held| held.now.as_deref().cloned()).collect();
    }
    let groups = objects.groups.values().filter_map(|held| held.now.clone());
    out.groups = groups.map(|group| (group.name.clone(), group)).collect();
}

fn any_faults<T>(objects: &BTreeMap<Key, Held<T>>) -> bool {
    objects.values().any(|held| !held.faults.is_empty())
}

fn plane(objects: &Objects, trouble: &Trouble, namespace: &str, before: &Assembled, out: &mut Assembled) {
    // That of the last ControlPlane that could be read: only the mesh's part of it is used.
    out.onboarding.clone_from(&before.onboarding);
    let planes: Vec<&ControlPlane> = objects.planes.values().filter_map(|held| held.now.as_ref()).collect();
    let (plane, onboarding) = match enabling(planes, &format!("namespace {namespace}")) {
        Ok(found) => found,
        Err(why) => {
            out.faults.push(why);
            // One with faults may name it still.
            out.secret_name.clone_from(&before.secret_name);
            if !any_faults(&objects.planes) {
                out.onboarding = None;
                out.secret_name = None;
            }
            return;
        }
    };
    out.onboarding = Some(onboarding.clone());
    out.secret_name = Some(onboarding.secret_name.clone());
    let secret = objects.secrets.get(&(namespace.to_owned(), onboarding.secret_name.clone()));
    let named_by = format!("which the ControlPlane {namespace}/{} names as the endpoint's certificate", plane.name);
    match secret.map(|held| held.good.clone()) {
        Some(Some(Some(tls))) => out.tls = Some(tls),
        Some(Some(None)) => out.faults.push(format!(
            "the Secret {namespace}/{}, {named_by}, isn't of type kubernetes.io/tls",
            onboarding.secret_name
        )),
        // Its faults were said.
        Some(None) => {}
        None if trouble.unlisted.contains(&Kind::Secret) => {}
        None => out.faults.push(format!(
            "the Secret {namespace}/{}, {named_by}, isn't there; create it: kubectl create secret tls {} -n {namespace} --cert=FILE --key=FILE",
            onboarding.secret_name, onboarding.secret_name
        )),
    }
    let kept = match objects.configs.get(PLANE_CONFIG) {
        Some(Config::Plane(config)) => uid::read(config.yaml.as_deref()),
        _ => Ok(None),
    };
    let uid = match (&onboarding.uid, kept) {
        (Some(uid), _) => uid.clone(),
        (None, Ok(Some(uid))) => uid,
        (None, Ok(None)) if trouble.unlisted.contains(&Kind::ConfigMaps) => return,
        (None, Ok(None)) => {
            out.wants_uid = true;
            out.faults.push(format!(
                "the plane has no UID yet: the ControlPlane {namespace}/{} sets none, and one that is made is being stored in the ConfigMap {namespace}/{PLANE_CONFIG}",
                plane.name
            ));
            return;
        }
        (None, Err(why)) => {
            out.faults.push(format!(
                "the plane's UID can't be read: ConfigMap {namespace}/{PLANE_CONFIG}, key {PLANE_CONFIG_KEY}: {why}; correct it, or set spec.meshExpansion.onboarding.uid"
            ));
            return;
        }
    };
    out.plane = Some(PlaneSettings::new(onboarding, &uid));
}

fn inputs(objects: &Objects, namespace: &str, out: &Assembled, before: &Inputs) -> Inputs {
    let mut namespaces: BTreeMap<String, Namespace> = BTreeMap::new();
    for (name, revision) in &objects.revisions {
        namespaces.entry(name.clone()).or_default().revision = Some(revision.clone());
    }
    let mut sidecars: Vec<_> = objects.sidecars.values().filter_map(|held| Some((held, held.good.as_ref()?))).collect();
    sidecars.sort_by(|(a, _), (b, _)| a.created.cmp(&b.created));
    for (_, sidecar) in sidecars {
        namespaces
            .entry(sidecar.namespace.clone())
            .or_default()
            .sidecars
            .push(onboarding_kinds::mesh::Sidecar::clone(sidecar));
    }
    let roots = objects.configs.values().find_map(|config| match config {
        Config::RootCertificates(pem) => Some(pem.clone()),
        _ => None,
    });
    if let Some(roots) = roots {
        // Where istiod is, whatever the plane's own namespace is called: the root is the same.
        namespaces.entry(ISTIO_SYSTEM.to_owned()).or_default().root_certificates = Some(roots.clone());
        namespaces.entry(namespace.to_owned()).or_default().root_certificates = Some(roots);
    }
    let held = |name: &str| before.namespaces.get(name);
    let namespaces = namespaces.into_iter().map(|(name, namespace)| {
        let namespace = match held(&name) {
            Some(held) if **held == namespace => held.clone(),
            _ => Arc::new(namespace),
        };
        (name, namespace)
    });
    let meshes = meshes(objects);
    Inputs {
        meshes: if *before.meshes == meshes { before.meshes.clone() } else { Arc::new(meshes) },
        namespaces: namespaces.collect(),
        groups: objects
            .groups
            .values()
            .filter_map(|held| held.good.clone())
            .map(|group| (group.name.clone(), group))
            .collect(),
        custom_gateway: objects.planes.values().find_map(|held| held.good.as_ref()?.custom_gateway.clone()),
        propagation_delay: out
            .onboarding
            .as_ref()
            .map_or(DEFAULT_PROPAGATION_DELAY, |onboarding| onboarding.propagation_delay),
        names: objects.names(&before.names),
    }
}

fn meshes(objects: &Objects) -> Meshes {
    let injector = |wanted: &str| {
        objects.configs.values().find_map(|config| match config {
            Config::Injector { revision, values } if revision == wanted => Some(values.as_str()),
            _ => None,
        })
    };
    let mut meshes = Meshes::default();
    for config in objects.configs.values() {
        if let Config::Mesh { revision, yaml } = config {
            meshes.by_revision.insert(revision.clone(), Mesh::read(yaml, injector(revision)));
        }
    }
    // Of two that claim one tag, the first by name.
    for (tag, revision) in objects.tags.values() {
        meshes.tags.entry(tag.clone()).or_insert_with(|| revision.clone());
    }
    meshes
}

/// Who owns registrations, and what entries are made of.
fn owners(objects: &Objects) -> Groups {
    let owners = objects.groups.values().filter_map(|held| {
        let group = held.good.clone()?;
        let object = GroupObject { group, uid: held.uid.clone(), generation: held.generation };
        Some((object.group.name.clone(), object))
    });
    owners.collect()
}

fn view(objects: &Objects) -> ClusterView {
    let policies = objects.policies.iter().map(|((namespace, name), held)| PolicyObject {
        namespace: namespace.clone(),
        name: name.clone(),
        uid: held.uid.clone(),
        generation: held.generation,
        is_read: held.now.is_some(),
        faults: held.faults.iter().map(|fault| fault.of_field.clone()).collect(),
        warnings: held.warnings.iter().map(|warning| warning.of_field.clone()).collect(),
        status: held.status.clone(),
    });
    let groups = objects.groups.iter().map(|((namespace, name), held)| {
        let name = GroupName { namespace: namespace.clone(), name: name.clone() };
        (name, GroupRef { uid: held.uid.clone() })
    });
    ClusterView {
        policies: policies.collect(),
        groups: groups.collect(),
        control_plane: objects.planes.values().find_map(|held| held.good.clone()),
    }
}
