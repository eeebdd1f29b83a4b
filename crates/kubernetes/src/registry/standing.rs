//! How far an agent is with its boot configuration, and the war's condition `UpToDate` that follows from it.
//!
//! The replica that holds the session knows ([`Standing`]); what it knew last is kept in the war (`status.lease`), so that a change of
//! the group is told against what the sidecar really runs with, by any replica and after a restart of all.

use super::groups::Boot;
use super::object::Condition;
use onboarding_core::group::WorkloadGroup;
use onboarding_core::name::RegistrationName;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(crate) const UP_TO_DATE: &str = "UpToDate";
/// A configuration that was sent is taken in within seconds: only what lasts longer is worth a write.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// Of what a sidecar says, in characters.
const LONGEST_MESSAGE: usize = 512;

/// Of an agent that has a session with this replica.
#[derive(Debug, Clone, PartialEq)]
pub enum Standing {
    /// Its sidecar runs with the newest boot configuration, which was made of this group.
    Applied(Arc<WorkloadGroup>),
    Behind(Behind),
}

/// Why an agent isn't where it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Behind {
    pub reason: BehindReason,
    /// For people, with the way out.
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum BehindReason {
    /// It was sent, and its sidecar hasn't said yet what it makes of it.
    NotApplied,
    /// It takes a new start of the sidecar, which waits for the next session.
    WaitsForRestart,
    /// The sidecar refused it.
    Refused,
    /// None can be made.
    NoBootConfiguration,
}

impl BehindReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotApplied => "NotApplied",
            Self::WaitsForRestart => "WaitsForRestart",
            Self::Refused => "Refused",
            Self::NoBootConfiguration => "NoBootConfiguration",
        }
    }

    /// Nothing that happens by itself ends it.
    fn needs_somebody(self) -> bool {
        matches!(self, Self::Refused | Self::NoBootConfiguration)
    }
}

/// Who is told: the registry, which shows it.
pub trait Standings: Send + Sync + 'static {
    /// `None`: nothing is known here any more, or not yet. Must not wait.
    fn stands(&self, name: &RegistrationName, standing: Option<Standing>);
}

/// What a war says of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BootState {
    /// What of the group the sidecar last said to run with (`status.lease.boot`).
    pub applied: Option<Boot>,
    /// `status.lease.behind`
    pub behind: Option<Behind>,
}

impl BootState {
    /// With what is known now.
    pub(crate) fn with(&self, standing: Option<Standing>) -> Self {
        match standing {
            None => self.clone(),
            Some(Standing::Applied(group)) => Self { applied: Some(Boot::of(&group)), behind: None },
            Some(Standing::Behind(mut behind)) => {
                behind.message = behind.message.chars().filter(|c| !c.is_control()).take(LONGEST_MESSAGE).collect();
                Self { applied: self.applied.clone(), behind: Some(behind) }
            }
        }
    }

    /// `now`: what the group asks for; `None` where it can't be read. No condition for one that has never been connected.
    pub(crate) fn condition(&self, now: Option<&Boot>, is_connected: bool) -> Option<Condition> {
        let of = |behind: &Behind| (behind.reason.as_str(), behind.message.clone());
        let urgent = self.behind.as_ref().filter(|behind| behind.reason.needs_somebody());
        let differences = self.applied.as_ref().zip(now).map(|(then, now)| then.differences(now)).unwrap_or_default();
        let problem = if let Some(behind) = urgent {
            Some(of(behind))
        } else if !differences.is_empty() {
            let message = format!(
                "the WorkloadGroup changed: {}; the sidecar takes that in when it starts anew",
                differences.join("; ")
            );
            Some(("GroupChanged", message))
        } else if let Some(behind) = &self.behind {
            Some(of(behind))
        } else if self.applied.is_some() {
            None
        } else if is_connected {
            Some((
                BehindReason::NotApplied.as_str(),
                "the sidecar has not come up with its boot configuration yet".to_owned(),
            ))
        } else {
            return None;
        };
        Some(Condition { kind: UP_TO_DATE, problem })
    }
}

/// What is known of the agents that have a session here.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<HashMap<RegistrationName, (Standing, Instant)>>);

impl Known {
    /// Whether that was news.
    pub(crate) fn put(&self, name: &RegistrationName, standing: Option<Standing>) -> bool {
        let mut known = self.lock();
        match standing {
            None => {
                known.remove(name);
                false
            }
            Some(standing) if known.get(name).is_some_and(|(held, _)| *held == standing) => false,
            Some(standing) => {
                known.insert(name.clone(), (standing, Instant::now()));
                true
            }
        }
    }

    /// What is worth showing; else after how long it is.
    pub(crate) fn settled(&self, name: &RegistrationName) -> (Option<Standing>, Option<Duration>) {
        match self.lock().get(name) {
            None => (None, None),
            Some((Standing::Behind(behind), since)) if !behind.reason.needs_somebody() => {
                match SETTLED_AFTER.checked_sub(since.elapsed()).filter(|left| !left.is_zero()) {
                    Some(left) => (None, Some(left)),
                    None => (Some(Standing::Behind(behind.clone())), None),
                }
            }
            Some((standing, _)) => (Some(standing.clone()), None),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RegistrationName, (Standing, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onboarding_core::name::GroupName;

    fn group(account: &str) -> Arc<WorkloadGroup> {
        Arc::new(WorkloadGroup {
            name: GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() },
            labels: [].into(),
            workload_labels: [].into(),
            workload_annotations: [].into(),
            service_account: account.to_owned(),
            network: None,
            locality: None,
            weight: None,
            ports: [].into(),
            address: None,
            probe: None,
        })
    }

    fn behind(reason: BehindReason) -> Option<Standing> {
        Some(Standing::Behind(Behind { reason, message: "why\n".to_owned() }))
    }

    /// The reason, or that all is well; `-`: no condition.
    fn said(state: &BootState, account: &str, is_connected: bool) -> String {
        match state.condition(Some(&Boot::of(&group(account))), is_connected) {
            None => "-".to_owned(),
            Some(Condition { problem: None, .. }) => "True".to_owned(),
            Some(Condition { problem: Some((reason, message)), .. }) => format!("{reason}: {message}"),
        }
    }

    #[test]
    fn it_is_up_to_date_when_its_sidecar_says_so() {
        let new = BootState::default();
        assert_eq!(said(&new, "a", false), "-");
        assert!(said(&new, "a", true).starts_with("NotApplied: "), "{}", said(&new, "a", true));
        let applied = new.with(Some(Standing::Applied(group("a"))));
        for connected in [true, false] {
            assert_eq!(said(&applied, "a", connected), "True");
            assert!(said(&applied, "b", connected).starts_with("GroupChanged: "), "{}", said(&applied, "b", true));
        }
        // What another replica knew stays.
        assert_eq!(applied.with(None), applied);
    }

    #[test]
    fn what_needs_somebody_is_said_before_what_waits() {
        let applied = BootState::default().with(Some(Standing::Applied(group("a"))));
        for (reason, with_change) in [
            (BehindReason::Refused, "Refused: why"),
            (BehindReason::NoBootConfiguration, "NoBootConfiguration: why"),
            (BehindReason::NotApplied, "GroupChanged: "),
            (BehindReason::WaitsForRestart, "GroupChanged: "),
        ] {
            let state = applied.with(behind(reason));
            assert_eq!(said(&state, "a", true), format!("{}: why", reason.as_str()));
            assert!(said(&state, "b", true).starts_with(with_change), "{}", said(&state, "b", true));
            assert_eq!(said(&state.with(Some(Standing::Applied(group("b")))), "b", true), "True");
            let kept: Behind = serde_json::from_value(serde_json::json!(state.behind)).unwrap();
            assert_eq!(Some(kept), state.behind);
        }
    }

    #[test]
    fn only_what_lasts_is_shown() {
        let (known, name) = (Known::default(), RegistrationName { namespace: "a".to_owned(), name: "b".to_owned() });
        assert!(known.put(&name, behind(BehindReason::NotApplied)));
        assert!(!known.put(&name, behind(BehindReason::NotApplied)), "no news");
        let (shown, again) = known.settled(&name);
        assert!(shown.is_none() && again.is_some_and(|left| left <= SETTLED_AFTER));
        assert!(known.put(&name, behind(BehindReason::Refused)));
        assert_eq!(known.settled(&name), (behind(BehindReason::Refused), None));
        assert!(!known.put(&name, None));
        assert_eq!(known.settled(&name), (None, None));
    }
}
