//! What the tasks ask of this host: who it is, where it is reached, which sidecar it has.

use super::news::{Envelope, News};
use super::{Driver, Settings};
use crate::config::Configuration;
use crate::host::{self, Audience, Evidence, Host, HostError};
use crate::key::AgentKey;
use crate::session::Discovery;
use crate::sidecar::IstioWay;
use crate::store::with_source;
use jiff::Timestamp;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OnceCell, mpsc};
use tokio::time::timeout;

/// Gathering evidence: plugins with their retries.
const GATHER_WITHIN: Duration = Duration::from_secs(150);

/// What tasks ask of this host.
pub(super) struct Witness {
    host: Option<Arc<dyn Host>>,
    pub(super) configuration: Configuration,
    news: mpsc::Sender<Envelope>,
    pub(super) key: Arc<AgentKey>,
}

impl Witness {
    async fn host(&self) -> Result<Arc<dyn Host>, HostError> {
        if let Some(host) = &self.host {
            return Ok(host.clone());
        }
        let host: Arc<dyn Host> = host::open(&self.configuration.agent).await?.into();
        // The loop has ended.
        let _ = self.news.send(Envelope { connection: None, news: News::Host(host.clone()) }).await;
        Ok(host)
    }

    pub(super) async fn evidence(&self, discovery: &Discovery) -> Result<Evidence, String> {
        let audience = Audience {
            plane_uid: discovery.plane_uid.clone(),
            challenge: discovery.challenge.clone(),
            key: self.key.thumbprint(),
        };
        let gather = async { self.host().await?.evidence(&audience, Timestamp::now()).await };
        bounded_by_gather(gather).await
    }

    pub(super) async fn addresses(&self) -> Result<Vec<onboarding_core::registration::HostAddress>, String> {
        bounded_by_gather(async { self.host().await?.addresses().await }).await
    }
}

async fn bounded_by_gather<T>(work: impl Future<Output = Result<T, HostError>>) -> Result<T, String> {
    match timeout(GATHER_WITHIN, work).await {
        Ok(found) => found.map_err(|error| with_source(&error)),
        Err(_) => Err(format!("this host did not say who it is within {} s", GATHER_WITHIN.as_secs())),
    }
}

impl Driver {
    /// What every task about this host needs.
    pub(super) fn witness(&self) -> Witness {
        Witness {
            host: self.host.clone(),
            configuration: self.settings.configuration.clone(),
            news: self.news.clone(),
            key: self.key.clone(),
        }
    }
}

/// Begins to ask the binary. What waits for the answer asks anew where this is cut off.
pub(super) async fn ask_version(settings: &Settings) -> Arc<OnceCell<String>> {
    let version = Arc::new(OnceCell::new());
    let (asked, settings) = (version.clone(), settings.clone());
    tokio::spawn(async move {
        asked.get_or_init(|| sidecar_version(&settings)).await;
    });
    // The process is started by then.
    tokio::task::yield_now().await;
    version
}

/// Empty: unknown.
pub(super) async fn sidecar_version(settings: &Settings) -> String {
    let version = match &settings.istio {
        IstioWay::Envoy => crate::version::envoy(&settings.binary).await,
        IstioWay::PilotAgent(pilot_agent) => crate::version::pilot_agent(&pilot_agent.binary).await,
    };
    match version {
        Ok(version) => {
            tracing::info!(version, "the sidecar's version is known");
            version
        }
        Err(error) => {
            tracing::warn!(error = %error, "the sidecar's version is unknown");
            String::new()
        }
    }
}
