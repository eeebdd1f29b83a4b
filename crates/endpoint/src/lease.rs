//! What happens to registrations without their agents: time passes, the configuration changes, a connection was lost unseen.

use crate::backend::{Backend, Fleet, RegistryError, Snapshot};
use crate::lifecycle::{ApplyError, Lifecycle, admitted};
use crate::metrics::Metrics;
use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{Connection, DisconnectReason, EndReason, Event, Live, State, step};
use std::collections::HashSet;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How many registrations are stored at the same time when many change at once; the registry commits them together.
const AT_ONCE: usize = 256;
/// How often everything is gone through: what other replicas did, and what must be remembered no longer.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
const RETRY_AFTER: Duration = Duration::from_secs(1);

pub(crate) struct Lease<'a> {
    pub(crate) lifecycle: &'a Lifecycle,
    pub(crate) metrics: &'a Metrics,
    pub(crate) replica: &'a str,
    pub(crate) fleet: &'a dyn Fleet,
}

impl Lease<'_> {
    /// What this replica held before it stopped is connected no longer. A stop at ten thousand connections writes nothing; this does.
    pub(crate) async fn disconnect_all(&self) -> Result<(), RegistryError> {
        let mut events = Vec::new();
        for (name, state) in self.lifecycle.list().await? {
            if let Some(session) = self.session_here(&state) {
                let reason = DisconnectReason::PlaneRestarted;
                events.push((name, Event::Disconnect { session: session.to_owned(), reason }));
            } else {
                self.lifecycle.deadlines().note(&name, &state, self.lifecycle.grace());
            }
        }
        self.apply_all(events).await;
        Ok(())
    }

    /// Lets time pass, and follows the configuration, until `stop`.
    pub(crate) async fn run(&self, backend: &Backend, stop: &CancellationToken) {
        let mut snapshots = backend.config.watch();
        snapshots.mark_changed();
        let mut leads = backend.fleet.leads();
        leads.mark_changed();
        let mut changes = backend.registry.changes();
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut unfinished = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = snapshots.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let snapshot = snapshots.borrow_and_update().clone();
                    unfinished = !self.recheck(&snapshot).await;
                }
                () = tokio::time::sleep(RETRY_AFTER), if unfinished => {
                    let snapshot = snapshots.borrow_and_update().clone();
                    unfinished = !self.recheck(&snapshot).await;
                }
                () = self.lifecycle.deadlines().wait() => self.tick().await,
                Some(name) = changes.next() => {
                    let unreadable = snapshots.borrow().policy_unreadable;
                    self.changed_elsewhere(&name, unreadable).await;
                }
                Ok(()) = leads.changed() => {
                    leads.mark_unchanged();
                    self.take_over().await;
                }
                _ = sweep.tick() => {
                    let unreadable = snapshots.borrow().policy_unreadable;
                    self.sweep(unreadable).await;
                }
            }
        }
    }

    async fn tick(&self) {
        let due = self.lifecycle.deadlines().due(Timestamp::now());
        stream::iter(due).for_each_concurrent(AT_ONCE, |name| async move { self.tick_one(&name).await }).await;
    }

    async fn tick_one(&self, name: &RegistrationName) {
        match self.lifecycle.load(name).await {
            Ok(state) if !self.is_ours(&state) => return,
            // What can't be loaded can't be stored either, and is said below.
            Ok(_) | Err(_) => {}
        }
        match self.lifecycle.apply(name, Event::Tick).await {
            Ok(State::Ended(_) | State::Absent) => {
                self.metrics.reaped.inc();
                tracing::info!(registration = %name, "the lease ended: the registration is removed");
            }
            Ok(State::Live(_)) => {}
            Err(error) => {
                tracing::error!(registration = %name, %error, "the end of a lease can't be recorded; it is tried again");
                self.lifecycle.deadlines().set(name, Timestamp::now().checked_add(RETRY_AFTER).ok());
            }
        }
    }

    /// Asks for every live registration whether it is still admitted. False: to be done again.
    async fn recheck(&self, snapshot: &Snapshot) -> bool {
        self.metrics.config_faults.set(i64::try_from(snapshot.faults.len()).unwrap_or(i64::MAX));
        let all = match self.lifecycle.list().await {
            Ok(all) => all,
            Err(error) => {
                tracing::error!(%error, "the registry can't be gone through after a change of the configuration; it is tried again");
                return false;
            }
        };
        let refused = all.into_iter().filter_map(|(name, state)| match state {
            State::Live(live) if !admitted(snapshot, &live) && self.is_ours_live(&live) => Some((name, live)),
            _ => None,
        });
        stream::iter(refused)
            .map(|(name, live)| async move {
                match self.lifecycle.end_admission(&name, &live, snapshot).await {
                    Ok(()) | Err(ApplyError::Refused(_)) => true,
                    Err(error) => {
                        tracing::error!(registration = %name, %error, "the end of an admission can't be recorded; it is tried again");
                        false
                    }
                }
            })
            .buffer_unordered(AT_ONCE)
            .fold(true, |all, one| async move { all && one })
            .await
    }

    /// What another replica, or a person, made of a registration: the session that is open here learns of it.
    async fn changed_elsewhere(&self, name: &RegistrationName, policy_unreadable: bool) {
        let state = match self.lifecycle.load(name).await {
            Ok(state) => state,
            Err(RegistryError::Foreign(_)) => State::Absent,
            // The sweep comes by again.
            Err(_) => return,
        };
        self.lifecycle.deadlines().note(name, &state, self.lifecycle.grace());
        self.tell_session(name, &state, policy_unreadable).await;
    }

    /// The session that is open here, if it isn't the one on record.
    async fn tell_session(&self, name: &RegistrationName, state: &State, policy_unreadable: bool) {
        let Some(session) = self.lifecycle.sessions().of(name) else { return };
        let reason = match state {
            State::Live(live) => match &live.connection {
                Connection::Connected { session: current, .. } if *current == session => return,
                Connection::Connected { replica, .. } if replica == self.replica => return,
                Connection::Connected { .. } => EndReason::Replaced,
                Connection::Disconnected { reason: DisconnectReason::PlaneRestarted, .. } => {
                    return self.reconnect(name, live, session).await;
                }
                // It is about to be put on record, or to be taken off it, by the session itself.
                Connection::Disconnected { .. } => return,
            },
            State::Ended(_) | State::Absent if policy_unreadable => EndReason::PolicyUnreadable,
            State::Ended(_) | State::Absent => EndReason::Deleted,
        };
        self.lifecycle.sessions().end(&session, reason);
    }

    /// The leader took this replica for gone, and it isn't: what is on record follows the fact.
    async fn reconnect(&self, name: &RegistrationName, live: &Live, session: String) {
        let event = Event::Connect { replica: self.replica.to_owned(), session, key: live.key.thumbprint };
        if let Err(error) = self.lifecycle.apply(name, event).await {
            tracing::warn!(registration = %name, %error, "that a session goes on can't be recorded");
        }
    }

    /// Of the leader: sessions of replicas that are gone have ended, and their leases run.
    async fn take_over(&self) {
        if !*self.fleet.leads().borrow() {
            return;
        }
        let all = match self.lifecycle.list().await {
            Ok(all) => all,
            Err(error) => {
                tracing::error!(%error, "the registry can't be gone through after a replica came or went; it is tried again in a minute");
                return;
            }
        };
        let mut events = Vec::new();
        for (name, state) in all {
            // What came due while another led.
            self.lifecycle.deadlines().note(&name, &state, self.lifecycle.grace());
            events.extend(self.orphaned(&state).map(|event| (name, event)));
        }
        self.apply_all(events).await;
    }

    /// The end of a session whose replica is gone.
    fn orphaned(&self, state: &State) -> Option<Event> {
        let State::Live(live) = state else { return None };
        match &live.connection {
            Connection::Connected { replica, session, .. }
                if replica != self.replica && !self.fleet.is_there(replica) =>
            {
                Some(Event::Disconnect { session: session.clone(), reason: DisconnectReason::PlaneRestarted })
            }
            _ => None,
        }
    }

    async fn sweep(&self, policy_unreadable: bool) {
        // Asked first: what opens meanwhile isn't missed in the list.
        let named = self.lifecycle.sessions().names();
        let all = match self.lifecycle.list().await {
            Ok(all) => all,
            Err(error) => {
                tracing::error!(%error, "the registry can't be gone through; it is tried again in a minute");
                return;
            }
        };
        self.lifecycle.try_writing(&all).await;
        let now = Timestamp::now();
        let mut events = Vec::new();
        let mut without: HashSet<RegistrationName> = named.into_iter().collect();
        for (name, state) in all {
            self.lifecycle.deadlines().note(&name, &state, self.lifecycle.grace());
            self.tell_session(&name, &state, policy_unreadable).await;
            without.remove(&name);
            match self.session_here(&state) {
                // Its end could not be recorded.
                Some(session) if !self.lifecycle.sessions().has(session) => {
                    let reason = DisconnectReason::ConnectionLost;
                    events.push((name, Event::Disconnect { session: session.to_owned(), reason }));
                }
                Some(_) => {}
                None if !*self.fleet.leads().borrow() => {}
                None => {
                    events.extend(self.orphaned(&state).map(|event| (name.clone(), event)));
                    let next = step(&state, Event::Tick, now, self.lifecycle.grace());
                    if matches!(state, State::Ended(_)) && next.is_ok_and(|next| next.state != state) {
                        events.push((name, Event::Tick));
                    }
                }
            }
        }
        for name in without {
            self.changed_elsewhere(&name, policy_unreadable).await;
        }
        self.apply_all(events).await;
    }

    /// Whether this replica ends what has to end: its own, and for the leader all that no living replica holds.
    fn is_ours(&self, state: &State) -> bool {
        match state {
            State::Live(live) => self.is_ours_live(live),
            State::Ended(_) | State::Absent => *self.fleet.leads().borrow(),
        }
    }

    fn is_ours_live(&self, live: &Live) -> bool {
        match &live.connection {
            Connection::Connected { replica, .. } if replica == self.replica => true,
            Connection::Connected { replica, .. } => *self.fleet.leads().borrow() && !self.fleet.is_there(replica),
            Connection::Disconnected { .. } => *self.fleet.leads().borrow(),
        }
    }

    async fn apply_all(&self, events: Vec<(RegistrationName, Event)>) {
        stream::iter(events)
            .for_each_concurrent(AT_ONCE, |(name, event)| async move {
                if let Err(error) = self.lifecycle.apply(&name, event).await {
                    tracing::warn!(registration = %name, %error, "what became of a registration can't be recorded");
                }
            })
            .await;
    }

    fn session_here<'s>(&self, state: &'s State) -> Option<&'s str> {
        match state {
            State::Live(live) => match &live.connection {
                Connection::Connected { replica, session, .. } if replica == self.replica => Some(session),
                _ => None,
            },
            State::Absent | State::Ended(_) => None,
        }
    }
}
