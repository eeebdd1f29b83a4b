//! The ingress of a Sidecar: what a workload receives.

use super::names::{self, Speech, Target};
use super::{Member, Resource, http, tls};
use onboarding_kinds::mesh::{IngressListener, Sidecar};
use onboarding_wire::onboarding::{self as pb, XdsType};
use serde_json::{Value, json};
use std::net::IpAddr;
use std::sync::Arc;

/// A workload's own part.
#[derive(Debug, Default, PartialEq)]
pub struct Inbound {
    pub resources: Vec<Arc<Resource>>,
    pub listeners: Vec<pb::IngressListener>,
    pub faults: Vec<String>,
}

pub fn inbound(sidecar: &Sidecar, member: &Member, trust_domain: &str) -> Inbound {
    let mut out = Inbound::default();
    let mut taken = Vec::new();
    for (index, ingress) in sidecar.ingress.iter().enumerate() {
        let what = format!("Sidecar {}/{}: spec.ingress[{index}]", sidecar.namespace, sidecar.name);
        let bind = ingress.bind.as_deref().unwrap_or(&member.listen);
        let port = ingress.port.number;
        if let Err(problem) = add(&mut out, &mut taken, ingress, bind, trust_domain) {
            out.faults.push(format!("{what}: {problem}"));
        } else {
            out.listeners.push(pb::IngressListener {
                bind: bind.to_owned(),
                port: port.into(),
                default_endpoint: ingress.default_endpoint.clone(),
            });
        }
    }
    out
}

fn add(
    out: &mut Inbound,
    taken: &mut Vec<u16>,
    ingress: &IngressListener,
    bind: &str,
    trust_domain: &str,
) -> Result<(), String> {
    let port = ingress.port.number;
    let address: IpAddr = bind.parse().map_err(|_| format!("bind: {bind:?} is not an IP address"))?;
    let target = names::target(&ingress.default_endpoint).ok_or_else(|| {
        format!("defaultEndpoint: {:?} is neither IP:PORT nor unix:///PATH", ingress.default_endpoint)
    })?;
    let target = match target {
        // As Istio reads it: the workload's own address.
        Target::Socket(ip, port) if ip.is_unspecified() => Target::Socket(address, port),
        target => target,
    };
    if target == Target::Socket(address, port) {
        return Err(format!(
            "defaultEndpoint: {} is where the listener itself is; let the application listen on 127.0.0.1:{port}",
            ingress.default_endpoint
        ));
    }
    if taken.contains(&port) {
        return Err(format!("port {port} is another ingress listener's already"));
    }
    taken.push(port);
    // Without a protocol it is passed on as it comes.
    let speech = names::speech(&ingress.port).unwrap_or(Speech::Tcp);
    out.resources.push(listener(bind, port, speech, trust_domain));
    out.resources.push(cluster(port, speech, &target));
    Ok(())
}

fn listener(bind: &str, port: u16, speech: Speech, trust_domain: &str) -> Arc<Resource> {
    let name = names::listener(bind, port);
    let cluster = names::inbound_cluster(port);
    let stat_prefix = format!("inbound_{port}");
    let (filter, alpn): (Value, &[&str]) = if speech.is_http() {
        let mut manager = http::connection_manager(&stat_prefix);
        manager["route_config"] = json!({
            "name": cluster,
            "validate_clusters": false,
            "virtual_hosts": [{
                "name": format!("inbound|http|{port}"),
                "domains": ["*"],
                // No retries: the caller's sidecar makes them, elsewhere.
                "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s"}}],
            }],
        });
        // The application reads who calls in x-forwarded-client-cert; what a caller says of itself in it is dropped.
        manager["forward_client_cert_details"] = json!("SANITIZE_SET");
        manager["set_current_client_cert_details"] = json!({"uri": true});
        (http::network_filter(manager), &["h2", "http/1.1"])
    } else {
        (http::tcp_proxy(&stat_prefix, &cluster), &[])
    };
    let value = json!({
        "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
        "name": name,
        "traffic_direction": "INBOUND",
        "address": http::socket_address(bind, port),
        "filter_chains": [{
            "transport_socket": tls::downstream(trust_domain, alpn),
            "transport_socket_connect_timeout": "10s",
            "filters": [filter],
        }],
    });
    Resource::new(XdsType::Listener, &name, &value)
}

fn cluster(port: u16, speech: Speech, target: &Target) -> Arc<Resource> {
    let name = names::inbound_cluster(port);
    let address = match target {
        Target::Socket(ip, port) => http::socket_address(&ip.to_string(), *port),
        Target::Pipe(path) => json!({"pipe": {"path": path}}),
    };
    let mut value = json!({
        "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    });
    if let Some(options) = http::plain_options(speech) {
        value["typed_extension_protocol_options"] = options;
    }
    Resource::new(XdsType::Cluster, &name, &value)
}
