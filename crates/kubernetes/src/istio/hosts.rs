//! Which names lead to which egress listener: what `onboarding-agent hosts` writes.
//!
//! istiod decides what a listener serves; this follows its rules (`SidecarScope`) as far as names are concerned. A headless Service is left
//! out: without redirection its requests end in 503, so a name that can't be resolved is the better answer.

use super::sidecars::DEFAULT_BIND;
use onboarding_kinds::mesh::{EgressListener, Service, ServiceEntry, Sidecar};
use onboarding_wire::onboarding as pb;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What a hosts file is still read with at each look-up, and a message carries.
const MOST_NAMES: usize = 10_000;
const CLUSTER_DOMAIN: &str = "cluster.local";

/// By address, each name once: that of the listener which is named first. `true`: there were more.
pub(super) fn aliases(
    namespace: &str,
    sidecar: &Sidecar,
    services: &[Service],
    entries: &[ServiceEntry],
) -> (Vec<pb::HostAlias>, bool) {
    let mut names: BTreeMap<String, IpAddr> = BTreeMap::new();
    let mut more = false;
    let mut add = |name: String, bind: IpAddr| {
        if names.len() < MOST_NAMES || names.contains_key(&name) {
            names.entry(name).or_insert(bind);
        } else {
            more = true;
        }
    };
    for egress in &sidecar.egress {
        let Ok(bind) = egress.bind.as_deref().unwrap_or(DEFAULT_BIND).parse::<IpAddr>() else { continue };
        let has_port = |number: u16| egress.port.as_ref().is_none_or(|port| port.number == number);
        for service in services {
            let host = format!("{}.{}.svc.{CLUSTER_DOMAIN}", service.name, service.namespace);
            if service.cluster_ip.as_deref() == Some("None")
                || !service.ports.iter().any(|port| has_port(port.number))
                || !takes(egress, namespace, &service.namespace, &host)
            {
                continue;
            }
            let short = format!("{}.{}", service.name, service.namespace);
            add(format!("{short}.svc"), bind);
            add(short, bind);
            add(host, bind);
        }
        for entry in entries {
            let visible = entry.namespace == namespace
                || entry.export_to.is_empty()
                || entry.export_to.iter().any(|to| to == "*" || to == namespace);
            if !visible || !entry.ports.iter().any(|port| has_port(port.number)) {
                continue;
            }
            for host in &entry.hosts {
                let is_name = !host.contains('*') && host.parse::<IpAddr>().is_err();
                if is_name && takes(egress, namespace, &entry.namespace, host) {
                    add(host.clone(), bind);
                }
            }
        }
    }
    let mut by_address: BTreeMap<IpAddr, Vec<String>> = BTreeMap::new();
    for (name, address) in names {
        by_address.entry(address).or_default().push(name);
    }
    let aliases = by_address.into_iter().map(|(ip, names)| pb::HostAlias { ip: ip.to_string(), names });
    (aliases.collect(), more)
}

/// Whether one of `egress.hosts` (`namespace/dnsName`) takes this host of this namespace in, for somebody in `from`.
fn takes(egress: &EgressListener, from: &str, of: &str, host: &str) -> bool {
    egress.hosts.iter().any(|selector| {
        let Some((namespace, name)) = selector.split_once('/') else { return false };
        let in_namespace = match namespace {
            "*" => true,
            "." => of == from,
            "~" => false,
            namespace => of == namespace,
        };
        in_namespace
            && match name.strip_prefix('*') {
                Some(suffix) => host.ends_with(suffix),
                None => host == name,
            }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::fixtures::{objects, sidecar};
    use onboarding_kinds::manifest::Object;

    fn services(text: &str) -> (Vec<Service>, Vec<ServiceEntry>) {
        let (mut services, mut entries) = (Vec::new(), Vec::new());
        for object in objects(text) {
            match object {
                Object::Service(service) => services.push(service),
                Object::ServiceEntry(entry) => entries.push(entry),
                _ => panic!("another kind"),
            }
        }
        (services, entries)
    }

    const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: details, namespace: bookinfo}
spec: {ports: [{port: 8080}], selector: {app: details}}
---
apiVersion: v1
kind: Service
metadata: {name: other-port, namespace: bookinfo}
spec: {ports: [{port: 9090}], selector: {app: details}}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: bookinfo}
spec: {clusterIP: None, ports: [{port: 8080}], selector: {app: details}}
---
apiVersion: v1
kind: Service
metadata: {name: away, namespace: elsewhere}
spec: {ports: [{port: 8080}], selector: {app: details}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: example, namespace: bookinfo}
spec: {hosts: [example.org, '*.example.org'], ports: [{number: 8080, name: http, protocol: HTTP}], resolution: DNS}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: private, namespace: elsewhere}
spec: {hosts: [private.org], exportTo: ['.'], ports: [{number: 8080, name: http, protocol: HTTP}], resolution: DNS}
";

    fn names(egress: &str) -> Vec<(String, Vec<String>)> {
        let (services, entries) = services(SERVICES);
        let (aliases, more) = aliases("bookinfo", &sidecar(egress), &services, &entries);
        assert!(!more);
        aliases.into_iter().map(|alias| (alias.ip, alias.names)).collect()
    }

    #[test]
    fn the_services_of_the_port_in_all_forms() {
        let found = names("egress: [{bind: 127.0.0.2, port: {number: 8080}, hosts: ['./*']}]");
        let expected =
            ["details.bookinfo", "details.bookinfo.svc", "details.bookinfo.svc.cluster.local", "example.org"];
        assert_eq!(found, [("127.0.0.2".to_owned(), expected.map(str::to_owned).to_vec())]);
    }

    #[test]
    fn a_name_is_on_the_listener_that_is_first() {
        let found =
            names("egress: [{bind: 127.0.0.2, port: {number: 8080}, hosts: ['./example.org']}, {hosts: ['*/*']}]");
        let found: Vec<_> = found.into_iter().rev().collect();
        assert_eq!(found[0], ("127.0.0.2".to_owned(), vec!["example.org".to_owned()]));
        assert_eq!(found[1].0, "127.0.0.1");
        // All ports, all namespaces; what another namespace keeps to itself is not among them.
        assert!(found[1].1.contains(&"other-port.bookinfo.svc".to_owned()), "{found:?}");
        assert!(found[1].1.contains(&"away.elsewhere".to_owned()), "{found:?}");
        assert!(!found[1].1.iter().any(|name| name == "example.org" || name.contains("private")), "{found:?}");
    }

    #[test]
    fn without_a_bind_it_is_where_istiod_listens() {
        assert_eq!(names("egress: [{hosts: ['elsewhere/away.elsewhere.svc.cluster.local']}]")[0].0, "127.0.0.1");
        assert_eq!(names("egress: [{bind: 127.0.0.2, port: {number: 8080}, hosts: ['~/*']}]"), []);
    }

    #[test]
    fn there_is_an_end_to_it() {
        let (services, _) = services(SERVICES);
        let many: Vec<Service> =
            (0..MOST_NAMES).map(|n| Service { name: format!("s{n}"), ..services[0].clone() }).collect();
        let (aliases, more) = aliases("bookinfo", &sidecar("egress: [{hosts: ['*/*']}]"), &many, &[]);
        assert!(more);
        assert_eq!(aliases[0].names.len(), MOST_NAMES);
    }
}
