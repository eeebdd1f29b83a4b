//! What is shipped, as the program sees it: `examples/`, `docs/ecs/` and the demo's manifests have no fault, `docs/identities/` is decided upon.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod tool;

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tool::{Dir, Ended};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn shipped(path: &str) -> String {
    root().join(path).to_str().unwrap().to_owned()
}

#[test]
fn no_manifest_has_a_fault() {
    for directory in ["examples", "docs/ecs", "demo/manifests"] {
        let ended = Dir::new().run(&["lint", &shipped(directory)]).is(0).silent();
        assert_eq!(ended.stderr, "", "{directory}");
    }
}

/// Under these policies of `examples/`, and its group.
fn explain(identity: &str, policies: &[&str]) -> Ended {
    let files = policies.iter().map(|name| match *name {
        "ecs" => "docs/ecs/onboardingpolicy.yaml".to_owned(),
        name => format!("examples/onboardingpolicy-{name}.yaml"),
    });
    let files: Vec<String> =
        files.chain(["examples/workloadgroup.yaml".to_owned()]).map(|file| shipped(&file)).collect();
    let mut arguments = vec!["explain", "-f"];
    arguments.extend(files.iter().map(String::as_str));
    let identity = shipped(&format!("docs/identities/{identity}"));
    arguments.extend(["--identity", &identity, "--group", "bookinfo/ratings", "-o", "json"]);
    Dir::new().run(&arguments)
}

const NARROW: &str = "allow-narrow-subset-of-aws-ec2-instances";
const WIDE: &str = "allow-any-aws-ec2-instance-from-given-accounts";
const JWT: &str = "allow-ratings-of-the-datacenter";

/// The policy that allows it, or for each of its policies a part of what is in the way.
type Wanted = Result<&'static str, &'static [&'static str]>;

#[test]
fn every_identity_is_decided_upon() {
    let some: [(&str, &[&str], Wanted); 9] = [
        ("ec2.yaml", &["narrow", "jwt"], Ok(NARROW)),
        ("ec2.yaml", &["jwt"], Err(&["is \"aws\", wanted an identity by JWT"])),
        ("ec2-role-claimed.yaml", &["narrow"], Err(&["\"ratings-role\" is only claimed, not proven"])),
        ("ec2-role-claimed.yaml", &["narrow", "wide"], Ok(WIDE)),
        (
            "ecs.yaml",
            &["narrow", "wide"],
            Err(&["an ECS task", "\"ca-central-1\" is only claimed, not proven, wanted \"us-east-2\""]),
        ),
        ("ecs.yaml", &["ecs"], Err(&["is \"example-role\", wanted \"ratings-role\""])),
        ("jwt.yaml", &["narrow", "jwt"], Ok(JWT)),
        ("gcp.yaml", &["wide", "jwt"], Err(&["is \"gcp\", wanted an AWS", "is \"gcp\", wanted an identity by JWT"])),
        (
            "azure.yaml",
            &["wide", "jwt"],
            Err(&["is \"azure\", wanted an AWS", "is \"azure\", wanted an identity by JWT"]),
        ),
    ];
    for (identity, policies, wanted) in some {
        let ended = explain(identity, policies);
        assert_eq!(ended.stderr, "", "{identity}");
        match wanted {
            Ok(policy) => {
                let verdict = ended.is(0).json();
                assert_eq!((&verdict["allowed"], &verdict["policy"]), (&json!(true), &json!(policy)), "{identity}");
                // Of the others.
                let reasons = verdict["reasons"].as_array().unwrap();
                assert_eq!(reasons.len(), policies.len() - 1, "{identity}: {reasons:?}");
                assert!(!verdict["reasons"].to_string().contains(policy), "{identity}: {reasons:?}");
            }
            Err(why) => {
                let verdict = ended.is(2).json();
                assert_eq!((&verdict["allowed"], &verdict["policy"]), (&json!(false), &Value::Null), "{identity}");
                let reasons: Vec<_> =
                    verdict["reasons"].as_array().unwrap().iter().map(|why| why.as_str().unwrap()).collect();
                assert_eq!(reasons.len(), policies.len(), "{identity}: {reasons:?}");
                for why in why {
                    assert!(reasons.iter().any(|reason| reason.contains(why)), "{identity}: {why}: {reasons:?}");
                }
            }
        }
    }
    let tried: std::collections::BTreeSet<_> = some.iter().map(|(identity, ..)| (*identity).to_owned()).collect();
    let there = std::fs::read_dir(root().join("docs/identities")).unwrap();
    let there: std::collections::BTreeSet<_> =
        there.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(tried, there, "each file is tried");
}

/// The page shows what the file says.
#[test]
fn the_identity_of_the_policy_reference_is_the_file_s() {
    let page = std::fs::read_to_string(root().join("docs/policy-reference.md")).unwrap();
    let (_, rest) = page.split_once("# a part: an identity file\n").unwrap();
    let (shown, _) = rest.split_once("```").unwrap();
    let file = std::fs::read_to_string(root().join("docs/identities/ec2-role-claimed.yaml")).unwrap();
    let value = |text: &str| serde_yaml_ng::from_str::<Value>(text).unwrap();
    assert_eq!(value(shown), value(&file));
}

/// One is no manifest: it isn't passed over in silence where somebody puts it among them.
#[test]
fn an_identity_among_manifests_is_a_fault() {
    let dir = Dir::new();
    dir.write("m/ec2.yaml", std::fs::read(root().join("docs/identities/ec2.yaml")).unwrap());
    dir.run(&["lint", "m"]).is(1).says("m/ec2.yaml:2: ");
}
