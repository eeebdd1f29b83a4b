use super::*;

fn config_map(managed_by: Option<&str>, yaml: Option<&str>) -> DynamicObject {
    let labels = managed_by.map(|name| json!({objects::MANAGED_BY: name}));
    let object = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": config::NAME, "labels": labels},
        "data": {config::KEY: yaml},
    });
    serde_json::from_value(object).unwrap()
}

#[test]
fn the_uid_is_made_once_and_kept() {
    let made = config_yaml(None, None).unwrap().unwrap();
    assert_ne!(config_yaml(None, None).unwrap().unwrap(), made);
    for maker in ["onboarding-operator", "onboarding-plane"] {
        let held = config_map(Some(maker), Some(&made));
        assert_eq!(config_yaml(Some(&held), None).unwrap().unwrap(), made);
        assert_eq!(config_yaml(Some(&held), Some("https://a.corp")).unwrap().unwrap(), "uid: https://a.corp\n");
    }
}

#[test]
fn a_config_of_others_is_taken_at_its_word() {
    let by_hand = |yaml| config_map(None, yaml);
    assert_eq!(config_yaml(Some(&by_hand(Some("uid: here"))), None), Ok(None));
    assert_eq!(config_yaml(Some(&by_hand(Some("uid: here"))), Some("here")), Ok(None));
    let other = config_yaml(Some(&by_hand(Some("uid: here"))), Some("there")).unwrap_err();
    assert!(other.contains(r#"its uid is "here" while the ControlPlane's is "there""#), "{other}");
    let none = config_yaml(Some(&by_hand(None)), None).unwrap_err();
    assert!(none.contains("has no uid; add one, or delete it"), "{none}");
}

#[test]
fn a_config_that_cannot_be_read_stays() {
    let error = config_yaml(Some(&config_map(Some("onboarding-plane"), Some("- a"))), None).unwrap_err();
    assert!(error.contains("isn't a map; it stays as it is"), "{error}");
}

#[test]
fn tags_are_no_istiods() {
    let service = |name: &str, labels: Value| -> DynamicObject {
        let object = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "labels": labels}});
        serde_json::from_value(object).unwrap()
    };
    let found = istiods(&[
        service("istiod", json!({})),
        service("istiod-1-29", json!({"istio.io/rev": "1-29"})),
        service("istiod-revision-tag-prod", json!({"istio.io/rev": "1-29", "istio.io/tag": "prod"})),
        service("istiodx", json!({})),
    ]);
    let names: Vec<_> = found.iter().map(|istiod| (istiod.revision.as_str(), istiod.service.as_str())).collect();
    assert_eq!(names, [("1-29", "istiod-1-29"), ("default", "istiod")]);
}

#[test]
fn a_deployment_that_is_not_available_says_why() {
    let deployment = |status: Value| -> Option<DynamicObject> {
        let object =
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "status": status});
        Some(serde_json::from_value(object).unwrap())
    };
    let good = json!({"conditions": [{"type": "Available", "status": "True"}]});
    let bad = json!({"replicas": 2, "availableReplicas": 1, "conditions": [
        {"type": "Available", "status": "False"}, {"type": "ReplicaFailure", "status": "True", "message": "no quota"},
    ]});
    assert!(available(&[("good".to_owned(), deployment(good))]).holds);
    let found = available(&[("bad".to_owned(), deployment(bad))]);
    assert_eq!(found.message, "Deployment bad: 1 of 2 replicas are available: no quota");
    let fresh = available(&[("new".to_owned(), deployment(Value::Null))]);
    assert_eq!(fresh.message, "Deployment new: 0 of 0 replicas are available");
}
