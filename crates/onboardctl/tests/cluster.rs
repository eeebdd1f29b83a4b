//! The verbs against a real API server, with the objects that operators and planes write.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod endpoint;
mod tool;

use endpoint::Endpoint;
use onboarding_testkit::cluster::{Cluster, Options};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tool::{Dir, Ended, GROUP, NARROW, control_plane};

const EC2: &str = "ratings-aws-aws-123456789012-us-east-2b-ec2-i-1234567890abcdef0";
const VM: &str = "ratings-jwt-my-corp--vm007";
const ISSUERS: &str = "[{issuer: 'https://mycompany.corp', shortName: my-corp}]";

/// A cluster with the definitions of Istio and of onboarding, and the requirement's objects.
struct World {
    cluster: Cluster,
    dir: Dir,
}

impl World {
    fn new() -> Self {
        // Without controllers: what is in a status is what the test says.
        let cluster = Cluster::start(Options { controllers: false, ..Options::default() }).unwrap();
        cluster.apply_istio_crds().unwrap();
        for file in ["controlplanes", "onboardingpolicies", "workloadautoregistrations"] {
            cluster.apply_crds(&crds().join(format!("{file}.yaml"))).unwrap();
        }
        cluster.kubectl(["create", "namespace", "bookinfo"]).unwrap();
        cluster.kubectl(["create", "namespace", "istio-system"]).unwrap();
        cluster.apply(&format!("{NARROW}---\n{GROUP}")).unwrap();
        Self { cluster, dir: Dir::new() }
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        self.with_stdin(arguments, "")
    }

    fn with_stdin(&self, arguments: &[&str], stdin: &str) -> Ended {
        self.dir.run_with(arguments, stdin, &[("KUBECONFIG", &self.cluster.kubeconfig())])
    }

    /// A war as the plane writes it, with its status.
    fn register(&self, name: &str, identity: Value, connected: &str) {
        let jsonpath = "jsonpath={.metadata.uid}";
        let uid = self.cluster.kubectl(["get", "workloadgroup", "ratings", "-n", "bookinfo", "-o", jsonpath]).unwrap();
        let war = json!({
            "apiVersion": "runtime.onboarding.tetrate.io/v1alpha1",
            "kind": "WorkloadAutoRegistration",
            "metadata": {"name": name, "namespace": "bookinfo", "ownerReferences": [{
                "apiVersion": "networking.istio.io/v1beta1", "kind": "WorkloadGroup", "name": "ratings", "uid": uid,
                "controller": true, "blockOwnerDeletion": true,
            }]},
            "spec": {"identity": identity, "registration": {
                "agent": {"version": "0.1.0"},
                "sidecar": {"envoy": {"version": "1.40.0"}},
                "host": {"addresses": [{"ip": "10.0.0.4", "type": "VPC"}]},
                "workload": {"labels": {}},
                "settings": {"connectedOver": "VPC"},
            }},
        });
        self.cluster.apply(&war.to_string()).unwrap();
        let status = json!({"status": {"conditions": [{
            "type": "AgentConnected", "status": connected, "reason": "AgentEstablishedConnection",
            "message": "", "lastTransitionTime": "2026-11-24T00:00:00Z",
        }]}});
        self.patch_status("war", name, "bookinfo", &status);
    }

    fn patch_status(&self, kind: &str, name: &str, namespace: &str, status: &Value) {
        let patch = status.to_string();
        let arguments = ["patch", kind, name, "-n", namespace, "--subresource=status", "--type=merge", "-p", &patch];
        self.cluster.kubectl(arguments).unwrap();
    }

    /// A policy that `kubectl apply` refuses today, as one that was written before.
    fn write_unlinted(&self, policy: &str) {
        let loose = r#"[{"op": "replace", "path": "/spec/versions/0/schema/openAPIV3Schema",
            "value": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}]"#;
        let name = "onboardingpolicies.authorization.onboarding.tetrate.io";
        self.cluster.kubectl(["patch", "crd", name, "--type=json", "-p", loose]).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(error) = self.cluster.apply(policy) {
            assert!(Instant::now() < deadline, "the looser definition isn't in force: {error:#}");
            std::thread::park_timeout(Duration::from_millis(100));
        }
    }

    /// The kubeconfig of an account of bookinfo with no rights at all.
    fn nobody(&self) -> PathBuf {
        self.cluster.kubectl(["create", "serviceaccount", "nobody", "-n", "bookinfo"]).unwrap();
        let token = self.cluster.kubectl(["create", "token", "nobody", "-n", "bookinfo"]).unwrap();
        self.dir.write("nobody.kubeconfig", self.cluster.kubeconfig_with_token(token.trim()));
        self.dir.path("nobody.kubeconfig")
    }
}

fn crds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/crds")
}

fn ec2(role: &str) -> Value {
    json!({"aws": {
        "partition": "aws", "account": "123456789012", "region": "us-east-2", "zone": "us-east-2b",
        "ec2": {"instanceId": "i-1234567890abcdef0", "iamRole": {"name": role}},
    }})
}

fn vm() -> Value {
    json!({"jwt": {"issuer": "https://mycompany.corp", "subject": "vm007", "attributes": {}}})
}

#[test]
fn verbs_of_the_registry() {
    let world = World::new();
    world
        .run(&["workloads", "-n", "bookinfo"])
        .is(0)
        .silent()
        .complains("No workloads are registered in the namespace bookinfo.");
    world.register(EC2, ec2("ratings-role"), "True");
    world.register(VM, vm(), "False");

    // The namespace is that of the context, as with kubectl.
    world.run(&["workloads"]).is(0).silent().complains("in the namespace default.");
    let table = world.run(&["workloads", "-n", "bookinfo"]).is(0).stdout;
    let kubectl = world.cluster.kubectl(["get", "war", "-n", "bookinfo"]).unwrap();
    let words = |table: &str| -> Vec<Vec<String>> {
        let cells = |line: &str| {
            line.split("   ").map(|cell| cell.trim().to_owned()).filter(|cell| !cell.is_empty()).take(2).collect()
        };
        table.lines().map(cells).collect()
    };
    assert_eq!(words(&table), words(&kubectl));
    world.run(&["workloads", "-A"]).is(0).says("NAMESPACE   NAME").says(&format!("bookinfo    {EC2}"));
    world.run(&["workloads", "-n", "bookinfo", "-o", "wide"]).is(0).says("ratings").says("10.0.0.4").says("0.1.0");
    let list = world.run(&["workloads", "-A", "-o", "json"]).is(0).json();
    assert_eq!(list["items"].as_array().unwrap().len(), 2);
    assert_eq!(list["items"][0]["spec"]["identity"], ec2("ratings-role"));
    let yaml = world.run(&["workloads", "-A", "-o", "yaml"]).is(0).stdout;
    assert_eq!(serde_yaml_ng::from_str::<Value>(&yaml).unwrap(), list);

    plans(&world);

    // As kubectl delete war.
    world
        .run(&["workloads", "delete", VM, "-n", "bookinfo"])
        .is(0)
        .says(&format!("bookinfo/{VM} deleted; its host may come back"));
    world
        .run(&["workloads", "delete", &format!("bookinfo/{VM}")])
        .is(1)
        .silent()
        .complains(&format!("there is no registration bookinfo/{VM}; onboardctl workloads -A lists"));
    world
        .run(&["workloads", "delete", EC2])
        .is(1)
        .silent()
        .complains(&format!("there is no registration default/{EC2}"));
    let left = world.cluster.kubectl(["get", "war", "-n", "bookinfo", "-o", "name"]).unwrap();
    assert_eq!(left.lines().count(), 1, "{left}");

    access(&world);
    plugin(&world);
}

/// An instance is admitted and a VM isn't, as the cluster has it.
fn plans(world: &World) {
    world.dir.write("m/all.yaml", format!("{NARROW}---\n{GROUP}"));
    world.run(&["plan", "-f", "m"]).is(0).says("2 live workloads: 0 would lose their admission, 0 would gain it");
    world.dir.write("m/all.yaml", format!("{}---\n{GROUP}", NARROW.replace("ratings-role", "other")));
    world.run(&["plan", "-f", "m"]).is(3).says(&format!("bookinfo/{EC2} (WorkloadGroup bookinfo/ratings) would lose"));
    world.run(&["plan", "-f", "m", "-n", "istio-system"]).is(0).says("0 live workloads");
    let vms = "apiVersion: authorization.onboarding.tetrate.io/v1alpha1
kind: OnboardingPolicy
metadata: {name: vms, namespace: bookinfo}
spec:
  allow:
  - workloads: [{jwt: {issuer: 'https://mycompany.corp'}}]
    onboardTo: [{workloadGroupSelector: {}}]
";
    world.dir.write("m/all.yaml", format!("{NARROW}---\n{GROUP}---\n{vms}"));
    let plan = world.run(&["plan", "-f", "m", "-o", "json"]).is(3).json();
    assert_eq!((&plan["gain"][0]["name"], &plan["unchanged"]), (&json!(VM), &json!(1)));
}

/// Whom the API server doesn't let, and kubeconfigs that lead nowhere.
fn access(world: &World) {
    let nobody = world.nobody();
    let refused = |arguments: &[&str]| {
        let kubeconfig = nobody.to_str().unwrap();
        world.dir.run(&[&["--kubeconfig", kubeconfig], arguments].concat()).is(1).silent()
    };
    let why = "User \"system:serviceaccount:bookinfo:nobody\" cannot list resource";
    for arguments in [&["workloads", "-n", "bookinfo"][..], &["status"], &["lint", "--cluster"], &["plan", "-f", "m"]] {
        refused(arguments).complains(why).complains("ask whoever administers the cluster for a role");
    }
    refused(&["workloads", "delete", EC2, "-n", "bookinfo"]).complains("cannot delete resource");
    let doctor = world.dir.run(&["doctor", "--kubeconfig", nobody.to_str().unwrap()]).is(1);
    doctor
        .says("FAIL ControlPlane: listing controlplanes.install.tetrate.io")
        .says("warn OnboardingPolicies: can't be looked at: listing onboardingpolicies")
        .says("1 failed, ");

    let admin = world.cluster.kubeconfig();
    let admin = admin.to_str().unwrap();
    let stranger = world.cluster.kubeconfig_with_token("of-nobody");
    world.dir.write("stranger.kubeconfig", stranger);
    world.dir.run(&["workloads", "--kubeconfig", "stranger.kubeconfig"]).is(1).silent().complains("log in again");
    world
        .dir
        .run(&["workloads", "--kubeconfig", admin, "--context", "production"])
        .is(1)
        .silent()
        .complains("the kubeconfig has no context \"production\"; there are: test");
    world.dir.run(&["workloads", "--kubeconfig", admin, "--context", "test"]).is(0);
    world.dir.run(&["workloads", "--kubeconfig", "nowhere"]).is(1).silent().complains("reading the kubeconfig nowhere");
    world
        .dir
        .run(&["workloads", "--kubeconfig", admin, "--socket", "x"])
        .is(1)
        .silent()
        .complains("leave one of the two out");
    world
        .dir
        .run(&["workloads"])
        .is(1)
        .silent()
        .complains("no admin socket of a standalone one at /var/lib/onboarding-plane/admin.sock")
        .complains("no kubeconfig of a cluster in $KUBECONFIG or ~/.kube/config");
    world.dir.run(&["doctor"]).is(1).silent().complains("there is no kubeconfig");
    // A socket that is named goes before the user's kubeconfig.
    world.run(&["workloads", "--socket", "x"]).is(1).silent().complains("asking the plane at x");
    world.dir.write("home/.kube/config", std::fs::read(admin).unwrap());
    world.dir.run_with(&["workloads"], "", &[("HOME", &world.dir.path("home"))]).is(0);

    let text = std::fs::read_to_string(admin).unwrap();
    // A command that logs in, as those of clouds are.
    let login = json!({"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
        "status": {"token": admin_token(&text)}});
    world.dir.write("login.json", login.to_string());
    let command = json!({"apiVersion": "client.authentication.k8s.io/v1", "command": "cat",
        "args": [world.dir.path("login.json")], "interactiveMode": "Never"});
    let exec = text.replace(&format!("{{token: '{}'}}", admin_token(&text)), &json!({"exec": command}).to_string());
    world.dir.write("exec.kubeconfig", &exec);
    world.dir.run(&["workloads", "-A", "--kubeconfig", "exec.kubeconfig"]).is(0).says(EC2);
    world.dir.write("exec.kubeconfig", exec.replace("\"cat\"", "\"no-such-command\""));
    world
        .dir
        .run(&["workloads", "--kubeconfig", "exec.kubeconfig"])
        .is(1)
        .silent()
        .complains("with the command \"no-such-command\"");

    let address = world.cluster.api_address().to_string();
    world.dir.write("away.kubeconfig", text.replace(&address, "127.0.0.1:1"));
    world
        .dir
        .run(&["workloads", "--kubeconfig", "away.kubeconfig"])
        .is(1)
        .silent()
        .complains("asking the API server at https://127.0.0.1:1");
    world
        .dir
        .run(&["doctor", "--kubeconfig", "away.kubeconfig"])
        .is(1)
        .says("FAIL API server https://127.0.0.1:1/: asking for the version")
        .says("1 failed, 0 warnings, 0 ok");
}

fn admin_token(kubeconfig: &str) -> &str {
    kubeconfig.split("token: '").nth(1).and_then(|rest| rest.split('\'').next()).unwrap()
}

/// By its other name it is a command of kubectl.
fn plugin(world: &World) {
    let program = world.dir.path("kubectl-onboard");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_onboardctl"), &program).unwrap();
    let kubeconfig = world.cluster.kubeconfig();
    let environment = [("KUBECONFIG", kubeconfig.as_path()), ("PATH", program.parent().unwrap())];
    let kubectl = world.cluster.binary("kubectl");
    let run = |arguments: &[&str]| world.dir.run_as(&kubectl, &[&["onboard"], arguments].concat(), "", &environment);
    run(&["workloads", "-n", "bookinfo"]).is(0).says(EC2);
    run(&["lint"]).is(0);
    run(&["--help"]).is(0).says("Usage: kubectl onboard ").says("kubectl onboard workloads -n bookinfo");
    let help = run(&["workloads", "--help"]).is(0).says("Usage: kubectl onboard workloads").stdout;
    assert!(!help.contains("onboardctl ") && !help.contains("--socket"), "{help}");
    run(&["workloads", "--socket", "x"]).is(1).complains("kubectl onboard: --socket and --data-dir");
    // Though a socket is named in the environment.
    let named = [environment[0], environment[1], ("ONBOARDING_ADMIN_SOCKET", Path::new("x"))];
    world.dir.run_as(&kubectl, &["onboard", "workloads", "-A"], "", &named).is(0).says(EC2);
}

#[test]
fn what_is_in_the_cluster_is_explained_and_linted() {
    let world = World::new();
    world.dir.write("identity.yaml", ec2("ratings-role").to_string());
    let explain = |extra: &[&str]| {
        world.run(&[&["explain", "--cluster", "--identity", "identity.yaml", "--group"], extra].concat())
    };
    explain(&["bookinfo/ratings"]).is(0).says("allowed: policy allow-narrow-subset-of-aws-ec2-instances admits");
    explain(&["bookinfo/reviews"])
        .is(2)
        .says("the WorkloadGroup bookinfo/reviews doesn't exist; there are bookinfo/ratings");
    world
        .with_stdin(
            &["explain", "--cluster", "--identity", "-", "--group", "bookinfo/ratings"],
            &ec2("other").to_string(),
        )
        .is(2)
        .says("is \"other\", wanted \"ratings-role\"");
    world
        .run(&["explain", "--identity", "identity.yaml", "--group", "bookinfo/ratings"])
        .is(1)
        .complains("or --cluster");
    world.run(&["lint", "--cluster"]).is(0).silent();
    world.run(&["lint", "--cluster", "x.yaml"]).is(1).silent();

    world.write_unlinted(&NARROW.replace("name: allow-narrow", "name: broken").replace("- '123456789012'", "- '12'"));
    world
        .run(&["lint", "--cluster"])
        .is(1)
        .says("cluster:1: OnboardingPolicy bookinfo/broken-subset-of-aws-ec2-instances: spec.allow[0].workloads[0].aws.accounts[0]:");
    world.run(&["lint", "--cluster", "-n", "default"]).is(0).silent();
    explain(&["bookinfo/ratings"])
        .is(0)
        .complains("warning: counts as absent: cluster:1: OnboardingPolicy bookinfo/broken");
    world
        .run(&["doctor"])
        .is(1)
        .says("FAIL OnboardingPolicy bookinfo/broken-subset-of-aws-ec2-instances: spec.allow[0]");
}

#[test]
fn the_doctor_finds_what_is_missing_until_nothing_is() {
    let world = World::new();
    let doctor = || world.run(&["doctor"]);
    world.run(&["status"]).is(1).says("missing: no ControlPlane of istio-system enables onboarding");
    doctor()
        .is(1)
        .says("ok   API server")
        .says("FAIL ControlPlane: none in istio-system enables onboarding; set spec.meshExpansion.onboarding")
        .says("FAIL Istio: there is no ConfigMap istio")
        .says("FAIL WorkloadGroup bookinfo/ratings: its ServiceAccount \"ratings-vm\" isn't there");

    // An address of its own, so that others may use the port on theirs.
    let endpoint = Endpoint::start("the-uid");
    let host = endpoint.address.ip().to_string();
    let tls = endpoint.tls.clone();
    let plane = control_plane("      uid: the-uid\n", ISSUERS).replace("onboarding-endpoint.your-company.corp", &host);
    world.cluster.apply(&plane).unwrap();
    let missing = doctor().is(1);
    let missing =
        missing.says("FAIL Secret onboarding-endpoint-tls: isn't there; create it: kubectl create secret tls");
    let missing =
        missing.says("FAIL Deployment vmgateway: isn't there").says("FAIL Deployment onboarding-plane: isn't there");
    missing.says("FAIL Service vmgateway: isn't there");
    world.run(&["status"]).is(1).says("missing: the Deployment onboarding-plane");
    let said = |kind: &str, status: &str| {
        let absent = json!({"type": kind, "status": status, "reason": "SecretAbsent", "message": "there is no Secret"});
        world.patch_status(
            "controlplane",
            "controlplane",
            "istio-system",
            &json!({"status": {"conditions": [absent]}}),
        );
    };
    said("CertificateUsable", "False");
    world.run(&["status"]).is(1).says("missing: CertificateUsable: there is no Secret");
    doctor().is(1).says("warn ControlPlane controlplane: CertificateUsable is False: there is no Secret");
    said("CertificateUsable", "True");

    world.dir.write("tls.crt", &tls.certificate_chain);
    world.dir.write("tls.key", &tls.private_key);
    let (certificate, key) = (world.dir.path("tls.crt"), world.dir.path("tls.key"));
    let certificate = format!("--cert={}", certificate.display());
    let key = format!("--key={}", key.display());
    let create = ["create", "secret", "tls", "onboarding-endpoint-tls", "-n", "istio-system", &certificate, &key];
    world.cluster.kubectl(create).unwrap();
    for name in ["vmgateway", "onboarding-plane", "istiod"] {
        world.cluster.apply(&deployment(name).to_string()).unwrap();
        let available = json!({"status": {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "conditions": [
            {"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable"}]}});
        world.patch_status("deployment", name, "istio-system", &available);
    }
    for (name, kind, port) in [("vmgateway", "LoadBalancer", 15443), ("istiod", "ClusterIP", 15012)] {
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "istio-system"},
            "spec": {"type": kind, "ports": [{"port": port}]},
        });
        world.cluster.apply(&service.to_string()).unwrap();
    }
    let ingress = json!({"status": {"loadBalancer": {"ingress": [{"ip": host}]}}});
    world.patch_status("service", "vmgateway", "istio-system", &ingress);
    world.cluster.kubectl(["create", "configmap", "istio", "-n", "istio-system", "--from-literal=mesh="]).unwrap();
    world.cluster.kubectl(["create", "configmap", "istio-ca-root-cert", "-n", "bookinfo"]).unwrap();
    world.cluster.kubectl(["create", "serviceaccount", "ratings-vm", "-n", "bookinfo"]).unwrap();
    world.register(EC2, ec2("ratings-role"), "True");

    let well = doctor().is(0);
    let well = well.says(&format!("ok   ControlPlane: enables onboarding at {host}"));
    let well = well.says(&format!("ok   Secret onboarding-endpoint-tls: has a certificate for {host}, valid until"));
    let well =
        well.says(&format!("ok   endpoint {host}:15443: answers at {host}:15443 with the certificate of the Secret"));
    let well = well.says(&format!("ok   endpoint {host}:15443: the plane answers, its UID is \"the-uid\""));
    let well = well.says("ok   istiod istiod: is available, revision default, image example/istiod:1");
    well.says("ok   registrations: 1 of 1 are connected, none is overdue").says("0 failed, 0 warnings, ");
    let findings = world.run(&["doctor", "-o", "json"]).is(0).json();
    assert_eq!(findings["ok"], true);
    assert_eq!(findings["findings"][0]["level"], "ok");
    let status = world.run(&["status"]).is(0).stdout;
    assert_eq!(
        status,
        format!("The plane is ready.\nUID            the-uid\nHosts          {host}\nSessions       1\n")
    );

    reader(&world);
    admission_and_revisions(&world);
    another_gateway(&world, &host);

    // What breaks later.
    world.cluster.kubectl(["delete", "war", EC2, "-n", "bookinfo"]).unwrap();
    world.register(VM, vm(), "False");
    let entry = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
        "metadata": {"name": EC2, "namespace": "bookinfo", "labels": {"app.kubernetes.io/managed-by": "onboarding-plane"}},
        "spec": {"address": "10.0.0.4"},
    });
    world.cluster.apply(&entry.to_string()).unwrap();
    drop(endpoint);
    let broken = doctor().is(1);
    let broken =
        broken.says(&format!("FAIL endpoint {host}:15443: doesn't answer at {host}:15443: Connection refused"));
    let broken = broken
        .says(&format!("FAIL registrations: 1 weren't connected for longer than the grace period (5m): bookinfo/{VM}"));
    broken.says(&format!("warn WorkloadEntries: 1 that the plane made have no registration any more: bookinfo/{EC2}"));
}

/// Policies and groups that don't fit each other, and revisions that aren't there: each found, and gone once it is put right.
fn admission_and_revisions(world: &World) {
    let apply = |yaml: &str| world.cluster.apply(yaml).unwrap();
    let doctor = || world.run(&["doctor"]);
    apply(&NARROW.replace("name: allow-narrow", "name: nobody").replace("app: ratings", "app: reviews"));
    doctor().is(0).says("warn OnboardingPolicy bookinfo/nobody-subset-of-aws-ec2-instances: admits nobody: no WorkloadGroup of its namespace has the labels");
    apply(&GROUP.replace("ratings", "lonely").replace("serviceAccount: lonely-vm", "serviceAccount: ratings-vm"));
    doctor().is(0).says(
        "warn WorkloadGroup bookinfo/lonely: nobody may join it: no OnboardingPolicy of its namespace selects it",
    );
    world.cluster.kubectl(["label", "workloadgroup", "ratings", "-n", "bookinfo", "istio.io/rev=canary"]).unwrap();
    doctor()
        .is(0)
        .says("warn WorkloadGroup bookinfo/ratings: asks for the Istio revision \"canary\", of which there is no ConfigMap istio-canary");

    // That revision, half there at first.
    let mut istiod = deployment("istiod-canary");
    istiod["metadata"]["labels"] = json!({"app": "istiod", "istio.io/rev": "canary"});
    apply(&istiod.to_string());
    doctor()
        .is(1)
        .says("FAIL istiod istiod-canary: isn't available (revision canary, image example/istiod-canary:1)")
        .says("FAIL istiod istiod-canary: its mesh configuration, ConfigMap istio-canary, isn't there")
        .says("FAIL istiod istiod-canary: there is no Service istiod-canary beside it");
    let available = json!({"status": {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "conditions": [
        {"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable"}]}});
    world.patch_status("deployment", "istiod-canary", "istio-system", &available);
    world
        .cluster
        .kubectl(["create", "configmap", "istio-canary", "-n", "istio-system", "--from-literal=mesh="])
        .unwrap();
    world
        .cluster
        .kubectl(["create", "service", "clusterip", "istiod-canary", "-n", "istio-system", "--tcp=15012"])
        .unwrap();
    for name in ["onboardingpolicy/nobody-subset-of-aws-ec2-instances", "workloadgroup/lonely"] {
        world.cluster.kubectl(["delete", name, "-n", "bookinfo"]).unwrap();
    }
    doctor()
        .is(0)
        .says("ok   Istio: has a mesh configuration for the revisions: canary, default")
        .says("ok   istiod istiod-canary: is available, revision canary")
        .says("0 failed, 0 warnings, ");
}

/// `customGateway` is asked for istiod, as sidecars do.
fn another_gateway(world: &World, host: &str) {
    let set = |host: &str, port: u16| {
        let patch = json!({"spec": {"meshExpansion": {"customGateway": {"host": host, "port": port}}}}).to_string();
        let patch = ["patch", "controlplane", "controlplane", "-n", "istio-system", "--type=merge", "-p", &patch];
        world.cluster.kubectl(patch).unwrap();
    };
    set(host, 15443);
    let leads = format!("ok   customGateway {host}:15443: leads to istiod.istio-system.svc, by {host}:15443");
    world.run(&["doctor"]).is(0).says(&leads);
    set(host, 1);
    world
        .run(&["doctor"])
        .is(1)
        .says(&format!("FAIL customGateway {host}:1: doesn't answer at {host}:1: Connection refused"));
    let none = r#"[{"op": "remove", "path": "/spec/meshExpansion/customGateway"}]"#;
    world
        .cluster
        .kubectl(["patch", "controlplane", "controlplane", "-n", "istio-system", "--type=json", "-p", none])
        .unwrap();
}

/// The role that the document gives is enough for whoever only looks, and not for more.
fn reader(world: &World) {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/onboardctl.md");
    let document = std::fs::read_to_string(document).unwrap();
    let role = document.split("```yaml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let nobody = world.nobody();
    world.cluster.apply(role).unwrap();
    let binding = ["create", "clusterrolebinding", "reader", "--clusterrole=onboarding-reader"];
    world.cluster.kubectl(binding.into_iter().chain(["--serviceaccount=bookinfo:nobody"])).unwrap();
    let run = |arguments: &[&str]| world.dir.run(&[&["--kubeconfig", nobody.to_str().unwrap()], arguments].concat());
    run(&["doctor"]).is(0).says("0 failed, 1 warnings").says("warn Secret onboarding-endpoint-tls: can't be looked at");
    run(&["workloads", "-A"]).is(0).says(EC2);
    run(&["lint", "--cluster"]).is(0);
    run(&["status"]).is(0);
    run(&["workloads", "delete", EC2, "-n", "bookinfo"]).is(1).silent().complains("cannot delete resource");
}

fn deployment(name: &str) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": name, "namespace": "istio-system", "labels": {"app": name}},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": format!("example/{name}:1")}]},
            },
        },
    })
}
