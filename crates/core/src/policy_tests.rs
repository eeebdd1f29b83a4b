use super::*;
use crate::identity::{AttributeValue, AwsCompute, AwsIdentity, Fact, JwtIdentity, Proven};
use crate::label::{Labels, Operator, Requirement};
use crate::name::GroupName;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn proven(value: &str) -> Fact<String> {
    Fact::Proven(Proven::by_attestor(value.to_owned()))
}

fn texts(values: &[&str]) -> Vec<String> {
    values.iter().map(|&value| value.to_owned()).collect()
}

fn ec2(role: Option<Fact<String>>) -> AwsIdentity {
    AwsIdentity {
        partition: proven("aws"),
        account: proven("123456789012"),
        region: proven("us-east-2"),
        zone: proven("us-east-2b"),
        compute: AwsCompute::Ec2 { instance_id: proven("i-1234567890abcdef0"), iam_role: role },
    }
}

fn group(labels: &[(&str, &str)]) -> WorkloadGroup {
    WorkloadGroup {
        name: GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() },
        labels: labels.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect(),
        workload_labels: Labels::new(),
        workload_annotations: BTreeMap::new(),
        service_account: "ratings-vm".to_owned(),
        network: None,
        locality: None,
        weight: None,
        ports: BTreeMap::new(),
        address: None,
        probe: None,
    }
}

/// The restrictive policy of the requirement.
fn narrow() -> Policy {
    Policy {
        namespace: "bookinfo".to_owned(),
        name: "allow-narrow-subset-of-aws-ec2-instances".to_owned(),
        rules: vec![Rule {
            workloads: vec![Matcher::Aws(AwsMatcher {
                partitions: texts(&["aws"]),
                accounts: texts(&["123456789012"]),
                regions: texts(&["us-east-2"]),
                zones: texts(&["us-east-2b"]),
                compute: AwsComputeMatcher::Ec2 { iam_role_names: texts(&["ratings-role"]) },
            })],
            onboard_to: vec![LabelSelector {
                requirements: vec![Requirement { key: "app".to_owned(), operator: Operator::In(texts(&["ratings"])) }],
            }],
        }],
    }
}

fn decide(policy: Policy, identity: AwsIdentity, group: &WorkloadGroup) -> Result<String, String> {
    let set = PolicySet::compile(vec![policy]);
    let identity = Identity::Aws(identity);
    match set.decide(&identity, group) {
        Decision::Allowed { policy, .. } => Ok(policy),
        Decision::Refused => {
            Err(set.reasons(&identity, group, 10, 10).iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))
        }
    }
}

#[test]
fn the_narrow_policy_of_the_requirement() {
    let ratings = group(&[("app", "ratings")]);
    let allowed = decide(narrow(), ec2(Some(proven("ratings-role"))), &ratings);
    assert_eq!(allowed.as_deref(), Ok("allow-narrow-subset-of-aws-ec2-instances"));

    let prefix = "policy allow-narrow-subset-of-aws-ec2-instances: spec.allow[0]";
    let refusals = [
        (
            ec2(Some(proven("other-role"))),
            "workloads[0].aws.ec2.iamRoleNames: is \"other-role\", wanted \"ratings-role\"",
        ),
        (
            ec2(Some(Fact::claimed("ratings-role".to_owned()))),
            "workloads[0].aws.ec2.iamRoleNames: \"ratings-role\" is only claimed, not proven, wanted \"ratings-role\"",
        ),
        (ec2(None), "workloads[0].aws.ec2.iamRoleNames: nothing was proven, wanted \"ratings-role\""),
        (
            AwsIdentity { zone: proven("us-east-2a"), ..ec2(Some(proven("ratings-role"))) },
            "workloads[0].aws.zones: is \"us-east-2a\", wanted \"us-east-2b\"",
        ),
        (
            AwsIdentity { account: proven("210987654321"), ..ec2(Some(proven("ratings-role"))) },
            "workloads[0].aws.accounts: is \"210987654321\", wanted \"123456789012\"",
        ),
    ];
    for (identity, why) in refusals {
        assert_eq!(decide(narrow(), identity, &ratings), Err(format!("{prefix}.{why}")));
    }
    assert_eq!(
        decide(narrow(), ec2(Some(proven("ratings-role"))), &group(&[("app", "details")])),
        Err(format!(
            "{prefix}.onboardTo[0].workloadGroupSelector: is \"details\", wanted the group's label app to be \"ratings\""
        ))
    );
}

#[test]
fn a_policy_of_another_namespace_allows_nothing() {
    let elsewhere = Policy { namespace: "other".to_owned(), ..narrow() };
    assert_eq!(decide(elsewhere, ec2(Some(proven("ratings-role"))), &group(&[("app", "ratings")])), Err(String::new()));
}

#[test]
fn the_first_by_name_is_named() {
    let set = PolicySet::compile(["b", "a", "c"].map(|name| Policy { name: name.to_owned(), ..narrow() }).to_vec());
    let decision = set.decide(&Identity::Aws(ec2(Some(proven("ratings-role")))), &group(&[("app", "ratings")]));
    assert_eq!(decision, Decision::Allowed { policy: "a".to_owned(), rule: 0 });
}

#[test]
fn candidates_do_not_grow_with_policies_that_do_not_concern_the_identity() {
    let others = (0..1000).map(|i| {
        let mut policy = narrow();
        policy.name = format!("other-{i}");
        let Matcher::Aws(aws) = &mut policy.rules[0].workloads[0] else { unreachable!() };
        aws.compute = AwsComputeMatcher::Ec2 { iam_role_names: vec![format!("role-{i}")] };
        policy
    });
    let set = PolicySet::compile(others.chain([narrow()]).collect());
    let identity = Identity::Aws(ec2(Some(proven("ratings-role"))));
    assert_eq!(set.index.candidates("bookinfo", &identity).count(), 1);
}

#[test]
fn what_all_policies_name_tells_none_of_them_apart() {
    let shared = AttributeMatcher { name: "region".to_owned(), values: texts(&["us-east"]) };
    let policies = (0..1000).map(|i| {
        let own = AttributeMatcher { name: "role".to_owned(), values: vec![format!("role-{i}"), format!("old-{i}")] };
        let mut policy = narrow();
        policy.name = format!("of-{i:04}");
        policy.rules[0].workloads = vec![Matcher::Jwt(JwtMatcher {
            issuer: "https://issuer".to_owned(),
            subjects: Vec::new(),
            attributes: vec![shared.clone(), own],
        })];
        policy
    });
    let set = PolicySet::compile(policies.collect());
    let identity = Identity::Jwt(JwtIdentity {
        issuer: proven("https://issuer"),
        subject: proven("vm7"),
        attributes: [("region", "us-east"), ("role", "role-500")]
            .map(|(name, value)| {
                (name.to_owned(), Fact::Proven(Proven::by_attestor(AttributeValue::One(value.to_owned()))))
            })
            .into(),
    });
    let group = group(&[("app", "ratings")]);
    assert_eq!(set.decide(&identity, &group), Decision::Allowed { policy: "of-0500".to_owned(), rule: 0 });
    assert!(set.index.candidates("bookinfo", &identity).count() <= 2);
}

#[test]
fn a_refusal_is_explained_by_so_many_policies() {
    let policies = (0..10).map(|i| Policy { name: format!("no-{i}"), ..narrow() });
    let set = PolicySet::compile(policies.collect());
    let (identity, group) = (Identity::Aws(ec2(Some(proven("other")))), group(&[("app", "ratings")]));
    let names = |among, limit| -> Vec<String> {
        set.reasons(&identity, &group, among, limit).into_iter().map(|reason| reason.policy).collect()
    };
    assert_eq!((names(3, 10).len(), names(10, 2)), (3, texts(&["no-0", "no-1"])));
}

// ---- the index equals asking every policy ----

fn some<T: Clone + std::fmt::Debug + 'static>(values: &'static [T]) -> impl Strategy<Value = Vec<T>> {
    proptest::sample::subsequence(values.to_vec(), 0..=values.len().min(2))
}

fn words(values: &'static [&'static str]) -> impl Strategy<Value = Vec<String>> {
    some(values).prop_map(|values| texts(&values))
}

fn fact(values: &'static [&'static str]) -> impl Strategy<Value = Fact<String>> {
    (proptest::sample::select(values), proptest::bool::weighted(0.8))
        .prop_map(|(value, is_proven)| if is_proven { proven(value) } else { Fact::claimed(value.to_owned()) })
}

const ACCOUNTS: &[&str] = &["1", "2"];
const REGIONS: &[&str] = &["r1", "r2"];
const ZONES: &[&str] = &["z1", "z2"];
const ROLES: &[&str] = &["a", "b"];
const SUBJECTS: &[&str] = &["s1", "s2", "x"];
const VALUES: &[&str] = &["x", "y", "s1"];
const NAMES: &[&str] = &["x", "region"];
const PARTITIONS: &[&str] = &["aws", "aws-cn"];

fn any_identity() -> impl Strategy<Value = Identity> {
    let role = proptest::option::of(fact(ROLES));
    let compute = (any::<bool>(), fact(ROLES), role).prop_map(|(ec2, cluster, iam_role)| {
        if ec2 {
            AwsCompute::Ec2 { instance_id: proven("i-1"), iam_role }
        } else {
            AwsCompute::Ecs { task_id: proven("t"), cluster, iam_role }
        }
    });
    let aws = (fact(PARTITIONS), fact(ACCOUNTS), fact(REGIONS), fact(ZONES), compute).prop_map(
        |(partition, account, region, zone, compute)| {
            Identity::Aws(AwsIdentity { partition, account, region, zone, compute })
        },
    );
    let value = prop_oneof![
        proptest::sample::select(VALUES).prop_map(|value| AttributeValue::One(value.to_owned())),
        words(VALUES).prop_map(AttributeValue::Any),
    ];
    let attribute = (value, proptest::bool::weighted(0.8)).prop_map(|(value, is_proven)| {
        if is_proven { Fact::Proven(Proven::by_attestor(value)) } else { Fact::claimed(value) }
    });
    let attributes = proptest::collection::btree_map(proptest::sample::select(NAMES), attribute, 0..3);
    let jwt = (fact(SUBJECTS), fact(SUBJECTS), attributes).prop_map(|(issuer, subject, attributes)| {
        let attributes = attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Identity::Jwt(JwtIdentity { issuer, subject, attributes })
    });
    prop_oneof![aws, jwt]
}

fn any_matcher() -> impl Strategy<Value = Matcher> {
    let aws = (
        words(PARTITIONS),
        proptest::sample::subsequence(ACCOUNTS, 1..=2),
        words(REGIONS),
        words(ZONES),
        (any::<bool>(), words(ROLES), words(ROLES)),
    )
        .prop_map(|(partitions, accounts, regions, zones, (ec2, clusters, iam_role_names))| {
            let compute = if ec2 {
                AwsComputeMatcher::Ec2 { iam_role_names }
            } else {
                AwsComputeMatcher::Ecs { clusters, iam_role_names }
            };
            Matcher::Aws(AwsMatcher { partitions, accounts: texts(&accounts), regions, zones, compute })
        });
    let attributes = proptest::collection::vec(
        (proptest::sample::select(NAMES), words(VALUES))
            .prop_map(|(name, values)| AttributeMatcher { name: name.to_owned(), values }),
        0..3,
    );
    let jwt =
        (proptest::sample::select(SUBJECTS), words(SUBJECTS), attributes).prop_map(|(issuer, subjects, attributes)| {
            Matcher::Jwt(JwtMatcher { issuer: issuer.to_owned(), subjects, attributes })
        });
    prop_oneof![aws, jwt]
}

fn any_policies() -> impl Strategy<Value = Vec<Policy>> {
    let selector = prop_oneof![
        Just(LabelSelector::default()),
        Just(LabelSelector {
            requirements: vec![Requirement { key: "app".to_owned(), operator: Operator::In(texts(&["ratings"])) }]
        }),
        Just(LabelSelector {
            requirements: vec![Requirement { key: "app".to_owned(), operator: Operator::DoesNotExist }]
        }),
    ];
    let rule = (proptest::collection::vec(any_matcher(), 1..3), proptest::collection::vec(selector, 1..3))
        .prop_map(|(workloads, onboard_to)| Rule { workloads, onboard_to });
    let policy = (proptest::bool::weighted(0.8), proptest::collection::vec(rule, 1..3));
    proptest::collection::vec(policy, 0..12).prop_map(|policies| {
        let named = policies.into_iter().enumerate().map(|(i, (here, rules))| Policy {
            namespace: if here { "bookinfo" } else { "other" }.to_owned(),
            name: format!("p{}", (i * 7) % 12),
            rules,
        });
        named.collect()
    })
}

/// Said once more, from the reference: no index, no explanation.
fn allows(policy: &Policy, identity: &Identity, group: &WorkloadGroup) -> bool {
    fn within(wanted: &[String], fact: Option<&Fact<String>>) -> bool {
        wanted.is_empty() || matches!(fact, Some(Fact::Proven(value)) if wanted.iter().any(|w| w == value.get()))
    }
    let matches = |matcher: &Matcher| match (matcher, identity) {
        (Matcher::Aws(m), Identity::Aws(i)) => {
            within(&m.partitions, Some(&i.partition))
                && within(&m.accounts, Some(&i.account))
                && within(&m.regions, Some(&i.region))
                && within(&m.zones, Some(&i.zone))
                && match (&m.compute, &i.compute) {
                    (AwsComputeMatcher::Ec2 { iam_role_names }, AwsCompute::Ec2 { iam_role, .. }) => {
                        within(iam_role_names, iam_role.as_ref())
                    }
                    (
                        AwsComputeMatcher::Ecs { clusters, iam_role_names },
                        AwsCompute::Ecs { cluster, iam_role, .. },
                    ) => within(clusters, Some(cluster)) && within(iam_role_names, iam_role.as_ref()),
                    _ => false,
                }
        }
        (Matcher::Jwt(m), Identity::Jwt(i)) => {
            within(std::slice::from_ref(&m.issuer), Some(&i.issuer))
                && within(&m.subjects, Some(&i.subject))
                && m.attributes.iter().all(|wanted| match i.attributes.get(&wanted.name) {
                    Some(Fact::Proven(value)) => {
                        wanted.values.is_empty()
                            || value.get().values().iter().any(|value| wanted.values.contains(value))
                    }
                    _ => false,
                })
        }
        _ => false,
    };
    policy.namespace == group.name.namespace
        && policy.rules.iter().any(|rule| {
            rule.workloads.iter().any(matches) && rule.onboard_to.iter().any(|selector| selector.matches(&group.labels))
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_index_equals_asking_every_policy(
        policies in any_policies(),
        identity in any_identity(),
        app in proptest::option::of(proptest::sample::select(&["ratings", "details"][..])),
    ) {
        let group = group(&app.map(|app| ("app", app)).into_iter().collect::<Vec<_>>());
        let wanted = policies.iter().filter(|p| allows(p, &identity, &group)).map(|p| p.name.clone()).min();
        let set = PolicySet::compile(policies.clone());
        let decided = match set.decide(&identity, &group) {
            Decision::Allowed { policy, .. } => Some(policy),
            Decision::Refused => None,
        };
        prop_assert_eq!(&decided, &wanted);
        // A policy that allows it has no reason; each other of the namespace has one.
        let here = policies.iter().filter(|p| p.namespace == "bookinfo");
        let refusing = here.filter(|p| !allows(p, &identity, &group)).count();
        prop_assert_eq!(set.reasons(&identity, &group, usize::MAX, usize::MAX).len(), refusing);
    }
}
