//! What happens to registrations without their agents: time passes, the configuration changes, a connection was lost unseen.

use crate::backend::{ConfigSource, RegistryError, Snapshot};
use crate::lifecycle::{ApplyError, Lifecycle, admitted};
use crate::metrics::Metrics;
use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{Connection, DisconnectReason, Event, State, step};
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
    pub(crate) async fn run(&self, config: &dyn ConfigSource, stop: &CancellationToken) {
        let mut snapshots = config.watch();
        snapshots.mark_changed();
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
                _ = sweep.tick() => self.sweep().await,
            }
        }
    }

    async fn tick(&self) {
        let due = self.lifecycle.deadlines().due(Timestamp::now());
        stream::iter(due).for_each_concurrent(AT_ONCE, |name| async move { self.tick_one(&name).await }).await;
    }

    async fn tick_one(&self, name: &RegistrationName) {
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
            State::Live(live) if !admitted(snapshot, &live) => Some((name, live)),
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

    async fn sweep(&self) {
        let all = match self.lifecycle.list().await {
            Ok(all) => all,
            Err(error) => {
                tracing::error!(%error, "the registry can't be gone through; it is tried again in a minute");
                return;
            }
        };
        let now = Timestamp::now();
        let mut events = Vec::new();
        for (name, state) in all {
            self.lifecycle.deadlines().note(&name, &state, self.lifecycle.grace());
            match self.session_here(&state) {
                // Its end could not be recorded.
                Some(session) if !self.lifecycle.sessions().has(session) => {
                    let reason = DisconnectReason::ConnectionLost;
                    events.push((name, Event::Disconnect { session: session.to_owned(), reason }));
                }
                Some(_) => {}
                None => {
                    let next = step(&state, Event::Tick, now, self.lifecycle.grace());
                    if matches!(state, State::Ended(_)) && next.is_ok_and(|next| next.state != state) {
                        events.push((name, Event::Tick));
                    }
                }
            }
        }
        self.apply_all(events).await;
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
