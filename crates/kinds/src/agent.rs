//! The agent's two files (reference, section 2).

use crate::fault::Fault;
use onboarding_core::label::Labels;
use onboarding_core::name::GroupName;
use onboarding_core::registration::ConnectedOver;
use std::time::Duration;

#[derive(Debug, Clone, PartialEq)]
pub struct OnboardingConfiguration {
    pub host: String,
    /// Default 15443.
    pub port: u16,
    pub transport: TransportSecurity,
    pub group: GroupName,
    pub labels: Labels,
    pub connected_over: ConnectedOver,
}

#[derive(Debug, Clone, PartialEq)]
pub enum TransportSecurity {
    Tls { sni: Option<String>, insecure_skip_verify: bool },
    None,
}

#[derive(Debug, Clone, PartialEq)]
pub struct AgentConfiguration {
    pub host: Host,
    pub sidecar: Sidecar,
    pub connection: ConnectionSettings,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Host {
    Auto,
    AwsEc2,
    Custom { credentials: Vec<Plugin>, host_info: HostInfo },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Plugin {
    pub name: String,
    /// Absent: `onboarding-agent-<name>-plugin` on PATH.
    pub path: Option<String>,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum HostInfo {
    Plugin(Plugin),
    /// Regular expressions, checked to compile.
    Basic {
        include: Vec<String>,
        exclude: Vec<String>,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Sidecar {
    /// Absent: whichever is installed.
    pub kind: Option<SidecarKind>,
    pub stdout: String,
    pub stderr: String,
}

#[derive(Debug, Clone, PartialEq)]
pub enum SidecarKind {
    Istio { revision: Option<String> },
    Envoy,
}

/// Of plugin calls only.
#[derive(Debug, Clone, PartialEq)]
pub struct ConnectionSettings {
    pub timeout: Duration,
    pub initial_interval: Duration,
    pub max_interval: Duration,
}

impl Default for AgentConfiguration {
    /// What an absent `agent.config.yaml` means.
    fn default() -> Self {
        Self {
            host: Host::Auto,
            sidecar: Sidecar { kind: None, stdout: "/dev/stdout".to_owned(), stderr: "/dev/stderr".to_owned() },
            connection: ConnectionSettings {
                timeout: Duration::from_secs(30),
                initial_interval: Duration::from_secs(1),
                max_interval: Duration::from_secs(15),
            },
        }
    }
}

/// Reads `onboarding.config.yaml` (exactly one document); an AgentConfiguration in it is a fault that names the right file.
pub fn read_onboarding_configuration(file: &str, text: &str) -> Result<OnboardingConfiguration, Vec<Fault>> {
    let _ = (file, text);
    unimplemented!()
}

/// Reads `agent.config.yaml`.
pub fn read_agent_configuration(file: &str, text: &str) -> Result<AgentConfiguration, Vec<Fault>> {
    let _ = (file, text);
    unimplemented!()
}
