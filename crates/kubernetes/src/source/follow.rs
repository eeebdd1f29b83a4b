//! One list and its watch, for ever.
//!
//! `kube::runtime::watcher` does the same, but says nothing while nothing changes: neither that a watch which broke stands again,
//! nor that the API server still answers. How old the plane's knowledge is decides here whom it lets in, so this one tells of each
//! sign of life (bookmarks, and a watch that is opened anew each minute), and waits for nothing without bounds.

use futures_util::StreamExt;
use kube::Api;
use kube::api::{DynamicObject, ListParams, WatchEvent, WatchParams};
use kube::core::Status;
use onboarding_runtime::backoff::{Backoff, with_jitter};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Objects of one list request.
const PAGE: u32 = 500;
/// An answer to one request.
const ANSWER: Duration = Duration::from_secs(15);
/// The API server ends a watch after this long (and up to half more), which shows that it is there.
const WATCH: Duration = Duration::from_secs(40);
/// A watch that the API server should have ended is given up after this long.
const OVERDUE: Duration = Duration::from_secs(10);
/// "That version is too old" comes as the first event of a watch that was granted.
const REFUSED_WITHIN: Duration = Duration::from_millis(250);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LONGEST_RETRY: Duration = Duration::from_secs(5);
/// What lasted so long was no failure.
const LASTED: Duration = Duration::from_secs(5);

/// What is watched.
#[derive(Clone)]
pub(crate) struct Watched {
    pub api: Api<DynamicObject>,
    pub labels: Option<String>,
    pub fields: Option<String>,
    /// Takes from each object what nobody needs, before anything is kept of it.
    pub slim: Arc<dyn Fn(&mut DynamicObject) + Send + Sync>,
}

#[derive(Debug)]
pub(crate) enum Change {
    /// All there is; what isn't in it is gone.
    Listed(Vec<DynamicObject>),
    Put(Box<DynamicObject>),
    Gone(Box<DynamicObject>),
    /// Nothing new, as of now.
    Heard,
    /// It is tried again; what is known may be old.
    Failing(String),
}

/// Why a list or watch ended.
enum Ended {
    /// What comes next isn't known: list again.
    Forgotten,
    Failed(String),
    /// Nobody listens any more.
    Unheard,
}

impl Watched {
    /// Until nobody listens. `tag` comes with each change, with the moment as of which it is true.
    pub(crate) async fn follow<T: Clone>(self, tag: T, changes: mpsc::Sender<(T, Instant, Change)>) {
        let told = Told { tag, changes };
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut version: Option<String> = None;
        loop {
            let started = Instant::now();
            let result = match &mut version {
                Some(version) => self.watch(version, &told).await,
                None => match self.list(&told).await {
                    Ok(listed) => {
                        version = Some(listed);
                        Ok(())
                    }
                    Err(ended) => Err(ended),
                },
            };
            let lasted = started.elapsed() > LASTED;
            match result {
                Ok(()) => {
                    if lasted {
                        backoff.reset();
                    }
                    continue;
                }
                Err(Ended::Unheard) => return,
                Err(Ended::Forgotten) => version = None,
                Err(Ended::Failed(problem)) => {
                    if told.tell(Instant::now(), Change::Failing(problem)).await.is_err() {
                        return;
                    }
                }
            }
            if lasted {
                backoff.reset();
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// Page by page; told only when it is whole. Returns the version to watch from.
    async fn list<T: Clone>(&self, told: &Told<T>) -> Result<String, Ended> {
        let asked = Instant::now();
        let mut params = ListParams {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            ..ListParams::default().limit(PAGE)
        };
        let mut objects = Vec::new();
        loop {
            let page = answer("listing", self.api.list(&params)).await?;
            objects.extend(page.items.into_iter().map(|object| self.slimmed(object)));
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => {
                    let version = page.metadata.resource_version.filter(|version| !version.is_empty());
                    let version = version.ok_or_else(|| Ended::Failed("a list without resourceVersion".to_owned()))?;
                    told.tell(asked, Change::Listed(objects)).await?;
                    return Ok(version);
                }
            }
        }
    }

    fn slimmed(&self, mut object: DynamicObject) -> DynamicObject {
        (self.slim)(&mut object);
        object
    }

    async fn watch<T: Clone>(&self, version: &mut String, told: &Told<T>) -> Result<(), Ended> {
        let length = with_jitter(WATCH);
        let params = WatchParams {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            timeout: u32::try_from(length.as_secs()).ok(),
            bookmarks: true,
            send_initial_events: false,
        };
        let started = Instant::now();
        let events = answer("watching", self.api.watch(&params, version)).await?;
        let mut events = std::pin::pin!(events);
        let mut changed = false;
        let mut patience = REFUSED_WITHIN;
        loop {
            let event = match tokio::time::timeout(patience, events.next()).await {
                Err(_) if patience == REFUSED_WITHIN => {
                    told.tell(Instant::now(), Change::Heard).await?;
                    patience = length + OVERDUE;
                    continue;
                }
                Ok(Some(Ok(event))) => event,
                Ok(Some(Err(error))) => return Err(failed("watching", &error)),
                Ok(None) if changed || started.elapsed() > LASTED => return Ok(()),
                Ok(None) => return Err(Ended::Failed("the watch ended as soon as it began".to_owned())),
                Err(_) => return Err(Ended::Failed("the watch fell silent".to_owned())),
            };
            let change = match event {
                WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                    *version = version_of(&object)?;
                    Change::Put(Box::new(self.slimmed(object)))
                }
                WatchEvent::Deleted(object) => {
                    *version = version_of(&object)?;
                    Change::Gone(Box::new(object))
                }
                WatchEvent::Bookmark(bookmark) => {
                    *version = bookmark.metadata.resource_version;
                    Change::Heard
                }
                WatchEvent::Error(status) => return Err(refused("watching", &status)),
            };
            changed = true;
            patience = length + OVERDUE;
            told.tell(Instant::now(), change).await?;
        }
    }
}

struct Told<T> {
    tag: T,
    changes: mpsc::Sender<(T, Instant, Change)>,
}

impl<T: Clone> Told<T> {
    async fn tell(&self, at: Instant, change: Change) -> Result<(), Ended> {
        self.changes.send((self.tag.clone(), at, change)).await.map_err(|_| Ended::Unheard)
    }
}

fn version_of(object: &DynamicObject) -> Result<String, Ended> {
    object
        .metadata
        .resource_version
        .clone()
        .ok_or_else(|| Ended::Failed("an object without resourceVersion".to_owned()))
}

async fn answer<V>(doing: &str, request: impl Future<Output = kube::Result<V>>) -> Result<V, Ended> {
    match tokio::time::timeout(ANSWER, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(failed(doing, &error)),
        Err(_) => Err(Ended::Failed(format!("{doing} wasn't answered within {ANSWER:?}"))),
    }
}

fn failed(doing: &str, error: &kube::Error) -> Ended {
    match error {
        kube::Error::Api(status) => refused(doing, status),
        error => Ended::Failed(format!("{doing} failed: {}", chain(error))),
    }
}

/// 410 Gone: the version is too old, or the rest of a list is.
fn refused(doing: &str, status: &Status) -> Ended {
    match status.code {
        410 => Ended::Forgotten,
        404 => Ended::Failed("this kind isn't served; are its CustomResourceDefinitions installed?".to_owned()),
        code => Ended::Failed(format!("{doing} was refused ({code}): {}", status.message)),
    }
}

/// With its causes, which say what is wrong.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        if !words.contains(&more) {
            words = format!("{words}: {more}");
        }
        source = error.source();
    }
    words
}
