use super::*;
use crate::machine::{Leaving, Token};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn status(change: impl FnOnce(&mut State)) -> Status {
    let mut state = State::new(at(0), None, None, None);
    change(&mut state);
    let about = About {
        endpoint: "onboarding.example:15443".to_owned(),
        workload_group: "bookinfo/ratings".to_owned(),
        ..About::default()
    };
    Status::of(&state, None, &about)
}

fn refused(state: &mut State) {
    let why = "Not authorized by OnboardingPolicy".to_owned();
    state.phase = Phase::WaitingToRetry { until: at(90), why: why.clone() };
    state.last_error = Some(why);
}

fn connected(state: &mut State) {
    state.phase = Phase::Connected;
    state.token = Some(Token { registration: "bookinfo/ratings-x".to_owned(), issued_at: at(0), expires_at: at(3600) });
    state.sidecar = Sidecar::Live;
}

#[test]
fn the_service_manager_is_told_phase_and_sidecar_in_one_line() {
    assert_eq!(status(|_| {}).line(), "Starting (bookinfo/ratings); no sidecar");
    assert_eq!(status(connected).line(), "Connected as bookinfo/ratings-x; sidecar live");
    assert_eq!(status(refused).line(), "Waiting to try again: Not authorized by OnboardingPolicy; no sidecar");
    for (sidecar, words) in [
        (Sidecar::Starting, "sidecar starting"),
        (Sidecar::NotLive { why: "it is 503".to_owned() }, "sidecar not live"),
    ] {
        let leaving = status(|state| {
            state.phase = Phase::Draining(Leaving::Sidecar { until: at(9) });
            state.sidecar = sidecar;
        });
        assert_eq!(leaving.line(), format!("Leaving the mesh; {words}"));
    }
    // Whatever an error says, it is one line, and not an endless one.
    let long = status(|state| {
        refused(state);
        state.last_error = Some(format!("first\nsecond\u{7}{}", "\u{e9}".repeat(1000)));
    });
    let line = long.line();
    assert!(line.starts_with("Waiting to try again: first second \u{e9}"), "{line}");
    assert_eq!((line.chars().count(), line.chars().any(char::is_control)), (400, false));
}

#[test]
fn people_are_told_why_and_when_it_is_tried_again() {
    let text = status(refused).describe(at(60));
    for line in [
        &format!("Agent        WaitingToRetry (pid {}, 60 s ago)", std::process::id()),
        "Why          Not authorized by OnboardingPolicy",
        "Next try     in 30 s",
        "Endpoint     onboarding.example:15443",
        "Group        bookinfo/ratings",
        "Registration none",
        "Sidecar      Absent",
    ] {
        assert!(text.lines().any(|said| said == line), "{line:?} isn't in\n{text}");
    }
    // It is due, and the clock is past it.
    assert!(status(refused).describe(at(91)).contains("\nNext try     in 0 s\n"));
    // Nothing to say once there is a session.
    let text = status(connected).describe(at(60));
    assert!(text.contains("Registration bookinfo/ratings-x") && !text.contains("Why") && !text.contains("Next try"));
}
