//! What the plane says of each OnboardingPolicy in its status: whether it counts, and how many workloads it admits. Written by the leader.

use crate::names::{self, FIELD_MANAGER};
use crate::source::follow::chain;
use crate::source::{ClusterSource, ClusterView, PolicyObject};
use jiff::Timestamp;
use kube::api::{DynamicObject, Patch, PatchParams};
use kube::{Api, Client};
use onboarding_core::registration::State;
use onboarding_endpoint::backend::{Admits, ConfigSource, Registry, Snapshot};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Between two looks at all of them.
const GAP: Duration = Duration::from_secs(3);
/// Registrations come and go without a word: so often they are counted.
const COUNTED: Duration = Duration::from_secs(10);
const TRY: Duration = Duration::from_secs(5);
/// Between two writes.
const PACE: Duration = Duration::from_millis(20);
/// After so many failures in a row the rest waits for the next look.
const MOST_FAILURES: usize = 3;
const LONGEST_MESSAGE: usize = 4096;
const ACCEPTED: &str = "Accepted";

/// Starts the writer, which runs until `stop` and writes while `leads`.
pub fn start(
    client: Client,
    source: &ClusterSource,
    registry: Arc<dyn Registry>,
    leads: watch::Receiver<bool>,
    stop: CancellationToken,
) -> JoinHandle<anyhow::Result<()>> {
    let writer = Writer { client, view: source.cluster(), snapshots: source.watch(), registry, leads };
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => Ok(()),
            () = writer.run() => Err(anyhow::anyhow!("the status of policies isn't written any more: what it is about ended")),
        }
    })
}

struct Writer {
    client: Client,
    view: watch::Receiver<Arc<ClusterView>>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    registry: Arc<dyn Registry>,
    leads: watch::Receiver<bool>,
}

impl Writer {
    /// Until the source is gone.
    async fn run(mut self) {
        loop {
            if self.leads.wait_for(|leads| *leads).await.is_err() {
                return;
            }
            self.look().await;
            tokio::time::sleep(GAP).await;
            tokio::select! {
                changed = self.view.changed() => if changed.is_err() { return },
                changed = self.snapshots.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(COUNTED - GAP) => {}
            }
        }
    }

    async fn look(&mut self) {
        let view = self.view.borrow_and_update().clone();
        let snapshot = self.snapshots.borrow_and_update().clone();
        // Nothing is known, or what is known is too old: then nothing is said of it.
        if view.policies.iter().any(|policy| policy.is_read) && snapshot.policies.policies().is_empty() {
            return;
        }
        let admitted = match self.registry.list().await {
            Ok(all) => count(&snapshot, all.iter().map(|(_, stored)| &stored.state)),
            Err(error) => {
                tracing::debug!(%error, "the workloads that policies admit can't be counted; it is tried again");
                return;
            }
        };
        let mut failures = 0;
        for policy in &view.policies {
            let key = (policy.namespace.clone(), policy.name.clone());
            let Some(status) = status(policy, admitted.get(&key).copied().unwrap_or(0), Timestamp::now()) else {
                continue;
            };
            if !*self.leads.borrow() || failures >= MOST_FAILURES {
                return;
            }
            if let Err(problem) = self.write(policy, &status).await {
                failures += 1;
                tracing::warn!(
                    policy = format!("{}/{}", policy.namespace, policy.name),
                    problem,
                    "the status of a policy can't be written; it is tried again"
                );
            }
            tokio::time::sleep(PACE).await;
        }
    }

    async fn write(&self, policy: &PolicyObject, status: &Value) -> Result<(), String> {
        let resource = names::onboarding_policy();
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &policy.namespace, &resource);
        let applied = json!({
            "apiVersion": resource.api_version,
            "kind": resource.kind,
            // One of the same name that was made meanwhile is another.
            "metadata": {"name": policy.name, "namespace": policy.namespace, "uid": policy.uid},
            "status": status,
        });
        let params = PatchParams::apply(FIELD_MANAGER).force();
        match tokio::time::timeout(TRY, api.patch_status(&policy.name, &params, &Patch::Apply(&applied))).await {
            Ok(Ok(_)) => Ok(()),
            // It is gone, or another.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Ok(()),
            Ok(Err(error)) => Err(chain(&error)),
            Err(_) => Err(format!("not answered within {TRY:?}")),
        }
    }
}

/// How many live registrations each policy (namespace, name) admits: each counts for the one that the decision names.
fn count<'a>(snapshot: &Snapshot, states: impl Iterator<Item = &'a State>) -> HashMap<(String, String), u64> {
    let mut admitted = HashMap::new();
    for state in states {
        let State::Live(live) = state else { continue };
        if let Admits::Policy { name, .. } = snapshot.admits(live) {
            *admitted.entry((live.group.namespace.clone(), name)).or_insert(0) += 1;
        }
    }
    admitted
}

/// The status that this policy should have; `None`: it has it, or is being deleted.
fn status(policy: &PolicyObject, admitted: u64, now: Timestamp) -> Option<Value> {
    let (accepted, reason, message) = match (policy.faults.is_empty(), policy.is_read) {
        (true, false) => return None,
        (true, true) if policy.warnings.is_empty() => ("True", "Valid", "whom it describes may join".to_owned()),
        (true, true) => ("True", "Unwise", shortened(&policy.warnings)),
        (false, _) => ("False", "Invalid", shortened(&policy.faults)),
    };
    let is = policy.status.get("conditions").and_then(Value::as_array);
    let is = is.and_then(|conditions| conditions.iter().find(|condition| condition["type"] == ACCEPTED));
    let since = match is.filter(|is| is["status"] == accepted).and_then(|is| is["lastTransitionTime"].as_str()) {
        Some(since) => since.to_owned(),
        None => format!("{now:.0}"),
    };
    let condition = json!({
        "type": ACCEPTED,
        "status": accepted,
        "reason": reason,
        "message": message,
        "lastTransitionTime": since,
        "observedGeneration": policy.generation,
    });
    let same = is == Some(&condition)
        && policy.status["observedGeneration"] == policy.generation
        && policy.status["workloads"] == admitted;
    (!same).then(|| json!({"observedGeneration": policy.generation, "workloads": admitted, "conditions": [condition]}))
}

fn shortened(words: &[String]) -> String {
    let all = words.join("; ");
    match all.char_indices().nth(LONGEST_MESSAGE) {
        Some((end, _)) => format!("{}...", &all[..end]),
        None => all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(faults: &[&str], status: Value) -> PolicyObject {
        PolicyObject {
            namespace: "bookinfo".to_owned(),
            name: "narrow".to_owned(),
            uid: "u".to_owned(),
            generation: 3,
            is_read: faults.is_empty(),
            faults: faults.iter().map(|fault| (*fault).to_owned()).collect(),
            warnings: Vec::new(),
            status,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_status_is_written_only_where_it_is_another() {
        let first = status(&policy(&[], Value::Null), 2, at(0)).unwrap();
        assert_eq!(
            first,
            json!({
                "observedGeneration": 3,
                "workloads": 2,
                "conditions": [{
                    "type": "Accepted", "status": "True", "reason": "Valid", "message": "whom it describes may join",
                    "lastTransitionTime": "1970-01-01T00:00:00Z", "observedGeneration": 3,
                }],
            })
        );
        assert_eq!(status(&policy(&[], first.clone()), 2, at(9)), None);
        let more = status(&policy(&[], first.clone()), 3, at(9)).unwrap();
        assert_eq!((&more["workloads"], &more["conditions"]), (&json!(3), &first["conditions"]));

        let faulty = status(&policy(&["spec.allow: is required", "b"], first.clone()), 0, at(9)).unwrap();
        let condition = &faulty["conditions"][0];
        assert_eq!(condition["message"], "spec.allow: is required; b");
        assert_eq!((&condition["status"], &condition["reason"]), (&json!("False"), &json!("Invalid")));
        assert_eq!(condition["lastTransitionTime"], "1970-01-01T00:00:09Z");

        let deleted = PolicyObject { is_read: false, ..policy(&[], first) };
        assert_eq!(status(&deleted, 0, at(9)), None);
    }
}
