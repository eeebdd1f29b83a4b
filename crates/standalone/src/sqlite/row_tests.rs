use super::*;
use onboarding_core::identity::{Replay, Thumbprint};
use onboarding_core::registration::{ConnectedOver, HostAddress, HostReport, SidecarReport};
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use serde_json::{Value, json};

fn word() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9]{0,11}"
}

fn timestamp() -> impl Strategy<Value = Timestamp> {
    (0..4_000_000_000_i64, 0..1_000_000_000_i32).prop_map(|(second, nano)| Timestamp::new(second, nano).unwrap())
}

fn any_replay() -> impl Strategy<Value = Replay> {
    prop_oneof![Just(Replay::BoundToKey), Just(Replay::Forever), timestamp().prop_map(Replay::Until)]
}

fn key() -> impl Strategy<Value = KeyMemory> {
    (any::<[u8; 32]>(), any_replay())
        .prop_map(|(thumbprint, replay)| KeyMemory { thumbprint: Thumbprint(thumbprint), replay })
}

/// As resources, and which of their facts are only claimed: identities are made by attestors, or read back.
fn identity_json() -> impl Strategy<Value = (Value, Vec<String>)> {
    let ec2 = ("[0-9]{12}", "[0-9a-f]{17}", option::of(word()), any::<bool>()).prop_map(|(account, id, role, claimed)| {
        let mut ec2 = json!({"instanceId": format!("i-{id}")});
        let mut names = Vec::new();
        if let Some(role) = role {
            ec2["iamRole"] = json!({"name": role});
            names.extend(claimed.then(|| "aws.ec2.iamRole".to_owned()));
        }
        let aws = json!({"partition": "aws", "account": account, "region": "us-east-2", "zone": "us-east-2b", "ec2": ec2});
        (json!({"aws": aws}), names)
    });
    // Subjects and attributes are an issuer's: any text.
    let jwt = (".{1,40}", btree_map(word(), ".{0,20}", 0..4)).prop_map(|(subject, attributes)| {
        (json!({"jwt": {"issuer": "https://mycompany.corp", "subject": subject, "attributes": attributes}}), Vec::new())
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

fn connection() -> impl Strategy<Value = Session> {
    let reason = proptest::sample::select(lease::REASONS.map(|(reason, _)| reason).to_vec());
    prop_oneof![
        (word(), word(), timestamp()).prop_map(|(replica, session, since)| Session::Connected {
            replica,
            session,
            since
        }),
        (timestamp(), reason).prop_map(|(since, reason)| Session::Disconnected { since, reason }),
    ]
}

prop_compose! {
    fn live_state()(
        (namespace, name) in (word(), word()),
        (json, claimed) in identity_json(),
        (issuer_short_name, evidence) in (option::of(word()), any_replay()),
        key in key(),
        report in host_report(),
        (created_at, token_expires_at) in (timestamp(), timestamp()),
        connection in connection(),
        (ready, message) in (any::<bool>(), ".{0,40}"),
    ) -> State {
        State::Live(Box::new(Live {
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
        }))
    }
}

fn any_state() -> impl Strategy<Value = State> {
    prop_oneof![
        Just(State::Absent),
        (option::of(key()), timestamp()).prop_map(|(key, at)| State::Ended(Ended { key, at })),
        live_state(),
    ]
}

proptest! {
    #[test]
    fn a_state_comes_back_from_its_row_as_it_was(state in any_state()) {
        match Row::new(&state).unwrap() {
            None => prop_assert_eq!(state, State::Absent),
            Some(row) => prop_assert_eq!(row.state().unwrap(), state),
        }
    }
}

#[test]
fn a_row_that_is_not_whole_is_refused_by_its_column() {
    let at = Timestamp::from_second(1).unwrap();
    let state =
        State::Ended(Ended { key: Some(KeyMemory { thumbprint: Thumbprint([1; 32]), replay: Replay::Forever }), at });
    let row = Row::new(&state).unwrap().unwrap();
    let broken = |change: fn(&mut Row)| {
        let mut row = row.clone();
        change(&mut row);
        row.state().unwrap_err()
    };
    assert!(broken(|row| row.ended_at = None).contains("ended_at is missing"));
    assert!(broken(|row| row.ended_at = Some("yesterday".to_owned())).contains("ended_at"));
    assert!(broken(|row| row.key_replay = None).contains("half a key"));
    assert!(broken(|row| row.key_replay = Some("never".to_owned())).contains("replay"));
    assert!(broken(|row| row.key_thumbprint = Some("00".to_owned())).contains("key_thumbprint"));
    assert!(broken(|row| row.state = "live".to_owned()).contains("connection_since is missing"));
    assert!(broken(|row| row.state = "odd".to_owned()).contains("state \"odd\""));
}
