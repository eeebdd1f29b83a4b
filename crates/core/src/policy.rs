//! OnboardingPolicy: who may join which WorkloadGroup. Nothing may join unless a policy allows it; policies only add up.

mod index;
mod obstacle;

use crate::group::WorkloadGroup;
use crate::identity::Identity;
use crate::label::LabelSelector;
use index::Index;
use std::fmt;

/// One OnboardingPolicy, valid in itself (the lists that must not be empty aren't: `onboarding-kinds` makes these).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    pub namespace: String,
    pub name: String,
    pub rules: Vec<Rule>,
}

/// `spec.allow[]`: any matcher of `workloads`, any selector of `onboard_to`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub workloads: Vec<Matcher>,
    pub onboard_to: Vec<LabelSelector>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Matcher {
    Aws(AwsMatcher),
    Jwt(JwtMatcher),
    Gcp(GcpMatcher),
    Azure(AzureMatcher),
}

/// Each list: one of its values; an empty one: any value, also one that isn't proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsMatcher {
    pub partitions: Vec<String>,
    /// Never empty.
    pub accounts: Vec<String>,
    pub regions: Vec<String>,
    pub zones: Vec<String>,
    pub compute: AwsComputeMatcher,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AwsComputeMatcher {
    Ec2 { iam_role_names: Vec<String> },
    Ecs { clusters: Vec<String>, iam_role_names: Vec<String> },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtMatcher {
    pub issuer: String,
    pub subjects: Vec<String>,
    /// All must match.
    pub attributes: Vec<AttributeMatcher>,
}

/// No values: the attribute must be there, with any value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttributeMatcher {
    pub name: String,
    pub values: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcpMatcher {
    pub project_numbers: Vec<String>,
    pub project_ids: Vec<String>,
    pub regions: Vec<String>,
    pub zones: Vec<String>,
    pub instance_ids: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AzureMatcher {
    pub subscriptions: Vec<String>,
    pub resource_groups: Vec<String>,
    pub vm_ids: Vec<String>,
}

/// Every policy of every namespace, compiled so that a decision costs nothing for the policies that don't concern the identity.
#[derive(Debug, Default)]
pub struct PolicySet {
    /// In (namespace, name) order.
    policies: Vec<Policy>,
    index: Index,
}

impl PolicySet {
    pub fn compile(mut policies: Vec<Policy>) -> Self {
        policies.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        let index = Index::new(&policies);
        Self { policies, index }
    }

    pub fn policies(&self) -> &[Policy] {
        &self.policies
    }

    /// Whether this identity may join this group: the first policy in (namespace, name) order that allows it.
    pub fn decide(&self, identity: &Identity, group: &WorkloadGroup) -> Decision {
        let admitting = self.index.candidates(&group.name.namespace, identity).filter(|&(policy, rule, matcher)| {
            let rule = &self.policies[policy].rules[rule];
            obstacle::of_matcher(&rule.workloads[matcher], identity).is_none()
                && rule.onboard_to.iter().any(|selector| selector.matches(&group.labels))
        });
        match admitting.min() {
            Some((policy, rule, _)) => Decision::Allowed { policy: self.policies[policy].name.clone(), rule },
            None => Decision::Refused,
        }
    }

    /// For a refusal: for each of the first `among` policies of the group's namespace the rule that came furthest, and what stood in its way.
    /// At most `limit` reasons, those that came furthest first.
    pub fn reasons(&self, identity: &Identity, group: &WorkloadGroup, among: usize, limit: usize) -> Vec<Reason> {
        let namespace = &group.name.namespace;
        let first = self.policies.partition_point(|policy| policy.namespace < *namespace);
        let mut reasons: Vec<(usize, Reason)> = self
            .policies
            .iter()
            .skip(first)
            .take_while(|policy| policy.namespace == *namespace)
            .take(among)
            .filter_map(|policy| obstacle::of_policy(policy, identity, group))
            .collect();
        reasons.sort_by_key(|(passed, _)| std::cmp::Reverse(*passed));
        reasons.into_iter().take(limit).map(|(_, reason)| reason).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Allowed {
        policy: String,
        /// Index into `spec.allow`.
        rule: usize,
    },
    Refused,
}

/// Why one policy did not allow it. `Display` is the sentence for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    pub policy: String,
    pub rule: usize,
    /// The path of the field that stood in the way, as in `spec.allow[0].workloads[0].aws.ec2.iamRoleNames`.
    pub field: String,
    /// The fact's value, if it has one, and whether it is only claimed.
    pub found: Option<String>,
    pub proven: bool,
    /// What was wanted, for people.
    pub wanted: String,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, field, wanted, .. } = self;
        match &self.found {
            Some(found) if self.proven => write!(f, "policy {policy}: {field}: is {found:?}, wanted {wanted}"),
            Some(found) => {
                write!(f, "policy {policy}: {field}: {found:?} is only claimed, not proven, wanted {wanted}")
            }
            None => write!(f, "policy {policy}: {field}: nothing was proven, wanted {wanted}"),
        }
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
