//! Registrations of every kind, for property tests of whoever stores them.
//!
//! Identities are made by attestors, or read back: here they are read back.
#![allow(clippy::unwrap_used, reason = "what is generated can be read")]

use crate::identity;
use crate::war::lease;
use jiff::Timestamp;
use onboarding_core::identity::{Attested, Replay, Thumbprint};
use onboarding_core::name::GroupName;
use onboarding_core::registration::{
    ConnectedOver, Connection, Health, HostAddress, HostReport, KeyMemory, Live, SidecarReport,
};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use serde_json::{Value, json};

pub fn word() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9]{0,11}"
}

pub fn timestamp() -> impl Strategy<Value = Timestamp> {
    (0..4_000_000_000_i64, 0..1_000_000_000_i32).prop_map(|(second, nano)| Timestamp::new(second, nano).unwrap())
}

fn any_replay() -> impl Strategy<Value = Replay> {
    prop_oneof![Just(Replay::BoundToKey), Just(Replay::Forever), timestamp().prop_map(Replay::Until)]
}

pub fn key() -> impl Strategy<Value = KeyMemory> {
    (any::<[u8; 32]>(), any_replay())
        .prop_map(|(thumbprint, replay)| KeyMemory { thumbprint: Thumbprint(thumbprint), replay })
}

/// As a resource, which of its facts are only claimed, and the issuer's short name.
fn identity_json() -> impl Strategy<Value = (Value, Vec<String>, Option<String>)> {
    let ec2 = ("[0-9]{12}", "[0-9a-f]{17}", option::of(word()), any::<bool>()).prop_map(|(account, id, role, claimed)| {
        let mut ec2 = json!({"instanceId": format!("i-{id}")});
        let mut names = Vec::new();
        if let Some(role) = role {
            ec2["iamRole"] = json!({"name": role});
            names.extend(claimed.then(|| "aws.ec2.iamRole".to_owned()));
        }
        let aws = json!({"partition": "aws", "account": account, "region": "us-east-2", "zone": "us-east-2b", "ec2": ec2});
        (json!({"aws": aws}), names, None)
    });
    // Subjects and attributes are an issuer's: any text.
    let jwt = (".{1,40}", btree_map(word(), ".{0,20}", 0..4), word()).prop_map(|(subject, attributes, issuer)| {
        let jwt = json!({"issuer": "https://mycompany.corp", "subject": subject, "attributes": attributes});
        (json!({"jwt": jwt}), Vec::new(), Some(issuer))
    });
    prop_oneof![ec2, jwt]
}

fn host_report() -> impl Strategy<Value = HostReport> {
    let kind = prop_oneof![Just(ConnectedOver::Vpc), Just(ConnectedOver::Internet)];
    let address = (any::<std::net::IpAddr>(), kind.clone()).prop_map(|(ip, kind)| HostAddress { ip, kind });
    let sidecar = prop_oneof![
        word().prop_map(|version| SidecarReport::Envoy { version }),
        (word(), option::of(word())).prop_map(|(version, revision)| SidecarReport::Istio { version, revision }),
    ];
    (word(), sidecar, vec(address, 0..3), btree_map(word(), word(), 0..4), kind).prop_map(
        |(agent_version, sidecar, addresses, labels, connected_over)| HostReport {
            agent_version,
            sidecar,
            addresses,
            labels,
            connected_over,
        },
    )
}

fn connection() -> impl Strategy<Value = Connection> {
    let reason = proptest::sample::select(lease::REASONS.map(|(reason, _)| reason).to_vec());
    prop_oneof![
        (word(), word(), timestamp()).prop_map(|(replica, session, since)| Connection::Connected {
            replica,
            session,
            since
        }),
        (timestamp(), reason).prop_map(|(since, reason)| Connection::Disconnected { since, reason }),
    ]
}

prop_compose! {
    /// With the short name of its issuer where the identity is by JWT.
    pub fn live()(
        (namespace, name) in (word(), word()),
        (json, claimed, issuer_short_name) in identity_json(),
        evidence in any_replay(),
        key in key(),
        report in host_report(),
        (created_at, token_expires_at, health_since) in (timestamp(), timestamp(), timestamp()),
        connection in connection(),
        (ready, message) in (any::<bool>(), ".{0,40}"),
    ) -> Live {
        Live {
            group: GroupName { namespace, name },
            attested: Attested {
                identity: identity::from_json(&json, &claimed).unwrap(),
                issuer_short_name,
                replay: evidence,
            },
            key,
            report,
            created_at,
            token_expires_at,
            connection,
            health: Health { ready, message },
            health_since,
        }
    }
}
