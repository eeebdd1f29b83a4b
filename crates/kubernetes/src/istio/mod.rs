//! Sidecars of an Istio mesh: what each is started from, and the token by which it becomes somebody.
//!
//! Nothing here asks the cluster for its objects: [`Inputs`] come from outside, rendering is pure, and only [`Tokens`] talks to the API
//! server. See `docs/istio.md`.

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
use futures_util::stream::{self, BoxStream, StreamExt};
use inputs::Part;
use jiff::Timestamp;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::State;
use onboarding_endpoint::backend::{ProvisionError, Provisioner, Registry, RegistryError, Workload};
use onboarding_runtime::backoff::Backoff;
use onboarding_wire::onboarding::{BootConfiguration, Certificate, SidecarReport};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Between a change of the inputs and what is made of it: a rollout changes many objects in one go.
const GAP: Duration = Duration::from_millis(100);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
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
}

#[async_trait]
impl Provisioner for IstioProvisioner {
    /// Complete messages, as one is a few kilobytes. One with the version that the agent holds brings a new token alone.
    /// It waits where it can't be made, and says so once for each reason; it doesn't end by itself.
    fn boot(&self, workload: &Workload, _held: &str) -> BoxStream<'static, Result<BootConfiguration, ProvisionError>> {
        let follower = Follower {
            workload: workload.clone(),
            inputs: self.inputs.clone(),
            registry: self.registry.clone(),
            tokens: self.tokens.clone(),
            metrics: self.metrics.clone(),
            part: None,
            token: None,
            sent: None,
            problem: None,
            left_out: Vec::new(),
            due: true,
            retry: None,
            backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
            _reported: Followed::new(self.reports.clone(), workload.name.clone()),
        };
        stream::unfold(follower, |mut follower| async { follower.next().await.map(|item| (item, follower)) }).boxed()
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

/// One agent's boot configurations.
struct Follower {
    workload: Workload,
    inputs: watch::Receiver<Arc<Inputs>>,
    registry: Arc<dyn Registry>,
    tokens: Tokens,
    metrics: Metrics,
    /// What the last look saw of the inputs.
    part: Option<Part>,
    token: Option<(Account, watch::Receiver<TokenStatus>)>,
    sent: Option<(String, Arc<Token>)>,
    /// What was said last to be in the way.
    problem: Option<String>,
    left_out: Vec<String>,
    due: bool,
    /// When to look again without being told.
    retry: Option<Duration>,
    backoff: Backoff,
    _reported: Followed,
}

/// What stands in the way of a boot configuration.
enum Obstacle {
    /// Until the inputs change.
    Inputs(ProvisionError),
    /// Until there is a token; a reason once one is known.
    Token(Option<ProvisionError>),
    /// Nobody tells when it is gone.
    Registry(ProvisionError),
}

impl Follower {
    async fn next(&mut self) -> Option<Result<BootConfiguration, ProvisionError>> {
        loop {
            if !std::mem::take(&mut self.due) {
                self.wait().await?;
                self.due = false;
            }
            self.retry = None;
            let error = match self.look().await {
                Ok(boot) => {
                    self.problem = None;
                    self.backoff.reset();
                    match boot {
                        Some(boot) => return Some(Ok(boot)),
                        None => continue,
                    }
                }
                Err(Obstacle::Token(None)) => continue,
                Err(Obstacle::Inputs(error) | Obstacle::Token(Some(error))) => error,
                Err(Obstacle::Registry(error)) => {
                    self.retry = Some(self.backoff.next_delay());
                    error
                }
            };
            let words = error.to_string();
            if self.problem.as_ref() != Some(&words) {
                self.problem = Some(words);
                let outcome = match &error {
                    ProvisionError::Refused(_) => "refused",
                    ProvisionError::Unavailable(_) => "unavailable",
                };
                self.metrics.boots.get_or_create(&Outcome { outcome }).inc();
                return Some(Err(error));
            }
        }
    }

    /// What is to be sent now, if anything.
    async fn look(&mut self) -> Result<Option<BootConfiguration>, Obstacle> {
        let name = &self.workload.name;
        let part = Part::of(&self.inputs.borrow_and_update(), &self.workload.group);
        let part = &*self.part.insert(part);
        let stored = self.registry.load(name).await.map_err(|error| {
            Obstacle::Registry(match error {
                RegistryError::Foreign(words) => ProvisionError::Refused(words),
                error @ (RegistryError::Conflict | RegistryError::Unavailable(_)) => {
                    ProvisionError::Unavailable(error.to_string())
                }
            })
        })?;
        let live = match stored.state {
            State::Live(live) if live.group == self.workload.group => live,
            State::Live(_) | State::Ended(_) | State::Absent => {
                return Err(Obstacle::Registry(ProvisionError::Unavailable(format!(
                    "{name} isn't registered in the group {}",
                    self.workload.group
                ))));
            }
        };
        let rendered = render::render(name, &live, part).map_err(|error| {
            let words = error.to_string();
            Obstacle::Inputs(match error.is_refusal() {
                true => ProvisionError::Refused(words),
                false => ProvisionError::Unavailable(words),
            })
        })?;
        if self.left_out != rendered.left_out {
            self.left_out.clone_from(&rendered.left_out);
            if !rendered.left_out.is_empty() {
                tracing::warn!(
                    registration = %name,
                    what = %rendered.left_out.join(", ").escape_debug(),
                    "a boot configuration leaves out what no host may be given"
                );
            }
        }
        let account = Account { namespace: name.namespace.clone(), name: rendered.service_account.clone() };
        let receiver = match &mut self.token {
            Some((held, receiver)) if *held == account => receiver,
            token => &mut token.insert((account.clone(), self.tokens.follow(&account))).1,
        };
        let status = receiver.borrow_and_update().clone();
        let Some(token) = status.token.filter(|token| token.is_valid()) else {
            return Err(Obstacle::Token(
                status.problem.map(|problem| ProvisionError::Unavailable(problem.to_string())),
            ));
        };
        let kind = match &self.sent {
            Some((version, held)) if *version == rendered.version => {
                if Arc::ptr_eq(held, &token) {
                    return Ok(None);
                }
                "token"
            }
            _ => "complete",
        };
        self.metrics.boots.get_or_create(&Outcome { outcome: kind }).inc();
        let boot = rendered.message(&token);
        self.sent = Some((rendered.version, token));
        Ok(Some(boot))
    }

    /// Until something that matters to this workload may have changed; `None`: nothing will any more.
    async fn wait(&mut self) -> Option<()> {
        loop {
            let token = async {
                match &mut self.token {
                    Some((_, receiver)) => receiver.changed().await,
                    None => std::future::pending().await,
                }
            };
            let retry = async {
                match self.retry {
                    Some(after) => tokio::time::sleep(after).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.inputs.changed() => {
                    changed.ok()?;
                    tokio::time::sleep(GAP).await;
                    let part = Part::of(&self.inputs.borrow_and_update(), &self.workload.group);
                    if self.part.as_ref() == Some(&part) {
                        continue;
                    }
                }
                changed = token => {
                    if changed.is_err() {
                        // Its task is gone: at the end of the plane, or by a fault.
                        if self.tokens.is_stopping() {
                            return None;
                        }
                        self.token = None;
                        self.retry = Some(self.backoff.next_delay());
                        continue;
                    }
                }
                () = retry => {}
            }
            return Some(());
        }
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
            "Boot configurations sent to agents, complete or for the token alone, and those that couldn't be made",
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
