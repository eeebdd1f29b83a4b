//! The boot configuration of one workload. Pure.
//!
//! What `istioctl x workload entry configure` writes once, and pilot-agent makes of it (`istioctl/pkg/workload`, `pkg/bootstrap/config.go`),
//! for a proxy without redirection whose WorkloadEntry is ours. `docs/istio.md` goes through it field by field.

use super::inputs::Part;
use super::mesh::{Mesh, PROXY_CONFIG_ANNOTATION, ProxyConfig};
use super::node;
use super::revision::{self, RevisionError};
use super::sidecars;
use super::tokens::Token;
use aws_lc_rs::digest::{Context, SHA256};
use onboarding_core::group::{EntryError, WorkloadEntry, WorkloadGroup};
use onboarding_core::label::Labels;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::Live;
use onboarding_wire::onboarding as pb;
use prost::Message;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::Duration;

/// Stands for the address that the agent registered.
pub(super) const HOST_IP: &str = "{{HOST_IP}}";
/// Where the sidecar's certificates are for pilot-agent, which gets them itself.
const CERTIFICATES: &str = "./etc/certs";
/// On a WorkloadGroup, as on pods: where istiod is reached.
const DISCOVERY_ANNOTATION: &str = "sidecar.istio.io/discoveryAddress";
/// On a WorkloadGroup: what needs a restart of its sidecars reaches those that are connected as well.
pub(super) const AT_ONCE_ANNOTATION: &str = "onboarding.tetrate.io/restart-sidecars-on-change";
/// By which pilot-agent is told where it is.
const LOCALITY_LABEL: &str = "istio-locality";
/// Of a group's proxyMetadata; the rest of the environment is ours. An agent takes 256 variables in all, with values of at most 64 KiB.
const MOST_METADATA: usize = 200;
const LONGEST_METADATA: usize = 16 << 10;
const LARGEST_METADATA: usize = 256 << 10;
/// An agent takes no longer one.
const LONGEST_DRAIN: Duration = Duration::from_secs(3600);

/// Fields of the mesh's proxyConfig that are true in a pod alone: where things are, and what the agent does itself.
const NOT_ON_A_HOST: [&str; 8] = [
    "discoveryAddress",
    "binaryPath",
    "configPath",
    "proxyBootstrapTemplatePath",
    "customConfigFile",
    "image",
    // The agent asks the application, and its answer reaches the mesh through the plane.
    "readinessProbe",
    "availabilityZone",
];

/// Variables that a host never takes from proxyMetadata: which code runs, whom to trust, and what is decided here.
const RESERVED: [&str; 18] = [
    "PATH",
    "HOME",
    "PROXY_CONFIG",
    "CA_ADDR",
    "CA_PROVIDER",
    "CA_ROOT_CA",
    "XDS_ROOT_CA",
    "XDS_AUTH_PROVIDER",
    "JWT_POLICY",
    "CREDENTIAL_FETCHER_TYPE",
    "CREDENTIAL_IDENTITY_PROVIDER",
    "FILE_MOUNTED_CERTS",
    "DISABLE_ENVOY",
    "GRPC_XDS_BOOTSTRAP",
    "WORKLOAD_IDENTITY_SOCKET_FILE",
    "ISTIO_META_AUTO_REGISTER_GROUP",
    "ISTIO_META_NETWORK",
    "ISTIO_META_POD_PORTS",
];

/// Why there is no boot configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum RenderError {
    #[error("the WorkloadGroup {0} doesn't exist, or can't be read")]
    NoGroup(String),
    #[error(transparent)]
    Revision(#[from] RevisionError),
    #[error("the host has no address for the mesh: {0}")]
    Entry(#[from] EntryError),
    #[error("the annotation {annotation} of the WorkloadGroup {group} can't be used: {problem}")]
    Annotation { annotation: &'static str, group: String, problem: String },
    #[error(
        "there is no root certificate of the mesh: neither namespace {0} nor istio-system has a ConfigMap istio-ca-root-cert with a certificate in root-cert.pem; istiod writes it, so is it running?"
    )]
    NoRoot(String),
}

impl RenderError {
    /// Only somebody's change can help, not time.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Revision(RevisionError::Unknown { .. } | RevisionError::Several { .. })
            | Self::Annotation { .. }
            | Self::Entry(_) => true,
            Self::Revision(RevisionError::None | RevisionError::Unreadable { .. })
            | Self::NoGroup(_)
            | Self::NoRoot(_) => false,
        }
    }
}

/// Everything but the token.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rendered {
    pub start: Arc<Start>,
    pub root_certificates: String,
    /// What the agent itself goes by; without version, sidecar and what [`Start`] has.
    pub head: pb::BootConfiguration,
    /// Whether the group's operator wants changes of [`Start`] to take effect now.
    pub at_once: bool,
    /// What was asked for and isn't in it, for the log.
    pub left_out: Vec<String>,
    /// Of everything that an agent gets.
    pub version: String,
}

/// What a sidecar process is started with: a change of it needs a restart.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Start {
    pub service_account: String,
    pub spiffe_id: String,
    pub trust_domain: String,
    pub files: BTreeMap<String, Vec<u8>>,
    pub environment: BTreeMap<String, String>,
    /// `host:port`; empty: the agent's endpoint.
    pub discovery_address: String,
    pub istiod_san: String,
    /// Protobuf JSON of Envoy's Node.
    pub node: Vec<u8>,
    pub drain_duration: Option<Duration>,
}

/// Facts that several parts of a boot configuration are made of.
pub(super) struct Facts<'a> {
    pub name: &'a RegistrationName,
    pub group: &'a WorkloadGroup,
    pub entry: &'a WorkloadEntry,
    pub mesh: &'a Mesh,
    /// Merged, without what isn't for a host.
    pub proxy: &'a ProxyConfig,
    /// The entry's, with the canonical ones.
    pub labels: &'a Labels,
    pub istiod_san: &'a str,
}

pub(super) fn render(name: &RegistrationName, live: &Live, part: &Part) -> Result<Rendered, RenderError> {
    let group = part.group.as_deref().ok_or_else(|| RenderError::NoGroup(live.group.to_string()))?;
    let revision = revision::choose(&part.meshes, &live.report.sidecar, group, &part.namespace)?;
    let entry = WorkloadEntry::new(name.clone(), group, &live.attested.identity, &live.report)?;
    let root_certificates = roots(part).ok_or_else(|| RenderError::NoRoot(name.namespace.clone()))?;
    let mut left_out = Vec::new();
    let discovery_address = discovery_address(part, group)?;
    let proxy = proxy_config(revision.mesh, group, &mut left_out)?;
    let istiod_san = revision.istiod_san();
    let labels = with_canonical(&entry.labels, &group.name.name);
    let facts = Facts {
        name,
        group,
        entry: &entry,
        mesh: revision.mesh,
        proxy: &proxy,
        labels: &labels,
        istiod_san: &istiod_san,
    };
    let start = Start {
        service_account: group.service_account.clone(),
        spiffe_id: format!(
            "spiffe://{}/ns/{}/sa/{}",
            revision.mesh.trust_domain, name.namespace, group.service_account
        ),
        trust_domain: revision.mesh.trust_domain.clone(),
        files: files(&proxy),
        environment: environment(&facts),
        discovery_address,
        node: node::json(&facts).to_string().into_bytes(),
        drain_duration: drain_duration(&proxy, &mut left_out),
        istiod_san: istiod_san.clone(),
    };
    let mut rendered = Rendered {
        start: Arc::new(start),
        root_certificates: root_certificates.to_owned(),
        head: head(&facts, part, &mut left_out),
        at_once: group.workload_annotations.get(AT_ONCE_ANNOTATION).is_some_and(|value| value == "true"),
        left_out,
        version: String::new(),
    };
    rendered.version = rendered.make_version();
    Ok(rendered)
}

impl Rendered {
    /// The same for a sidecar that goes on with what it was started with.
    pub fn started_with(self, start: &Arc<Start>) -> Self {
        let mut rendered = Self { start: start.clone(), ..self };
        rendered.version = rendered.make_version();
        rendered
    }

    pub fn message(&self, token: &Token) -> pb::BootConfiguration {
        let start = &*self.start;
        let istio = pb::IstioBoot {
            files: start.files.iter().map(|(path, bytes)| (path.clone(), bytes.clone())).collect(),
            environment: start.environment.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
            discovery_address: start.discovery_address.clone(),
            istiod_san: start.istiod_san.clone(),
            root_certificates: self.root_certificates.clone(),
            node: start.node.clone(),
            drain_duration: start.drain_duration.and_then(|duration| duration.try_into().ok()),
            ..with_token(token)
        };
        pb::BootConfiguration {
            version: self.version.clone(),
            spiffe_id: start.spiffe_id.clone(),
            trust_domain: start.trust_domain.clone(),
            sidecar: Some(pb::boot_configuration::Sidecar::Istio(istio)),
            ..self.head.clone()
        }
    }

    /// Of the content alone: the same on every replica, before and after a restart.
    fn make_version(&self) -> String {
        let mut context = Context::new(&SHA256);
        let mut add = |bytes: &[u8]| {
            context.update(&(bytes.len() as u64).to_be_bytes());
            context.update(bytes);
        };
        let start = &*self.start;
        for (path, bytes) in &start.files {
            add(path.as_bytes());
            add(bytes);
        }
        // No path and no variable is empty.
        add(b"");
        for (name, value) in &start.environment {
            add(name.as_bytes());
            add(value.as_bytes());
        }
        add(b"");
        for text in [
            &start.service_account,
            &start.spiffe_id,
            &start.trust_domain,
            &start.discovery_address,
            &start.istiod_san,
            &self.root_certificates,
        ] {
            add(text.as_bytes());
        }
        add(&start.node);
        add(format!("{:?}", start.drain_duration).as_bytes());
        add(&self.head.encode_to_vec());
        context.finish().as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

/// For an agent that holds this version: a token, and nothing else.
pub(super) fn token_alone(version: &str, token: &Token) -> pb::BootConfiguration {
    pb::BootConfiguration {
        version: version.to_owned(),
        sidecar: Some(pb::boot_configuration::Sidecar::Istio(with_token(token))),
        ..pb::BootConfiguration::default()
    }
}

fn with_token(token: &Token) -> pb::IstioBoot {
    pb::IstioBoot {
        token: token.value().to_owned(),
        token_expires_at: Some(prost_types::Timestamp {
            seconds: token.expires_at.as_second(),
            nanos: token.expires_at.subsec_nanosecond(),
        }),
        ..pb::IstioBoot::default()
    }
}

/// The ConfigMap of the workload's namespace, as `istioctl` takes it, else istiod's own.
fn roots(part: &Part) -> Option<&str> {
    [&part.namespace, &part.istio_system].into_iter().find_map(|namespace| {
        let bundle = namespace.root_certificates.as_deref()?;
        let certificates = pem::parse_many(bundle).ok()?;
        let good = !certificates.is_empty() && certificates.iter().all(|block| block.tag() == "CERTIFICATE");
        good.then_some(bundle)
    })
}

/// What the group says, else the ControlPlane's `customGateway`; never the mesh's own, which is a name inside the cluster.
fn discovery_address(part: &Part, group: &WorkloadGroup) -> Result<String, RenderError> {
    let fault = |annotation, problem| Err(annotation_error(annotation, group, problem));
    if let Some(address) = group.workload_annotations.get(DISCOVERY_ANNOTATION) {
        return match is_host_port(address) {
            true => Ok(address.clone()),
            false => fault(DISCOVERY_ANNOTATION, format!("{:?} is not host:port", shortened(address))),
        };
    }
    if let Some(yaml) = group.workload_annotations.get(PROXY_CONFIG_ANNOTATION) {
        let own = ProxyConfig::default()
            .with_annotation(yaml)
            .map_err(|problem| annotation_error(PROXY_CONFIG_ANNOTATION, group, problem))?;
        if let Some(address) = own.text("discoveryAddress") {
            return match is_host_port(address) {
                true => Ok(address.to_owned()),
                false => {
                    let problem = format!("discoveryAddress is {:?}, which is not host:port", shortened(address));
                    fault(PROXY_CONFIG_ANNOTATION, problem)
                }
            };
        }
    }
    Ok(match &part.custom_gateway {
        Some(gateway) if gateway.host.parse::<Ipv6Addr>().is_ok() => format!("[{}]:{}", gateway.host, gateway.port),
        Some(gateway) => format!("{}:{}", gateway.host, gateway.port),
        None => String::new(),
    })
}

fn annotation_error(annotation: &'static str, group: &WorkloadGroup, problem: String) -> RenderError {
    RenderError::Annotation { annotation, group: group.name.to_string(), problem }
}

fn shortened(text: &str) -> String {
    text.chars().take(200).collect()
}

/// A host name, an IPv4 address or an IPv6 address in brackets, and a port.
fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    let good_host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(ip) => ip.parse::<Ipv6Addr>().is_ok(),
        None => host.len() <= 253 && host.split('.').all(label),
    };
    good_host && port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

/// The mesh's and the group's, without what isn't for a host.
fn proxy_config(mesh: &Mesh, group: &WorkloadGroup, left_out: &mut Vec<String>) -> Result<ProxyConfig, RenderError> {
    let mut proxy = match group.workload_annotations.get(PROXY_CONFIG_ANNOTATION) {
        None => mesh.proxy_config.clone(),
        Some(yaml) => mesh
            .proxy_config
            .with_annotation(yaml)
            .map_err(|problem| annotation_error(PROXY_CONFIG_ANNOTATION, group, problem))?,
    };
    proxy.fields.retain(|field, _| !NOT_ON_A_HOST.contains(&field.as_str()));
    // In one order, whatever that of the ConfigMap.
    proxy.fields.values_mut().for_each(Value::sort_all_objects);
    proxy.fields.sort_keys();
    let (mut count, mut size) = (0, 0);
    proxy.metadata.retain(|name, value| {
        let good = usable_variable(name, value) && count < MOST_METADATA && size + value.len() <= LARGEST_METADATA;
        if good {
            count += 1;
            size += value.len();
        } else if !RESERVED.contains(&name.as_str()) {
            left_out.push(format!("proxyMetadata.{}", shortened(name)));
        }
        good
    });
    Ok(proxy)
}

/// What an agent takes into a sidecar's environment.
fn usable_variable(name: &str, value: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    (1..=256).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with("LD_")
        && !RESERVED.contains(&name)
        && value.len() <= LONGEST_METADATA
        && !value.contains('\0')
}

/// pilot-agent's, but for the mesh's roots, which the agent keeps up to date there without a restart.
fn files(proxy: &ProxyConfig) -> BTreeMap<String, Vec<u8>> {
    let mut config = proxy.fields.clone();
    if !proxy.metadata.is_empty() {
        config.insert("proxyMetadata".to_owned(), json!(proxy.metadata));
    }
    let mesh = json!({ "defaultConfig": config });
    // JSON is YAML, and its strings can't be read as anything else.
    let mesh = serde_json::to_vec_pretty(&mesh).unwrap_or_default();
    [("./etc/istio/config/mesh".to_owned(), mesh)].into()
}

/// pilot-agent's; `CA_ADDR` is unset on purpose: only then the name of istiod's certificate holds for its CA as well.
fn environment(facts: &Facts<'_>) -> BTreeMap<String, String> {
    let Facts { name, group, entry, mesh, proxy, labels, istiod_san } = facts;
    // What the host is, the plane has proven; guessing asks the metadata servers of three clouds, one after the other's silence.
    let mut environment: BTreeMap<_, _> = [("CLOUD_PLATFORM".to_owned(), "none".to_owned())].into();
    environment.extend(proxy.metadata.clone());
    let mut labels_and_locality = (*labels).clone();
    if let Some(locality) = &entry.locality {
        labels_and_locality.insert(LOCALITY_LABEL.to_owned(), locality.clone());
    }
    let (service, revision) = canonical(labels, &group.name.name);
    for (variable, value) in [
        ("INSTANCE_IP", HOST_IP),
        ("POD_NAME", &name.name),
        ("POD_NAMESPACE", &name.namespace),
        ("SERVICE_ACCOUNT", &group.service_account),
        ("TRUST_DOMAIN", &mesh.trust_domain),
        ("CANONICAL_SERVICE", service),
        ("CANONICAL_REVISION", revision),
        ("PROV_CERT", CERTIFICATES),
        ("OUTPUT_CERTS", CERTIFICATES),
        ("ISTIOD_SAN", istiod_san),
        ("ISTIO_META_CLUSTER_ID", &mesh.cluster_id),
        ("ISTIO_META_MESH_ID", mesh_id(mesh, proxy)),
        ("ISTIO_META_WORKLOAD_NAME", &group.name.name),
        ("ISTIO_META_WORKLOAD_ENTRY", &name.name),
        ("ISTIO_META_INTERCEPTION_MODE", "NONE"),
        ("ISTIO_METAJSON_LABELS", &json!(labels_and_locality).to_string()),
    ] {
        environment.insert(variable.to_owned(), value.to_owned());
    }
    if let Some(network) = &entry.network {
        environment.insert("ISTIO_META_NETWORK".to_owned(), network.clone());
    }
    if let Some(ports) = pod_ports(&entry.ports) {
        environment.insert("ISTIO_META_POD_PORTS".to_owned(), ports);
    }
    environment
}

/// As for pods: the mesh's, else the trust domain.
pub(super) fn mesh_id<'a>(mesh: &'a Mesh, proxy: &'a ProxyConfig) -> &'a str {
    proxy.text("meshId").unwrap_or(&mesh.trust_domain)
}

/// `model.PodPortList`, in the order of names.
pub(super) fn pod_ports(ports: &BTreeMap<String, u16>) -> Option<String> {
    let list: Vec<Value> =
        ports.iter().map(|(name, port)| json!({"name": name, "containerPort": port, "protocol": ""})).collect();
    (!list.is_empty()).then(|| Value::from(list).to_string())
}

const CANONICAL_NAME: &str = "service.istio.io/canonical-name";
const CANONICAL_REVISION: &str = "service.istio.io/canonical-revision";

/// As Istio computes them (`pkg/kube/labels`).
pub(super) fn canonical<'a>(labels: &'a Labels, workload: &'a str) -> (&'a str, &'a str) {
    let first = |keys: [&str; 3]| keys.into_iter().find_map(|key| labels.get(key)).map(String::as_str);
    let name = first([CANONICAL_NAME, "app.kubernetes.io/name", "app"]).unwrap_or(workload);
    let revision = first([CANONICAL_REVISION, "app.kubernetes.io/version", "version"]).unwrap_or("latest");
    (name, revision)
}

fn with_canonical(labels: &Labels, workload: &str) -> Labels {
    let (name, revision) = canonical(labels, workload);
    let added = [(CANONICAL_NAME.to_owned(), name.to_owned()), (CANONICAL_REVISION.to_owned(), revision.to_owned())];
    labels.clone().into_iter().chain(added).collect()
}

/// `45s`, as protobuf JSON has durations.
fn drain_duration(proxy: &ProxyConfig, left_out: &mut Vec<String>) -> Option<Duration> {
    let text = proxy.text("drainDuration")?;
    let seconds = text.strip_suffix('s').and_then(|number| number.parse::<f64>().ok());
    let duration = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let Some(duration) = duration else {
        left_out.push("drainDuration, which isn't seconds as in 45s".to_owned());
        return None;
    };
    if duration > LONGEST_DRAIN {
        left_out.push("drainDuration beyond an hour".to_owned());
    }
    Some(duration.min(LONGEST_DRAIN))
}

fn head(facts: &Facts<'_>, part: &Part, left_out: &mut Vec<String>) -> pb::BootConfiguration {
    let Facts { group, labels, .. } = facts;
    let sidecar = sidecars::selecting(&part.namespace, &part.istio_system, labels);
    let aliases = sidecar.and_then(|sidecar| part.aliases(sidecar));
    if aliases.is_some_and(|aliases| aliases.more) {
        left_out.push("host aliases beyond the first ten thousand".to_owned());
    }
    pb::BootConfiguration {
        probe: group.probe.as_ref().map(pb::Probe::from),
        host_aliases: aliases.map(|aliases| aliases.by_address.clone()).unwrap_or_default(),
        ingress: sidecar.map(sidecars::ingress).unwrap_or_default(),
        propagation_delay: part.propagation_delay.try_into().ok(),
        ..pb::BootConfiguration::default()
    }
}

/// Fields of a JSON object.
pub(super) type Object = Map<String, Value>;

#[cfg(test)]
#[path = "render_tests.rs"]
mod tests;
