//! The endpoint.

use super::pod::Pod;
use super::{ADMIN_PORT, ANY, ENDPOINT_PORT, IP_FAMILIES, Objects, PLANE, ingress_of_cluster};
use serde_json::{Value, json};

/// All agents come from the addresses of a few gateways: a limit for each address would be one for all of them.
const AUTHORIZATIONS_PER_SECOND: u32 = 2000;
const CONNECTIONS_PER_ADDRESS: u32 = 100_000;
/// The plane tells its agents to go elsewhere, and waits for them.
const GRACE_PERIOD: u32 = 60;

pub(super) fn render(all: &Objects<'_>) -> Vec<Value> {
    let service = json!({"spec": {
        "ipFamilyPolicy": IP_FAMILIES,
        "selector": all.selector(PLANE),
        "ports": [{
            "name": "tls-onboarding", "port": ENDPOINT_PORT, "targetPort": ENDPOINT_PORT, "protocol": "TCP",
            "appProtocol": "tls",
        }],
    }});
    // Egress isn't limited: issuers of JWTs, STS and the API server are anywhere.
    let ingress = json!([all.ingress_of_gateway(ENDPOINT_PORT), ingress_of_cluster(&[ADMIN_PORT])]);
    vec![
        all.object(PLANE, "v1", "Service", PLANE, service),
        all.network_policy(PLANE, ingress, None),
        deployment(all),
        all.disruption_budget(PLANE),
        all.autoscaler(PLANE),
    ]
}

fn deployment(all: &Objects<'_>) -> Value {
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let mut arguments = vec!["kubernetes".to_owned()];
    for (option, value) in [
        ("--namespace", "$(POD_NAMESPACE)".to_owned()),
        ("--replica", "$(POD_NAME)".to_owned()),
        ("--listen", format!("{ANY}:{ENDPOINT_PORT}")),
        ("--admin-listen", format!("{ANY}:{ADMIN_PORT}")),
        ("--audit-log", "-".to_owned()),
        ("--log-format", "json".to_owned()),
        ("--authorizations-per-second", AUTHORIZATIONS_PER_SECOND.to_string()),
        ("--connections-per-address", CONNECTIONS_PER_ADDRESS.to_string()),
    ] {
        arguments.extend([option.to_owned(), value]);
    }
    arguments.extend(all.settings.plane_arguments.iter().cloned());
    let container = json!({
        "name": PLANE,
        "image": all.settings.plane_image,
        "args": arguments,
        "env": [field("POD_NAMESPACE", "metadata.namespace"), field("POD_NAME", "metadata.name")],
        "ports": [
            {"name": "tls-onboarding", "containerPort": ENDPOINT_PORT, "protocol": "TCP"},
            {"name": "http-admin", "containerPort": ADMIN_PORT, "protocol": "TCP"},
        ],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}},
    });
    all.our_deployment(Pod {
        name: PLANE,
        labels: Vec::new(),
        annotations: Value::Null,
        container,
        volumes: Vec::new(),
        needs_token: true,
        grace_period: GRACE_PERIOD,
    })
}
