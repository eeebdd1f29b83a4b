//! What others make of wars, memories and entries. The watches survive disconnection: they are taken up where they ended, or listed anew.

use super::cache::{Cache, Record};
use super::entry::Entry;
use super::memory;
use super::object::{War, name_of};
use super::store::Store;
use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::DynamicObject;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use onboarding_core::name::RegistrationName;
use std::collections::HashSet;
use std::pin::pin;
use tokio::sync::watch;

/// How far the first lists are, and what last went wrong.
#[derive(Debug, Default, Clone)]
pub(crate) struct Progress {
    pub wars: bool,
    pub memories: bool,
    pub entries: bool,
    pub problem: Option<String>,
}

impl Progress {
    pub(crate) fn is_complete(&self) -> bool {
        self.wars && self.memories && self.entries
    }
}

/// One kind of object in the cache.
trait Kind {
    type Object: Send + 'static;
    const WHAT: &'static str;
    fn name(object: &Self::Object) -> Option<RegistrationName>;
    /// Whether it was news.
    fn put(cache: &Cache, name: &RegistrationName, object: Self::Object) -> bool;
    fn deleted(cache: &Cache, name: &RegistrationName, object: Self::Object) -> bool;
    /// A list came without it.
    fn missing(record: &mut Record);
    fn is_known(record: &Record) -> bool;
    /// Who is told of news.
    fn tell(cache: &Cache, name: &RegistrationName) {
        cache.changed(name);
    }
}

struct Wars;
struct Memories;
struct Entries;

impl Kind for Wars {
    type Object = DynamicObject;
    const WHAT: &'static str = "WorkloadAutoRegistrations";
    fn name(object: &DynamicObject) -> Option<RegistrationName> {
        name_of(&object.metadata)
    }
    fn put(cache: &Cache, name: &RegistrationName, object: DynamicObject) -> bool {
        match War::read(name, object) {
            Ok(war) => cache.edit(name, |record| record.war.put(war)),
            Err(problem) => {
                tracing::warn!(registration = %name, problem, "a registration can't be read");
                false
            }
        }
    }
    fn deleted(cache: &Cache, name: &RegistrationName, object: DynamicObject) -> bool {
        let Ok(war) = War::read(name, object) else { return false };
        cache.edit(name, |record| {
            let known = record.war.get().is_some_and(|it| it.uid == war.uid);
            record.war_ended(&war.uid, Some(&war));
            known || record.lost.is_some()
        })
    }
    fn missing(record: &mut Record) {
        // It may have been made while the list was on its way.
        record.suspect = true;
    }
    fn is_known(record: &Record) -> bool {
        record.war.get().is_some()
    }
}

impl Kind for Memories {
    type Object = ConfigMap;
    const WHAT: &'static str = "memories of registrations";
    fn name(object: &ConfigMap) -> Option<RegistrationName> {
        memory::registration_of(object)
    }
    fn put(cache: &Cache, name: &RegistrationName, object: ConfigMap) -> bool {
        match memory::from_object(name, &object) {
            Ok(memory) => cache.edit(name, |record| record.memory.put(memory)),
            Err(problem) => {
                tracing::warn!(registration = %name, problem, "what is remembered of a registration can't be read");
                cache.edit(name, |record| record.suspect = true);
                false
            }
        }
    }
    fn deleted(cache: &Cache, name: &RegistrationName, object: ConfigMap) -> bool {
        let uid = object.metadata.uid.unwrap_or_default();
        cache.edit(name, |record| record.memory.ended(&uid)).is_some()
    }
    fn missing(record: &mut Record) {
        record.suspect = true;
    }
    fn is_known(record: &Record) -> bool {
        record.memory.get().is_some()
    }
}

impl Kind for Entries {
    type Object = DynamicObject;
    const WHAT: &'static str = "WorkloadEntries";
    fn name(object: &DynamicObject) -> Option<RegistrationName> {
        name_of(&object.metadata)
    }
    fn put(cache: &Cache, name: &RegistrationName, object: DynamicObject) -> bool {
        match Entry::read(object) {
            Ok((_, entry)) => cache.edit(name, |record| record.entry.put(entry)),
            Err(problem) => {
                tracing::warn!(registration = %name, problem, "a WorkloadEntry can't be read");
                false
            }
        }
    }
    fn deleted(cache: &Cache, name: &RegistrationName, object: DynamicObject) -> bool {
        let uid = object.metadata.uid.unwrap_or_default();
        cache.edit(name, |record| record.entry.ended(&uid)).is_some()
    }
    fn missing(record: &mut Record) {
        if let Some(uid) = record.entry.get().map(|entry| entry.uid.clone()) {
            record.entry.ended(&uid);
        }
    }
    fn is_known(record: &Record) -> bool {
        record.entry.get().is_some()
    }
    fn tell(cache: &Cache, name: &RegistrationName) {
        cache.heard.add(name.clone());
    }
}

/// Wars first, then memories: of what is in the first list of wars, whatever was remembered before is in the first list of memories.
pub(crate) async fn watch_all(store: &Store, progress: &watch::Sender<Progress>) {
    let wars =
        follow::<Wars>(store, stream(store.requests.wars(), watcher::Config::default()), progress, |it| &mut it.wars);
    let memories = async {
        let mut wars = progress.subscribe();
        // The sender is borrowed here: it doesn't end.
        let _ = wars.wait_for(|it| it.wars).await;
        let first: Vec<_> = store.cache.names(|record| record.war.get().is_some());
        let first: Vec<_> =
            first.into_iter().filter_map(|name| Some((store.cache.get(&name).war.get()?.uid.clone(), name))).collect();
        let verify = async {
            let _ = progress.subscribe().wait_for(|it| it.memories).await;
            for (uid, name) in first {
                store.cache.edit(&name, |record| record.verified = Some(uid));
            }
            std::future::pending::<()>().await;
        };
        let config = watcher::Config::default().labels(&format!("{}={}", memory::LABEL.0, memory::LABEL.1));
        let memories =
            follow::<Memories>(store, stream(store.requests.memories(), config), progress, |it| &mut it.memories);
        tokio::join!(memories, verify);
    };
    let entries =
        follow::<Entries>(store, stream(store.requests.entries(), watcher::Config::default()), progress, |it| {
            &mut it.entries
        });
    tokio::join!(wars, memories, entries);
}

fn stream<K>(api: Api<K>, config: watcher::Config) -> impl Stream<Item = watcher::Result<Event<K>>>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    watcher(api, config).default_backoff()
}

async fn follow<K: Kind>(
    store: &Store,
    events: impl Stream<Item = watcher::Result<Event<K::Object>>>,
    progress: &watch::Sender<Progress>,
    done: fn(&mut Progress) -> &mut bool,
) {
    let cache = &store.cache;
    let mut events = pin!(events);
    let mut listed = HashSet::new();
    let mut first = true;
    let mut failing = false;
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                if !failing {
                    failing = true;
                    tracing::warn!(%error, what = K::WHAT, "the API server doesn't say what changes; what is known stays, and it is tried again");
                }
                progress.send_modify(|it| it.problem = Some(error.to_string()));
                continue;
            }
        };
        if failing {
            failing = false;
            progress.send_modify(|it| it.problem = None);
            tracing::info!(what = K::WHAT, "the API server says again what changes");
        }
        match event {
            Event::Init => listed.clear(),
            Event::InitApply(object) => {
                let Some(name) = K::name(&object) else { continue };
                listed.insert(name.clone());
                if K::put(cache, &name, object) {
                    if first {
                        cache.work.add(name);
                    } else {
                        K::tell(cache, &name);
                    }
                }
            }
            Event::InitDone => {
                for name in cache.names(K::is_known).into_iter().filter(|name| !listed.contains(name)) {
                    cache.edit(&name, K::missing);
                    K::tell(cache, &name);
                }
                listed = HashSet::new();
                first = false;
                progress.send_modify(|it| *done(it) = true);
            }
            Event::Apply(object) => {
                let Some(name) = K::name(&object) else { continue };
                if K::put(cache, &name, object) {
                    K::tell(cache, &name);
                }
            }
            Event::Delete(object) => {
                let Some(name) = K::name(&object) else { continue };
                if K::deleted(cache, &name, object) {
                    K::tell(cache, &name);
                }
            }
        }
    }
}
