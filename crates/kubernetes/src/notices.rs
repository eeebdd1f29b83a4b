//! Refusals as Events on the WorkloadGroup, for who looks after it: `kubectl describe workloadgroup ratings`.
//!
//! An agent that is refused asks again for ever, and a thousand may be refused for one reason: what is said again becomes a series of
//! one Event, written once a minute, and of different things a group gets so many at once and then one now and then (as client-go's
//! spam filter has it). The log and the audit log have all of them. `kube::runtime::events::Recorder` knows a series by its reason
//! alone, writes at each call, and waits for that.

use crate::names::{self, FIELD_MANAGER, MANAGED_BY};
use crate::source::ClusterView;
use crate::source::follow::chain;
use aws_lc_rs::digest;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::{Event, EventSeries};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use onboarding_core::name::GroupName;
use onboarding_endpoint::backend::{Notices, Refused};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use serde_json::json;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Refusals that wait to be taken in.
const QUEUE: usize = 1024;
/// Between two writes of one series.
const BETWEEN: Duration = Duration::from_secs(60);
/// New Events of one group at once, and how often another may come.
const BURST: u32 = 25;
const ANOTHER: Duration = Duration::from_secs(30);
/// Series and groups that are remembered.
const MOST_SERIES: usize = 2048;
const MOST_GROUPS: usize = 1024;
/// One that wasn't seen for so long begins anew (an API server keeps Events for an hour).
const FORGOTTEN: Duration = Duration::from_secs(30 * 60);
/// Between two writes of any kind.
const PACE: Duration = Duration::from_millis(100);
const TICK: Duration = Duration::from_secs(1);
const TRY: Duration = Duration::from_secs(5);
/// An API server takes no longer note.
const LONGEST_NOTE: usize = 1024;
const ACTION: &str = "Onboarding";

/// [`Notices`] as Events.
pub struct EventNotices {
    queue: mpsc::Sender<Refused>,
    metrics: Metrics,
}

/// Starts the writer, which runs until `stop`. `view`: which groups there are; a refusal for one that isn't there can't be an Event.
/// `replica`: this one's name.
pub fn start(
    client: Client,
    view: watch::Receiver<Arc<ClusterView>>,
    replica: String,
    metrics: &mut prometheus_client::registry::Registry,
    stop: CancellationToken,
) -> (Arc<EventNotices>, JoinHandle<anyhow::Result<()>>) {
    let (queue, refusals) = mpsc::channel(QUEUE);
    let metrics = Metrics::register(metrics);
    let writer = Writer { client, replica, book: Book::default(), metrics: metrics.clone() };
    let task = tokio::spawn(writer.run(refusals, view, stop));
    (Arc::new(EventNotices { queue, metrics }), task)
}

impl Notices for EventNotices {
    fn refused(&self, refused: Refused) {
        if self.queue.try_send(refused).is_err() {
            self.metrics.count("dropped");
        }
    }
}

struct Writer {
    client: Client,
    replica: String,
    book: Book,
    metrics: Metrics,
}

impl Writer {
    async fn run(
        mut self,
        mut refusals: mpsc::Receiver<Refused>,
        view: watch::Receiver<Arc<ClusterView>>,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                refused = refusals.recv() => {
                    let Some(refused) = refused else { return Ok(()) };
                    let uid = view.borrow().groups.get(&refused.group).map(|group| group.uid.clone());
                    match uid {
                        Some(uid) => {
                            let outcome = self.book.note(Subject::new(refused, uid), Instant::now());
                            if outcome == Noted::Suppressed {
                                self.metrics.count("suppressed");
                            }
                        }
                        // The endpoint has logged it.
                        None => self.metrics.count("no_group"),
                    }
                }
                _ = tick.tick() => {}
            }
            // Refusals that come meanwhile wait in the queue: nothing is lost by writing slowly but what is past its bounds.
            while let Some(due) = self.book.due(Instant::now()) {
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = self.write(due) => {}
                }
                tokio::time::sleep(PACE).await;
                if !refusals.is_empty() {
                    break;
                }
            }
        }
    }

    async fn write(&mut self, due: Due) {
        let api: Api<Event> = Api::namespaced(self.client.clone(), &due.subject.group.namespace);
        let written = match due.count {
            1 => self.create(&api, &due).await,
            count => match tokio::time::timeout(TRY, api.patch(&due.event, &patch(), &series(count))).await {
                // It was too old for the API server.
                Ok(Err(kube::Error::Api(status))) if status.code == 404 => self.create(&api, &due).await,
                result => outcome(result),
            },
        };
        match written {
            Ok(()) => self.metrics.count("written"),
            Err(problem) => {
                self.metrics.count("failed");
                tracing::warn!(
                    group = %due.subject.group,
                    reason = due.subject.reason,
                    problem,
                    "a refusal can't be written as an Event"
                );
            }
        }
    }

    async fn create(&self, api: &Api<Event>, due: &Due) -> Result<(), String> {
        let resource = names::workload_group();
        let GroupName { namespace, name } = due.subject.group.clone();
        let now = MicroTime(Timestamp::now());
        let event = Event {
            metadata: ObjectMeta {
                name: Some(due.event.clone()),
                namespace: Some(namespace.clone()),
                labels: Some([(MANAGED_BY.0.to_owned(), MANAGED_BY.1.to_owned())].into()),
                ..ObjectMeta::default()
            },
            regarding: Some(ObjectReference {
                api_version: Some(resource.api_version),
                kind: Some(resource.kind),
                namespace: Some(namespace),
                name: Some(name),
                uid: Some(due.subject.uid.clone()),
                ..ObjectReference::default()
            }),
            type_: Some("Warning".to_owned()),
            reason: Some(due.subject.reason.to_owned()),
            action: Some(ACTION.to_owned()),
            note: Some(due.subject.note.clone()),
            event_time: Some(now.clone()),
            series: (due.count > 1).then_some(EventSeries { count: due.count, last_observed_time: now }),
            reporting_controller: Some(FIELD_MANAGER.to_owned()),
            reporting_instance: Some(self.replica.clone()),
            ..Event::default()
        };
        let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
        outcome(tokio::time::timeout(TRY, api.create(&params, &event)).await)
    }
}

fn patch() -> PatchParams {
    PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}

fn series(count: i32) -> Patch<serde_json::Value> {
    let last_observed_time = MicroTime(Timestamp::now());
    Patch::Merge(json!({"series": EventSeries { count, last_observed_time }}))
}

fn outcome(result: Result<kube::Result<Event>, tokio::time::error::Elapsed>) -> Result<(), String> {
    match result {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(chain(&error)),
        Err(_) => Err(format!("not answered within {TRY:?}")),
    }
}

/// What one Event says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Subject {
    group: GroupName,
    /// Of the WorkloadGroup.
    uid: String,
    reason: &'static str,
    note: String,
}

impl Subject {
    fn new(refused: Refused, uid: String) -> Self {
        let note = match refused.identity {
            Some(identity) => format!("{}: {}", identity, refused.message),
            None => refused.message,
        };
        Self { group: refused.group, uid, reason: refused.reason, note: shortened(&note) }
    }

    /// The same for every replica and time would make them write over each other's; `salt` tells them apart.
    fn event_name(&self, salt: &uuid::Uuid) -> String {
        let text = format!("{}\n{}\n{}\n{salt}", self.uid, self.reason, self.note);
        let digest = digest::digest(&digest::SHA256, text.as_bytes());
        let digest: String = digest.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let name: String = self.group.name.chars().take(200).collect();
        format!("{}.{digest}", name.trim_end_matches(['.', '-']))
    }
}

/// In one line, and not longer than an API server takes.
fn shortened(note: &str) -> String {
    const MORE: &str = "...";
    let mut out = String::new();
    for c in note.chars() {
        let c = if c.is_control() { ' ' } else { c };
        if out.len() + c.len_utf8() > LONGEST_NOTE - MORE.len() {
            out.push_str(MORE);
            break;
        }
        out.push(c);
    }
    out
}

/// What was said, and how often. Pure.
#[derive(Default)]
struct Book {
    series: HashMap<Subject, Series>,
    groups: HashMap<GroupName, Budget>,
}

struct Series {
    event: String,
    /// How often it was seen, and how often of these was written.
    seen: i32,
    written: i32,
    last_write: Option<Instant>,
    last_seen: Instant,
}

/// How many new Events a group may still get.
struct Budget {
    left: u32,
    refilled: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Noted {
    Taken,
    /// Too many different things are said of the group.
    Suppressed,
}

/// To be written now: the first time where `count` is 1, else a series.
#[derive(Debug, PartialEq, Eq)]
struct Due {
    subject: Subject,
    event: String,
    count: i32,
}

impl Book {
    fn note(&mut self, subject: Subject, now: Instant) -> Noted {
        if let Some(series) = self.series.get_mut(&subject) {
            series.seen = series.seen.saturating_add(1);
            series.last_seen = now;
            return Noted::Taken;
        }
        if self.series.len() >= MOST_SERIES || self.groups.len() >= MOST_GROUPS {
            self.forget(now);
        }
        let may_grow = self.groups.len() < MOST_GROUPS || self.groups.contains_key(&subject.group);
        if self.series.len() >= MOST_SERIES || !may_grow {
            return Noted::Suppressed;
        }
        let budget = self.groups.entry(subject.group.clone()).or_insert(Budget { left: BURST, refilled: now });
        if !budget.take(now) {
            return Noted::Suppressed;
        }
        let event = subject.event_name(&uuid::Uuid::new_v4());
        let series = Series { event, seen: 1, written: 0, last_write: None, last_seen: now };
        self.series.insert(subject, series);
        Noted::Taken
    }

    /// The next one, which counts as written.
    fn due(&mut self, now: Instant) -> Option<Due> {
        let (subject, series) = self.series.iter_mut().find(|(_, series)| {
            series.seen > series.written
                && series.last_write.is_none_or(|at| now.saturating_duration_since(at) >= BETWEEN)
        })?;
        series.written = series.seen;
        series.last_write = Some(now);
        Some(Due { subject: subject.clone(), event: series.event.clone(), count: series.seen })
    }

    fn forget(&mut self, now: Instant) {
        self.series.retain(|_, series| now.saturating_duration_since(series.last_seen) < FORGOTTEN);
        self.groups.retain(|_, budget| {
            budget.refill(now);
            budget.left < BURST
        });
    }
}

impl Budget {
    fn refill(&mut self, now: Instant) {
        let periods = now.saturating_duration_since(self.refilled).as_secs() / ANOTHER.as_secs();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(periods).min(BURST);
        self.refilled += ANOTHER * periods;
    }

    fn take(&mut self, now: Instant) -> bool {
        self.refill(now);
        let had = self.left > 0;
        self.left = self.left.saturating_sub(1);
        had
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone)]
struct Metrics {
    events: Family<Outcome, Counter>,
}

impl Metrics {
    fn register(registry: &mut prometheus_client::registry::Registry) -> Self {
        let metrics = Self { events: Family::default() };
        registry.register(
            "onboarding_notices",
            "Refusals on their way to Events: written (one Event for many), failed, dropped (queue full), suppressed (too many of a group), no_group",
            metrics.events.clone(),
        );
        metrics
    }

    fn count(&self, outcome: &'static str) {
        self.events.get_or_create(&Outcome { outcome }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(name: &str, note: &str) -> Subject {
        let group = GroupName { namespace: "bookinfo".to_owned(), name: name.to_owned() };
        Subject { group, uid: "u".to_owned(), reason: "NotAuthorized", note: note.to_owned() }
    }

    #[test]
    fn what_is_said_again_is_written_once_a_minute() {
        let now = Instant::now();
        let mut book = Book::default();
        assert_eq!(book.note(subject("ratings", "no"), now), Noted::Taken);
        let first = book.due(now).unwrap();
        assert_eq!((first.count, book.due(now)), (1, None));
        let mut writes = Vec::new();
        for second in 1..=300 {
            let now = now + Duration::from_secs(second);
            book.note(subject("ratings", "no"), now);
            writes
                .extend(std::iter::from_fn(|| book.due(now)).map(|due| (second, due.event == first.event, due.count)));
        }
        assert_eq!(writes, [(60, true, 61), (120, true, 121), (180, true, 181), (240, true, 241), (300, true, 301)]);
        assert_eq!(book.due(now + Duration::from_secs(4000)), None);
    }

    #[test]
    fn a_group_gets_so_many_events_and_then_one_now_and_then() {
        let now = Instant::now();
        let mut book = Book::default();
        let taken = |book: &mut Book, group: &str, from: u32, now| {
            (from..from + 1000).filter(|n| book.note(subject(group, &n.to_string()), now) == Noted::Taken).count()
        };
        assert_eq!(taken(&mut book, "ratings", 0, now), 25);
        assert_eq!(taken(&mut book, "details", 0, now), 25);
        assert_eq!(taken(&mut book, "ratings", 1000, now + Duration::from_secs(29)), 0);
        assert_eq!(taken(&mut book, "ratings", 1000, now + Duration::from_secs(95)), 3);
        assert_eq!(taken(&mut book, "ratings", 9000, now + Duration::from_secs(1_000_000)), 25);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let now = Instant::now();
        let mut book = Book::default();
        for n in 0..3000 {
            book.note(subject(&n.to_string(), "no"), now);
        }
        assert_eq!((book.series.len(), book.groups.len()), (MOST_GROUPS, MOST_GROUPS));
        // And it is free again once that is old.
        assert_eq!(book.note(subject("later", "no"), now + FORGOTTEN), Noted::Taken);
        assert_eq!((book.series.len(), book.groups.len()), (1, 1));
    }

    #[test]
    fn a_note_is_one_line_that_an_api_server_takes() {
        assert_eq!(shortened("a\nb\u{7}"), "a b ");
        let long = shortened(&"ü".repeat(2000));
        assert!(long.len() <= LONGEST_NOTE && long.ends_with("..."), "{}", long.len());
        let name = subject(&"x".repeat(253), "no").event_name(&uuid::Uuid::nil());
        assert!(name.len() <= 253, "{name}");
    }
}
