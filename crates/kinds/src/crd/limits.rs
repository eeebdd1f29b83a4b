//! What an API server refuses for its size alone: lists, mappings and texts beyond what the schemas take.
//!
//! To the plane they are as good as shorter ones, so `manifest::read` says nothing of them. Whoever checks manifests for a cluster wants to
//! know before `kubectl apply` does. The limits are read from the schemas themselves.

use crate::fault::Fault;
use crate::node::{self, Node, Value};
use crate::reader::{Document, segment};
use serde_json::Value as Json;

/// A warning for each, in the order of the text. Nothing of what isn't of our kinds, or can't be read.
pub fn beyond(file: &str, text: &str) -> Vec<Fault> {
    let schemas: Vec<(String, Json)> = super::all().into_iter().map(|(_, definition)| schema(definition)).collect();
    let mut found = Vec::new();
    for node in node::documents(text).filter_map(Result::ok) {
        document(file, &node, &schemas, &mut found);
    }
    found
}

/// `apiVersion kind`, and the schema of a whole object.
fn schema(mut definition: Json) -> (String, Json) {
    let text = |value: &Json| value.as_str().unwrap_or_default().to_owned();
    let version = definition["spec"]["versions"][0].take();
    let group = text(&definition["spec"]["group"]);
    let kind = text(&definition["spec"]["names"]["kind"]);
    let mut version_schema = version["schema"]["openAPIV3Schema"].clone();
    (format!("{group}/{} {kind}", text(&version["name"])), version_schema.take())
}

fn document(file: &str, node: &Node, schemas: &[(String, Json)], found: &mut Vec<Fault>) {
    let heading = |key| node.get(key).and_then(|entry| entry.value.as_text()).unwrap_or_default();
    if heading("kind") == "List" {
        let items = node.get("items").map(|entry| &entry.value.value);
        if let Some(Value::List(items)) = items {
            items.iter().for_each(|item| document(file, item, schemas, found));
        }
        return;
    }
    let of = format!("{} {}", heading("apiVersion"), heading("kind"));
    let Some((_, schema)) = schemas.iter().find(|(known, _)| *known == of) else { return };
    let Some(spec) = node.get("spec") else { return };
    let name_of = |key| node.get("metadata").and_then(|entry| entry.value.get(key)?.value.as_text());
    let object =
        format!("{} {}/{}", heading("kind"), name_of("namespace").unwrap_or("default"), name_of("name").unwrap_or("?"));
    let document = Document::new(file, object);
    walk(&document, &spec.value, &schema["properties"]["spec"], spec.line, "spec");
    found.extend(document.finish().1);
}

fn walk(document: &Document, node: &Node, schema: &Json, line: usize, path: &str) {
    let limit = |keyword: &str| schema[keyword].as_u64().and_then(|limit| usize::try_from(limit).ok());
    let check = |count: usize, keyword: &str, what: &str| {
        if let Some(most) = limit(keyword).filter(|most| count > *most) {
            let way_out = match what {
                "items" => "; divide it",
                _ => "",
            };
            document.warn(
                line,
                path,
                format!("has {count} {what}, and a cluster takes at most {most}: kubectl apply refuses it{way_out}"),
            );
        }
    };
    match &node.value {
        Value::List(items) => {
            check(items.len(), "maxItems", "items");
            for (index, item) in items.iter().enumerate() {
                walk(document, item, &schema["items"], item.line, &format!("{path}[{index}]"));
            }
        }
        Value::Map(entries) => {
            check(entries.len(), "maxProperties", "entries");
            for entry in entries {
                let inner = schema["properties"].get(&entry.key).unwrap_or(&schema["additionalProperties"]);
                let path = format!("{path}{}", segment(path, &entry.key));
                walk(document, &entry.value, inner, entry.line, &path);
            }
        }
        Value::Text(text) => check(text.chars().count(), "maxLength", "characters"),
        Value::Null | Value::Number(_) | Value::Bool(_) | Value::YesNo(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: usize, account: &str) -> String {
        let rule = format!(
            "  - workloads: [{{aws: {{accounts: [{account}], ec2: {{}}}}}}]\n    onboardTo: [{{workloadGroupSelector: {{}}}}]\n"
        );
        format!(
            "apiVersion: authorization.onboarding.tetrate.io/v1alpha1\nkind: OnboardingPolicy\nmetadata: {{name: large, namespace: bookinfo}}\nspec:\n  allow:\n{}",
            rule.repeat(rules)
        )
    }

    fn said(text: &str) -> Vec<String> {
        beyond("policy.yaml", text).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_beyond_is_said_at_its_place() {
        assert_eq!(said(&policy(32, "'123456789012'")), Vec::<String>::new());
        let rules = "policy.yaml:5: OnboardingPolicy bookinfo/large: spec.allow: has 33 items, and a cluster takes at most 32: kubectl apply refuses it; divide it";
        assert_eq!(said(&policy(33, "'123456789012'")), [rules]);
        let accounts = ["'123456789012'"; 257].join(", ");
        let found = said(&policy(1, &accounts));
        assert!(
            found.len() == 1 && found[0].contains("spec.allow[0].workloads[0].aws.accounts: has 257 items"),
            "{found:?}"
        );
        // In a list of kubectl, beside what is nobody's of ours.
        let list = format!("apiVersion: v1\nkind: List\nitems:\n- {}\n", policy(33, "x").replace('\n', "\n  "));
        assert_eq!(said(&format!("kind: Deployment\nspec: {{}}\n---\n{list}")).len(), 1);
        assert_eq!(said("a: [\n---\nkind: x\n"), Vec::<String>::new());
    }
}
