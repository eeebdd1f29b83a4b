//! The Leases as this replica saw them change. Pure.

use super::{LASTS, LEADER};
use kube::ResourceExt;
use kube::api::DynamicObject;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Longer than between two signs of life (this replica's own renewals are some): meanwhile nothing was seen of anybody.
const GAP: Duration = Duration::from_secs(8);
const LONGEST: Duration = Duration::from_secs(300);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Observed {
    pub name: String,
    pub version: String,
    /// Empty: nobody.
    pub holder: String,
    pub lasts: Duration,
}

impl Observed {
    /// `None` for one without a name.
    pub(super) fn of(object: &DynamicObject) -> Option<Self> {
        let spec = object.data.get("spec");
        let text = |key: &str| spec?.get(key)?.as_str();
        let seconds = spec.and_then(|spec| spec.get("leaseDurationSeconds")?.as_u64());
        Some(Self {
            name: object.metadata.name.clone()?,
            version: object.resource_version()?,
            holder: text("holderIdentity").unwrap_or_default().to_owned(),
            lasts: seconds.map_or(LASTS, Duration::from_secs).min(LONGEST),
        })
    }
}

/// The leader's Lease may be had: by creating it, or by replacing this version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Free {
    pub version: Option<String>,
}

#[derive(Debug)]
pub(super) struct Seen {
    leases: BTreeMap<String, (Observed, Instant)>,
    /// The last sign of life of the API server; `None`: nothing was listed yet.
    heard: Option<Instant>,
}

impl Seen {
    pub(super) fn new() -> Self {
        Self { leases: BTreeMap::new(), heard: None }
    }

    pub(super) fn listed(&mut self, at: Instant, leases: Vec<Observed>) {
        self.heard_from(at);
        let before = std::mem::take(&mut self.leases);
        for lease in leases {
            let since = match before.get(&lease.name) {
                Some((held, since)) if held.version == lease.version => *since,
                _ => at,
            };
            self.leases.insert(lease.name.clone(), (lease, since));
        }
    }

    pub(super) fn put(&mut self, at: Instant, lease: Observed) {
        self.heard(at);
        if self.heard.is_some() {
            self.leases.insert(lease.name.clone(), (lease, at));
        }
    }

    pub(super) fn gone(&mut self, at: Instant, name: &str) {
        self.heard(at);
        self.leases.remove(name);
    }

    pub(super) fn heard(&mut self, at: Instant) {
        if self.heard.is_some() {
            self.heard_from(at);
        }
    }

    /// After a time without a sign of life everybody has a new term: they could not renew either, or it wasn't seen.
    fn heard_from(&mut self, at: Instant) {
        if self.heard.is_some_and(|heard| at.saturating_duration_since(heard) > GAP) {
            self.leases.values_mut().for_each(|(_, since)| *since = at);
        }
        self.heard = self.heard.max(Some(at));
    }

    /// What is known counts up to the last sign of life.
    fn has_run_out(&self, lease: &Observed, since: Instant) -> bool {
        self.heard.is_some_and(|heard| heard.saturating_duration_since(since) >= lease.lasts)
    }

    fn replica(lease: &Observed) -> Option<&str> {
        let named = lease.name.strip_prefix(LEADER)?.strip_prefix('-')?;
        (named == lease.holder).then_some(named)
    }

    /// `None`: it isn't known yet.
    pub(super) fn replicas(&self) -> Option<BTreeSet<String>> {
        self.heard.map(|_| self.living())
    }

    pub(super) fn living(&self) -> BTreeSet<String> {
        let living = self.leases.values().filter(|(lease, since)| !self.has_run_out(lease, *since));
        living.filter_map(|(lease, _)| Self::replica(lease)).map(str::to_owned).collect()
    }

    pub(super) fn is_there(&self, replica: &str) -> bool {
        match self.leases.get(&format!("{LEADER}-{replica}")) {
            Some((lease, since)) => Self::replica(lease).is_some() && !self.has_run_out(lease, *since),
            None => self.heard.is_none(),
        }
    }

    /// `None`: somebody leads, or it isn't known.
    pub(super) fn free(&self) -> Option<Free> {
        self.heard?;
        match self.leases.get(LEADER) {
            None => Some(Free { version: None }),
            Some((lease, since)) if lease.holder.is_empty() || self.has_run_out(lease, *since) => {
                Some(Free { version: Some(lease.version.clone()) })
            }
            Some(_) => None,
        }
    }

    /// Leases of replicas that ran out this long ago.
    pub(super) fn forgotten(&self, after: Duration) -> Vec<Observed> {
        let Some(heard) = self.heard else { return Vec::new() };
        let old = self.leases.values().filter(|(lease, since)| {
            Self::replica(lease).is_some() && heard.saturating_duration_since(*since) >= lease.lasts + after
        });
        old.map(|(lease, _)| lease.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(name: &str, version: u32, holder: &str) -> Observed {
        Observed {
            name: name.to_owned(),
            version: version.to_string(),
            holder: holder.to_owned(),
            lasts: Duration::from_secs(15),
        }
    }

    fn own(version: u32) -> Observed {
        lease("onboarding-plane-a", version, "a")
    }

    /// Whoever hears from the API server every five seconds.
    fn renewing(seen: &mut Seen, from: Instant, seconds: std::ops::Range<u64>) {
        for second in seconds.step_by(5) {
            seen.put(from + Duration::from_secs(second), own(1000 + second as u32));
        }
    }

    #[test]
    fn before_the_first_list_everybody_is_there_and_nobody_may_lead() {
        let seen = Seen::new();
        assert!(seen.is_there("b"));
        assert_eq!((seen.replicas(), seen.free()), (None, None));
    }

    #[test]
    fn a_replica_is_gone_when_its_lease_stood_still_for_its_term() {
        let now = Instant::now();
        let mut seen = Seen::new();
        seen.listed(now, vec![own(1), lease("onboarding-plane-b", 2, "b")]);
        renewing(&mut seen, now, 5..15);
        assert!(seen.is_there("b"));
        seen.put(now + Duration::from_secs(15), own(9));
        assert!(!seen.is_there("b"));
        assert!(seen.is_there("a"));
        assert_eq!(seen.replicas(), Some(["a".to_owned()].into()));
        // It was alive after all.
        seen.put(now + Duration::from_secs(16), lease("onboarding-plane-b", 10, "b"));
        assert!(seen.is_there("b"));
        seen.gone(now + Duration::from_secs(17), "onboarding-plane-b");
        assert!(!seen.is_there("b"));
        assert!(!seen.is_there("never"));
    }

    #[test]
    fn an_api_server_that_says_nothing_makes_nobody_gone() {
        let now = Instant::now();
        let mut seen = Seen::new();
        seen.listed(now, vec![own(1), lease("onboarding-plane-b", 2, "b"), lease(LEADER, 3, "b")]);
        // It comes back after an hour, and whoever is quicker is seen first.
        let back = now + Duration::from_secs(3600);
        seen.listed(back, vec![own(4), lease("onboarding-plane-b", 2, "b"), lease(LEADER, 3, "b")]);
        assert!(seen.is_there("b"));
        assert_eq!(seen.free(), None);
        renewing(&mut seen, back, 5..20);
        assert!(!seen.is_there("b"));
        assert_eq!(seen.free(), Some(Free { version: Some("3".to_owned()) }));
    }

    #[test]
    fn leading_is_free_when_nobody_holds_it() {
        let now = Instant::now();
        let mut seen = Seen::new();
        seen.listed(now, vec![own(1)]);
        assert_eq!(seen.free(), Some(Free { version: None }));
        seen.put(now, lease(LEADER, 2, "b"));
        assert_eq!(seen.free(), None);
        seen.put(now, lease(LEADER, 3, ""));
        assert_eq!(seen.free(), Some(Free { version: Some("3".to_owned()) }));
    }

    #[test]
    fn only_leases_of_replicas_that_are_long_gone_are_forgotten() {
        let now = Instant::now();
        let mut seen = Seen::new();
        seen.listed(
            now,
            vec![own(1), lease("onboarding-plane-b", 2, "b"), lease(LEADER, 3, "b"), lease("other", 4, "b")],
        );
        renewing(&mut seen, now, 5..600);
        assert_eq!(seen.forgotten(Duration::from_secs(600)), vec![]);
        renewing(&mut seen, now, 600..620);
        let forgotten: Vec<_> = seen.forgotten(Duration::from_secs(600)).into_iter().map(|lease| lease.name).collect();
        assert_eq!(forgotten, ["onboarding-plane-b"]);
    }

    #[test]
    fn a_lease_whose_holder_is_another_vouches_for_nobody() {
        let mut seen = Seen::new();
        seen.listed(Instant::now(), vec![lease("onboarding-plane-b", 2, "c")]);
        assert!(!seen.is_there("b"));
        assert_eq!(seen.replicas(), Some(BTreeSet::new()));
    }
}
