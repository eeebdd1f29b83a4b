//! The agent's configuration: two files, or in a container the same documents in the environment.

use crate::store::{self, StoreError};
use onboarding_kinds::agent::{
    AgentConfiguration, OnboardingConfiguration, TransportSecurity, read_agent_configuration,
    read_onboarding_configuration,
};
use onboarding_kinds::fault::Fault;
use std::path::{Path, PathBuf};

/// The document itself, instead of the file.
pub const ONBOARDING_VARIABLE: &str = "ONBOARDING_CONFIG";
pub const AGENT_VARIABLE: &str = "AGENT_CONFIG";
const LARGEST_FILE: u64 = 1024 * 1024;

/// Where each document may come from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    pub onboarding_file: PathBuf,
    pub agent_file: PathBuf,
    /// Text of [`ONBOARDING_VARIABLE`].
    pub onboarding_text: Option<String>,
    /// Text of [`AGENT_VARIABLE`].
    pub agent_text: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Configuration {
    pub onboarding: OnboardingConfiguration,
    pub agent: AgentConfiguration,
    /// Where each was read from, for the log.
    pub origins: (String, String),
}

/// Everything that is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigurationError {
    #[error("{}", lines(.0))]
    Faults(Vec<Fault>),
    #[error("{file} is missing; it says which endpoint and which WorkloadGroup this host joins (see the agent reference), or set {ONBOARDING_VARIABLE} to its text", file = .0.display())]
    Missing(PathBuf),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{file} is not UTF-8 text", file = .0.display())]
    NotText(PathBuf),
}

fn lines(faults: &[Fault]) -> String {
    faults.iter().map(Fault::to_string).collect::<Vec<_>>().join("\n")
}

impl Configuration {
    /// Reads both, and reports the faults of both.
    pub fn read(sources: &Sources) -> Result<Self, ConfigurationError> {
        let (onboarding_origin, text) = text(&sources.onboarding_text, ONBOARDING_VARIABLE, &sources.onboarding_file)?;
        let onboarding_text = text.ok_or_else(|| ConfigurationError::Missing(sources.onboarding_file.clone()))?;
        let (agent_origin, agent_text) = self::text(&sources.agent_text, AGENT_VARIABLE, &sources.agent_file)?;
        let onboarding = read_onboarding_configuration(&onboarding_origin, &onboarding_text);
        let agent = match &agent_text {
            Some(text) => read_agent_configuration(&agent_origin, text),
            None => Ok(AgentConfiguration::default()),
        };
        let agent_origin =
            if agent_text.is_some() { agent_origin } else { format!("defaults ({agent_origin} is absent)") };
        match (onboarding, agent) {
            (Ok(onboarding), Ok(agent)) => Ok(Self { onboarding, agent, origins: (onboarding_origin, agent_origin) }),
            (onboarding, agent) => {
                let mut faults = onboarding.err().unwrap_or_default();
                faults.extend(agent.err().unwrap_or_default());
                Err(ConfigurationError::Faults(faults))
            }
        }
    }

    /// Into the log, at start: everything that decides what the agent does, and no secret (there is none in it but plugins' environment).
    pub fn print(&self) {
        let onboarding = &self.onboarding;
        tracing::info!(
            onboarding_configuration = self.origins.0,
            agent_configuration = self.origins.1,
            endpoint = format!("{}:{}", onboarding.host, onboarding.port),
            group = %onboarding.group,
            labels = ?onboarding.labels,
            connected_over = ?onboarding.connected_over,
            "configuration"
        );
        match &onboarding.transport {
            TransportSecurity::Tls { insecure_skip_verify: true, .. } => tracing::warn!(
                "INSECURE: the endpoint's certificate is NOT verified (insecureSkipVerify): whoever answers at its address gets this host's credentials; for demonstrations only"
            ),
            TransportSecurity::None => tracing::warn!(
                "INSECURE: plain text to the endpoint (transportSecurity.none): whoever is on the way reads this host's credentials; the endpoint itself serves TLS only"
            ),
            TransportSecurity::Tls { .. } => {}
        }
    }
}

/// The variable's text, or the file's; with what to call it in faults.
fn text(variable: &Option<String>, name: &str, file: &Path) -> Result<(String, Option<String>), ConfigurationError> {
    if let Some(text) = variable {
        return Ok((name.to_owned(), Some(text.clone())));
    }
    let origin = file.display().to_string();
    match store::read_bounded(file, LARGEST_FILE)? {
        None => Ok((origin, None)),
        Some(bytes) => {
            let text = String::from_utf8(bytes).map_err(|_| ConfigurationError::NotText(file.to_owned()))?;
            Ok((origin, Some(text)))
        }
    }
}
