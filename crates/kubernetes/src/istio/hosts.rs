//! Which names lead to which egress listener: what `onboarding-agent hosts` writes.
//!
//! istiod decides what a listener serves; this follows its rules (`SidecarScope`) as far as names are concerned. A headless Service is left
//! out: without redirection its requests end in 503, so a name that can't be resolved is the better answer.

use super::sidecars::DEFAULT_BIND;
use onboarding_kinds::mesh::{EgressListener, Sidecar};
use onboarding_wire::onboarding as pb;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

/// What a hosts file is still read with at each look-up, and a message carries.
const MOST_NAMES: usize = 10_000;
const CLUSTER_DOMAIN: &str = "cluster.local";
/// On a Service, as `spec.exportTo` on a ServiceEntry: who may see it.
pub const EXPORT_TO_ANNOTATION: &str = "networking.istio.io/exportTo";

/// What of a Service or a ServiceEntry counts here: a cluster has many of them, and each is held for as long as it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    namespace: Box<str>,
    /// Its fully qualified name, or the host names of a ServiceEntry.
    hosts: Box<[Box<str>]>,
    /// A Service of Kubernetes, which has shorter names too.
    is_service: bool,
    ports: Box<[u16]>,
    /// Empty: everybody.
    export_to: Box<[Box<str>]>,
}

impl Named {
    /// `None`: it has no name that leads anywhere (headless, or somebody else's name).
    pub fn service(namespace: &str, name: &str, export_to: Option<&str>, spec: &Value) -> Option<Self> {
        if spec["clusterIP"] == "None" || spec["type"] == "ExternalName" {
            return None;
        }
        let host: Box<str> = format!("{name}.{namespace}.svc.{CLUSTER_DOMAIN}").into();
        Some(Self {
            namespace: namespace.into(),
            hosts: Box::new([host]),
            is_service: true,
            ports: ports(&spec["ports"], "port"),
            export_to: export_to
                .map(|text| text.split(',').map(str::trim).filter(|to| !to.is_empty()).map(Box::from).collect())
                .unwrap_or_default(),
        })
    }

    /// Of the annotations of a Service.
    pub fn export_to_of(annotations: &BTreeMap<String, String>) -> Option<&str> {
        annotations.get(EXPORT_TO_ANNOTATION).map(String::as_str)
    }

    /// `None`: its hosts are wildcards, addresses, or none.
    pub fn service_entry(namespace: &str, spec: &Value) -> Option<Self> {
        let texts = |field: &str| spec[field].as_array().into_iter().flatten().filter_map(Value::as_str);
        let is_name = |host: &&str| !host.is_empty() && !host.contains('*') && host.parse::<IpAddr>().is_err();
        let hosts: Box<[Box<str>]> = texts("hosts").filter(is_name).map(Box::from).collect();
        (!hosts.is_empty()).then(|| Self {
            namespace: namespace.into(),
            hosts,
            is_service: false,
            ports: ports(&spec["ports"], "number"),
            export_to: texts("exportTo").map(Box::from).collect(),
        })
    }

    fn is_visible_from(&self, namespace: &str) -> bool {
        self.export_to.is_empty()
            || self.export_to.iter().any(|to| match &**to {
                "*" => true,
                "." => *self.namespace == *namespace,
                to => to == namespace,
            })
    }
}

fn ports(list: &Value, field: &str) -> Box<[u16]> {
    let numbers = list.as_array().into_iter().flatten().filter_map(|port| port[field].as_u64());
    numbers.filter_map(|number| u16::try_from(number).ok()).collect()
}

/// Everything in the cluster that has a name, and what was already looked up in it.
#[derive(Debug, Default)]
pub struct Names {
    all: Vec<Named>,
    known: Mutex<HashMap<Question, Arc<Aliases>>>,
}

/// Who asks: the namespace of the workload, and the listeners of its Sidecar.
type Question = (String, Vec<(Option<u16>, Option<String>, Vec<String>)>);

/// What one Sidecar makes of them.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Aliases {
    /// By address, each name once: that of the listener which is named first.
    pub by_address: Vec<pb::HostAlias>,
    /// There were more than a hosts file is good for.
    pub more: bool,
}

impl PartialEq for Names {
    fn eq(&self, other: &Self) -> bool {
        self.all == other.all
    }
}

impl Names {
    /// `before`: where the answers are the same as there, they are the same `Arc`, so that ten thousand agents needn't compare them.
    pub fn new(all: Vec<Named>, before: &Self) -> Self {
        let asked: Vec<(Question, Arc<Aliases>)> =
            before.known.lock().unwrap_or_else(PoisonError::into_inner).clone().into_iter().collect();
        let names = Self { all, known: Mutex::default() };
        let known = asked.into_iter().map(|(question, held)| {
            let now = names.look_up(&question);
            (question, if *held == now { held } else { Arc::new(now) })
        });
        let known = known.collect();
        Self { known: Mutex::new(known), ..names }
    }

    /// For a workload of `namespace` with this Sidecar.
    pub(super) fn aliases(&self, namespace: &str, sidecar: &Sidecar) -> Arc<Aliases> {
        let listener = |egress: &EgressListener| {
            (egress.port.as_ref().map(|port| port.number), egress.bind.clone(), egress.hosts.clone())
        };
        let question: Question = (namespace.to_owned(), sidecar.egress.iter().map(listener).collect());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = known.get(&question) {
            return held.clone();
        }
        if known.len() >= MOST_QUESTIONS {
            // Sidecars that were changed many times.
            known.clear();
        }
        let found = Arc::new(self.look_up(&question));
        known.insert(question, found.clone());
        found
    }

    fn look_up(&self, (namespace, listeners): &Question) -> Aliases {
        let mut names: BTreeMap<String, IpAddr> = BTreeMap::new();
        let mut more = false;
        let mut add = |name: String, bind: IpAddr| {
            if names.len() < MOST_NAMES || names.contains_key(&name) {
                names.entry(name).or_insert(bind);
            } else {
                more = true;
            }
        };
        for (port, bind, selectors) in listeners {
            let Ok(bind) = bind.as_deref().unwrap_or(DEFAULT_BIND).parse::<IpAddr>() else { continue };
            for named in &self.all {
                let has_port = named.ports.iter().any(|number| port.is_none_or(|port| port == *number));
                if !has_port || !named.is_visible_from(namespace) {
                    continue;
                }
                for host in named.hosts.iter().filter(|host| takes(selectors, namespace, &named.namespace, host)) {
                    if named.is_service
                        && let Some(name) = host.strip_suffix(CLUSTER_DOMAIN)
                        && let Some(short) = name.strip_suffix(".svc.")
                    {
                        add(format!("{short}.svc"), bind);
                        add(short.to_owned(), bind);
                    }
                    add(host.to_string(), bind);
                }
            }
        }
        let mut by_address: BTreeMap<IpAddr, Vec<String>> = BTreeMap::new();
        for (name, address) in names {
            by_address.entry(address).or_default().push(name);
        }
        let aliases = by_address.into_iter().map(|(ip, names)| pb::HostAlias { ip: ip.to_string(), names });
        Aliases { by_address: aliases.collect(), more }
    }
}

/// Sidecars whose answers are kept.
const MOST_QUESTIONS: usize = 4096;

/// Whether one of `egress.hosts` (`namespace/dnsName`) takes this host of this namespace in, for somebody in `from`.
fn takes(selectors: &[String], from: &str, of: &str, host: &str) -> bool {
    selectors.iter().any(|selector| {
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
    use crate::istio::fixtures::sidecar;
    use serde_json::json;

    fn all() -> Vec<Named> {
        let service = |namespace: &str, name: &str, export_to: Option<&str>, spec: Value| {
            Named::service(namespace, name, export_to, &spec)
        };
        let eight = json!({"ports": [{"port": 8080}]});
        let entry = |namespace: &str, hosts: Value, export_to: Value| {
            let spec = json!({"hosts": hosts, "exportTo": export_to, "ports": [{"number": 8080, "name": "http"}]});
            Named::service_entry(namespace, &spec)
        };
        let found = [
            service("bookinfo", "details", None, eight.clone()),
            service("bookinfo", "other-port", None, json!({"ports": [{"port": 9090}, {"port": "x"}, {"port": 99999}]})),
            service("bookinfo", "headless", None, json!({"clusterIP": "None", "ports": [{"port": 8080}]})),
            service("bookinfo", "alias", None, json!({"type": "ExternalName", "ports": [{"port": 8080}]})),
            service("elsewhere", "away", None, eight.clone()),
            service("elsewhere", "hidden", Some("."), eight.clone()),
            service("elsewhere", "shared", Some("other, bookinfo"), eight.clone()),
            service("bookinfo", "nobodys", Some("~"), eight),
            entry("bookinfo", json!(["example.org", "*.example.org", "10.0.0.1"]), Value::Null),
            entry("elsewhere", json!(["private.org"]), json!(["."])),
            entry("elsewhere", json!(["*.wild.org"]), Value::Null),
        ];
        found.into_iter().flatten().collect()
    }

    fn names(egress: &str) -> Vec<(String, Vec<String>)> {
        let names = Names::new(all(), &Names::default());
        let found = names.aliases("bookinfo", &sidecar(egress));
        assert!(!found.more);
        found.by_address.iter().map(|alias| (alias.ip.clone(), alias.names.clone())).collect()
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
        for there in ["other-port.bookinfo.svc", "away.elsewhere", "shared.elsewhere.svc.cluster.local"] {
            assert!(found[1].1.iter().any(|name| name == there), "{found:?}");
        }
        for absent in ["example.org", "private", "hidden", "nobodys", "headless", "alias", "10.0.0.1", "*"] {
            assert!(!found[1].1.iter().any(|name| name.contains(absent)), "{absent}: {found:?}");
        }
    }

    #[test]
    fn without_a_bind_it_is_where_istiod_listens() {
        assert_eq!(names("egress: [{hosts: ['elsewhere/away.elsewhere.svc.cluster.local']}]")[0].0, "127.0.0.1");
        assert_eq!(names("egress: [{bind: 127.0.0.2, port: {number: 8080}, hosts: ['~/*']}]"), []);
    }

    #[test]
    fn there_is_an_end_to_it() {
        let spec = json!({"ports": [{"port": 8080}]});
        let many = (0..MOST_NAMES).filter_map(|n| Named::service("bookinfo", &format!("s{n}"), None, &spec)).collect();
        let names = Names::new(many, &Names::default());
        let found = names.aliases("bookinfo", &sidecar("egress: [{hosts: ['*/*']}]"));
        assert!(found.more);
        assert_eq!(found.by_address[0].names.len(), MOST_NAMES);
    }

    #[test]
    fn what_stays_is_the_same_for_everybody() {
        let own = sidecar("egress: [{hosts: ['./*']}]");
        let others = sidecar("egress: [{hosts: ['elsewhere/*']}]");
        let before = Names::new(all(), &Names::default());
        let (mine, theirs) = (before.aliases("bookinfo", &own), before.aliases("bookinfo", &others));
        assert!(Arc::ptr_eq(&mine, &before.aliases("bookinfo", &own)), "asked once");
        let without = all().into_iter().filter(|named| !named.hosts[0].starts_with("away.")).collect();
        let after = Names::new(without, &before);
        assert!(Arc::ptr_eq(&mine, &after.aliases("bookinfo", &own)));
        assert_ne!(theirs, after.aliases("bookinfo", &others));
    }
}
