//! The driver of registrations: loads a state, asks the core for the next, stores it, carries out the effects.
//!
//! It also lets time pass for all of them, and asks the policies again when the configuration changes.

use crate::backend::{ConfigSource, Registry, RegistryError, Snapshot};
use crate::metrics::{Metrics, Why};
use futures_util::StreamExt;
use futures_util::stream;
use jiff::Timestamp;
use onboarding_core::name::RegistrationName;
use onboarding_core::policy::Decision;
use onboarding_core::registration::{
    Connection, DisconnectReason, Effect, EndReason, Event, Live, Refusal, State, step,
};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// How often a conditional store is tried anew before the caller is told to come back.
const MOST_CONFLICTS: usize = 16;
/// How many registrations are stored at the same time when many change at once; the registry commits them together.
const AT_ONCE: usize = 256;

pub(crate) struct Lifecycle {
    registry: Arc<dyn Registry>,
    sessions: Sessions,
    grace: Duration,
    metrics: Metrics,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl Lifecycle {
    pub(crate) fn new(registry: Arc<dyn Registry>, grace: Duration, metrics: Metrics) -> Self {
        Self { registry, sessions: Sessions::default(), grace, metrics }
    }

    pub(crate) fn sessions(&self) -> &Sessions {
        &self.sessions
    }

    /// Makes an event happen to a registration. When this returns, the new state is durable.
    pub(crate) async fn apply(&self, name: &RegistrationName, event: Event) -> Result<State, ApplyError> {
        for _ in 0..MOST_CONFLICTS {
            let stored = self.registry.load(name).await?;
            let next = step(&stored.state, event.clone(), Timestamp::now(), self.grace)?;
            if next.state == stored.state {
                return Ok(next.state);
            }
            match self.registry.store(name, stored.version, &next.state).await {
                Ok(_) => {
                    self.carry_out(next.effects);
                    return Ok(next.state);
                }
                Err(RegistryError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(RegistryError::Conflict.into())
    }

    fn carry_out(&self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::EndSession { session, reason } => {
                    self.metrics.sessions_ended.get_or_create(&Why { reason: end_reason(reason) }).inc();
                    self.sessions.end(&session, reason);
                }
                // The registry tells the mesh: an entry of a live state is published, any other retracted.
                Effect::PublishEntry | Effect::RetractEntry => {}
            }
        }
    }

    /// What this replica held before it stopped is connected no longer.
    pub(crate) async fn disconnect_all(&self, replica: &str) -> Result<(), RegistryError> {
        let held = self.live(|live| match &live.connection {
            Connection::Connected { replica: held_by, session, .. } if held_by == replica => {
                Some(Event::Disconnect { session: session.clone(), reason: DisconnectReason::PlaneRestarted })
            }
            _ => None,
        });
        let events = held.await?;
        self.apply_all(events).await;
        Ok(())
    }

    /// Lets time pass, and follows the configuration, until `stop`.
    pub(crate) async fn run(&self, config: &dyn ConfigSource, stop: &CancellationToken) {
        let mut snapshots = config.watch();
        snapshots.mark_changed();
        let interval = (self.grace / 10).clamp(Duration::from_millis(200), Duration::from_secs(5));
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                changed = snapshots.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let snapshot = snapshots.borrow_and_update().clone();
                    self.recheck(&snapshot).await
                }
                _ = ticks.tick() => self.tick().await,
            };
            if let Err(error) = outcome {
                tracing::error!(%error, "the registry can't be gone through; it is tried again");
                snapshots.mark_changed();
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = ticks.tick() => {}
                }
            }
        }
    }

    async fn tick(&self) -> Result<(), RegistryError> {
        let now = Timestamp::now();
        let mut due = Vec::new();
        for (name, stored) in self.registry.list().await? {
            let reaped = match step(&stored.state, Event::Tick, now, self.grace) {
                Ok(next) if next.state == stored.state => continue,
                Ok(next) => matches!(stored.state, State::Live(_)) && matches!(next.state, State::Ended(_)),
                Err(_) => continue,
            };
            if reaped {
                tracing::info!(registration = %name, "the lease ended: the registration is removed");
                self.metrics.reaped.inc();
            }
            due.push((name, Event::Tick));
        }
        self.apply_all(due).await;
        Ok(())
    }

    /// Asks for every live registration whether it is still admitted.
    async fn recheck(&self, snapshot: &Snapshot) -> Result<(), RegistryError> {
        self.metrics.config_faults.set(i64::try_from(snapshot.faults.len()).unwrap_or(i64::MAX));
        let refused = self.live(|live| {
            if admitted(snapshot, live) {
                return None;
            }
            if !snapshot.policy_unreadable {
                return Some(Event::Withdraw);
            }
            match &live.connection {
                Connection::Connected { session, .. } => {
                    Some(Event::Disconnect { session: session.clone(), reason: DisconnectReason::PolicyUnreadable })
                }
                Connection::Disconnected { .. } => None,
            }
        });
        let events = refused.await?;
        for (name, event) in &events {
            if let Event::Disconnect { .. } = event {
                tracing::warn!(registration = %name, "a policy can't be read, so nobody can say that this workload is admitted: its session ends, its entry stays for the grace period");
            } else {
                tracing::warn!(registration = %name, "no policy admits this workload any more: its registration ends");
            }
        }
        self.apply_all(events).await;
        Ok(())
    }

    /// The live registrations for which there is an event.
    async fn live(
        &self,
        event: impl Fn(&Live) -> Option<Event>,
    ) -> Result<Vec<(RegistrationName, Event)>, RegistryError> {
        let all = self.registry.list().await?;
        Ok(all
            .into_iter()
            .filter_map(|(name, stored)| match &stored.state {
                State::Live(live) => event(live).map(|event| (name, event)),
                _ => None,
            })
            .collect())
    }

    async fn apply_all(&self, events: Vec<(RegistrationName, Event)>) {
        stream::iter(events)
            .for_each_concurrent(AT_ONCE, |(name, event)| async move {
                // A session that is cut off without an event of its own in the core: the one that the state named.
                let cut = match &event {
                    Event::Disconnect { session, reason: DisconnectReason::PolicyUnreadable } => Some(session.clone()),
                    _ => None,
                };
                if let Err(error) = self.apply(&name, event).await {
                    tracing::warn!(registration = %name, %error, "an event could not be applied to the registration");
                }
                if let Some(session) = cut {
                    self.sessions.end(&session, EndReason::PolicyUnreadable);
                }
            })
            .await;
    }
}

/// Whether a policy admits this registration's identity to its group, as things are configured now.
pub(crate) fn admitted(snapshot: &Snapshot, live: &Live) -> bool {
    snapshot.groups.get(&live.group).is_some_and(|group| {
        matches!(snapshot.policies.decide(&live.attested.identity, group), Decision::Allowed { .. })
    })
}

fn end_reason(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Replaced => "replaced",
        EndReason::Withdrawn => "withdrawn",
        EndReason::PolicyUnreadable => "policy_unreadable",
        EndReason::Deleted => "deleted",
        EndReason::Unregistered => "unregistered",
        EndReason::TokenExpired => "token_expired",
    }
}

/// The sessions that this replica holds, by name, and how each is told that it ends.
#[derive(Default)]
pub(crate) struct Sessions {
    open: Mutex<HashMap<String, oneshot::Sender<EndReason>>>,
}

impl Sessions {
    pub(crate) fn opened(&self, session: String) -> oneshot::Receiver<EndReason> {
        let (sender, receiver) = oneshot::channel();
        self.lock().insert(session, sender);
        receiver
    }
    pub(crate) fn closed(&self, session: &str) {
        self.lock().remove(session);
    }
    fn end(&self, session: &str, reason: EndReason) {
        if let Some(sender) = self.lock().remove(session) {
            // It may have ended by itself meanwhile.
            let _ = sender.send(reason);
        }
    }
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }
    fn lock(&self) -> MutexGuard<'_, HashMap<String, oneshot::Sender<EndReason>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
