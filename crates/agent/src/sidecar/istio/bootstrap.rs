//! The bootstrap of an Envoy that istiod configures, without pilot-agent. Pure.
//!
//! What differs from Istio's own (`tools/packaging/common/envoy_bootstrap.json`): cluster `xds-grpc` is istiod, with the workload's
//! certificate, and not a socket of pilot-agent's; the health port asks Envoy itself; every statistic is kept.

use super::super::bootstrap::MAX_DOWNSTREAM_CONNECTIONS;
use crate::boot::{Address, Istio};
use anyhow::Context;
use serde_json::{Map, Value, json};
use std::net::{IpAddr, SocketAddr};

/// Relative to Envoy's working directory: the configuration that istiod sends refers to it.
pub(super) const SDS_SOCKET: &str = "var/run/secrets/workload-spiffe-uds/socket";
/// In the node's metadata: tells the Envoy that answers at the admin address from another.
pub(super) const INSTANCE: &str = "ONBOARDING_INSTANCE";
/// What pilot-agent has where the metadata says nothing else.
const STATUS_PORT: u16 = 15021;
const PROMETHEUS_PORT: u16 = 15090;

/// As JSON. `istio` is placed.
pub(super) fn json(admin: SocketAddr, istio: &Istio, instance: &str) -> anyhow::Result<Value> {
    let mut node: Map<String, Value> = serde_json::from_slice(&istio.node).context("reading the node")?;
    let wildcard = wildcard(&node);
    let metadata = node.entry("metadata").or_insert_with(|| json!({}));
    let metadata = metadata.as_object_mut().context("the node's metadata is no JSON object")?;
    metadata.insert(INSTANCE.to_owned(), instance.into());
    let port = |name: &str, default: u16| match metadata.get(name) {
        None => Some(default),
        // pilot-agent has them as numbers or as text; zero is none.
        Some(value) => {
            let number = value.as_u64().or_else(|| value.as_str().and_then(|text| text.parse().ok()));
            number.and_then(|number| u16::try_from(number).ok()).filter(|port| *port > 0)
        }
    };
    let mut listeners = Vec::new();
    if let Some(port) = port("ENVOY_PROMETHEUS_PORT", PROMETHEUS_PORT) {
        listeners.push(listener(wildcard, port, "stats", "/stats/prometheus", "/stats/prometheus"));
    }
    if let Some(port) = port("ENVOY_STATUS_PORT", STATUS_PORT) {
        listeners.push(listener(wildcard, port, "agent", "/healthz/ready", "/ready"));
    }
    let istiod = istio.discovery_address.as_ref().context("the address of istiod isn't known")?;
    Ok(json!({
        "node": node,
        "layered_runtime": {"layers": [
            {"name": "global config", "static_layer": {
                "re2.max_program_size.error_level": 32768,
                "envoy.reloadable_features.http_reject_path_with_fragment": false,
            }},
            {"name": "admin", "admin_layer": {}},
        ]},
        "bootstrap_extensions": [{"name": "envoy.bootstrap.internal_listener", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
            "buffer_size_kb": 64,
        }}],
        "stats_config": {"use_all_default_tags": false, "stats_tags": tags()},
        "admin": {
            "address": socket(admin.ip(), admin.port()),
            "ignore_global_conn_limit": true,
        },
        "dynamic_resources": {
            "lds_config": {"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"},
            "cds_config": {"ads": {}, "initial_fetch_timeout": "0s", "resource_api_version": "V3"},
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "set_node_on_first_message_only": true,
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}],
            },
        },
        "static_resources": {
            "clusters": [
                cluster("prometheus_stats", "STATIC", socket(admin.ip(), admin.port())),
                http2(cluster("sds-grpc", "STATIC", json!({"pipe": {"path": format!("./{SDS_SOCKET}")}}))),
                xds(istiod, &istio.istiod_san),
            ],
            "listeners": listeners,
        },
        "overload_manager": {"resource_monitors": [{
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "max_active_downstream_connections": MAX_DOWNSTREAM_CONNECTIONS,
            },
        }]},
    }))
}

/// All addresses, of IPv6 too where this proxy's own is one (`sidecar~<address>~<name>~<domain>`).
fn wildcard(node: &Map<String, Value>) -> IpAddr {
    let id = node.get("id").and_then(Value::as_str).unwrap_or_default();
    match id.split('~').nth(1).and_then(|ip| ip.parse::<IpAddr>().ok()) {
        Some(IpAddr::V6(_)) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        _ => std::net::Ipv4Addr::UNSPECIFIED.into(),
    }
}

fn socket(ip: IpAddr, port: u16) -> Value {
    // A `::` that takes IPv4 as well; of another address it means nothing.
    let mut socket = json!({"address": ip.to_string(), "port_value": port});
    if ip == IpAddr::from(std::net::Ipv6Addr::UNSPECIFIED) {
        socket["ipv4_compat"] = true.into();
    }
    json!({"socket_address": socket})
}

fn cluster(name: &str, kind: &str, address: Value) -> Value {
    json!({
        "name": name,
        "alt_stat_name": format!("{name};"),
        "type": kind,
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}]},
    })
}

fn http2(mut cluster: Value) -> Value {
    cluster["typed_extension_protocol_options"] = json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {"http2_protocol_options": {
            // A gateway that is gone without a word.
            "connection_keepalive": {"interval": "30s", "timeout": "10s"},
        }},
    }});
    cluster
}

fn xds(istiod: &Address, name: &str) -> Value {
    let (kind, host) = match istiod.host.parse::<IpAddr>() {
        Ok(ip) => ("STATIC", ip.to_string()),
        Err(_) => ("STRICT_DNS", istiod.host.clone()),
    };
    let address = json!({"socket_address": {"address": host, "port_value": istiod.port}});
    let mut cluster = http2(cluster("xds-grpc", kind, address));
    cluster["connect_timeout"] = "10s".into();
    cluster["dns_lookup_family"] = "ALL".into();
    cluster["upstream_connection_options"] = json!({"tcp_keepalive": {"keepalive_time": 300}});
    cluster["circuit_breakers"] = json!({"thresholds": (["DEFAULT", "HIGH"]).map(|priority| json!({
        "priority": priority, "max_connections": 100_000, "max_pending_requests": 100_000, "max_requests": 100_000,
    }))});
    cluster["transport_socket"] = json!({"name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": name,
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
            "tls_certificate_sds_secret_configs": [secret("default")],
            "combined_validation_context": {
                "default_validation_context": {
                    "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": name}}],
                },
                "validation_context_sds_secret_config": secret("ROOTCA"),
            },
        },
    }});
    cluster
}

fn secret(name: &str) -> Value {
    json!({"name": name, "sds_config": {
        "api_config_source": {
            "api_type": "GRPC",
            "grpc_services": [{"envoy_grpc": {"cluster_name": "sds-grpc"}}],
            "set_node_on_first_message_only": true,
            "transport_api_version": "V3",
        },
        "initial_fetch_timeout": "0s",
        "resource_api_version": "V3",
    }})
}

/// One path, answered by Envoy's admin address.
fn listener(ip: IpAddr, port: u16, stat_prefix: &str, path: &str, admin_path: &str) -> Value {
    json!({
        "name": SocketAddr::new(ip, port).to_string(),
        "address": socket(ip, port),
        "ignore_global_conn_limit": true,
        "bypass_overload_manager": true,
        "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "codec_type": "AUTO",
            "stat_prefix": stat_prefix,
            "route_config": {"virtual_hosts": [{"name": "backend", "domains": ["*"], "routes": [{
                // No more of the admin address than this.
                "match": {"path": path, "headers": [{"name": ":method", "string_match": {"exact": "GET"}}]},
                "route": {"cluster": "prometheus_stats", "prefix_rewrite": admin_path},
            }]}]},
            "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
            }}],
        }}]}],
    })
}

/// Istio's, so that its dashboards find the same labels.
fn tags() -> Value {
    let tags = [
        ("cluster_name", r"^cluster(\.(.+);)"),
        ("http_conn_manager_prefix", r"^http\.(((?:[_.[:digit:]\w]*|[_\[\]aAbBcCdDeEfF[:digit:]\w\:]*));\.)"),
        ("thread_name", r"^server(\.(.+))\.watchdog"),
        ("tcp_prefix", r"^tcp\.((.*?)\.)\w+?$"),
        ("response_code", r"_rq(_(\d{3}))$"),
        ("response_code_class", r"_rq(_(\dxx))$"),
        (
            "http_conn_manager_listener_prefix",
            r"^listener(?=\.).*?\.http\.(((?:[_.[:digit:]]*|[_\[\]aAbBcCdDeEfF[:digit:]]*))\.)",
        ),
        ("listener_address", r"^listener\.(((?:[_.[:digit:]]*|[_\[\]aAbBcCdDeEfF[:digit:]]*))\.)"),
        ("authz_enforce_result", r"rbac(\.(allowed|denied))"),
        ("authz_dry_run_action", r"(\.istio_dry_run_(allow|deny)_)"),
        ("authz_dry_run_result", r"(\.shadow_(allowed|denied))"),
    ];
    tags.map(|(name, regex)| json!({"tag_name": name, "regex": regex})).to_vec().into()
}
