//! Envoy's admin address: whether it is live, what became of a configuration, how much is in flight.

use super::files::Subscription;
use anyhow::{Context, ensure};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

const WITHIN: Duration = Duration::from_secs(2);
const MAX_ANSWER: usize = 16 << 20;

#[derive(Clone)]
pub(super) struct Admin {
    address: SocketAddr,
    client: Client<HttpConnector, Empty<Bytes>>,
}

/// The statistics that a question was about.
#[derive(Debug, Default)]
pub(super) struct Stats {
    numbers: HashMap<String, u64>,
    texts: HashMap<String, String>,
}

/// What callers have open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InFlight {
    /// HTTP requests, and connections of protocols that have no requests.
    pub active: u64,
    /// Connections, idle ones included.
    pub connections: u64,
    /// Requests and connections since the start: when it stands still, nobody is calling.
    pub total: u64,
}

impl Admin {
    pub(super) fn new(address: SocketAddr) -> Self {
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(1).build(HttpConnector::new());
        Self { address, client }
    }

    /// Whether the Envoy that answers is this one: it must be live *and* know its own instance. Another process may own the address.
    pub(super) async fn is_instance(&self, instance: &str) -> anyhow::Result<bool> {
        #[derive(Deserialize)]
        struct Info {
            node: Node,
        }
        #[derive(Deserialize)]
        struct Node {
            #[serde(default)]
            metadata: HashMap<String, serde_json::Value>,
        }
        let info: Info = serde_json::from_slice(&self.ask(Method::GET, "/server_info").await?)
            .context("reading the sidecar's /server_info")?;
        // pilot-agent writes the names of metadata in capitals.
        let found = ["instance", "ONBOARDING_INSTANCE"].iter().find_map(|name| info.node.metadata.get(*name));
        Ok(found.and_then(|value| value.as_str()) == Some(instance))
    }

    /// `Err` says why it isn't live, in Envoy's word where it answers.
    pub(super) async fn ready(&self) -> Result<(), String> {
        match self.request(Method::GET, "/ready").await {
            Ok((true, _)) => Ok(()),
            Ok((false, body)) => {
                let state = String::from_utf8_lossy(&body).trim().chars().take(64).collect::<String>();
                Err(format!("Envoy says {state}"))
            }
            Err(error) => Err(format!("{error:#}")),
        }
    }

    /// Versions and refusals of its subscriptions.
    pub(super) async fn subscriptions(&self) -> anyhow::Result<Stats> {
        self.stats("(update_(rejected%7Cfailure)%7Cversion_text%7Cwarming_clusters)%24").await
    }

    pub(super) async fn in_flight(&self) -> anyhow::Result<InFlight> {
        let stats = self.stats("%5E(http%7Clistener)%5C..*(downstream_(rq%7Ccx)_(active%7Ctotal))%24").await?;
        Ok(stats.in_flight())
    }

    /// Health checks fail from now on, and each connection is told to end at its next answer. New ones are still served.
    pub(super) async fn drain(&self) -> anyhow::Result<()> {
        self.ask(Method::POST, "/healthcheck/fail").await?;
        self.ask(Method::POST, "/drain_listeners?graceful").await?;
        Ok(())
    }

    async fn stats(&self, filter: &str) -> anyhow::Result<Stats> {
        let body = self.ask(Method::GET, &format!("/stats?format=json&filter={filter}")).await?;
        Stats::read(&body).context("reading the sidecar's statistics")
    }

    async fn ask(&self, method: Method, path: &str) -> anyhow::Result<Bytes> {
        let (success, body) = self.request(method, path).await?;
        ensure!(success, "the sidecar's admin address refuses {path}: {}", String::from_utf8_lossy(&body).trim());
        Ok(body)
    }

    async fn request(&self, method: Method, path: &str) -> anyhow::Result<(bool, Bytes)> {
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .body(Empty::new())
            .context("making a request for the sidecar's admin address")?;
        let answer = async {
            let response = self.client.request(request).await?;
            let success = response.status().is_success();
            let body =
                Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(anyhow::Error::from_boxed)?;
            anyhow::Ok((success, body.to_bytes()))
        };
        tokio::time::timeout(WITHIN, answer)
            .await
            .map_err(anyhow::Error::from)
            .and_then(|answer| answer)
            .with_context(|| format!("asking the sidecar's admin address {} for {path}", self.address))
    }
}

impl Stats {
    fn read(body: &[u8]) -> serde_json::Result<Self> {
        #[derive(Deserialize)]
        struct Body {
            stats: Vec<Stat>,
        }
        /// Histograms have neither.
        #[derive(Deserialize)]
        struct Stat {
            name: Option<String>,
            value: Option<serde_json::Value>,
        }
        let mut stats = Self::default();
        for stat in serde_json::from_slice::<Body>(body)?.stats {
            let Some(name) = stat.name else { continue };
            match stat.value {
                Some(serde_json::Value::Number(number)) => {
                    stats.numbers.insert(name, number.as_u64().unwrap_or_default());
                }
                Some(serde_json::Value::String(text)) => {
                    stats.texts.insert(name, text);
                }
                _ => {}
            }
        }
        Ok(stats)
    }

    /// Whether one of these statistics of the subscription has this version.
    pub(super) fn has_version(&self, subscription: &Subscription, version: &str) -> bool {
        let mut texts = self.texts.iter().filter(|(name, _)| subscription.owns(name));
        texts.any(|(name, text)| name.ends_with(".version_text") && text == version)
    }

    /// How often it was refused, or couldn't be read.
    pub(super) fn refusals(&self, subscription: &Subscription) -> u64 {
        self.numbers.iter().filter(|(name, _)| subscription.owns(name)).map(|(_, number)| number).sum()
    }

    /// Clusters that aren't usable yet.
    pub(super) fn warming(&self) -> u64 {
        self.numbers.get("cluster_manager.warming_clusters").copied().unwrap_or_default()
    }

    fn in_flight(&self) -> InFlight {
        let mut flight = InFlight { active: 0, connections: 0, total: 0 };
        let mut of_http = 0;
        for (name, number) in self.numbers.iter().filter(|(name, _)| !name.contains(".admin.")) {
            match name.split_once('.') {
                Some(("http", rest)) if rest.ends_with("downstream_rq_active") => flight.active += number,
                Some(("http", rest)) if rest.ends_with("downstream_rq_total") => flight.total += number,
                Some(("http", rest)) if rest.ends_with("downstream_cx_active") => of_http += number,
                Some(("listener", rest)) if rest.contains(".worker_") || rest.contains(".main_thread") => {}
                Some(("listener", rest)) if rest.ends_with("downstream_cx_active") => flight.connections += number,
                Some(("listener", rest)) if rest.ends_with("downstream_cx_total") => flight.total += number,
                _ => {}
            }
        }
        // Envoy doesn't count the open connections of its TCP proxy: they are those that are not of HTTP.
        flight.active += flight.connections.saturating_sub(of_http);
        flight
    }
}

impl Subscription {
    fn owns(&self, stat: &str) -> bool {
        match self {
            Self::Listeners => stat.starts_with("listener_manager.lds."),
            Self::Clusters => stat.starts_with("cluster_manager.cds."),
            Self::Endpoints(name) => leaf_of(stat.strip_prefix("cluster."), name),
            Self::Routes(name) => {
                let http = stat.strip_prefix("http.");
                http.is_some_and(|rest| {
                    rest.match_indices(".rds.").any(|(at, dot)| leaf_of(rest.get(at + dot.len()..), name))
                })
            }
        }
    }
}

/// `<name>.<one word>`.
fn leaf_of(stat: Option<&str>, name: &str) -> bool {
    let leaf = stat.and_then(|stat| stat.strip_prefix(name)).and_then(|rest| rest.strip_prefix('.'));
    leaf.is_some_and(|leaf| !leaf.contains('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(list: serde_json::Value) -> Stats {
        Stats::read(serde_json::json!({ "stats": list }).to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_subscription_owns_its_own_statistics_only() {
        let stats = stats(serde_json::json!([
            {"name": "cluster.a|80.version_text", "value": "1"},
            {"name": "cluster.a|80.b.version_text", "value": "2"},
            {"name": "cluster.a|80.b.update_rejected", "value": 3},
            {"name": "http.in.rds.r.version_text", "value": "4"},
            {"name": "http.in.rds.x.rds.r.update_failure", "value": 5},
            {"name": "listener_manager.lds.update_rejected", "value": 6},
            {"histograms": {}},
        ]));
        let endpoints = |name: &str| Subscription::Endpoints(name.to_owned());
        assert!(stats.has_version(&endpoints("a|80"), "1") && !stats.has_version(&endpoints("a|80"), "2"));
        assert!(stats.has_version(&endpoints("a|80.b"), "2") && !stats.has_version(&endpoints("a"), "1"));
        assert_eq!(stats.refusals(&endpoints("a|80")), 0);
        assert_eq!(stats.refusals(&endpoints("a|80.b")), 3);
        assert!(stats.has_version(&Subscription::Routes("r".into()), "4"));
        assert_eq!(stats.refusals(&Subscription::Listeners), 6);
        assert_eq!(stats.refusals(&Subscription::Clusters), 0);
    }

    #[test]
    fn in_flight_is_requests_and_connections_without_requests_but_not_our_own() {
        let stats = stats(serde_json::json!([
            {"name": "http.admin.downstream_rq_active", "value": 1},
            {"name": "http.in.downstream_rq_active", "value": 2},
            {"name": "http.in.downstream_cx_active", "value": 3},
            {"name": "http.in.downstream_rq_total", "value": 10},
            {"name": "listener.admin.downstream_cx_active", "value": 1},
            {"name": "listener.10.0.0.1_8080.downstream_cx_active", "value": 3},
            {"name": "listener.10.0.0.1_8080.worker_0.downstream_cx_active", "value": 3},
            {"name": "listener.10.0.0.1_9000.downstream_cx_active", "value": 4},
            {"name": "listener.10.0.0.1_9000.downstream_cx_total", "value": 5},
        ]));
        assert_eq!(stats.in_flight(), InFlight { active: 6, connections: 7, total: 15 });
    }
}
