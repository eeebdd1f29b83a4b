//! Envoy's bootstrap and command line. Pure.

use super::Options;
use super::process::Launch;
use crate::boot::Standalone;
use onboarding_wire::xds;
use serde_json::json;
use std::ffi::OsString;

/// Relative to Envoy's working directory, because a Unix socket's path may have 107 bytes and a state directory's may have more.
pub(super) const SDS_SOCKET: &str = "sds.sock";
pub(super) const FILE: &str = "bootstrap.json";

/// Connections of callers; one more is refused, instead of memory running out under all the others.
pub(super) const MAX_DOWNSTREAM_CONNECTIONS: u32 = 20_000;
/// How long connections of a listener that was replaced or removed may go on.
pub(super) const DRAIN_SECONDS: u64 = 45;

/// The bootstrap as JSON. `instance` is in the node's metadata, so that whoever asks the admin address can tell this Envoy from another's.
pub(super) fn json(options: &Options, boot: &Standalone, instance: &str) -> Vec<u8> {
    // The cluster's name is the one that Istio's agents serve by, so that the resources are the same in both meshes.
    let bootstrap = json!({
        "node": {"id": boot.node_id, "cluster": boot.cluster, "metadata": {"instance": instance}},
        "admin": {
            "address": {"socket_address": {"address": options.admin.ip().to_string(), "port_value": options.admin.port()}},
            "ignore_global_conn_limit": true,
        },
        "dynamic_resources": {
            "lds_config": from_file(xds::LISTENERS),
            "cds_config": from_file(xds::CLUSTERS),
        },
        "static_resources": {"clusters": [{
            "name": "sds-grpc",
            "type": "STATIC",
            "connect_timeout": "1s",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {"http2_protocol_options": {}},
                },
            },
            "load_assignment": {"cluster_name": "sds-grpc", "endpoints": [{"lb_endpoints": [{
                "endpoint": {"address": {"pipe": {"path": format!("./{SDS_SOCKET}")}}},
            }]}]},
        }]},
        "overload_manager": {"resource_monitors": [{
            "name": "envoy.resource_monitors.global_downstream_max_connections",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
                "max_active_downstream_connections": MAX_DOWNSTREAM_CONNECTIONS,
            },
        }]},
    });
    bootstrap.to_string().into_bytes()
}

/// No `watched_directory`: with one, each rename in it would make Envoy read both files again.
fn from_file(path: &str) -> serde_json::Value {
    json!({"path_config_source": {"path": format!("./{path}")}, "resource_api_version": "V3"})
}

/// How Envoy is started.
pub(super) fn launch(options: &Options, drain_seconds: u64) -> Launch {
    let binary = options.binary.clone();
    Launch { name: "envoy", binary, arguments: arguments(drain_seconds), environment: None }
}

/// What Envoy is started with, its working directory being [`Options::directory`].
pub(super) fn arguments(drain_seconds: u64) -> Vec<OsString> {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let concurrency = cpus.min(2).to_string();
    let drain = drain_seconds.to_string();
    [
        "-c",
        FILE,
        // One Envoy at a time, and no shared memory to collide in.
        "--disable-hot-restart",
        "--concurrency",
        &concurrency,
        "--log-level",
        "warning",
        // `process` reads this format.
        "--log-format",
        "[%Y-%m-%d %T.%e][%l][%n] %v",
        "--log-format-escaped",
        // Every connection is told to end at its next answer, not more and more of them over the drain time.
        "--drain-strategy",
        "immediate",
        "--drain-time-s",
        &drain,
    ]
    .map(OsString::from)
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_and_the_admin_is_where_it_was_asked_for() {
        let options = Options {
            binary: "/usr/local/bin/envoy".into(),
            directory: "/var/lib/onboarding/sidecar".into(),
            stdout: "/dev/stdout".into(),
            stderr: "/dev/stderr".into(),
            admin: "[::1]:15000".parse().unwrap(),
            istio: crate::sidecar::IstioWay::Envoy,
            identity: "/var/lib/onboarding/mesh-identity.json".into(),
        };
        let boot = Standalone { node_id: "bookinfo/\"r\"".into(), cluster: "ratings".into(), ..Standalone::default() };
        let bootstrap: serde_json::Value = serde_json::from_slice(&json(&options, &boot, "i")).unwrap();
        assert_eq!(bootstrap["node"]["id"], "bookinfo/\"r\"");
        assert_eq!(bootstrap["admin"]["address"]["socket_address"], json!({"address": "::1", "port_value": 15000}));
        assert_eq!(
            bootstrap["dynamic_resources"]["lds_config"]["path_config_source"],
            json!({"path": "./xds/lds.json"})
        );
        assert!(!bootstrap.to_string().contains("/var/lib"), "{bootstrap}");
    }
}
