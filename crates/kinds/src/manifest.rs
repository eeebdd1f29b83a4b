//! A stream of YAML documents to typed manifests.

use crate::control_plane::{self, ControlPlane};
use crate::fault::{Fault, shown};
use crate::mesh::{self, Secret, Service, ServiceEntry, Sidecar};
use crate::node::{self, Node, SyntaxError, Value};
use crate::reader::{Document, Item, Map, closest, did_you_mean};
use crate::{agent, group, policy, syntax, war};
use onboarding_core::group::WorkloadGroup;
use onboarding_core::label::Labels;
use onboarding_core::policy::Policy;
use std::collections::HashMap;

/// What a file holds: the documents that are valid, the faults of those that aren't, and what is allowed but unwise.
#[derive(Debug, Default)]
pub struct Manifests {
    pub items: Vec<Manifest>,
    pub faults: Vec<Fault>,
    pub warnings: Vec<Fault>,
    /// Faults are in, or may be in, an OnboardingPolicy (a policy document with faults, or a syntax error that hides what it is).
    pub policy_unreadable: bool,
}

#[derive(Debug, Clone)]
pub struct Manifest {
    pub file: String,
    pub line: usize,
    pub object: Object,
}

/// Kinds of others are skipped and not listed.
#[derive(Debug, Clone)]
pub enum Object {
    OnboardingPolicy(Policy),
    ControlPlane(ControlPlane),
    WorkloadGroup(WorkloadGroup),
    Sidecar(Sidecar),
    ServiceEntry(ServiceEntry),
    Service(Service),
    /// `kubernetes.io/tls` only.
    Secret(Secret),
    /// Also one of the agent's files is recognised, so that `lint` checks it.
    OnboardingConfiguration(Box<crate::agent::OnboardingConfiguration>),
    AgentConfiguration(Box<crate::agent::AgentConfiguration>),
    WorkloadAutoRegistration(Box<crate::war::WorkloadAutoRegistration>),
}

/// More faults of one file than anybody reads.
const MOST_FAULTS: usize = 1000;

/// Reads every document of `text` (YAML, of which JSON is a part). `file` only names it in faults.
pub fn read(file: &str, text: &str) -> Manifests {
    let mut manifests = Manifests::default();
    for document in node::documents(text) {
        if manifests.faults.len() >= MOST_FAULTS {
            let line = document.map_or_else(|error| error.line, |node| node.line);
            let message = "there are too many faults above; the rest of the file wasn't read".to_owned();
            manifests.faults.push(syntax_fault(file, SyntaxError { line, message }));
            manifests.policy_unreadable = true;
            break;
        }
        match document {
            Ok(node) => read_document(file, &node, &mut manifests, read_object),
            Err(error) => {
                manifests.faults.push(syntax_fault(file, error));
                // It may hide any document, whatever could be made out of it.
                manifests.policy_unreadable = true;
            }
        }
    }
    manifests
}

/// A file of the agent: exactly one document, of the wanted kind.
pub(crate) fn read_single<T>(
    file: &str,
    text: &str,
    wanted: &str,
    pick: impl Fn(Object) -> Option<T>,
) -> Result<T, Vec<Fault>> {
    let fault = |line, path: &str, message| Fault {
        file: file.to_owned(),
        line,
        object: wanted.to_owned(),
        path: path.to_owned(),
        message,
    };
    let mut manifests = Manifests::default();
    let mut documents = node::documents(text);
    match documents.next() {
        None => manifests.faults.push(fault(1, "", format!("the file is empty, and must hold one {wanted}"))),
        Some(Err(error)) => manifests.faults.push(syntax_fault(file, error)),
        Some(Ok(node)) => match node.get("kind").map(|kind| (kind.line, kind.value.as_text())) {
            Some((line, Some(kind))) if kind != wanted => {
                manifests.faults.push(fault(line, "kind", wrong_kind(kind, wanted)));
            }
            _ => read_document(file, &node, &mut manifests, read_file_of_agent),
        },
    }
    for document in documents.take(10) {
        manifests.faults.push(match document {
            Ok(node) => fault(node.line, "", format!("is a second document; the file must hold one {wanted}")),
            Err(error) => syntax_fault(file, error),
        });
    }
    match manifests.items.pop().and_then(|manifest| pick(manifest.object)) {
        Some(object) if manifests.faults.is_empty() => Ok(object),
        None if manifests.faults.is_empty() => Err(vec![fault(1, "", format!("the file must hold one {wanted}"))]),
        _ => Err(manifests.faults),
    }
}

fn wrong_kind(kind: &str, wanted: &str) -> String {
    let place = match kind {
        "OnboardingConfiguration" => {
            "; an OnboardingConfiguration belongs into /etc/onboarding-agent/onboarding.config.yaml"
        }
        "AgentConfiguration" => "; an AgentConfiguration belongs into /etc/onboarding-agent/agent.config.yaml",
        _ => "",
    };
    format!("must be {wanted} in this file, and is {}{place}{}", shown(kind), did_you_mean(kind, &[wanted]))
}

fn syntax_fault(file: &str, error: SyntaxError) -> Fault {
    Fault {
        file: file.to_owned(),
        line: error.line,
        object: String::new(),
        path: String::new(),
        message: error.message,
    }
}

/// A kind that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    OnboardingPolicy,
    ControlPlane,
    WorkloadGroup,
    Sidecar,
    ServiceEntry,
    Service,
    Secret,
    OnboardingConfiguration,
    AgentConfiguration,
    WorkloadAutoRegistration,
    List,
}

struct Known {
    group: &'static str,
    versions: &'static [&'static str],
    name: &'static str,
    kind: Kind,
}

const ISTIO: &str = "networking.istio.io";
const ISTIO_VERSIONS: &[&str] = &["v1alpha3", "v1beta1", "v1"];
const OUR_GROUPS: [&str; 4] = [
    "authorization.onboarding.tetrate.io",
    "runtime.onboarding.tetrate.io",
    "config.agent.onboarding.tetrate.io",
    INSTALL,
];
/// Also has kinds that aren't ours (ManagementPlane), so only what looks like a slip of ControlPlane is a fault there.
const INSTALL: &str = "install.tetrate.io";

const KNOWN: [Known; 11] = [
    Known { group: OUR_GROUPS[0], versions: &["v1alpha1"], name: "OnboardingPolicy", kind: Kind::OnboardingPolicy },
    Known {
        group: OUR_GROUPS[1],
        versions: &["v1alpha1"],
        name: "WorkloadAutoRegistration",
        kind: Kind::WorkloadAutoRegistration,
    },
    Known {
        group: OUR_GROUPS[2],
        versions: &["v1alpha1"],
        name: "OnboardingConfiguration",
        kind: Kind::OnboardingConfiguration,
    },
    Known { group: OUR_GROUPS[2], versions: &["v1alpha1"], name: "AgentConfiguration", kind: Kind::AgentConfiguration },
    Known { group: INSTALL, versions: &["v1alpha1"], name: "ControlPlane", kind: Kind::ControlPlane },
    Known { group: ISTIO, versions: ISTIO_VERSIONS, name: "WorkloadGroup", kind: Kind::WorkloadGroup },
    Known { group: ISTIO, versions: ISTIO_VERSIONS, name: "Sidecar", kind: Kind::Sidecar },
    Known { group: ISTIO, versions: ISTIO_VERSIONS, name: "ServiceEntry", kind: Kind::ServiceEntry },
    Known { group: "", versions: &["v1"], name: "Service", kind: Kind::Service },
    Known { group: "", versions: &["v1"], name: "Secret", kind: Kind::Secret },
    Known { group: "", versions: &["v1"], name: "List", kind: Kind::List },
];

/// What `apiVersion` and `kind` make of a document.
enum Class {
    Known(Kind),
    /// Ours beyond doubt, with something wrong in its heading; read on if the kind is clear.
    Misspelt {
        field: &'static str,
        message: String,
        kind: Option<Kind>,
    },
    OfOthers,
}

fn classify(api_version: &str, kind: &str) -> Class {
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    if let Some(known) = KNOWN.iter().find(|known| known.group == group && known.name == kind) {
        if known.versions.contains(&version) {
            return Class::Known(known.kind);
        }
        if group.is_empty() {
            return Class::OfOthers;
        }
        let right = known.versions.iter().map(|version| format!("{group}/{version}")).collect::<Vec<_>>().join(" or ");
        let message = format!("{} isn't known for {kind}; it is {right}", shown(api_version));
        return Class::Misspelt { field: "apiVersion", message, kind: Some(known.kind) };
    }
    if OUR_GROUPS.contains(&group) {
        let names: Vec<_> = KNOWN.iter().filter(|known| known.group == group).map(|known| known.name).collect();
        let near = closest(kind, &names);
        if group == INSTALL && near.is_none() {
            return Class::OfOthers;
        }
        let message = format!("{} isn't a kind of {group}{}", shown(kind), did_you_mean(kind, &names));
        let near = KNOWN.iter().find(|known| Some(known.name) == near);
        return Class::Misspelt { field: "kind", message, kind: near.map(|known| known.kind) };
    }
    // A group that is nobody's, for a kind that can only be ours, or one that is a slip of ours.
    let ours = KNOWN.iter().find(|known| OUR_GROUPS.contains(&known.group) && known.name == kind);
    let slip = closest(group, &OUR_GROUPS).is_some() && !group.is_empty();
    match ours {
        Some(ours) if slip || ours.group != INSTALL => {
            let message = format!(
                "{} isn't known for {kind}; did you mean {}/{}?",
                shown(api_version),
                ours.group,
                ours.versions[0]
            );
            Class::Misspelt { field: "apiVersion", message, kind: Some(ours.kind) }
        }
        None if slip && closest(group, &OUR_GROUPS) != Some(INSTALL) => {
            let message = format!("{} isn't known{}", shown(api_version), did_you_mean(group, &OUR_GROUPS));
            Class::Misspelt { field: "apiVersion", message, kind: None }
        }
        _ => Class::OfOthers,
    }
}

/// Whether a document that can't be read may have been meant as a policy.
fn may_be_policy(api_version: Option<&str>, kind: Option<&str>) -> bool {
    let group = api_version.map(|text| text.rsplit_once('/').map_or(text, |(group, _)| group));
    group.is_some_and(|group| closest(group, &OUR_GROUPS) == Some(OUR_GROUPS[0]))
        || kind.is_none_or(|kind| closest(kind, &["OnboardingPolicy"]).is_some())
}

fn read_document(file: &str, node: &Node, manifests: &mut Manifests, read: ReadObject) {
    let heading = |key| node.get(key).and_then(|entry| entry.value.as_text());
    let (api_version, kind) = (heading("apiVersion"), heading("kind"));
    let class = match (api_version, kind) {
        (Some(api_version), Some(kind)) => classify(api_version, kind),
        _ => {
            let document = Document::new(file, kind.unwrap_or_default().to_owned());
            if let Some(mut root) = document.root(node).map() {
                for key in ["apiVersion", "kind"] {
                    root.required(key).and_then(|item| item.text());
                }
                root.close_misspelt();
            }
            manifests.faults.extend(document.finish().0);
            manifests.policy_unreadable |= may_be_policy(api_version, kind);
            return;
        }
    };
    let name_of = |key| node.get("metadata").and_then(|entry| entry.value.get(key)?.value.as_text());
    let (kind, misspelt) = match class {
        Class::OfOthers if !heading_is_doubled(node) => return,
        Class::OfOthers => (None, Some(("kind", "is there twice, so nobody can say what this is".to_owned()))),
        Class::Known(Kind::List) => return read_list(file, node, manifests, read),
        Class::Known(kind) => (Some(kind), None),
        Class::Misspelt { field, message, kind } => (kind, Some((field, message))),
    };
    let object = match kind {
        Some(Kind::OnboardingConfiguration | Kind::AgentConfiguration) => {
            heading("kind").unwrap_or_default().to_owned()
        }
        _ => format!(
            "{} {}/{}",
            heading("kind").unwrap_or_default(),
            name_of("namespace").unwrap_or("default"),
            name_of("name").unwrap_or("?")
        ),
    };
    let document = Document::new(file, object);
    let root = document.root(node);
    if let Some((field, message)) = misspelt {
        root.fault_at(field, message);
    }
    let object = kind.and_then(|kind| read(kind, &root));
    let (faults, warnings) = document.finish();
    if faults.is_empty() {
        manifests.warnings.extend(warnings);
        manifests.items.extend(object.map(|object| Manifest { file: file.to_owned(), line: node.line, object }));
    } else {
        manifests.policy_unreadable |=
            kind == Some(Kind::OnboardingPolicy) || may_be_policy(api_version, heading("kind"));
        manifests.faults.extend(faults);
    }
}

fn heading_is_doubled(node: &Node) -> bool {
    let Value::Map(entries) = &node.value else { return false };
    ["apiVersion", "kind"].iter().any(|key| entries.iter().filter(|entry| entry.key == *key).count() > 1)
}

/// `kind: List`, as kubectl writes several objects.
fn read_list(file: &str, node: &Node, manifests: &mut Manifests, read: ReadObject) {
    let Some(items) = node.get("items") else { return };
    match &items.value.value {
        Value::List(items) => items.iter().for_each(|item| read_document(file, item, manifests, read)),
        _ => {
            let document = Document::new(file, "List".to_owned());
            document.fault(items.line, "items", "must be a list");
            manifests.faults.extend(document.finish().0);
            manifests.policy_unreadable = true;
        }
    }
}

/// `None` where there are faults, and for a Secret that isn't of TLS.
type ReadObject = fn(Kind, &Item<'_>) -> Option<Object>;

/// Apart from the others, so that the agent hasn't what reads those in its binary.
fn read_file_of_agent(kind: Kind, item: &Item<'_>) -> Option<Object> {
    let mut root = item.map()?;
    root.skip("apiVersion");
    root.skip("kind");
    let object = match kind {
        Kind::OnboardingConfiguration => {
            agent::onboarding_configuration(&mut root).map(Box::new).map(Object::OnboardingConfiguration)
        }
        Kind::AgentConfiguration => agent::agent_configuration(&mut root).map(Box::new).map(Object::AgentConfiguration),
        _ => return None,
    };
    root.close();
    object
}

fn read_object(kind: Kind, item: &Item<'_>) -> Option<Object> {
    match kind {
        Kind::OnboardingConfiguration | Kind::AgentConfiguration => return read_file_of_agent(kind, item),
        Kind::Secret if item.node().get("type").and_then(|entry| entry.value.as_text()) != Some(mesh::TLS_SECRET) => {
            return None;
        }
        _ => {}
    }
    let mut root = item.map()?;
    root.skip("apiVersion");
    root.skip("kind");
    let ours = matches!(kind, Kind::OnboardingPolicy | Kind::WorkloadAutoRegistration);
    let metadata = metadata(&mut root, ours);
    Some(match kind {
        Kind::OnboardingPolicy => {
            let rules = policy::rules(&mut root);
            root.skip("status");
            root.close();
            let Metadata { namespace, name, .. } = metadata?;
            Object::OnboardingPolicy(Policy { namespace, name, rules })
        }
        Kind::WorkloadAutoRegistration => {
            let spec = war::spec(&mut root);
            root.skip("status");
            root.close();
            let Metadata { namespace, name, .. } = metadata?;
            Object::WorkloadAutoRegistration(Box::new(war::WorkloadAutoRegistration { namespace, name, spec: spec? }))
        }
        Kind::ControlPlane => {
            let (onboarding, custom_gateway) = control_plane::mesh_expansion(&mut root);
            let Metadata { namespace, name, .. } = metadata?;
            Object::ControlPlane(ControlPlane { namespace, name, onboarding, custom_gateway })
        }
        Kind::WorkloadGroup => Object::WorkloadGroup(group::read(&mut root, metadata)?),
        Kind::Sidecar => Object::Sidecar(mesh::sidecar(&mut root, metadata)?),
        Kind::ServiceEntry => Object::ServiceEntry(mesh::service_entry(&mut root, metadata)?),
        Kind::Service => Object::Service(mesh::service(&mut root, metadata)?),
        Kind::Secret => Object::Secret(mesh::secret(&mut root, metadata)?),
        Kind::OnboardingConfiguration | Kind::AgentConfiguration | Kind::List => return None,
    })
}

/// What is read of `metadata`.
pub(crate) struct Metadata {
    pub namespace: String,
    pub name: String,
    pub labels: Labels,
}

fn metadata(root: &mut Map<'_>, closed: bool) -> Option<Metadata> {
    let mut metadata = root.required("metadata")?.map()?;
    let name = metadata.required_as("name", syntax::resource_name);
    let namespace =
        metadata.optional("namespace").map_or(Some("default".to_owned()), |item| item.parse(syntax::namespace));
    let labels = metadata.labels("labels");
    if closed {
        for key in OBJECT_META {
            metadata.skip(key);
        }
        metadata.close();
    }
    Some(Metadata { namespace: namespace?, name: name?, labels })
}

/// The other fields of Kubernetes' ObjectMeta.
const OBJECT_META: [&str; 12] = [
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

impl Object {
    /// Kind, namespace and name; `None` for the agent's files, which have no name.
    pub fn identity(&self) -> Option<(&'static str, &str, &str)> {
        Some(match self {
            Self::OnboardingPolicy(o) => ("OnboardingPolicy", &o.namespace, &o.name),
            Self::ControlPlane(o) => ("ControlPlane", &o.namespace, &o.name),
            Self::WorkloadGroup(o) => ("WorkloadGroup", &o.name.namespace, &o.name.name),
            Self::Sidecar(o) => ("Sidecar", &o.namespace, &o.name),
            Self::ServiceEntry(o) => ("ServiceEntry", &o.namespace, &o.name),
            Self::Service(o) => ("Service", &o.namespace, &o.name),
            Self::Secret(o) => ("Secret", &o.namespace, &o.name),
            Self::WorkloadAutoRegistration(o) => ("WorkloadAutoRegistration", &o.namespace, &o.name),
            Self::OnboardingConfiguration(_) | Self::AgentConfiguration(_) => return None,
        })
    }
}

/// What is wrong between objects: two of one name, a ControlPlane whose Secret is missing is NOT a fault here (it may come later).
pub fn cross_check(items: &[Manifest]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut seen: HashMap<_, &Manifest> = HashMap::new();
    let mut enabled: Option<&Manifest> = None;
    for item in items {
        let Some(identity) = item.object.identity() else { continue };
        let fault = |path: &str, message: String| Fault {
            file: item.file.clone(),
            line: item.line,
            object: format!("{} {}/{}", identity.0, identity.1, identity.2),
            path: path.to_owned(),
            message,
        };
        if let Some(first) = seen.get(&identity) {
            faults.push(fault("metadata.name", format!("is there twice, first at {}:{}", first.file, first.line)));
            continue;
        }
        seen.insert(identity, item);
        if matches!(&item.object, Object::ControlPlane(plane) if plane.onboarding.is_some()) {
            match enabled {
                Some(first) => faults.push(fault(
                    "spec.meshExpansion.onboarding",
                    format!("another ControlPlane enables onboarding, at {}:{}; one may", first.file, first.line),
                )),
                None => enabled = Some(item),
            }
        }
    }
    faults
}
