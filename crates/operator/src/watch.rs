//! What may change what a pass finds: a change of any of it is one wake-up, whatever changed.

use crate::config;
use crate::objects::{self, CONFIG_MAP, CONTROL_PLANE, Kind, NAMESPACE, RENDERED, SECRET, SERVICE};
use futures_util::StreamExt;
use kube::api::{DynamicObject, PartialObjectMeta};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Config, watcher};
use kube::{Api, Client};
use onboarding_runtime::backoff::Backoff;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;

const FIRST_RETRY: Duration = Duration::from_millis(200);
/// Also how late a change may be noticed after the API server's return.
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Watches what is rendered (by its labels), and what is rendered from: ControlPlanes, Secrets, Services, the namespace. Only metadata travels.
/// The tasks never end by themselves.
pub fn start(client: &Client, namespace: &str, wake: &Arc<Notify>) -> JoinSet<()> {
    let all = Config::default;
    let named = |name: &str| all().fields(&format!("metadata.name={name}"));
    let ours = all().labels(&objects::selector(namespace));
    // Of Secrets and Services those of others count too: the endpoint's certificate, istiod.
    let rendered = RENDERED.into_iter().filter(|kind| ![SECRET, SERVICE].contains(kind));
    let watched = rendered.map(|kind| (kind, ours.clone())).chain([
        (CONTROL_PLANE, all()),
        (SECRET, all()),
        (SERVICE, all()),
        (NAMESPACE, named(namespace)),
        // Also one that somebody else makes under this name.
        (CONFIG_MAP, named(config::NAME)),
    ]);
    let mut tasks = JoinSet::new();
    for (kind, config) in watched {
        tasks.spawn(follow(kind, kind.api(client, namespace), config, wake.clone()));
    }
    tasks
}

async fn follow(kind: Kind, api: Api<PartialObjectMeta<DynamicObject>>, config: Config, wake: Arc<Notify>) {
    let backoff = Retry(Backoff::new(FIRST_RETRY, LONGEST_RETRY));
    let mut events = std::pin::pin!(watcher(api, config).backoff(backoff));
    let mut failing = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => {}
            Ok(_) => {
                failing = false;
                wake.notify_one();
            }
            Err(error) => {
                // A pass says what is wrong; this is why it may come late.
                if !failing {
                    tracing::warn!(objects = kind.plural, %error, "changes can't be watched; it is tried again");
                }
                failing = true;
            }
        }
    }
}

struct Retry(Backoff);

impl Iterator for Retry {
    type Item = Duration;
    fn next(&mut self) -> Option<Duration> {
        Some(self.0.next_delay())
    }
}

impl kube::runtime::utils::Backoff for Retry {
    fn reset(&mut self) {
        self.0.reset();
    }
}
