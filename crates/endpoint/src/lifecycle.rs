//! One registration at a time: loads its state, asks the core for the next, stores it, carries out the effects.
//!
//! What happens to many of them, when time passes or the configuration changes, is `lease`'s.

use crate::audit::{Audit, Decision as Outcome, Entry};
use crate::backend::{Admits, Registry, RegistryError, Snapshot};
use crate::metrics::Metrics;
use jiff::Timestamp;
use onboarding_core::identity::Identity;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{
    Connection, DisconnectReason, Effect, EndReason, Event, Live, Refusal, State, step,
};
use onboarding_runtime::readiness::Readiness;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

/// How often a conditional store is tried anew before the caller is told to come back.
const MOST_CONFLICTS: usize = 16;
const REGISTRY: &str = "registry";

pub(crate) struct Lifecycle {
    registry: Arc<dyn Registry>,
    sessions: Sessions,
    deadlines: Deadlines,
    grace: Duration,
    audit: Arc<Audit>,
    metrics: Metrics,
    readiness: Readiness,
    failing: AtomicBool,
    /// The last store could not be written. What can be read says nothing about that: a registry may answer from memory.
    unwritable: AtomicBool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl Lifecycle {
    pub(crate) fn new(
        registry: Arc<dyn Registry>,
        grace: Duration,
        audit: Arc<Audit>,
        metrics: Metrics,
        readiness: Readiness,
    ) -> Self {
        Self {
            registry,
            sessions: Sessions::default(),
            deadlines: Deadlines::default(),
            grace,
            audit,
            metrics,
            readiness,
            failing: AtomicBool::new(false),
            unwritable: AtomicBool::new(false),
        }
    }

    pub(crate) fn sessions(&self) -> &Sessions {
        &self.sessions
    }
    pub(crate) fn deadlines(&self) -> &Deadlines {
        &self.deadlines
    }
    pub(crate) fn grace(&self) -> Duration {
        self.grace
    }

    pub(crate) async fn load(&self, name: &RegistrationName) -> Result<State, RegistryError> {
        Ok(self.answered(self.registry.load(name).await)?.state)
    }

    pub(crate) async fn list(&self) -> Result<Vec<(RegistrationName, State)>, RegistryError> {
        let all = self.answered(self.registry.list().await)?;
        Ok(all.into_iter().map(|(name, stored)| (name, stored.state)).collect())
    }

    /// Makes an event happen to a registration. When this returns, the new state is durable.
    pub(crate) async fn apply(&self, name: &RegistrationName, event: Event) -> Result<State, ApplyError> {
        for _ in 0..MOST_CONFLICTS {
            let stored = self.answered(self.registry.load(name).await)?;
            let next = step(&stored.state, event.clone(), Timestamp::now(), self.grace)?;
            // Who hears of it by the registry's notice, before this is answered, leaves the reason to this.
            let _ending = self.sessions.off_record(&next.effects);
            if next.state != stored.state {
                match self.stored(self.registry.store(name, stored.version, &next.state).await) {
                    Ok(_) => {}
                    Err(RegistryError::Conflict) => continue,
                    Err(error) => return Err(error.into()),
                }
            }
            self.deadlines.note(name, &next.state, self.grace);
            self.carry_out(next.effects);
            return Ok(next.state);
        }
        Err(RegistryError::Conflict.into())
    }

    fn carry_out(&self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::EndSession { session, reason } => self.sessions.end(&session, reason),
                // The registry tells the mesh: an entry of a live state is published, any other retracted.
                Effect::PublishEntry | Effect::RetractEntry => {}
            }
        }
    }

    /// Whether this registration is admitted as things are configured now; if it isn't, it ends.
    ///
    /// To be called after what depends on a policy was stored. Whoever changes the configuration goes through what is
    /// stored: either that finds this state, or this finds the change.
    pub(crate) async fn enforce(
        &self,
        name: &RegistrationName,
        state: &State,
        snapshot: &Snapshot,
    ) -> Result<bool, ApplyError> {
        match state {
            State::Live(live) if !admitted(snapshot, live) => {
                self.end_admission(name, live, snapshot).await?;
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// No policy admits this live registration, or nobody can say.
    pub(crate) async fn end_admission(
        &self,
        name: &RegistrationName,
        live: &Live,
        snapshot: &Snapshot,
    ) -> Result<(), ApplyError> {
        let session = match &live.connection {
            Connection::Connected { session, .. } => Some(session.clone()),
            Connection::Disconnected { .. } => None,
        };
        let (outcome, reason, event) = match (snapshot.policy_unreadable, &session) {
            (false, _) => (Outcome::Withdrawn, EndReason::Withdrawn, Event::Withdraw),
            (true, Some(session)) => {
                let reason = DisconnectReason::PolicyUnreadable;
                let event = Event::Disconnect { session: session.clone(), reason };
                (Outcome::Suspended, EndReason::PolicyUnreadable, event)
            }
            // Its lease runs already.
            (true, None) => return Ok(()),
        };
        // The session first: it ends also where the registry can't be written.
        if let Some(session) = &session {
            self.sessions.end(session, reason);
        }
        self.apply(name, event).await?;
        match outcome {
            Outcome::Suspended => tracing::warn!(
                registration = %name,
                "a policy can't be read, so nobody can say that this workload is admitted: its session ends, its entry stays for the grace period"
            ),
            _ => tracing::warn!(registration = %name, "no policy admits this workload any more: its registration ends"),
        }
        let mut entry = Entry::new(Timestamp::now(), outcome, live.group.to_string())
            .about(Some(&live.attested.identity), Some(live.key.thumbprint));
        entry.registration = Some(name.to_string());
        if let Err(error) = self.audit.write(&entry).await {
            // What was ended stays ended.
            self.metrics.audit_failures.inc();
            tracing::error!(%error, "the end of an admission can't be written to the audit log");
        }
        Ok(())
    }

    /// Where the last store could not be written, stores what is there once more: readiness comes back without an agent's help.
    pub(crate) async fn try_writing(&self, all: &[(RegistrationName, State)]) {
        if !self.unwritable.load(Ordering::Relaxed) {
            return;
        }
        match all.first() {
            Some((name, _)) => {
                if let Ok(stored) = self.answered(self.registry.load(name).await) {
                    let _ = self.stored(self.registry.store(name, stored.version, &stored.state).await);
                }
            }
            // Nothing to try it with: the next agent does.
            None => self.is_well(),
        }
    }

    /// Readiness follows what the registry last did.
    fn answered<T>(&self, answer: Result<T, RegistryError>) -> Result<T, RegistryError> {
        match &answer {
            Err(error @ RegistryError::Unavailable(_)) => self.is_failing(error),
            Ok(_) | Err(RegistryError::Conflict | RegistryError::Foreign(_)) => {
                if !self.unwritable.load(Ordering::Relaxed) {
                    self.is_well();
                }
            }
        }
        answer
    }

    fn stored<T>(&self, answer: Result<T, RegistryError>) -> Result<T, RegistryError> {
        match &answer {
            Err(error @ RegistryError::Unavailable(_)) => {
                self.unwritable.store(true, Ordering::Relaxed);
                self.is_failing(error);
            }
            Ok(_) => self.is_well(),
            // Nothing was written.
            Err(RegistryError::Conflict | RegistryError::Foreign(_)) => {}
        }
        answer
    }

    fn is_failing(&self, error: &RegistryError) {
        self.failing.store(true, Ordering::Relaxed);
        self.readiness.missing(REGISTRY, error.to_string());
    }

    fn is_well(&self) {
        self.unwritable.store(false, Ordering::Relaxed);
        if self.failing.swap(false, Ordering::Relaxed) {
            self.readiness.ready(REGISTRY);
        }
    }
}

/// Whether a policy admits this registration's identity to its group, as things are configured now.
pub(crate) fn admitted(snapshot: &Snapshot, live: &Live) -> bool {
    matches!(snapshot.admits(live), Admits::Policy { .. })
}

/// Whether who vouched for this identity may still do so: an issuer that was struck off the list vouches for nobody.
pub(crate) fn vouched_for(snapshot: &Snapshot, identity: &Identity) -> bool {
    match (identity, &snapshot.plane) {
        (Identity::Jwt(jwt), Some(plane)) => {
            plane.issuers.iter().any(|issuer| Some(&issuer.issuer) == jwt.issuer.proven())
        }
        _ => true,
    }
}

/// The sessions that this replica holds, and how each is told that it ends.
#[derive(Default)]
pub(crate) struct Sessions {
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    by_session: HashMap<String, (RegistrationName, oneshot::Sender<EndReason>)>,
    /// The newest of each registration; those before it are being replaced.
    newest: HashMap<RegistrationName, Newest>,
}

struct Newest {
    session: String,
    /// Before, what is on record is about the session that it replaces.
    on_record: bool,
}

impl Sessions {
    pub(crate) fn opened(&self, name: &RegistrationName, session: String) -> oneshot::Receiver<EndReason> {
        let (sender, receiver) = oneshot::channel();
        let mut open = self.lock();
        open.newest.insert(name.clone(), Newest { session: session.clone(), on_record: false });
        open.by_session.insert(session, (name.clone(), sender));
        receiver
    }
    pub(crate) fn put_on_record(&self, session: &str) {
        self.set_on_record(session, true);
    }
    /// What is on record is no longer about the sessions that these effects end, as long as the answer lives.
    fn off_record(&self, effects: &[Effect]) -> Vec<OffRecord<'_>> {
        let ended = effects.iter().filter_map(|effect| match effect {
            Effect::EndSession { session, .. } => Some(session.clone()),
            Effect::PublishEntry | Effect::RetractEntry => None,
        });
        ended
            .filter(|session| self.set_on_record(session, false))
            .map(|session| OffRecord { sessions: self, session })
            .collect()
    }
    /// Whether it wasn't so before.
    fn set_on_record(&self, session: &str, on_record: bool) -> bool {
        let mut open = self.lock();
        let Open { by_session, newest } = &mut *open;
        let newest = by_session.get(session).and_then(|(name, _)| newest.get_mut(name));
        newest
            .filter(|newest| newest.session == session)
            .is_some_and(|newest| std::mem::replace(&mut newest.on_record, on_record) != on_record)
    }
    pub(crate) fn closed(&self, session: &str) {
        self.lock().remove(session);
    }
    pub(crate) fn has(&self, session: &str) -> bool {
        self.lock().by_session.contains_key(session)
    }
    /// The session of this registration that is open here and was put on record.
    pub(crate) fn of(&self, name: &RegistrationName) -> Option<String> {
        self.lock().newest.get(name).filter(|newest| newest.on_record).map(|newest| newest.session.clone())
    }
    pub(crate) fn names(&self) -> Vec<RegistrationName> {
        self.lock().newest.keys().cloned().collect()
    }
    pub(crate) fn end(&self, session: &str, reason: EndReason) {
        if let Some(sender) = self.lock().remove(session) {
            // It may have ended by itself meanwhile.
            let _ = sender.send(reason);
        }
    }
    pub(crate) fn count(&self) -> usize {
        self.lock().by_session.len()
    }
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session that is about to end by what is being stored; it is on record again where that fails.
struct OffRecord<'a> {
    sessions: &'a Sessions,
    session: String,
}

impl Drop for OffRecord<'_> {
    fn drop(&mut self) {
        self.sessions.set_on_record(&self.session, true);
    }
}

impl Open {
    fn remove(&mut self, session: &str) -> Option<oneshot::Sender<EndReason>> {
        let (name, sender) = self.by_session.remove(session)?;
        if self.newest.get(&name).is_some_and(|newest| newest.session == session) {
            self.newest.remove(&name);
        }
        Some(sender)
    }
}

/// When something happens next to each live registration by time alone.
#[derive(Default)]
pub(crate) struct Deadlines {
    times: Mutex<Times>,
    changed: Notify,
}

#[derive(Default)]
struct Times {
    by_time: BTreeSet<(Timestamp, RegistrationName)>,
    of: HashMap<RegistrationName, Timestamp>,
}

impl Deadlines {
    /// A state that was read or stored just now.
    pub(crate) fn note(&self, name: &RegistrationName, state: &State, grace: Duration) {
        let at = match state {
            State::Live(live) => Some(match &live.connection {
                Connection::Connected { .. } => live.token_expires_at,
                Connection::Disconnected { .. } => live.lease_ends_at(grace),
            }),
            State::Absent | State::Ended(_) => None,
        };
        self.set(name, at);
    }

    pub(crate) fn set(&self, name: &RegistrationName, at: Option<Timestamp>) {
        let mut times = self.lock();
        if times.of.get(name).copied() == at {
            return;
        }
        if let Some(before) = times.of.remove(name) {
            times.by_time.remove(&(before, name.clone()));
        }
        if let Some(at) = at {
            times.of.insert(name.clone(), at);
            times.by_time.insert((at, name.clone()));
            if times.by_time.first().is_some_and(|(first, _)| *first == at) {
                self.changed.notify_one();
            }
        }
    }

    /// Those whose time has come; their deadlines are gone until they are noted again.
    pub(crate) fn due(&self, now: Timestamp) -> Vec<RegistrationName> {
        let mut times = self.lock();
        let mut due = Vec::new();
        while times.by_time.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, name)) = times.by_time.pop_first() {
                times.of.remove(&name);
                due.push(name);
            }
        }
        due
    }

    /// Returns at the next deadline. For one waiter.
    pub(crate) async fn wait(&self) {
        loop {
            let next = self.lock().by_time.first().map(|(at, _)| *at);
            let left = next.map(|at| Duration::try_from(at.duration_since(Timestamp::now())).unwrap_or(Duration::ZERO));
            tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep(left.unwrap_or(Duration::MAX)) => return,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> RegistrationName {
        RegistrationName { namespace: "bookinfo".to_owned(), name: name.to_owned() }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_deadline_that_moved_comes_once() {
        let deadlines = Deadlines::default();
        deadlines.set(&name("a"), Some(at(10)));
        deadlines.set(&name("b"), Some(at(20)));
        deadlines.set(&name("a"), Some(at(30)));
        assert_eq!(deadlines.due(at(19)), []);
        assert_eq!(deadlines.due(at(20)), [name("b")]);
        assert_eq!(deadlines.due(at(29)), []);
        assert_eq!(deadlines.due(at(30)), [name("a")]);
        assert_eq!(deadlines.due(at(99)), []);
        deadlines.set(&name("c"), Some(at(40)));
        deadlines.set(&name("c"), None);
        assert_eq!(deadlines.due(at(99)), []);
    }

    #[tokio::test]
    async fn an_earlier_deadline_wakes_who_waits_for_a_later_one() {
        let deadlines = Arc::new(Deadlines::default());
        deadlines.set(&name("late"), Some(Timestamp::MAX));
        let waiting = tokio::spawn({
            let deadlines = deadlines.clone();
            async move { deadlines.wait().await }
        });
        deadlines.set(&name("now"), Some(Timestamp::now()));
        tokio::time::timeout(Duration::from_secs(10), waiting).await.unwrap().unwrap();
    }
}
