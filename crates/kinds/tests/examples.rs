//! What is shipped is right: `examples/`, the demo's manifests, and what the documents show.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use onboarding_kinds::agent;
use onboarding_kinds::manifest::{self, Manifest};
use std::path::PathBuf;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn read_directory(directory: &str, other: impl Fn(&str, &str) -> bool) -> Vec<Manifest> {
    let mut items = Vec::new();
    let mut paths: Vec<_> =
        std::fs::read_dir(root().join(directory)).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == "yaml")) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        if other(name, &text) {
            continue;
        }
        let manifests = manifest::read(name, &text);
        assert!(
            manifests.faults.is_empty() && manifests.warnings.is_empty(),
            "{:?}",
            (manifests.faults, manifests.warnings)
        );
        assert!(!manifests.items.is_empty(), "{name} holds nothing that is read");
        items.extend(manifests.items);
    }
    assert_eq!(manifest::cross_check(&items), []);
    items
}

#[test]
fn examples() {
    let items = read_directory("examples", |name, text| match name {
        "agent.config.yaml" => {
            assert_eq!(agent::read_agent_configuration(name, text), Ok(agent::AgentConfiguration::default()));
            true
        }
        "agent.config-plugins.yaml" => {
            agent::read_agent_configuration(name, text).unwrap();
            true
        }
        "onboarding.config.yaml" => {
            assert_eq!(agent::read_onboarding_configuration(name, text).unwrap().port, 15443);
            true
        }
        _ => false,
    });
    assert_eq!(items.len(), 8);
}

#[test]
fn the_demo_s_manifests() {
    assert!(!read_directory("demo/manifests", |_, _| false).is_empty());
}

/// Each ```yaml block of the references is read; one that isn't a whole document starts with a comment that says so.
#[test]
fn what_the_references_show() {
    let mut shown = 0;
    for page in ["docs/policy-reference.md", "docs/agent-reference.md"] {
        let text = std::fs::read_to_string(root().join(page)).unwrap();
        for block in text.split("```yaml\n").skip(1) {
            let block = block.split("```").next().unwrap();
            if block.starts_with("# a part") {
                continue;
            }
            let manifests = manifest::read(page, block);
            assert_eq!(manifests.faults, [], "{page}: {block}");
            assert_eq!(manifests.items.len(), 1, "{page}: {block}");
            shown += 1;
        }
    }
    assert!(shown >= 3);
}

/// The messages that the policy reference lists are the ones that come.
#[test]
fn the_messages_in_the_policy_reference() {
    let text = std::fs::read_to_string(root().join("docs/policy-reference.md")).unwrap();
    let (_, rest) = text.split_once("```text\n").expect("a block of messages");
    let (block, _) = rest.split_once("```").unwrap();
    let corpus: String = ["policy", "control-plane"]
        .iter()
        .map(|name| std::fs::read_to_string(root().join(format!("crates/kinds/tests/corpus/{name}.refusals"))).unwrap())
        .collect();
    for line in block.lines() {
        // Of `FILE:LINE: OBJECT: PATH: MESSAGE`, the path and the message.
        let message = line.splitn(3, ": ").nth(2).unwrap();
        assert!(corpus.contains(message), "no test of the corpus gives: {message}");
    }
}
