//! The requirement's workload, for the tests here and for those against a real cluster.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, unreachable_pub, reason = "each of its users needs some of it")]

use jiff::Timestamp;
use onboarding_core::group::WorkloadGroup;
use onboarding_core::identity::{Attested, Replay, Thumbprint};
use onboarding_core::name::{GroupName, RegistrationName};
use onboarding_core::registration::{
    ConnectedOver, Connection, DisconnectReason, Health, HostAddress, HostReport, KeyMemory, Live,
    SidecarReport as Sidecar,
};
use onboarding_kinds::manifest::{self, Object};
use onboarding_kinds::mesh;
use serde_json::json;

/// Those of the manifests, which have no faults.
pub fn objects(text: &str) -> Vec<Object> {
    let read = manifest::read("test.yaml", text);
    assert!(read.faults.is_empty(), "{:?}", read.faults);
    read.items.into_iter().map(|item| item.object).collect()
}

/// In `bookinfo`, with this in its spec.
pub fn sidecar(spec: &str) -> mesh::Sidecar {
    let text = format!(
        "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: vm, namespace: bookinfo}}\nspec:\n{}\n",
        spec.lines().map(|line| format!("  {line}\n")).collect::<String>()
    );
    match objects(&text).pop() {
        Some(Object::Sidecar(sidecar)) => sidecar,
        other => panic!("{other:?}"),
    }
}

/// The requirement's.
pub fn group() -> WorkloadGroup {
    group_with("")
}

/// With this in its spec as well.
pub fn group_with(more: &str) -> WorkloadGroup {
    let text = format!(
        "
apiVersion: networking.istio.io/v1alpha3
kind: WorkloadGroup
metadata: {{name: ratings, namespace: bookinfo, labels: {{app: ratings}}}}
spec:
  template:
    labels: {{app: ratings, class: vm}}
    serviceAccount: ratings-vm
    network: virtual-machines
    ports: {{http: 8080, admin: 9901}}
  probe: {{httpGet: {{path: /health, port: 8080}}}}
{}",
        more.lines().map(|line| format!("  {line}\n")).collect::<String>()
    );
    match objects(&text).pop() {
        Some(Object::WorkloadGroup(group)) => group,
        other => panic!("{other:?}"),
    }
}

pub fn name() -> RegistrationName {
    RegistrationName {
        namespace: "bookinfo".to_owned(),
        name: "ratings-aws-aws-123456789012-us-east-2b-ec2-i-1234567890abcdef0".to_owned(),
    }
}

pub fn live() -> Live {
    let identity = json!({"aws": {
        "partition": "aws", "account": "123456789012", "region": "us-east-2", "zone": "us-east-2b",
        "ec2": {"instanceId": "i-1234567890abcdef0"},
    }});
    let key = KeyMemory { thumbprint: Thumbprint([1; 32]), replay: Replay::Forever };
    Live {
        group: GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() },
        attested: Attested {
            identity: onboarding_kinds::identity::from_json(&identity, &[]).unwrap(),
            issuer_short_name: None,
            replay: Replay::Forever,
        },
        key,
        report: HostReport {
            agent_version: "0.1.0".to_owned(),
            sidecar: Sidecar::Istio { version: "1.29.0".to_owned(), revision: None },
            addresses: vec![HostAddress { ip: "10.0.0.4".parse().unwrap(), kind: ConnectedOver::Vpc }],
            labels: [("version", "v5"), ("class", "mine")].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            connected_over: ConnectedOver::Vpc,
        },
        created_at: Timestamp::UNIX_EPOCH,
        token_expires_at: Timestamp::UNIX_EPOCH,
        connection: Connection::Disconnected {
            since: Timestamp::UNIX_EPOCH,
            reason: DisconnectReason::NotYetConnected,
        },
        health: Health { ready: false, message: String::new() },
        health_since: Timestamp::UNIX_EPOCH,
    }
}

/// Not a certificate, but as long as nobody reads it, PEM of one.
pub const ROOT: &str = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
