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

/// What a history has done, told from its events and effects alone.
#[derive(Default)]
struct Mesh {
    entry: bool,
    sessions: std::collections::BTreeSet<String>,
    /// Whose the identity is, and until when the evidence that this key came with could be replayed by another.
    holder: Option<(Thumbprint, Timestamp)>,
    newest_evidence: Option<Replay>,
    newest_token_ends: Timestamp,
    /// `None` while a session lasts.
    away_since: Option<Timestamp>,
    ended_at: Option<Timestamp>,
}

impl Mesh {
    /// An event that was admitted.
    fn saw(&mut self, event: &Event, effects: &[Effect], now: Timestamp) {
        match event {
            Event::Register(register) if self.entry => {
                let Register { key, attested, token_expires_at, .. } = &**register;
                if self.renewed(*key, attested.replay, *token_expires_at) && self.away_since.is_some() {
                    self.away_since = Some(now);
                }
            }
            Event::Register(register) => self.began(register, now),
            Event::Renew { key, attested, token_expires_at } => {
                self.renewed(*key, attested.replay, *token_expires_at);
            }
            Event::Connect { session, key, .. } => {
                self.is_held_by(*key);
                self.sessions.insert(session.clone());
                self.away_since = None;
            }
            Event::Disconnect { session, .. } => {
                if self.sessions.remove(session) {
                    self.away_since = Some(now);
                }
            }
            Event::Unregister { key } => self.is_held_by(*key),
            Event::Delete if self.entry || self.ended_at.is_some() => {
                self.holder = None;
                self.ended_at = Some(now);
            }
            Event::Delete | Event::Withdraw | Event::Health(_) | Event::Tick => (),
        }
        for effect in effects {
            match effect {
                Effect::PublishEntry => self.entry = true,
                Effect::RetractEntry => {
                    self.entry = false;
                    self.ended_at = Some(now);
                }
                Effect::EndSession { session, reason } => {
                    self.sessions.remove(session);
                    if *reason == EndReason::TokenExpired {
                        self.away_since = Some(self.newest_token_ends);
                    }
                }
            }
        }
    }

    /// Never two keys for one identity: another than the last one only where neither can be a replay of the other's evidence.
    fn began(&mut self, register: &Register, now: Timestamp) {
        let replay = register.attested.replay;
        if let Some((known, replayable_until)) = self.holder {
            let is_no_replay = replay == Replay::BoundToKey || replayable_until <= now;
            assert!(known == register.key || is_no_replay, "{:?} came for {known:?} at {now}", register.key);
        }
        if let Some(ended) = self.ended_at {
            assert!(register.token_issued_at.as_second() > ended.as_second(), "a token from before the end");
        }
        *self = Self {
            holder: Some((register.key, end_of(replay))),
            newest_evidence: Some(replay),
            newest_token_ends: register.token_expires_at,
            away_since: Some(now),
            ..Self::default()
        };
    }

    /// Whether it brought anything new.
    fn renewed(&mut self, key: Thumbprint, replay: Replay, token_ends: Timestamp) -> bool {
        self.is_held_by(key);
        let before = (self.newest_evidence, self.newest_token_ends);
        self.holder = self.holder.map(|(key, until)| (key, until.max(end_of(replay))));
        self.newest_evidence = Some(replay);
        self.newest_token_ends = self.newest_token_ends.max(token_ends);
        before != (self.newest_evidence, self.newest_token_ends)
    }

    fn is_held_by(&self, key: Thumbprint) {
        assert_eq!(self.holder.map(|(known, _)| known), Some(key), "another key was admitted to what lives");
    }
}

/// From when on evidence can't be replayed by another.
fn end_of(replay: Replay) -> Timestamp {
    match replay {
        Replay::BoundToKey => Timestamp::MIN,
        Replay::Until(end) => end,
        Replay::Forever => Timestamp::MAX,
    }
}

fn entry_exactly_while_live(state: &State, mesh: &Mesh) {
    assert_eq!(mesh.entry, matches!(state, State::Live(_)));
}

/// Of whom a session holds, as long as the newest token and the grace period; of others, the grace period.
fn never_an_entry_past_its_lease(mesh: &Mesh, now: Timestamp) {
    let ends = mesh.away_since.unwrap_or(mesh.newest_token_ends).checked_add(GRACE).unwrap();
    assert!(!mesh.entry || ends > now, "an entry at {now}, whose lease ended at {ends}");
}

fn one_session_at_most_and_it_is_the_one_on_record(state: &State, mesh: &Mesh) {
    let on_record = match state {
        State::Live(live) => match &live.connection {
            Connection::Connected { session, .. } => Some(session),
            Connection::Disconnected { .. } => None,
        },
        _ => None,
    };
    assert!(mesh.sessions.len() <= 1);
    assert_eq!(mesh.sessions.iter().next(), on_record);
}

fn the_key_on_record_is_the_holders(state: &State, mesh: &Mesh) {
    let on_record = match state {
        State::Live(live) => Some(live.key.thumbprint),
        State::Ended(ended) => ended.key.as_ref().map(|key| key.thumbprint),
        // Forgotten, which is asked about elsewhere.
        State::Absent => return,
    };
    assert_eq!(on_record, mesh.holder.map(|(key, _)| key));
}

/// For as long as a token or a replay of before it could come; then it is forgotten.
fn an_end_is_remembered_for_as_long_as_it_matters(state: &State, event: &Event, mesh: &Mesh, now: Timestamp) {
    let Some(ended) = mesh.ended_at else { return };
    let is_over =
        ended.checked_add(LONGEST_TOKEN_LIFE).unwrap() <= now && mesh.holder.is_none_or(|(_, until)| until <= now);
    match state {
        State::Absent => assert!(*event == Event::Tick && is_over, "{event:?} at {now} forgot what ended at {ended}"),
        State::Ended(_) => assert!(*event != Event::Tick || !is_over, "what ended at {ended} is still known at {now}"),
        State::Live(_) => panic!("it lives and has ended"),
    }
}

fn no_effect_without_a_change(before: &State, step: &Step, event: &Event) {
    if step.state == *before {
        assert_eq!(step.effects, [], "on {event:?}");
    }
}

/// Its times count from the moment when it happens.
fn any_event() -> impl Strategy<Value = Event> {
    let key = proptest::sample::select(&KEYS[..]);
    let replay = prop_oneof![
        Just(Replay::Forever),
        Just(Replay::BoundToKey),
        (-1000..4000i64).prop_map(|second| Replay::Until(at(second)))
    ];
    let session = proptest::sample::select(&["a", "b", "c"][..]);
    prop_oneof![
        4 => (key.clone(), replay.clone(), -2000..1000i64).prop_map(|(key, replay, issued)| register(key, replay, issued)),
        4 => key.clone().prop_map(|key| connect(key, "new")),
        2 => session.prop_map(|session| Event::Disconnect {
            session: session.to_owned(),
            reason: DisconnectReason::ConnectionLost,
        }),
        2 => (key.clone(), replay, -1000..6000i64).prop_map(|(key, replay, end)| Event::Renew {
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
    fn histories(events in proptest::collection::vec((any_event(), passing()), 1..60)) {
        let (mut state, mut mesh, mut second) = (State::Absent, Mesh::default(), 0);
        for (number, (event, passed)) in events.into_iter().enumerate() {
            second += passed;
            let now = at(second);
            // The driver ticks at every deadline.
            for event in [Event::Tick, Event::Tick, numbered(happening(event, second), number, &state)] {
                let before = state.clone();
                let Ok(step) = step(&state, event.clone(), now, GRACE) else { continue };
                no_effect_without_a_change(&before, &step, &event);
                mesh.saw(&event, &step.effects, now);
                state = step.state;
                entry_exactly_while_live(&state, &mesh);
                one_session_at_most_and_it_is_the_one_on_record(&state, &mesh);
                the_key_on_record_is_the_holders(&state, &mesh);
                an_end_is_remembered_for_as_long_as_it_matters(&state, &event, &mesh, now);
                if event == Event::Tick {
                    never_an_entry_past_its_lease(&mesh, now);
                }
                if state == State::Absent {
                    mesh = Mesh::default();
                }
            }
        }
    }
}

/// Seconds, and now and then weeks, in which ends are forgotten.
fn passing() -> impl Strategy<Value = i64> {
    let weeks = i64::try_from(LONGEST_TOKEN_LIFE.as_secs()).unwrap() / 4 * 5;
    prop_oneof![20 => 0..400i64, 1 => 0..weeks]
}

fn happening(event: Event, second: i64) -> Event {
    let later = |time: Timestamp| at(time.as_second() + second);
    let replayed = |attested: Attested| Attested {
        replay: match attested.replay {
            Replay::Until(end) => Replay::Until(later(end)),
            other => other,
        },
        ..attested
    };
    match event {
        Event::Register(register) => Event::Register(Box::new(Register {
            attested: replayed(register.attested),
            token_issued_at: later(register.token_issued_at),
            token_expires_at: later(register.token_expires_at),
            ..*register
        })),
        Event::Renew { key, attested, token_expires_at } => {
            Event::Renew { key, attested: Box::new(replayed(*attested)), token_expires_at: later(token_expires_at) }
        }
        event => event,
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
