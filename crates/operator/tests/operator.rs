//! The operator against a real API server, as its chart installs it: with the permissions of its ServiceAccount and no others.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "all of it is tests")]

mod world;

use onboarding_testkit::process::Mark;
use std::path::{Path, PathBuf};
use std::process::Command;
use world::{CHART, NAMESPACE, OPERATOR, PLANE, RELEASE, WITHIN, World, control_plane};

const ENABLED: &str = "{onboarding: {endpoint: {hosts: [onboarding.corp], secretName: endpoint-tls}}}";
const WITH_REPOSITORY: &str =
    "{onboarding: {endpoint: {hosts: [onboarding.corp], secretName: endpoint-tls}, localRepository: {}}}";
/// Somebody else's, of a name that isn't needed at first.
const FOREIGN: &str = "\
apiVersion: apps/v1
kind: Deployment
metadata: {name: onboarding-repository, namespace: istio-system}
spec:
  replicas: 0
  selector: {matchLabels: {app: other}}
  template:
    metadata: {labels: {app: other}}
    spec: {containers: [{name: other, image: other}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: onboarding-memory-1, namespace: istio-system, labels: {app.kubernetes.io/managed-by: onboarding-plane}}
";

#[test]
fn onboarding_is_enabled_and_disabled() {
    let world = World::installed();
    let operator = world.operator(&[]);
    operator.until("/readyz", |answer| answer.starts_with("HTTP/1.1 200"));
    world.cluster.apply(FOREIGN).unwrap();

    world.apply_control_plane(ENABLED);
    let words = world.condition("EndpointCertificate", "SecretAbsent");
    assert!(words.starts_with("there is no Secret istio-system/endpoint-tls; make it with"), "{words}");
    assert!(world.condition("Ready", "SecretAbsent").contains(&words));
    world.condition("ObjectsApplied", "Applied");
    let made = world.ours();
    for object in ["deployment.apps/vmgateway", "deployment.apps/onboarding-plane", "configmap/onboarding-plane-config"]
    {
        assert!(made.iter().any(|name| name == object), "{object} isn't in {made:?}");
    }

    world.apply_certificate(&["elsewhere.corp"]);
    let words = world.condition("EndpointCertificate", "CertificateForOtherNames");
    assert!(words.contains("isn't for onboarding.corp"), "{words}");
    world.apply_certificate(&["onboarding.corp"]);
    world.condition("EndpointCertificate", "Valid");
    let words = world.condition("Ready", "NotAvailable");
    assert!(words.contains("Deployment onboarding-plane: 0 of 1 replicas are available"), "{words}");
    for deployment in ["onboarding-plane", "vmgateway"] {
        world.run_pods(deployment);
    }
    world.wait("--for=condition=Ready controlplane/controlplane");

    // A foreign object is in the way, is left alone, and said.
    world.apply_control_plane(WITH_REPOSITORY);
    let words = world.condition("ObjectsApplied", "NotApplied");
    let expected = "Deployment onboarding-repository: there is one already that isn't the operator's";
    assert!(words.starts_with(expected), "{words}");
    let image = "get deployment onboarding-repository -o jsonpath={.spec.template.spec.containers[*].image}";
    assert_eq!(world.kubectl(image), "other");
    world.kubectl("delete deployment onboarding-repository");
    world.condition("ObjectsApplied", "Applied");
    assert!(world.kubectl(image).starts_with("onboarding-repository:"));
    // Not asked for any more: it goes.
    world.apply_control_plane(ENABLED);
    world.wait("--for=delete deployment/onboarding-repository serviceaccount/onboarding-repository");

    // Disabled: all of it goes, and nothing else.
    world.apply_control_plane("{}");
    for object in &made {
        world.wait(&format!("--for=delete {object}"));
    }
    assert_eq!(world.ours(), Vec::<String>::new());
    world.kubectl("get configmap/onboarding-memory-1 secret/endpoint-tls service/istiod");
    operator.process.wait_for_line(WITHIN, |line| line.contains("\"words\":\"not enabled\"")).unwrap();
    let left = world.kubectl("get controlplane controlplane -o jsonpath={.spec.hub},{.status.conditions}");
    assert_eq!(left, "of others,");
    assert!(operator.process.terminate(WITHIN).unwrap().success());
}

#[test]
fn what_is_ours_comes_back_and_what_others_add_stays() {
    let world = World::installed();
    let operator = world.operator(&[]);
    world.apply_certificate(&["onboarding.corp"]);
    world.apply_control_plane(ENABLED);
    world.condition("ObjectsApplied", "Applied");
    world.condition("EndpointCertificate", "Valid");

    // Another of the same version and configuration changes nothing.
    let objects: Vec<String> = world.ours();
    let versions =
        || world.kubectl(&format!("get {} -o jsonpath={{.items[*].metadata.resourceVersion}}", objects.join(" ")));
    // The controllers write statuses until they have seen all.
    for deployment in ["onboarding-plane", "vmgateway"] {
        world.run_pods(deployment);
    }
    world.wait("--for=condition=Ready controlplane/controlplane");
    let before = versions();
    let second = world.operator(&[]);
    let metrics = second.until("/metrics", |metrics| metrics.contains(r#"passes_total{outcome="done"}"#));
    assert!(metrics.contains("\nonboarding_operator_writes_total 0\n"), "{metrics}\n{}", second.process.tail());
    assert_eq!(before, versions());
    drop(second);

    world.kubectl("annotate service vmgateway example.com/mine=1");
    world.kubectl(r#"patch service vmgateway -p {"spec":{"type":"ClusterIP"}}"#);
    world.wait("--for=jsonpath={.spec.type}=LoadBalancer service/vmgateway");
    let annotations = world.kubectl("get service vmgateway -o jsonpath={.metadata.annotations}");
    assert!(annotations.contains(r#""example.com/mine":"1""#), "{annotations}");
    assert!(annotations.contains(r#""external-dns.alpha.kubernetes.io/hostname":"onboarding.corp""#), "{annotations}");
    for object in [
        "networkpolicy/onboarding-plane",
        "clusterrolebinding/onboarding-plane-istio-system",
        "gateway.networking.istio.io/vmgateway",
    ] {
        let uid = || world.kubectl(&format!("get {object} -o jsonpath={{.metadata.uid}}"));
        let before = uid();
        world.kubectl(&format!("delete {object}"));
        world.wait(&format!("--for=create {object}"));
        assert_ne!(uid(), before);
    }
    // Another gateway is one more: ours stays as it is, and the plane may be reached from elsewhere too.
    let gateway = "get service/vmgateway deployment/vmgateway gateway.networking.istio.io/vmgateway";
    let gateway = || world.kubectl(&format!("{gateway} -o jsonpath={{.items[*].metadata.uid}}"));
    let from = "get networkpolicy onboarding-plane -o jsonpath={.spec.ingress[0].from}";
    let before = gateway();
    assert!(world.kubectl(from).contains("vmgateway"), "{}", world.kubectl(from));
    world.apply_control_plane(&ENABLED.replacen('{', "{customGateway: {host: gateway.corp}, ", 1));
    world.wait("--for=jsonpath={.metadata.generation}=2 networkpolicy/onboarding-plane");
    assert_eq!((world.kubectl(from), gateway()), (String::new(), before));
    world.apply_control_plane(ENABLED);
    world.wait("--for=jsonpath={.metadata.generation}=3 networkpolicy/onboarding-plane");
    // Of a cluster with one family, Services have that one.
    assert_eq!(world.kubectl("get service vmgateway -o jsonpath={.spec.ipFamilyPolicy}"), "PreferDualStack");
    world.kubectl(r#"patch role onboarding-plane --type=merge -p {"rules":[]}"#);
    world.wait("--for=jsonpath={.rules[0].apiGroups[0]}=install.tetrate.io role/onboarding-plane");
    // What the plane keeps in a Secret that the operator made is the plane's.
    world.kubectl("patch secret onboarding-plane-token-keys -p {\"stringData\":{\"keys\":\"x\"}}");
    world.kubectl("label secret onboarding-plane-token-keys app.kubernetes.io/name=other --overwrite");
    let name = r"--for=jsonpath={.metadata.labels.app\.kubernetes\.io/name}=onboarding-plane";
    world.wait(&format!("{name} secret/onboarding-plane-token-keys"));
    assert_eq!(world.kubectl("get secret onboarding-plane-token-keys -o jsonpath={.data.keys}"), "eA==");

    // The UID is made once, is the ControlPlane's if that names one, and never lost.
    let config = || world.kubectl(r"get configmap onboarding-plane-config -o jsonpath={.data.config\.yaml}");
    let made_once = config();
    assert!(made_once.starts_with("uid: ") && made_once.len() > 40, "{made_once}");
    let uid = r#"{"spec":{"meshExpansion":{"onboarding":{"uid":"https://onboarding.corp"}}}}"#;
    world.kubectl(&format!("patch controlplane controlplane --type=merge -p {uid}"));
    world.wait_for_config("uid: https://onboarding.corp");
    let no_uid = r#"[{"op":"remove","path":"/spec/meshExpansion/onboarding/uid"}]"#;
    world.kubectl(&format!("patch controlplane controlplane --type=json -p {no_uid}"));
    world.kubectl("label configmap onboarding-plane-config app.kubernetes.io/managed-by=onboarding-operator app.kubernetes.io/name=other --overwrite");
    world.wait(&format!("{name} configmap/onboarding-plane-config"));
    assert_eq!(config().trim(), "uid: https://onboarding.corp");
    assert!(operator.process.status().is_none());
}

#[test]
fn a_control_plane_that_is_faulty_or_doubled_or_deleted() {
    let world = World::installed();
    let operator = world.operator(&["--replicas", "3"]);
    world.apply_control_plane(ENABLED);
    world.condition("ObjectsApplied", "Applied");
    assert_eq!(world.kubectl("get hpa vmgateway -o jsonpath={.spec.minReplicas}"), "3");

    // The API server can't tell that this is no key.
    let jwks = r#"{"keys": [{"kty": "nonsense"}]}"#;
    world.apply_control_plane(&format!(
        "{{onboarding: {{endpoint: {{hosts: [other.corp], secretName: endpoint-tls}}, workloads: {{authentication: {{jwt: {{issuers: [{{issuer: 'https://a.corp', shortName: a, jwks: '{jwks}'}}]}}}}}}}}}}"
    ));
    let words = world.condition("Valid", "Invalid");
    let expected = "spec.meshExpansion.onboarding.workloads.authentication.jwt.issuers[0].jwks: ";
    assert!(words.contains(expected), "{words}");
    let hostname =
        r"get service vmgateway -o jsonpath={.metadata.annotations.external-dns\.alpha\.kubernetes\.io/hostname}";
    assert_eq!(world.kubectl(hostname), "onboarding.corp");

    world.apply_control_plane(ENABLED);
    world.condition("Valid", "Valid");
    world.cluster.apply(&control_plane("another", ENABLED)).unwrap();
    let words = world.condition("Valid", "SeveralControlPlanes");
    assert!(words.contains("several ControlPlanes (another, controlplane)"), "{words}");
    world.kubectl("get deployment/onboarding-plane");
    world.kubectl("delete controlplane another");
    world.condition("Valid", "Valid");

    // An API server that goes and comes back; what is undone then is repaired.
    world.cluster.kill_api().unwrap();
    world.cluster.start_api().unwrap();
    world.kubectl("delete networkpolicy vmgateway");
    world.wait("--for=create networkpolicy/vmgateway");

    let made = world.ours();
    world.kubectl("delete controlplane controlplane");
    for object in &made {
        world.wait(&format!("--for=delete {object}"));
    }
    assert!(operator.process.status().is_none());
}

#[test]
fn the_plane_runs_with_what_its_account_may() {
    let world = World::installed();
    let _operator = world.operator(&[]);
    world.apply_certificate(&["onboarding.corp"]);
    world.apply_control_plane(ENABLED);
    world.condition("ObjectsApplied", "Applied");
    let plane = world.plane();
    // What it lacks a permission for it says so, and isn't ready or warns.
    plane.until("/readyz", |answer| answer.starts_with("HTTP/1.1 200"));
    // Its pod may have an address of either family.
    for address in ["127.0.0.1", "[::1]"] {
        assert!(plane.get_by(address, "/readyz").starts_with("HTTP/1.1 200"), "{address}");
    }
    let keys = "--for=jsonpath={.metadata.managedFields[?(@.manager==\"onboarding-plane\")].operation}=Update";
    world.wait(&format!("{keys} secret/onboarding-plane-token-keys"));
    world.wait("--for=create lease/onboarding-plane lease/onboarding-plane-pod-1");
    let log = plane.process.lines_since(Mark::default()).join("\n");
    assert!(!log.contains("forbidden") && !log.contains("(403)"), "{log}");
    assert!(plane.process.terminate(WITHIN).unwrap().success());
}

/// What nobody of onboarding may.
const NEVER: [&str; 24] = [
    "list secrets -A",
    "list secrets -n istio-system",
    "get secrets/istio-ca-secret -n istio-system",
    "create secrets -n istio-system",
    "delete secrets/endpoint-tls -n istio-system",
    "get secrets/endpoint-tls -n bookinfo",
    "list pods -n istio-system",
    "create pods -n istio-system",
    "create pods --subresource=exec -n istio-system",
    "list nodes",
    "update services -n bookinfo",
    "create serviceentries -n bookinfo",
    "list endpoints -n bookinfo",
    "create deployments -n istio-system",
    "create clusterroles",
    "escalate clusterroles",
    "bind clusterroles",
    "impersonate serviceaccounts",
    "update onboardingpolicies -n bookinfo",
    "update workloadgroups -n bookinfo",
    "create serviceaccounts -n bookinfo",
    "create mutatingwebhookconfigurations",
    "get configmaps -n bookinfo",
    "update controlplanes --subresource=status -n istio-system",
];

#[test]
fn each_account_can_do_what_it_needs_and_no_more() {
    let world = World::installed();
    let _operator = world.operator(&[]);
    world.apply_control_plane(WITH_REPOSITORY);
    world.condition("ObjectsApplied", "Applied");
    world.cluster.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: bookinfo}\n---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: ratings-vm, namespace: bookinfo}\n").unwrap();

    for what in [
        "list onboardingpolicies -A",
        "patch onboardingpolicies --subresource=status -n bookinfo",
        "watch workloadgroups -n bookinfo",
        "watch sidecars -n bookinfo",
        "watch serviceentries -n bookinfo",
        "list services -A",
        "create workloadautoregistrations -n bookinfo",
        "update workloadautoregistrations --subresource=status -n bookinfo",
        "patch workloadentries -n bookinfo",
        "patch workloadentries --subresource=status -n bookinfo",
        "create serviceaccounts --subresource=token -n bookinfo",
        "create events.events.k8s.io -n bookinfo",
        "watch controlplanes -n istio-system",
        "watch secrets/endpoint-tls -n istio-system",
        "update secrets/onboarding-plane-token-keys -n istio-system",
        "create configmaps -n istio-system",
        "update leases -n istio-system",
        // Owners whose deletion waits, where OwnerReferencesPermissionEnforcement is on, as in OpenShift.
        "update workloadgroups --subresource=finalizers -n bookinfo",
        "update workloadautoregistrations --subresource=finalizers -n bookinfo",
    ] {
        assert!(world.can(PLANE, what), "the plane can't {what}");
    }
    for what in NEVER {
        assert!(!world.can(PLANE, what), "the plane can {what}");
    }
    for account in ["vmgateway", "onboarding-repository"] {
        let who = format!("system:serviceaccount:{NAMESPACE}:{account}");
        for what in NEVER.iter().chain(&[
            "list onboardingpolicies -A",
            "get secrets/endpoint-tls -n istio-system",
            "create serviceaccounts --subresource=token -n bookinfo",
            "get configmaps -n istio-system",
        ]) {
            assert!(!world.can(&who, what), "{account} can {what}");
        }
    }
    for what in [
        "list secrets -A",
        "create secrets -n istio-system",
        "create secrets/other -n istio-system",
        "delete secrets/endpoint-tls -n istio-system",
        "create deployments/other -n istio-system",
        "delete deployments/istiod -n istio-system",
        "list pods -n istio-system",
        "list nodes",
        "escalate clusterroles",
        "bind clusterroles",
        "create clusterroles/other",
        "patch clusterroles/cluster-admin",
        "create clusterrolebindings/other",
        "patch controlplanes -n istio-system",
        "create customresourcedefinitions",
        "impersonate users",
    ] {
        assert!(!world.can(OPERATOR, what), "the operator can {what}");
    }

    owners_whose_deletion_waits(&world);

    // What RBAC can't say.
    let refused = |who: &str, arguments: &str, words: &str| {
        let ended =
            world.cluster.try_kubectl(format!("{arguments} --as={who}").split(' ').collect::<Vec<_>>()).unwrap();
        assert!(!ended.status.success() && ended.stderr.contains(words), "{arguments}: {ended:?}");
    };
    let token = "create token ratings-vm -n bookinfo";
    let memory = "configmap onboarding-memory-1 -n istio-system";
    for allowed in [
        format!("{token} --audience=istio-ca --as={PLANE}"),
        format!("create {memory} --as={PLANE}"),
        format!("delete {memory} --as={PLANE}"),
        // Others aren't concerned.
        token.to_owned(),
        format!("create {memory}"),
    ] {
        world.cluster.kubectl(allowed.split(' ')).unwrap();
    }
    refused(PLANE, token, "asks for tokens of the audience istio-ca alone");
    refused(PLANE, &format!("{token} --audience=istio-ca --audience=vault"), "of the audience istio-ca alone");
    refused(OPERATOR, &format!("{token} --audience=istio-ca"), "asks for nobody's token");
    let writes_none = "this account writes no ConfigMap but onboarding's own";
    refused(PLANE, "create configmap istio-canary -n istio-system", writes_none);
    refused(PLANE, "delete configmap kube-root-ca.crt -n istio-system", writes_none);
    refused(OPERATOR, "create configmap onboarding-memory-2 -n istio-system", writes_none);
}

/// Under OwnerReferencesPermissionEnforcement the plane writes wars and entries as it does, and one who may only create them can't.
fn owners_whose_deletion_waits(world: &World) {
    world.cluster.apply("apiVersion: networking.istio.io/v1\nkind: WorkloadGroup\nmetadata: {name: ratings, namespace: bookinfo}\nspec: {template: {serviceAccount: ratings-vm}}\n---\napiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: creates-wars}\nrules:\n- {apiGroups: [runtime.onboarding.tetrate.io], resources: [workloadautoregistrations], verbs: [get, create, patch]}\n").unwrap();
    world.kubectl("create clusterrolebinding creates-wars --clusterrole=creates-wars --user=other");
    let uid =
        world.cluster.kubectl("get workloadgroup ratings -n bookinfo -o jsonpath={.metadata.uid}".split(' ')).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let create = |name: &str, owner: &str, who: &str| {
        let identity = "{aws: {partition: aws, account: '123456789012', ecs: {iamRole: {name: ratings-role}}}}";
        let war = format!(
            "apiVersion: runtime.onboarding.tetrate.io/v1alpha1\nkind: WorkloadAutoRegistration\nmetadata:\n  name: {name}\n  namespace: bookinfo\n  ownerReferences: [{owner}]\nspec:\n  identity: {identity}\n  registration: {{host: {{addresses: [{{ip: 10.0.0.1, type: VPC}}]}}}}\n"
        );
        let file = directory.path().join(name);
        std::fs::write(&file, war).unwrap();
        world.cluster.try_kubectl(["create", &format!("--as={who}"), "-f", file.to_str().unwrap()]).unwrap()
    };
    let group = format!(
        "{{apiVersion: networking.istio.io/v1, kind: WorkloadGroup, name: ratings, uid: {uid}, controller: true, blockOwnerDeletion: true}}"
    );
    let ended = create("ratings-1", &group, PLANE);
    assert!(ended.status.success(), "{ended:?}");
    let ended = create("ratings-2", &group, "other");
    assert!(!ended.status.success() && ended.stderr.contains("cannot set blockOwnerDeletion"), "{ended:?}");
    let ended = create("ratings-2", &group.replace("Deletion: true", "Deletion: false"), "other");
    assert!(ended.status.success(), "{ended:?}");
}

#[test]
fn the_chart_is_installed_upgraded_and_removed() {
    let world = World::new();
    let notes = world.helm(&["install", "onboarding", CHART, "--create-namespace"]).unwrap();
    assert!(notes.contains("kubectl edit controlplane -n istio-system"), "{notes}");
    let crds = "get crd -l app.kubernetes.io/part-of=workload-onboarding -o name";
    assert_eq!(world.kubectl(crds).lines().count(), 3);
    let container = |field: &str| {
        let output = format!("jsonpath={{.spec.template.spec.containers[0].{field}}}");
        world.cluster.kubectl(["get", "deployment", "onboarding-operator", "-n", RELEASE, "-o", &output]).unwrap()
    };
    assert_eq!(container("image"), "onboarding-operator:0.1.0");

    let values = ["--set", "images.operator=onboarding-operator:0.2.0", "--set", "gatewayRevision=canary"];
    let more = ["--set", "images.pullSecrets={one}", "--set", "images.pullPolicy=Always"];
    let more = [&more[..], &["--set", "images.plane=registry.example/plane:2", "--set", "packages.claim=deb-and-rpm"]]
        .concat();
    let more = [&more[..], &["--set", "plane.arguments={--grace-period=10m}"]].concat();
    world.helm(&[&["upgrade", "onboarding", CHART][..], &values, &more].concat()).unwrap();
    // As documented: what was set stays, what the chart has new is as the chart has it.
    world.helm(&["upgrade", "onboarding", CHART, "--reset-then-reuse-values", "--set", "replicas.max=6"]).unwrap();
    assert_eq!(container("image"), "onboarding-operator:0.2.0");
    // What the chart gives, the program takes.
    let arguments: Vec<String> = serde_json::from_str(&container("args")).unwrap();
    let ours = |it: &&str| !it.starts_with("--admin-listen") && !it.starts_with("--log-format");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).filter(ours).collect();
    assert!(arguments.contains(&"--gateway-revision=canary"), "{arguments:?}");
    let operator = world.operator(&arguments);
    world.apply_control_plane(WITH_REPOSITORY);
    world.condition("ObjectsApplied", "Applied");
    let revision = r"get deployment vmgateway -o jsonpath={.spec.template.metadata.labels.istio\.io/rev}";
    assert_eq!(world.kubectl(revision), "canary");
    let pod = |deployment: &str, field: &str| {
        world.kubectl(&format!("get deployment {deployment} -o jsonpath={{.spec.template.spec.{field}}}"))
    };
    assert_eq!(pod("onboarding-plane", "containers[0].image"), "registry.example/plane:2");
    assert_eq!(pod("onboarding-plane", "containers[0].imagePullPolicy"), "Always");
    assert!(pod("onboarding-plane", "containers[0].args").ends_with("\"--grace-period=10m\"]"));
    let claim = "volumes[*].persistentVolumeClaim.claimName";
    assert_eq!(pod("onboarding-repository", claim), "deb-and-rpm");
    drop(operator);
    // An API server takes a volume that is an image.
    let arguments: Vec<&str> = arguments.into_iter().filter(|it| !it.starts_with("--packages")).collect();
    let operator = world.operator(&[&arguments[..], &["--packages-image=registry.example/packages:1"]].concat());
    world.wait("--for=jsonpath={.spec.template.spec.volumes[1].image.reference}=registry.example/packages:1 deployment/onboarding-repository");
    assert_eq!(pod("onboarding-repository", claim), "");
    drop(operator);

    world.helm(&["uninstall", "onboarding"]).unwrap();
    let left = world.cluster.kubectl(["get", "deployment,serviceaccount", "-n", RELEASE, "-o", "name"]).unwrap();
    assert_eq!(left, "serviceaccount/default\n");
    let roles = world.kubectl("get clusterrole,clusterrolebinding,role,rolebinding,validatingadmissionpolicy -o name");
    assert!(!roles.contains("onboarding-operator"), "{roles}");
    // Policies and registrations outlive it, and so does what runs.
    assert_eq!(world.kubectl(crds).lines().count(), 3);
    world.kubectl("get controlplane/controlplane deployment/onboarding-plane");
    world.helm(&["install", "onboarding", CHART]).unwrap();
}

#[test]
fn the_chart_is_without_faults_for_any_of_its_values() {
    let helm = Helm::new();
    helm.run(&["lint", "--strict", CHART]).unwrap();
    let whole = helm.run(&["template", "onboarding", CHART]).unwrap();
    assert_eq!(whole.matches("kind: CustomResourceDefinition").count(), 3);
    let values = ["--set", "crds=false", "--set", "admissionPolicies=false", "--set", "operator.nodeSelector.a=b"];
    let less = helm.run(&[&["template", "onboarding", CHART][..], &values].concat()).unwrap();
    assert!(!less.contains("CustomResourceDefinition") && !less.contains("ValidatingAdmissionPolicy"), "{less}");
    for (values, words) in [
        (["--kube-version", "1.30.4"], "Kubernetes 1.31 or later is needed"),
        (["--set", "packages.claim=a,packages.image=b"], "only one of them may be set"),
        (["--set", "images.pullPolicy=always"], "must be Always, IfNotPresent or Never"),
        (["--set", "replicas.min=6"], "replicas.min (6) is more than replicas.max (5)"),
    ] {
        let error = helm.run(&[&["template", "onboarding", CHART][..], &values].concat()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// Helm without a cluster.
struct Helm {
    program: PathBuf,
    files: tempfile::TempDir,
}

impl Helm {
    fn new() -> Self {
        let binaries = std::env::var_os(onboarding_testkit::cluster::BINARIES);
        let binaries = binaries.expect("export ONBOARDING_CLUSTER_BIN=$(dev/kubernetes)");
        Self { program: Path::new(&binaries).join("helm"), files: tempfile::tempdir().unwrap() }
    }

    fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program);
        command.args(arguments).env("KUBECONFIG", "/dev/null");
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, self.files.path());
        }
        onboarding_testkit::process::output(command, WITHIN)
    }
}
