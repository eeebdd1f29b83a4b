//! What is said of a ControlPlane in its `status.conditions`. Pure.

use jiff::Timestamp;
use serde_json::{Value, json};

/// Everything is there and works.
pub const READY: &str = "Ready";
/// The ControlPlane can be read, and is the only one that enables onboarding.
pub const VALID: &str = "Valid";
/// The endpoint's Secret has a certificate that agents accept.
pub const CERTIFICATE: &str = "EndpointCertificate";
/// There is an istiod that sidecars can reach.
pub const ISTIO: &str = "IstiodFound";
/// All objects are in the cluster as they should be.
pub const APPLIED: &str = "ObjectsApplied";
/// Pods run.
pub const AVAILABLE: &str = "DeploymentsAvailable";
/// In the order in which they are written; `READY` sums the others up.
const ALL: [&str; 6] = [READY, VALID, CERTIFICATE, ISTIO, APPLIED, AVAILABLE];
const LONGEST_MESSAGE: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    pub kind: &'static str,
    pub holds: bool,
    /// For programs.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

impl Condition {
    pub fn holds(kind: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind, holds: true, reason, message: message.into() }
    }
    pub fn fails(kind: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { kind, holds: false, reason, message: message.into() }
    }
}

/// The sum: what fails, in the order of `conditions`.
pub fn ready(conditions: &[Condition]) -> Condition {
    let failing: Vec<&Condition> = conditions.iter().filter(|condition| !condition.holds).collect();
    match failing.first() {
        None => Condition::holds(READY, "Ready", "workloads can be onboarded"),
        Some(first) => {
            let words: Vec<&str> = failing.iter().map(|condition| condition.message.as_str()).collect();
            Condition::fails(READY, first.reason, words.join("; "))
        }
    }
}

/// The `status` to apply, or `None` where the present one says so already. `conditions` empty: nothing is said any more.
/// Conditions of other types are of others, and stay.
pub fn status(present: &Value, generation: i64, conditions: &[Condition], now: Timestamp) -> Option<Value> {
    let none = Vec::new();
    let there = present["conditions"].as_array().unwrap_or(&none);
    let find = |kind: &str| there.iter().find(|condition| condition["type"] == kind);
    let mut sorted: Vec<&Condition> = conditions.iter().collect();
    sorted.sort_by_key(|condition| ALL.iter().position(|kind| *kind == condition.kind));
    let wanted: Vec<Value> = sorted
        .into_iter()
        .map(|condition| {
            let status = if condition.holds { "True" } else { "False" };
            let before = find(condition.kind).filter(|before| before["status"] == status);
            let since = before.and_then(|before| before["lastTransitionTime"].as_str());
            json!({
                "type": condition.kind,
                "status": status,
                "reason": condition.reason,
                "message": shortened(&condition.message),
                "lastTransitionTime": since.map_or_else(|| format!("{now:.0}"), str::to_owned),
                "observedGeneration": generation,
            })
        })
        .collect();
    let same = ALL.iter().all(|kind| find(kind) == wanted.iter().find(|condition| condition["type"] == *kind));
    if same && (wanted.is_empty() || present["observedGeneration"] == generation) {
        return None;
    }
    // Also without conditions there is something in it: of an empty one an API server makes null, and refuses that.
    let mut status = json!({"observedGeneration": generation});
    if !wanted.is_empty() {
        status["conditions"] = wanted.into();
    }
    Some(status)
}

fn shortened(message: &str) -> String {
    match message.char_indices().nth(LONGEST_MESSAGE) {
        Some((end, _)) => format!("{}...", &message[..end]),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn what_fails_is_summed_up() {
        let absent = Condition::fails(CERTIFICATE, "SecretAbsent", "there is no Secret");
        let istio = Condition::fails(ISTIO, "NoIstiod", "there is no istiod");
        let valid = Condition::holds(VALID, "Valid", "it can be read");
        let sum = ready(&[valid.clone(), absent, istio]);
        assert_eq!((sum.holds, sum.reason), (false, "SecretAbsent"));
        assert_eq!(sum.message, "there is no Secret; there is no istiod");
        assert!(ready(&[valid]).holds);
    }

    #[test]
    fn it_is_written_only_when_it_changed() {
        let absent = [Condition::fails(CERTIFICATE, "SecretAbsent", "no Secret")];
        let first = status(&Value::Null, 1, &absent, at(0)).unwrap();
        assert_eq!(
            first,
            json!({"observedGeneration": 1, "conditions": [{
                "type": "EndpointCertificate", "status": "False", "reason": "SecretAbsent", "message": "no Secret",
                "lastTransitionTime": "1970-01-01T00:00:00Z", "observedGeneration": 1,
            }]})
        );
        assert_eq!(status(&first, 1, &absent, at(9)), None);
        // Another reason isn't a transition; another status is.
        let expired = [Condition::fails(CERTIFICATE, "CertificateExpired", "too old")];
        let second = status(&first, 1, &expired, at(9)).unwrap();
        assert_eq!(second["conditions"][0]["lastTransitionTime"], "1970-01-01T00:00:00Z");
        let good = [Condition::holds(CERTIFICATE, "Valid", "until later")];
        let third = status(&second, 2, &good, at(9)).unwrap();
        assert_eq!(third["conditions"][0]["lastTransitionTime"], "1970-01-01T00:00:09Z");
    }

    #[test]
    fn conditions_of_others_are_not_ours() {
        let others = json!({"conditions": [{"type": "Installed", "status": "True"}], "phase": "x"});
        assert_eq!(status(&others, 1, &[], at(0)), None);
        let mixed =
            json!({"conditions": [{"type": "Installed", "status": "True"}, {"type": "Ready", "status": "True"}]});
        assert_eq!(status(&mixed, 1, &[], at(0)), Some(json!({"observedGeneration": 1})));
    }
}
