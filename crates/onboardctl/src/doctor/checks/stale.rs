//! What was left behind: registrations whose grace period is over, entries of the mesh without a registration.

use super::{known, named, some_of};
use crate::doctor::facts::{Finding, Objects};
use crate::plane::objects::{condition, items, keyed, name, namespace, text};
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use std::collections::HashSet;

/// Where the plane isn't told another.
const GRACE: SignedDuration = SignedDuration::from_mins(5);
/// Past its grace period: the plane may be at it.
const SLACK: SignedDuration = SignedDuration::from_mins(1);
/// On what the plane makes.
const MANAGED_BY: (&str, &str) = ("app.kubernetes.io/managed-by", "onboarding-plane");

pub fn check(now: Timestamp, objects: &Objects, findings: &mut Vec<Finding>) {
    let wars = known("WorkloadAutoRegistrations", &objects.wars, findings);
    if let Some(wars) = wars {
        let grace = grace(objects);
        let stale = names(wars.iter().filter(|war| is_past(war, grace.saturating_add(SLACK), now)));
        findings.push(match stale.is_empty() {
            true => {
                let connected = wars.iter().filter(|war| status(war) == Some("True")).count();
                Finding::ok("registrations", format!("{connected} of {} are connected, none is overdue", wars.len()))
            }
            false => Finding::fail(
                "registrations",
                format!(
                    "{} weren't connected for longer than the grace period ({grace:#}): {}",
                    stale.len(),
                    some_of(&stale)
                ),
                "the plane removes them when it runs: see its Deployment and its log; or kubectl delete war",
            ),
        });
    }
    let (Some(entries), Some(wars)) = (known("WorkloadEntries", &objects.entries, findings), wars) else { return };
    let living: HashSet<&str> = wars.iter().map(|war| text(war, "/metadata/uid")).collect();
    let is_ours = |entry: &&Value| keyed(entry, "labels", MANAGED_BY.0) == MANAGED_BY.1;
    let orphans = names(entries.iter().filter(is_ours).filter(|entry| {
        let owned =
            |owner: &Value| text(owner, "/kind") == "WorkloadAutoRegistration" && living.contains(text(owner, "/uid"));
        !items(entry, "/metadata/ownerReferences").any(owned)
    }));
    findings.push(match orphans.is_empty() {
        true => Finding::ok("WorkloadEntries", "each that the plane made has its registration"),
        false => Finding::warn(
            "WorkloadEntries",
            format!("{} that the plane made have no registration any more: {}", orphans.len(), some_of(&orphans)),
            "the cluster's garbage collector removes them within minutes; or kubectl delete workloadentry",
        ),
    });
}

fn names<'a>(objects: impl Iterator<Item = &'a Value>) -> Vec<String> {
    objects.map(|object| format!("{}/{}", namespace(object), name(object))).collect()
}

fn status(war: &Value) -> Option<&str> {
    condition(war, "AgentConnected").map(|condition| text(condition, "/status"))
}

fn is_past(war: &Value, grace: SignedDuration, now: Timestamp) -> bool {
    if status(war) == Some("True") {
        return false;
    }
    let since = match condition(war, "AgentConnected") {
        Some(condition) => text(condition, "/lastTransitionTime"),
        // Made, and never heard of.
        None => text(war, "/metadata/creationTimestamp"),
    };
    since.parse::<Timestamp>().is_ok_and(|since| now.duration_since(since) > grace)
}

/// As the plane's Deployment has it among its arguments.
fn grace(objects: &Objects) -> SignedDuration {
    let plane = named(objects.deployments.as_deref().unwrap_or_default(), "onboarding-plane");
    let mut arguments = plane
        .into_iter()
        .flat_map(|plane| items(plane, "/spec/template/spec/containers"))
        .flat_map(|container| items(container, "/args").chain(items(container, "/command")))
        .filter_map(Value::as_str);
    let value = arguments.find_map(|argument| {
        let rest = argument.strip_prefix("--grace-period")?;
        Some(rest.strip_prefix('=').unwrap_or(rest).to_owned())
    });
    let value = match value {
        Some(value) if value.is_empty() => arguments.next().map(str::to_owned),
        value => value,
    };
    value
        .and_then(|value| onboarding_kinds::duration(&value).ok())
        .and_then(|duration| SignedDuration::try_from(duration).ok())
        .unwrap_or(GRACE)
}
