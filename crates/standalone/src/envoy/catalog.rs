//! Every service port of the mesh, from Services and ServiceEntries.

use super::names::{self, Speech};
use crate::mesh::MeshConfig;
use onboarding_core::label::Labels;
use onboarding_kinds::mesh::{Endpoint, Port, Resolution, Service, ServiceEntry, ServicePort, TargetPort};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// One port of one service. Its `host` and `port` name it.
#[derive(Debug, Clone, PartialEq)]
pub struct Upstream {
    /// Of the Service or ServiceEntry.
    pub namespace: String,
    /// `ratings.bookinfo.svc.cluster.local`, `example.org`, `*.example.org`.
    pub host: String,
    pub port: u16,
    pub(super) speech: Speech,
    /// The Service's name: it has several forms.
    service: Option<String>,
    /// `exportTo` keeps it in its namespace.
    private: bool,
    pub(super) endpoints: Endpoints,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Endpoints {
    /// The registrations with these labels, by mutual TLS.
    Members { selector: Labels, port_name: Option<String>, target: Option<TargetPort> },
    /// Fixed addresses outside.
    Static(Vec<Host>),
    /// Names outside that Envoy resolves.
    Dns(Vec<Host>),
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Host {
    pub address: String,
    pub port: u16,
    pub locality: Option<String>,
    pub weight: Option<u32>,
}

/// All upstreams in the order in which they take precedence, and what of the manifests can't be one.
#[derive(Debug, Default, PartialEq)]
pub struct Catalog {
    pub upstreams: Vec<Upstream>,
    pub faults: Vec<String>,
}

impl Upstream {
    pub fn cluster(&self) -> String {
        names::outbound_cluster(self.port, &self.host)
    }

    /// The registrations behind it: their labels, and in which namespace. `None`: it is outside the mesh.
    pub fn selector(&self) -> Option<&Labels> {
        match &self.endpoints {
            Endpoints::Members { selector, .. } => Some(selector),
            Endpoints::Static(_) | Endpoints::Dns(_) => None,
        }
    }

    /// Its names without a port, for somebody in this namespace.
    pub(super) fn domains(&self, from: &str) -> Vec<String> {
        let mut domains = self.aliases();
        if self.namespace == from {
            domains.extend(self.service.clone());
        }
        domains
    }

    /// The names by which an application may ask for it wherever it is.
    pub(super) fn aliases(&self) -> Vec<String> {
        match &self.service {
            Some(name) => {
                let short = format!("{name}.{}", self.namespace);
                let middle = format!("{short}.svc");
                vec![short, middle, self.host.clone()]
            }
            None => vec![self.host.clone()],
        }
    }

    /// Whether an entry of a Sidecar's `egress.hosts` (`namespace/dnsName`) takes it in.
    pub(super) fn is_selected(&self, selector: &str, from: &str) -> bool {
        let Some((namespace, name)) = selector.split_once('/') else { return false };
        let in_namespace = match namespace {
            "*" => true,
            "." => self.namespace == from,
            "~" => false,
            namespace => self.namespace == namespace,
        };
        let named = match name.strip_prefix('*') {
            Some("") => true,
            Some(suffix) => self.host.ends_with(suffix),
            None => self.host == name,
        };
        in_namespace && named && (!self.private || self.namespace == from)
    }
}

impl Catalog {
    pub fn new(mesh: &MeshConfig) -> Self {
        let mut catalog = Self::default();
        let mut taken = BTreeSet::new();
        for service in &mesh.services {
            catalog.add_service(service, &mut taken);
        }
        for entry in &mesh.service_entries {
            catalog.add_entry(entry, &mut taken);
        }
        catalog
    }

    fn add_service(&mut self, service: &Service, taken: &mut BTreeSet<(String, u16)>) {
        let Service { namespace, name, selector, .. } = service;
        if selector.is_empty() {
            self.faults.push(format!(
                "Service {namespace}/{name}: spec.selector: without one, no workload is behind it; give it the labels of a WorkloadGroup's template"
            ));
        }
        let host = names::service_host(name, namespace);
        for ServicePort { number, name: port_name, protocol, target_port } in &service.ports {
            if !taken.insert((host.clone(), *number)) {
                continue;
            }
            self.upstreams.push(Upstream {
                namespace: namespace.clone(),
                host: host.clone(),
                port: *number,
                speech: (*protocol).into(),
                service: Some(name.clone()),
                private: false,
                endpoints: Endpoints::Members {
                    selector: selector.clone(),
                    port_name: port_name.clone(),
                    target: target_port.clone(),
                },
            });
        }
    }

    fn add_entry(&mut self, entry: &ServiceEntry, taken: &mut BTreeSet<(String, u16)>) {
        let what = format!("ServiceEntry {}/{}", entry.namespace, entry.name);
        let exported = |to: &String| to == "*";
        let private = !entry.export_to.is_empty() && !entry.export_to.iter().any(exported);
        for host in &entry.hosts {
            for port in &entry.ports {
                let endpoints = match endpoints(entry, host, port) {
                    Ok(endpoints) => endpoints,
                    Err(problem) => {
                        self.faults.push(format!("{what}: {problem}"));
                        continue;
                    }
                };
                if !taken.insert((host.clone(), port.number)) {
                    self.faults.push(format!(
                        "{what}: spec.hosts: {host} with port {} is another Service's or ServiceEntry's already; it is left out",
                        port.number
                    ));
                    continue;
                }
                self.upstreams.push(Upstream {
                    namespace: entry.namespace.clone(),
                    host: host.clone(),
                    port: port.number,
                    speech: names::speech(port).unwrap_or(Speech::Tcp),
                    service: None,
                    private,
                    endpoints,
                });
            }
        }
    }
}

fn endpoints(entry: &ServiceEntry, host: &str, port: &Port) -> Result<Endpoints, String> {
    if !entry.workload_selector.is_empty() {
        return Ok(Endpoints::Members {
            selector: entry.workload_selector.clone(),
            port_name: port.name.clone(),
            target: port.target_port.map(TargetPort::Number),
        });
    }
    let default_port = port.target_port.unwrap_or(port.number);
    let hosts: Vec<Host> = entry.endpoints.iter().map(|endpoint| outside(endpoint, port, default_port)).collect();
    match entry.resolution {
        Resolution::None => Err(
            "spec.resolution: NONE needs the original address of a connection, which a sidecar without iptables doesn't see; use STATIC or DNS"
                .to_owned(),
        ),
        Resolution::Static => {
            if hosts.is_empty() {
                return Err("spec.endpoints: STATIC needs addresses here".to_owned());
            }
            match hosts.iter().find(|host| host.address.parse::<IpAddr>().is_err()) {
                Some(host) => Err(format!(
                    "spec.endpoints: {:?} is not an IP address, which STATIC needs; use DNS for names",
                    host.address
                )),
                None => Ok(Endpoints::Static(hosts)),
            }
        }
        Resolution::Dns if !hosts.is_empty() => Ok(Endpoints::Dns(hosts)),
        Resolution::Dns if host.contains('*') => {
            Err(format!("spec.hosts: {host} can't be resolved; give it spec.endpoints, or name each host"))
        }
        Resolution::Dns => Ok(Endpoints::Dns(vec![Host {
            address: host.to_owned(),
            port: default_port,
            locality: None,
            weight: None,
        }])),
    }
}

fn outside(endpoint: &Endpoint, port: &Port, default_port: u16) -> Host {
    let named = port.name.as_ref().and_then(|name| endpoint.ports.get(name));
    Host {
        address: endpoint.address.clone(),
        port: named.copied().unwrap_or(default_port),
        locality: endpoint.locality.clone(),
        weight: endpoint.weight,
    }
}
