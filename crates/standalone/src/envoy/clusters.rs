//! Clusters, and the endpoints of those that are in the mesh.

use super::assignment::{Assignment, Endpoint};
use super::catalog::{Endpoints, Host, Upstream};
use super::{Member, Resource, http, is_behind, names, selects, tls};
use onboarding_core::group::{WorkloadEntry, WorkloadGroup};
use onboarding_kinds::mesh::TargetPort;
use onboarding_wire::onboarding::XdsType;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

/// What is behind one upstream.
#[derive(Debug, Clone, PartialEq)]
pub struct Backend {
    pub cluster: Arc<Resource>,
    /// Of what is in the mesh; what is outside has them in its cluster.
    pub endpoints: Option<Arc<Resource>>,
    pub faults: Vec<String>,
}

/// `groups` and `members`: all of the mesh.
pub fn backend<'a>(
    upstream: &Upstream,
    groups: impl Iterator<Item = &'a Arc<WorkloadGroup>>,
    members: impl Iterator<Item = &'a Arc<Member>>,
    trust_domain: &str,
) -> Backend {
    let name = upstream.cluster();
    let mut cluster = json!({
        "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
        "name": name,
        "connect_timeout": "5s",
        "lb_policy": "ROUND_ROBIN",
        // An endpoint that isn't ready gets nothing, also when none is.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        // The default, three, would lose requests when a busy peer drains.
        "circuit_breakers": {"thresholds": [{"max_retries": 1024}]},
        "upstream_connection_options": {"tcp_keepalive": {"keepalive_time": 300}},
    });
    let (endpoints, faults) = match &upstream.endpoints {
        Endpoints::Members { port_name, target, .. } => {
            let behind: Vec<&Arc<Member>> = members.filter(|member| is_behind(upstream, member)).collect();
            let identities = identities(upstream, groups, &behind, trust_domain);
            let sni = names::sni(upstream.port, &upstream.host);
            cluster["type"] = json!("EDS");
            cluster["eds_cluster_config"] = json!({"eds_config": file(XdsType::Endpoint, &name), "service_name": name});
            cluster["transport_socket"] = tls::upstream(trust_domain, &identities, sni.as_deref());
            set(&mut cluster, http::mesh_options(upstream.speech));
            let mut faults = Vec::new();
            let port = |entry: &WorkloadEntry| target_port(entry, port_name.as_deref(), target.as_ref(), upstream.port);
            let assignment = assignment(&name, &behind, port, &upstream.host, &mut faults).typed();
            (Some(Resource::new(XdsType::Endpoint, &name, &assignment)), faults)
        }
        Endpoints::Static(hosts) => {
            cluster["type"] = json!("STATIC");
            cluster["load_assignment"] = json!(outside(&name, hosts, |host| host.address.as_str().into()));
            set(&mut cluster, http::plain_options(upstream.speech));
            (None, Vec::new())
        }
        Endpoints::Dns(hosts) => {
            cluster["type"] = json!("STRICT_DNS");
            cluster["dns_lookup_family"] = json!("V4_PREFERRED");
            cluster["load_assignment"] = json!(outside(&name, hosts, |host| resolvable(&host.address, &upstream.host)));
            set(&mut cluster, http::plain_options(upstream.speech));
            (None, Vec::new())
        }
    };
    Backend { cluster: Resource::new(XdsType::Cluster, &name, &cluster), endpoints, faults }
}

fn set(cluster: &mut Value, options: Option<Value>) {
    if let Some(options) = options {
        cluster["typed_extension_protocol_options"] = options;
    }
}

/// Where Envoy finds a resource that has a file of its own: relative to its working directory, which is the agent's for the sidecar.
pub fn file(kind: XdsType, name: &str) -> Value {
    let path = onboarding_wire::xds::file(kind, name).unwrap_or_default();
    json!({"path_config_source": {"path": format!("./{path}")}, "resource_api_version": "V3"})
}

/// Who may answer: the service accounts of the groups behind the service, and of what registered with labels of its own.
fn identities<'a>(
    upstream: &Upstream,
    groups: impl Iterator<Item = &'a Arc<WorkloadGroup>>,
    behind: &[&Arc<Member>],
    trust_domain: &str,
) -> BTreeSet<String> {
    let Some(selector) = upstream.selector() else { return BTreeSet::new() };
    groups
        .filter(|group| group.name.namespace == upstream.namespace && selects(selector, &group.workload_labels))
        .map(|group| crate::ca::spiffe_id(trust_domain, &group.name.namespace, &group.service_account))
        .chain(behind.iter().map(|member| member.spiffe_id(trust_domain)))
        .collect()
}

/// As Istio does: the workload's own port of that name, else the Service's target, else the Service's port.
fn target_port(entry: &WorkloadEntry, port_name: Option<&str>, target: Option<&TargetPort>, port: u16) -> Option<u16> {
    let own = |name: &str| entry.ports.get(name).copied();
    port_name.and_then(own).or_else(|| match target {
        Some(TargetPort::Number(number)) => Some(*number),
        Some(TargetPort::Name(name)) => own(name),
        None => Some(port),
    })
}

fn assignment<'a>(
    name: &'a str,
    behind: &[&'a Arc<Member>],
    port: impl Fn(&WorkloadEntry) -> Option<u16>,
    host: &str,
    faults: &mut Vec<String>,
) -> Assignment<'a> {
    let mut localities: BTreeMap<Option<&str>, Vec<Endpoint<'_>>> = BTreeMap::new();
    let mut problems = BTreeSet::new();
    for member in behind {
        let entry = &member.entry;
        if entry.address.parse::<IpAddr>().is_err() {
            problems.insert(format!(
                "WorkloadGroup {}: spec.template.address: {:?} is not an IP address; its workloads get no traffic",
                member.group.name, entry.address
            ));
            continue;
        }
        let Some(port) = port(entry) else {
            problems.insert(format!(
                "WorkloadGroup {}: spec.template.ports: the port that {host} names as its target isn't in it; its workloads get no traffic",
                member.group.name
            ));
            continue;
        };
        let health = if member.ready { "HEALTHY" } else { "UNHEALTHY" };
        let endpoint = Endpoint::new(entry.address.as_str().into(), port, entry.weight, Some(health));
        localities.entry(entry.locality.as_deref()).or_default().push(endpoint);
    }
    faults.extend(problems);
    Assignment::new(name, localities)
}

fn outside<'a>(name: &'a str, hosts: &'a [Host], address: impl Fn(&'a Host) -> Cow<'a, str>) -> Assignment<'a> {
    let mut localities: BTreeMap<Option<&str>, Vec<Endpoint<'_>>> = BTreeMap::new();
    for host in hosts {
        let endpoint = Endpoint::new(address(host), host.port, host.weight, None);
        localities.entry(host.locality.as_deref()).or_default().push(endpoint);
    }
    Assignment::new(name, localities)
}

/// The name to ask for. `/etc/hosts` maps the service's own name to the egress listener, and Envoy's resolver reads it too: it would
/// find itself. A name with a dot at its end is looked up in DNS alone.
fn resolvable<'a>(address: &'a str, host: &str) -> Cow<'a, str> {
    if address == host && address.contains('.') && address.parse::<IpAddr>().is_err() && !address.ends_with('.') {
        format!("{address}.").into()
    } else {
        address.into()
    }
}
