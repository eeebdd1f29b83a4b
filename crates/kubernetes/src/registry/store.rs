//! Loading and storing one registration, and what is left to do of one that ended. The rules are in the module above.

use super::api::{CallError, Requests, Urgency};
use super::cache::{Cache, Lost, Record, View};
use super::groups::{Boot, Groups};
use super::memory::Content;
use super::object::{self, Condition, LiveWar, Meaning, War};
use super::standing::{BootState, Known};
use jiff::Timestamp;
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::{Connection, Ended, Live, State};
use onboarding_endpoint::backend::{Admits, RegistryError, Snapshot, Stored};
use onboarding_kinds::war;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use uuid::Uuid;

/// How often something is looked at anew that somebody else changes all the time.
const MOST_LOOKS: usize = 8;

pub(crate) struct Store {
    pub cache: Cache,
    pub requests: Requests,
    pub groups: watch::Receiver<Arc<Groups>>,
    /// Says which policy admits whom.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// How far the agents are that have a session here.
    pub standings: Known,
}

impl From<CallError> for RegistryError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Conflict | CallError::Gone => Self::Conflict,
            CallError::Refused(words) | CallError::Unavailable(words) => Self::Unavailable(words),
        }
    }
}

impl Store {
    pub(crate) async fn load(&self, urgency: Urgency, name: &RegistrationName) -> Result<Stored, RegistryError> {
        match self.cache.view(name) {
            View::Known(stored) => Ok(stored),
            View::Foreign(words) => Err(RegistryError::Foreign(words)),
            View::Look => self.look(urgency, name).await,
        }
    }

    /// For upkeep: asks the API server only where something doesn't fit.
    pub(crate) async fn glance(&self, name: &RegistrationName) -> Result<Stored, RegistryError> {
        match self.cache.seems(name) {
            View::Known(stored) => Ok(stored),
            View::Foreign(words) => Err(RegistryError::Foreign(words)),
            View::Look => self.look(Urgency::Upkeep, name).await,
        }
    }

    /// Asks the API server, and puts right what isn't: what was deleted is remembered, what was made in ignorance of that is deleted.
    async fn look(&self, urgency: Urgency, name: &RegistrationName) -> Result<Stored, RegistryError> {
        for _ in 0..MOST_LOOKS {
            self.refresh(urgency, name).await?;
            let record = self.cache.get(name);
            if let Some(lost) = &record.lost {
                self.remember(urgency, name, lost).await?;
                continue;
            }
            match record.view() {
                View::Known(stored) => return Ok(stored),
                View::Foreign(words) => return Err(RegistryError::Foreign(words)),
                View::Look => {}
            }
            let Some((war, live)) = record.war.get().and_then(|war| Some((war, war.live()?))) else { continue };
            if war.deleting {
                self.remember(urgency, name, &Lost { uid: war.uid.clone(), war: live.clone() }).await?;
            } else if record.follows(live) {
                self.cache.edit(name, |record| record.verified = Some(war.uid.clone()));
            } else {
                tracing::warn!(registration = %name, "a registration was made without knowing how the one before it ended: it is deleted");
                self.delete_war(urgency, name, &war.uid, None).await?;
            }
        }
        Err(RegistryError::Unavailable(format!("{name} changes too often to be read")))
    }

    /// The war first: a memory that is older than it is then seen as well.
    async fn refresh(&self, urgency: Urgency, name: &RegistrationName) -> Result<(), RegistryError> {
        let before = self.cache.get(name);
        let war_before = before.war.get().map(|war| war.uid.clone());
        let memory_before = before.memory.get().map(|memory| memory.uid.clone());
        let war = self.requests.get_war(urgency, name).await?;
        let memory = self.requests.get_memory(urgency, name).await.map_err(|error| match error {
            CallError::Refused(words) => RegistryError::Foreign(words),
            error => error.into(),
        })?;
        self.cache.edit(name, |record| {
            match (war, war_before) {
                (Some(war), _) => {
                    record.war.put(war);
                }
                (None, Some(uid)) => record.war_ended(&uid, None),
                (None, None) => {}
            }
            match (memory, memory_before) {
                (Some(memory), _) => {
                    record.memory.put(memory);
                }
                (None, Some(uid)) => drop(record.memory.ended(&uid)),
                (None, None) => {}
            }
            record.suspect = false;
        });
        Ok(())
    }

    /// What another replica wrote is seen by the caller's next load.
    async fn conflict(&self, name: &RegistrationName) -> RegistryError {
        self.refresh(Urgency::Join, name).await.err().unwrap_or(RegistryError::Conflict)
    }

    async fn or_conflict<T>(&self, name: &RegistrationName, result: Result<T, CallError>) -> Result<T, RegistryError> {
        match result {
            Ok(value) => Ok(value),
            Err(CallError::Conflict | CallError::Gone) => Err(self.conflict(name).await),
            Err(error) => Err(error.into()),
        }
    }

    pub(crate) async fn store(
        &self,
        name: &RegistrationName,
        expected: u64,
        state: &State,
    ) -> Result<u64, RegistryError> {
        self.load(Urgency::Join, name).await?;
        let record = self.cache.get(name);
        if !matches!(record.view(), View::Known(stored) if stored.version == expected) {
            return Err(self.conflict(name).await);
        }
        let version = match (record.war.get().filter(|war| !war.deleting), state) {
            (Some(war), State::Live(new)) => match &war.meaning {
                Meaning::Live(before) => self.update(name, war, before, new).await?,
                Meaning::Ended { .. } | Meaning::Forgotten => {
                    let result = self.finish(Urgency::Join, name, war).await;
                    self.or_conflict(name, result).await?;
                    let record = self.cache.get(name);
                    let remembered = record.memory.get().map(|memory| &memory.content.ended);
                    let known = match &war.meaning {
                        Meaning::Ended { ended, .. } => Some(ended),
                        _ => None,
                    };
                    if remembered != known {
                        return Err(self.conflict(name).await);
                    }
                    self.create(name, &record, new).await?
                }
                Meaning::Foreign(words) => return Err(RegistryError::Foreign(words.clone())),
            },
            (Some(war), State::Ended(ended)) => self.end(name, war, Some(ended)).await?,
            (Some(war), State::Absent) => self.end(name, war, None).await?,
            (None, State::Live(new)) => {
                if record.war.get().is_some() {
                    return Err(RegistryError::Unavailable(format!(
                        "the deleted WorkloadAutoRegistration {name} is still there, held by a finalizer"
                    )));
                }
                self.create(name, &record, new).await?
            }
            (None, State::Ended(ended)) => {
                let war = record.memory.get().map_or_else(String::new, |memory| memory.content.war.clone());
                let content = Content { id: Uuid::new_v4().to_string(), war, ended: ended.clone() };
                let version = record.memory.get().map(|memory| memory.version);
                let result = self.requests.put_memory(Urgency::Join, name, &content, version).await;
                let memory = self.or_conflict(name, result).await?;
                let version = memory.version;
                self.cache.edit(name, |record| record.memory.put(memory));
                version
            }
            (None, State::Absent) => {
                if let Some(memory) = record.memory.get() {
                    let result = self.requests.delete_memory(Urgency::Join, memory).await;
                    self.or_conflict(name, result).await?;
                    self.cache.edit(name, |record| record.memory.deleted(&memory.uid));
                }
                0
            }
        };
        match (state, record.war.get().and_then(|war| war.live())) {
            // The mesh learns of a newcomer before what is left of many that ended is cleaned up.
            (State::Live(_), None) => self.cache.work.add_first(name.clone()),
            _ => self.cache.work.add(name.clone()),
        }
        Ok(version)
    }

    async fn create(&self, name: &RegistrationName, record: &Record, live: &Live) -> Result<u64, RegistryError> {
        let uid = self.groups.borrow().get(&live.group).map(|group| group.uid.clone());
        let group_uid = uid.ok_or_else(|| {
            RegistryError::Unavailable(format!("the WorkloadGroup {} isn't there, or can't be read", live.group))
        })?;
        let known = record.memory.get().map(|memory| memory.content.id.clone());
        let object = object::new_war(name, live, &group_uid, known.as_deref()).map_err(RegistryError::Unavailable)?;
        let result = self.requests.create_war(name, &object).await;
        let war = self.or_conflict(name, result).await?;
        let (uid, mut version) = (war.uid.clone(), war.version);
        let written = war.live().map(|war| war.live.clone());
        self.cache.edit(name, |record| record.war.put(war.clone()));
        // One that ended after `record` was read has left its memory before its war could go, and so before this one could be made.
        let memory = self.requests.get_memory(Urgency::Join, name).await?;
        if memory.is_some_and(|memory| Some(&memory.content.id) != known.as_ref()) {
            self.delete_war(Urgency::Join, name, &uid, None).await?;
            return Err(self.conflict(name).await);
        }
        self.cache.edit(name, |record| record.verified = Some(uid));
        // A war without a status reads as one that is not yet connected.
        if written.as_ref() != Some(live)
            && let Some(before) = war.live()
        {
            version = self.update(name, &war, before, live).await?;
        }
        Ok(version)
    }

    async fn update(
        &self,
        name: &RegistrationName,
        war: &War,
        before: &LiveWar,
        new: &Live,
    ) -> Result<u64, RegistryError> {
        let old = &before.live;
        let settled = |live: &Live| Live {
            connection: old.connection.clone(),
            health: old.health.clone(),
            health_since: old.health_since,
            ..live.clone()
        };
        let decides = settled(new) != *old;
        let shows = new.connection != old.connection || new.health != old.health;
        let mut war = war.clone();
        // Where nothing changed it is sent nevertheless: it changes nothing, and shows whether the registry can be written.
        if decides || !shows {
            let object = object::with_live(name, &war, before, new).map_err(RegistryError::Unavailable)?;
            let result = self.requests.replace_war(Urgency::Join, name, &object).await;
            war = self.or_conflict(name, result).await?;
            self.cache.edit(name, |record| record.war.put(war.clone()));
        }
        if shows {
            let mut object = war.object().map_err(RegistryError::Unavailable)?;
            let boot = before.boot.with(self.standings.settled(name).0);
            let conditions = self.conditions(published_before(&object.data), new, &boot);
            object.data["status"] = object::status(&object, name, new, &boot, conditions, Timestamp::now());
            // An agent waits for its session, and not for what became of it, or of its health.
            let urgency = match &new.connection {
                Connection::Connected { .. } if new.connection != old.connection => Urgency::Join,
                _ => Urgency::Record,
            };
            let result = self.requests.replace_war_status(urgency, name, &object).await;
            war = self.or_conflict(name, result).await?;
            self.cache.edit(name, |record| record.war.put(war.clone()));
        }
        Ok(war.version)
    }

    /// From here on the registration is over, whoever carries out the rest.
    async fn end(&self, name: &RegistrationName, war: &War, ended: Option<&Ended>) -> Result<u64, RegistryError> {
        let object = object::with_end(name, war, ended).map_err(RegistryError::Unavailable)?;
        // Whose time is over isn't there to wait for it; who says goodbye is.
        let urgency = match war.live().map(|war| &war.live.connection) {
            Some(Connection::Disconnected { .. }) => Urgency::Record,
            _ => Urgency::Join,
        };
        let result = self.requests.replace_war(urgency, name, &object).await;
        let war = self.or_conflict(name, result).await?;
        let version = war.version;
        self.cache.edit(name, |record| record.war.put(war));
        Ok(version)
    }

    /// What is left to do once a war says that it ended: it is remembered elsewhere, then the war goes.
    pub(crate) async fn finish(&self, urgency: Urgency, name: &RegistrationName, war: &War) -> Result<(), CallError> {
        match &war.meaning {
            Meaning::Ended { ended, after } => {
                self.remember_end(urgency, name, &war.uid, ended, after.as_deref()).await?
            }
            Meaning::Forgotten => {
                if let Some(memory) = self.requests.get_memory(urgency, name).await? {
                    self.requests.delete_memory(urgency, &memory).await?;
                    self.cache.edit(name, |record| record.memory.deleted(&memory.uid));
                }
            }
            Meaning::Live(_) | Meaning::Foreign(_) => return Ok(()),
        }
        self.delete_war(urgency, name, &war.uid, Some(war.version)).await
    }

    async fn delete_war(
        &self,
        urgency: Urgency,
        name: &RegistrationName,
        uid: &str,
        version: Option<u64>,
    ) -> Result<(), CallError> {
        self.requests.delete_war(urgency, name, uid, version).await?;
        self.cache.edit(name, |record| record.war.deleted(uid));
        Ok(())
    }

    async fn remember_end(
        &self,
        urgency: Urgency,
        name: &RegistrationName,
        war: &str,
        ended: &Ended,
        after: Option<&str>,
    ) -> Result<(), CallError> {
        for _ in 0..MOST_LOOKS {
            let known = self.requests.get_memory(urgency, name).await?;
            let content = Content { id: Uuid::new_v4().to_string(), war: war.to_owned(), ended: ended.clone() };
            let version = match &known {
                None => None,
                Some(memory) if memory.content.war == war && memory.content.ended == *ended => {
                    self.cache.edit(name, |record| known.map(|memory| record.memory.put(memory)));
                    return Ok(());
                }
                Some(memory) if memory.content.war == war || Some(memory.content.id.as_str()) == after => {
                    Some(memory.version)
                }
                // The war was made without knowing of this end: it was none.
                Some(_) => {
                    self.cache.edit(name, |record| known.map(|memory| record.memory.put(memory)));
                    return Ok(());
                }
            };
            match self.requests.put_memory(urgency, name, &content, version).await {
                Ok(memory) => {
                    self.cache.edit(name, |record| record.memory.put(memory));
                    return Ok(());
                }
                Err(CallError::Conflict | CallError::Gone) => {}
                Err(error) => return Err(error),
            }
        }
        Err(CallError::Unavailable("what is remembered of it changes too often".to_owned()))
    }

    /// Of a war that somebody deleted: any key may come back. Where it went with its group, nobody has said so, and the key stays.
    async fn remember(&self, urgency: Urgency, name: &RegistrationName, lost: &Lost) -> Result<(), RegistryError> {
        let group_is_there =
            self.groups.borrow().get(&lost.war.live.group).is_some_and(|it| it.uid == lost.war.group_uid);
        let key = (!group_is_there).then(|| lost.war.live.key.clone());
        for _ in 0..MOST_LOOKS {
            let record = self.cache.get(name);
            let newer = record.war.get().is_some_and(|war| war.uid != lost.uid);
            let remembered = record.memory.get().is_some_and(|memory| memory.content.war == lost.uid);
            // One that was made without knowing of the end before it never was a registration.
            if !newer && !remembered && record.follows(&lost.war) {
                let ended = Ended { key: key.clone(), at: Timestamp::now() };
                let content = Content { id: Uuid::new_v4().to_string(), war: lost.uid.clone(), ended };
                let version = record.memory.get().map(|memory| memory.version);
                match self.requests.put_memory(urgency, name, &content, version).await {
                    Ok(memory) => {
                        tracing::info!(registration = %name, key_kept = key.is_some(), "a registration was deleted by somebody else");
                        self.cache.edit(name, |record| record.memory.put(memory));
                    }
                    Err(CallError::Conflict | CallError::Gone) => {
                        self.refresh(urgency, name).await?;
                        continue;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            self.cache.edit(name, |record| record.lost.take_if(|it| it.uid == lost.uid));
            return Ok(());
        }
        Err(RegistryError::Unavailable(format!("what is remembered of {name} changes too often")))
    }

    /// Puts what the reconciler found, and what is known of the agent's boot configuration, into the war's status, if it says anything
    /// else. `Some`: after so long there may be more to say.
    pub(crate) async fn show(
        &self,
        name: &RegistrationName,
        war: &War,
        published: Option<(&'static str, String)>,
    ) -> Result<Option<Duration>, CallError> {
        let Some(live) = war.live() else { return Ok(None) };
        let mut object = war.object().map_err(CallError::Unavailable)?;
        let before = published_before(&object.data);
        let published =
            (published.is_some() || before.is_some()).then_some(Condition { kind: PUBLISHED, problem: published });
        let (standing, again) = self.standings.settled(name);
        let boot = live.boot.with(standing);
        let conditions = self.conditions(published, &live.live, &boot);
        let status = object::status(&object, name, &live.live, &boot, conditions, Timestamp::now());
        if status["conditions"] == object.data["status"]["conditions"] && boot == live.boot {
            return Ok(again);
        }
        object.data["status"] = status;
        let war = self.requests.replace_war_status(Urgency::Upkeep, name, &object).await?;
        self.cache.edit(name, |record| record.war.put(war));
        Ok(again)
    }

    /// What is said of a registration beside its connection and its health.
    fn conditions(&self, published: Option<Condition>, live: &Live, boot: &BootState) -> Vec<serde_json::Value> {
        let ours = published.into_iter().chain(self.up_to_date(live, boot));
        ours.map(|it| it.to_json()).chain(admitted(&self.snapshots.borrow(), live)).collect()
    }

    fn up_to_date(&self, live: &Live, boot: &BootState) -> Option<Condition> {
        let now = self.groups.borrow().get(&live.group).map(|group| Boot::of(&group.group));
        boot.condition(now.as_ref(), matches!(live.connection, Connection::Connected { .. }))
    }
}

const PUBLISHED: &str = "Published";

/// As the reconciler left it.
fn published_before(data: &serde_json::Value) -> Option<Condition> {
    let conditions = data["status"]["conditions"].as_array();
    let it = conditions?.iter().find(|it| it["type"] == PUBLISHED)?;
    let reason = if it["reason"] == NO_ADDRESS { NO_ADDRESS } else { NOT_OURS };
    let message = it["message"].as_str().unwrap_or_default().to_owned();
    Some(Condition { kind: PUBLISHED, problem: (it["status"] != "True").then_some((reason, message)) })
}

/// The condition `Admitted`. `None`: what was said stays, as the registration is about to end, or nothing was read yet.
pub(crate) fn admitted(snapshot: &Snapshot, live: &Live) -> Option<serde_json::Value> {
    match snapshot.admits(live) {
        Admits::Policy { name, rule } => Some(war::admitted(Some((&name, rule)))),
        Admits::Unknown if snapshot.plane.is_some() => Some(war::admitted(None)),
        Admits::Unknown | Admits::Nobody => None,
    }
}

pub(crate) const NOT_OURS: &str = "WorkloadEntryNotOurs";
pub(crate) const NO_ADDRESS: &str = "NoAddress";
