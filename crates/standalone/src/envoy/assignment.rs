//! Envoy's `ClusterLoadAssignment`. Typed, unlike the rest: it has an endpoint for each registration and is written again when one
//! changes, and a tree of ten thousand values costs twenty times what its text does.

use serde::Serialize;
use std::borrow::Cow;
use std::collections::BTreeMap;

#[derive(Serialize)]
pub struct Assignment<'a> {
    /// Only a resource of its own says its type.
    #[serde(rename = "@type", skip_serializing_if = "Option::is_none")]
    of_type: Option<&'static str>,
    cluster_name: &'a str,
    endpoints: Vec<InLocality<'a>>,
}

#[derive(Serialize)]
struct InLocality<'a> {
    locality: Locality<'a>,
    lb_endpoints: Vec<Endpoint<'a>>,
}

#[derive(Serialize)]
struct Locality<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    region: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    zone: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sub_zone: Option<&'a str>,
}

#[derive(Serialize)]
pub struct Endpoint<'a> {
    endpoint: Host<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    health_status: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load_balancing_weight: Option<u32>,
}

#[derive(Serialize)]
struct Host<'a> {
    address: Address<'a>,
}

#[derive(Serialize)]
struct Address<'a> {
    socket_address: SocketAddress<'a>,
}

#[derive(Serialize)]
struct SocketAddress<'a> {
    address: Cow<'a, str>,
    port_value: u16,
}

impl<'a> Assignment<'a> {
    /// Endpoints by `region/zone/subzone`.
    pub fn new(cluster_name: &'a str, localities: BTreeMap<Option<&'a str>, Vec<Endpoint<'a>>>) -> Self {
        let endpoints = localities.into_iter().map(|(locality, lb_endpoints)| {
            let mut parts =
                locality.unwrap_or_default().splitn(3, '/').map(|part| Some(part).filter(|part| !part.is_empty()));
            let mut part = || parts.next().flatten();
            InLocality { locality: Locality { region: part(), zone: part(), sub_zone: part() }, lb_endpoints }
        });
        Self { of_type: None, cluster_name, endpoints: endpoints.collect() }
    }

    pub fn typed(self) -> Self {
        Self { of_type: Some("type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"), ..self }
    }
}

impl<'a> Endpoint<'a> {
    pub fn new(address: Cow<'a, str>, port: u16, weight: Option<u32>, health: Option<&'static str>) -> Self {
        Self {
            endpoint: Host { address: Address { socket_address: SocketAddress { address, port_value: port } } },
            health_status: health,
            load_balancing_weight: weight.filter(|weight| *weight > 0),
        }
    }
}
