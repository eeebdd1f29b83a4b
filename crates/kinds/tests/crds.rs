//! `deploy/crds/*.yaml` are what `crd` says. To write them anew: `cargo run -p onboarding-kinds --example crds`.
//! That an API server takes them, and refuses by them what lint refuses, is shown by `tests/tests/crds.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use onboarding_kinds::{crd, manifest};
use serde_json::{Map, Value, json};
use std::path::Path;

#[test]
fn the_committed_files_are_those_of_today() {
    for (name, definition) in crd::all() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds").join(name).with_extension("yaml");
        let committed = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert!(
            committed == serde_yaml_ng::to_string(&definition).unwrap(),
            "{} isn't what crates/kinds/src/crd says; to write it anew: \
             cargo run -p onboarding-kinds --example crds",
            file.display()
        );
    }
}

fn schema(definition: &Value) -> &Value {
    &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
}

/// The smallest value that has this field, put together on the way down to it.
fn sample(schema: &Value) -> Value {
    match schema["type"].as_str() {
        Some("object") => Value::Object(Map::new()),
        Some("array") => json!([sample(&schema["items"])]),
        Some("integer") => json!(1),
        _ => json!("x"),
    }
}

/// Calls `each` with every field of a schema: its path as faults write it, and a value of the whole in which it is there.
fn each_field(schema: &Value, path: &str, whole: &dyn Fn(Value) -> Value, each: &mut dyn FnMut(&str, Value)) {
    for (key, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        let whole = |value: Value| whole(json!({ key: value }));
        each(&path, whole(sample(field)));
        match field["type"].as_str() {
            Some("array") => each_field(&field["items"], &format!("{path}[0]"), &|value| whole(json!([value])), each),
            _ => each_field(field, &path, &whole, each),
        }
    }
}

#[test]
fn every_field_of_a_schema_is_one_that_is_read() {
    for (name, definition) in crd::all() {
        let group = definition["spec"]["group"].as_str().unwrap();
        let kind = &definition["spec"]["names"]["kind"];
        let mut fields = 0;
        let whole = |value: Value| json!({ "spec": value });
        each_field(&schema(&definition)["properties"]["spec"], "spec", &whole, &mut |path, mut object| {
            fields += 1;
            object["apiVersion"] = json!(format!("{group}/v1alpha1"));
            object["kind"] = kind.clone();
            object["metadata"] = json!({ "name": "x" });
            let faults = manifest::read("F", &object.to_string()).faults;
            let unknown: Vec<_> = faults.iter().filter(|fault| fault.message.contains("is unknown")).collect();
            assert!(unknown.is_empty(), "{name}, {path}: {unknown:?}");
        });
        assert!(fields > 20, "{name}: {fields}");
    }
}

/// Every place where a rule stands, with its limits and messages.
fn each_schema(schema: &Value, path: &str, each: &mut dyn FnMut(&str, &Value)) {
    each(path, schema);
    for (key, field) in schema["properties"].as_object().into_iter().flatten() {
        each_schema(field, &format!("{path}.{key}"), each);
    }
    for key in ["items", "additionalProperties"] {
        if schema[key].is_object() {
            each_schema(&schema[key], &format!("{path}[]"), each);
        }
    }
}

#[test]
fn rules_have_words_and_what_they_read_has_limits() {
    for (name, definition) in crd::all() {
        each_schema(schema(&definition), name, &mut |path, schema| {
            for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
                assert!(rule["message"].as_str().is_some_and(|message| !message.is_empty()), "{path}: {rule}");
                assert!(rule["reason"].is_string(), "{path}: {rule}");
                if schema["type"] == "string" {
                    assert!(schema["maxLength"].is_u64(), "{path}");
                }
            }
            if schema["type"] == "array" {
                assert!(schema["maxItems"].is_u64() && schema["x-kubernetes-list-type"].is_string(), "{path}");
            }
        });
    }
}

#[test]
fn a_control_plane_is_open_where_it_isn_t_ours() {
    let definition = crd::control_plane();
    let mut open = Vec::new();
    each_schema(schema(&definition), "", &mut |path, schema| {
        if schema["x-kubernetes-preserve-unknown-fields"] == true {
            open.push(path.to_owned());
        }
    });
    assert_eq!(open, ["", ".spec", ".spec.meshExpansion", ".spec.meshExpansion.customGateway", ".status"]);
}
