//! What Istio's own injection makes of the Deployment `vmgateway`: the pod, as the API server takes it in a namespace that is restricted.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test states what must be true")]

mod lab;

use base64::Engine;
use lab::{MESH, enable, endpoints};
use onboarding_testkit::cluster::Cluster;
use onboarding_testkit::netns::Lab;
use onboarding_testkit::process::output;
use serde_json::Value;
use std::process::{Command, ExitCode};
use std::time::Duration;

const NAME: &str = "the_gateways_pod_is_injected_and_may_run";
const WEBHOOK: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: istiod, namespace: istio-system, labels: {app: istiod}}\nspec: {ports: [{name: https-webhook, port: 443}]}\n";

/// As `helm install istiod` has it.
fn of_istio(cluster: &Cluster, template: &str) -> String {
    let mut helm = Command::new(cluster.binary("helm"));
    helm.args(["template", "istiod"]).arg(cluster.binary("istiod-chart")).args(["--namespace", "istio-system"]);
    helm.args(["--set", "global.hub=registry.example,global.tag=1", "--show-only", &format!("templates/{template}")]);
    output(helm, Duration::from_secs(60)).unwrap()
}

/// The API server believes istiod's certificate.
fn trust(cluster: &Cluster) {
    let created = ["wait", "--for=create", "--timeout=60s", "-n", "istio-system", "configmap/istio-ca-root-cert"];
    cluster.kubectl(created).unwrap();
    let root = "jsonpath={.data.root-cert\\.pem}";
    let root = cluster.kubectl(["get", "configmap", "istio-ca-root-cert", "-n", "istio-system", "-o", root]).unwrap();
    let webhook = "mutatingwebhookconfiguration/istio-sidecar-injector";
    let mut object: Value = serde_json::from_str(&cluster.kubectl(["get", webhook, "-o", "json"]).unwrap()).unwrap();
    for one in object["webhooks"].as_array_mut().unwrap() {
        one["clientConfig"]["caBundle"] = base64::engine::general_purpose::STANDARD.encode(&root).into();
    }
    cluster.apply(&object.to_string()).unwrap();
}

fn main() -> ExitCode {
    lab::run(NAME, injected)
}

fn injected(lab: &Lab) -> anyhow::Result<()> {
    let (control, cluster) = lab::cluster(lab)?;
    cluster.kubectl(["create", "namespace", "istio-system"])?;
    let restricted = "pod-security.kubernetes.io/enforce=restricted";
    cluster.kubectl(["label", "namespace", "istio-system", restricted])?;
    // istiod looks for it when it starts.
    cluster.apply(&of_istio(&cluster, "istiod-injector-configmap.yaml"))?;
    let istiod = cluster.start_istiod(MESH)?;
    cluster.apply(WEBHOOK)?;
    cluster.apply(&endpoints("istiod", "https-webhook", &control, istiod.https.port()))?;
    cluster.apply(&of_istio(&cluster, "mutatingwebhook.yaml"))?;
    trust(&cluster);
    let _operator = enable(&cluster, &control)?;

    let selector = "app.kubernetes.io/name=vmgateway";
    let created = ["wait", "--for=create", "--timeout=60s", "-n", "istio-system", "pod", "-l", selector];
    if let Err(error) = cluster.kubectl(created) {
        let events = cluster.kubectl(["get", "events", "-n", "istio-system"]).unwrap();
        panic!("{error:#}\n{events}");
    }
    let pods = cluster.kubectl(["get", "pod", "-n", "istio-system", "-l", selector, "-o", "json"]).unwrap();
    let pods: Value = serde_json::from_str(&pods).unwrap();
    let pod = &pods["items"][0];
    let containers = pod["spec"]["containers"].as_array().unwrap();
    assert_eq!(containers.len(), 1, "{pod:#}");
    let proxy = &containers[0];
    // Injection's.
    assert_eq!(proxy["image"], "registry.example/proxyv2:1");
    let arguments: Vec<&str> = proxy["args"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    assert!(arguments.starts_with(&["proxy", "router"]), "{arguments:?}");
    let mounted = pod["spec"]["volumes"].as_array().unwrap();
    assert!(mounted.iter().any(|volume| volume["name"] == "istio-token"), "{mounted:#?}");
    // Ours, which it leaves alone.
    let ports: Vec<u64> =
        proxy["ports"].as_array().unwrap().iter().filter_map(|it| it["containerPort"].as_u64()).collect();
    assert!(ports.contains(&15443) && ports.contains(&8443), "{ports:?}");
    let security = &proxy["securityContext"];
    assert_eq!(security["readOnlyRootFilesystem"], true, "{security:#}");
    assert_eq!(security["capabilities"]["drop"][0], "ALL", "{security:#}");
    assert_eq!(security["allowPrivilegeEscalation"], false, "{security:#}");
    assert_eq!(proxy["resources"]["limits"]["memory"], "1Gi");
    assert_eq!(proxy["readinessProbe"]["httpGet"]["path"], "/healthz/ready");
    Ok(())
}
