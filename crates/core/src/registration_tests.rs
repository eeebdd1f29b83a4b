use super::*;
use crate::identity::{Fact, Identity, JwtIdentity, Proven};
use proptest::prelude::*;

const GRACE: Duration = Duration::from_secs(300);
const KEYS: [Thumbprint; 3] = [Thumbprint([1; 32]), Thumbprint([2; 32]), Thumbprint([3; 32])];

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn attested(replay: Replay) -> Attested {
    Attested {
        identity: Identity::Jwt(JwtIdentity {
            issuer: Fact::Proven(Proven::by_attestor("https://mycompany.corp".to_owned())),
            subject: Fact::Proven(Proven::by_attestor("vm7".to_owned())),
            attributes: Default::default(),
        }),
        issuer_short_name: Some("my-corp".to_owned()),
        replay,
    }
}

fn register(key: Thumbprint, replay: Replay, issued: i64) -> Event {
    Event::Register(Box::new(Register {
        group: GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() },
        attested: attested(replay),
        key,
        report: HostReport::default(),
        token_issued_at: at(issued),
        token_expires_at: at(issued + 3600),
    }))
}

fn connect(key: Thumbprint, session: &str) -> Event {
    Event::Connect { replica: "plane-0".to_owned(), session: session.to_owned(), key }
}

/// One after the other, a second apart from second 0 on; the last step's outcome.
fn after(events: Vec<Event>) -> Result<Step, Refusal> {
    let mut last = Step::silent(State::Absent);
    for (second, event) in events.into_iter().enumerate() {
        last = step(&last.state, event, at(i64::try_from(second).unwrap()), GRACE)?;
    }
    Ok(last)
}

#[test]
fn a_live_registration_belongs_to_its_key() {
    let refused = Err(Refusal::AnotherKey { known: KEYS[0], presented: KEYS[1] });
    for replay in [Replay::Forever, Replay::Until(at(9)), Replay::BoundToKey] {
        assert_eq!(after(vec![register(KEYS[0], replay, 0), register(KEYS[1], replay, 1)]), refused);
        assert_eq!(after(vec![register(KEYS[0], replay, 0), connect(KEYS[1], "s")]), refused);
        assert!(after(vec![register(KEYS[0], replay, 0), register(KEYS[0], replay, 1)]).is_ok());
    }
}

#[test]
fn the_memory_of_the_key_outlives_the_registration() {
    let ended = |replay| after(vec![register(KEYS[0], replay, 0), Event::Unregister { key: KEYS[0] }]).unwrap().state;
    let refused = Err(Refusal::AnotherKey { known: KEYS[0], presented: KEYS[1] });

    let forever = ended(Replay::Forever);
    assert_eq!(admits_key(&forever, KEYS[1], Replay::Forever, at(1_000_000_000)), refused);
    assert_eq!(admits_key(&forever, KEYS[0], Replay::Forever, at(2)), Ok(()));
    // Evidence that names the newcomer's key is no replay.
    assert_eq!(admits_key(&forever, KEYS[1], Replay::BoundToKey, at(2)), Ok(()));

    let until = ended(Replay::Until(at(50)));
    assert_eq!(admits_key(&until, KEYS[1], Replay::Until(at(99)), at(49)), refused);
    assert_eq!(admits_key(&until, KEYS[1], Replay::Until(at(99)), at(50)), Ok(()));

    let deleted = step(&forever, Event::Delete, at(5), GRACE).unwrap().state;
    assert_eq!(admits_key(&deleted, KEYS[1], Replay::Forever, at(6)), Ok(()));
}

#[test]
fn tokens_from_before_the_end_are_worthless() {
    let state = after(vec![register(KEYS[0], Replay::BoundToKey, 0), Event::Delete]).unwrap().state;
    for (issued, outcome) in [(0, Some(Refusal::TokenFromBefore)), (1, Some(Refusal::TokenFromBefore)), (2, None)] {
        let result = step(&state, register(KEYS[0], Replay::BoundToKey, issued), at(3), GRACE);
        assert_eq!(result.err(), outcome, "issued at {issued}");
    }
}

#[test]
fn the_same_registration_again_changes_nothing() {
    let first = after(vec![register(KEYS[0], Replay::Forever, 0)]).unwrap();
    assert_eq!(first.effects, [Effect::PublishEntry]);
    let again = step(&first.state, register(KEYS[0], Replay::Forever, 0), at(9), GRACE).unwrap();
    assert_eq!(again, Step { state: first.state, effects: Vec::new() });
}

#[test]
fn a_newer_session_takes_over_and_the_older_ones_end_is_no_news() {
    let taken =
        after(vec![register(KEYS[0], Replay::Forever, 0), connect(KEYS[0], "a"), connect(KEYS[0], "b")]).unwrap();
    assert_eq!(taken.effects, [Effect::EndSession { session: "a".to_owned(), reason: EndReason::Replaced }]);
    let late = Event::Disconnect { session: "a".to_owned(), reason: DisconnectReason::ConnectionLost };
    assert_eq!(step(&taken.state, late, at(9), GRACE).unwrap(), Step::unchanged(&taken.state));
}

#[test]
fn an_entry_stays_for_the_grace_period_and_no_longer() {
    let lost = after(vec![
        register(KEYS[0], Replay::Forever, 0),
        connect(KEYS[0], "a"),
        Event::Disconnect { session: "a".to_owned(), reason: DisconnectReason::ConnectionLost },
    ])
    .unwrap();
    assert_eq!(lost.effects, []);
    assert_eq!(step(&lost.state, Event::Tick, at(301), GRACE).unwrap(), Step::unchanged(&lost.state));
    let reaped = step(&lost.state, Event::Tick, at(302), GRACE).unwrap();
    assert_eq!(reaped.effects, [Effect::RetractEntry]);
    assert!(matches!(reaped.state, State::Ended(Ended { key: Some(_), .. })));
}

#[test]
fn a_token_that_is_not_renewed_ends_the_session_then_the_entry() {
    let connected = after(vec![register(KEYS[0], Replay::Forever, 0), connect(KEYS[0], "a")]).unwrap().state;
    let expired = step(&connected, Event::Tick, at(3600), GRACE).unwrap();
    assert_eq!(expired.effects, [Effect::EndSession { session: "a".to_owned(), reason: EndReason::TokenExpired }]);
    assert_eq!(step(&expired.state, Event::Tick, at(3900), GRACE).unwrap().effects, [Effect::RetractEntry]);

    let renew =
        Event::Renew { key: KEYS[0], attested: Box::new(attested(Replay::Forever)), token_expires_at: at(7200) };
    let renewed = step(&connected, renew, at(3000), GRACE).unwrap();
    assert_eq!(step(&renewed.state, Event::Tick, at(3600), GRACE).unwrap(), Step::unchanged(&renewed.state));
}

#[test]
fn withdrawing_ends_everything_and_keeps_the_key() {
    let withdrawn = after(vec![register(KEYS[0], Replay::Forever, 0), connect(KEYS[0], "a"), Event::Withdraw]).unwrap();
    assert_eq!(
        withdrawn.effects,
        [Effect::RetractEntry, Effect::EndSession { session: "a".to_owned(), reason: EndReason::Withdrawn }]
    );
    assert_eq!(step(&withdrawn.state, connect(KEYS[0], "b"), at(9), GRACE), Err(Refusal::Gone));
}

#[test]
fn the_end_is_forgotten_when_no_token_and_no_key_can_matter_any_more() {
    let end = |replay| after(vec![register(KEYS[0], replay, 0), Event::Unregister { key: KEYS[0] }]).unwrap().state;
    let life = i64::try_from(LONGEST_TOKEN_LIFE.as_secs()).unwrap();
    let tick = |state: &State, second| step(state, Event::Tick, at(second), GRACE).unwrap().state;
    assert_ne!(tick(&end(Replay::BoundToKey), life), State::Absent);
    assert_eq!(tick(&end(Replay::BoundToKey), life + 1), State::Absent);
    assert_ne!(tick(&end(Replay::Forever), 1000 * life), State::Absent);
}

// ---- generated histories ----

/// What a history has seen, told from its effects alone.
#[derive(Default)]
struct Mesh {
    entry: bool,
    sessions: std::collections::BTreeSet<String>,
}

fn entry_exactly_while_live(state: &State, mesh: &Mesh) {
    assert_eq!(mesh.entry, matches!(state, State::Live(_)));
}

fn never_an_entry_past_its_lease(state: &State, now: Timestamp) {
    if let State::Live(live) = state {
        assert!(live.lease_ends_at(GRACE) > now, "{live:?} at {now}");
    }
}

fn one_session_at_most_and_it_is_the_one_on_record(state: &State, mesh: &Mesh) {
    let on_record = match state {
        State::Live(live) => match &live.connection {
            Connection::Connected { session, .. } => Some(session),
            Connection::Disconnected { .. } => None,
        },
        _ => None,
    };
    assert!(mesh.sessions.iter().collect::<Vec<_>>().len() <= 1);
    assert_eq!(mesh.sessions.iter().next(), on_record);
}

fn never_two_keys_for_one_identity(before: &State, after: &State, event: &Event) {
    let key = |state: &State| match state {
        State::Live(live) => Some(live.key.thumbprint),
        State::Ended(ended) => ended.key.as_ref().map(|key| key.thumbprint),
        State::Absent => None,
    };
    if let (State::Live(old), State::Live(new)) = (before, after) {
        assert_eq!(old.key.thumbprint, new.key.thumbprint, "a live registration changed its key on {event:?}");
    }
    let may_forget = matches!(event, Event::Delete | Event::Tick | Event::Register(_));
    if key(before).is_some() && key(after) != key(before) {
        assert!(may_forget, "the key was forgotten on {event:?}");
    }
}

fn no_effect_without_a_change(before: &State, step: &Step, event: &Event) {
    if step.state == *before {
        assert_eq!(step.effects, [], "on {event:?}");
    }
}

fn any_event() -> impl Strategy<Value = Event> {
    let key = proptest::sample::select(&KEYS[..]);
    let replay = prop_oneof![
        Just(Replay::Forever),
        Just(Replay::BoundToKey),
        (0..4000i64).prop_map(|second| Replay::Until(at(second)))
    ];
    let session = proptest::sample::select(&["a", "b", "c"][..]);
    prop_oneof![
        4 => (key.clone(), replay.clone(), 0..6000i64).prop_map(|(key, replay, issued)| register(key, replay, issued)),
        4 => key.clone().prop_map(|key| connect(key, "new")),
        2 => session.prop_map(|session| Event::Disconnect {
            session: session.to_owned(),
            reason: DisconnectReason::ConnectionLost,
        }),
        2 => (key.clone(), replay, 0..9000i64).prop_map(|(key, replay, end)| Event::Renew {
            key,
            attested: Box::new(attested(replay)),
            token_expires_at: at(end),
        }),
        1 => any::<bool>().prop_map(|ready| Event::Health(Health { ready, message: String::new() })),
        1 => key.prop_map(|key| Event::Unregister { key }),
        1 => Just(Event::Withdraw),
        1 => Just(Event::Delete),
        3 => Just(Event::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn histories(events in proptest::collection::vec((any_event(), 0..400i64), 1..60)) {
        let (mut state, mut mesh, mut second) = (State::Absent, Mesh::default(), 0);
        for (number, (event, passed)) in events.into_iter().enumerate() {
            second += passed;
            let now = at(second);
            // The driver ticks at every deadline.
            for event in [Event::Tick, Event::Tick, numbered(event, number, &state)] {
                let before = state.clone();
                let Ok(step) = step(&state, event.clone(), now, GRACE) else { continue };
                no_effect_without_a_change(&before, &step, &event);
                never_two_keys_for_one_identity(&before, &step.state, &event);
                if let Event::Connect { session, .. } = &event {
                    mesh.sessions.insert(session.clone());
                }
                if let Event::Disconnect { session, .. } = &event {
                    mesh.sessions.remove(session);
                }
                for effect in &step.effects {
                    match effect {
                        Effect::PublishEntry => mesh.entry = true,
                        Effect::RetractEntry => mesh.entry = false,
                        Effect::EndSession { session, .. } => { mesh.sessions.remove(session); }
                    }
                }
                state = step.state;
                entry_exactly_while_live(&state, &mesh);
                one_session_at_most_and_it_is_the_one_on_record(&state, &mesh);
                if event == Event::Tick {
                    never_an_entry_past_its_lease(&state, now);
                }
            }
        }
    }
}

/// Sessions have names of their own, and mostly the one that ends is the one on record.
fn numbered(event: Event, number: usize, state: &State) -> Event {
    match event {
        Event::Connect { replica, key, .. } => Event::Connect { replica, key, session: format!("s{number}") },
        Event::Disconnect { session, reason } if session != "c" => match state {
            State::Live(live) => match &live.connection {
                Connection::Connected { session, .. } => Event::Disconnect { session: session.clone(), reason },
                Connection::Disconnected { .. } => Event::Disconnect { session, reason },
            },
            _ => Event::Disconnect { session, reason },
        },
        event => event,
    }
}
