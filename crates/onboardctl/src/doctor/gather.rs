//! Asks the cluster and the endpoint for the facts.

use super::endpoint::{ask, ask_gateway, resolve};
use super::facts::{Asked, Endpoint, Facts, Host, Objects, OtherGateway};
use crate::manifests;
use crate::plane::cluster::Cluster;
use crate::plane::objects::{
    ACCOUNTS, CONFIG_MAPS, CONTROL_PLANES, DEPLOYMENTS, ENTRIES, GROUPS, ISTIO_SYSTEM, POLICIES, SECRETS, SERVICES,
    WARS, items, name, text,
};
use jiff::Timestamp;
use onboarding_kinds::control_plane::{CustomGateway, Onboarding};
use onboarding_kinds::manifest::Object;
use serde_json::Value;
use std::net::IpAddr;

pub const ROOT: &str = "istio-ca-root-cert";
pub const GATEWAY: &str = "vmgateway";
const PLANE_CONFIG: &str = "onboarding-plane-config";
/// More hosts than an endpoint has.
const MOST_HOSTS: usize = 16;
/// More than the revisions of a mesh.
const MOST_CONFIG_MAPS: usize = 100;

pub fn facts(cluster: &Cluster) -> Facts {
    let version = cluster.version();
    // Where it can't be reached, each question would wait for it again.
    let objects = version.is_ok().then(|| objects(cluster));
    let endpoint = objects.as_ref().and_then(|objects| {
        let enabled = enabled(objects.planes.as_deref().unwrap_or_default())?;
        Some(endpoint(cluster, &enabled, objects))
    });
    Facts { now: Timestamp::now(), server: cluster.server().to_owned(), version, objects, endpoint }
}

/// What the one ControlPlane that enables onboarding says of it.
pub fn enabled(planes: &[Value]) -> Option<Onboarding> {
    let mut planes = manifests::of_objects(planes).admission().planes;
    let first = planes.pop()?;
    planes.is_empty().then_some(first)
}

fn objects(cluster: &Cluster) -> Objects {
    let here = Some(ISTIO_SYSTEM);
    Objects {
        planes: cluster.list(&CONTROL_PLANES, here),
        policies: cluster.list(&POLICIES, None),
        groups: cluster.list(&GROUPS, None),
        wars: cluster.list(&WARS, None),
        entries: cluster.list(&ENTRIES, None),
        accounts: cluster.list_metadata(&ACCOUNTS, None),
        roots: cluster.list_named(&CONFIG_MAPS, ROOT),
        config_maps: config_maps(cluster),
        deployments: cluster.list(&DEPLOYMENTS, here),
        services: cluster.list(&SERVICES, here),
        plane_config: cluster.get(&CONFIG_MAPS, ISTIO_SYSTEM, PLANE_CONFIG),
    }
}

/// One by one: the plane keeps one for each registration that it remembers, in the same namespace.
fn config_maps(cluster: &Cluster) -> Asked<Vec<Value>> {
    let all = cluster.list_metadata(&CONFIG_MAPS, Some(ISTIO_SYSTEM))?;
    let of_istio = all.iter().map(name).filter(|name| name.starts_with("istio")).take(MOST_CONFIG_MAPS);
    of_istio.filter_map(|name| cluster.get(&CONFIG_MAPS, ISTIO_SYSTEM, name).transpose()).collect()
}

/// The one that the plane gives to sidecars.
fn custom_gateway(planes: &[Value]) -> Option<CustomGateway> {
    manifests::of_objects(planes).items.into_iter().find_map(|item| match item.object {
        Object::ControlPlane(plane) => plane.custom_gateway,
        _ => None,
    })
}

/// The name of an istiod that there is, as its certificate has it.
fn istiod_name(services: &[Value]) -> String {
    let named = |wanted: fn(&str) -> bool| services.iter().map(name).find(|name| wanted(name));
    let found = named(|name| name == "istiod").or_else(|| named(|name| name.starts_with("istiod-")));
    format!("{}.{ISTIO_SYSTEM}.svc", found.unwrap_or("istiod"))
}

fn endpoint(cluster: &Cluster, enabled: &Onboarding, objects: &Objects) -> Endpoint {
    let services = objects.services.as_deref().unwrap_or_default();
    let secret = cluster.get(&SECRETS, ISTIO_SYSTEM, &enabled.secret_name);
    let custom = custom_gateway(objects.planes.as_deref().unwrap_or_default());
    let (hosts, gateway, other_gateway) = cluster.runtime().block_on(async {
        let mut gateway: Vec<IpAddr> = Vec::new();
        for service in services.iter().filter(|service| name(service) == GATEWAY) {
            let external = items(service, "/spec/externalIPs").filter_map(Value::as_str);
            gateway.extend(external.filter_map(|ip| ip.parse::<IpAddr>().ok()));
            for ingress in items(service, "/status/loadBalancer/ingress") {
                match (text(ingress, "/ip").parse(), text(ingress, "/hostname")) {
                    (Ok(ip), _) => gateway.push(ip),
                    (Err(_), "") => {}
                    (Err(_), host) => gateway.extend(resolve(host).await.unwrap_or_default()),
                }
            }
        }
        let mut hosts = Vec::new();
        for host in enabled.hosts.iter().take(MOST_HOSTS) {
            let addresses = resolve(host).await;
            // A name that isn't in the DNS yet can be asked for at the gateway all the same.
            let to_ask = addresses.as_ref().unwrap_or(&gateway);
            let answer = ask(host, to_ask).await;
            hosts.push(Host { name: host.clone(), addresses, answer });
        }
        let other = match custom {
            Some(CustomGateway { host, port }) => {
                let istiod = istiod_name(services);
                let outcome = ask_gateway(&host, port, &istiod).await;
                Some(OtherGateway { host, port, istiod, outcome })
            }
            None => None,
        };
        (hosts, gateway, other)
    });
    Endpoint { secret_name: enabled.secret_name.clone(), secret, hosts, gateway, other_gateway }
}
