//! What a set of objects means, without an API server.

use super::assemble::{Assembled, Trouble, assemble};
use super::objects::{Kind, Objects};
use super::*;
use crate::istio::DEFAULT_REVISION;
use kube::api::DynamicObject;
use serde_json::{Value, json};

fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).unwrap()
}

fn named(kind: &str, name: &str, rest: Value) -> DynamicObject {
    let mut object = json!({
        "apiVersion": "v1",
        "kind": kind,
        "metadata": {
            "namespace": "bookinfo", "name": name, "uid": format!("uid-{name}"), "resourceVersion": "1", "generation": 1,
            "managedFields": [{"manager": "kubectl"}],
        },
    });
    merge(&mut object, rest);
    self::object(object)
}

fn merge(into: &mut Value, from: Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

fn policy(name: &str) -> DynamicObject {
    named(
        "OnboardingPolicy",
        name,
        json!({"spec": {"allow": [{
            "workloads": [{"aws": {"accounts": ["123456789012"], "ec2": {}}}],
            "onboardTo": [{"workloadGroupSelector": {}}],
        }]}}),
    )
}

fn group(weight: Value) -> DynamicObject {
    named("WorkloadGroup", "ratings", json!({"spec": {"template": {"serviceAccount": "ratings-vm", "weight": weight}}}))
}

fn plane(onboarding: Value) -> DynamicObject {
    named(
        "ControlPlane",
        "controlplane",
        json!({"metadata": {"namespace": "istio-system"}, "spec": {"hub": "x", "meshExpansion": {"onboarding": onboarding}}}),
    )
}

fn enabled() -> DynamicObject {
    plane(json!({"endpoint": {"hosts": ["onboarding.example"], "secretName": "tls"}, "uid": "here"}))
}

fn config_map(name: &str, data: Value) -> DynamicObject {
    named("ConfigMap", name, json!({"metadata": {"namespace": "istio-system"}, "data": data}))
}

fn means(objects: &Objects) -> Assembled {
    assemble(objects, &Trouble::default(), "istio-system", &Assembled::default())
}

fn after(objects: &Objects, before: &Assembled) -> Assembled {
    assemble(objects, &Trouble::default(), "istio-system", before)
}

fn ratings() -> GroupName {
    GroupName { namespace: "bookinfo".to_owned(), name: "ratings".to_owned() }
}

fn says(assembled: &Assembled, words: &str) -> bool {
    assembled.faults.iter().any(|fault| fault.contains(words))
}

#[test]
fn a_faulty_policy_is_absent_and_suspends_and_is_named() {
    let mut objects = Objects::default();
    assert!(objects.put(Kind::Policies, policy("narrow")));
    assert!(objects.put(Kind::Policies, policy("wide")));
    let good = means(&objects);
    assert_eq!((good.policies.len(), good.policy_unreadable), (2, false));

    let mut faulty = policy("wide");
    faulty.data["spec"]["allow"][0]["workloads"][0]["aws"]["accounts"] = json!([]);
    assert!(objects.put(Kind::Policies, faulty));
    let bad = after(&objects, &good);
    let names: Vec<_> = bad.policies.iter().map(|policy| policy.name.as_str()).collect();
    assert_eq!((names, bad.policy_unreadable), (vec!["narrow"], true));
    assert!(
        says(&bad, "OnboardingPolicy bookinfo/wide: spec.allow[0].workloads[0].aws.accounts: "),
        "{:?}",
        bad.faults
    );
    let seen = &bad.view.policies[1];
    assert_eq!((seen.name.as_str(), seen.is_read), ("wide", false));
    assert!(seen.faults[0].starts_with("spec.allow[0].workloads[0].aws.accounts: "), "{:?}", seen.faults);

    assert!(objects.gone(Kind::Policies, &("bookinfo".to_owned(), "wide".to_owned())));
    let gone = after(&objects, &bad);
    assert_eq!((gone.policies.len(), gone.policy_unreadable), (1, false));
}

#[test]
fn a_faulty_group_admits_nobody_and_the_mesh_goes_on_with_the_last_good_one() {
    let mut objects = Objects::default();
    objects.put(Kind::Groups, group(json!(5)));
    assert_eq!(means(&objects).groups[&ratings()].weight, Some(5));
    objects.put(Kind::Groups, group(json!("heavy")));
    let bad = means(&objects);
    assert!(bad.policy_unreadable && bad.groups.is_empty());
    assert!(says(&bad, "WorkloadGroup bookinfo/ratings: spec.template.weight"), "{:?}", bad.faults);
    assert_eq!(bad.owners[&ratings()].group.weight, Some(5));
    assert_eq!(bad.inputs.groups[&ratings()].weight, Some(5));
    assert_eq!(bad.view.groups[&ratings()].uid, "uid-ratings");

    // Another object of the same name has no past.
    let mut another = group(json!("heavy"));
    another.metadata.uid = Some("another".to_owned());
    objects.put(Kind::Groups, another);
    assert!(means(&objects).owners.is_empty());
}

#[test]
fn what_is_being_deleted_is_gone_for_whoever_asks_to_join() {
    let mut objects = Objects::default();
    let deleted =
        json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["foregroundDeletion"]}});
    let with = |object: DynamicObject| {
        let mut value = serde_json::to_value(object).unwrap();
        merge(&mut value, deleted.clone());
        self::object(value)
    };
    objects.put(Kind::Groups, with(group(json!(5))));
    objects.put(Kind::Policies, with(policy("narrow")));
    let assembled = means(&objects);
    assert!(assembled.groups.is_empty() && assembled.policies.is_empty());
    assert!(!assembled.policy_unreadable, "it is withdrawn, not unreadable");
}

#[test]
fn what_the_api_server_adds_changes_nothing() {
    let mut objects = Objects::default();
    assert!(objects.put(Kind::Groups, group(json!(5))));
    let mut touched = group(json!(5));
    touched.metadata.resource_version = Some("2".to_owned());
    touched.metadata.managed_fields = None;
    touched.data["status"] = json!({"conditions": []});
    assert!(!objects.put(Kind::Groups, touched.clone()));
    assert!(!objects.listed(Kind::Groups, vec![touched]));
    assert!(objects.listed(Kind::Groups, vec![]));
    assert!(objects.groups.is_empty());

    let mesh = config_map("istio", json!({"mesh": "trustDomain: a\n"}));
    assert!(objects.listed(Kind::ConfigMaps, vec![mesh.clone(), config_map("istio-leader", json!({}))]));
    assert!(!objects.listed(Kind::ConfigMaps, vec![mesh]));
    assert!(!objects.put(Kind::ConfigMaps, config_map("istio-leader", json!({"x": "y"}))));
}

#[test]
fn what_is_missing_is_said() {
    let mut objects = Objects::default();
    assert!(says(&means(&objects), "onboarding isn't enabled: no ControlPlane in namespace istio-system"));
    objects.put(Kind::ControlPlanes, enabled());
    let without_secret = means(&objects);
    assert!(says(&without_secret, "the Secret istio-system/tls, which the ControlPlane istio-system/controlplane"));
    assert!(says(&without_secret, "kubectl create secret tls tls -n istio-system"));
    assert_eq!(without_secret.plane.as_ref().unwrap().uid, "here");
    assert_eq!((without_secret.secret_name.as_deref(), without_secret.tls.is_none()), (Some("tls"), true));

    let opaque =
        named("Secret", "tls", json!({"metadata": {"namespace": "istio-system"}, "type": "Opaque", "data": {}}));
    objects.put(Kind::Secret, opaque);
    assert!(says(&means(&objects), "isn't of type kubernetes.io/tls"));

    let mut second = enabled();
    second.metadata.name = Some("another".to_owned());
    objects.put(Kind::ControlPlanes, second);
    let two = means(&objects);
    assert!(says(&two, "onboarding is enabled by 2 ControlPlanes"), "{:?}", two.faults);
    assert!(two.plane.is_none());
}

#[test]
fn a_control_plane_with_faults_counts_as_absent_and_suspends() {
    let mut objects = Objects::default();
    objects.put(Kind::ControlPlanes, enabled());
    let good = means(&objects);
    objects.put(Kind::ControlPlanes, plane(json!({"endpoint": {"hosts": [], "secretName": "tls"}})));
    let bad = after(&objects, &good);
    assert!(bad.plane.is_none() && bad.policy_unreadable);
    assert!(says(&bad, "ControlPlane istio-system/controlplane: spec.meshExpansion.onboarding.endpoint.hosts"));
    // The certificate isn't forgotten meanwhile.
    assert_eq!(bad.secret_name.as_deref(), Some("tls"));
    objects.gone(Kind::ControlPlanes, &("istio-system".to_owned(), "controlplane".to_owned()));
    let none = after(&objects, &bad);
    assert_eq!((none.secret_name, none.policy_unreadable), (None, false));
}

#[test]
fn the_last_good_certificate_stays() {
    let base64 = |text: &str| {
        use base64::Engine;
        base64::engine::general_purpose::STANDARD.encode(text)
    };
    let secret = |certificate: &str| {
        let key = "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n";
        named(
            "Secret",
            "tls",
            json!({
                "metadata": {"namespace": "istio-system"},
                "type": "kubernetes.io/tls",
                "data": {"tls.crt": base64(certificate), "tls.key": base64(key)},
            }),
        )
    };
    let mut objects = Objects::default();
    objects.put(Kind::ControlPlanes, enabled());
    let pem = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n";
    objects.put(Kind::Secret, secret(pem));
    assert_eq!(means(&objects).tls.unwrap().certificate_chain, pem);
    objects.put(Kind::Secret, secret("nothing"));
    let bad = means(&objects);
    assert_eq!(bad.tls.as_ref().unwrap().certificate_chain, pem);
    assert!(says(&bad, "Secret istio-system/tls: data"), "{:?}", bad.faults);
    assert!(!bad.policy_unreadable);
}

#[test]
fn the_uid_is_that_of_the_control_plane_or_the_one_that_is_kept() {
    let mut objects = Objects::default();
    objects.put(Kind::ControlPlanes, plane(json!({"endpoint": {"hosts": ["a.example"], "secretName": "tls"}})));
    let none = means(&objects);
    assert!(none.wants_uid && none.plane.is_none() && says(&none, "the plane has no UID yet"));
    let unlisted = Trouble { unlisted: [Kind::ConfigMaps].into(), ..Trouble::default() };
    let not_yet = assemble(&objects, &unlisted, "istio-system", &Assembled::default());
    assert!(!not_yet.wants_uid && not_yet.plane.is_none());

    objects.put(Kind::ConfigMaps, config_map(PLANE_CONFIG, json!({"config.yaml": "a: b\n"})));
    assert!(means(&objects).wants_uid);
    objects.put(Kind::ConfigMaps, config_map(PLANE_CONFIG, json!({"config.yaml": "uid: kept\n"})));
    let kept = means(&objects);
    assert_eq!((kept.plane.unwrap().uid.as_str(), kept.wants_uid), ("kept", false));
    objects.put(Kind::ConfigMaps, config_map(PLANE_CONFIG, json!({"config.yaml": "uid: [\n"})));
    let unreadable = means(&objects);
    assert!(!unreadable.wants_uid && unreadable.plane.is_none());
    assert!(says(&unreadable, "the plane's UID can't be read"));
    objects.put(Kind::ControlPlanes, enabled());
    assert_eq!(means(&objects).plane.unwrap().uid, "here");
}

#[test]
fn what_is_unknown_admits_nobody() {
    let mut objects = Objects::default();
    objects.put(Kind::Policies, policy("narrow"));
    objects.put(Kind::Groups, group(json!(5)));
    let trouble = Trouble { unknown: true, faults: vec!["old".to_owned()], ..Trouble::default() };
    let assembled = assemble(&objects, &trouble, "istio-system", &Assembled::default());
    assert!(assembled.policies.is_empty() && assembled.policy_unreadable && says(&assembled, "old"));
    // The mesh goes on.
    assert_eq!(assembled.inputs.groups.len(), 1);
}

#[test]
fn meshes_revisions_and_sidecars_are_what_a_provisioner_needs() {
    let mut objects = Objects::default();
    let configs = vec![
        config_map("istio", json!({"mesh": "trustDomain: one.example\n"})),
        config_map("istio-canary", json!({"mesh": "- no map\n"})),
        config_map(
            "istio-sidecar-injector",
            json!({"values": r#"{"global":{"multiCluster":{"clusterName":"east"}}}"#}),
        ),
        config_map("istio-ca-root-cert", json!({"root-cert.pem": "PEM"})),
        config_map("istio-gateway-status-leader", json!({})),
    ];
    objects.listed(Kind::ConfigMaps, configs);
    let labelled =
        |name: &str, labels: Value| named("x", name, json!({"metadata": {"namespace": null, "labels": labels}}));
    objects.put(Kind::Namespaces, labelled("bookinfo", json!({"istio.io/rev": "canary"})));
    objects.put(Kind::Tags, labelled("hook", json!({"istio.io/tag": "prod", "istio.io/rev": "default"})));
    let sidecar = |name: &str, created: &str| {
        named(
            "Sidecar",
            name,
            json!({"metadata": {"creationTimestamp": created}, "spec": {"egress": [{"hosts": ["./*"]}]}}),
        )
    };
    objects.put(Kind::Sidecars, sidecar("a-younger", "2026-02-01T00:00:00Z"));
    objects.put(Kind::Sidecars, sidecar("z-elder", "2026-01-01T00:00:00Z"));
    let first = means(&objects);
    let meshes = &first.inputs.meshes;
    let default = meshes.by_revision[DEFAULT_REVISION].as_ref().unwrap();
    assert_eq!((default.trust_domain.as_str(), default.cluster_id.as_str()), ("one.example", "east"));
    assert!(meshes.by_revision["canary"].is_err());
    assert_eq!(meshes.by_revision.len(), 2);
    assert_eq!(meshes.tags["prod"], "default");
    let bookinfo = &first.inputs.namespaces["bookinfo"];
    assert_eq!(bookinfo.revision.as_deref(), Some("canary"));
    let order: Vec<_> = bookinfo.sidecars.iter().map(|sidecar| sidecar.name.as_str()).collect();
    assert_eq!(order, ["z-elder", "a-younger"]);
    assert_eq!(first.inputs.namespaces["istio-system"].root_certificates.as_deref(), Some("PEM"));

    objects.put(Kind::Sidecars, {
        let mut other = sidecar("b", "2026-01-01T00:00:00Z");
        other.metadata.namespace = Some("other".to_owned());
        other
    });
    let second = after(&objects, &first);
    assert!(Arc::ptr_eq(&second.inputs.meshes, meshes));
    assert!(Arc::ptr_eq(&second.inputs.namespaces["bookinfo"], bookinfo));
    assert!(second.inputs.namespaces.contains_key("other"));
}

#[tokio::test]
async fn what_comes_in_a_burst_is_taken_in_at_once() {
    let tag = Tag { kind: Kind::Policies, epoch: 0 };
    let (sender, mut changes) = mpsc::channel(BACKLOG);
    for _ in 0..500 {
        sender.send((tag, Instant::now(), Change::Heard)).await.unwrap();
    }
    // What goes on for ever is cut off.
    let endless = tokio::spawn(async move {
        while sender.send((tag, Instant::now(), Change::Heard)).await.is_ok() {
            tokio::time::sleep(QUIET / 10).await;
        }
    });
    let mut batch = Vec::new();
    tokio::time::timeout(Duration::from_secs(30), settle(&mut changes, &mut batch)).await.unwrap();
    assert!(batch.len() >= 500, "{}", batch.len());
    drop(changes);
    endless.await.unwrap();
}
