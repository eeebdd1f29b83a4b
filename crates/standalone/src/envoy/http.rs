//! What HTTP listeners and clusters have in common.

use super::names::Speech;
use serde_json::{Value, json};

/// A stream on which nothing is said for so long is over; long enough for one that waits for events.
const STREAM_IDLE: &str = "3600s";

/// An HttpConnectionManager without its routes.
pub fn connection_manager(stat_prefix: &str) -> Value {
    json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": stat_prefix,
        "codec_type": "AUTO",
        "http_filters": [{
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
        }],
        "server_header_transformation": "PASS_THROUGH",
        "normalize_path": true,
        "stream_idle_timeout": STREAM_IDLE,
        "request_headers_timeout": "10s",
        "common_http_protocol_options": {"idle_timeout": STREAM_IDLE},
        "http2_protocol_options": {"allow_connect": true, "max_concurrent_streams": 1000},
        "upgrade_configs": [{"upgrade_type": "websocket"}],
    })
}

/// `typed_extension_protocol_options` of a cluster whose endpoints are an application or a host outside the mesh: exactly what it speaks.
pub fn plain_options(speech: Speech) -> Option<Value> {
    options(match speech {
        Speech::Http1 => json!({"explicit_http_config": {"http_protocol_options": {}}}),
        Speech::Http2 => json!({"explicit_http_config": {"http2_protocol_options": {}}}),
        Speech::Tls | Speech::Tcp => return None,
    })
}

/// The same between sidecars. HTTP/2 where both ends can, also for HTTP/1.1 applications: a peer that drains says so (GOAWAY), and
/// what it didn't take can be sent elsewhere.
pub fn mesh_options(speech: Speech) -> Option<Value> {
    // A machine that is gone without a word is noticed.
    let http2 = json!({"allow_connect": true, "connection_keepalive": {"interval": "30s", "timeout": "10s"}});
    options(match speech {
        Speech::Http1 => json!({"auto_config": {"http_protocol_options": {}, "http2_protocol_options": http2}}),
        Speech::Http2 => json!({"explicit_http_config": {"http2_protocol_options": http2}}),
        Speech::Tls | Speech::Tcp => return None,
    })
}

fn options(mut protocol: Value) -> Option<Value> {
    protocol["@type"] = json!("type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions");
    protocol["common_http_protocol_options"] = json!({"idle_timeout": "300s"});
    Some(json!({"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": protocol}))
}

/// The network filter that passes bytes on to a cluster.
pub fn tcp_proxy(stat_prefix: &str, cluster: &str) -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": stat_prefix,
            "cluster": cluster,
            "idle_timeout": STREAM_IDLE,
            "max_connect_attempts": 3,
        },
    })
}

pub fn network_filter(connection_manager: Value) -> Value {
    json!({"name": "envoy.filters.network.http_connection_manager", "typed_config": connection_manager})
}

pub fn socket_address(address: &str, port: u16) -> Value {
    json!({"socket_address": {"address": address, "port_value": port}})
}
