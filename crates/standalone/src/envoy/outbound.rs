//! The egress of a Sidecar: what its workloads call. The same for all of them.

use super::catalog::{Catalog, Upstream};
use super::names::{self, Speech};
use super::resource::{Changes, Differences, Resources};
use super::{Backend, Resource, clusters, http};
use aws_lc_rs::digest::{Context, SHA256};
use onboarding_kinds::mesh::{EgressListener, Sidecar};
use onboarding_wire::onboarding::{self as pb, XdsType};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

/// Where egress listeners are without a `bind`, as with Istio's `captureMode: NONE`.
const DEFAULT_BIND: &str = "127.0.0.1";

/// A Sidecar's shared part.
#[derive(Debug, Default)]
pub struct Outbound {
    /// Listeners, routes, clusters and endpoints.
    pub resources: Vec<Arc<Resource>>,
    pub host_aliases: Vec<pb::HostAlias>,
    pub faults: Vec<String>,
    /// Of resources and aliases.
    pub digest: [u8; 32],
    changes: Differences<Arc<Changes>>,
}

impl PartialEq for Outbound {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest && self.faults == other.faults
    }
}

impl Outbound {
    pub fn by_name(&self) -> Resources<'_> {
        self.resources.iter().map(|resource| ((resource.kind, resource.name.as_str()), resource)).collect()
    }

    /// What makes the resources of this of those of `base`.
    pub fn changes(&self, base: &Self) -> Arc<Changes> {
        self.changes.to(&base.digest, || Arc::new(Changes::between(&base.by_name(), &self.by_name())))
    }

    /// With these resources in the place of those of the same type and name; `None` if it has none of them.
    pub fn with(&self, replaced: &HashMap<(XdsType, String), Arc<Resource>>) -> Option<Self> {
        let newer = |held: &Arc<Resource>| replaced.get(&(held.kind, held.name.clone())).cloned();
        if !self.resources.iter().any(|held| newer(held).is_some()) {
            return None;
        }
        let mut next = Self {
            resources: self.resources.iter().map(|held| newer(held).unwrap_or_else(|| held.clone())).collect(),
            host_aliases: self.host_aliases.clone(),
            faults: self.faults.clone(),
            digest: [0; 32],
            changes: Differences::default(),
        };
        next.digest = digest(&next);
        Some(next)
    }
}

/// `backends`: those of the catalog's upstreams, in their order.
pub fn outbound(sidecar: &Sidecar, catalog: &Catalog, backends: &[Backend]) -> Outbound {
    let mut render = Render { sidecar, out: Outbound::default(), used: BTreeSet::new(), aliases: BTreeMap::new() };
    let mut listeners = BTreeSet::new();
    for (index, egress) in sidecar.egress.iter().enumerate() {
        let path = format!("Sidecar {}/{}: spec.egress[{index}]", sidecar.namespace, sidecar.name);
        let bind = egress.bind.as_deref().unwrap_or(DEFAULT_BIND);
        if bind.parse::<IpAddr>().is_err() {
            render.fault(format!("{path}.bind: {bind:?} is not an IP address"));
            continue;
        }
        let selected = select(sidecar, egress, catalog);
        let ports: BTreeSet<u16> = match &egress.port {
            Some(port) => [port.number].into(),
            None => selected.iter().map(|(_, upstream)| upstream.port).collect(),
        };
        for port in ports {
            if !listeners.insert((bind, port)) {
                if egress.port.is_some() {
                    render.fault(format!("{path}: {bind}:{port} is another egress listener's already"));
                }
                continue;
            }
            let with_port: Vec<_> = selected.iter().filter(|(_, upstream)| upstream.port == port).copied().collect();
            let wanted = egress.port.as_ref().and_then(names::speech);
            render.listener(&path, bind, port, wanted, &with_port);
        }
    }
    render.finish(backends)
}

/// The upstreams that this listener is for, those of the own namespace first.
fn select<'a>(sidecar: &Sidecar, egress: &EgressListener, catalog: &'a Catalog) -> Vec<(usize, &'a Upstream)> {
    let from = &sidecar.namespace;
    let mut selected: Vec<_> = catalog
        .upstreams
        .iter()
        .enumerate()
        .filter(|(_, upstream)| egress.hosts.iter().any(|host| upstream.is_selected(host, from)))
        .collect();
    selected.sort_by_key(|(_, upstream)| upstream.namespace != *from);
    selected
}

struct Render<'a> {
    sidecar: &'a Sidecar,
    out: Outbound,
    /// Indices of the upstreams that something leads to.
    used: BTreeSet<usize>,
    /// Which name is served on which address.
    aliases: BTreeMap<String, String>,
}

impl Render<'_> {
    fn fault(&mut self, fault: String) {
        self.out.faults.push(fault);
    }

    fn listener(
        &mut self,
        path: &str,
        bind: &str,
        port: u16,
        wanted: Option<Speech>,
        upstreams: &[(usize, &Upstream)],
    ) {
        let has = |class: fn(Speech) -> bool| upstreams.iter().any(|(_, upstream)| class(upstream.speech));
        let class: fn(Speech) -> bool = match wanted {
            Some(speech) if speech.is_http() => Speech::is_http,
            Some(Speech::Tls) => is_tls,
            Some(_) => is_tcp,
            None if has(Speech::is_http) || upstreams.is_empty() => Speech::is_http,
            None if has(is_tls) => is_tls,
            None => is_tcp,
        };
        let (served, left_out): (Vec<_>, Vec<_>) =
            upstreams.iter().copied().partition(|(_, upstream)| class(upstream.speech));
        let speaks = if class(Speech::Http1) {
            Speech::Http1
        } else if class(Speech::Tls) {
            Speech::Tls
        } else {
            Speech::Tcp
        };
        for (_, upstream) in left_out {
            self.fault(format!(
                "{path}: {}:{port} is {}, but the listener {bind}:{port} is {}; it is left out (a port's name or appProtocol says what it speaks: `name: http`)",
                upstream.host,
                upstream.speech.name(),
                speaks.name()
            ));
        }
        let name = names::listener(bind, port);
        let stat_prefix = format!("outbound_{name}");
        let (filter_chains, inspect) = match speaks {
            Speech::Http1 | Speech::Http2 => {
                let hosts = self.virtual_hosts(path, bind, port, &served);
                let routes = json!({
                    "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
                    "name": name,
                    "validate_clusters": false,
                    "virtual_hosts": hosts,
                });
                self.out.resources.push(Resource::new(XdsType::Route, &name, &routes));
                (json!([{"filters": [http::network_filter(manager(&name, &stat_prefix))]}]), false)
            }
            Speech::Tls => (self.server_names(path, bind, port, &stat_prefix, &served), true),
            Speech::Tcp => (self.one(path, bind, port, &stat_prefix, &served), false),
        };
        if filter_chains.as_array().is_some_and(Vec::is_empty) {
            self.fault(format!("{path}: no {} service of its hosts has port {port}: nothing listens", speaks.name()));
            return;
        }
        let mut value = json!({
            "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
            "name": name,
            "traffic_direction": "OUTBOUND",
            "address": http::socket_address(bind, port),
            "filter_chains": filter_chains,
        });
        if inspect {
            value["listener_filters"] = json!([{
                "name": "envoy.filters.listener.tls_inspector",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"},
            }]);
        }
        self.out.resources.push(Resource::new(XdsType::Listener, &name, &value));
    }

    /// The names of each upstream that no other has on this listener.
    fn named<'u>(
        &mut self,
        path: &str,
        bind: &str,
        upstreams: &[(usize, &'u Upstream)],
    ) -> Vec<(&'u Upstream, Vec<String>)> {
        let mut taken = BTreeSet::new();
        let mut named = Vec::new();
        for &(index, upstream) in upstreams {
            let mut domains = upstream.domains(&self.sidecar.namespace);
            domains.retain(|domain| taken.insert(domain.to_ascii_lowercase()));
            if domains.is_empty() {
                self.fault(format!(
                    "{path}: every name of {} is another service's already; it is left out",
                    upstream.host
                ));
                continue;
            }
            self.lead(path, bind, index, upstream);
            named.push((upstream, domains));
        }
        named
    }

    fn virtual_hosts(&mut self, path: &str, bind: &str, port: u16, upstreams: &[(usize, &Upstream)]) -> Vec<Value> {
        self.named(path, bind, upstreams)
            .into_iter()
            .map(|(upstream, domains)| {
                let cluster = upstream.cluster();
                let domains: Vec<String> =
                    domains.into_iter().flat_map(|domain| [format!("{domain}:{port}"), domain]).collect();
                json!({
                    "name": format!("{}:{port}", upstream.host),
                    "domains": domains,
                    "include_request_attempt_count": true,
                    "routes": [
                        {
                            "match": {
                                "prefix": "/",
                                "headers": [{
                                    "name": ":method",
                                    "string_match": {"safe_regex": {"regex": "GET|HEAD|OPTIONS"}},
                                }],
                            },
                            "route": {"cluster": cluster, "timeout": "0s", "retry_policy": retries(true)},
                        },
                        {
                            "match": {"prefix": "/"},
                            "route": {"cluster": cluster, "timeout": "0s", "retry_policy": retries(false)},
                        },
                    ],
                })
            })
            .collect()
    }

    /// TLS of the application's own: the name in its first message says where to.
    fn server_names(
        &mut self,
        path: &str,
        bind: &str,
        port: u16,
        stat: &str,
        upstreams: &[(usize, &Upstream)],
    ) -> Value {
        self.named(path, bind, upstreams)
            .into_iter()
            .map(|(upstream, domains)| {
                json!({
                    "name": format!("{}:{port}", upstream.host),
                    "filter_chain_match": {"server_names": domains},
                    "filters": [http::tcp_proxy(stat, &upstream.cluster())],
                })
            })
            .collect()
    }

    /// Bytes without a name: nothing in them says which service is meant, so there can be one.
    fn one(&mut self, path: &str, bind: &str, port: u16, stat: &str, upstreams: &[(usize, &Upstream)]) -> Value {
        let Some(&(index, upstream)) =
            upstreams.iter().min_by_key(|(_, upstream)| (upstream.namespace != self.sidecar.namespace, &upstream.host))
        else {
            return json!([]);
        };
        if upstreams.len() > 1 {
            let hosts: Vec<&str> = upstreams.iter().map(|(_, upstream)| upstream.host.as_str()).collect();
            self.fault(format!(
                "{path}: {} TCP services share {bind}:{port} ({}); all of it goes to {}: give each its own bind, as 127.0.0.3, and hosts",
                hosts.len(),
                hosts.join(", "),
                upstream.host
            ));
        }
        self.lead(path, bind, index, upstream);
        json!([{"filters": [http::tcp_proxy(stat, &upstream.cluster())]}])
    }

    /// Something on this address leads to the upstream.
    fn lead(&mut self, path: &str, bind: &str, index: usize, upstream: &Upstream) {
        self.used.insert(index);
        for name in upstream.aliases() {
            if name.contains('*') {
                continue;
            }
            let held = self.aliases.entry(name.clone()).or_insert_with(|| bind.to_owned());
            if held != bind {
                let fault = format!(
                    "{path}: {name} is served on {held} and on {bind}, and a name has one address; /etc/hosts gets the first: give both listeners one bind"
                );
                self.fault(fault);
            }
        }
    }

    fn finish(mut self, backends: &[Backend]) -> Outbound {
        for index in self.used {
            if let Some(backend) = backends.get(index) {
                self.out.resources.push(backend.cluster.clone());
                self.out.resources.extend(backend.endpoints.clone());
            }
        }
        let mut by_address: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, address) in self.aliases {
            by_address.entry(address).or_default().push(name);
        }
        self.out.host_aliases = by_address.into_iter().map(|(ip, names)| pb::HostAlias { ip, names }).collect();
        self.out.faults.sort();
        self.out.faults.dedup();
        self.out.digest = digest(&self.out);
        self.out
    }
}

fn is_tls(speech: Speech) -> bool {
    speech == Speech::Tls
}

fn is_tcp(speech: Speech) -> bool {
    speech == Speech::Tcp
}

fn digest(out: &Outbound) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    let mut digests: Vec<&[u8; 32]> = out.resources.iter().map(|resource| &resource.digest).collect();
    digests.sort();
    digests.iter().for_each(|digest| context.update(*digest));
    for alias in &out.host_aliases {
        for part in std::iter::once(&alias.ip).chain(&alias.names) {
            context.update(part.as_bytes());
            context.update(&[0]);
        }
        context.update(&[0]);
    }
    let mut digest = [0; 32];
    digest.copy_from_slice(context.finish().as_ref());
    digest
}

fn manager(routes: &str, stat_prefix: &str) -> Value {
    let mut manager = http::connection_manager(stat_prefix);
    manager["rds"] = json!({"route_config_name": routes, "config_source": clusters::file(XdsType::Route, routes)});
    // What `http_proxy` makes of a request: `GET http://ratings.bookinfo:8080/ HTTP/1.1`.
    manager["http_protocol_options"] = json!({"allow_absolute_url": true});
    manager["local_reply_config"] = json!({"mappers": [{
        "filter": {"response_flag_filter": {"flags": ["NR"]}},
        "body_format_override": {
            "content_type": "text/plain; charset=utf-8",
            "text_format_source": {
                "inline_string": "404: this sidecar knows no service by the name \"%REQ(:AUTHORITY)%\" on this port. `onboarding-agent hosts` lists those that it knows; a Service or ServiceEntry with this port, within the Sidecar's egress hosts, adds one.\n",
            },
        },
    }]});
    manager
}

/// Another endpoint is tried where the first did nothing with the request; where trying twice does no harm (`repeatable`), also after it failed.
fn retries(repeatable: bool) -> Value {
    let mut policy = json!({
        "retry_on": "connect-failure,refused-stream,unavailable,cancelled,reset-before-request",
        "num_retries": 2,
        "retry_host_predicate": [{
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
        }],
        "host_selection_retry_max_attempts": "5",
    });
    if repeatable {
        policy["retry_on"] = json!(
            "connect-failure,refused-stream,unavailable,cancelled,reset-before-request,reset,retriable-status-codes"
        );
        policy["retriable_status_codes"] = json!([503]);
    }
    policy
}
