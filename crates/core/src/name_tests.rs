use super::*;
use crate::identity::{AwsIdentity, JwtIdentity, Proven};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};

fn proven(value: &str) -> Fact<String> {
    Fact::Proven(Proven::by_attestor(value.to_owned()))
}

fn group(name: &str) -> GroupName {
    GroupName { namespace: "bookinfo".to_owned(), name: name.to_owned() }
}

fn ec2(zone: &str, instance: &str) -> Identity {
    Identity::Aws(AwsIdentity {
        partition: proven("aws"),
        account: proven("123456789012"),
        region: proven("us-east-2"),
        zone: proven(zone),
        compute: AwsCompute::Ec2 { instance_id: proven(instance), iam_role: None },
    })
}

fn ecs(cluster: &str, task: &str) -> Identity {
    Identity::Aws(AwsIdentity {
        partition: proven("aws"),
        account: proven("123456789012"),
        region: proven("us-east-1"),
        zone: proven("us-east-1a"),
        compute: AwsCompute::Ecs { task_id: proven(task), cluster: proven(cluster), iam_role: None },
    })
}

fn jwt(subject: &str) -> Identity {
    Identity::Jwt(JwtIdentity {
        issuer: proven("https://mycompany.corp"),
        subject: proven(subject),
        attributes: BTreeMap::new(),
    })
}

fn name(group_name: &str, identity: &Identity) -> String {
    registration_name(&group(group_name), identity, Some("my-corp")).unwrap().name
}

#[test]
fn the_names_of_the_reference() {
    assert_eq!(
        name("ratings", &ec2("us-east-2b", "i-1234567890abcdef0")),
        "ratings-aws-aws-123456789012-us-east-2b-ec2-i-1234567890abcdef0"
    );
    assert_eq!(
        name("ratings", &ecs("bookinfo", "3a151358f03a4e32bf8cd401c1c74653")),
        "ratings-aws-aws-123456789012-us-east-1a-ecs-bookinfo-3a151358f03a4e32bf8cd401c1c74653"
    );
    assert_eq!(name("ratings", &jwt("us-east-datacenter1-vm007")), "ratings-jwt-my-corp--us-east-datacenter1-vm007");
}

#[test]
fn a_subject_that_is_no_name_is_slugged_and_told_apart() {
    let spiffe = name("ratings", &jwt("spiffe://corp/vm/7"));
    assert!(spiffe.starts_with("ratings-jwt-my-corp--spiffe--corp-vm-7-x"), "{spiffe}");
    assert_ne!(spiffe, name("ratings", &jwt("spiffe://corp/vm-7")));
    let long = name("ratings", &jwt(&"a".repeat(400)));
    assert!(is_resource_name(&long), "{long}");
    assert_ne!(long, name("ratings", &jwt(&"a".repeat(401))));
}

#[test]
fn nobody_can_choose_a_subject_that_spells_the_digest_of_another() {
    let victim = name("ratings", &jwt("VM 7"));
    let (_, spelt) = victim.split_once("--").unwrap();
    assert_ne!(name("ratings", &jwt(spelt)), victim);
}

#[test]
fn a_group_can_not_be_taken_for_a_part_of_an_identity() {
    assert_ne!(name("x", &jwt("b-jwt-my-corp--d")), name("x-jwt-my-corp--b", &jwt("d")));
    assert_ne!(name("x-aws", &ec2("z", "i-1")), name("x", &ec2("z", "i-1")));
}

#[test]
fn a_zone_or_a_cluster_can_not_shift_the_border_to_its_neighbour() {
    assert_ne!(name("x", &ec2("a-ec2", "i-1")), name("x", &ec2("a", "ec2-i-1")));
    let Identity::Aws(task) = ecs("b-ec2-c", "d") else { unreachable!() };
    let task = Identity::Aws(AwsIdentity { zone: proven("a"), ..task });
    assert_ne!(name("x", &task), name("x", &ec2("a-ecs-b", "c-d")));
    let named = |issuer, subject| registration_name(&group("x"), &jwt(subject), Some(issuer)).unwrap().name;
    assert_ne!(named("my-", "s"), named("my", "-s"));
}

#[test]
fn what_is_only_claimed_names_nobody() {
    let Identity::Aws(mut aws) = ec2("us-east-2b", "i-1") else { unreachable!() };
    aws.zone = Fact::claimed("us-east-2b".to_owned());
    assert_eq!(
        registration_name(&group("ratings"), &Identity::Aws(aws), None),
        Err(NameError::NotProven { fact: "aws.zone" })
    );
    assert_eq!(
        registration_name(&group("ratings"), &jwt("a"), None),
        Err(NameError::NoShortName { issuer: "https://mycompany.corp".to_owned() })
    );
}

/// Nothing proves a task's zone, cluster and ID; its account is proven, as ever.
#[test]
fn a_task_is_named_by_what_it_says_within_what_is_proven() {
    let Identity::Aws(mut aws) = ecs("bookinfo", "3a151358f03a4e32bf8cd401c1c74653") else { unreachable!() };
    let claimed = |fact: &Fact<String>| Fact::claimed(fact.stated().clone());
    let AwsCompute::Ecs { task_id, cluster, .. } = &mut aws.compute else { unreachable!() };
    (*task_id, *cluster) = (claimed(task_id), claimed(cluster));
    (aws.region, aws.zone) = (claimed(&aws.region), claimed(&aws.zone));
    assert_eq!(
        name("ratings", &Identity::Aws(aws.clone())),
        "ratings-aws-aws-123456789012-us-east-1a-ecs-bookinfo-3a151358f03a4e32bf8cd401c1c74653"
    );
    let refused = |aws: AwsIdentity| registration_name(&group("ratings"), &Identity::Aws(aws), None).unwrap_err();
    let other_account = AwsIdentity { account: claimed(&aws.account), ..aws.clone() };
    assert_eq!(refused(other_account), NameError::NotProven { fact: "aws.account" });
    let no_zone = AwsIdentity { zone: Fact::claimed(String::new()), ..aws };
    assert_eq!(refused(no_zone), NameError::NotStated { fact: "aws.zone" });
}

proptest! {
    #[test]
    fn names_are_valid_and_nobodys_else(
        inputs in proptest::collection::vec(("[a-c](-?[a-c]|-jwt-){0,3}[a-c]", "[a-b./A -]{1,5}|(a-ec[2s]-?|b){1,2}|(b-jwt-my-corp--){0,2}[a-b]{1,2}", 0..4u8), 1..60)
    ) {
        let mut seen: HashMap<String, (String, String, u8)> = HashMap::new();
        for (group_name, text, platform) in inputs {
            let identity = match platform {
                0 => jwt(&text),
                1 => ec2("us-east-2b", &text),
                2 => ec2(&text, "i-1"),
                _ => ecs(&text, "3a15"),
            };
            let name = name(&group_name, &identity);
            prop_assert!(is_resource_name(&name), "{name}");
            let whose = (group_name, text, platform);
            let owner = seen.entry(name.clone()).or_insert_with(|| whose.clone());
            prop_assert_eq!(&*owner, &whose, "{} is the name of both", name);
        }
    }
}
