//! What the endpoint counts. Labels are constant and bounded: codes and kinds, never names.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Call {
    /// The RPC.
    pub call: &'static str,
    /// The gRPC code's name.
    pub code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Why {
    pub reason: &'static str,
}

#[derive(Clone)]
pub(crate) struct Metrics {
    pub calls: Family<Call, Counter>,
    pub connections: Gauge,
    pub connections_failed: Family<Why, Counter>,
    pub sessions: Gauge,
    pub sessions_ended: Family<Why, Counter>,
    pub authorization_seconds: Histogram,
    pub certificates: Counter,
    pub reaped: Counter,
    pub audit_failures: Counter,
    pub config_faults: Gauge,
    pub certificate_expiry: Gauge,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            calls: Family::default(),
            connections: Gauge::default(),
            connections_failed: Family::default(),
            sessions: Gauge::default(),
            sessions_ended: Family::default(),
            authorization_seconds: Histogram::new(exponential_buckets(0.0005, 2.0, 14)),
            certificates: Counter::default(),
            reaped: Counter::default(),
            audit_failures: Counter::default(),
            config_faults: Gauge::default(),
            certificate_expiry: Gauge::default(),
        };
        let r = registry.sub_registry_with_prefix("onboarding");
        r.register("calls", "Calls of agents, by outcome", metrics.calls.clone());
        r.register("connections", "Open connections of agents", metrics.connections.clone());
        r.register(
            "connections_failed",
            "Connections that the endpoint ended before a key was proven, by reason",
            metrics.connections_failed.clone(),
        );
        r.register("sessions", "Agents with an open session", metrics.sessions.clone());
        r.register("sessions_ended", "Sessions that ended, by reason", metrics.sessions_ended.clone());
        r.register_with_unit(
            "authorization",
            "From evidence to token",
            Unit::Seconds,
            metrics.authorization_seconds.clone(),
        );
        r.register("certificates_issued", "Certificates of the mesh that sessions got", metrics.certificates.clone());
        r.register("registrations_reaped", "Registrations whose lease ended", metrics.reaped.clone());
        r.register("audit_failures", "Decisions that could not be written down", metrics.audit_failures.clone());
        r.register(
            "config_faults",
            "What can't be read or is missing in the configuration",
            metrics.config_faults.clone(),
        );
        r.register(
            "certificate_expiry_timestamp_seconds",
            "When the endpoint's certificate ends, in seconds since 1970; 0: there is none",
            metrics.certificate_expiry.clone(),
        );
        metrics
    }

    /// Counts a call's outcome and hands it on.
    pub(crate) fn count<T>(&self, call: &'static str, outcome: Result<T, tonic::Status>) -> Result<T, tonic::Status> {
        let code = match &outcome {
            Ok(_) => "OK",
            Err(status) => code_name(status.code()),
        };
        self.calls.get_or_create(&Call { call, code }).inc();
        outcome
    }
}

fn code_name(code: tonic::Code) -> &'static str {
    use tonic::Code;
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Unavailable => "UNAVAILABLE",
        Code::Unauthenticated => "UNAUTHENTICATED",
        Code::Internal => "INTERNAL",
        _ => "OTHER",
    }
}
