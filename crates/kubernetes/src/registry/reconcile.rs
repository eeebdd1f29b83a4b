//! Keeps the mesh's entries, the wars' conditions and what is left of ended registrations as they should be. Works off names; each is looked
//! at as a whole, however it came to be looked at.

use super::api::{CallError, Urgency};
use super::cache::Record;
use super::entry::{self, Entry, Owner};
use super::groups::Groups;
use super::object::{Meaning, War};
use super::store::{NO_ADDRESS, NOT_OURS, Store, admitted};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{Live, State};
use onboarding_endpoint::backend::{RegistryError, Snapshot};
use onboarding_runtime::backoff::{Backoff, with_jitter};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Names at the same time; their requests are bounded once more.
const AT_ONCE: usize = 16;
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(60);
/// An agent that has registered connects at once: its first status comes with that. For one that doesn't, it is written after so long.
const FIRST_STATUS_AFTER: Duration = Duration::from_secs(5);
/// The replica that stored something goes on with it at once. The others look after so long (and up to half as long again) whether
/// anything is left to do.
const OTHERS_AFTER: Duration = Duration::from_millis(700);

/// Until the end of time.
pub(crate) async fn work(store: &Store) -> std::convert::Infallible {
    let names = &store.cache.work;
    let mut running = FuturesUnordered::new();
    let mut busy = HashSet::new();
    let mut again = HashSet::new();
    let mut later: BTreeSet<(Instant, RegistrationName)> = BTreeSet::new();
    let mut failures: HashMap<RegistrationName, Backoff> = HashMap::new();
    loop {
        let next = later.first().map(|(at, _)| *at);
        tokio::select! {
            name = names.next(), if running.len() < AT_ONCE => {
                if !busy.insert(name.clone()) {
                    again.insert(name);
                    continue;
                }
                running.push(async move {
                    let outcome = one(store, &name).await;
                    (name, outcome)
                });
            }
            name = store.cache.heard.next() => drop(later.insert((Instant::now() + with_jitter(OTHERS_AFTER), name))),
            Some((name, outcome)) = running.next(), if !running.is_empty() => {
                busy.remove(&name);
                let delay = match outcome {
                    Ok(delay) => {
                        failures.remove(&name);
                        delay
                    }
                    Err(error) => {
                        let backoff = failures.entry(name.clone()).or_insert_with(|| Backoff::new(FIRST_DELAY, LONGEST_DELAY));
                        let delay = backoff.next_delay();
                        match error {
                            // Somebody wrote meanwhile, and the informer is about to say what.
                            CallError::Conflict | CallError::Gone => {}
                            error => tracing::warn!(registration = %name, %error, again_in = ?delay, "what the mesh is told of a registration can't be brought up to date"),
                        }
                        Some(delay)
                    }
                };
                match delay {
                    _ if again.remove(&name) => names.add(name),
                    Some(delay) => drop(later.insert((Instant::now() + delay, name))),
                    None => {}
                }
            }
            () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                while later.first().is_some_and(|(at, _)| *at <= Instant::now()) {
                    if let Some((_, name)) = later.pop_first() {
                        names.add(name);
                    }
                }
            }
        }
    }
}

/// A change of a group is one of each of its registrations.
pub(crate) async fn follow_groups(store: &Store) -> std::convert::Infallible {
    let mut groups = store.groups.clone();
    let mut before: Arc<Groups> = groups.borrow_and_update().clone();
    loop {
        if groups.changed().await.is_err() {
            // Nobody says any more what groups there are; what is known stays.
            std::future::pending::<()>().await;
        }
        let now = groups.borrow_and_update().clone();
        let names = store.cache.names(|record| {
            record.war.get().and_then(|war| war.live()).is_some_and(|war| {
                let group = &war.live.group;
                before.get(group) != now.get(group)
            })
        });
        names.into_iter().for_each(|name| store.cache.work.add(name));
        before = now;
    }
}

/// A change of the policies is one of each registration that another rule admits from now on.
pub(crate) async fn follow_policies(store: &Store) -> std::convert::Infallible {
    let mut snapshots = store.snapshots.clone();
    let mut before: Arc<Snapshot> = snapshots.borrow_and_update().clone();
    loop {
        if snapshots.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        let now = snapshots.borrow_and_update().clone();
        if !admit_alike(&before, &now) {
            let names = store.cache.names(|record| {
                let live = record.war.get().and_then(|war| war.live()).map(|war| &war.live);
                live.is_some_and(|live| admitted(&before, live) != admitted(&now, live))
            });
            names.into_iter().for_each(|name| store.cache.work.add(name));
        }
        before = now;
    }
}

/// Whether nothing changed that decides who is admitted.
fn admit_alike(before: &Snapshot, now: &Snapshot) -> bool {
    Arc::ptr_eq(&before.policies, &now.policies)
        && before.policy_unreadable == now.policy_unreadable
        && before.plane == now.plane
        && before.groups == now.groups
}

/// `Some`: to be looked at again after so long.
async fn one(store: &Store, name: &RegistrationName) -> Result<Option<Duration>, CallError> {
    let state = match store.glance(name).await {
        Ok(stored) => stored.state,
        Err(RegistryError::Foreign(words)) => {
            tracing::debug!(registration = %name, problem = words, "a registration that no plane made is left alone");
            return Ok(None);
        }
        Err(RegistryError::Conflict) => return Err(CallError::Conflict),
        Err(RegistryError::Unavailable(words)) => return Err(CallError::Unavailable(words)),
    };
    let record = store.cache.get(name);
    match (&state, record.war.get()) {
        (State::Live(live), Some(war)) => {
            let problem = publish(store, name, &record, war, live).await?;
            let age = Duration::try_from(Timestamp::now().duration_since(live.created_at)).unwrap_or_default();
            let has_status = war.live().is_some_and(|war| war.has_status);
            if !has_status && problem.is_none() && age < FIRST_STATUS_AFTER {
                return Ok(Some(FIRST_STATUS_AFTER - age));
            }
            return store.show(name, war, problem).await;
        }
        (_, war) => {
            if let Some(entry) = record.entry.get().filter(|entry| matches!(entry.owner, Owner::War(_))) {
                retract(store, name, entry).await?;
            }
            if let Some(war) = war.filter(|war| matches!(war.meaning, Meaning::Ended { .. } | Meaning::Forgotten)) {
                store.finish(Urgency::Upkeep, name, war).await?;
            }
        }
    }
    Ok(None)
}

/// Makes the entry what it should be. What stands in the way is for the war's conditions.
async fn publish(
    store: &Store,
    name: &RegistrationName,
    record: &Record,
    war: &War,
    live: &Live,
) -> Result<Option<(&'static str, String)>, CallError> {
    let group = store.groups.borrow().get(&live.group).map(|group| group.group.clone());
    // A group that is gone ends the registration; one that can't be read leaves the entry as it is.
    let Some(group) = group else { return Ok(None) };
    let wanted = match entry::wanted(name, &war.uid, &group, live) {
        Ok(wanted) => wanted,
        Err(error) => {
            if let Some(entry) = record.entry.get().filter(|entry| matches!(entry.owner, Owner::War(_))) {
                retract(store, name, entry).await?;
            }
            return Ok(Some((NO_ADDRESS, error.to_string())));
        }
    };
    let entry = match record.entry.get() {
        Some(entry) => match &entry.owner {
            Owner::War(uid) if *uid == war.uid && entry.is(&wanted) => entry.clone(),
            Owner::War(uid) if *uid == war.uid => apply(store, name, &wanted, true).await?,
            // Of the registration before this one.
            Owner::War(_) => {
                retract(store, name, entry).await?;
                apply(store, name, &wanted, false).await?
            }
            Owner::Other(whose) => return Ok(Some((NOT_OURS, not_ours(name, whose)))),
        },
        None => match apply(store, name, &wanted, false).await {
            Ok(entry) => entry,
            Err(CallError::Conflict) => {
                // Somebody else's, of which the informer hasn't told yet.
                if let Some(entry) = store.requests.get_entry(name).await? {
                    store.cache.edit(name, |record| record.entry.put(entry));
                }
                return Err(CallError::Conflict);
            }
            Err(error) => return Err(error),
        },
    };
    if let Some(patch) = entry.health_patch(&live.health, Timestamp::now()) {
        let entry = store.requests.patch_entry_status(name, &patch).await?;
        store.cache.edit(name, |record| record.entry.put(entry));
    }
    Ok(None)
}

async fn apply(
    store: &Store,
    name: &RegistrationName,
    wanted: &serde_json::Value,
    force: bool,
) -> Result<Arc<Entry>, CallError> {
    let entry = Arc::new(store.requests.apply_entry(name, wanted, force).await?);
    store.cache.edit(name, |record| record.entry.put(Entry::clone(&entry)));
    Ok(entry)
}

async fn retract(store: &Store, name: &RegistrationName, entry: &Entry) -> Result<(), CallError> {
    store.requests.delete_entry(name, &entry.uid).await?;
    store.cache.edit(name, |record| record.entry.deleted(&entry.uid));
    Ok(())
}

fn not_ours(name: &RegistrationName, whose: &str) -> String {
    format!(
        "a WorkloadEntry of this name is there already, owned by {whose}: it is left alone, and the mesh doesn't know this workload; \
         if nothing needs it: `kubectl delete workloadentry -n {} {}`",
        name.namespace, name.name
    )
}
