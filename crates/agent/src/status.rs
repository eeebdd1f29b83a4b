//! Where this VM stands and why: `status.json` in the state directory, and what `onboarding-agent status` makes of it.

use crate::boot::HeldBoot;
use crate::machine::{Phase, Sidecar, State};
use crate::store::{self, Store, StoreError};
use jiff::Timestamp;
use onboarding_wire::onboarding as pb;
use serde::{Deserialize, Serialize};

/// Written by the agent on every change, readable by everybody; no secret is in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub pid: u32,
    pub agent_version: String,
    pub endpoint: String,
    /// `namespace/name`.
    pub workload_group: String,
    /// `Starting`, `Attesting`, `Authorizing`, `Registering`, `Connected`, `WaitingToRetry`, `Draining`, `Stopped`.
    pub phase: String,
    pub since: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_retry: Option<Timestamp>,
    /// `namespace/name`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registration: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_expires_at: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spiffe_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificate_expires_at: Option<Timestamp>,
    /// `Absent`, `Starting`, `Live`, `NotLive`.
    pub sidecar: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sidecar_problem: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_version: Option<String>,
    /// Of the sidecar. Absent: not known, for the plane has given no boot configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Vec<Ingress>>,
    /// Of the last configuration that the sidecar refused, until one is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configuration_problem: Option<String>,
    /// Why the plane has no boot configuration for this workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_problem: Option<String>,
    /// Absent: no probe, or not probed yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application_ready: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub application_message: Option<String>,
    /// How far this host's clock is ahead of the plane's, in seconds, where that is more than a minute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_skew_seconds: Option<i64>,
}

/// A port that the sidecar takes from others to the application.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ingress {
    /// Empty: the host's address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub bind: String,
    pub port: u32,
    /// Where it leads to, as `127.0.0.1:8080`; empty: the same port.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub default_endpoint: String,
}

impl Ingress {
    /// Those of a boot configuration.
    pub fn of(boot: &HeldBoot) -> Vec<Self> {
        boot.ingress
            .iter()
            .map(|pb::IngressListener { bind, port, default_endpoint }| Self {
                bind: bind.clone(),
                port: *port,
                default_endpoint: default_endpoint.clone(),
            })
            .collect()
    }
}

/// What of a status isn't the machine's.
#[derive(Debug, Clone, Default)]
pub struct About {
    pub endpoint: String,
    pub workload_group: String,
    pub configuration_problem: Option<String>,
    pub boot_problem: Option<String>,
}

impl Status {
    pub fn of(state: &State, held: Option<&HeldBoot>, about: &About) -> Self {
        let (phase, next_retry) = match &state.phase {
            Phase::Starting => ("Starting", None),
            Phase::Attesting => ("Attesting", None),
            Phase::Authorizing => ("Authorizing", None),
            Phase::Registering { .. } => ("Registering", None),
            Phase::Connected => ("Connected", None),
            Phase::WaitingToRetry { until, .. } => ("WaitingToRetry", Some(*until)),
            Phase::Draining(_) => ("Draining", None),
            Phase::Stopped => ("Stopped", None),
        };
        let (sidecar, sidecar_problem) = match &state.sidecar {
            Sidecar::Absent => ("Absent", None),
            Sidecar::Starting => ("Starting", None),
            Sidecar::Live => ("Live", None),
            Sidecar::NotLive { why } => ("NotLive", Some(why.clone())),
        };
        Self {
            pid: std::process::id(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            endpoint: about.endpoint.clone(),
            workload_group: about.workload_group.clone(),
            phase: phase.to_owned(),
            since: state.since,
            last_error: state.last_error.clone(),
            next_retry,
            registration: state.token.as_ref().map(|token| token.registration.clone()),
            token_expires_at: state.token.as_ref().map(|token| token.expires_at),
            spiffe_id: state.certificate.as_ref().map(|certificate| certificate.spiffe_id.clone()),
            certificate_expires_at: state.certificate.as_ref().map(|certificate| certificate.expires_at),
            sidecar: sidecar.to_owned(),
            sidecar_problem,
            boot_version: state.boot.as_ref().map(|boot| boot.version.clone()),
            ingress: held.map(Ingress::of),
            configuration_problem: about.configuration_problem.clone(),
            boot_problem: about.boot_problem.clone(),
            application_ready: state.health.as_ref().map(|health| health.ready),
            application_message: state
                .health
                .as_ref()
                .map(|health| health.message.clone())
                .filter(|message| !message.is_empty()),
            clock_skew_seconds: state.clock_skew.map(|skew| skew.as_secs()),
        }
    }

    pub fn write(&self, store: &Store) -> Result<(), StoreError> {
        let mut text = serde_json::to_vec_pretty(self).unwrap_or_default();
        text.push(b'\n');
        store::write_for_now(&store.status_path(), &text, 0o644)
    }

    /// `None`: no agent has written one.
    pub fn read(store: &Store) -> Result<Option<Self>, StoreError> {
        let path = store.status_path();
        let Some(bytes) = store::read_bounded(&path, 1024 * 1024)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| StoreError::read(&path, error.into()))
    }

    /// Whether the process that wrote it still runs.
    pub fn agent_runs(&self) -> bool {
        std::path::Path::new("/proc").join(self.pid.to_string()).exists() && self.phase != "Stopped"
    }

    /// One line for the service manager.
    pub fn line(&self) -> String {
        let sidecar = match self.sidecar.as_str() {
            "Live" => "sidecar live",
            "Starting" => "sidecar starting",
            "NotLive" => "sidecar not live",
            _ => "no sidecar",
        };
        let phase = match self.phase.as_str() {
            "Connected" => format!("Connected as {}", self.registration.as_deref().unwrap_or("?")),
            "WaitingToRetry" => {
                format!("Waiting to try again: {}", self.last_error.as_deref().unwrap_or("no reason"))
            }
            "Draining" => "Leaving the mesh".to_owned(),
            other => format!("{other} ({})", self.workload_group),
        };
        // One line for `systemctl status`, whatever an error says.
        format!("{phase}; {sidecar}").chars().map(|c| if c.is_control() { ' ' } else { c }).take(400).collect()
    }

    /// A few lines for a person.
    pub fn describe(&self, now: Timestamp) -> String {
        let mut lines = Vec::new();
        let mut line = |name: &str, value: String| lines.push(format!("{name:<13}{value}"));
        if self.agent_runs() {
            line("Agent", format!("{} (pid {}, {})", self.phase, self.pid, ago(now, self.since)));
        } else {
            line("Agent", format!("not running; last seen {} {}", self.phase, ago(now, self.since)));
        }
        if let Some(error) = &self.last_error {
            line("Why", error.clone());
        }
        if let Some(retry) = self.next_retry {
            line("Next try", ahead(now, retry));
        }
        line("Endpoint", self.endpoint.clone());
        line("Group", self.workload_group.clone());
        line("Registration", self.registration.clone().unwrap_or_else(|| "none".to_owned()));
        if let (Some(id), Some(expires)) = (&self.spiffe_id, self.certificate_expires_at) {
            line("Identity", format!("{id} (certificate {})", ends(now, expires)));
        }
        let sidecar = match &self.sidecar_problem {
            Some(problem) => format!("{}: {problem}", self.sidecar),
            None => self.sidecar.clone(),
        };
        line("Sidecar", sidecar);
        if let Some(problem) = &self.boot_problem {
            let meanwhile = match self.sidecar.as_str() {
                "Absent" => "the sidecar waits",
                _ => "the sidecar goes on with what it has",
            };
            line("From the plane", format!(" no boot configuration, {meanwhile}: {problem}"));
        }
        if let Some(problem) = &self.configuration_problem {
            line("Configuration", format!(" refused by the sidecar, the last good one stays: {problem}"));
        }
        if let Some(ready) = self.application_ready {
            let message = self.application_message.as_deref().map(|m| format!(": {m}")).unwrap_or_default();
            line("Application", format!("{}{message}", if ready { "ready" } else { "not ready" }));
        }
        if let Some(skew) = self.clock_skew_seconds {
            let way = if skew > 0 { "ahead of" } else { "behind" };
            line(
                "Clock",
                format!("{} s {way} the plane's; run a time service (chrony, systemd-timesyncd)", skew.abs()),
            );
        }
        lines.join("\n") + "\n"
    }
}

fn seconds(count: i64) -> String {
    match count {
        ..120 => format!("{count} s"),
        120..7200 => format!("{} min", count / 60),
        7200..172_800 => format!("{} h", count / 3600),
        _ => format!("{} d", count / 86_400),
    }
}

fn ago(now: Timestamp, then: Timestamp) -> String {
    format!("{} ago", seconds(now.duration_since(then).as_secs().max(0)))
}

fn ahead(now: Timestamp, then: Timestamp) -> String {
    format!("in {}", seconds(then.duration_since(now).as_secs().max(0)))
}

fn ends(now: Timestamp, end: Timestamp) -> String {
    if end > now { format!("expires {}", ahead(now, end)) } else { format!("EXPIRED {}", ago(now, end)) }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
