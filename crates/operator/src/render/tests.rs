use super::*;
use crate::objects::Kind;
use onboarding_kinds::manifest::{self, Object};
use std::collections::HashSet;

fn plane(expansion: &str) -> ControlPlane {
    let text = format!(
        "apiVersion: install.tetrate.io/v1alpha1\nkind: ControlPlane\nmetadata: {{name: controlplane, namespace: istio-system}}\nspec: {{meshExpansion: {expansion}}}\n"
    );
    let mut manifests = manifest::read("test", &text);
    assert!(manifests.faults.is_empty(), "{:?}", manifests.faults);
    match manifests.items.pop().unwrap().object {
        Object::ControlPlane(plane) => plane,
        other => panic!("{other:?}"),
    }
}

fn settings() -> Settings {
    Settings {
        plane_image: "registry.example/onboarding-plane:1".to_owned(),
        plane_arguments: vec!["--grace-period=10m".to_owned()],
        repository_image: "registry.example/onboarding-repository:1".to_owned(),
        gateway_image: "auto".to_owned(),
        pull_policy: None,
        packages: Packages::InRepositoryImage,
        pull_secrets: Vec::new(),
        replicas: (2, 5),
        cluster_domain: "cluster.local".to_owned(),
        gateway_revision: None,
        version: "1.0.0".to_owned(),
    }
}

fn istiod(revision: &str, service: &str) -> Istiod {
    Istiod { revision: revision.to_owned(), service: service.to_owned() }
}

fn facts() -> Facts {
    let config_yaml = Some("uid: 5f2a\n".to_owned());
    Facts { istiods: vec![istiod("default", "istiod")], network: None, config_yaml }
}

fn rendered(expansion: &str, settings: &Settings, facts: &Facts) -> Vec<Value> {
    let plane = plane(expansion);
    let onboarding = plane.onboarding.as_ref().unwrap();
    render(Enabled { plane: &plane, onboarding, uid: "0b6c" }, settings, facts)
}

const PLAIN: &str = "{onboarding: {endpoint: {hosts: [onboarding.corp], secretName: endpoint-tls}}}";
const WHOLE: &str = "{onboarding: {endpoint: {hosts: [onboarding.corp, 10.0.0.4, Second.corp], secretName: endpoint-tls}, localRepository: {}}}";
const OTHER_GATEWAY: &str = "{onboarding: {endpoint: {hosts: [onboarding.corp], secretName: endpoint-tls}, localRepository: {}}, customGateway: {host: gateway.corp}}";

fn find<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = objects.iter().find(|object| object["kind"] == kind && object["metadata"]["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name}"))
}

fn headings(objects: &[Value]) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    objects.iter().map(|object| format!("{} {}", text(&object["kind"]), text(&object["metadata"]["name"]))).collect()
}

#[test]
fn everything_that_there_can_be() {
    let istiods = vec![istiod("1-29", "istiod-1-29"), istiod("default", "istiod")];
    let facts = Facts { istiods, network: Some("pods".to_owned()), ..facts() };
    let settings = Settings { pull_secrets: vec!["registry".to_owned()], ..settings() };
    insta::assert_yaml_snapshot!("everything", rendered(WHOLE, &settings, &facts));
}

#[test]
fn the_gateway_of_a_plain_control_plane() {
    let objects = rendered(PLAIN, &settings(), &facts());
    insta::assert_yaml_snapshot!("plain_headings", headings(&objects));
    let gateway = ["Service", "Gateway", "VirtualService"].map(|kind| find(&objects, kind, GATEWAY));
    insta::assert_yaml_snapshot!("plain_gateway", gateway);
}

#[test]
fn another_gateway_stands_beside_ours() {
    let objects = rendered(OTHER_GATEWAY, &settings(), &facts());
    insta::assert_yaml_snapshot!("other_gateway_headings", headings(&objects));
    let alone = OTHER_GATEWAY.replace(", customGateway: {host: gateway.corp}", "");
    assert_eq!(headings(&objects), headings(&rendered(&alone, &settings(), &facts())));
    // It may be anywhere.
    for name in [PLANE, REPOSITORY] {
        assert_eq!(find(&objects, "NetworkPolicy", name)["spec"]["ingress"][0].get("from"), None);
    }
}

#[test]
fn the_gateway_belongs_to_a_revision_that_there_is() {
    let label = |settings: &Settings, istiods: Vec<Istiod>| {
        let objects = rendered(PLAIN, settings, &Facts { istiods, ..facts() });
        let labels = &find(&objects, "Deployment", GATEWAY)["spec"]["template"]["metadata"]["labels"];
        labels.get("istio.io/rev").cloned()
    };
    let revisions = || vec![istiod("1-28", "istiod-1-28"), istiod("1-29", "istiod-1-29")];
    assert_eq!(label(&settings(), vec![istiod("default", "istiod")]), None);
    assert_eq!(label(&settings(), Vec::new()), None);
    assert_eq!(label(&settings(), revisions()), Some("1-28".into()));
    let chosen = |revision: &str| Settings { gateway_revision: Some(revision.to_owned()), ..settings() };
    assert_eq!(label(&chosen("1-29"), revisions()), Some("1-29".into()));
    assert_eq!(label(&chosen("default"), revisions()), None);
}

#[test]
fn the_repository_serves_from_its_image_a_claim_or_an_image_of_packages() {
    let pod = |packages: Packages, pull_policy: Option<&str>| {
        let settings = Settings { packages, pull_policy: pull_policy.map(str::to_owned), ..settings() };
        let objects = rendered(WHOLE, &settings, &facts());
        find(&objects, "Deployment", REPOSITORY)["spec"]["template"]["spec"].clone()
    };
    let of_packages = |pod: &Value| {
        let mounts = pod["containers"][0]["volumeMounts"].as_array().unwrap();
        let mounted: Vec<_> = mounts.iter().filter(|mount| mount["name"] == "packages").cloned().collect();
        let volumes = pod["volumes"].as_array().unwrap();
        (mounted, volumes.iter().find(|volume| volume["name"] == "packages").cloned())
    };
    let own = pod(Packages::InRepositoryImage, None);
    assert_eq!(of_packages(&own), (Vec::new(), None));
    assert_eq!(own["containers"][0].get("imagePullPolicy"), None);

    let mount = json!({"name": "packages", "mountPath": "/var/lib/onboarding-repository/packages", "readOnly": true});
    let claim = pod(Packages::Claim("onboarding-packages".to_owned()), Some("Always"));
    let volume =
        json!({"name": "packages", "persistentVolumeClaim": {"claimName": "onboarding-packages", "readOnly": true}});
    assert_eq!(of_packages(&claim), (vec![mount.clone()], Some(volume)));
    assert_eq!(claim["containers"][0]["imagePullPolicy"], "Always");

    let image = |policy| pod(Packages::Image("registry.example/packages:1".to_owned()), policy);
    let volume = json!({"name": "packages", "image": {"reference": "registry.example/packages:1"}});
    assert_eq!(of_packages(&image(None)), (vec![mount.clone()], Some(volume)));
    let volume =
        json!({"name": "packages", "image": {"reference": "registry.example/packages:1", "pullPolicy": "Always"}});
    assert_eq!(of_packages(&image(Some("Always"))), (vec![mount], Some(volume)));
}

#[test]
fn a_config_that_is_of_others_is_not_rendered() {
    let objects = rendered(PLAIN, &settings(), &Facts { config_yaml: None, ..facts() });
    assert!(!headings(&objects).contains(&format!("ConfigMap {}", config::NAME)));
}

#[test]
fn every_object_can_be_found_again_and_is_owned() {
    for expansion in [PLAIN, WHOLE, OTHER_GATEWAY] {
        let objects = rendered(expansion, &settings(), &facts());
        let mut seen = HashSet::new();
        for object in &objects {
            let kind = Kind::of(object).unwrap_or_else(|| panic!("unknown to Kind: {object}"));
            let metadata = &object["metadata"];
            assert!(seen.insert((kind.kind, metadata["name"].to_string())), "twice: {object}");
            assert_eq!(metadata["labels"][MANAGED_BY], FIELD_MANAGER);
            assert_eq!(metadata["labels"][OF_NAMESPACE], "istio-system");
            assert_eq!(metadata.get("namespace").is_some(), kind.namespaced, "{object}");
            assert_eq!(metadata.get("ownerReferences").is_some(), kind.namespaced, "{object}");
        }
    }
}

#[test]
fn each_pod_selects_itself_and_nobody_else() {
    let objects = rendered(WHOLE, &settings(), &facts());
    let deployments: Vec<_> = objects.iter().filter(|object| object["kind"] == "Deployment").collect();
    assert_eq!(deployments.len(), 3);
    for deployment in &deployments {
        let selector = deployment["spec"]["selector"]["matchLabels"].as_object().unwrap();
        for other in &deployments {
            let labels = &other["spec"]["template"]["metadata"]["labels"];
            let selected = selector.iter().all(|(key, value)| &labels[key] == value);
            assert_eq!(selected, deployment["metadata"]["name"] == other["metadata"]["name"]);
        }
    }
}
