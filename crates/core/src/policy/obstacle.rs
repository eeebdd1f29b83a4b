//! What stands between an identity and a policy: the one evaluation, used to decide and to explain.

use super::{AttributeMatcher, AwsComputeMatcher, AwsMatcher, JwtMatcher, Matcher, Policy, Reason};
use crate::group::WorkloadGroup;
use crate::identity::{AwsCompute, AwsIdentity, Fact, Identity, JwtIdentity};
use crate::label::{LabelSelector, Labels, Operator, Requirement};

/// The first constraint that an identity doesn't meet.
pub(super) struct Obstacle {
    /// How many constraints were met before it.
    passed: usize,
    /// Below the matcher: `aws.ec2.iamRoleNames`.
    field: String,
    found: Option<String>,
    proven: bool,
    wanted: String,
}

/// `None`: the matcher matches.
pub(super) fn of_matcher(matcher: &Matcher, identity: &Identity) -> Option<Obstacle> {
    let mut check = Check { passed: 0 };
    match (matcher, identity) {
        (Matcher::Aws(matcher), Identity::Aws(aws)) => aws_obstacle(&mut check, matcher, aws),
        (Matcher::Jwt(matcher), Identity::Jwt(jwt)) => jwt_obstacle(&mut check, matcher, jwt),
        // No attestor proves these yet.
        (Matcher::Gcp(_), _) => {
            check.stop("gcp", Some(platform(identity)), "a GCP identity, which no attestor proves yet")
        }
        (Matcher::Azure(_), _) => {
            check.stop("azure", Some(platform(identity)), "an Azure identity, which no attestor proves yet")
        }
        (Matcher::Aws(_), _) => check.stop("aws", Some(platform(identity)), "an AWS identity"),
        (Matcher::Jwt(_), _) => check.stop("jwt", Some(platform(identity)), "an identity by JWT"),
    }
    .err()
}

/// The rule of this policy that came furthest, how far, and what stood in its way. `None`: the policy allows it.
pub(super) fn of_policy(policy: &Policy, identity: &Identity, group: &WorkloadGroup) -> Option<(usize, Reason)> {
    let mut furthest: Option<(usize, Reason)> = None;
    for (rule_index, rule) in policy.rules.iter().enumerate() {
        let mut admitted = false;
        for (matcher_index, matcher) in rule.workloads.iter().enumerate() {
            match of_matcher(matcher, identity) {
                None => admitted = true,
                Some(obstacle) => keep(&mut furthest, obstacle.passed, || Reason {
                    policy: policy.name.clone(),
                    rule: rule_index,
                    field: format!("spec.allow[{rule_index}].workloads[{matcher_index}].{}", obstacle.field),
                    found: obstacle.found,
                    proven: obstacle.proven,
                    wanted: obstacle.wanted,
                }),
            }
        }
        if admitted {
            for (selector_index, selector) in rule.onboard_to.iter().enumerate() {
                let requirement = selector.first_mismatch(&group.labels)?;
                // Whoever only lacks the group came further than any that isn't the right workload.
                keep(&mut furthest, usize::MAX, || {
                    selector_reason(policy, rule_index, selector_index, selector, requirement, &group.labels)
                });
            }
        }
    }
    furthest
}

fn keep(furthest: &mut Option<(usize, Reason)>, passed: usize, reason: impl FnOnce() -> Reason) {
    if furthest.as_ref().is_none_or(|(best, _)| passed > *best) {
        *furthest = Some((passed, reason()));
    }
}

fn selector_reason(
    policy: &Policy,
    rule: usize,
    index: usize,
    selector: &LabelSelector,
    requirement: &Requirement,
    labels: &Labels,
) -> Reason {
    let key = &requirement.key;
    let wanted = match &requirement.operator {
        Operator::In(values) => format!("the group's label {key} to be {}", one_of(values)),
        Operator::NotIn(values) => format!("the group's label {key} not to be {}", one_of(values)),
        Operator::Exists => format!("the group to have a label {key}"),
        Operator::DoesNotExist => format!("the group to have no label {key}"),
    };
    debug_assert!(!selector.requirements.is_empty());
    Reason {
        policy: policy.name.clone(),
        rule,
        field: format!("spec.allow[{rule}].onboardTo[{index}].workloadGroupSelector"),
        found: labels.get(key).cloned(),
        proven: true,
        wanted,
    }
}

/// Goes through a matcher's constraints in order; the first that isn't met is the error.
struct Check {
    passed: usize,
}

impl Check {
    /// An empty list wants nothing.
    fn one_of(&mut self, field: &str, fact: Option<&Fact<String>>, wanted: &[String]) -> Result<(), Obstacle> {
        let met = wanted.is_empty() || fact.and_then(Fact::proven).is_some_and(|value| wanted.contains(value));
        if met {
            self.passed += 1;
            return Ok(());
        }
        Err(Obstacle {
            passed: self.passed,
            field: field.to_owned(),
            found: fact.map(|fact| fact.stated().clone()),
            proven: fact.is_some_and(Fact::is_proven),
            wanted: one_of(wanted),
        })
    }

    fn stop(&self, field: &str, found: Option<&str>, wanted: &str) -> Result<(), Obstacle> {
        Err(Obstacle {
            passed: self.passed,
            field: field.to_owned(),
            found: found.map(str::to_owned),
            proven: true,
            wanted: wanted.to_owned(),
        })
    }
}

fn aws_obstacle(check: &mut Check, matcher: &AwsMatcher, aws: &AwsIdentity) -> Result<(), Obstacle> {
    check.one_of("aws.partitions", Some(&aws.partition), &matcher.partitions)?;
    // An empty list would be "any account", which is never allowed.
    if matcher.accounts.is_empty() {
        return check.stop("aws.accounts", None, "at least one account");
    }
    check.one_of("aws.accounts", Some(&aws.account), &matcher.accounts)?;
    check.one_of("aws.regions", Some(&aws.region), &matcher.regions)?;
    check.one_of("aws.zones", Some(&aws.zone), &matcher.zones)?;
    match (&matcher.compute, &aws.compute) {
        (AwsComputeMatcher::Ec2 { iam_role_names }, AwsCompute::Ec2 { iam_role, .. }) => {
            check.one_of("aws.ec2.iamRoleNames", iam_role.as_ref(), iam_role_names)
        }
        (AwsComputeMatcher::Ecs { clusters, iam_role_names }, AwsCompute::Ecs { cluster, iam_role, .. }) => {
            check.one_of("aws.ecs.clusters", Some(cluster), clusters)?;
            check.one_of("aws.ecs.iamRoleNames", iam_role.as_ref(), iam_role_names)
        }
        (AwsComputeMatcher::Ec2 { .. }, AwsCompute::Ecs { .. }) => {
            check.stop("aws.ec2", Some("an ECS task"), "an EC2 instance")
        }
        (AwsComputeMatcher::Ecs { .. }, AwsCompute::Ec2 { .. }) => {
            check.stop("aws.ecs", Some("an EC2 instance"), "an ECS task")
        }
    }
}

fn jwt_obstacle(check: &mut Check, matcher: &JwtMatcher, jwt: &JwtIdentity) -> Result<(), Obstacle> {
    check.one_of("jwt.issuer", Some(&jwt.issuer), std::slice::from_ref(&matcher.issuer))?;
    check.one_of("jwt.subjects", Some(&jwt.subject), &matcher.subjects)?;
    for (index, wanted) in matcher.attributes.iter().enumerate() {
        attribute_obstacle(check, index, wanted, jwt)?;
    }
    Ok(())
}

fn attribute_obstacle(
    check: &mut Check,
    index: usize,
    wanted: &AttributeMatcher,
    jwt: &JwtIdentity,
) -> Result<(), Obstacle> {
    let fact = jwt.attributes.get(&wanted.name);
    let met = fact.and_then(Fact::proven).is_some_and(|value| {
        wanted.values.is_empty() || value.values().iter().any(|value| wanted.values.contains(value))
    });
    if met {
        check.passed += 1;
        return Ok(());
    }
    Err(Obstacle {
        passed: check.passed,
        field: format!("jwt.attributes[{index}]"),
        found: fact.map(|fact| fact.stated().values().join(", ")),
        proven: fact.is_some_and(Fact::is_proven),
        wanted: if wanted.values.is_empty() {
            format!("the attribute {:?} with any value", wanted.name)
        } else {
            format!("the attribute {:?} to be {}", wanted.name, one_of(&wanted.values))
        },
    })
}

fn one_of(values: &[String]) -> String {
    match values {
        [value] => format!("{value:?}"),
        values => {
            let shown: Vec<String> = values.iter().take(10).map(|value| format!("{value:?}")).collect();
            let more = if values.len() > shown.len() { ", ..." } else { "" };
            format!("one of {}{more}", shown.join(", "))
        }
    }
}

/// The branch of an identity, as section 3 of the reference names it.
fn platform(identity: &Identity) -> &'static str {
    match identity {
        Identity::Aws(_) => "aws",
        Identity::Gcp(_) => "gcp",
        Identity::Azure(_) => "azure",
        Identity::Jwt(_) => "jwt",
    }
}
