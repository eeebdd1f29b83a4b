//! `onboarding-agent check`: is this host ready to join, and if not, what to do about it. Changes nothing, needs no privileges.

use crate::config::{Configuration, ConfigurationError};
use crate::host;
use crate::host::plugin;
use crate::machine::CLOCK_SKEW;
use crate::session::{Endpoint, Link};
use crate::sidecar::{IstioWay, PilotAgent, pilot_agent_of};
use crate::status::{Ingress, Status};
use crate::store::{Store, with_source};
use crate::trust::{Trust, TrustError};
use crate::version::{self, VersionError};
use jiff::SignedDuration;
use onboarding_kinds::agent::{AgentConfiguration, Host, OnboardingConfiguration, SidecarKind, TransportSecurity};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// What is looked at.
pub struct Subject {
    pub configuration: Result<Configuration, ConfigurationError>,
    pub trust: Result<Trust, TrustError>,
    pub store: Store,
    /// Of Envoy.
    pub binary: PathBuf,
    /// How the agent would run the sidecar of an Istio mesh, where the configuration can be read.
    pub istio: Option<IstioWay>,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// `configuration`, `endpoint`, `clock`, `host`, `sidecar`, `application`, `ports`.
    pub what: &'static str,
    pub verdict: Verdict,
    /// What was found, and what to do where that isn't good.
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Verdict {
    Ok,
    Warn,
    Fail,
}

impl fmt::Display for Finding {
    /// `FAIL  endpoint: ...`, one line for each line of the message.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Ok => "OK",
            Verdict::Warn => "WARN",
            Verdict::Fail => "FAIL",
        };
        for (index, line) in self.message.lines().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write!(f, "{verdict:<5} {}: {line}", self.what)?;
        }
        Ok(())
    }
}

fn finding(what: &'static str, verdict: Verdict, message: impl Into<String>) -> Finding {
    Finding { what, verdict, message: message.into() }
}

/// Looks at everything; one failure doesn't keep the rest from being looked at.
pub async fn check(subject: &Subject) -> Vec<Finding> {
    let mut findings = Vec::new();
    match &subject.configuration {
        Ok(configuration) => {
            let (onboarding, agent) = &configuration.origins;
            findings.push(finding("configuration", Verdict::Ok, format!("{onboarding}; {agent}")));
            findings.extend(transport(&configuration.onboarding));
            findings.extend(endpoint(&configuration.onboarding, &subject.trust).await);
            findings.extend(plugins(&configuration.agent));
            findings.extend(platform(&configuration.agent).await);
        }
        Err(error) => {
            let message = match &error {
                ConfigurationError::Faults(_) => error.to_string(),
                other => with_source(other),
            };
            findings.push(finding("configuration", Verdict::Fail, message));
        }
    }
    findings.push(match version::envoy(&subject.binary).await {
        Ok(version) => finding("sidecar", Verdict::Ok, format!("{} is Envoy {version}", subject.binary.display())),
        Err(error) => finding("sidecar", Verdict::Fail, error.to_string()),
    });
    if let (Ok(configuration), Some(IstioWay::PilotAgent(pilot_agent))) = (&subject.configuration, &subject.istio) {
        findings.push(istio(&configuration.agent, pilot_agent).await);
    }
    findings.extend(listeners(&subject.store, &subject.binary));
    findings
}

fn transport(configuration: &OnboardingConfiguration) -> Option<Finding> {
    match &configuration.transport {
        TransportSecurity::Tls { insecure_skip_verify: false, .. } => None,
        TransportSecurity::Tls { .. } => Some(finding(
            "endpoint",
            Verdict::Warn,
            "insecureSkipVerify: whoever answers at the endpoint's address gets this host's credentials; for a private CA put its certificate into /etc/onboarding-agent/root-certs.pem instead",
        )),
        TransportSecurity::None => Some(finding(
            "endpoint",
            Verdict::Warn,
            "transportSecurity.none: plain text, which the endpoint itself never serves; remove it unless something in between speaks TLS",
        )),
    }
}

/// Reachability, certificate and clock.
async fn endpoint(configuration: &OnboardingConfiguration, trust: &Result<Trust, TrustError>) -> Vec<Finding> {
    let fail = |message| vec![finding("endpoint", Verdict::Fail, message)];
    let trust = match trust {
        Ok(trust) => trust,
        Err(error) => return fail(with_source(error)),
    };
    let endpoint = match Endpoint::new(configuration, trust) {
        Ok(endpoint) => endpoint,
        Err(error) => return fail(with_source(&error)),
    };
    let link = match Link::connect(&endpoint).await {
        Ok(link) => link,
        Err(error) => return fail(with_source(&error)),
    };
    match link.discover().await {
        Ok(discovery) => {
            let message = format!(
                "{}:{} answers at {} with a certificate that this host trusts; plane UID {}",
                endpoint.host, endpoint.port, link.peer, discovery.plane_uid
            );
            vec![finding("endpoint", Verdict::Ok, message), clock(discovery.clock_skew)]
        }
        Err(error) => fail(format!("{} is connected, but does not answer Discover: {}", link.peer, error.describe())),
    }
}

fn clock(skew: SignedDuration) -> Finding {
    if skew.abs() > CLOCK_SKEW {
        let way = if skew.is_positive() { "ahead of" } else { "behind" };
        let message = format!(
            "this host's clock is {} s {way} the plane's; credentials live by minutes: run a time service (chrony, systemd-timesyncd)",
            skew.abs().as_secs()
        );
        finding("clock", Verdict::Fail, message)
    } else {
        finding("clock", Verdict::Ok, format!("within {} s of the plane's", skew.abs().as_secs().max(1)))
    }
}

/// The programs that give credentials, which aren't run here: each credential is worth something. (The one that gives addresses is.)
fn plugins(configuration: &AgentConfiguration) -> Vec<Finding> {
    let Host::Custom { credentials, .. } = &configuration.host else { return Vec::new() };
    credentials
        .iter()
        .map(|plugin| match plugin::find(plugin, std::env::var_os("PATH")) {
            Ok(path) => finding("host", Verdict::Ok, format!("plugin {} is {}", plugin.name, path.display())),
            Err(problem) => finding("host", Verdict::Fail, format!("plugin {}: {problem}", plugin.name)),
        })
        .collect()
}

async fn platform(configuration: &AgentConfiguration) -> Vec<Finding> {
    let host = match host::open(configuration).await {
        Ok(host) => host,
        Err(error) => return vec![finding("host", Verdict::Fail, with_source(&error))],
    };
    let mut findings = vec![finding("host", Verdict::Ok, host.describe())];
    findings.push(match host.addresses().await {
        Ok(addresses) => {
            let list: Vec<_> =
                addresses.iter().map(|address| format!("{} ({})", address.ip, address.kind.word())).collect();
            finding("host", Verdict::Ok, format!("addresses to register: {}", list.join(", ")))
        }
        Err(error) => finding("host", Verdict::Fail, with_source(&error)),
    });
    findings
}

/// What Envoy is started by in an Istio mesh.
async fn istio(configuration: &AgentConfiguration, pilot_agent: &PilotAgent) -> Finding {
    let PilotAgent { binary, template } = pilot_agent;
    match version::pilot_agent(binary).await {
        Ok(_) if !template.is_file() => {
            let message = format!(
                "pilot-agent's template {} is missing; install the istio-sidecar package, or name it with --bootstrap-template",
                template.display()
            );
            finding("sidecar", Verdict::Fail, message)
        }
        Ok(version) => finding("sidecar", Verdict::Ok, format!("{} is pilot-agent {version}", binary.display())),
        Err(error) => {
            let of_revision = match (&error, &configuration.sidecar.kind) {
                (VersionError::NoPilotAgent(_), Some(SidecarKind::Istio { revision: Some(revision) })) => {
                    format!(" (nor is there {})", pilot_agent_of(revision).display())
                }
                _ => String::new(),
            };
            finding("sidecar", Verdict::Fail, format!("{error}{of_revision}"))
        }
    }
}

/// Who listens where, of the ports that the sidecar will want.
fn listeners(store: &Store, binary: &Path) -> Vec<Finding> {
    let table = |path| std::fs::read_to_string(path).unwrap_or_default();
    let mut listening = parse_listening(&table("/proc/net/tcp"));
    listening.extend(parse_listening(&table("/proc/net/tcp6")));
    let Some(ingress) = ingress(store) else { return vec![unknown(&listening)] };
    let mut findings = application(&ingress, &listening, &own_addresses());
    findings.extend(low_ports(&ingress, low_port_rights(binary)));
    findings
}

/// Only the agent's user and root may read the boot configuration; everybody may read the status.
fn ingress(store: &Store) -> Option<Vec<Ingress>> {
    match store.boot() {
        Some(boot) => Some(Ingress::of(&boot)),
        None => Status::read(store).ok().flatten()?.ingress,
    }
}

/// Which ports are the sidecar's nobody here can say: whoever reads this knows which are the application's.
fn unknown(listening: &[SocketAddr]) -> Finding {
    let open: BTreeSet<_> =
        listening.iter().filter(|address| address.ip().is_unspecified()).map(ToString::to_string).collect();
    let open = match open.is_empty() {
        true => "nothing listens on every address of this host".to_owned(),
        false => format!(
            "these listen on every address of this host: {}; if the application is one of them, let it listen on 127.0.0.1 only",
            open.into_iter().collect::<Vec<_>>().join(", ")
        ),
    };
    finding(
        "application",
        Verdict::Warn,
        format!("the sidecar's ports aren't known before the agent has joined; {open}"),
    )
}

/// Addresses of this host that are no loopback.
fn own_addresses() -> Vec<IpAddr> {
    getifaddrs::getifaddrs()
        .map(|interfaces| {
            interfaces.filter_map(|interface| interface.address.ip_addr()).filter(|ip| !ip.is_loopback()).collect()
        })
        .unwrap_or_default()
}

/// The addresses in state LISTEN, of the text of `/proc/net/tcp` or `/proc/net/tcp6`.
pub fn parse_listening(table: &str) -> Vec<SocketAddr> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (local, state) = (fields.nth(1)?, fields.nth(1)?);
            if state != "0A" {
                return None;
            }
            let (ip, port) = local.split_once(':')?;
            let port = u16::from_str_radix(port, 16).ok()?;
            if !ip.is_ascii() {
                return None;
            }
            // Words of the machine's own byte order.
            let words: Vec<[u8; 4]> = (0..ip.len() / 8)
                .map(|word| u32::from_str_radix(&ip[word * 8..word * 8 + 8], 16).map(u32::to_ne_bytes))
                .collect::<Result<_, _>>()
                .ok()?;
            let ip: IpAddr = match words.as_slice() {
                [word] => Ipv4Addr::from(*word).into(),
                [_, _, _, _] => {
                    let octets: [u8; 16] = words.concat().try_into().ok()?;
                    Ipv6Addr::from(octets).to_canonical()
                }
                _ => return None,
            };
            Some(SocketAddr::new(ip, port))
        })
        .collect()
}

/// An application on every address can be reached around the sidecar, and blocks it where the ingress listener has the same port.
fn application(ingress: &[Ingress], listening: &[SocketAddr], own: &[IpAddr]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for ingress in ingress {
        let Ok(port) = u16::try_from(ingress.port) else { continue };
        let here: Vec<_> = listening.iter().filter(|address| address.port() == port).collect();
        if let Some(address) = here.iter().find(|address| address.ip().is_unspecified()) {
            let instead = if ingress.default_endpoint.is_empty() {
                format!("127.0.0.1:{port}")
            } else {
                ingress.default_endpoint.clone()
            };
            findings.push(finding(
                "application",
                Verdict::Fail,
                format!(
                    "something listens on {address}, which is every address of this host: the sidecar can't listen on {bind}:{port}, and the application can be reached around it. Let it listen on {instead} only",
                    bind = if ingress.bind.is_empty() { "<host IP>" } else { &ingress.bind },
                ),
            ));
            continue;
        }
        let endpoint = ingress.default_endpoint.parse::<SocketAddr>().ok();
        let on_every_address = |endpoint: SocketAddr| {
            listening.iter().find(|address| address.port() == endpoint.port() && address.ip().is_unspecified())
        };
        match endpoint {
            // Istio reads 0.0.0.0 as the host's own address. The sidecar itself may be the one that listens there.
            Some(endpoint) if endpoint.ip().is_unspecified() || own.contains(&endpoint.ip()) => findings.push(finding(
                "application",
                Verdict::Warn,
                format!("the Sidecar's defaultEndpoint {endpoint} is an address that others reach, around the sidecar; use 127.0.0.1:{}", endpoint.port()),
            )),
            Some(endpoint) if let Some(address) = on_every_address(endpoint) => findings.push(finding(
                "application",
                Verdict::Warn,
                format!("something listens on {address}, which is every address of this host: the application can be reached around the sidecar's port {port}. Let it listen on {endpoint} only"),
            )),
            Some(endpoint) if !listening.contains(&endpoint) => findings.push(finding(
                "application",
                Verdict::Warn,
                format!("nothing listens on {endpoint}, where the sidecar's port {port} leads to; is the application started?"),
            )),
            _ => findings.push(finding(
                "application",
                Verdict::Ok,
                format!("port {port} is the sidecar's, and the application is behind it"),
            )),
        }
    }
    findings
}

/// Whether Envoy may listen below 1024, as far as it can be told without starting it.
struct LowPortRights {
    /// `net.ipv4.ip_unprivileged_port_start`.
    first_unprivileged: u32,
    /// The agent's process is root, or the binary or the service gives the capability.
    capable: bool,
}

fn low_port_rights(binary: &Path) -> LowPortRights {
    let first_unprivileged = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(1024);
    // The unit gives it as an ambient capability, which shows in the running agent and not in this process: look at both.
    let process = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let unit = std::fs::read_to_string("/usr/lib/systemd/system/onboarding-agent.service").unwrap_or_default();
    LowPortRights {
        first_unprivileged,
        capable: effective_net_bind(&process)
            || unit
                .lines()
                .any(|line| line.starts_with("AmbientCapabilities=") && line.contains("CAP_NET_BIND_SERVICE"))
            || has_file_capability(binary),
    }
}

/// Bit 10 of `CapEff`.
fn effective_net_bind(status: &str) -> bool {
    const CAP_NET_BIND_SERVICE: u64 = 1 << 10;
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_some_and(|capabilities| capabilities & CAP_NET_BIND_SERVICE != 0)
}

/// `setcap cap_net_bind_service+ep` leaves an extended attribute; `getcap` reads it where it is installed.
fn has_file_capability(binary: &Path) -> bool {
    ["/usr/sbin/getcap", "/sbin/getcap"].iter().filter(|getcap| Path::new(getcap).is_file()).any(|getcap| {
        std::process::Command::new(getcap)
            .arg(binary)
            .output()
            .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("cap_net_bind_service"))
    })
}

fn low_ports(ingress: &[Ingress], rights: LowPortRights) -> Option<Finding> {
    let low: Vec<_> = ingress
        .iter()
        .map(|listener| listener.port)
        .filter(|port| *port < rights.first_unprivileged)
        .map(|port| port.to_string())
        .collect();
    if low.is_empty() {
        return None;
    }
    let ports = low.join(", ");
    Some(if rights.capable {
        finding(
            "ports",
            Verdict::Ok,
            format!("{ports}: below {}, and the capability is there", rights.first_unprivileged),
        )
    } else {
        finding(
            "ports",
            Verdict::Fail,
            format!(
                "{ports}: below {} without CAP_NET_BIND_SERVICE; run `systemctl edit onboarding-agent` and add AmbientCapabilities=CAP_NET_BIND_SERVICE under [Service], or `setcap cap_net_bind_service+ep` on Envoy",
                rights.first_unprivileged
            ),
        )
    })
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
