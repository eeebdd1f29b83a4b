//! The Sidecar of a workload, and where its listeners will be.

use super::inputs::Namespace;
use onboarding_core::label::Labels;
use onboarding_kinds::mesh::Sidecar;
use onboarding_wire::onboarding as pb;

/// Where istiod puts egress listeners without a `bind` for a proxy without redirection.
pub(super) const DEFAULT_BIND: &str = "127.0.0.1";

/// By its labels, else that of the whole namespace, else that of the whole mesh in its root namespace, as istiod chooses.
pub(super) fn selecting<'a>(namespace: &'a Namespace, root: &'a Namespace, labels: &Labels) -> Option<&'a Sidecar> {
    let by_labels = |sidecar: &&Sidecar| {
        let selector = &sidecar.workload_selector;
        !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    };
    let of_all = |sidecar: &&Sidecar| sidecar.workload_selector.is_empty();
    let own = || namespace.sidecars.iter();
    own().find(by_labels).or_else(|| own().find(of_all)).or_else(|| root.sidecars.iter().find(of_all))
}

/// For the preflight check; an empty `bind` is the address that the agent registered. Of several on one address the first.
pub(super) fn ingress(sidecar: &Sidecar) -> Vec<pb::IngressListener> {
    let mut listeners: Vec<pb::IngressListener> = Vec::new();
    for ingress in &sidecar.ingress {
        let bind = ingress.bind.as_deref().unwrap_or_default();
        let port = u32::from(ingress.port.number);
        if listeners.iter().any(|held| held.bind == bind && held.port == port) {
            continue;
        }
        let default_endpoint = ingress.default_endpoint.clone();
        listeners.push(pb::IngressListener { bind: bind.to_owned(), port, default_endpoint });
    }
    listeners
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::fixtures::sidecar;

    fn named(name: &str, spec: &str) -> Sidecar {
        Sidecar { name: name.to_owned(), ..sidecar(spec) }
    }

    fn chosen(own: &[Sidecar], root: &[Sidecar], labels: &[(&str, &str)]) -> Option<String> {
        let namespace = |sidecars: &[Sidecar]| Namespace { sidecars: sidecars.to_vec(), ..Namespace::default() };
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        selecting(&namespace(own), &namespace(root), &labels).map(|sidecar| sidecar.name.clone())
    }

    #[test]
    fn the_nearest_counts() {
        let all = named("all", "egress: [{hosts: ['./*']}]");
        let vm = named("vm", "workloadSelector: {labels: {app: ratings, class: vm}}");
        let root = named("root", "egress: [{hosts: ['*/*']}]");
        let own = [all, vm];
        let of_root = std::slice::from_ref(&root);
        let ratings = [("app", "ratings"), ("class", "vm")];
        assert_eq!(chosen(&own, of_root, &ratings).as_deref(), Some("vm"));
        assert_eq!(chosen(&own, of_root, &ratings[..1]).as_deref(), Some("all"));
        assert_eq!(chosen(&own[1..], of_root, &ratings[..1]).as_deref(), Some("root"));
        // One of the root namespace that selects by labels is for that namespace alone.
        assert_eq!(chosen(&[], &own[1..], &ratings), None);
    }

    #[test]
    fn listeners_are_where_the_sidecar_says() {
        let found = ingress(&sidecar(
            "ingress:
  - {port: {number: 8080, name: http, protocol: HTTP}, defaultEndpoint: '127.0.0.1:8080'}
  - {port: {number: 8080, name: again, protocol: HTTP}, defaultEndpoint: '127.0.0.1:8081'}
  - {port: {number: 9090, name: tcp, protocol: TCP}, bind: 0.0.0.0, defaultEndpoint: 'unix:///run/app'}",
        ));
        let shown: Vec<_> =
            found.iter().map(|one| (one.bind.as_str(), one.port, one.default_endpoint.as_str())).collect();
        assert_eq!(shown, [("", 8080, "127.0.0.1:8080"), ("0.0.0.0", 9090, "unix:///run/app")]);
    }
}
