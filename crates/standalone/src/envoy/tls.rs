//! Mutual TLS between sidecars. Certificate, key and roots come from the agent by SDS; the plane never sees a key.

use serde_json::{Value, json};
use std::collections::BTreeSet;

/// The certificate that is this workload's own, and the roots of the mesh, as the agent's SDS server names them (Istio's names).
const CERTIFICATE: &str = "default";
const ROOTS: &str = "ROOTCA";
/// The static cluster of the agent's bootstrap that leads to its SDS server.
const SDS_CLUSTER: &str = "sds-grpc";

/// A server that talks only to members of the mesh.
pub fn downstream(trust_domain: &str, alpn: &[&str]) -> Value {
    let anybody_of_the_mesh = json!([{"san_type": "URI", "matcher": {"prefix": format!("spiffe://{trust_domain}/")}}]);
    let mut context = common(anybody_of_the_mesh);
    context["alpn_protocols"] = json!(alpn);
    json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": true,
            "common_tls_context": context,
        },
    })
}

/// A client that talks only to these identities.
pub fn upstream(trust_domain: &str, identities: &BTreeSet<String>, sni: Option<&str>) -> Value {
    let mut names: Vec<Value> =
        identities.iter().map(|id| json!({"san_type": "URI", "matcher": {"exact": id}})).collect();
    if names.is_empty() {
        // Without any name Envoy would accept them all.
        names.push(json!({"san_type": "URI", "matcher": {"exact": format!("spiffe://{trust_domain}/nobody")}}));
    }
    let mut config = json!({
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "common_tls_context": common(names.into()),
    });
    if let Some(sni) = sni {
        config["sni"] = json!(sni);
    }
    json!({"name": "envoy.transport_sockets.tls", "typed_config": config})
}

fn common(names: Value) -> Value {
    json!({
        // Both ends are sidecars of this mesh: there is nobody to be lenient with.
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificate_sds_secret_configs": [secret(CERTIFICATE)],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": names},
            "validation_context_sds_secret_config": secret(ROOTS),
        },
    })
}

fn secret(name: &str) -> Value {
    json!({
        "name": name,
        "sds_config": {
            "api_config_source": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": SDS_CLUSTER}}],
                "set_node_on_first_message_only": true,
            },
            "resource_api_version": "V3",
            // A listener that waits for its certificate must not open without it.
            "initial_fetch_timeout": "0s",
        },
    })
}
