//! `runtime.onboarding.tetrate.io/v1alpha1` WorkloadAutoRegistration: what a registration looks like to people.

pub mod lease;
#[cfg(feature = "strategies")]
pub mod strategies;

use crate::identity::{self, Case};
use crate::reader::Map;
use jiff::Timestamp;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{Connection, DisconnectReason, Health, Live};
use serde_json::{Value, json};

/// One of a manifests directory or of a cluster, read (spec only): not trusted, shown and linted.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkloadAutoRegistration {
    pub namespace: String,
    pub name: String,
    pub spec: Value,
}

/// The resource: `spec.identity`, `spec.registration`, and `status` with the conditions `AgentConnected` and `Healthy`
/// ([`admitted`] and others are for who knows more to add), and `activeAgentConnection` while connected. `ownerReferences` names the WorkloadGroup (uid only where one is given).
pub fn resource(name: &RegistrationName, live: &Live, group_uid: Option<&str>) -> Value {
    let mut owner = json!({
        "apiVersion": "networking.istio.io/v1beta1",
        "kind": "WorkloadGroup",
        "name": live.group.name,
    });
    if let Some(uid) = group_uid {
        owner["uid"] = uid.into();
    }
    owner["controller"] = true.into();
    owner["blockOwnerDeletion"] = true.into();
    let mut status = json!({ "observedGeneration": 1 });
    if let Connection::Connected { replica, .. } = &live.connection {
        status["activeAgentConnection"] = json!({ "connectedTo": replica });
    }
    status["conditions"] = json!([agent_connected(&live.connection), healthy(&live.health, live.health_since)]);
    json!({
        "apiVersion": "runtime.onboarding.tetrate.io/v1alpha1",
        "kind": "WorkloadAutoRegistration",
        "metadata": {
            "namespace": name.namespace,
            "name": name.name,
            "creationTimestamp": live.created_at.to_string(),
            "ownerReferences": [owner],
        },
        "spec": {
            "identity": identity::to_json(&live.attested.identity, Case::Camel),
            "registration": report::to_json(&live.report),
        },
        "status": status,
    })
}

fn agent_connected(connection: &Connection) -> Value {
    let (status, reason, message, since) = match connection {
        Connection::Connected { since, .. } => ("True", "AgentEstablishedConnection", "the agent is connected", since),
        Connection::Disconnected { since, reason } => {
            let (reason, message) = match reason {
                DisconnectReason::NotYetConnected => ("AgentNotYetConnected", "registered, and not yet connected"),
                DisconnectReason::ConnectionLost => ("AgentDisconnected", "the connection was lost"),
                DisconnectReason::TokenExpired => {
                    ("AgentDisconnectedTokenExpired", "the agent's token ended and was not renewed")
                }
                DisconnectReason::PolicyUnreadable => (
                    "AgentDisconnectedPolicyUnreadable",
                    "a policy can't be read, so nobody can say that it still admits this workload",
                ),
                DisconnectReason::PlaneRestarted => {
                    ("AgentDisconnectedPlaneRestarted", "the plane that the agent was connected to stopped")
                }
            };
            ("False", reason, message, since)
        }
    };
    json!({
        "type": "AgentConnected",
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": since.to_string(),
    })
}

fn healthy(health: &Health, since: Timestamp) -> Value {
    let (status, reason) = if health.ready { ("True", "ApplicationReady") } else { ("False", "ProbeFailed") };
    json!({
        "type": "Healthy",
        "status": status,
        "reason": reason,
        "message": health.message,
        "lastTransitionTime": since.to_string(),
    })
}

/// The condition `Admitted`, without a time: by which policy, and which rule of its `spec.allow`; `None`: a policy can't be read, so nobody
/// can say.
pub fn admitted(by: Option<(&str, usize)>) -> Value {
    let (status, reason, message) = match by {
        Some((policy, rule)) => {
            ("True", "AllowedByPolicy", format!("OnboardingPolicy {policy}, rule spec.allow[{rule}]"))
        }
        None => {
            let message = "a policy can't be read, so nobody can say whether this workload is admitted";
            ("Unknown", "PolicyUnreadable", message.to_owned())
        }
    };
    json!({ "type": "Admitted", "status": status, "reason": reason, "message": message })
}

/// `spec` of one that was read.
pub(crate) fn spec(root: &mut Map<'_>) -> Option<Value> {
    let item = root.required("spec")?;
    let mut spec = item.map()?;
    spec.required("identity").and_then(|item| identity::read_resource(&item));
    if let Some(mut registration) = spec.required("registration").and_then(|item| item.map()) {
        report::read(&mut registration);
        registration.close();
    }
    spec.close();
    Some(item.node().to_json())
}

/// `spec.registration` of a war, and back: how a registry stores what an agent said of itself.
pub mod report {
    use crate::identity::in_one_sentence;
    use crate::node::Node;
    use crate::reader::{Document, Map};
    use onboarding_core::registration::{ConnectedOver, HostAddress, HostReport, SidecarReport};
    use serde_json::{Value, json};
    use std::net::IpAddr;

    const WAYS: [(&str, ConnectedOver); 2] = [("VPC", ConnectedOver::Vpc), ("INTERNET", ConnectedOver::Internet)];

    pub fn to_json(report: &HostReport) -> Value {
        let sidecar = match &report.sidecar {
            SidecarReport::Istio { version, revision: Some(revision) } => {
                json!({ "istio": { "version": version, "revision": revision } })
            }
            SidecarReport::Istio { version, revision: None } => json!({ "istio": { "version": version } }),
            SidecarReport::Envoy { version } => json!({ "envoy": { "version": version } }),
        };
        let addresses = report.addresses.iter();
        let addresses: Vec<_> =
            addresses.map(|address| json!({ "ip": address.ip.to_string(), "type": address.kind.word() })).collect();
        json!({
            "agent": { "version": report.agent_version },
            "sidecar": sidecar,
            "host": { "addresses": addresses },
            "workload": { "labels": report.labels },
            "settings": { "connectedOver": report.connected_over.word() },
        })
    }

    pub fn from_json(value: &Value) -> Result<HostReport, String> {
        let node = Node::from_json(value);
        let document = Document::new("", String::new());
        let report = document.root(&node).map().and_then(|mut map| {
            let report = read(&mut map);
            map.close();
            report
        });
        let (faults, _) = document.finish();
        match report {
            Some(report) if faults.is_empty() => Ok(report),
            _ => Err(faults.iter().map(in_one_sentence).collect::<Vec<_>>().join("; ")),
        }
    }

    /// The fields of a registration; all of them may be absent.
    pub(crate) fn read(registration: &mut Map<'_>) -> Option<HostReport> {
        let version =
            |map: &mut Map<'_>| map.optional("version").and_then(|item| item.text()).unwrap_or_default().to_owned();
        let agent_version = registration.inner(&["agent"], |agent| Some(version(agent))).unwrap_or_default();
        let mut sidecar = SidecarReport::default();
        registration.inner(&["sidecar"], |map| {
            for (kind, item) in map.at_most_one_of(&["istio", "envoy"]) {
                let Some(mut map) = item.map() else { continue };
                let version = version(&mut map);
                sidecar = match kind {
                    "istio" => {
                        let revision = map.optional("revision").and_then(|item| item.text()).map(str::to_owned);
                        SidecarReport::Istio { version, revision }
                    }
                    _ => SidecarReport::Envoy { version },
                };
                map.close();
            }
            Some(())
        });
        let addresses = registration.inner(&["host"], |host| {
            Some(host.read_list("addresses", |item| {
                let mut address = item.map()?;
                let ip = address.required_as("ip", |text| {
                    text.parse::<IpAddr>().map_err(|_| format!("must be an IP address, and is {text:?}"))
                });
                let kind = address.required("type").and_then(|item| item.word(&WAYS));
                address.close();
                Some(HostAddress { ip: ip?, kind: kind? })
            }))
        });
        let labels = registration.inner(&["workload"], |workload| workload.optional("labels")?.texts());
        let connected_over =
            registration.inner(&["settings"], |settings| settings.optional("connectedOver")?.word(&WAYS));
        Some(HostReport {
            agent_version,
            sidecar,
            addresses: addresses.unwrap_or_default(),
            labels: labels.unwrap_or_default(),
            connected_over: connected_over.unwrap_or_default(),
        })
    }
}
