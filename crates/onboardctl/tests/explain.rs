//! `onboardctl explain`: decisions, their reasons, and what isn't a decision.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod tool;

use serde_json::{Value, json};
use tool::{Dir, Ended, GROUP, NARROW, control_plane};

const EC2: &str = "\
aws:
  partition: aws
  account: '123456789012'
  region: us-east-2
  zone: us-east-2b
  ec2: {instanceId: i-1234567890abcdef0, iamRole: {name: ratings-role}}
";

const NAME: &str = "allow-narrow-subset-of-aws-ec2-instances";

/// The requirement's policy and group, and this identity.
fn with(identity: &str) -> Dir {
    Dir::with(&[("m/policy.yaml", NARROW), ("m/group.yaml", GROUP), ("identity.yaml", identity)])
}

fn explain(dir: &Dir, group: &str) -> Ended {
    dir.run(&["explain", "-f", "m", "--identity", "identity.yaml", "--group", group, "-o", "json"])
}

#[track_caller]
fn refused(identity: &str) -> String {
    let verdict = explain(&with(identity), "bookinfo/ratings").is(2).json();
    assert_eq!(verdict["allowed"], false);
    assert_eq!(verdict["policy"], Value::Null);
    let reasons = verdict["reasons"].as_array().unwrap();
    assert_eq!(reasons.len(), 1, "{verdict}");
    reasons[0].as_str().unwrap().to_owned()
}

#[test]
fn the_instance_of_the_requirement_is_allowed() {
    let allowed = json!({ "allowed": true, "policy": NAME, "reasons": [] });
    let snake = EC2.replace("instanceId", "instance_id").replace("iamRole", "iam_role");
    let as_json = serde_json::to_string(&serde_yaml_ng::from_str::<Value>(EC2).unwrap()).unwrap();
    for identity in [EC2, &snake, &as_json] {
        let ended = explain(&with(identity), "bookinfo/ratings").is(0);
        assert_eq!(ended.json(), allowed);
        assert_eq!(ended.stderr, "");
    }
    let dir = with(EC2);
    dir.run(&[
        "explain",
        "-f",
        "m/policy.yaml",
        "m/group.yaml",
        "--identity",
        "identity.yaml",
        "--group",
        "bookinfo/ratings",
    ])
    .is(0)
    .says("allowed: policy allow-narrow-subset-of-aws-ec2-instances admits this identity");
}

#[test]
fn a_refusal_names_the_rule_the_fact_and_what_was_wanted() {
    let rule = format!("policy {NAME}: spec.allow[0].workloads[0].aws.");
    let cases = [
        (EC2.replace("ratings-role", "other-role"), "ec2.iamRoleNames: is \"other-role\", wanted \"ratings-role\""),
        (
            format!("{EC2}claimedOnly: [aws.ec2.iamRole]\n"),
            "ec2.iamRoleNames: \"ratings-role\" is only claimed, not proven, wanted \"ratings-role\"",
        ),
        (EC2.replace("us-east-2b", "us-east-2a"), "zones: is \"us-east-2a\", wanted \"us-east-2b\""),
        (EC2.replace("123456789012", "210987654321"), "accounts: is \"210987654321\", wanted \"123456789012\""),
        (EC2.replace("partition: aws", "partition: aws-cn"), "partitions: is \"aws-cn\", wanted \"aws\""),
    ];
    for (identity, why) in cases {
        assert_eq!(refused(&identity), format!("{rule}{why}"));
    }
    let dir = with(&EC2.replace("ratings-role", "other-role"));
    let arguments = ["explain", "-f", "m", "--identity", "identity.yaml", "--group", "bookinfo/ratings"];
    let text = dir.run(&arguments).is(2).stdout;
    assert_eq!(
        text,
        format!(
            "refused: nothing admits this identity to the WorkloadGroup bookinfo/ratings\n  {rule}ec2.iamRoleNames: is \"other-role\", wanted \"ratings-role\"\n"
        )
    );
}

#[test]
fn a_group_that_is_not_selected_or_not_there_is_refused() {
    let dir = with(EC2);
    dir.write("m/group.yaml", GROUP.replace("    app: ratings\nspec", "    app: reviews\nspec"));
    let unselected = explain(&dir, "bookinfo/ratings").is(2).json()["reasons"].clone();
    let why = "spec.allow[0].onboardTo[0].workloadGroupSelector: is \"reviews\", wanted the group's label app to be \"ratings\"";
    assert_eq!(unselected, json!([format!("policy {NAME}: {why}")]));

    let reasons = |group| explain(&with(EC2), group).is(2).json()["reasons"].clone();
    assert_eq!(
        reasons("bookinfo/details"),
        json!(["the WorkloadGroup bookinfo/details doesn't exist; there are bookinfo/ratings"])
    );
    assert_eq!(
        reasons("other/ratings"),
        json!(["the WorkloadGroup other/ratings doesn't exist; there are bookinfo/ratings"])
    );

    let dir = with(EC2);
    dir.write("m/group.yaml", GROUP.replace("serviceAccount: ratings-vm", "serviceAccount: [1]"));
    let ended = explain(&dir, "bookinfo/ratings").is(2).complains("warning: counts as absent: m/group.yaml:");
    assert_eq!(
        ended.json()["reasons"],
        json!(["the WorkloadGroup bookinfo/ratings has faults, so it counts as absent"])
    );
}

#[test]
fn policies_of_other_namespaces_say_nothing() {
    let dir = with(EC2);
    dir.write("m/policy.yaml", NARROW.replace("namespace: bookinfo", "namespace: other"));
    assert_eq!(
        explain(&dir, "bookinfo/ratings").is(2).json()["reasons"],
        json!([
            "the namespace bookinfo has no valid OnboardingPolicy; there are 1 elsewhere, and a policy is about groups of its own namespace"
        ])
    );
}

#[test]
fn an_invalid_policy_counts_as_absent_with_a_warning() {
    let dir = with(EC2);
    let invalid = NARROW.replace("zones:", "zone:");
    dir.write("m/policy.yaml", &invalid);
    explain(&dir, "bookinfo/ratings")
        .is(2)
        .says("the namespace bookinfo has no valid OnboardingPolicy")
        .complains("warning: counts as absent: m/policy.yaml:16: OnboardingPolicy");
    // Beside one that is valid it takes nothing away.
    dir.write("m/other.yaml", NARROW.replace(NAME, "other"));
    let ended = explain(&dir, "bookinfo/ratings").is(0).complains("warning: counts as absent: m/policy.yaml:16");
    assert_eq!(ended.json()["policy"], "other");
    // Of two with one name nobody can say which is meant.
    dir.write("m/policy.yaml", NARROW);
    dir.write("m/other.yaml", NARROW.replace("ratings-role", "other-role"));
    explain(&dir, "bookinfo/ratings").is(2).complains("is there twice");
}

#[test]
fn each_policy_of_the_namespace_has_its_reason_and_the_first_that_allows_is_named() {
    let dir = with(&EC2.replace("ratings-role", "other-role"));
    dir.write("m/b.yaml", NARROW.replace(NAME, "b").replace("us-east-2b", "us-east-2c"));
    let reasons = explain(&dir, "bookinfo/ratings").is(2).json()["reasons"].clone();
    let reasons: Vec<_> = reasons.as_array().unwrap().iter().map(|reason| reason.as_str().unwrap()).collect();
    assert_eq!(reasons.len(), 2);
    assert!(reasons[0].contains(".aws.ec2.iamRoleNames: "), "{reasons:?}");
    assert!(reasons[1].starts_with("policy b: ") && reasons[1].contains(".aws.zones: "), "{reasons:?}");

    dir.write("m/b.yaml", NARROW.replace(NAME, "b").replace("ratings-role", "other-role"));
    dir.write("m/a.yaml", NARROW.replace(NAME, "a").replace("ratings-role", "other-role"));
    let verdict = explain(&dir, "bookinfo/ratings").is(0).json();
    assert_eq!(verdict["policy"], "a");
    // Of the three, the one that doesn't admit it; b does too.
    assert_eq!(verdict["reasons"], json!([reasons[0]]));
}

#[test]
fn attributes_of_a_token() {
    let policy = "\
apiVersion: authorization.onboarding.tetrate.io/v1alpha1
kind: OnboardingPolicy
metadata: {name: vms, namespace: bookinfo}
spec:
  allow:
  - workloads:
    - jwt:
        issuer: https://mycompany.corp
        attributes: [{name: region, values: [us-east, us-west]}]
    onboardTo: [{workloadGroupSelector: {}}]
";
    let identity = |region: &str| {
        format!(
            "jwt: {{issuer: 'https://mycompany.corp', subject: us-east-datacenter1-vm007, attributes: {{region: {region}}}}}\n"
        )
    };
    let dir = with(&identity("[eu, us-west]"));
    dir.write("m/policy.yaml", policy);
    explain(&dir, "bookinfo/ratings").is(0);
    // Of another shape, as the plane would take it from a token: nothing of it matches.
    for shape in ["[us-west, {x: 1}]", "[us-west, ~]", "[[us-west]]", "{us-west: us-west}"] {
        dir.write("identity.yaml", identity(shape));
        explain(&dir, "bookinfo/ratings").is(2).says("jwt.attributes[0]: ");
    }
    dir.write("identity.yaml", identity("eu"));
    explain(&dir, "bookinfo/ratings")
        .is(2)
        .says("jwt.attributes[0]: is \\\"eu\\\", wanted the attribute \\\"region\\\"");
    dir.write("identity.yaml", format!("{}claimedOnly: [jwt.attributes.region]\n", identity("us-east")));
    explain(&dir, "bookinfo/ratings").is(2).says("is only claimed");
}

#[test]
fn an_issuer_that_the_control_plane_does_not_list_is_refused() {
    let dir = with("jwt: {issuer: 'https://mycompany.corp', subject: vm007}\n");
    let policy = NARROW.lines().take_while(|line| !line.starts_with("spec:")).collect::<Vec<_>>().join("\n");
    let admits = "[{workloads: [{jwt: {issuer: 'https://mycompany.corp'}}], onboardTo: [{workloadGroupSelector: {}}]}]";
    dir.write("m/policy.yaml", format!("{policy}\nspec: {{allow: {admits}}}\n"));
    // Nobody can say without one.
    explain(&dir, "bookinfo/ratings").is(0);
    let listed = r#"[{"issuer": "https://mycompany.corp", "shortName": "my-corp"}]"#;
    dir.write("m/plane.yaml", control_plane("", listed));
    explain(&dir, "bookinfo/ratings").is(0);
    let why =
        "the ControlPlane doesn't list the issuer \"https://mycompany.corp\", so its token isn't taken or renewed";
    for issuers in ["[]", &listed.replace("mycompany", "other")] {
        dir.write("m/plane.yaml", control_plane("", issuers));
        let verdict = explain(&dir, "bookinfo/ratings").is(2).json();
        assert_eq!(verdict, json!({ "allowed": false, "policy": null, "reasons": [why] }));
    }
    // AWS needs no issuer.
    dir.write("identity.yaml", EC2);
    dir.write("m/policy.yaml", NARROW);
    explain(&dir, "bookinfo/ratings").is(0);
}

#[test]
fn a_claimed_fact_that_no_policy_asks_for_still_spoils_the_name() {
    let dir = with(&format!("{EC2}claimedOnly: [aws.zone]\n"));
    dir.write("m/policy.yaml", NARROW.replace("        zones:\n        - us-east-2b\n", ""));
    explain(&dir, "bookinfo/ratings").is(0).complains("the plane would refuse: aws.zone is only claimed");
}

#[test]
fn an_input_that_can_not_be_used_is_no_refusal() {
    let usual = ["-f", "m", "--identity", "identity.yaml", "--group", "bookinfo/ratings"];
    let changed = |at: usize, to: &'static str| {
        let mut arguments = vec!["explain"];
        arguments.extend(usual);
        arguments[at + 1] = to;
        arguments
    };
    let cases = [
        (changed(1, "nowhere"), "reading nowhere: No such file"),
        (changed(3, "nowhere"), "reading nowhere: No such file"),
        (changed(5, "ratings"), "must be NAMESPACE/NAME"),
        (changed(5, "a/b/c"), "must be NAMESPACE/NAME"),
        (changed(4, "--grope"), "--grope"),
        (vec!["explain", "-f", "m"], "--identity"),
        (
            vec!["explain", "-f", "-", "--identity", "-", "--group", "bookinfo/ratings"],
            "standard input can be read once",
        ),
    ];
    for (arguments, why) in cases {
        with(EC2).run(&arguments).is(1).silent().complains(why);
    }
    let identities = [
        (format!("{EC2}claimedOnly: [aws.ec2.iamRol]\n"), "did you mean aws.ec2.iamRole"),
        (EC2.replace("'123456789012'", "123456789012"), "quote it"),
        (EC2.replace("zone:", "zones:"), "zone"),
        ("aws: [".to_owned(), "identity.yaml:1"),
        (String::new(), "empty"),
        (format!("{EC2}jwt: {{issuer: a, subject: b}}\n"), "jwt"),
    ];
    for (identity, why) in identities {
        explain(&with(&identity), "bookinfo/ratings").is(1).silent().complains(why);
    }
    let dir = with(EC2);
    dir.write("m/broken.yaml", "kind: [\n");
    explain(&dir, "bookinfo/ratings").is(1).silent().complains("m/broken.yaml:");
}
