//! What the facts mean. Pure.

mod admission;
mod istio;
mod stale;
mod way_in;

use super::facts::{Asked, Facts, Finding, Objects};
use super::gather::enabled;
use crate::manifests;
use crate::plane::cluster::{Problem, ProblemKind};
use crate::plane::objects::{failing, name, text};
use serde_json::Value;

/// In the order of a join: the ControlPlane, the way in, Istio, who is admitted, what was left behind.
pub fn all(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let api_server = format!("API server {}", facts.server);
    match &facts.version {
        Ok(version) => findings.push(Finding::ok(api_server, format!("answers, {version}"))),
        Err(problem) => findings.push(Finding::fail(api_server, &problem.words, &problem.way_out)),
    }
    let Some(objects) = &facts.objects else { return findings };
    control_plane(objects, &mut findings);
    if let Some(endpoint) = &facts.endpoint {
        way_in::check(facts.now, objects, endpoint, &mut findings);
    }
    istio::check(objects, &mut findings);
    admission::check(objects, &mut findings);
    stale::check(facts.now, objects, &mut findings);
    findings
}

/// The answer, or why there is none, as a finding: what this user may not see may be as it should.
fn known<'a, T>(what: &str, asked: &'a Asked<T>, findings: &mut Vec<Finding>) -> Option<&'a T> {
    let Problem { kind, words, way_out } = match asked {
        Ok(answer) => return Some(answer),
        Err(problem) => problem,
    };
    findings.push(match kind {
        ProblemKind::Forbidden => Finding::warn(what, format!("can't be looked at: {words}"), way_out),
        _ => Finding::fail(what, words, way_out),
    });
    None
}

fn control_plane(objects: &Objects, findings: &mut Vec<Finding>) {
    const WHAT: &str = "ControlPlane";
    let planes = match &objects.planes {
        Ok(planes) => planes,
        // Without it nothing can be said of the rest, so this is no way to end well.
        Err(Problem { words, way_out, .. }) => return findings.push(Finding::fail(WHAT, words, way_out)),
    };
    let loaded = manifests::of_objects(planes);
    for fault in &loaded.faults {
        let way_out = "correct it with kubectl edit; until then its configuration counts as unreadable";
        findings.push(Finding::fail(&fault.object, fault.of_field(), way_out));
    }
    findings
        .extend(loaded.warnings.iter().map(|it| Finding::warn(&it.object, it.of_field(), "consider another value")));
    match enabled(planes) {
        Some(plane) => findings.push(Finding::ok(WHAT, format!("enables onboarding at {}", plane.hosts.join(", ")))),
        None if loaded.faults.is_empty() => findings.push(Finding::fail(
            WHAT,
            "none in istio-system enables onboarding",
            "set spec.meshExpansion.onboarding with endpoint.hosts and endpoint.secretName",
        )),
        None => {}
    }
    for plane in planes {
        for condition in failing(plane) {
            let words = format!("{} is False: {}", text(condition, "/type"), text(condition, "/message"));
            findings.push(Finding::warn(format!("{WHAT} {}", name(plane)), words, "see the checks below"));
        }
    }
}

/// `a, b and 3 more`
fn some_of(names: &[String]) -> String {
    const MOST: usize = 5;
    let mut text = names.iter().take(MOST).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > MOST {
        text.push_str(&format!(" and {} more", names.len() - MOST));
    }
    text
}

fn named<'a>(objects: &'a [Value], wanted: &str) -> Option<&'a Value> {
    objects.iter().find(|object| name(object) == wanted)
}

#[cfg(test)]
#[path = "checks_tests.rs"]
mod tests;
