use super::*;
use onboarding_core::identity::{Fact, GcpIdentity, Replay, Thumbprint};
use onboarding_kinds::war::strategies::{key, live, timestamp, word};
use proptest::option;
use proptest::prelude::*;

/// Whatever has an issuer's short name, and whatever has none.
fn live_state() -> impl Strategy<Value = State> {
    (live(), option::of(word())).prop_map(|(mut live, issuer_short_name)| {
        live.attested.issuer_short_name = issuer_short_name;
        State::Live(Box::new(live))
    })
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

    #[test]
    fn what_could_not_be_read_back_is_no_row(mut live in live()) {
        let fact = |value: &str| Fact::claimed(value.to_owned());
        live.attested.identity = Identity::Gcp(GcpIdentity {
            project_number: fact("not a number"),
            project_id: fact("p"),
            region: fact("r"),
            zone: fact("z"),
            instance_id: fact("1"),
        });
        let refused = Row::new(&State::Live(Box::new(live))).unwrap_err();
        prop_assert!(refused.starts_with("identity: "), "{}", refused);
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
