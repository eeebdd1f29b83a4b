//! Istio: its control planes by revision, and what sidecars need of them.

use super::{known, named, some_of};
use crate::doctor::facts::{Finding, Objects};
use crate::manifests;
use crate::plane::objects::{condition, is_true, items, keyed, name, namespace, text};
use serde_json::Value;
use std::collections::BTreeSet;

const REVISION: &str = "istio.io/rev";
const DEFAULT: &str = "default";

pub fn check(objects: &Objects, findings: &mut Vec<Finding>) {
    let configured = known("ConfigMaps of Istio", &objects.config_maps, findings).map(|maps| revisions(maps));
    if let Some(configured) = &configured {
        findings.push(match configured.is_empty() {
            true => Finding::fail(
                "Istio",
                "there is no ConfigMap istio or istio-REVISION in istio-system",
                "is Istio installed? Its istioctl or its chart istiod makes it",
            ),
            false => {
                let list = configured.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                Finding::ok("Istio", format!("has a mesh configuration for the revisions: {list}"))
            }
        });
    }
    if let Ok(deployments) = &objects.deployments {
        istiods(objects, deployments, configured.as_ref(), findings);
    }
    roots(objects, findings);
    if let (Some(configured), Ok(groups)) = (&configured, &objects.groups) {
        for group in groups {
            let wanted = [
                keyed(group, "labels", REVISION),
                labelled(group, "/spec/metadata/labels"),
                labelled(group, "/spec/template/labels"),
            ];
            let Some(wanted) = wanted.into_iter().find(|it| !it.is_empty()) else { continue };
            if !configured.contains(wanted) && !configured.is_empty() {
                findings.push(Finding::warn(
                    format!("WorkloadGroup {}/{}", namespace(group), name(group)),
                    format!("asks for the Istio revision {wanted:?}, of which there is no ConfigMap istio-{wanted}"),
                    "correct its label istio.io/rev, unless it is a revision tag",
                ));
            }
        }
    }
}

fn labelled<'a>(group: &'a Value, pointer: &str) -> &'a str {
    group.pointer(pointer).and_then(|labels| labels[REVISION].as_str()).unwrap_or_default()
}

/// Those with a mesh configuration: ConfigMap `istio` is that of the default revision.
fn revisions(config_maps: &[Value]) -> BTreeSet<String> {
    let revision = |map: &Value| match (name(map), map.pointer("/data/mesh")) {
        ("istio", Some(_)) => Some(DEFAULT.to_owned()),
        (name, Some(_)) => name.strip_prefix("istio-").map(str::to_owned),
        // Others of such names are istiod's own.
        (_, None) => None,
    };
    config_maps.iter().filter_map(revision).collect()
}

fn istiods(
    objects: &Objects,
    deployments: &[Value],
    configured: Option<&BTreeSet<String>>,
    findings: &mut Vec<Finding>,
) {
    let istiods: Vec<&Value> =
        deployments.iter().filter(|it| keyed(it, "labels", "app") == "istiod" || name(it) == "istiod").collect();
    if istiods.is_empty() {
        findings.push(Finding::warn(
            "istiod",
            "there is no Deployment with the label app=istiod in istio-system",
            "see that the control plane runs, unless it is outside of this cluster",
        ));
    }
    for istiod in istiods {
        let what = format!("istiod {}", name(istiod));
        let revision = match keyed(istiod, "labels", REVISION) {
            "" => DEFAULT,
            revision => revision,
        };
        let image =
            items(istiod, "/spec/template/spec/containers").map(|it| text(it, "/image")).next().unwrap_or_default();
        let said = format!("revision {revision}, image {image}");
        findings.push(match is_true(istiod, "Available") {
            true => Finding::ok(&what, format!("is available, {said}")),
            false => Finding::fail(
                &what,
                format!(
                    "isn't available ({said}): {}",
                    condition(istiod, "Available").map_or("nothing is known of it yet", |it| text(it, "/message"))
                ),
                format!("kubectl describe deployment {} -n istio-system", name(istiod)),
            ),
        });
        if configured.is_some_and(|configured| !configured.contains(revision)) {
            let map = if revision == DEFAULT { "istio".to_owned() } else { format!("istio-{revision}") };
            let words = format!("its mesh configuration, ConfigMap {map}, isn't there");
            findings.push(Finding::fail(&what, words, "install that revision anew; sidecars are started from it"));
        }
        if let Ok(services) = &objects.services
            && named(services, name(istiod)).is_none()
        {
            let words = format!("there is no Service {} beside it", name(istiod));
            findings.push(Finding::fail(&what, words, "install that revision anew; the gateway leads sidecars there"));
        }
    }
}

/// Each namespace with groups needs the mesh's root certificate.
fn roots(objects: &Objects, findings: &mut Vec<Finding>) {
    let Some(roots) = known("ConfigMaps istio-ca-root-cert", &objects.roots, findings) else { return };
    let have: BTreeSet<&str> = roots.iter().map(namespace).collect();
    let groups = manifests::of_objects(objects.groups.as_deref().unwrap_or_default()).admission().groups;
    let wanted: BTreeSet<&str> = groups.keys().map(|group| group.namespace.as_str()).collect();
    let lack: Vec<String> = wanted.difference(&have).map(|it| (*it).to_owned()).collect();
    if lack.is_empty() {
        findings.push(Finding::ok("root certificate", "is in each namespace with a WorkloadGroup"));
    } else {
        findings.push(Finding::fail(
            "root certificate",
            format!("ConfigMap istio-ca-root-cert isn't in {}", some_of(&lack)),
            "istiod puts it into each namespace that it discovers: is it running, and do its discoverySelectors match?",
        ));
    }
}
