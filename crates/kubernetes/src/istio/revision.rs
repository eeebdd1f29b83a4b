//! Which control plane a workload belongs to.

use super::inputs::{DEFAULT_REVISION, ISTIO_SYSTEM, Meshes, Namespace, REVISION_LABEL};
use super::mesh::Mesh;
use onboarding_core::group::WorkloadGroup;
use onboarding_core::registration::SidecarReport;

/// A control plane that there is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Revision<'a> {
    /// [`DEFAULT_REVISION`] for that of ConfigMap `istio`.
    pub name: &'a str,
    pub mesh: &'a Mesh,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum RevisionError {
    #[error(
        "{source_of_it} asks for the Istio revision {wanted:?}, which isn't in the cluster; there are: {known}; name one of them there, or install that revision"
    )]
    Unknown { wanted: String, source_of_it: &'static str, known: String },
    #[error(
        "nothing says which Istio revision this workload belongs to, and there are: {known}; set sidecar.istio.revision in the agent's configuration, or the label istio.io/rev on the WorkloadGroup or its namespace"
    )]
    Several { known: String },
    #[error("there is no ConfigMap istio or istio-<revision> in {ISTIO_SYSTEM}: is Istio installed?")]
    None,
    #[error("the mesh configuration of the Istio revision {revision} can't be used: {fault}")]
    Unreadable { revision: String, fault: String },
}

/// What the agent asks for, else the label [`REVISION_LABEL`] of the group, else that of its namespace, else the default
/// revision, else the only one there is.
pub(super) fn choose<'a>(
    meshes: &'a Meshes,
    report: &SidecarReport,
    group: &WorkloadGroup,
    namespace: &Namespace,
) -> Result<Revision<'a>, RevisionError> {
    let by_agent = match report {
        SidecarReport::Istio { revision, .. } => revision.as_deref(),
        SidecarReport::Envoy { .. } => None,
    };
    let of_group = group.labels.get(REVISION_LABEL).or_else(|| group.workload_labels.get(REVISION_LABEL));
    let wanted = [
        (by_agent, "sidecar.istio.revision of the agent's configuration"),
        (of_group.map(String::as_str), "the label istio.io/rev of the WorkloadGroup"),
        (namespace.revision.as_deref(), "the label istio.io/rev of the namespace"),
    ];
    let wanted = wanted.into_iter().find_map(|(name, whose)| Some((name.filter(|name| !name.is_empty())?, whose)));
    let found = match wanted {
        Some((name, source_of_it)) => find(meshes, name).ok_or_else(|| RevisionError::Unknown {
            wanted: name.chars().take(64).collect(),
            source_of_it,
            known: known(meshes),
        })?,
        None => match (find(meshes, DEFAULT_REVISION), meshes.by_revision.len()) {
            (Some(found), _) => found,
            (None, 0) => return Err(RevisionError::None),
            (None, 1) => meshes.by_revision.iter().next().ok_or(RevisionError::None)?,
            (None, _) => return Err(RevisionError::Several { known: known(meshes) }),
        },
    };
    match found {
        (name, Ok(mesh)) => Ok(Revision { name, mesh }),
        (name, Err(fault)) => Err(RevisionError::Unreadable { revision: name.clone(), fault: fault.clone() }),
    }
}

/// By tag, else by name: the tag `default` says which revision pods get.
fn find<'a>(meshes: &'a Meshes, name: &str) -> Option<(&'a String, &'a Result<Mesh, String>)> {
    let tagged = meshes.tags.get(name).and_then(|revision| meshes.by_revision.get_key_value(revision));
    tagged.or_else(|| meshes.by_revision.get_key_value(name))
}

fn known(meshes: &Meshes) -> String {
    let mut names: Vec<&str> = meshes.by_revision.keys().chain(meshes.tags.keys()).map(String::as_str).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

impl Revision<'_> {
    /// The name in the certificate of its istiod, and the SNI by which the gateway routes to it.
    pub fn istiod_san(&self) -> String {
        match self.name {
            DEFAULT_REVISION => format!("istiod.{ISTIO_SYSTEM}.svc"),
            name => format!("istiod-{name}.{ISTIO_SYSTEM}.svc"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::fixtures::group;

    fn meshes(revisions: &[&str], tags: &[(&str, &str)]) -> Meshes {
        Meshes {
            by_revision: revisions.iter().map(|name| ((*name).to_owned(), Mesh::read("", None))).collect(),
            tags: tags.iter().map(|(tag, revision)| ((*tag).to_owned(), (*revision).to_owned())).collect(),
        }
    }

    fn report(revision: &str) -> SidecarReport {
        SidecarReport::Istio { version: "1.29".to_owned(), revision: Some(revision.to_owned()) }
    }

    fn labelled(revision: &str) -> WorkloadGroup {
        let mut group = group();
        group.labels.insert(REVISION_LABEL.to_owned(), revision.to_owned());
        group
    }

    fn namespace(revision: Option<&str>) -> Namespace {
        Namespace { revision: revision.map(str::to_owned), ..Namespace::default() }
    }

    #[test]
    fn the_nearest_says_which() {
        let meshes = meshes(&["default", "a", "b", "c"], &[("prod", "b")]);
        let chosen = |report: &SidecarReport, group: &WorkloadGroup, of_namespace: Option<&str>| {
            choose(&meshes, report, group, &namespace(of_namespace)).unwrap().name.to_owned()
        };
        assert_eq!(chosen(&report("a"), &labelled("b"), Some("c")), "a");
        assert_eq!(chosen(&report(""), &labelled("b"), Some("c")), "b");
        assert_eq!(chosen(&SidecarReport::default(), &group(), Some("c")), "c");
        assert_eq!(chosen(&SidecarReport::default(), &group(), None), "default");
        assert_eq!(chosen(&report("prod"), &group(), None), "b");
        assert_eq!(chosen(&report("default"), &labelled("b"), None), "default");
    }

    #[test]
    fn the_default_is_tagged_or_the_only_one() {
        let chosen = |meshes: &Meshes| {
            choose(meshes, &SidecarReport::default(), &group(), &namespace(None)).map(|found| found.name.to_owned())
        };
        assert_eq!(chosen(&meshes(&["a", "b"], &[("default", "b")])).unwrap(), "b");
        assert_eq!(chosen(&meshes(&["default", "b"], &[("default", "b")])).unwrap(), "b");
        assert_eq!(chosen(&meshes(&["a"], &[])).unwrap(), "a");
        assert_eq!(chosen(&meshes(&[], &[])).unwrap_err(), RevisionError::None);
        let several = chosen(&meshes(&["a", "b"], &[])).unwrap_err();
        assert!(several.to_string().contains("there are: a, b; set sidecar.istio.revision"), "{several}");
    }

    #[test]
    fn an_unknown_one_is_refused_with_those_there_are() {
        let meshes = meshes(&["default", "1-29"], &[("prod", "1-29"), ("old", "1-20")]);
        let error = choose(&meshes, &report("canary"), &group(), &namespace(None)).unwrap_err().to_string();
        assert_eq!(
            error,
            "sidecar.istio.revision of the agent's configuration asks for the Istio revision \"canary\", which isn't in the cluster; there are: 1-29, default, old, prod; name one of them there, or install that revision"
        );
        // A tag that leads nowhere is no revision.
        let error = choose(&meshes, &SidecarReport::default(), &labelled("old"), &namespace(None)).unwrap_err();
        assert!(error.to_string().starts_with("the label istio.io/rev of the WorkloadGroup"), "{error}");
    }

    #[test]
    fn one_that_cannot_be_read_is_none() {
        let mut meshes = meshes(&["default"], &[]);
        meshes.by_revision.insert("bad".to_owned(), Mesh::read("[", None));
        let error = choose(&meshes, &report("bad"), &group(), &namespace(None)).unwrap_err().to_string();
        assert!(error.starts_with("the mesh configuration of the Istio revision bad can't be used: mesh"), "{error}");
    }

    #[test]
    fn istiod_is_named_by_its_revision() {
        let mesh = Mesh::read("", None).unwrap();
        let name = |name| Revision { name, mesh: &mesh }.istiod_san();
        assert_eq!(name("default"), "istiod.istio-system.svc");
        assert_eq!(name("1-29"), "istiod-1-29.istio-system.svc");
    }
}
