//! Sidecars of an Istio mesh: what each is started from, and the token by which it becomes somebody.
//!
//! Nothing here asks the cluster for its objects: [`Inputs`] come from outside, rendering is pure, and only [`Tokens`] talks to the API
//! server. See `docs/istio.md`.

mod follow;
mod hosts;
mod inputs;
mod mesh;
mod node;
mod render;
mod reports;
mod revision;
mod sidecars;
mod tokens;

pub use hosts::{EXPORT_TO_ANNOTATION, Named, Names};
pub use inputs::{DEFAULT_REVISION, ISTIO_SYSTEM, Inputs, Meshes, Namespace, REVISION_LABEL};
pub use mesh::{Mesh, PROXY_CONFIG_ANNOTATION, ProxyConfig};
pub use reports::LastReport;
pub use tokens::{AUDIENCE, Account, Status as TokenStatus, Token, TokenError, TokenOptions, Tokens};

use crate::registry::Standings;
use async_trait::async_trait;
use follow::Follower;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use onboarding_core::name::RegistrationName;
use onboarding_endpoint::backend::{ProvisionError, Provisioner, Registry, Workload};
use onboarding_wire::onboarding::{BootConfiguration, Certificate, SidecarReport};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use reports::Reports;
use std::sync::Arc;
use tokio::sync::watch;

/// On a WorkloadGroup (`spec.metadata.annotations`), with the value `true`: a change that needs a restart of its sidecars reaches those
/// that are connected, all at the same time. Without it, it waits for each one's next session.
pub const AT_ONCE_ANNOTATION: &str = render::AT_ONCE_ANNOTATION;
const LONGEST_REPORT: usize = 1000;

/// Boot configurations for sidecars that istiod configures.
pub struct IstioProvisioner {
    inputs: watch::Receiver<Arc<Inputs>>,
    registry: Arc<dyn Registry>,
    tokens: Tokens,
    reports: Arc<Reports>,
    metrics: Metrics,
}

impl IstioProvisioner {
    /// Nothing runs until a workload is provisioned. `standings` is told how far each workload is.
    pub fn new(
        inputs: watch::Receiver<Arc<Inputs>>,
        registry: Arc<dyn Registry>,
        standings: Arc<dyn Standings>,
        tokens: Tokens,
        metrics: &mut prometheus_client::registry::Registry,
    ) -> Self {
        Self { inputs, registry, tokens, reports: Reports::new(standings), metrics: Metrics::register(metrics) }
    }

    /// Of a workload that is connected here and has said something.
    pub fn last_report(&self, name: &RegistrationName) -> Option<LastReport> {
        self.reports.get(name, |progress| progress.last.clone()).flatten()
    }

    /// Whether this is the version of all that there is for this workload now. Not while something waits for its next session, nor where
    /// it isn't connected here.
    pub fn is_newest(&self, name: &RegistrationName, version: &str) -> bool {
        self.reports.get(name, |progress| progress.is_newest(version)).unwrap_or_default()
    }
}

#[async_trait]
impl Provisioner for IstioProvisioner {
    /// The configuration now, later each that differs in what needs no restart of the sidecar, and each new token with the version
    /// that is held and nothing else. It waits where nothing can be made, says so once for each reason, and doesn't end by itself.
    fn boot(&self, workload: &Workload, held: &str) -> BoxStream<'static, Result<BootConfiguration, ProvisionError>> {
        Follower::new(self, workload.clone(), held.to_owned()).stream()
    }

    async fn certificate(&self, workload: &Workload, _csr: &[u8]) -> Result<Certificate, ProvisionError> {
        Err(ProvisionError::Refused(format!(
            "the plane signs no certificates for {}: in an Istio mesh istiod's CA does; ask it with the token of the boot configuration (IstioCertificateService/CreateCertificate)",
            workload.name
        )))
    }

    fn reported(&self, workload: &Workload, report: &SidecarReport) {
        let outcome = if report.accepted { "accepted" } else { "rejected" };
        self.metrics.reports.get_or_create(&Outcome { outcome }).inc();
        let clean = |text: &str| -> String { text.chars().filter(|c| !c.is_control()).take(LONGEST_REPORT).collect() };
        let last = LastReport {
            at: Timestamp::now(),
            boot_version: clean(&report.boot_version),
            accepted: report.accepted,
            message: clean(&report.message),
        };
        if !report.accepted {
            tracing::error!(
                registration = %workload.name,
                version = last.boot_version,
                why = last.message,
                "a sidecar didn't come up with its boot configuration"
            );
        }
        self.reports.reported(&workload.name, last);
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone)]
struct Metrics {
    boots: Family<Outcome, Counter>,
    reports: Family<Outcome, Counter>,
}

impl Metrics {
    fn register(registry: &mut prometheus_client::registry::Registry) -> Self {
        let metrics = Self { boots: Family::default(), reports: Family::default() };
        registry.register(
            "onboarding_istio_boot_configurations",
            "Boot configurations sent to agents, complete or a token alone, and those that couldn't be made",
            metrics.boots.clone(),
        );
        registry.register(
            "onboarding_istio_sidecar_reports",
            "What became of boot configurations",
            metrics.reports.clone(),
        );
        metrics
    }
}

#[cfg(test)]
mod fixtures;
