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
mod revision;
mod sidecars;
mod tokens;

pub use inputs::{DEFAULT_REVISION, ISTIO_SYSTEM, Inputs, Meshes, Namespace, REVISION_LABEL};
pub use mesh::{Mesh, PROXY_CONFIG_ANNOTATION, ProxyConfig};
pub use tokens::{AUDIENCE, Account, Status as TokenStatus, Token, TokenError, TokenOptions, Tokens};

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
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
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

/// What a sidecar said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastReport {
    pub at: Timestamp,
    pub boot_version: String,
    pub accepted: bool,
    /// The sidecar's own words, cleaned and shortened.
    pub message: String,
}

impl IstioProvisioner {
    /// Nothing runs until a workload is provisioned.
    pub fn new(
        inputs: watch::Receiver<Arc<Inputs>>,
        registry: Arc<dyn Registry>,
        tokens: Tokens,
        metrics: &mut prometheus_client::registry::Registry,
    ) -> Self {
        Self { inputs, registry, tokens, reports: Arc::default(), metrics: Metrics::register(metrics) }
    }

    /// Of a workload that is connected here and has said something.
    pub fn last_report(&self, name: &RegistrationName) -> Option<LastReport> {
        self.reports.with(|held| held.get(name).and_then(|followed| followed.last.clone()))
    }

    /// Whether this is the version of all that there is for this workload now. Not while something waits for its next session, nor where
    /// it isn't connected here.
    pub fn is_newest(&self, name: &RegistrationName, version: &str) -> bool {
        self.reports.with(|held| held.get(name).is_some_and(|followed| followed.newest.as_deref() == Some(version)))
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
        self.reports.with(|held| {
            if let Some(followed) = held.get_mut(&workload.name) {
                followed.last = Some(last);
            }
        });
    }
}

/// The last report of each workload that is followed here.
#[derive(Default)]
struct Reports(Mutex<HashMap<RegistrationName, FollowedReport>>);

#[derive(Default)]
struct FollowedReport {
    /// A new session may begin before the old one is over.
    followers: usize,
    last: Option<LastReport>,
    /// The version of all that there is, whether it was sent or not.
    newest: Option<String>,
}

impl Reports {
    fn with<T>(&self, act: impl FnOnce(&mut HashMap<RegistrationName, FollowedReport>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Its report is kept for as long as somebody follows the workload.
struct Followed {
    reports: Arc<Reports>,
    name: RegistrationName,
}

impl Followed {
    fn new(reports: Arc<Reports>, name: RegistrationName) -> Self {
        reports.with(|held| held.entry(name.clone()).or_default().followers += 1);
        Self { reports, name }
    }

    fn newest(&self, version: &str) {
        self.reports.with(|held| {
            if let Some(followed) = held.get_mut(&self.name) {
                followed.newest = Some(version.to_owned());
            }
        });
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.reports.with(|held| {
            if let Some(followed) = held.get_mut(&self.name) {
                followed.followers -= 1;
                if followed.followers == 0 {
                    held.remove(&self.name);
                }
            }
        });
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
#[cfg(test)]
mod tests;
