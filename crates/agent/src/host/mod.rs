//! What the host can show of itself: evidence for the plane, and its addresses.
//!
//! Which platform it is comes from the AgentConfiguration, or from asking each platform's metadata service.

pub mod aws;
pub mod basic;
pub mod ec2;
pub mod ecs;
pub mod plugin;

use crate::host::aws::AwsError;
use crate::host::basic::Basic;
use crate::host::ec2::Ec2;
use crate::host::ecs::{Ecs, EcsError, Environment};
use crate::host::plugin::{PluginError, Plugins};
use async_trait::async_trait;
use jiff::Timestamp;
use onboarding_core::identity::Thumbprint;
use onboarding_core::registration::HostAddress;
use onboarding_kinds::agent::{self, AgentConfiguration, ConnectionSettings, HostInfo};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

/// For whom evidence is made.
#[derive(Debug, Clone)]
pub struct Audience {
    pub plane_uid: String,
    pub challenge: Vec<u8>,
    pub key: Thumbprint,
}

/// What travels to the plane.
#[derive(Clone)]
pub struct Evidence {
    pub credential: prost_types::Any,
    /// When it is worth nothing any more, where it says so.
    pub expires_at: Option<Timestamp>,
    /// Where it comes from, for the log: `plugin my-jwt`, `EC2 metadata`.
    pub origin: String,
}

/// A host that evidence and addresses can be had of.
#[async_trait]
pub trait Host: Send + Sync {
    async fn evidence(&self, audience: &Audience, now: Timestamp) -> Result<Evidence, HostError>;
    async fn addresses(&self) -> Result<Vec<HostAddress>, HostError>;
    /// The plane refused the last evidence: don't show the same again where there is other.
    fn refused(&self) {}
    /// For the log.
    fn describe(&self) -> String;
}

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error(transparent)]
    Plugin(#[from] PluginError),
    #[error(transparent)]
    Ec2(#[from] AwsError),
    #[error(transparent)]
    Ecs(#[from] EcsError),
    #[error("can't list this host's network interfaces")]
    Interfaces(#[source] std::io::Error),
    #[error(
        "no address to register: {considered}; name the interface in host.custom.hostinfo.basic.networkInterfaces.include"
    )]
    NoAddress { considered: String },
    #[error("a pattern of host.custom.hostinfo.basic.networkInterfaces is not a regular expression")]
    Pattern(#[from] regex_lite::Error),
    #[error(
        "no platform was recognised (tried: AWS ECS: its environment variables aren't there; AWS EC2 at {tried}: {why}; Google Cloud and Azure are not built in); set host.custom with a credential plugin in agent.config.yaml"
    )]
    NotRecognised { tried: String, why: String },
}

/// The host that the AgentConfiguration names; `auto` asks the platforms.
pub async fn open(configuration: &AgentConfiguration) -> Result<Box<dyn Host>, HostError> {
    match &configuration.host {
        agent::Host::AwsEc2 => Ok(Box::new(Ec2::new(ec2::METADATA))),
        agent::Host::AwsEcs => Ok(Box::new(Ecs::new(&Environment::of_process())?)),
        // First: a task on an EC2 instance of one's own may reach the instance's metadata, and isn't the instance.
        agent::Host::Auto if Environment::of_process().is_of_a_task() => {
            Ok(Box::new(Ecs::new(&Environment::of_process())?))
        }
        agent::Host::Auto => {
            let ec2 = Ec2::new(ec2::METADATA);
            match ec2.recognise().await {
                Ok(()) => Ok(Box::new(ec2)),
                Err(error) => Err(HostError::NotRecognised {
                    tried: ec2::METADATA.ip().to_string(),
                    why: crate::store::with_source(&error),
                }),
            }
        }
        agent::Host::Custom { credentials, host_info } => {
            Ok(Box::new(Custom::new(credentials.clone(), host_info.clone(), configuration.connection.clone())?))
        }
    }
}

/// `host.custom`: credentials by plugins, addresses by a plugin or from the interfaces.
pub struct Custom {
    plugins: Plugins,
    credentials: Vec<agent::Plugin>,
    addresses: Addresses,
    /// The plugin to ask first: the next one after a refusal.
    first: AtomicUsize,
    kept: Mutex<Option<Kept>>,
}

enum Addresses {
    Plugin(agent::Plugin),
    Basic(Basic),
}

struct Kept {
    plane_uid: String,
    evidence: Evidence,
    renew_at: Timestamp,
}

impl Custom {
    /// Errors: a pattern that isn't a regular expression.
    pub fn new(
        credentials: Vec<agent::Plugin>,
        host_info: HostInfo,
        settings: ConnectionSettings,
    ) -> Result<Self, HostError> {
        Ok(Self {
            plugins: Plugins::new(settings),
            credentials,
            addresses: match host_info {
                HostInfo::Plugin(plugin) => Addresses::Plugin(plugin),
                HostInfo::Basic { include, exclude } => Addresses::Basic(Basic::new(&include, &exclude)?),
            },
            first: AtomicUsize::new(0),
            kept: Mutex::new(None),
        })
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Option<Kept>> {
        // Replaced whole, so it is whole whatever panicked while it was held.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Host for Custom {
    /// A credential is used again until two thirds of its life are over; then, or after a refusal, a plugin is asked.
    async fn evidence(&self, audience: &Audience, now: Timestamp) -> Result<Evidence, HostError> {
        if let Some(kept) = &*self.kept()
            && kept.plane_uid == audience.plane_uid
            && kept.renew_at > now
        {
            return Ok(kept.evidence.clone());
        }
        let mut last = None;
        for turn in 0..self.credentials.len() {
            let index = (self.first.load(Ordering::Relaxed) + turn) % self.credentials.len();
            let plugin = &self.credentials[index];
            match self.plugins.credential(plugin, &audience.plane_uid, now).await {
                Ok(credential) => {
                    self.first.store(index, Ordering::Relaxed);
                    tracing::info!(plugin = plugin.name, expires_at = %credential.expires_at, "a plugin gave a credential");
                    let life = credential.expires_at.as_second().saturating_sub(now.as_second()).max(0);
                    let renew_at =
                        now.checked_add(jiff::SignedDuration::from_secs(life / 3 * 2)).unwrap_or(credential.expires_at);
                    let evidence = credential.into_evidence(&plugin.name);
                    *self.kept() =
                        Some(Kept { plane_uid: audience.plane_uid.clone(), evidence: evidence.clone(), renew_at });
                    return Ok(evidence);
                }
                Err(error) => {
                    tracing::warn!(plugin = plugin.name, error = %crate::store::with_source(&error), "a plugin gave no credential");
                    last = Some(error);
                }
            }
        }
        Err(last.map_or_else(
            || HostError::NotRecognised { tried: "nothing".to_owned(), why: "no credential plugin".to_owned() },
            HostError::Plugin,
        ))
    }

    async fn addresses(&self) -> Result<Vec<HostAddress>, HostError> {
        match &self.addresses {
            Addresses::Plugin(plugin) => Ok(self.plugins.addresses(plugin).await?),
            Addresses::Basic(basic) => basic.addresses(),
        }
    }

    fn refused(&self) {
        *self.kept() = None;
        self.first.fetch_add(1, Ordering::Relaxed);
    }

    fn describe(&self) -> String {
        let names: Vec<_> = self.credentials.iter().map(|plugin| plugin.name.as_str()).collect();
        let addresses = match &self.addresses {
            Addresses::Plugin(plugin) => format!("plugin {}", plugin.name),
            Addresses::Basic(_) => "network interfaces".to_owned(),
        };
        format!("custom (credential plugins: {}; addresses: {addresses})", names.join(", "))
    }
}
