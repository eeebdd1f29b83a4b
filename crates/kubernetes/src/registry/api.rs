//! Requests to the API server: bounded in number and in time, joins before upkeep, tried again where that can help.

use super::entry::Entry;
use super::memory::{self, Content, Memory};
use super::object::War;
use crate::names::{FIELD_MANAGER, workload_auto_registration, workload_entry};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client};
use onboarding_core::name::RegistrationName;
use onboarding_runtime::backoff::{Backoff, with_jitter};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use serde_json::Value;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Requests at the same time.
const AT_ONCE: usize = 32;
/// Of these, at most so many that no agent waits for. Together they leave some to those who join, however many registrations are lost or
/// end at the same time.
const RECORDS_AT_ONCE: usize = 12;
const UPKEEP_AT_ONCE: usize = 8;
/// One try.
const TRY: Duration = Duration::from_secs(5);
/// All tries of one request that an agent waits for.
const JOIN_WITHIN: Duration = Duration::from_secs(10);
const UPKEEP_WITHIN: Duration = Duration::from_secs(20);
const FIRST_DELAY: Duration = Duration::from_millis(50);
const LONGEST_DELAY: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// An agent waits for it.
    Join,
    /// What became of a registration whose agent isn't there, or goes on meanwhile.
    Record,
    /// Entries, conditions, what is left of a registration that ended.
    Upkeep,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The object isn't in the version that was expected, or is there already, or a field of it belongs to somebody else.
    #[error("somebody else wrote it meanwhile")]
    Conflict,
    #[error("it is gone")]
    Gone,
    /// What was asked can't be done; trying again doesn't help.
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Unavailable(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Request {
    request: &'static str,
    outcome: &'static str,
}

pub(crate) struct Requests {
    client: Client,
    namespace: String,
    all: Semaphore,
    records: Semaphore,
    upkeep: Semaphore,
    counted: Family<Request, Counter>,
    in_flight: Gauge,
}

/// A request from before its turn until it is counted.
struct InFlight<'a>(&'a Gauge);

impl<'a> InFlight<'a> {
    fn new(gauge: &'a Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Requests {
    pub(crate) fn new(client: Client, namespace: String, metrics: &mut prometheus_client::registry::Registry) -> Self {
        let counted = Family::<Request, Counter>::default();
        metrics.register("api_requests", "Requests of the registry to the API server, by outcome", counted.clone());
        let in_flight = Gauge::default();
        let help = "Requests of the registry to the API server that wait for their turn or for an answer";
        metrics.register("api_requests_in_flight", help, in_flight.clone());
        let [all, records, upkeep] = [AT_ONCE, RECORDS_AT_ONCE, UPKEEP_AT_ONCE].map(Semaphore::new);
        Self { client, namespace, all, records, upkeep, counted, in_flight }
    }

    pub(crate) fn wars(&self) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &workload_auto_registration())
    }
    pub(crate) fn entries(&self) -> Api<DynamicObject> {
        Api::all_with(self.client.clone(), &workload_entry())
    }
    pub(crate) fn memories(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }
    fn wars_of(&self, name: &RegistrationName) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &name.namespace, &workload_auto_registration())
    }
    fn entries_of(&self, name: &RegistrationName) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), &name.namespace, &workload_entry())
    }

    pub(crate) async fn get_war(&self, urgency: Urgency, name: &RegistrationName) -> Result<Option<War>, CallError> {
        let api = self.wars_of(name);
        let object = self.call(urgency, "get war", || api.get_opt(&name.name)).await?;
        object.map(|object| War::read(name, object).map_err(CallError::Unavailable)).transpose()
    }

    pub(crate) async fn create_war(&self, name: &RegistrationName, object: &DynamicObject) -> Result<War, CallError> {
        let (api, params) = (self.wars_of(name), post());
        let object = self.call(Urgency::Join, "create war", || api.create(&params, object)).await?;
        War::read(name, object).map_err(CallError::Unavailable)
    }

    /// Conditional on the version in the object.
    pub(crate) async fn replace_war(
        &self,
        urgency: Urgency,
        name: &RegistrationName,
        object: &DynamicObject,
    ) -> Result<War, CallError> {
        let (api, params) = (self.wars_of(name), post());
        let object = self.call(urgency, "update war", || api.replace(&name.name, &params, object)).await?;
        War::read(name, object).map_err(CallError::Unavailable)
    }

    /// Conditional on the version in the object.
    pub(crate) async fn replace_war_status(
        &self,
        urgency: Urgency,
        name: &RegistrationName,
        object: &DynamicObject,
    ) -> Result<War, CallError> {
        let (api, params) = (self.wars_of(name), post());
        let object =
            self.call(urgency, "update war status", || api.replace_status(&name.name, &params, object)).await?;
        War::read(name, object).map_err(CallError::Unavailable)
    }

    /// Only this very object, and only in this version where one is given. One that is gone is deleted.
    pub(crate) async fn delete_war(
        &self,
        urgency: Urgency,
        name: &RegistrationName,
        uid: &str,
        version: Option<u64>,
    ) -> Result<(), CallError> {
        let (api, params) = (self.wars_of(name), only(uid, version));
        gone_is_done(self.call(urgency, "delete war", || api.delete(&name.name, &params)).await)
    }

    pub(crate) async fn get_memory(
        &self,
        urgency: Urgency,
        name: &RegistrationName,
    ) -> Result<Option<Memory>, CallError> {
        let (api, object_name) = (self.memories(), memory::object_name(name));
        match self.call(urgency, "get memory", || api.get_opt(&object_name)).await? {
            Some(object) => self.memory(name, &object).map(Some),
            None => Ok(None),
        }
    }

    /// Creates it (`None`), or replaces the one of this version.
    pub(crate) async fn put_memory(
        &self,
        urgency: Urgency,
        name: &RegistrationName,
        content: &Content,
        version: Option<u64>,
    ) -> Result<Memory, CallError> {
        let (api, params) = (self.memories(), post());
        let object = memory::to_object(name, content, version);
        let object_name = memory::object_name(name);
        let object = match version {
            None => self.call(urgency, "create memory", || api.create(&params, &object)).await?,
            Some(_) => self.call(urgency, "update memory", || api.replace(&object_name, &params, &object)).await?,
        };
        self.memory(name, &object)
    }

    pub(crate) async fn delete_memory(&self, urgency: Urgency, memory: &Memory) -> Result<(), CallError> {
        let (api, params) = (self.memories(), only(&memory.uid, Some(memory.version)));
        let object_name = memory::object_name(&memory.name);
        gone_is_done(self.call(urgency, "delete memory", || api.delete(&object_name, &params)).await)
    }

    fn memory(&self, name: &RegistrationName, object: &ConfigMap) -> Result<Memory, CallError> {
        memory::from_object(name, object).map_err(|problem| {
            let object = memory::object_name(name);
            let namespace = &self.namespace;
            CallError::Refused(format!(
                "what is remembered of {name} can't be read ({problem}): `kubectl delete configmap -n {namespace} {object}` forgets it, and any key may come then"
            ))
        })
    }

    /// `force`: fields that others wrote become ours. Without it, they are a conflict.
    pub(crate) async fn apply_entry(
        &self,
        name: &RegistrationName,
        object: &Value,
        force: bool,
    ) -> Result<Entry, CallError> {
        let api = self.entries_of(name);
        let params = PatchParams { force, ..PatchParams::apply(FIELD_MANAGER) };
        let patch = Patch::Apply(object);
        let object = self.call(Urgency::Upkeep, "apply entry", || api.patch(&name.name, &params, &patch)).await?;
        Entry::read(object).map(|(_, entry)| entry).map_err(CallError::Unavailable)
    }

    pub(crate) async fn patch_entry_status(&self, name: &RegistrationName, patch: &Value) -> Result<Entry, CallError> {
        let api = self.entries_of(name);
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        let patch = Patch::Merge(patch);
        let object =
            self.call(Urgency::Upkeep, "update entry status", || api.patch_status(&name.name, &params, &patch)).await?;
        Entry::read(object).map(|(_, entry)| entry).map_err(CallError::Unavailable)
    }

    pub(crate) async fn get_entry(&self, name: &RegistrationName) -> Result<Option<Entry>, CallError> {
        let api = self.entries_of(name);
        let object = self.call(Urgency::Upkeep, "get entry", || api.get_opt(&name.name)).await?;
        object.map(|it| Entry::read(it).map(|(_, entry)| entry).map_err(CallError::Unavailable)).transpose()
    }

    pub(crate) async fn delete_entry(&self, name: &RegistrationName, uid: &str) -> Result<(), CallError> {
        let (api, params) = (self.entries_of(name), only(uid, None));
        gone_is_done(self.call(Urgency::Upkeep, "delete entry", || api.delete(&name.name, &params)).await)
    }

    async fn call<T, F: Future<Output = kube::Result<T>>>(
        &self,
        urgency: Urgency,
        request: &'static str,
        make: impl Fn() -> F,
    ) -> Result<T, CallError> {
        let within = match urgency {
            Urgency::Join => JOIN_WITHIN,
            Urgency::Record | Urgency::Upkeep => UPKEEP_WITHIN,
        };
        let deadline = Instant::now() + within;
        let _in_flight = InFlight::new(&self.in_flight);
        let result = tokio::time::timeout_at(deadline, async {
            // First in, first out: an agent waits behind at most this much of the rest.
            let _turn = match urgency {
                Urgency::Join => None,
                Urgency::Record => self.records.acquire().await.ok(),
                Urgency::Upkeep => self.upkeep.acquire().await.ok(),
            };
            let mut backoff = Backoff::new(FIRST_DELAY, LONGEST_DELAY);
            loop {
                let result = {
                    let _permit = self.all.acquire().await.ok();
                    tokio::time::timeout(TRY, make()).await
                };
                let (error, asked) = match result {
                    Ok(Ok(value)) => return Ok(value),
                    Ok(Err(error)) => judge(&error),
                    Err(_) => (CallError::Unavailable(format!("no answer within {TRY:?}")), None),
                };
                let CallError::Unavailable(words) = error else { return Err(error) };
                let delay = asked.map_or_else(|| backoff.next_delay(), with_jitter);
                if Instant::now() + delay >= deadline {
                    return Err(CallError::Unavailable(words));
                }
                self.count(request, "retried");
                tokio::time::sleep(delay).await;
            }
        })
        .await
        .unwrap_or_else(|_| Err(CallError::Unavailable(format!("not done within {within:?}"))));
        self.count(
            request,
            match &result {
                Ok(_) => "done",
                Err(CallError::Conflict) => "conflict",
                Err(CallError::Gone) => "gone",
                Err(CallError::Refused(_)) => "refused",
                Err(CallError::Unavailable(_)) => "unavailable",
            },
        );
        result.map_err(|error| match error {
            CallError::Unavailable(words) => CallError::Unavailable(format!("the API server ({request}): {words}")),
            CallError::Refused(words) => CallError::Refused(format!("the API server refused ({request}): {words}")),
            error => error,
        })
    }

    fn count(&self, request: &'static str, outcome: &'static str) {
        self.counted.get_or_create(&Request { request, outcome }).inc();
    }
}

/// What an error means, and when the server wants to be asked again.
fn judge(error: &kube::Error) -> (CallError, Option<Duration>) {
    let kube::Error::Api(status) = error else {
        return (CallError::Unavailable(chain(error)), None);
    };
    let words = || format!("{} ({})", status.message, status.code);
    let asked = status.details.as_ref().map_or(0, |details| details.retry_after_seconds);
    let asked = (asked > 0).then(|| Duration::from_secs(asked.into()));
    match status.code {
        409 => (CallError::Conflict, None),
        404 => (CallError::Gone, None),
        // 401: the API server doesn't know a key yet, or our own token is being renewed.
        401 | 408 | 429 | 500.. => (CallError::Unavailable(words()), asked),
        _ => (CallError::Refused(words()), None),
    }
}

fn chain(error: &kube::Error) -> String {
    let mut words = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        let next = error.to_string();
        if !words.contains(&next) {
            words = format!("{words}: {next}");
        }
        source = error.source();
    }
    words
}

fn post() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}

fn only(uid: &str, version: Option<u64>) -> DeleteParams {
    DeleteParams::background().preconditions(Preconditions {
        uid: Some(uid.to_owned()),
        resource_version: version.map(|version| version.to_string()),
    })
}

fn gone_is_done<T>(result: Result<T, CallError>) -> Result<(), CallError> {
    match result {
        Ok(_) | Err(CallError::Gone) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::response::{Status, StatusDetails};

    #[test]
    fn what_an_answer_means() {
        let judged = |code: u16| {
            let details = StatusDetails {
                name: String::new(),
                group: String::new(),
                kind: String::new(),
                uid: String::new(),
                causes: Vec::new(),
                retry_after_seconds: u32::from(code == 429) * 3,
            };
            let status = Status { code, message: "words".to_owned(), details: Some(details), ..Status::default() };
            judge(&kube::Error::Api(Box::new(status)))
        };
        assert!(matches!(judged(409), (CallError::Conflict, None)));
        assert!(matches!(judged(404), (CallError::Gone, None)));
        for code in [400, 403, 405, 413, 422] {
            assert!(matches!(judged(code), (CallError::Refused(words), None) if words.contains("words")), "{code}");
        }
        for code in [401, 408, 500, 503, 504] {
            assert!(matches!(judged(code), (CallError::Unavailable(words), None) if words.contains("words")), "{code}");
        }
        assert!(matches!(judged(429), (CallError::Unavailable(_), Some(asked)) if asked == Duration::from_secs(3)));
    }
}
