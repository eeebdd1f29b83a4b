//! OnboardingPolicy: who may join which WorkloadGroup. Nothing may join unless a policy allows it; policies only add up.

use crate::label::LabelSelector;

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

// ---- the contract that the endpoint and onboardctl use ----

use crate::group::WorkloadGroup;
use crate::identity::Identity;

/// Every policy of every namespace, compiled so that a decision costs nothing for the policies that don't concern the identity.
#[derive(Debug, Default)]
pub struct PolicySet {}

impl PolicySet {
    pub fn compile(policies: Vec<Policy>) -> Self {
        let _ = policies;
        unimplemented!()
    }
    /// Whether this identity may join this group: the first policy in (namespace, name) order that allows it.
    pub fn decide(&self, identity: &Identity, group: &WorkloadGroup) -> Decision {
        let _ = (identity, group);
        unimplemented!()
    }
    /// For a refusal: for each policy of the group's namespace the rule that came furthest, and what stood in its way.
    /// Walks all of them; at most `limit` reasons.
    pub fn reasons(&self, identity: &Identity, group: &WorkloadGroup, limit: usize) -> Vec<Reason> {
        let _ = (identity, group, limit);
        unimplemented!()
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

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let _ = f;
        unimplemented!()
    }
}
