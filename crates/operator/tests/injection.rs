//! What Istio's own injection makes of the Deployment `vmgateway`: the pod, as the API server takes it in a namespace that is restricted.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test states what must be true")]

use base64::Engine;
use libtest_mimic::{Arguments, Trial};
use onboarding_testkit::cluster::{Cluster, Options};
use onboarding_testkit::netns::{Lab, test_inside};
use onboarding_testkit::process::{Process, output};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::Duration;

const NAME: &str = "the_gateways_pod_is_injected_and_may_run";
const MESH: &str = "trustDomain: cluster.local\ndefaultConfig:\n  discoveryAddress: istiod.istio-system.svc:15012\n";
const NAMESPACE: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: istio-system, labels: {pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: v1
kind: Service
metadata: {name: istiod, namespace: istio-system, labels: {app: istiod}}
spec: {ports: [{name: https-webhook, port: 443}]}
";
const CONTROL_PLANE: &str = "\
apiVersion: install.tetrate.io/v1alpha1
kind: ControlPlane
metadata: {name: controlplane, namespace: istio-system}
spec: {meshExpansion: {onboarding: {endpoint: {hosts: [onboarding.corp], secretName: endpoint-tls}, localRepository: {}}}}
";

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

/// In a network namespace: a Service has no endpoints on loopback.
fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, vec![Trial::test(NAME, || Ok(()))]).exit_code();
    }
    test_inside(|lab| {
        let lab = lab.clone();
        let trial = Trial::test(NAME, move || {
            injected(&lab);
            Ok(())
        });
        libtest_mimic::run(&arguments, vec![trial]).exit_code()
    })
}

fn injected(lab: &Lab) {
    let control = Arc::new(lab.machine("control", 5).unwrap());
    let machine = control.clone();
    let command = Box::new(move |program: &Path| machine.command(program));
    let cluster = Cluster::start(Options { address: control.address().into(), controllers: true, command }).unwrap();
    cluster.apply_istio_crds().unwrap();
    cluster.apply_crds(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/crds"))).unwrap();
    cluster.apply(NAMESPACE).unwrap();
    // istiod looks for it when it starts.
    cluster.apply(&of_istio(&cluster, "istiod-injector-configmap.yaml")).unwrap();
    let istiod = cluster.start_istiod(MESH).unwrap();
    cluster
        .apply(&format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: istiod-test, namespace: istio-system, labels: {{kubernetes.io/service-name: istiod}}}}\n\
             addressType: IPv4\nendpoints: [{{addresses: [{}], conditions: {{ready: true}}}}]\n\
             ports: [{{name: https-webhook, port: {}, protocol: TCP}}]\n",
            istiod.https.ip(),
            istiod.https.port()
        ))
        .unwrap();
    cluster.apply(&of_istio(&cluster, "mutatingwebhook.yaml")).unwrap();
    trust(&cluster);
    cluster.apply(CONTROL_PLANE).unwrap();
    let mut operator = control.command(env!("CARGO_BIN_EXE_onboarding-operator"));
    operator.args(["--admin-listen", "127.0.0.1:0"]).env("KUBECONFIG", cluster.kubeconfig());
    let _operator = Process::start("onboarding-operator", operator, None).unwrap();

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
}
