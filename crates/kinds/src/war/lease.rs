//! What decides about a registration, in the words in which every registry stores it.

use jiff::Timestamp;
use onboarding_core::identity::Replay;
use onboarding_core::registration::DisconnectReason;

/// `bound-to-key`, `forever`, or the time until which.
pub fn replay(replay: Replay) -> String {
    match replay {
        Replay::BoundToKey => "bound-to-key".to_owned(),
        Replay::Forever => "forever".to_owned(),
        Replay::Until(end) => end.to_string(),
    }
}

pub fn parse_replay(text: &str) -> Result<Replay, String> {
    match text {
        "bound-to-key" => Ok(Replay::BoundToKey),
        "forever" => Ok(Replay::Forever),
        end => end.parse().map(Replay::Until).map_err(|error| format!("replay {end:?}: {error}")),
    }
}

pub const REASONS: [(DisconnectReason, &str); 5] = [
    (DisconnectReason::NotYetConnected, "not-yet-connected"),
    (DisconnectReason::ConnectionLost, "connection-lost"),
    (DisconnectReason::TokenExpired, "token-expired"),
    (DisconnectReason::PolicyUnreadable, "policy-unreadable"),
    (DisconnectReason::PlaneRestarted, "plane-restarted"),
];

/// The exact reason; a condition's reason is for people.
pub fn reason_name(reason: DisconnectReason) -> &'static str {
    match reason {
        DisconnectReason::NotYetConnected => "not-yet-connected",
        DisconnectReason::ConnectionLost => "connection-lost",
        DisconnectReason::TokenExpired => "token-expired",
        DisconnectReason::PolicyUnreadable => "policy-unreadable",
        DisconnectReason::PlaneRestarted => "plane-restarted",
    }
}

pub fn parse_reason(text: &str) -> Result<DisconnectReason, String> {
    let known = REASONS.iter().find(|(_, name)| *name == text);
    known.map(|(reason, _)| *reason).ok_or_else(|| format!("disconnect_reason {text:?} is unknown"))
}

/// RFC 3339; `field` is named where it isn't.
pub fn parse_time(field: &str, text: &str) -> Result<Timestamp, String> {
    text.parse().map_err(|error| format!("{field}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_name() {
        for (reason, name) in REASONS {
            assert_eq!(reason_name(reason), name);
            assert_eq!(parse_reason(name).unwrap(), reason);
        }
        assert!(parse_reason("ConnectionLost").unwrap_err().contains("unknown"));
    }

    #[test]
    fn every_replay_comes_back() {
        let end = Timestamp::new(1_790_000_000, 5).unwrap();
        for value in [Replay::BoundToKey, Replay::Forever, Replay::Until(end)] {
            assert_eq!(parse_replay(&replay(value)).unwrap(), value);
        }
        assert!(parse_replay("never").unwrap_err().contains("replay \"never\""));
    }
}
