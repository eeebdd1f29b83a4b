use super::*;
use proptest::prelude::*;

/// Every wait is one second, pushbacks as asked, and what was asked for is remembered.
#[derive(Default)]
struct Dice(Vec<Wait>);

impl Delays for Dice {
    fn delay(&mut self, wait: Wait) -> Duration {
        self.0.push(wait);
        match wait {
            Wait::Pushback(asked) => asked,
            Wait::AtOnce => Duration::ZERO,
            Wait::Next | Wait::First => Duration::from_secs(1),
        }
    }
}

const ID: &str = "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm";

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn token(from: i64, to: i64) -> Token {
    Token { registration: "bookinfo/ratings-x".to_owned(), issued_at: at(from), expires_at: at(to) }
}

fn certificate(from: i64, to: i64) -> Certificate {
    Certificate { spiffe_id: ID.to_owned(), obtained_at: at(from), expires_at: at(to) }
}

fn boot(version: &str) -> Boot {
    Boot { version: version.to_owned(), spiffe_id: ID.to_owned(), probed: true, signer: Signer::Plane }
}

/// Of an Istio mesh.
fn of_istio(version: &str, token_expires_at: i64) -> Boot {
    Boot { signer: Signer::Istiod { token_expires_at: at(token_expires_at) }, ..boot(version) }
}

struct Agent {
    state: State,
    dice: Dice,
}

impl Agent {
    fn fresh() -> Self {
        Self { state: State::new(at(0), None, None, None), dice: Dice::default() }
    }

    fn step(&mut self, second: i64, event: Event) -> Vec<Effect> {
        step(&mut self.state, event, at(second), &mut self.dice)
    }

    /// Connected at second 0, with a token until 3600 and a certificate until 86400.
    fn connected() -> Self {
        let mut agent = Self::fresh();
        agent.step(0, Event::Begin);
        agent.step(0, discovered());
        agent.step(0, Event::EvidenceReady);
        agent.step(0, Event::Authorized(token(0, 3600)));
        agent.step(0, Event::Registered);
        agent.step(0, Event::SessionOpened);
        agent.step(0, Event::BootReceived(boot("1")));
        agent.step(0, Event::CertificateIssued(certificate(0, 86_400)));
        agent.step(0, Event::SidecarLive);
        assert_eq!(agent.state.phase, Phase::Connected);
        assert_eq!(agent.state.sidecar, Sidecar::Live);
        agent
    }

    fn ended(&mut self, second: i64, reason: SessionEnd) -> Vec<Effect> {
        self.step(second, Event::SessionEnded { reason, message: "because".to_owned() })
    }
}

fn discovered() -> Event {
    Event::Discovered { clock_skew: SignedDuration::ZERO }
}

fn refused(call: Call, code: Code) -> Event {
    Event::Refused { call, code, why: "no".to_owned(), pushback: None }
}

fn lost() -> Event {
    Event::ConnectionLost { why: "gone".to_owned() }
}

#[test]
fn a_first_join_goes_through_every_phase() {
    let mut agent = Agent::fresh();
    assert_eq!(agent.step(0, Event::Begin), [Effect::Connect]);
    assert_eq!(agent.step(0, discovered()), [Effect::GatherEvidence]);
    assert_eq!(agent.step(0, Event::EvidenceReady), [Effect::Authorize]);
    assert_eq!(agent.step(0, Event::Authorized(token(0, 3600))), [Effect::Register { prove: false }]);
    assert_eq!(agent.step(0, Event::Registered), [Effect::OpenSession { complete: true }]);
    assert_eq!(
        agent.step(0, Event::SessionOpened),
        [Effect::RequestCertificate, unready("the sidecar has not come up yet")]
    );
    assert_eq!(agent.step(0, Event::BootReceived(boot("1"))), [Effect::WatchApplication]);
    assert_eq!(agent.step(0, Event::CertificateIssued(certificate(0, 86_400))), [Effect::StartSidecar]);
    assert_eq!(agent.step(1, Event::BootReceived(boot("2"))), [Effect::ApplyBoot, Effect::WatchApplication]);
}

fn unready(why: &str) -> Effect {
    Effect::ReportHealth(Health { ready: false, message: why.to_owned() })
}

fn ready() -> Effect {
    Effect::ReportHealth(Health { ready: true, message: String::new() })
}

#[test]
fn a_workload_is_ready_when_its_sidecar_and_its_application_are() {
    let mut agent = Agent::connected();
    let probed = |ready| Event::ProbeResult(Health { ready, message: if ready { "" } else { "503" }.to_owned() });
    assert_eq!(agent.step(1, probed(true)), [ready()]);
    assert_eq!(agent.step(2, probed(true)), []);
    assert_eq!(agent.step(3, probed(false)), [unready("503")]);
    assert_eq!(agent.step(4, probed(true)), [ready()]);
    let crashed = Event::SidecarNotLive { why: "it ended".to_owned() };
    assert_eq!(agent.step(5, crashed), [unready("the sidecar is not live: it ended")]);
    assert_eq!(agent.step(6, Event::SidecarLive), [ready()]);
    // A new session is told again: its plane may have forgotten.
    agent.step(7, lost());
    assert_eq!(agent.state.workload_health(), Health { ready: true, message: String::new() });

    let unasked = Boot { probed: false, ..boot("2") };
    let mut agent = Agent::connected();
    let effects = agent.step(1, Event::BootReceived(unasked));
    assert_eq!(effects, [Effect::ApplyBoot, Effect::WatchApplication, ready()]);
}

#[test]
fn what_the_disk_holds_starts_the_sidecar_before_the_plane_answers() {
    let state = State::new(at(0), Some(token(-100, 3500)), Some(certificate(-100, 3500)), Some(boot("1")));
    let mut agent = Agent { state, dice: Dice::default() };
    let effects = agent.step(0, Event::Begin);
    assert_eq!(effects, [Effect::StartSidecar, Effect::WatchApplication, Effect::Connect]);
    // The kept token first, with a proof on this connection.
    assert_eq!(agent.step(1, discovered()), [Effect::Register { prove: true }]);
    assert_eq!(agent.step(1, Event::Registered), [Effect::OpenSession { complete: false }]);
}

#[test]
fn in_an_istio_mesh_the_plane_signs_nothing() {
    let mut agent = Agent::fresh();
    for event in
        [Event::Begin, discovered(), Event::EvidenceReady, Event::Authorized(token(0, 3600)), Event::Registered]
    {
        agent.step(0, event);
    }
    // Nobody knows yet which mesh it is; the refusal is no failure.
    assert_eq!(agent.step(0, Event::SessionOpened)[0], Effect::RequestCertificate);
    agent.step(0, Event::CertificateRefused { why: "istiod signs".to_owned() });
    let effects = agent.step(0, Event::BootReceived(of_istio("1", 600)));
    assert_eq!(effects, [Effect::StartSidecar, Effect::WatchApplication]);
    assert_eq!(agent.state.last_error, None);
    assert_eq!(agent.step(1, Event::CertificateHeld(certificate(0, 100))), []);
    assert_eq!(agent.state.certificate, Some(certificate(0, 100)));
    // Neither at half of its life nor after it.
    assert_eq!(agent.step(50, Event::Tick), []);
    assert_eq!(agent.step(101, Event::Tick), []);
    // The same version with a new token is handed on.
    let effects = agent.step(102, Event::BootReceived(of_istio("1", 1200)));
    assert_eq!(effects, [Effect::ApplyBoot, Effect::WatchApplication]);
    agent.step(103, lost());
    let mut later = agent;
    for event in [Event::Tick, discovered(), Event::Registered] {
        later.step(200, event);
    }
    let effects = later.step(200, Event::SessionOpened);
    assert!(!effects.contains(&Effect::RequestCertificate), "{effects:?}");
}

#[test]
fn after_a_reboot_a_token_or_a_certificate_of_istiods_starts_the_sidecar() {
    let begin = |certificate, boot| {
        let mut agent = Agent { state: State::new(at(0), None, certificate, Some(boot)), dice: Dice::default() };
        agent.step(0, Event::Begin).contains(&Effect::StartSidecar)
    };
    assert!(begin(None, of_istio("1", 10)));
    assert!(begin(Some(certificate(-10, 10)), of_istio("1", 0)));
    assert!(!begin(Some(certificate(-10, 0)), of_istio("1", 0)));
    assert!(!begin(None, of_istio("1", 0)));
    // And a token that comes later does.
    let mut agent = Agent { state: State::new(at(0), None, None, Some(of_istio("1", 0))), dice: Dice::default() };
    for event in
        [Event::Begin, discovered(), Event::EvidenceReady, Event::Authorized(token(0, 3600)), Event::Registered]
    {
        agent.step(0, event);
    }
    assert!(!agent.step(0, Event::SessionOpened).contains(&Effect::RequestCertificate));
    let effects = agent.step(0, Event::BootReceived(of_istio("1", 600)));
    assert_eq!(effects, [Effect::StartSidecar, Effect::WatchApplication]);
}

#[test]
fn a_workload_that_moves_to_the_other_mesh_gets_the_other_certificate() {
    let mut agent = Agent::connected();
    assert_eq!(agent.step(1, Event::BootReceived(of_istio("2", 600)))[0], Effect::ApplyBoot);
    assert_eq!(agent.state.certificate, None);
    agent.step(2, Event::CertificateHeld(certificate(2, 100)));
    let effects = agent.step(3, Event::BootReceived(boot("3")));
    assert!(effects.contains(&Effect::ApplyBoot) && effects.contains(&Effect::RequestCertificate), "{effects:?}");
}

#[test]
fn an_expired_certificate_or_one_of_another_identity_starts_nothing() {
    let other = Certificate { spiffe_id: "spiffe://cluster.local/ns/x/sa/y".to_owned(), ..certificate(-100, 100) };
    for held in [certificate(-100, 0), other] {
        let state = State::new(at(0), None, Some(held), Some(boot("1")));
        let mut agent = Agent { state, dice: Dice::default() };
        assert_eq!(agent.step(0, Event::Begin), [Effect::Connect]);
    }
}

#[test]
fn a_kept_token_that_is_refused_is_replaced_on_the_same_connection() {
    for code in [Code::Unauthenticated, Code::PermissionDenied] {
        let mut agent = Agent { state: State::new(at(0), Some(token(-1, 999)), None, None), dice: Dice::default() };
        agent.step(0, Event::Begin);
        agent.step(0, discovered());
        assert_eq!(agent.step(0, refused(Call::Register, code)), [Effect::ForgetToken, Effect::Discover]);
        assert_eq!(agent.step(0, discovered()), [Effect::GatherEvidence]);
    }
    // A plane that is merely busy doesn't cost the token.
    let mut agent = Agent { state: State::new(at(0), Some(token(-1, 999)), None, None), dice: Dice::default() };
    agent.step(0, Event::Begin);
    agent.step(0, discovered());
    assert_eq!(agent.step(0, refused(Call::Register, Code::Other)), [Effect::Disconnect]);
    assert!(agent.state.token.is_some());
}

#[test]
fn an_expired_token_is_not_tried() {
    let mut agent = Agent { state: State::new(at(0), Some(token(-999, 5)), None, None), dice: Dice::default() };
    agent.step(0, Event::Begin);
    assert_eq!(agent.step(0, discovered()), [Effect::ForgetToken, Effect::GatherEvidence]);
}

#[test]
fn the_token_is_renewed_at_two_thirds_and_a_failure_costs_nothing() {
    let mut agent = Agent::connected();
    assert_eq!(agent.state.wakes_at(), Some(at(2400)));
    assert_eq!(agent.step(2399, Event::Tick), []);
    assert_eq!(agent.step(2400, Event::Tick), [Effect::RenewToken]);
    assert_eq!(agent.step(2401, refused(Call::Renew, Code::PermissionDenied)), []);
    assert_eq!(agent.state.phase, Phase::Connected);
    assert!(agent.state.token.is_some() && agent.state.sidecar == Sidecar::Live);
    assert_eq!(agent.step(2402, Event::Tick), [Effect::RenewToken]);
    assert_eq!(agent.step(2403, Event::EvidenceFailed { why: "x".to_owned() }), []);
    assert_eq!(agent.step(2404, Event::Tick), [Effect::RenewToken]);
    assert_eq!(agent.step(2405, Event::Authorized(token(2405, 6005))), [Effect::AnnounceToken]);
    assert_eq!(agent.state.wakes_at(), Some(at(4805)));
}

#[test]
fn the_certificate_is_renewed_at_half_of_its_life() {
    let mut agent = Agent::connected();
    agent.state.token = Some(token(0, 10_000_000));
    assert_eq!(agent.state.wakes_at(), Some(at(43_200)));
    assert_eq!(agent.step(43_200, Event::Tick), [Effect::RequestCertificate]);
    assert_eq!(agent.step(43_201, Event::CertificateRefused { why: "x".to_owned() }), []);
    assert_eq!(agent.step(43_202, Event::Tick), [Effect::RequestCertificate]);
    // No answer: asked once more.
    assert_eq!(agent.step(43_232, Event::Tick), [Effect::RequestCertificate]);
    let renewed = certificate(43_233, 129_633);
    assert_eq!(agent.step(43_233, Event::CertificateIssued(renewed)), [Effect::RotateCertificate]);
}

#[test]
fn a_new_identity_gets_a_new_certificate() {
    let mut agent = Agent::connected();
    let other = Boot {
        signer: Signer::Plane,
        version: "2".to_owned(),
        spiffe_id: "spiffe://cluster.local/ns/bookinfo/sa/other".to_owned(),
        probed: false,
    };
    assert_eq!(
        agent.step(1, Event::BootReceived(other)),
        [Effect::ApplyBoot, Effect::RequestCertificate, Effect::WatchApplication, ready()]
    );
}

#[test]
fn withdrawn_takes_the_sidecar_out_of_the_mesh_and_goes_on_trying() {
    let mut agent = Agent::connected();
    let effects = agent.ended(100, SessionEnd::Withdrawn);
    assert_eq!(effects, [Effect::StopSidecar, Effect::ForgetToken, Effect::ForgetBoot, Effect::Disconnect]);
    assert!(agent.state.boot.is_none() && agent.state.certificate.is_none());
    assert_eq!(agent.step(101, Event::Tick), [Effect::Connect]);
}

#[test]
fn other_ends_keep_the_sidecar() {
    for (reason, wait, token_kept) in [
        (SessionEnd::Replaced, Wait::First, true),
        (SessionEnd::PolicyUnreadable, Wait::First, true),
        (SessionEnd::Deleted, Wait::AtOnce, false),
        (SessionEnd::TokenExpired, Wait::AtOnce, false),
        (SessionEnd::Unregistered, Wait::First, false),
        (SessionEnd::PlaneStopping, Wait::AtOnce, true),
        (SessionEnd::Unspecified, Wait::First, true),
    ] {
        let mut agent = Agent::connected();
        let effects = agent.ended(100, reason);
        assert!(!effects.contains(&Effect::StopSidecar) && !effects.contains(&Effect::ForgetBoot), "{reason:?}");
        assert_eq!(agent.state.sidecar, Sidecar::Live, "{reason:?}");
        assert_eq!(agent.state.token.is_some(), token_kept, "{reason:?}");
        assert_eq!(agent.dice.0.last(), Some(&wait), "{reason:?}");
    }
    // A session that hardly lived is no reason to be back at once.
    let mut agent = Agent::connected();
    agent.ended(1, SessionEnd::PlaneStopping);
    assert_eq!(agent.dice.0.last(), Some(&Wait::Next));
}

#[test]
fn a_lost_connection_keeps_everything_and_the_waits_grow_from_the_first() {
    let mut agent = Agent::connected();
    assert_eq!(agent.step(100, lost()), [Effect::Disconnect]);
    assert_eq!(agent.dice.0.last(), Some(&Wait::First));
    assert_eq!(agent.step(101, Event::Tick), [Effect::Connect]);
    agent.step(102, lost());
    assert_eq!(agent.dice.0.last(), Some(&Wait::Next));
    assert!(agent.state.token.is_some() && agent.state.sidecar == Sidecar::Live);
}

#[test]
fn pushback_is_obeyed() {
    let mut agent = Agent::fresh();
    agent.step(0, Event::Begin);
    let pushback = Some(Duration::from_secs(42));
    let event = Event::Refused { call: Call::Discover, code: Code::Other, why: "busy".to_owned(), pushback };
    agent.step(0, event);
    assert_eq!(agent.state.phase, Phase::WaitingToRetry { until: at(42), why: "busy".to_owned() });
    assert_eq!(agent.step(41, Event::Tick), []);
    assert_eq!(agent.step(42, Event::Tick), [Effect::Connect]);
}

#[test]
fn a_difference_to_another_base_asks_for_all_of_it() {
    let mut agent = Agent::connected();
    let unusable = Event::BootUnusable { why: "x".to_owned(), complete: true };
    assert_eq!(agent.step(1, unusable), [Effect::OpenSession { complete: true }]);
    assert_eq!(agent.step(1, Event::SessionOpened), [unready("the application was not probed yet")]);
    assert_eq!(agent.state.sidecar, Sidecar::Live);
}

#[test]
fn who_is_not_admitted_any_more_leaves_the_mesh_after_the_grace_period() {
    let mut agent = Agent::connected();
    agent.ended(100, SessionEnd::PolicyUnreadable);
    let mut second = 101;
    let mut left = None;
    while second < 1000 && left.is_none() {
        let mut effects = agent.step(second, Event::Tick);
        if effects.contains(&Effect::Connect) {
            effects.extend(agent.step(second, discovered()));
            if agent.state.token.is_some() {
                effects.extend(agent.step(second, refused(Call::Register, Code::PermissionDenied)));
                effects.extend(agent.step(second, discovered()));
            }
            effects.extend(agent.step(second, Event::EvidenceReady));
            effects.extend(agent.step(second, refused(Call::Authorize, Code::PermissionDenied)));
        }
        if effects.contains(&Effect::StopSidecar) {
            left = Some(second);
        }
        second += 1;
    }
    let left = left.expect("the sidecar never stopped");
    assert!((400..=403).contains(&left), "{left}");
    assert!(agent.state.boot.is_none());
}

#[test]
fn who_was_deleted_and_is_not_admitted_again_leaves_the_mesh_at_once() {
    let mut agent = Agent::connected();
    assert_eq!(agent.ended(100, SessionEnd::Deleted), [Effect::ForgetToken, Effect::Disconnect]);
    assert_eq!(agent.step(100, Event::Tick), [Effect::Connect]);
    // A plane that is away says nothing.
    assert_eq!(agent.step(100, refused(Call::Discover, Code::Other)), [Effect::Disconnect]);
    let mut refused_at = |second| {
        assert_eq!(agent.step(second, Event::Tick), [Effect::Connect]);
        agent.step(second, discovered());
        agent.step(second, Event::EvidenceReady);
        agent.step(second, refused(Call::Authorize, Code::PermissionDenied))
    };
    assert_eq!(refused_at(110), [Effect::StopSidecar, Effect::ForgetBoot, Effect::Disconnect]);
    // Once; from there on as anybody who comes.
    assert_eq!(refused_at(120), [Effect::Disconnect]);
    assert!(agent.state.boot.is_none());
}

#[test]
fn a_stop_says_goodbye_waits_drains_and_ends() {
    let mut agent = Agent::connected();
    assert_eq!(agent.step(10, Event::StopRequested), [Effect::Unregister]);
    let unregistered = Event::Unregistered { propagation_delay: Some(Duration::from_secs(7)) };
    assert_eq!(agent.step(11, unregistered), [Effect::ForgetToken]);
    assert_eq!(agent.ended(11, SessionEnd::Unregistered), []);
    assert_eq!(agent.step(17, Event::Tick), []);
    assert_eq!(agent.step(18, Event::Tick), [Effect::Disconnect, Effect::StopSidecar]);
    assert_eq!(agent.step(20, Event::SidecarGone), []);
    assert_eq!(agent.state.phase, Phase::Stopped);
    assert!(agent.state.boot.is_some(), "for the next start");
}

#[test]
fn the_unit_waits_for_the_longest_goodbye() {
    let unit = include_str!("../../../packaging/onboarding-agent/onboarding-agent.service");
    let within = unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec=")?.strip_suffix('s')).unwrap();
    let within = SignedDuration::from_secs(within.parse().unwrap());
    let longest = UNREGISTER_WITHIN + LONGEST_PROPAGATION + SIDECAR_WITHIN;
    assert!(within > longest, "systemd kills after {within}, a goodbye takes up to {longest}");
    // ECS kills a container after this, where the task definition says nothing else.
    assert!(longest < SignedDuration::from_secs(30), "{longest}");
}

#[test]
fn a_stop_without_the_plane_is_orderly_too() {
    let mut agent = Agent::connected();
    agent.step(100, lost());
    assert_eq!(agent.step(100, Event::StopRequested), [Effect::Unregister]);
    let effects = agent.step(104, Event::Unregistered { propagation_delay: None });
    assert_eq!(effects, [Effect::Disconnect, Effect::StopSidecar]);
    // And where nothing at all answers.
    let mut agent = Agent::connected();
    agent.step(0, Event::StopRequested);
    let mut stopped = None;
    for second in 0..40 {
        agent.step(second, Event::Tick);
        if agent.state.phase == Phase::Stopped {
            stopped.get_or_insert(second);
        }
    }
    assert!(stopped.is_some_and(|second| second < 30), "{stopped:?}");
    // With nothing to take down it ends at once.
    let mut agent = Agent::fresh();
    agent.step(0, Event::Begin);
    agent.step(0, Event::StopRequested);
    assert_eq!(agent.state.phase, Phase::Stopped);
}

#[test]
fn a_skewed_clock_is_remembered_and_an_exact_one_is_not() {
    for (seconds, warned) in [(0, false), (60, false), (61, true), (-61, true)] {
        let mut agent = Agent::fresh();
        agent.step(0, Event::Begin);
        agent.step(0, Event::Discovered { clock_skew: SignedDuration::from_secs(seconds) });
        assert_eq!(agent.state.clock_skew.is_some(), warned, "{seconds}");
    }
}

// ---- generated histories ----

/// What happens next, chosen without a look at the state: most of it makes no sense there, which is the point.
fn any_event(now: i64) -> impl Strategy<Value = Event> {
    let calls = prop_oneof![
        Just(Call::Discover),
        Just(Call::Authorize),
        Just(Call::Register),
        Just(Call::Session),
        Just(Call::Renew)
    ];
    let codes = prop_oneof![Just(Code::Unauthenticated), Just(Code::PermissionDenied), Just(Code::Other)];
    let ends = prop_oneof![
        Just(SessionEnd::Replaced),
        Just(SessionEnd::Withdrawn),
        Just(SessionEnd::PolicyUnreadable),
        Just(SessionEnd::Deleted),
        Just(SessionEnd::Unregistered),
        Just(SessionEnd::TokenExpired),
        Just(SessionEnd::PlaneStopping),
        Just(SessionEnd::Unspecified)
    ];
    prop_oneof![
        8 => Just(discovered()),
        8 => Just(Event::EvidenceReady),
        1 => Just(Event::EvidenceFailed { why: "x".to_owned() }),
        8 => (1..7200i64).prop_map(move |life| Event::Authorized(token(now, now + life))),
        3 => (calls, codes, proptest::option::of(0..100u64)).prop_map(|(call, code, pushback)| Event::Refused {
            call,
            code,
            why: "no".to_owned(),
            pushback: pushback.map(Duration::from_secs),
        }),
        8 => Just(Event::Registered),
        8 => Just(Event::SessionOpened),
        6 => any::<u8>().prop_map(|version| Event::BootReceived(boot(&version.to_string()))),
        1 => any::<bool>().prop_map(|complete| Event::BootUnusable { why: "x".to_owned(), complete }),
        3 => (1..90_000i64).prop_map(move |life| Event::BootReceived(of_istio("istio", now + life))),
        3 => (1..90_000i64).prop_map(move |life| Event::CertificateHeld(certificate(now, now + life))),
        6 => (1..90_000i64).prop_map(move |life| Event::CertificateIssued(certificate(now, now + life))),
        1 => Just(Event::CertificateRefused { why: "x".to_owned() }),
        2 => ends.prop_map(|reason| Event::SessionEnded { reason, message: "x".to_owned() }),
        1 => Just(lost()),
        2 => Just(Event::SidecarLive),
        1 => Just(Event::SidecarNotLive { why: "x".to_owned() }),
        1 => Just(Event::SidecarGone),
        1 => any::<bool>().prop_map(|ready| Event::ProbeResult(Health { ready, message: String::new() })),
        1 => Just(Event::Unregistered { propagation_delay: Some(Duration::from_secs(600)) }),
        12 => Just(Event::Tick),
    ]
}

/// Effects that use a token have one that is known.
fn a_token_is_used_only_where_there_is_one(state: &State, effects: &[Effect]) {
    let uses = effects.iter().any(|effect| {
        matches!(
            effect,
            Effect::Register { .. } | Effect::OpenSession { .. } | Effect::AnnounceToken | Effect::Unregister
        )
    });
    assert!(!uses || state.token.is_some(), "{effects:?} in {state:?}");
}

/// A sidecar is started only with a configuration and a certificate that peers accept, or what it gets one with.
fn a_sidecar_starts_only_with_what_it_needs(state: &State, now: Timestamp, effects: &[Effect]) {
    assert!(!effects.contains(&Effect::StartSidecar) || state.sidecar_can_start(now), "{state:?}");
}

/// The plane isn't asked for a certificate that istiod signs.
fn asks_who_signs(state: &State, effects: &[Effect]) {
    let istiods = matches!(&state.boot, Some(Boot { signer: Signer::Istiod { .. }, .. }));
    assert!(!istiods || !effects.contains(&Effect::RequestCertificate), "{state:?}");
}

/// Nothing but a withdrawn admission and the agent's own end takes a sidecar down.
fn only_withdrawal_and_the_end_stop_the_sidecar(before: &State, event: &Event, effects: &[Effect]) {
    if effects.contains(&Effect::StopSidecar) {
        let leaving = matches!(before.phase, Phase::Draining(_)) || *event == Event::StopRequested;
        let withdrawn = matches!(event, Event::SessionEnded { reason: SessionEnd::Withdrawn, .. });
        let not_admitted = *event == Event::Tick && before.not_admitted_since.is_some();
        let refused = matches!(event, Event::Refused { code: Code::PermissionDenied, .. }) && before.deleted;
        assert!(leaving || withdrawn || not_admitted || refused, "{event:?} in {before:?}");
        assert_ne!(before.sidecar, Sidecar::Absent);
    }
}

/// Whoever was sent out holds nothing to come back with.
fn a_withdrawn_workload_holds_nothing(before: &State, event: &Event, after: &State) {
    if before.phase == Phase::Connected && matches!(event, Event::SessionEnded { reason: SessionEnd::Withdrawn, .. }) {
        assert_eq!(after.sidecar, Sidecar::Absent);
        assert!(after.boot.is_none() && after.certificate.is_none() && after.token.is_none());
    }
}

/// There is always a next moment, and in it something can happen: no state is a dead end.
fn it_always_wakes(state: &State) {
    assert_eq!(state.wakes_at().is_none(), state.phase == Phase::Stopped, "{state:?}");
}

/// A tick that is due changes something: otherwise the driver would spin.
fn a_due_tick_makes_progress(state: &State, now: Timestamp) {
    if let Some(due) = state.wakes_at().filter(|due| *due <= now) {
        let mut next = state.clone();
        step(&mut next, Event::Tick, now, &mut Dice::default());
        assert!(next.wakes_at().is_none_or(|at| at > due) || next != *state, "{state:?}");
    }
}

/// One connection at a time: a new one only after the last was given up.
fn connects_only_from_rest(before: &State, event: &Event, effects: &[Effect]) {
    if effects.contains(&Effect::Connect) {
        let rested = matches!(before.phase, Phase::WaitingToRetry { .. }) || *event == Event::Begin;
        assert!(rested, "{event:?} in {before:?}");
    }
}

fn stopped_is_the_end(before: &State, after: &State, effects: &[Effect]) {
    if before.phase == Phase::Stopped {
        assert!(before == after && effects.is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn generated_histories_keep_the_invariants(
        history in proptest::collection::vec((0..400i64, any::<prop::sample::Index>()), 1..120),
        seeds in proptest::collection::vec(any_event(0), 60),
        stop_at in 0..200usize,
    ) {
        let mut agent = Agent::fresh();
        let mut now = 0;
        let mut stop_asked = None;
        let mut events = vec![(0, Event::Begin)];
        events.extend(history.iter().map(|(pause, index)| (*pause, index.get(&seeds).clone())));
        for (index, (pause, event)) in events.into_iter().enumerate() {
            now += pause;
            // A goodbye is a matter of seconds: its driver wakes at each of its moments.
            while let Some(due) = agent.state.wakes_at().filter(|due| stop_asked.is_some() && *due <= at(now)) {
                agent.step(due.duration_since(at(0)).as_secs(), Event::Tick);
            }
            // Lives count from when they are given.
            let event = match event {
                Event::Authorized(t) => {
                    let life = t.expires_at.duration_since(t.issued_at).as_secs();
                    Event::Authorized(token(now, now + life))
                }
                Event::CertificateIssued(c) => {
                    let life = c.expires_at.duration_since(c.obtained_at).as_secs();
                    Event::CertificateIssued(certificate(now, now + life))
                }
                other => other,
            };
            let event = if index == stop_at && index > 0 { Event::StopRequested } else { event };
            if event == Event::StopRequested {
                stop_asked.get_or_insert(now);
            }
            let before = agent.state.clone();
            let effects = agent.step(now, event.clone());
            let after = &agent.state;
            a_token_is_used_only_where_there_is_one(after, &effects);
            a_sidecar_starts_only_with_what_it_needs(after, at(now), &effects);
            asks_who_signs(after, &effects);
            only_withdrawal_and_the_end_stop_the_sidecar(&before, &event, &effects);
            a_withdrawn_workload_holds_nothing(&before, &event, after);
            it_always_wakes(after);
            a_due_tick_makes_progress(after, at(now));
            connects_only_from_rest(&before, &event, &effects);
            stopped_is_the_end(&before, after, &effects);
        }
        // Whatever happened: asked to stop, it has stopped within 30 s, even if nothing answers.
        let asked = *stop_asked.get_or_insert_with(|| {
            agent.step(now, Event::StopRequested);
            now
        });
        for second in now..=(now.max(asked + 30)) {
            agent.step(second, Event::Tick);
        }
        prop_assert_eq!(&agent.state.phase, &Phase::Stopped);
    }

    /// With a plane that answers, every history ends connected.
    #[test]
    fn a_plane_that_answers_is_enough(
        history in proptest::collection::vec((0..400i64, any_event(0)), 0..60),
    ) {
        let mut agent = Agent::fresh();
        agent.step(0, Event::Begin);
        let mut now = 0;
        for (pause, event) in history {
            now += pause;
            agent.step(now, event);
        }
        for _ in 0..2000 {
            if agent.state.phase == Phase::Connected { break; }
            now += 1;
            let effects = agent.step(now, Event::Tick);
            let mut queue: std::collections::VecDeque<Effect> = effects.into();
            while let Some(effect) = queue.pop_front() {
                let answer = match effect {
                    Effect::Connect | Effect::Discover => discovered(),
                    Effect::GatherEvidence => Event::EvidenceReady,
                    Effect::Authorize => Event::Authorized(token(now, now + 3600)),
                    Effect::Register { .. } => Event::Registered,
                    Effect::OpenSession { .. } => Event::SessionOpened,
                    _ => continue,
                };
                queue.extend(agent.step(now, answer));
            }
        }
        prop_assert_eq!(&agent.state.phase, &Phase::Connected);
    }
}
