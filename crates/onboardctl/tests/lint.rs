//! `onboardctl lint`: faults on standard output and nothing else there, and which files are read.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod tool;

use std::os::unix::fs::symlink;
use tool::{Dir, GROUP, NARROW, control_plane};

const BAD: &str = "\
apiVersion: authorization.onboarding.tetrate.io/v1alpha1
kind: OnboardingPolicy
metadata: {name: bad, namespace: bookinfo}
spec:
  allow:
  - workloads: [{aws: {accounts: [], ec2: {}}}]
    onboardTo: [{workloadGroupSelector: {}}]
";

const AGENT: &str = "\
apiVersion: config.agent.onboarding.tetrate.io/v1alpha1
kind: OnboardingConfiguration
onboardingEndpoint: {host: onboarding-endpoint.your-company.corp, port: 0}
workloadGroup: {namespace: bookinfo, name: ratings}
";

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

#[test]
fn what_is_right_says_nothing() {
    let dir = Dir::with(&[
        ("policy.yaml", NARROW),
        ("sub/group.yml", GROUP),
        ("sub/deployment.yaml", "apiVersion: apps/v1\nkind: Deployment\nanything: [goes]\n"),
        ("README.md", "not: [yaml"),
    ]);
    let ended = dir.run(&["lint", "."]).is(0).silent();
    assert_eq!(ended.stderr, "");
}

#[test]
fn each_fault_is_a_line_with_its_place() {
    let dir = Dir::with(&[("policies/bad.yaml", BAD), ("onboarding.config.yaml", AGENT)]);
    let ended = dir.run(&["lint", "policies", "onboarding.config.yaml"]).is(1);
    assert_eq!(
        lines(&ended.stdout),
        [
            "policies/bad.yaml:6: OnboardingPolicy bookinfo/bad: spec.allow[0].workloads[0].aws.accounts: must have at least one item",
            "onboarding.config.yaml:3: OnboardingConfiguration: onboardingEndpoint.port: must be a whole number from 1 to 65535, and is 0",
        ]
    );
    assert_eq!(ended.stderr, "");
}

#[test]
fn what_only_a_cluster_refuses_is_a_warning() {
    let rule = NARROW.split_once("  allow:\n").unwrap().1;
    let dir = Dir::with(&[("policy.yaml", &NARROW.replace(rule, &rule.repeat(33)))]);
    let ended = dir.run(&["lint", "."]).is(0).silent();
    assert!(
        ended.stderr.starts_with("warning: ")
            && ended.stderr.contains("spec.allow: has 33 items, and a cluster takes at most 32"),
        "{}",
        ended.stderr
    );
}

#[test]
fn faults_come_in_the_order_of_files_and_lines() {
    let twice = format!("{NARROW}---\n{BAD}---\n{NARROW}");
    let dir = Dir::with(&[("b.yaml", &twice), ("a.yaml", BAD), ("syntax.yaml", &format!("{BAD}---\nkind: [\n"))]);
    let ended = dir.run(&["lint", "b.yaml", "a.yaml", "syntax.yaml"]).is(1);
    let places: Vec<_> =
        lines(&ended.stdout).iter().map(|line| line.split(':').take(2).collect::<Vec<_>>().join(":")).collect();
    assert_eq!(places[..4], ["b.yaml:31", "b.yaml:34", "a.yaml:6", "syntax.yaml:6"], "{ended:?}");
    assert!(places[4].starts_with("syntax.yaml:"), "{ended:?}");
    assert!(ended.stdout.contains("is there twice, first at b.yaml:1"), "{ended:?}");
}

#[test]
fn warnings_are_no_faults_and_not_on_standard_output() {
    let slow = control_plane("", "[]")
        .replace("      workloads:\n", "      workloads:\n        deregistration: {propagationDelay: 20s}\n");
    let dir = Dir::with(&[("plane.yaml", &slow)]);
    dir.run(&["lint", "plane.yaml"]).is(0).silent().complains("warning: plane.yaml:13: ControlPlane");
}

#[test]
fn a_directory_is_read_as_the_plane_reads_it() {
    let dir =
        Dir::with(&[("m/..2026_1/bad.yaml", "kind: ["), ("m/..2026_2/bad.yaml", BAD), ("m/.draft.yaml", "kind: [")]);
    symlink("..2026_2", dir.path("m/..data")).unwrap();
    symlink("..data/bad.yaml", dir.path("m/bad.yaml")).unwrap();
    symlink(".", dir.path("m/round")).unwrap();
    dir.write("far/far.json", r#"{"apiVersion": "v1", "kind": "List", "items": 1}"#);
    symlink(dir.path("far"), dir.path("m/zz")).unwrap();
    let ended = dir.run(&["lint", "m", "m/bad.yaml", "far"]).is(1);
    let files: Vec<_> = lines(&ended.stdout).iter().map(|line| line.split(':').next().unwrap()).collect();
    assert_eq!(files, ["m/bad.yaml", "m/zz/far.json"], "{ended:?}");
}

#[test]
fn a_file_that_is_named_is_read_whatever_it_is_called() {
    let dir = Dir::with(&[("policy.txt", BAD)]);
    dir.run(&["lint", "policy.txt"]).is(1).says("policy.txt:6: ");
    dir.run_with(&["lint", "-", "-"], BAD, &[]).is(1).says("-:6: OnboardingPolicy bookinfo/bad");
    dir.run_with(&["lint", "-"], NARROW, &[]).is(0).silent();
}

#[test]
fn what_can_not_be_read_is_said_beside_the_faults() {
    let dir = Dir::with(&[("bad.yaml", BAD)]);
    symlink("nowhere", dir.path("dangling.yaml")).unwrap();
    let ended = dir.run(&["lint", "missing", "."]).is(1);
    assert_eq!(lines(&ended.stdout).len(), 1, "{ended:?}");
    let ended = ended.complains("onboardctl: reading missing: No such file or directory");
    ended.complains("onboardctl: reading ./dangling.yaml: No such file or directory");
    dir.write("pipes/bad.yaml", BAD);
    assert!(std::process::Command::new("mkfifo").arg(dir.path("pipes/pipe.yaml")).status().unwrap().success());
    dir.run(&["lint", "pipes"]).is(1).says("pipes/bad.yaml:6").complains("pipes/pipe.yaml: isn't a regular file");
    std::fs::create_dir(dir.path("empty")).unwrap();
    dir.run(&["lint", "empty"]).is(0).silent().complains("warning: empty: no *.yaml, *.yml or *.json in it");
}

#[test]
fn another_encoding_is_a_fault_of_its_line() {
    let dir = Dir::new();
    dir.write("latin.yaml", b"kind: a\nname: caf\xe9\n");
    assert_eq!(dir.run(&["lint", "latin.yaml"]).is(1).stdout, "latin.yaml:2: isn't UTF-8 text\n");
}

#[test]
fn a_terminal_obeys_nothing_of_the_input() {
    let dir = Dir::new();
    dir.write("esc\u{1b}[31m.yaml", BAD.replace("accounts", "\"acc\\u001b[2Jounts\\u202e\""));
    let ended = dir.run(&["lint", "."]).is(1);
    assert!(ended.stdout.contains("\\u{1b}[2J"), "{ended:?}");
    for text in [&ended.stdout, &ended.stderr] {
        assert!(!text.contains(['\u{1b}', '\u{202e}']), "{ended:?}");
    }
    let missing = dir.run(&["lint", "no\u{1b}[31m"]).is(1).complains("no\\u{1b}[31m");
    assert!(!missing.stderr.contains('\u{1b}'), "{missing:?}");
}

#[test]
fn wrong_usage_is_1_and_help_is_an_answer() {
    let dir = Dir::new();
    dir.run(&["lint"]).is(1).silent().complains("name files or directories of manifests").complains("--cluster");
    dir.run(&["lnit", "."]).is(1).silent();
    dir.run(&[]).is(1).silent().complains("Usage:");
    for verb in ["lint", "explain", "plan", "attest", "workloads", "status", "completions"] {
        dir.run(&[verb, "--help"]).is(0).says("Example");
    }
    dir.run(&["--version"]).is(0).says("onboardctl ");
    for shell in ["bash", "zsh", "fish"] {
        dir.run(&["completions", shell]).is(0).says("explain");
    }
}
