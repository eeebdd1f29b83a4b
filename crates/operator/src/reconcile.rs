//! One look at the cluster, and what follows from it: objects applied, objects removed, a status written.
//!
//! Level-triggered: each pass reads what is there and needs nothing of the pass before, so that one that fails is repeated, and a restart forgets
//! nothing. Everything is written by server-side apply: what others add to an object stays, what is ours comes back. Two operators of one
//! version and one configuration write the same and don't fight; of two configurations each undoes the other, which is why the chart runs one.

use crate::certificate;
use crate::config;
use crate::objects::{
    self, CONFIG_MAP, CONTROL_PLANE, DEPLOYMENT, FIELD_MANAGER, Kind, NAMESPACE, RENDERED, SECRET, SERVICE,
};
use crate::render::{self, DEFAULT_REVISION, Enabled, Facts, Istiod, Settings};
use crate::seen::{Seen, Verdict, verdict};
use crate::status::{self, Condition};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, ResourceExt};
use onboarding_kinds::control_plane::Onboarding;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

/// One request.
const WITHIN: Duration = Duration::from_secs(15);
const NETWORK: &str = "topology.istio.io/network";
const TAG: &str = "istio.io/tag";
const ISTIOD: &str = "istiod";
/// Of what somebody else says, so much is repeated.
const LONGEST_PROBLEM: usize = 400;

#[derive(Debug, Clone)]
pub struct Options {
    /// Of the ControlPlane, and of all that is made for it but roles of the cluster.
    pub namespace: String,
    pub settings: Settings,
}

/// What a pass did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    pub applied: usize,
    pub removed: usize,
    /// Something couldn't be written; the status says what. To be tried again.
    pub incomplete: bool,
}

pub struct Reconciler {
    client: Client,
    options: Options,
    /// What was last applied of each object, and the version that came of it: a second apply of the same would change nothing.
    applied: HashMap<Key, (Value, String)>,
}

/// Plural of the kind, and name.
type Key = (&'static str, String);

/// Objects of this operator that are in the cluster.
type Ours = BTreeMap<Key, DynamicObject>;

impl Reconciler {
    pub fn new(client: Client, options: Options) -> Self {
        Self { client, options, applied: HashMap::new() }
    }

    /// # Errors
    /// The cluster can't be read, or a status not written; in words. Nothing was removed that was read as wanted.
    pub async fn pass(&mut self) -> Result<Done, String> {
        let planes = self.list(CONTROL_PLANE, &ListParams::default()).await?;
        let seen: Vec<Seen> = planes.iter().filter_map(Seen::read).collect();
        let ours = self.ours().await?;
        self.applied.retain(|key, _| ours.contains_key(key));
        let mut done = Done::default();
        let judged = verdict(&seen);
        if judged == Verdict::Nothing {
            self.remove(&ours, &HashSet::new(), &mut done).await;
        }
        for (at, plane) in seen.iter().enumerate() {
            let mut conditions = match plane.object.as_ref().zip(plane.enabling()) {
                Some((object, onboarding)) if judged == Verdict::Run(at) => {
                    self.run(Enabled { plane: object, onboarding, uid: &plane.uid }, &ours, &mut done).await?
                }
                _ => judged.of_another(plane),
            };
            if !conditions.is_empty() {
                conditions.push(status::ready(&conditions));
            }
            self.say(plane, &conditions).await?;
        }
        Ok(done)
    }

    /// Makes everything be there; its conditions.
    async fn run(&mut self, enabled: Enabled<'_>, ours: &Ours, done: &mut Done) -> Result<Vec<Condition>, String> {
        let mut problems = Vec::new();
        let facts = self.facts(enabled.onboarding, &mut problems).await?;
        let wanted = render::render(enabled, &self.options.settings, &facts);
        // Kept also where it can't be read: it may hold the audience of agents' credentials.
        let mut names = HashSet::from([(CONFIG_MAP.plural, config::NAME.to_owned())]);
        let mut deployments = Vec::new();
        for object in &wanted {
            let Some(kind) = Kind::of(object) else { continue };
            let key = (kind.plural, object["metadata"]["name"].as_str().unwrap_or_default().to_owned());
            names.insert(key.clone());
            let present = match self.apply(kind, &key, object, ours, done).await {
                Ok(written) => written.or_else(|| ours.get(&key).cloned()),
                Err(problem) => {
                    problems.push(format!("{} {}: {problem}", kind.kind, key.1));
                    None
                }
            };
            if kind == DEPLOYMENT {
                deployments.push((key.1, present));
            }
        }
        if problems.is_empty() {
            self.remove(ours, &names, done).await;
        }
        done.incomplete |= !problems.is_empty();
        Ok(vec![
            Condition::holds(status::VALID, "Valid", "the ControlPlane can be read"),
            self.certificate(enabled.onboarding).await?,
            istio(&facts, &self.options.namespace),
            match problems.is_empty() {
                true => {
                    let message = format!("{} objects are as they should be", wanted.len());
                    Condition::holds(status::APPLIED, "Applied", message)
                }
                false => Condition::fails(status::APPLIED, "NotApplied", problems.join("; ")),
            },
            available(&deployments),
        ])
    }

    async fn facts(&self, onboarding: &Onboarding, problems: &mut Vec<String>) -> Result<Facts, String> {
        let services = self.list(SERVICE, &ListParams::default().labels("app=istiod")).await?;
        let namespace = self.get(NAMESPACE, &self.options.namespace).await?;
        let held = self.get(CONFIG_MAP, config::NAME).await?;
        let config_yaml = config_yaml(held.as_ref(), onboarding.uid.as_deref()).unwrap_or_else(|problem| {
            problems.push(format!("ConfigMap {}: {problem}", config::NAME));
            None
        });
        Ok(Facts {
            istiods: istiods(&services),
            network: namespace.and_then(|namespace| namespace.labels().get(NETWORK).cloned()),
            config_yaml,
        })
    }

    async fn certificate(&self, onboarding: &Onboarding) -> Result<Condition, String> {
        let name = format!("{}/{}", self.options.namespace, onboarding.secret_name);
        let found = self.get(SECRET, &onboarding.secret_name).await?;
        let secret: Option<Secret> = found
            .map(DynamicObject::try_parse)
            .transpose()
            .map_err(|_| format!("the Secret {name} doesn't look like a Secret"))?;
        let kind = status::CERTIFICATE;
        Ok(match certificate::judge(&name, secret.as_ref(), &onboarding.hosts, Timestamp::now()) {
            Ok(until) => {
                Condition::holds(kind, "Valid", format!("the certificate in the Secret {name} is valid until {until}"))
            }
            Err(fault) => Condition::fails(kind, fault.reason, fault.message),
        })
    }

    /// The object as it is then; `None`: it was so already.
    async fn apply(
        &mut self,
        kind: Kind,
        key: &Key,
        wanted: &Value,
        ours: &Ours,
        done: &mut Done,
    ) -> Result<Option<DynamicObject>, String> {
        let api = kind.api::<DynamicObject>(&self.client, &self.options.namespace);
        let present = match ours.get(key) {
            Some(object) => Some(object.clone()),
            None => self.get(kind, &key.1).await?,
        };
        let mut version = present.as_ref().and_then(ResourceExt::resource_version);
        if let Some(present) = &present {
            if !objects::may_be_taken(present) {
                return Err(format!(
                    "there is one already that isn't the operator's, and it is left alone; delete or rename it, or hand it over with the label {}={FIELD_MANAGER}",
                    objects::MANAGED_BY
                ));
            }
            if self.applied.get(key).is_some_and(|(last, at)| last == wanted && Some(at) == version.as_ref()) {
                return Ok(None);
            }
        }
        let mut applied = wanted.clone();
        if kind == CONFIG_MAP {
            // The plane makes its UID where it finds none: whoever was first has made it, and nobody replaces it unseen.
            if present.is_none() {
                let object = serde_json::from_value(applied.clone()).map_err(|error| error.to_string())?;
                let params = PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() };
                version = within(api.create(&params, &object)).await?.resource_version();
            }
            applied["metadata"]["resourceVersion"] = json!(version);
        }
        let written = within(api.patch(&key.1, &force(), &Patch::Apply(&applied))).await?;
        let now = written.resource_version();
        if present.is_none() || now != version {
            done.applied += 1;
            tracing::info!(kind = kind.kind, name = key.1, "applied an object");
        }
        self.applied.insert(key.clone(), (wanted.clone(), now.unwrap_or_default()));
        Ok(Some(written))
    }

    /// Removes what is ours and not among `names`.
    async fn remove(&mut self, ours: &Ours, names: &HashSet<Key>, done: &mut Done) {
        for kind in RENDERED {
            let api = kind.api::<DynamicObject>(&self.client, &self.options.namespace);
            for (key, object) in ours.iter().filter(|(key, _)| key.0 == kind.plural && !names.contains(*key)) {
                if object.metadata.deletion_timestamp.is_some() {
                    continue;
                }
                // Only this very object.
                let only = Preconditions { uid: object.uid(), resource_version: None };
                match within(api.delete(&key.1, &DeleteParams::background().preconditions(only))).await {
                    Ok(_) => {
                        done.removed += 1;
                        self.applied.remove(key);
                        tracing::info!(kind = kind.kind, name = key.1, "removed an object");
                    }
                    Err(problem) => {
                        done.incomplete = true;
                        tracing::warn!(
                            kind = kind.kind,
                            name = key.1,
                            problem,
                            "an object can't be removed; it is tried again"
                        );
                    }
                }
            }
        }
    }

    async fn say(&self, plane: &Seen, conditions: &[Condition]) -> Result<(), String> {
        if conditions.is_empty() && !plane.has_our_status {
            return Ok(());
        }
        let Some(status) = status::status(&plane.status, plane.generation, conditions, Timestamp::now()) else {
            return Ok(());
        };
        let applied = json!({
            "apiVersion": CONTROL_PLANE.api_version(), "kind": CONTROL_PLANE.kind,
            "metadata": {"name": plane.name, "namespace": self.options.namespace, "uid": plane.uid},
            "status": status,
        });
        let api = CONTROL_PLANE.api::<DynamicObject>(&self.client, &self.options.namespace);
        within(api.patch_status(&plane.name, &force(), &Patch::Apply(&applied)))
            .await
            .map_err(|problem| format!("writing the status of ControlPlane {}: {problem}", plane.name))?;
        let ready = conditions.iter().find(|condition| condition.kind == status::READY);
        let (holds, words) = ready.map_or((false, "not enabled"), |ready| (ready.holds, ready.message.as_str()));
        tracing::info!(control_plane = plane.name, ready = holds, words, "the status of the ControlPlane changed");
        Ok(())
    }

    async fn ours(&self) -> Result<Ours, String> {
        let params = ListParams::default().labels(&objects::selector(&self.options.namespace));
        let mut ours = Ours::new();
        for kind in RENDERED {
            for object in self.list(kind, &params).await? {
                ours.insert((kind.plural, object.name_any()), object);
            }
        }
        Ok(ours)
    }

    /// None where the kind isn't served (and it isn't the ControlPlane).
    async fn list(&self, kind: Kind, params: &ListParams) -> Result<Vec<DynamicObject>, String> {
        let api = kind.api::<DynamicObject>(&self.client, &self.options.namespace);
        match tokio::time::timeout(WITHIN, api.list(params)).await {
            Ok(Ok(list)) => Ok(list.items),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 && kind != CONTROL_PLANE => Ok(Vec::new()),
            Ok(Err(error)) => Err(format!("listing {}: {}", kind.plural, words(&error))),
            Err(_) => Err(format!("listing {}: not answered within {WITHIN:?}", kind.plural)),
        }
    }

    async fn get(&self, kind: Kind, name: &str) -> Result<Option<DynamicObject>, String> {
        let api = kind.api::<DynamicObject>(&self.client, &self.options.namespace);
        within(api.get_opt(name)).await.map_err(|problem| format!("reading {} {name}: {problem}", kind.kind))
    }
}

/// What `onboarding-plane-config` is to hold; `None`: it is somebody else's, and good.
///
/// # Errors
/// It can't be had as it should be, in words.
fn config_yaml(held: Option<&DynamicObject>, wanted_uid: Option<&str>) -> Result<Option<String>, String> {
    let yaml = held.and_then(|held| held.data["data"][config::KEY].as_str());
    let there = config::uid(yaml).map_err(|why| {
        format!("{why}; it stays as it is, as it may hold the UID that credentials are made for: repair or delete it")
    })?;
    if held.is_some_and(|held| !objects::may_be_taken(held)) {
        return match (there, wanted_uid) {
            (Some(there), Some(wanted)) if there != wanted => Err(format!(
                "it isn't the operator's, and its uid is {there:?} while the ControlPlane's is {wanted:?}; make them the same, or delete it"
            )),
            (Some(_), _) => Ok(None),
            (None, _) => Err("it isn't the operator's, and has no uid; add one, or delete it".to_owned()),
        };
    }
    let uid = wanted_uid.map(str::to_owned).or(there).unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    config::with_uid(yaml, &uid).map(Some)
}

/// Those of revisions; tags are other names of them.
fn istiods(services: &[DynamicObject]) -> Vec<Istiod> {
    let revision = |service: &DynamicObject| {
        let name = service.name_any();
        let rest = name.strip_prefix(ISTIOD)?;
        let revision = match rest.strip_prefix('-') {
            Some(revision) if !revision.is_empty() => revision.to_owned(),
            None if rest.is_empty() => DEFAULT_REVISION.to_owned(),
            _ => return None,
        };
        (!service.labels().contains_key(TAG)).then_some(Istiod { revision, service: name })
    };
    let mut found: Vec<Istiod> = services.iter().filter_map(revision).collect();
    found.sort();
    found
}

fn istio(facts: &Facts, namespace: &str) -> Condition {
    if facts.istiods.is_empty() {
        let message = format!(
            "there is no Service istiod or istiod-<revision> with the label app=istiod in {namespace}; install Istio there"
        );
        return Condition::fails(status::ISTIO, "NoIstiod", message);
    }
    let names: Vec<&str> = facts.istiods.iter().map(|istiod| istiod.service.as_str()).collect();
    Condition::holds(status::ISTIO, "Found", names.join(", "))
}

/// Whether each has the replicas that it needs.
fn available(deployments: &[(String, Option<DynamicObject>)]) -> Condition {
    let mut words = Vec::new();
    for (name, deployment) in deployments {
        // One that couldn't be applied was spoken of.
        let Some(deployment) = deployment else { continue };
        let status = &deployment.data["status"];
        let none = Vec::new();
        let conditions = status["conditions"].as_array().unwrap_or(&none);
        let holds =
            |kind: &str| conditions.iter().find(|condition| condition["type"] == kind && condition["status"] == "True");
        if holds("Available").is_some() {
            continue;
        }
        let number = |field: &str| status[field].as_i64().unwrap_or(0);
        let mut word = format!(
            "Deployment {name}: {} of {} replicas are available",
            number("availableReplicas"),
            number("replicas")
        );
        if let Some(message) = holds("ReplicaFailure").and_then(|failure| failure["message"].as_str()) {
            word.push_str(": ");
            word.push_str(&shortened(message));
        }
        words.push(word);
    }
    match words.is_empty() {
        true => Condition::holds(status::AVAILABLE, "Available", "each Deployment has the replicas that it needs"),
        false => Condition::fails(status::AVAILABLE, "NotAvailable", words.join("; ")),
    }
}

fn force() -> PatchParams {
    PatchParams::apply(FIELD_MANAGER).force()
}

async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(WITHIN, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(words(&error)),
        Err(_) => Err(format!("not answered within {WITHIN:?}")),
    }
}

/// With its causes.
fn words(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        let hint = match status.code {
            404 => ": are the CustomResourceDefinitions of Istio and of onboarding installed?",
            _ => "",
        };
        return format!("{} ({}){hint}", shortened(&status.message), status.code);
    }
    let mut words = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        words = format!("{words}: {error}");
        source = error.source();
    }
    shortened(&words)
}

fn shortened(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(LONGEST_PROBLEM).collect()
}

#[cfg(test)]
mod tests;
