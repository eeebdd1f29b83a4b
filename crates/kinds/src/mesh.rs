//! The parts of Istio's and Kubernetes' kinds that the standalone mesh uses. Fields that it doesn't use are allowed and ignored.

use crate::fault::shown;
use crate::group;
use crate::manifest::Metadata;
use crate::reader::{Item, Map, did_you_mean};
use crate::syntax;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use onboarding_core::label::Labels;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// `networking.istio.io` Sidecar.
#[derive(Debug, Clone, PartialEq)]
pub struct Sidecar {
    pub namespace: String,
    pub name: String,
    /// `spec.workloadSelector.labels`; empty: every workload of the namespace.
    pub workload_selector: Labels,
    pub ingress: Vec<IngressListener>,
    pub egress: Vec<EgressListener>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct IngressListener {
    pub port: Port,
    /// `bind`; absent: the workload's address.
    pub bind: Option<String>,
    /// `127.0.0.1:8080`, `0.0.0.0:8080`, `[::1]:8080` or `unix:///path`.
    pub default_endpoint: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct EgressListener {
    pub port: Option<Port>,
    pub bind: Option<String>,
    /// `namespace/dnsName` as Istio defines it: `./*`, `*/*`, `~/*`, `bookinfo/ratings.bookinfo.svc.cluster.local`.
    pub hosts: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Port {
    pub number: u16,
    pub name: Option<String>,
    pub protocol: Option<Protocol>,
    pub target_port: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Http,
    Http2,
    Grpc,
    Tcp,
    Tls,
    Https,
}

/// `v1` Service.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    pub namespace: String,
    pub name: String,
    pub selector: Labels,
    pub cluster_ip: Option<String>,
    pub ports: Vec<ServicePort>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ServicePort {
    pub number: u16,
    pub name: Option<String>,
    /// From `appProtocol`, or the name's prefix as Istio reads it; TCP where neither says.
    pub protocol: Protocol,
    /// A number; a name refers to the workload's `ports`.
    pub target_port: Option<TargetPort>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum TargetPort {
    Number(u16),
    Name(String),
}

/// `networking.istio.io` ServiceEntry.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceEntry {
    pub namespace: String,
    pub name: String,
    pub hosts: Vec<String>,
    pub addresses: Vec<String>,
    pub ports: Vec<Port>,
    pub mesh_external: bool,
    pub resolution: Resolution,
    pub endpoints: Vec<Endpoint>,
    /// `workloadSelector.labels`.
    pub workload_selector: Labels,
    pub export_to: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    None,
    Static,
    Dns,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Endpoint {
    pub address: String,
    pub ports: BTreeMap<String, u16>,
    pub locality: Option<String>,
    pub weight: Option<u32>,
}

/// `v1` Secret of type `kubernetes.io/tls`. PEM, decoded.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    pub namespace: String,
    pub name: String,
    pub certificate: String,
    pub private_key: String,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret {}/{}", self.namespace, self.name)
    }
}

/// `networking.istio.io` Sidecar.
pub(crate) fn sidecar(root: &mut Map<'_>, metadata: Option<Metadata>) -> Option<Sidecar> {
    let (mut workload_selector, mut ingress, mut egress) = (Labels::new(), Vec::new(), Vec::new());
    if let Some(mut spec) = root.optional("spec").and_then(|item| item.map()) {
        workload_selector = selector(&mut spec);
        ingress = spec.read_list("ingress", ingress_listener);
        egress = spec.read_list("egress", egress_listener);
    }
    let Metadata { namespace, name, .. } = metadata?;
    Some(Sidecar { namespace, name, workload_selector, ingress, egress })
}

fn selector(spec: &mut Map<'_>) -> Labels {
    spec.optional("workloadSelector")
        .and_then(|item| item.map())
        .map(|mut map| map.labels("labels"))
        .unwrap_or_default()
}

fn ingress_listener(item: &Item<'_>) -> Option<IngressListener> {
    let mut listener = item.map()?;
    let port = listener.required("port").and_then(|item| port(&item));
    let bind = listener.optional_as("bind", bind);
    let default_endpoint = listener.optional_as("defaultEndpoint", default_endpoint);
    let port = port?;
    // Istio's default where nothing redirects traffic: the same port of the loopback interface.
    let default_endpoint = default_endpoint.unwrap_or_else(|| format!("127.0.0.1:{}", port.number));
    Some(IngressListener { port, bind, default_endpoint })
}

fn egress_listener(item: &Item<'_>) -> Option<EgressListener> {
    let mut listener = item.map()?;
    let port_item = listener.optional("port");
    let port = port_item.as_ref().map(port);
    let bind = listener.optional_as("bind", bind);
    if bind.is_some() && port_item.is_none() {
        listener.fault_at("port", "is required where bind is given");
    }
    let hosts = listener.required_texts("hosts", egress_host);
    match port {
        Some(None) => None,
        port => Some(EgressListener { port: port.flatten(), bind, hosts }),
    }
}

fn port(item: &Item<'_>) -> Option<Port> {
    let mut map = item.map()?;
    let number = map.required("number").and_then(|item| item.port());
    let name = map.optional_as("name", syntax::any);
    let protocol = map.optional_as("protocol", protocol);
    let target_port = map.optional("targetPort").filter(|item| !item.is_zero()).and_then(|item| item.port());
    Some(Port { number: number?, name, protocol, target_port })
}

/// Istio's names of protocols, in any case; those of databases are TCP here.
fn protocol(text: &str) -> Result<Protocol, String> {
    Ok(match text.to_ascii_uppercase().as_str() {
        "HTTP" | "HTTP_PROXY" => Protocol::Http,
        "HTTP2" => Protocol::Http2,
        "GRPC" | "GRPC-WEB" => Protocol::Grpc,
        "TCP" | "MONGO" | "REDIS" | "MYSQL" => Protocol::Tcp,
        "TLS" => Protocol::Tls,
        "HTTPS" => Protocol::Https,
        _ => {
            let known = ["HTTP", "HTTP2", "GRPC", "TCP", "TLS", "HTTPS"];
            let hint = did_you_mean(text, &known);
            return Err(format!("must be one of {}, and is {}{hint}", known.join(", "), shown(text)));
        }
    })
}

fn bind(text: &str) -> Result<String, String> {
    let unix = text.strip_prefix("unix://").is_some_and(|path| path.starts_with(['/', '@']));
    match unix || text.parse::<IpAddr>().is_ok() {
        true => Ok(text.to_owned()),
        false => Err(format!("must be an IP address or unix:///PATH, and is {}", shown(text))),
    }
}

fn default_endpoint(text: &str) -> Result<String, String> {
    let address = || {
        let (host, port) = text.rsplit_once(':')?;
        let known = ["127.0.0.1", "0.0.0.0", "[::1]", "[::]"].contains(&host);
        (known && port.parse::<u16>().is_ok_and(|port| port > 0) && !port.starts_with('+')).then_some(())
    };
    let unix = text.strip_prefix("unix://").is_some_and(|path| path.starts_with(['/', '@']));
    match unix || address().is_some() {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be 127.0.0.1:PORT, [::1]:PORT, 0.0.0.0:PORT, [::]:PORT or unix:///PATH, and is {}",
            shown(text)
        )),
    }
}

/// `NAMESPACE/DNSNAME` with Istio's wildcards.
fn egress_host(text: &str) -> Result<String, String> {
    let valid = text.split_once('/').is_some_and(|(namespace, name)| {
        (matches!(namespace, "." | "*" | "~") || syntax::namespace(namespace).is_ok())
            && (name == "*" || syntax::is_host_name(name.strip_prefix("*.").unwrap_or(name)))
    });
    match valid {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "must be NAMESPACE/DNSNAME, as in ./*, */* or bookinfo/ratings.bookinfo.svc.cluster.local, and is {}",
            shown(text)
        )),
    }
}

/// `v1` Service. Ports of UDP and SCTP, which the mesh doesn't carry, are left out.
pub(crate) fn service(root: &mut Map<'_>, metadata: Option<Metadata>) -> Option<Service> {
    let (mut labels, mut cluster_ip, mut ports) = (Labels::new(), None, Vec::new());
    if let Some(mut spec) = root.optional("spec").and_then(|item| item.map()) {
        labels = spec.labels("selector");
        cluster_ip = spec.optional("clusterIP").filter(|item| item.node().as_text() != Some("")).and_then(|item| {
            item.parse(|text| match text == "None" || text.parse::<IpAddr>().is_ok() {
                true => Ok(text.to_owned()),
                false => Err(format!("must be an IP address or None, and is {}", shown(text))),
            })
        });
        ports = spec.read_list("ports", service_port);
    }
    let Metadata { namespace, name, .. } = metadata?;
    Some(Service { namespace, name, selector: labels, cluster_ip, ports })
}

fn service_port(item: &Item<'_>) -> Option<ServicePort> {
    let mut map = item.map()?;
    let number = map.required("port").and_then(|item| item.port());
    let name = map.optional_as("name", syntax::any);
    let app_protocol = map.optional_as("appProtocol", syntax::any);
    let target_port = map.optional("targetPort").and_then(|item| match item.node().as_text() {
        Some(_) => item.parse(syntax::port_name).map(TargetPort::Name),
        None => item.port().map(TargetPort::Number),
    });
    let transport = map.optional_as("protocol", syntax::any);
    if transport.is_some_and(|transport| transport != "TCP") {
        return None;
    }
    let protocol = service_protocol(name.as_deref(), app_protocol.as_deref());
    Some(ServicePort { number: number?, name, protocol, target_port })
}

/// As Istio selects it: `appProtocol`, else the name's part before the first `-`, else TCP.
fn service_protocol(name: Option<&str>, app_protocol: Option<&str>) -> Protocol {
    let from_name =
        || name.map(|name| if name.starts_with("grpc-web") { name } else { name.split('-').next().unwrap_or(name) });
    match app_protocol.or_else(from_name).map(str::to_ascii_lowercase).as_deref() {
        Some("http" | "kubernetes.io/ws") => Protocol::Http,
        Some("http2" | "kubernetes.io/h2c") => Protocol::Http2,
        Some("grpc" | "grpc-web") => Protocol::Grpc,
        Some("https" | "kubernetes.io/wss") => Protocol::Https,
        Some("tls") => Protocol::Tls,
        Some(other) if other.starts_with("grpc-web") => Protocol::Grpc,
        _ => Protocol::Tcp,
    }
}

/// `networking.istio.io` ServiceEntry.
pub(crate) fn service_entry(root: &mut Map<'_>, metadata: Option<Metadata>) -> Option<ServiceEntry> {
    let mut spec = root.required("spec").and_then(|item| item.map())?;
    let hosts = spec.required_texts("hosts", |text| {
        match syntax::is_host_name(text.strip_prefix("*.").unwrap_or(text)) || text.parse::<IpAddr>().is_ok() {
            true => Ok(text.to_owned()),
            false => syntax::host(text),
        }
    });
    let addresses = spec.texts("addresses", |text| {
        let valid = match text.split_once('/') {
            Some((ip, bits)) => ip
                .parse::<IpAddr>()
                .is_ok_and(|ip| bits.parse::<u8>().is_ok_and(|bits| bits <= if ip.is_ipv4() { 32 } else { 128 })),
            None => text.parse::<IpAddr>().is_ok(),
        };
        if valid {
            Ok(text.to_owned())
        } else {
            Err(format!("must be an IP address or a CIDR, and is {}", shown(text)))
        }
    });
    let ports = spec.read_list("ports", port);
    let mesh_external =
        spec.optional("location").and_then(|item| item.word(&[("MESH_EXTERNAL", true), ("MESH_INTERNAL", false)]));
    let resolution = spec.optional("resolution").and_then(|item| {
        item.word(&[
            ("NONE", Resolution::None),
            ("STATIC", Resolution::Static),
            ("DNS", Resolution::Dns),
            ("DNS_ROUND_ROBIN", Resolution::Dns),
        ])
    });
    let endpoints = spec.read_list("endpoints", endpoint);
    let workload_selector = selector(&mut spec);
    let export_to = spec.texts("exportTo", |text| match matches!(text, "." | "*" | "~") {
        true => Ok(text.to_owned()),
        false => syntax::namespace(text),
    });
    let Metadata { namespace, name, .. } = metadata?;
    Some(ServiceEntry {
        namespace,
        name,
        hosts,
        addresses,
        ports,
        mesh_external: mesh_external.unwrap_or(true),
        resolution: resolution.unwrap_or(Resolution::None),
        endpoints,
        workload_selector,
        export_to,
    })
}

fn endpoint(item: &Item<'_>) -> Option<Endpoint> {
    let mut map = item.map()?;
    let address = map.required_as("address", group::address);
    let ports = map.optional("ports").and_then(|item| group::ports(&item)).unwrap_or_default();
    let locality = map.optional("locality").filter(|item| item.node().as_text() != Some(""));
    let locality = locality.and_then(|item| item.parse(group::locality));
    let weight = map.optional("weight").and_then(|item| group::weight(&item));
    Some(Endpoint { address: address?, ports, locality, weight })
}

pub(crate) const TLS_SECRET: &str = "kubernetes.io/tls";

/// `v1` Secret of [`TLS_SECRET`]: `stringData` wins over `data`, as on the API server. No message shows what is in it.
pub(crate) fn secret(root: &mut Map<'_>, metadata: Option<Metadata>) -> Option<Secret> {
    let mut data = root.optional("data").and_then(|item| item.map());
    let mut string_data = root.optional("stringData").and_then(|item| item.map());
    let mut read = |key: &'static str, check: fn(&str) -> Result<(), &'static str>| {
        let plain = string_data.as_mut().and_then(|map| map.optional(key));
        let encoded = data.as_mut().and_then(|map| map.optional(key));
        let (item, text) = match (plain, encoded) {
            (Some(item), _) => {
                let text = item.secret_text()?.to_owned();
                (item, text)
            }
            (None, Some(item)) => {
                let text: String = item.secret_text()?.split_ascii_whitespace().collect();
                let bytes = BASE64.decode(text).ok().and_then(|bytes| String::from_utf8(bytes).ok());
                let Some(text) = bytes else {
                    item.fault("must be PEM in base64");
                    return None;
                };
                (item, text)
            }
            (None, None) => {
                match (&data, &string_data) {
                    (None, Some(map)) => map.fault_at(key, "is required"),
                    (Some(map), _) => map.fault_at(key, "is required"),
                    (None, None) => root.fault_at("data", format!("is required, with {key}")),
                }
                return None;
            }
        };
        check(&text).map_err(|message| item.fault(message)).ok()?;
        Some(text)
    };
    let certificate = read("tls.crt", |text| match has_pem(text, &["CERTIFICATE"]) {
        true => Ok(()),
        false => Err("must be a certificate in PEM (-----BEGIN CERTIFICATE-----)"),
    });
    let private_key =
        read("tls.key", |text| match has_pem(text, &["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"]) {
            _ if text.contains("ENCRYPTED") => {
                Err("must be a private key without a passphrase, and this one is encrypted")
            }
            true => Ok(()),
            false => Err("must be a private key in PEM (-----BEGIN PRIVATE KEY-----)"),
        });
    let Metadata { namespace, name, .. } = metadata?;
    Some(Secret { namespace, name, certificate: certificate?, private_key: private_key? })
}

/// Whether there is a block of one of these types whose content is base64.
fn has_pem(text: &str, types: &[&str]) -> bool {
    types.iter().any(|kind| {
        let body = text
            .split_once(&format!("-----BEGIN {kind}-----"))
            .and_then(|(_, rest)| rest.split_once(&format!("-----END {kind}-----")));
        body.is_some_and(|(body, _)| {
            let body: String = body.split_ascii_whitespace().collect();
            !body.is_empty() && BASE64.decode(body).is_ok()
        })
    })
}
