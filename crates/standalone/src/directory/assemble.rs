//! From files to what is configured. Pure.
//!
//! Two answers from one set of files. For authorization, what can't be read counts as absent, never as its previous version.
//! For the mesh (and the endpoint's certificate), the last good version of a file stays in use until there is a better one.

use super::scan::Scan;
use crate::mesh::MeshConfig;
use onboarding_core::group::WorkloadGroup;
use onboarding_core::name::GroupName;
use onboarding_core::policy::Policy;
use onboarding_endpoint::backend::{PlaneSettings, TlsMaterial, enabling};
use onboarding_kinds::control_plane::ControlPlane;
use onboarding_kinds::fault::Fault;
use onboarding_kinds::manifest::{self, Manifest, Object};
use onboarding_kinds::mesh::Secret;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const DEFAULT_PROPAGATION_DELAY: Duration = Duration::from_secs(10);

/// What is remembered of the files from one reading to the next.
#[derive(Default)]
pub struct Files {
    known: BTreeMap<PathBuf, Known>,
    /// Of the last ControlPlane that could be read.
    propagation_delay: Option<Duration>,
}

struct Known {
    text: Option<String>,
    items: Vec<Manifest>,
    faults: Vec<Fault>,
    warnings: Vec<Fault>,
    policy_unreadable: bool,
    /// The mesh's part of the last version without faults in it.
    good: Option<Vec<Manifest>>,
    /// The mesh uses `good` instead of what is on the disk.
    stale: bool,
}

/// What a set of files means.
#[derive(Debug, Default, PartialEq)]
pub struct Assembled {
    pub plane: Option<PlaneSettings>,
    pub tls: Option<TlsMaterial>,
    pub policies: Vec<Policy>,
    pub groups: BTreeMap<GroupName, WorkloadGroup>,
    pub policy_unreadable: bool,
    pub faults: Vec<String>,
    pub warnings: Vec<String>,
    pub mesh: MeshConfig,
    /// How many files the mesh uses an older version of.
    pub stale_files: usize,
}

impl Files {
    /// Takes in what is on the disk now; what didn't change isn't parsed again. `uid`: the plane's, where the ControlPlane names none.
    pub fn assemble(&mut self, scan: Scan, uid: &str) -> Assembled {
        let mut out = Assembled::default();
        self.take_in(scan, &mut out);

        let current: Vec<Manifest> = self.known.values().flat_map(|known| known.items.iter().cloned()).collect();
        let between = manifest::cross_check(&current);
        for known in self.known.values() {
            out.policy_unreadable |= known.policy_unreadable;
            out.stale_files += usize::from(known.stale);
            out.faults.extend(known.faults.iter().map(Fault::to_string));
            out.warnings.extend(known.warnings.iter().map(Fault::to_string));
        }
        out.faults.extend(between.iter().map(Fault::to_string));
        let wrong = Wrong::new(&current, &between);
        out.policy_unreadable |= wrong.hides_a_policy();
        self.authorization(current, &wrong, uid, &mut out);
        self.lasting(&mut out);
        out
    }

    /// Parses what changed, forgets what is gone, marks what can't be read.
    fn take_in(&mut self, scan: Scan, out: &mut Assembled) {
        for (path, problem) in &scan.unreadable {
            out.faults.push(format!("{}: can't be read: {problem}", path.display()));
            out.policy_unreadable = true;
        }
        self.known.retain(|path, _| {
            scan.files.contains_key(path) || scan.unreadable.keys().any(|above| path.starts_with(above))
        });
        for (path, known) in &mut self.known {
            if !scan.files.contains_key(path) {
                known.lose();
            }
        }
        for (path, text) in scan.files {
            match text {
                Ok(text) => {
                    let known = self.known.get(&path);
                    if known.is_none_or(|known| known.text.as_deref() != Some(&text)) {
                        let good = self.known.remove(&path).and_then(|known| known.good);
                        let read = Known::read(&path.display().to_string(), text, good);
                        self.known.insert(path, read);
                    }
                }
                Err(problem) => {
                    out.faults.push(format!("{}: can't be read: {problem}", path.display()));
                    self.known.entry(path).or_insert_with(Known::nothing).lose();
                }
            }
        }
    }

    /// Who may join, and the endpoint's settings: only what is on the disk now, and right.
    fn authorization(&mut self, current: Vec<Manifest>, wrong: &Wrong, uid: &str, out: &mut Assembled) {
        let mut planes = Vec::new();
        for item in current {
            match item.object {
                Object::ControlPlane(plane) => planes.push(plane),
                object if wrong.has(&object) => {}
                Object::OnboardingPolicy(policy) => out.policies.push(policy),
                Object::WorkloadGroup(group) => {
                    out.groups.insert(group.name.clone(), group);
                }
                _ => {}
            }
        }
        out.policies.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        match enabling(&planes, "the manifests") {
            Ok((ControlPlane { namespace, name, .. }, onboarding)) => {
                self.propagation_delay = Some(onboarding.propagation_delay);
                out.plane = Some(PlaneSettings::new(onboarding, uid));
                out.tls = self.secret(namespace, &onboarding.secret_name);
                if out.tls.is_none() {
                    out.faults.push(format!(
                        "the Secret {namespace}/{} (type kubernetes.io/tls), which the ControlPlane {namespace}/{name} names as the endpoint's certificate, isn't in the manifests",
                        onboarding.secret_name
                    ));
                }
            }
            Err(why) => out.faults.push(why),
        }
    }

    /// The last good version of each file.
    fn lasting_items(&self) -> impl Iterator<Item = &Manifest> {
        self.known.values().flat_map(|known| match &known.good {
            Some(good) if known.stale => good.iter(),
            _ => known.items.iter(),
        })
    }

    fn secret(&self, namespace: &str, name: &str) -> Option<TlsMaterial> {
        self.lasting_items().find_map(|item| match &item.object {
            Object::Secret(Secret { namespace: n, name: m, certificate, private_key })
                if n == namespace && m == name =>
            {
                Some(TlsMaterial { certificate_chain: certificate.clone(), private_key: private_key.clone() })
            }
            _ => None,
        })
    }

    fn lasting(&self, out: &mut Assembled) {
        let mut sidecars = BTreeMap::new();
        let mut services = BTreeMap::new();
        let mut entries = BTreeMap::new();
        // Of two with one name (a fault that was said) the first in the order of files counts.
        for item in self.lasting_items() {
            match &item.object {
                Object::WorkloadGroup(group) => {
                    out.mesh.groups.entry(group.name.clone()).or_insert_with(|| Arc::new(group.clone()));
                }
                Object::Sidecar(sidecar) => {
                    sidecars.entry((&sidecar.namespace, &sidecar.name)).or_insert(sidecar);
                }
                Object::Service(service) => {
                    services.entry((&service.namespace, &service.name)).or_insert(service);
                }
                Object::ServiceEntry(entry) => {
                    entries.entry((&entry.namespace, &entry.name)).or_insert(entry);
                }
                _ => {}
            }
        }
        out.mesh.sidecars = sidecars.into_values().cloned().collect();
        out.mesh.services = services.into_values().cloned().collect();
        out.mesh.service_entries = entries.into_values().cloned().collect();
        out.mesh.propagation_delay = self.propagation_delay.unwrap_or(DEFAULT_PROPAGATION_DELAY);
    }
}

impl Known {
    fn nothing() -> Self {
        Self {
            text: None,
            items: Vec::new(),
            faults: Vec::new(),
            warnings: Vec::new(),
            policy_unreadable: false,
            good: None,
            stale: false,
        }
    }

    fn read(file: &str, text: String, good: Option<Vec<Manifest>>) -> Self {
        let read = manifest::read(file, &text);
        let mesh_faults = read.faults.iter().any(|fault| concerns_mesh(&fault.object));
        let good = if mesh_faults {
            good
        } else {
            Some(read.items.iter().filter(|item| lasts(&item.object)).cloned().collect())
        };
        Self {
            text: Some(text),
            stale: mesh_faults && good.is_some(),
            policy_unreadable: read.policy_unreadable
                || read.faults.iter().any(|fault| concerns_admission(&fault.object)),
            items: read.items,
            faults: read.faults,
            warnings: read.warnings,
            good,
        }
    }

    /// It can't be read any more: nothing of it counts but what the mesh knew.
    fn lose(&mut self) {
        let good = self.good.take();
        *self = Self { stale: good.is_some(), good, policy_unreadable: true, ..Self::nothing() };
    }
}

/// Whether a fault in this object (`KIND NAMESPACE/NAME`; empty where even the kind is unknown) is one of the mesh's part.
fn concerns_mesh(object: &str) -> bool {
    !matches!(
        kind(object),
        "OnboardingPolicy"
            | "ControlPlane"
            | "OnboardingConfiguration"
            | "AgentConfiguration"
            | "WorkloadAutoRegistration"
    )
}

/// Whether, with a fault in this object, nobody can say whom the manifests admit: sessions are suspended, not ended for good.
fn concerns_admission(object: &str) -> bool {
    matches!(kind(object), "OnboardingPolicy" | "ControlPlane" | "WorkloadGroup" | "")
}

fn kind(object: &str) -> &str {
    object.split(' ').next().unwrap_or_default()
}

fn lasts(object: &Object) -> bool {
    matches!(
        object,
        Object::WorkloadGroup(_)
            | Object::Sidecar(_)
            | Object::Service(_)
            | Object::ServiceEntry(_)
            | Object::Secret(_)
    )
}

/// Objects that are right in themselves, but not beside the others.
struct Wrong(BTreeSet<(&'static str, String, String)>);

impl Wrong {
    fn new(items: &[Manifest], between: &[Fault]) -> Self {
        let mut seen = BTreeSet::new();
        let mut wrong = BTreeSet::new();
        let named: BTreeSet<&str> = between.iter().map(|fault| fault.object.as_str()).collect();
        for key in items.iter().filter_map(|item| key(&item.object)) {
            // Of two with one name nobody can say which is meant.
            if named.contains(format!("{} {}/{}", key.0, key.1, key.2).as_str()) || !seen.insert(key.clone()) {
                wrong.insert(key);
            }
        }
        Self(wrong)
    }

    fn has(&self, object: &Object) -> bool {
        key(object).is_some_and(|key| self.0.contains(&key))
    }

    fn hides_a_policy(&self) -> bool {
        !self.0.is_empty()
    }
}

/// Of the kinds that authorization uses.
fn key(object: &Object) -> Option<(&'static str, String, String)> {
    match object {
        Object::OnboardingPolicy(policy) => Some(("OnboardingPolicy", policy.namespace.clone(), policy.name.clone())),
        Object::WorkloadGroup(group) => Some(("WorkloadGroup", group.name.namespace.clone(), group.name.name.clone())),
        Object::ControlPlane(plane) => Some(("ControlPlane", plane.namespace.clone(), plane.name.clone())),
        _ => None,
    }
}
