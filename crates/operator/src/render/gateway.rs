//! The way in for VMs: an Istio gateway that routes by SNI and passes TLS through, so that it ends where its key is.
//!
//! On 15443: to the istiod of each revision by its name, to the plane by the endpoint's names, and to the plane whoever comes with no name
//! or another (a client that was given an IP address sends none; what isn't the plane's client fails its TLS there). Where pods are in a
//! network of their own, also to them (`AUTO_PASSTHROUGH`). On 443: to the repository.

use super::pod::Pod;
use super::{
    ADMIN_PORT, ENDPOINT_PORT, GATEWAY, HTTPS_PORT, HTTPS_TARGET_PORT, IP_FAMILIES, Objects, PLANE, REPOSITORY,
    ingress_of_cluster,
};
use serde_json::{Value, json};
use std::net::IpAddr;

const ISTIO: &str = "networking.istio.io/v1";
const ISTIOD_PORT: u16 = 15012;
const METRICS_PORT: u16 = 15020;
const NETWORK: &str = "topology.istio.io/network";
const GRACE_PERIOD: u32 = 60;

pub(super) fn render(all: &Objects<'_>) -> Vec<Value> {
    let mut objects = vec![
        all.service_account(GATEWAY),
        service(all),
        network_policy(all),
        deployment(all),
        all.disruption_budget(GATEWAY),
        all.autoscaler(GATEWAY),
    ];
    let targets = all.facts.istiods.iter().map(|istiod| istiod.service.as_str()).chain([PLANE]);
    let repository = has_repository(all).then_some(REPOSITORY);
    objects.extend(targets.chain(repository).map(|service| passed_through(all, service)));
    objects.push(all.object(GATEWAY, ISTIO, "Gateway", GATEWAY, json!({"spec": gateway(all)})));
    objects.push(all.object(GATEWAY, ISTIO, "VirtualService", GATEWAY, json!({"spec": virtual_service(all)})));
    objects
}

fn has_repository(all: &Objects<'_>) -> bool {
    all.enabled.onboarding.local_repository
}

/// Host names that can be an SNI; IP addresses can't.
fn names(all: &Objects<'_>) -> Vec<String> {
    let hosts = all.enabled.onboarding.hosts.iter();
    hosts.filter(|host| host.parse::<IpAddr>().is_err()).map(|host| host.to_ascii_lowercase()).collect()
}

/// The name in an istiod's certificate.
fn istiod_name(all: &Objects<'_>, service: &str) -> String {
    format!("{service}.{}.svc", all.namespace())
}

fn service(all: &Objects<'_>) -> Value {
    let port = |name: &str, port: u16, target: u16| json!({"name": name, "port": port, "targetPort": target, "protocol": "TCP"});
    let mut ports = vec![port("tls-onboarding", ENDPOINT_PORT, ENDPOINT_PORT)];
    if has_repository(all) {
        ports.push(port("tls-repository", HTTPS_PORT, HTTPS_TARGET_PORT));
    }
    let spec = json!({
        "type": "LoadBalancer", "ipFamilyPolicy": IP_FAMILIES, "selector": all.selector(GATEWAY), "ports": ports,
    });
    let mut service = all.object(GATEWAY, "v1", "Service", GATEWAY, json!({"spec": spec}));
    let names = names(all);
    if !names.is_empty() {
        service["metadata"]["annotations"] = json!({"external-dns.alpha.kubernetes.io/hostname": names.join(",")});
    }
    if let Some(network) = &all.facts.network {
        service["metadata"]["labels"][NETWORK] = network.as_str().into();
    }
    service
}

fn network_policy(all: &Objects<'_>) -> Value {
    let mut ports = vec![json!({"port": ENDPOINT_PORT, "protocol": "TCP"})];
    if has_repository(all) {
        ports.push(json!({"port": HTTPS_TARGET_PORT, "protocol": "TCP"}));
    }
    // Egress isn't limited: in a network of its own, any pod is behind it.
    let ingress = json!([{"ports": ports}, ingress_of_cluster(&[ADMIN_PORT, METRICS_PORT])]);
    all.network_policy(GATEWAY, ingress, None)
}

fn deployment(all: &Objects<'_>) -> Value {
    let mut labels = vec![("sidecar.istio.io/inject", "true".to_owned())];
    if let Some(revision) = all.gateway_revision() {
        labels.push(("istio.io/rev", revision.to_owned()));
    }
    let mut ports = vec![
        json!({"name": "tls-onboarding", "containerPort": ENDPOINT_PORT, "protocol": "TCP"}),
        json!({"name": "http-metrics", "containerPort": METRICS_PORT, "protocol": "TCP"}),
    ];
    if has_repository(all) {
        ports.push(json!({"name": "tls-repository", "containerPort": HTTPS_TARGET_PORT, "protocol": "TCP"}));
    }
    let mut container = json!({
        // The name by which injection finds it.
        "name": "istio-proxy",
        "image": all.settings.gateway_image,
        "ports": ports,
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}},
        "readinessProbe": {
            "httpGet": {"path": "/healthz/ready", "port": ADMIN_PORT},
            "periodSeconds": 5, "timeoutSeconds": 3, "failureThreshold": 4,
        },
    });
    if let Some(network) = &all.facts.network {
        labels.push((NETWORK, network.clone()));
        // It sends to pods of its own network only.
        container["env"] = json!([{"name": "ISTIO_META_REQUESTED_NETWORK_VIEW", "value": network}]);
    }
    all.deployment(Pod {
        name: GATEWAY,
        labels,
        annotations: json!({"inject.istio.io/templates": "gateway"}),
        container,
        volumes: Vec::new(),
        // Injection mounts the token that it needs, which is for istiod alone.
        needs_token: false,
        grace_period: GRACE_PERIOD,
    })
}

fn gateway(all: &Objects<'_>) -> Value {
    let server = |number: u16, name: &str, mode: &str, hosts: Vec<String>| json!({"port": {"number": number, "name": name, "protocol": "TLS"}, "tls": {"mode": mode}, "hosts": hosts});
    let any = || vec!["*".to_owned()];
    let istiods: Vec<String> = all.facts.istiods.iter().map(|istiod| istiod_name(all, &istiod.service)).collect();
    let mut servers = Vec::new();
    if !istiods.is_empty() {
        servers.push(server(ENDPOINT_PORT, "tls-istiod", "PASSTHROUGH", istiods));
    }
    servers.push(server(ENDPOINT_PORT, "tls-onboarding", "PASSTHROUGH", any()));
    if all.facts.network.is_some() {
        let top = all.settings.cluster_domain.rsplit('.').next().unwrap_or_default();
        servers.push(server(ENDPOINT_PORT, "tls-pods", "AUTO_PASSTHROUGH", vec![format!("*.{top}")]));
    }
    if has_repository(all) {
        servers.push(server(HTTPS_PORT, "tls-repository", "PASSTHROUGH", any()));
    }
    json!({"selector": {"istio": GATEWAY}, "servers": servers})
}

fn virtual_service(all: &Objects<'_>) -> Value {
    let route = |port: u16, names: Vec<String>, service: &str, target: u16| {
        json!({
            "match": [{"port": port, "sniHosts": names}],
            "route": [{"destination": {"host": all.host_of(service), "port": {"number": target}}}],
        })
    };
    let istiods = all.facts.istiods.iter();
    let mut tls: Vec<Value> = istiods
        .map(|istiod| route(ENDPOINT_PORT, vec![istiod_name(all, &istiod.service)], &istiod.service, ISTIOD_PORT))
        .collect();
    // The endpoint's names too: `*` alone would lose to a wildcard of somebody else's VirtualService.
    let names = names(all);
    if !names.is_empty() {
        tls.push(route(ENDPOINT_PORT, names, PLANE, ENDPOINT_PORT));
    }
    tls.push(route(ENDPOINT_PORT, vec!["*".to_owned()], PLANE, ENDPOINT_PORT));
    if has_repository(all) {
        tls.push(route(HTTPS_PORT, vec!["*".to_owned()], REPOSITORY, HTTPS_PORT));
    }
    // Of this namespace's gateway only.
    json!({"hosts": ["*"], "gateways": [GATEWAY], "exportTo": ["."], "tls": tls})
}

/// TLS that passes through is not wrapped again. For this gateway only: in Istio's root namespace it would be for the whole mesh.
fn passed_through(all: &Objects<'_>, service: &str) -> Value {
    let spec = json!({
        "host": all.host_of(service),
        "exportTo": ["."],
        "workloadSelector": {"matchLabels": {"istio": GATEWAY}},
        "trafficPolicy": {"tls": {"mode": "DISABLE"}},
    });
    all.object(GATEWAY, ISTIO, "DestinationRule", &format!("{GATEWAY}-{service}"), json!({"spec": spec}))
}
