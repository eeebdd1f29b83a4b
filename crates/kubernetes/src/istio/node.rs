//! Envoy's Node, by which istiod decides what to send: what pilot-agent would say of itself (`GetNodeMetaData`). Pure.

use super::mesh::ProxyConfig;
use super::render::{Facts, HOST_IP, Object, canonical, mesh_id, pod_ports};
use onboarding_core::label::Labels;
use serde_json::{Value, json};

const META: &str = "ISTIO_META_";
/// Of Kubernetes; pilot-agent has it from the namespace, whatever the trust domain.
const CLUSTER_DOMAIN: &str = "cluster.local";

/// `config.core.v3.Node` as protobuf JSON.
pub(super) fn json(facts: &Facts<'_>) -> Value {
    let namespace = &facts.name.namespace;
    let mut node = json!({
        "id": format!("sidecar~{HOST_IP}~{}.{namespace}~{namespace}.svc.{CLUSTER_DOMAIN}", facts.name.name),
        "cluster": cluster(facts),
        "metadata": metadata(facts),
    });
    if let (Some(locality), Some(node)) = (&facts.entry.locality, node.as_object_mut()) {
        let parts = ["region", "zone", "sub_zone"].into_iter().zip(locality.splitn(3, '/'));
        let locality: Object = parts.map(|(part, name)| (part.to_owned(), json!(name))).collect();
        node.insert("locality".to_owned(), Value::Object(locality));
    }
    node
}

fn metadata(facts: &Facts<'_>) -> Object {
    let Facts { name, group, entry, mesh, proxy, labels, istiod_san } = facts;
    let mut metadata: Object = proxy
        .metadata
        .iter()
        .filter_map(|(variable, value)| Some((variable.strip_prefix(META)?.to_owned(), json!(value))))
        .collect();
    for (field, value) in [
        ("NAME", json!(name.name)),
        ("NAMESPACE", json!(name.namespace)),
        ("SERVICE_ACCOUNT", json!(group.service_account)),
        ("CLUSTER_ID", json!(mesh.cluster_id)),
        ("MESH_ID", json!(mesh_id(mesh, proxy))),
        ("WORKLOAD_NAME", json!(group.name.name)),
        ("WORKLOAD_ENTRY", json!(name.name)),
        ("INTERCEPTION_MODE", json!("NONE")),
        ("INSTANCE_IPS", json!(HOST_IP)),
        ("LABELS", json!(labels)),
        ("STATIC_LABELS", json!(labels)),
        ("PILOT_SAN", json!([istiod_san])),
        ("PROXY_CONFIG", Value::Object(proxy_config(facts))),
        // As pilot-agent takes them from its environment, which has proxyMetadata; istiod keeps listeners off these ports.
        ("ENVOY_STATUS_PORT", json!(port(proxy, "ENVOY_STATUS_PORT", 15021))),
        ("ENVOY_PROMETHEUS_PORT", json!(port(proxy, "ENVOY_PROMETHEUS_PORT", 15090))),
        ("METADATA_DISCOVERY", json!("false")),
    ] {
        metadata.insert(field.to_owned(), value);
    }
    if let Some(network) = &entry.network {
        metadata.insert("NETWORK".to_owned(), json!(network));
    }
    if let Some(ports) = pod_ports(&entry.ports) {
        metadata.insert("POD_PORTS".to_owned(), json!(ports));
    }
    metadata
}

fn port(proxy: &ProxyConfig, variable: &str, default: u16) -> u16 {
    proxy.metadata.get(variable).and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// With Istio's defaults (`mesh.DefaultProxyConfig`): istiod takes a proxy's own configuration whole, in the place of the mesh's.
fn proxy_config(facts: &Facts<'_>) -> Object {
    let mut config = Object::new();
    for (field, value) in [
        ("configPath", json!("./etc/istio/proxy")),
        ("controlPlaneAuthPolicy", json!("MUTUAL_TLS")),
        ("drainDuration", json!("45s")),
        ("proxyAdminPort", json!(15000)),
        ("serviceCluster", json!("istio-proxy")),
        ("statNameLength", json!(189)),
        ("statusPort", json!(15020)),
        ("terminationDrainDuration", json!("5s")),
    ] {
        config.insert(field.to_owned(), value);
    }
    if facts.proxy.fields.contains_key("tracingServiceName") {
        config.shift_remove("serviceCluster");
    }
    config.extend(facts.proxy.fields.clone());
    if !facts.proxy.metadata.is_empty() {
        config.insert("proxyMetadata".to_owned(), json!(facts.proxy.metadata));
    }
    config
}

/// As pilot-agent's `getServiceCluster`.
fn cluster(facts: &Facts<'_>) -> String {
    let Facts { name, group, proxy, labels, .. } = facts;
    let workload = &group.name.name;
    let (service, _) = canonical(labels, workload);
    let or_default = |given: &str| match given {
        "" | "istio-proxy" => format!("{}.{}", app(labels).unwrap_or(workload), name.namespace),
        given => given.to_owned(),
    };
    match proxy.text("tracingServiceName") {
        Some("CANONICAL_NAME_ONLY") => or_default(service),
        Some("CANONICAL_NAME_AND_NAMESPACE") => format!("{service}.{}", name.namespace),
        Some(_) => or_default(""),
        None => or_default(proxy.text("serviceCluster").unwrap_or_default()),
    }
}

/// As Istio's `labels.GetApp`: the other way round than the canonical name.
fn app(labels: &Labels) -> Option<&str> {
    let keys = ["app", "app.kubernetes.io/name", "service.istio.io/canonical-name"];
    keys.into_iter().find_map(|key| labels.get(key)).map(String::as_str)
}
