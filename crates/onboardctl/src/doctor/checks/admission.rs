//! Who is admitted: policies, and the groups they are about.

use super::known;
use crate::doctor::facts::{Finding, Objects};
use crate::manifests::{self, Loaded};
use crate::plane::objects::{name, namespace};
use onboarding_core::policy::{Matcher, Policy};
use std::collections::HashSet;

pub fn check(objects: &Objects, findings: &mut Vec<Finding>) {
    let policies = known("OnboardingPolicies", &objects.policies, findings).map(|them| manifests::of_objects(them));
    let groups = known("WorkloadGroups", &objects.groups, findings).map(|them| manifests::of_objects(them));
    let suspended =
        "correct it with kubectl edit; until then it admits nobody, and sessions of its namespace are suspended";
    policies.iter().for_each(|loaded| faults(loaded, suspended, findings));
    groups
        .iter()
        .for_each(|loaded| faults(loaded, "correct it with kubectl edit; until then nobody joins it", findings));
    let groups_known = groups.is_some();
    let policies_known = policies.is_some();
    let policies = policies.unwrap_or_default().admission().policies;
    let policies = policies.policies();
    let groups = groups.unwrap_or_default().admission().groups;
    let selects = |policy: &Policy, group: &onboarding_core::group::WorkloadGroup| {
        policy.namespace == group.name.namespace
            && policy.rules.iter().flat_map(|rule| &rule.onboard_to).any(|selector| selector.matches(&group.labels))
    };
    if groups_known {
        for policy in policies.iter().filter(|policy| !groups.values().any(|group| selects(policy, group))) {
            findings.push(Finding::warn(
                format!("OnboardingPolicy {}/{}", policy.namespace, policy.name),
                "admits nobody: no WorkloadGroup of its namespace has the labels that its selectors want",
                "label the WorkloadGroup's own metadata (not its template), or correct workloadGroupSelector",
            ));
        }
    }
    if policies_known {
        for group in groups.values().filter(|group| !policies.iter().any(|policy| selects(policy, group))) {
            findings.push(Finding::warn(
                format!("WorkloadGroup {}", group.name),
                "nobody may join it: no OnboardingPolicy of its namespace selects it",
                "create one, unless this group isn't for onboarding",
            ));
        }
    }
    unlisted_issuers(objects, policies, findings);
    accounts(objects, groups.values(), findings);
    if policies_known && groups_known {
        let words = format!("{} valid policies, {} valid groups", policies.len(), groups.len());
        findings.push(Finding::ok("admission", words));
    }
}

fn faults(loaded: &Loaded, way_out: &str, findings: &mut Vec<Finding>) {
    findings.extend(loaded.faults.iter().map(|it| Finding::fail(&it.object, it.of_field(), way_out)));
    findings
        .extend(loaded.warnings.iter().map(|it| Finding::warn(&it.object, it.of_field(), "consider another value")));
}

fn unlisted_issuers(objects: &Objects, policies: &[Policy], findings: &mut Vec<Finding>) {
    let planes = manifests::of_objects(objects.planes.as_deref().unwrap_or_default()).admission().planes;
    let [plane] = planes.as_slice() else { return };
    for policy in policies {
        let mut said = HashSet::new();
        for matcher in policy.rules.iter().flat_map(|rule| &rule.workloads) {
            let Matcher::Jwt(jwt) = matcher else { continue };
            if !plane.issuers.iter().any(|listed| listed.issuer == jwt.issuer) && said.insert(&jwt.issuer) {
                findings.push(Finding::warn(
                    format!("OnboardingPolicy {}/{}", policy.namespace, policy.name),
                    format!(
                        "is about the issuer {:?}, which the ControlPlane doesn't list, so its tokens are refused",
                        jwt.issuer
                    ),
                    "list it in spec.meshExpansion.onboarding.workloads.authentication.jwt.issuers",
                ));
            }
        }
    }
}

fn accounts<'a>(
    objects: &Objects,
    groups: impl Iterator<Item = &'a onboarding_core::group::WorkloadGroup>,
    findings: &mut Vec<Finding>,
) {
    let Some(accounts) = known("ServiceAccounts", &objects.accounts, findings) else { return };
    let there: HashSet<(&str, &str)> = accounts.iter().map(|account| (namespace(account), name(account))).collect();
    for group in groups {
        let account = group.service_account.as_str();
        if !there.contains(&(group.name.namespace.as_str(), account)) {
            findings.push(Finding::fail(
                format!("WorkloadGroup {}", group.name),
                format!("its ServiceAccount {account:?} isn't there, so no sidecar of it gets a token"),
                format!("kubectl create serviceaccount {account} -n {}", group.name.namespace),
            ));
        }
    }
}
