//! Messages to core types and back. A message that isn't whole is an error that names the field.

use crate::onboarding as pb;
use onboarding_core::group::{Probe, ProbeAction};
use onboarding_core::name::GroupName;
use onboarding_core::registration::{ConnectedOver, EndReason, HostAddress, HostReport, SidecarReport};
use std::time::Duration;

/// A message that lacks something, or has something that it can't mean.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct Malformed {
    pub field: &'static str,
    pub problem: String,
}

fn malformed(field: &'static str, problem: impl Into<String>) -> Malformed {
    Malformed { field, problem: problem.into() }
}

/// The group that a request names.
pub fn group_name(group: Option<pb::WorkloadGroupRef>) -> Result<GroupName, Malformed> {
    let group = group.ok_or_else(|| malformed("workload_group", "is missing"))?;
    if group.namespace.is_empty() || group.name.is_empty() {
        return Err(malformed("workload_group", "needs a namespace and a name"));
    }
    Ok(GroupName { namespace: group.namespace, name: group.name })
}

impl TryFrom<pb::Registration> for HostReport {
    type Error = Malformed;
    fn try_from(message: pb::Registration) -> Result<Self, Malformed> {
        let addresses = message
            .addresses
            .iter()
            .map(|address| {
                Ok(HostAddress {
                    ip: address.ip.parse().map_err(|_| {
                        malformed("registration.addresses", format!("{:?} is not an IP address", address.ip))
                    })?,
                    kind: connected_over(address.kind()).unwrap_or_default(),
                })
            })
            .collect::<Result<Vec<_>, Malformed>>()?;
        let connected_over = connected_over(message.connected_over()).unwrap_or_default();
        Ok(Self {
            agent_version: message.agent_version,
            sidecar: match message.sidecar.ok_or_else(|| malformed("registration.sidecar", "is missing"))? {
                pb::registration::Sidecar::Istio(istio) => SidecarReport::Istio {
                    version: istio.version,
                    revision: Some(istio.revision).filter(|revision| !revision.is_empty()),
                },
                pb::registration::Sidecar::Envoy(envoy) => SidecarReport::Envoy { version: envoy.version },
            },
            addresses,
            labels: message.labels.into_iter().collect(),
            connected_over,
        })
    }
}

impl From<&HostReport> for pb::Registration {
    fn from(report: &HostReport) -> Self {
        let kind = |kind| match kind {
            ConnectedOver::Vpc => pb::AddressKind::Vpc,
            ConnectedOver::Internet => pb::AddressKind::Internet,
        };
        Self {
            agent_version: report.agent_version.clone(),
            sidecar: Some(match &report.sidecar {
                SidecarReport::Istio { version, revision } => pb::registration::Sidecar::Istio(pb::IstioSidecar {
                    version: version.clone(),
                    revision: revision.clone().unwrap_or_default(),
                }),
                SidecarReport::Envoy { version } => {
                    pb::registration::Sidecar::Envoy(pb::EnvoySidecar { version: version.clone() })
                }
            }),
            addresses: report
                .addresses
                .iter()
                .map(|address| pb::HostAddress { ip: address.ip.to_string(), kind: kind(address.kind).into() })
                .collect(),
            labels: report.labels.clone().into_iter().collect(),
            connected_over: kind(report.connected_over).into(),
        }
    }
}

fn connected_over(kind: pb::AddressKind) -> Option<ConnectedOver> {
    match kind {
        pb::AddressKind::Vpc => Some(ConnectedOver::Vpc),
        pb::AddressKind::Internet => Some(ConnectedOver::Internet),
        pb::AddressKind::Unspecified => None,
    }
}

impl From<EndReason> for pb::session_end::Reason {
    fn from(reason: EndReason) -> Self {
        match reason {
            EndReason::Replaced => Self::Replaced,
            EndReason::Withdrawn => Self::Withdrawn,
            EndReason::PolicyUnreadable => Self::PolicyUnreadable,
            EndReason::Deleted => Self::Deleted,
            EndReason::Unregistered => Self::Unregistered,
            EndReason::TokenExpired => Self::TokenExpired,
        }
    }
}

fn duration(value: Duration) -> Option<prost_types::Duration> {
    value.try_into().ok()
}

fn from_duration(value: Option<prost_types::Duration>, default: Duration) -> Duration {
    value.and_then(|value| value.try_into().ok()).unwrap_or(default)
}

impl From<&Probe> for pb::Probe {
    fn from(probe: &Probe) -> Self {
        Self {
            initial_delay: duration(probe.initial_delay),
            timeout: duration(probe.timeout),
            period: duration(probe.period),
            success_threshold: probe.success_threshold,
            failure_threshold: probe.failure_threshold,
            action: Some(match &probe.action {
                ProbeAction::HttpGet { path, port, host, https, headers } => {
                    pb::probe::Action::HttpGet(pb::probe::HttpGet {
                        path: path.clone(),
                        port: (*port).into(),
                        host: host.clone().unwrap_or_default(),
                        https: *https,
                        headers: headers
                            .iter()
                            .map(|(name, value)| pb::probe::Header { name: name.clone(), value: value.clone() })
                            .collect(),
                    })
                }
                ProbeAction::TcpSocket { host, port } => pb::probe::Action::TcpSocket(pb::probe::TcpSocket {
                    port: (*port).into(),
                    host: host.clone().unwrap_or_default(),
                }),
                ProbeAction::Exec { command } => pb::probe::Action::Exec(pb::probe::Exec { command: command.clone() }),
            }),
        }
    }
}

impl TryFrom<pb::Probe> for Probe {
    type Error = Malformed;
    fn try_from(probe: pb::Probe) -> Result<Self, Malformed> {
        let port = |port: u32| u16::try_from(port).map_err(|_| malformed("probe", format!("{port} is not a port")));
        let host = |host: String| Some(host).filter(|host| !host.is_empty());
        Ok(Self {
            initial_delay: from_duration(probe.initial_delay, Duration::ZERO),
            timeout: from_duration(probe.timeout, Duration::from_secs(1)),
            period: from_duration(probe.period, Duration::from_secs(10)),
            success_threshold: probe.success_threshold.max(1),
            failure_threshold: probe.failure_threshold.max(1),
            action: match probe.action.ok_or_else(|| malformed("probe.action", "is missing"))? {
                pb::probe::Action::HttpGet(get) => ProbeAction::HttpGet {
                    path: get.path,
                    port: port(get.port)?,
                    host: host(get.host),
                    https: get.https,
                    headers: get.headers.into_iter().map(|header| (header.name, header.value)).collect(),
                },
                pb::probe::Action::TcpSocket(tcp) => {
                    ProbeAction::TcpSocket { port: port(tcp.port)?, host: host(tcp.host) }
                }
                pb::probe::Action::Exec(exec) => ProbeAction::Exec { command: exec.command },
            },
        })
    }
}
