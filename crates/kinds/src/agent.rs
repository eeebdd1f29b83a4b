//! The agent's two files (reference, section 2).

use crate::fault::Fault;
use crate::manifest::{self, Object};
use crate::reader::{Item, Map};
use crate::syntax;
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
    AwsEcs,
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
    manifest::read_single(file, text, "OnboardingConfiguration", |object| match object {
        Object::OnboardingConfiguration(configuration) => Some(*configuration),
        _ => None,
    })
}

/// Reads `agent.config.yaml`.
pub fn read_agent_configuration(file: &str, text: &str) -> Result<AgentConfiguration, Vec<Fault>> {
    manifest::read_single(file, text, "AgentConfiguration", |object| match object {
        Object::AgentConfiguration(configuration) => Some(*configuration),
        _ => None,
    })
}

/// The fields of an OnboardingConfiguration but `apiVersion` and `kind`.
pub(crate) fn onboarding_configuration(root: &mut Map<'_>) -> Option<OnboardingConfiguration> {
    let (mut host, mut port) = (None, Some(15443));
    let mut transport = TransportSecurity::Tls { sni: None, insecure_skip_verify: false };
    if let Some(mut endpoint) = root.required("onboardingEndpoint").and_then(|item| item.map()) {
        host = endpoint.required_as("host", syntax::host);
        port = endpoint.optional("port").map_or(port, |item| item.port());
        if let Some(mut security) = endpoint.optional("transportSecurity").and_then(|item| item.map()) {
            for (kind, item) in security.one_of(&["tls", "none"]) {
                let Some(mut map) = item.map() else { continue };
                transport = match kind {
                    "tls" => {
                        let sni = map.optional_as("sni", sni);
                        let skip = map.optional("insecureSkipVerify");
                        let insecure_skip_verify = skip.as_ref().and_then(|item| item.boolean()).unwrap_or(false);
                        if let Some(item) = skip.filter(|_| insecure_skip_verify) {
                            item.warn("accepts any endpoint, also an impostor; for demonstrations only");
                        }
                        TransportSecurity::Tls { sni, insecure_skip_verify }
                    }
                    _ => {
                        item.warn("is plain text, which the endpoint never serves");
                        TransportSecurity::None
                    }
                };
                map.close();
            }
            security.close();
        }
        endpoint.close();
    }
    let mut group = None;
    if let Some(mut map) = root.required("workloadGroup").and_then(|item| item.map()) {
        let namespace = map.required_as("namespace", syntax::namespace);
        let name = map.required_as("name", syntax::resource_name);
        map.close();
        group = namespace.zip(name).map(|(namespace, name)| GroupName { namespace, name });
    }
    let labels = root.inner(&["workload"], |workload| Some(workload.labels("labels"))).unwrap_or_default();
    let connected_over = root.inner(&["settings"], |settings| {
        settings.optional("connectedOver")?.word(&[("VPC", ConnectedOver::Vpc), ("INTERNET", ConnectedOver::Internet)])
    });
    Some(OnboardingConfiguration {
        host: host?,
        port: port?,
        transport,
        group: group?,
        labels,
        connected_over: connected_over.unwrap_or_default(),
    })
}

/// A name that TLS can send: no IP address.
fn sni(text: &str) -> Result<String, String> {
    let name = syntax::host(text)?;
    match syntax::is_host_name(&name) {
        true => Ok(name),
        false => Err(format!("must be a host name (TLS sends no addresses), and is {name}")),
    }
}

/// The fields of an AgentConfiguration but `apiVersion` and `kind`.
pub(crate) fn agent_configuration(root: &mut Map<'_>) -> Option<AgentConfiguration> {
    let default = AgentConfiguration::default();
    let host = root.optional("host").map_or(Some(Host::Auto), |item| host(&item));
    let sidecar = root.optional("sidecar").map_or(Some(default.sidecar), |item| sidecar(&item));
    let connection = root.inner(&["settings", "connection"], |connection| Some(connection_settings(connection)));
    Some(AgentConfiguration { host: host?, sidecar: sidecar?, connection: connection.unwrap_or(default.connection) })
}

fn host(item: &Item<'_>) -> Option<Host> {
    let mut map = item.map()?;
    let found = map.one_of(&["auto", "aws", "custom"]);
    map.close();
    let read = |(kind, item): &(&str, Item<'_>)| {
        let mut map = item.map()?;
        let host = match *kind {
            "auto" => Some(Host::Auto),
            "aws" => aws(&mut map),
            _ => custom(&mut map),
        };
        map.close();
        host
    };
    found.iter().map(read).next_back().flatten()
}

fn aws(aws: &mut Map<'_>) -> Option<Host> {
    let found = aws.one_of(&["ec2", "ecs"]);
    let read = |(kind, item): &(&str, Item<'_>)| {
        item.map()?.close();
        Some(if *kind == "ecs" { Host::AwsEcs } else { Host::AwsEc2 })
    };
    found.iter().map(read).next_back().flatten()
}

fn custom(custom: &mut Map<'_>) -> Option<Host> {
    let credentials = custom.required_items("credential", |item| {
        let mut credential = item.map()?;
        let plugin = credential.required("plugin").and_then(|item| plugin(&item));
        credential.close();
        plugin
    });
    let mut host_info = Some(HostInfo::Basic { include: Vec::new(), exclude: Vec::new() });
    if let Some(mut map) = custom.optional("hostinfo").and_then(|item| item.map()) {
        for (kind, item) in map.one_of(&["plugin", "basic"]) {
            host_info = match kind {
                "plugin" => plugin(&item).map(HostInfo::Plugin),
                _ => basic(&item),
            };
        }
        map.close();
    }
    Some(Host::Custom { credentials, host_info: host_info? })
}

fn basic(item: &Item<'_>) -> Option<HostInfo> {
    let mut basic = item.map()?;
    let (mut include, mut exclude) = (Vec::new(), Vec::new());
    basic.inner(&["networkInterfaces"], |interfaces| {
        include = interfaces.texts("include", syntax::regular_expression);
        exclude = interfaces.texts("exclude", syntax::regular_expression);
        Some(())
    });
    basic.close();
    Some(HostInfo::Basic { include, exclude })
}

fn plugin(item: &Item<'_>) -> Option<Plugin> {
    let mut plugin = item.map()?;
    let name = plugin.required_as("name", syntax::plugin_name);
    let path = plugin.optional_as("path", syntax::any);
    let args = plugin.optional("args").and_then(|item| item.list()).unwrap_or_default();
    let args = args.iter().filter_map(|item| argument(item)).collect();
    let env = plugin.optional("env").and_then(|item| item.list()).unwrap_or_default();
    let env = env.iter().filter_map(|item| {
        let mut variable = item.map()?;
        let name = variable.required_as("name", |name| match name.contains('=') {
            true => Err(format!("must be the name of an environment variable, and {name:?} has = in it")),
            false => Ok(name.to_owned()),
        });
        let value = variable.optional("value").map_or(Some(String::new()), |item| argument(&item));
        variable.close();
        Some((name?, value?))
    });
    let env = env.collect();
    plugin.close();
    Some(Plugin { name: name?, path, args, env })
}

/// What a process can be given: any text, also an empty one or one of several lines, without NUL.
fn argument(item: &Item<'_>) -> Option<String> {
    let text = item.text()?;
    if text.contains('\0') {
        item.fault("must not have a NUL character in it");
        return None;
    }
    Some(text.to_owned())
}

fn sidecar(item: &Item<'_>) -> Option<Sidecar> {
    let default = AgentConfiguration::default().sidecar;
    let mut sidecar = item.map()?;
    let mut kind = None;
    for (key, item) in sidecar.at_most_one_of(&["istio", "envoy"]) {
        let Some(mut map) = item.map() else { continue };
        kind = Some(match key {
            "istio" => {
                let revision = map.optional("revision").filter(|item| item.node().as_text() != Some(""));
                SidecarKind::Istio { revision: revision.and_then(|item| item.parse(syntax::revision)) }
            }
            _ => SidecarKind::Envoy,
        });
        map.close();
    }
    let stdout = sidecar.inner(&["stdout"], |map| map.required_as("filename", syntax::any));
    let stderr = sidecar.inner(&["stderr"], |map| map.required_as("filename", syntax::any));
    sidecar.close();
    Some(Sidecar { kind, stdout: stdout.unwrap_or(default.stdout), stderr: stderr.unwrap_or(default.stderr) })
}

fn connection_settings(connection: &mut Map<'_>) -> ConnectionSettings {
    const LEAST: Duration = Duration::from_millis(1);
    let default = AgentConfiguration::default().connection;
    let timeout = connection.optional("timeout").and_then(|item| item.duration(LEAST)).unwrap_or(default.timeout);
    let (mut initial_interval, mut max_interval) = (default.initial_interval, default.max_interval);
    connection.inner(&["retryPolicy", "exponentialBackoff"], |backoff| {
        let mut interval = |key| backoff.optional(key).map(|item| item.duration(LEAST));
        let (initial, max) = (interval("initialInterval"), interval("maxInterval"));
        initial_interval = initial.flatten().unwrap_or(initial_interval);
        max_interval = max.flatten().unwrap_or(max_interval);
        // One that couldn't be read has its fault already.
        if max_interval < initial_interval && initial != Some(None) && max != Some(None) {
            let which = if max.is_none() { ", the default," } else { "" };
            let message = format!("{max_interval:?}{which} is below initialInterval, which is {initial_interval:?}");
            backoff.fault_at("maxInterval", message);
        }
        Some(())
    });
    ConnectionSettings { timeout, initial_interval, max_interval }
}
