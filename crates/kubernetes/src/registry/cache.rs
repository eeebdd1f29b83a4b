//! What this replica knows of each registration's objects: as the informers told, and as its own writes left them.

use super::entry::Entry;
use super::memory::Memory;
use super::object::{LiveWar, Meaning, War};
use futures_util::stream::{self, BoxStream, StreamExt};
use onboarding_core::name::RegistrationName;
use onboarding_core::registration::State;
use onboarding_endpoint::backend::Stored;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// One object of a name, in the newest version that is known.
#[derive(Debug, Clone)]
pub(crate) struct Slot<T> {
    current: Option<Arc<T>>,
    /// The uid of one that this process deleted: older news of it may still be on the way.
    gone: Option<String>,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self { current: None, gone: None }
    }
}

pub(crate) trait Versioned {
    fn uid(&self) -> &str;
    fn version(&self) -> u64;
}

impl Versioned for War {
    fn uid(&self) -> &str {
        &self.uid
    }
    fn version(&self) -> u64 {
        self.version
    }
}
impl Versioned for Memory {
    fn uid(&self) -> &str {
        &self.uid
    }
    fn version(&self) -> u64 {
        self.version
    }
}
impl Versioned for Entry {
    fn uid(&self) -> &str {
        &self.uid
    }
    fn version(&self) -> u64 {
        self.version
    }
}

impl<T: Versioned> Slot<T> {
    pub(crate) fn get(&self) -> Option<&Arc<T>> {
        self.current.as_ref()
    }
    /// Whether that was news.
    pub(crate) fn put(&mut self, new: T) -> bool {
        let known = self.current.as_ref().is_some_and(|current| current.version() >= new.version());
        if known || self.gone.as_deref() == Some(new.uid()) {
            return false;
        }
        self.current = Some(Arc::new(new));
        true
    }
    /// This process deleted it.
    pub(crate) fn deleted(&mut self, uid: &str) {
        self.take(uid);
        self.gone = Some(uid.to_owned());
    }
    /// The last news of it came: what it was, if it was still known.
    pub(crate) fn ended(&mut self, uid: &str) -> Option<Arc<T>> {
        if self.gone.as_deref() == Some(uid) {
            self.gone = None;
        }
        self.take(uid)
    }
    fn take(&mut self, uid: &str) -> Option<Arc<T>> {
        self.current.take_if(|current| current.uid() == uid)
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Record {
    pub war: Slot<War>,
    pub memory: Slot<Memory>,
    pub entry: Slot<Entry>,
    /// The uid of the war that is known to have been made in knowledge of what was remembered then.
    pub verified: Option<String>,
    /// A live war that is gone, and of which nothing is remembered yet.
    pub lost: Option<Lost>,
    /// A list lacked what is known here.
    pub suspect: bool,
}

/// A registration that somebody deleted.
#[derive(Debug, Clone)]
pub(crate) struct Lost {
    pub uid: String,
    pub war: LiveWar,
}

/// What a record says of the registration.
pub(crate) enum View {
    Known(Stored),
    Foreign(String),
    /// It can't be said without asking the API server.
    Look,
}

impl Record {
    /// What a decision may be made on.
    pub(crate) fn view(&self) -> View {
        self.read(|war| self.verified.as_ref() == Some(&war.uid))
    }

    /// The same, also of a war that another replica made and that nobody here has checked yet: enough for upkeep, as what comes of
    /// it is checked before an agent gets anything by it.
    pub(crate) fn seems(&self) -> View {
        self.read(|_| true)
    }

    fn read(&self, is_verified: impl FnOnce(&War) -> bool) -> View {
        if self.suspect || self.lost.is_some() {
            return View::Look;
        }
        let memory = self.memory.get();
        let remembered = |memory: &Memory| {
            View::Known(Stored { state: State::Ended(memory.content.ended.clone()), version: memory.version })
        };
        let Some(war) = self.war.get() else {
            return memory.map_or(View::Known(Stored { state: State::Absent, version: 0 }), |it| remembered(it));
        };
        let known = |state| View::Known(Stored { state, version: war.version });
        match &war.meaning {
            Meaning::Foreign(words) => View::Foreign(words.clone()),
            Meaning::Ended { ended, .. } => known(State::Ended(ended.clone())),
            Meaning::Forgotten => known(State::Absent),
            Meaning::Live(_) if war.deleting => match memory {
                Some(memory) if memory.content.war == war.uid => remembered(memory),
                _ => View::Look,
            },
            Meaning::Live(live) if is_verified(war) && self.follows(live) => {
                known(State::Live(Box::new(live.live.clone())))
            }
            Meaning::Live(_) => View::Look,
        }
    }

    /// Whether this registration was made in knowledge of what is remembered of the ones before.
    pub(crate) fn follows(&self, live: &LiveWar) -> bool {
        self.memory.get().is_none_or(|memory| live.after.as_ref() == Some(&memory.content.id))
    }

    /// The war is gone. Unless that was its end, somebody deleted it.
    pub(crate) fn war_ended(&mut self, uid: &str, last: Option<&War>) {
        let deleted_here = self.war.gone.as_deref() == Some(uid);
        let was = self.war.ended(uid);
        if deleted_here {
            return;
        }
        let last = last.or(was.as_deref());
        if let Some(live) = last.and_then(War::live)
            && self.memory.get().is_none_or(|memory| memory.content.war != uid)
            && self.war.current.is_none()
        {
            self.lost = Some(Lost { uid: uid.to_owned(), war: live.clone() });
        }
    }

    fn is_empty(&self) -> bool {
        self.war.current.is_none()
            && self.war.gone.is_none()
            && self.memory.current.is_none()
            && self.memory.gone.is_none()
            && self.entry.current.is_none()
            && self.entry.gone.is_none()
            && self.lost.is_none()
            && !self.suspect
    }
}

#[derive(Debug, Default)]
pub(crate) struct Cache {
    records: Mutex<HashMap<RegistrationName, Record>>,
    /// What changed without a `store` here.
    pub changes: Arc<Names>,
    /// What the reconciler has to look at.
    pub work: Arc<Names>,
    /// The same, but another replica may be at it already.
    pub heard: Arc<Names>,
}

impl Cache {
    pub(crate) fn get(&self, name: &RegistrationName) -> Record {
        self.lock().get(name).cloned().unwrap_or_default()
    }
    pub(crate) fn view(&self, name: &RegistrationName) -> View {
        self.lock().get(name).map_or_else(|| Record::default().view(), Record::view)
    }
    pub(crate) fn seems(&self, name: &RegistrationName) -> View {
        self.lock().get(name).map_or_else(|| Record::default().seems(), Record::seems)
    }
    pub(crate) fn edit<R>(&self, name: &RegistrationName, edit: impl FnOnce(&mut Record) -> R) -> R {
        let mut records = self.lock();
        let record = records.entry(name.clone()).or_default();
        let result = edit(record);
        if record.is_empty() {
            records.remove(name);
        }
        result
    }
    pub(crate) fn names(&self, which: impl Fn(&Record) -> bool) -> Vec<RegistrationName> {
        let records = self.lock();
        records.iter().filter(|(_, record)| which(record)).map(|(name, _)| name.clone()).collect()
    }
    /// Somebody else wrote or deleted.
    pub(crate) fn changed(&self, name: &RegistrationName) {
        self.changes.add(name.clone());
        self.heard.add(name.clone());
    }
    fn lock(&self) -> MutexGuard<'_, HashMap<RegistrationName, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names that wait for one listener; each at most once, first come, first served, but for those that are added first.
#[derive(Debug, Default)]
pub(crate) struct Names {
    waiting: Mutex<Waiting>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    order: VecDeque<RegistrationName>,
    names: HashSet<RegistrationName>,
}

impl Names {
    pub(crate) fn add(&self, name: RegistrationName) {
        {
            let mut waiting = self.lock();
            if waiting.names.insert(name.clone()) {
                waiting.order.push_back(name);
            }
        }
        self.wake.notify_one();
    }
    /// Before all that wait.
    pub(crate) fn add_first(&self, name: RegistrationName) {
        {
            let mut waiting = self.lock();
            if !waiting.names.insert(name.clone()) {
                waiting.order.retain(|waits| *waits != name);
            }
            waiting.order.push_front(name);
        }
        self.wake.notify_one();
    }
    pub(crate) async fn next(&self) -> RegistrationName {
        loop {
            if let Some(name) = self.lock().take() {
                return name;
            }
            self.wake.notified().await;
        }
    }
    pub(crate) fn stream(self: Arc<Self>) -> BoxStream<'static, RegistrationName> {
        stream::unfold(self, |names| async move { Some((names.next().await, names)) }).boxed()
    }
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn take(&mut self) -> Option<RegistrationName> {
        let name = self.order.pop_front()?;
        self.names.remove(&name);
        Some(name)
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
