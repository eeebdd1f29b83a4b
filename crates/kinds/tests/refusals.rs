//! Every rule broken once (`corpus/mod.rs`), as lint says it. As an API server says it: `tests/tests/crds.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use onboarding_kinds::fault::Fault;
use onboarding_kinds::{agent, identity, manifest};

mod corpus;

use corpus::{Block, blocks, cases, corpus};

const CORPUS: &str = "tests/corpus";

fn lines(faults: &[Fault]) -> Vec<String> {
    faults.iter().map(|fault| fault.to_string().strip_prefix("F:").unwrap().to_owned()).collect()
}

fn check(name: &str, read: impl Fn(&str) -> Vec<Fault>) {
    let good = corpus(&format!("{name}.yaml"));
    assert_eq!(lines(&read(&good)), Vec::<String>::new(), "{name}.yaml is good");
    let mut wrong = String::new();
    for Block { rule, from, to, faults, .. } in blocks(&corpus(&format!("{name}.refusals"))) {
        assert!(good.contains(&from), "{name}, {rule}: {from:?} isn't in the good document");
        let found = lines(&read(&good.replacen(&from, &to, 1)));
        if found != faults || found.is_empty() {
            wrong += &format!("\n# {rule}\n! {}\n", found.join("\n! "));
        }
    }
    assert!(wrong.is_empty(), "{name}: what was found:\n{wrong}");
}

fn manifests(text: &str) -> Vec<Fault> {
    manifest::read("F", text).faults
}

#[test]
fn policies() {
    check("policy", manifests);
    // Each of these might have hidden what a policy says.
    let good = corpus("policy.yaml");
    assert!(!manifest::read("F", &good).policy_unreadable);
    for Block { rule, from, to, .. } in blocks(&corpus("policy.refusals")) {
        assert!(manifest::read("F", &good.replacen(&from, &to, 1)).policy_unreadable, "{rule}");
    }
}

#[test]
fn control_planes() {
    check("control-plane", manifests);
    let good = corpus("control-plane.yaml");
    for Block { rule, from, to, .. } in blocks(&corpus("control-plane.refusals")) {
        assert!(!manifest::read("F", &good.replacen(&from, &to, 1)).policy_unreadable, "{rule}");
    }
}

#[test]
fn onboarding_configurations() {
    check("onboarding-configuration", |text| agent::read_onboarding_configuration("F", text).err().unwrap_or_default());
}

#[test]
fn agent_configurations() {
    check("agent-configuration", |text| agent::read_agent_configuration("F", text).err().unwrap_or_default());
}

#[test]
fn groups() {
    check("group", manifests);
}

#[test]
fn mesh() {
    check("mesh", manifests);
}

#[test]
fn registrations() {
    check("war", manifests);
}

#[test]
fn identities() {
    check("identity", |text| identity::read_identity_file("F", text).err().unwrap_or_default());
}

#[test]
fn values() {
    let wrong = cases().into_iter().filter(|case| manifests(&case.document).is_empty() != case.good);
    let wrong: Vec<_> = wrong.map(|case| format!("{}: {:?}", case.rule, case.value)).collect();
    assert!(wrong.is_empty(), "judged otherwise:\n{}", wrong.join("\n"));
}
