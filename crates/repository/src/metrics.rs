//! What the repository counts. Labels are constant and bounded.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Class {
    /// `2xx` to `5xx`.
    pub status: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Why {
    pub reason: &'static str,
}

/// One set for a process.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    pub(crate) requests: Family<Class, Counter>,
    pub(crate) bytes: Counter,
    pub(crate) connections: Gauge,
    pub(crate) connections_failed: Family<Why, Counter>,
    pub(crate) packages: Gauge,
    pub(crate) faults: Gauge,
    pub(crate) certificate_expiry: Gauge,
}

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let r = registry.sub_registry_with_prefix("onboarding_repository");
        r.register("requests", "Requests for packages and listings, by class of status", metrics.requests.clone());
        r.register("bytes", "Bytes of answers that were sent", metrics.bytes.clone());
        r.register("connections", "Open connections", metrics.connections.clone());
        r.register(
            "connections_failed",
            "Connections that were ended, or not let in, by reason",
            metrics.connections_failed.clone(),
        );
        r.register("packages", "Packages that can be downloaded", metrics.packages.clone());
        r.register("package_faults", "Files with a package's name that can't be served", metrics.faults.clone());
        r.register(
            "certificate_expiry_timestamp_seconds",
            "When the repository's certificate ends, in seconds since 1970; 0: there is none",
            metrics.certificate_expiry.clone(),
        );
        metrics
    }

    pub(crate) fn answered(&self, status: http::StatusCode) {
        let status = match status.as_u16() {
            ..300 => "2xx",
            300..400 => "3xx",
            400..500 => "4xx",
            _ => "5xx",
        };
        self.requests.get_or_create(&Class { status }).inc();
    }

    pub(crate) fn failed(&self, reason: &'static str) {
        self.connections_failed.get_or_create(&Why { reason }).inc();
    }
}
