//! A cluster with Istio's kinds and the chart in it, and the operator as a process.

use onboarding_testkit::cluster::{Cluster, Options};
use onboarding_testkit::process::{Process, output};
use rcgen::{CertificateParams, KeyPair};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

pub const NAMESPACE: &str = "istio-system";
pub const RELEASE: &str = "onboarding-system";
pub const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/chart/onboarding");
/// Of anything that is waited for here; the machine may be busy.
pub const WITHIN: Duration = Duration::from_secs(60);
pub const PLANE: &str = "system:serviceaccount:istio-system:onboarding-plane";
pub const OPERATOR: &str = "system:serviceaccount:onboarding-system:onboarding-operator";
/// What the operator makes, in the words of kubectl.
const KINDS: &str = "serviceaccount,configmap,secret,service,role,rolebinding,deployment,poddisruptionbudget,networkpolicy,horizontalpodautoscaler,gateway.networking.istio.io,virtualservice,destinationrule,clusterrole,clusterrolebinding";
const OURS: &str = "app.kubernetes.io/managed-by=onboarding-operator";
/// Pods that aren't restricted wouldn't be made in it.
const BASE: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: istio-system, labels: {pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: v1
kind: Service
metadata: {name: istiod, namespace: istio-system, labels: {app: istiod}}
spec: {ports: [{name: tls-istiod, port: 15012}]}
";

pub struct World {
    pub cluster: Cluster,
    files: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let world = Self { cluster: Cluster::start(Options::default()).unwrap(), files: tempfile::tempdir().unwrap() };
        world.cluster.apply_istio_crds().unwrap();
        world.cluster.apply(BASE).unwrap();
        world
    }

    pub fn installed() -> Self {
        let world = Self::new();
        world.helm(&["install", "onboarding", CHART, "--create-namespace"]).unwrap();
        world
    }

    pub fn helm(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(self.cluster.binary("helm"));
        command.args(arguments).args(["--namespace", RELEASE]).env("KUBECONFIG", self.cluster.kubeconfig());
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            command.env(variable, self.files.path().join("helm"));
        }
        output(command, WITHIN * 2)
    }

    /// The program, with a token of the account that the chart made.
    pub fn operator(&self, more: &[&str]) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_onboarding-operator"));
        command.args(["--admin-listen", "127.0.0.1:0", "--log-format", "json"]).args(more);
        command.env("KUBECONFIG", self.kubeconfig_of("onboarding-operator", RELEASE));
        start("onboarding-operator", command)
    }

    /// What the Deployment runs, with a token of its account, as pod `pod-1`.
    pub fn plane(&self) -> Program {
        let program = Path::new(env!("CARGO_BIN_EXE_onboarding-operator")).with_file_name("onboarding-plane");
        assert!(program.exists(), "{} isn't built; run `cargo build --workspace --bins`", program.display());
        let arguments = "jsonpath={.spec.template.spec.containers[0].args}";
        let arguments = self.kubectl(&format!("get deployment onboarding-plane -o {arguments}"));
        let arguments: Vec<String> = serde_json::from_str(&arguments).unwrap();
        let here = |argument: String| match argument.strip_prefix("[::]:") {
            Some(_) => "[::]:0".to_owned(),
            None => argument.replace("$(POD_NAMESPACE)", NAMESPACE).replace("$(POD_NAME)", "pod-1"),
        };
        let mut command = Command::new(program);
        command.args(arguments.into_iter().map(here));
        command.arg("--kubeconfig").arg(self.kubeconfig_of("onboarding-plane", NAMESPACE));
        start("onboarding-plane", command)
    }

    fn kubeconfig_of(&self, account: &str, namespace: &str) -> PathBuf {
        let token = self.cluster.kubectl(["create", "token", account, "-n", namespace, "--duration=2h"]).unwrap();
        let kubeconfig = self.files.path().join(format!("{account}.kubeconfig"));
        std::fs::write(&kubeconfig, self.cluster.kubeconfig_with_token(token.trim())).unwrap();
        kubeconfig
    }

    /// Arguments by their spaces, in the namespace of the ControlPlane.
    pub fn kubectl(&self, arguments: &str) -> String {
        self.cluster.kubectl(arguments.split(' ').chain(["-n", NAMESPACE])).unwrap()
    }

    /// `kubectl wait`, whose words say what it waited for.
    pub fn wait(&self, arguments: &str) {
        self.kubectl(&format!("wait --timeout={}s {arguments}", WITHIN.as_secs()));
    }

    pub fn wait_for_config(&self, yaml: &str) {
        let condition = format!(r"--for=jsonpath={{.data.config\.yaml}}={yaml}");
        let timeout = format!("--timeout={}s", WITHIN.as_secs());
        let wait = ["wait", &timeout, &condition, "configmap/onboarding-plane-config", "-n", NAMESPACE];
        self.cluster.kubectl(wait).unwrap();
    }

    /// Until a condition of the ControlPlane has this reason; its message.
    pub fn condition(&self, kind: &str, reason: &str) -> String {
        let path = |field: &str| format!("{{.status.conditions[?(@.type==\"{kind}\")].{field}}}");
        let condition = format!("--for=jsonpath={}={reason}", path("reason"));
        let timeout = format!("--timeout={}s", WITHIN.as_secs());
        let waited = self.cluster.kubectl(["wait", &timeout, &condition, "controlplane/controlplane", "-n", NAMESPACE]);
        if let Err(error) = waited {
            panic!("{error:#}; status: {}", self.kubectl("get controlplane controlplane -o jsonpath={.status}"));
        }
        let output = format!("jsonpath={}", path("message"));
        self.cluster.kubectl(["get", "controlplane/controlplane", "-n", NAMESPACE, "-o", &output]).unwrap()
    }

    /// `expansion`: `spec.meshExpansion`.
    pub fn apply_control_plane(&self, expansion: &str) {
        self.cluster.apply(&control_plane("controlplane", expansion)).unwrap();
    }

    pub fn apply_certificate(&self, names: &[&str]) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names).unwrap().self_signed(&key).unwrap();
        let indented = |pem: String| pem.lines().map(|line| format!("    {line}\n")).collect::<String>();
        let secret = format!(
            "apiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata: {{name: endpoint-tls, namespace: {NAMESPACE}}}\nstringData:\n  tls.crt: |\n{}  tls.key: |\n{}",
            indented(certificate.pem()),
            indented(key.serialize_pem()),
        );
        self.cluster.apply(&secret).unwrap();
    }

    /// As a kubelet would: the pods of a Deployment run.
    pub fn run_pods(&self, deployment: &str) {
        self.wait(&format!("--for=jsonpath={{.status.unavailableReplicas}}=1 deployment/{deployment}"));
        let pods = self.kubectl(&format!("get pods -l app.kubernetes.io/name={deployment} -o name"));
        let status = r#"{"status":{"phase":"Running","conditions":[{"type":"Ready","status":"True","lastTransitionTime":"2026-01-01T00:00:00Z"}]}}"#;
        for pod in pods.lines() {
            self.kubectl(&format!("patch {pod} --subresource=status --type=merge -p {status}"));
        }
    }

    /// Names of what the operator made: `deployment.apps/vmgateway`.
    pub fn ours(&self) -> Vec<String> {
        self.kubectl(&format!("get {KINDS} -l {OURS} -o name")).lines().map(str::to_owned).collect()
    }

    pub fn can(&self, who: &str, what: &str) -> bool {
        let arguments = format!("auth can-i --as={who} {what}");
        let ended = self.cluster.try_kubectl(arguments.split(' ')).unwrap();
        match ended.stdout.trim() {
            "yes" => true,
            "no" => false,
            _ => panic!("{what}: {ended:?}"),
        }
    }
}

fn start(name: &str, mut command: Command) -> Program {
    command.env_remove("RUST_LOG");
    let process = Process::start(name, command, None).unwrap();
    let line = process.wait_for_line(WITHIN, |line| line.contains("metrics and readiness are served")).unwrap();
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    Program { process, admin: line["address"].as_str().unwrap().to_owned() }
}

/// One that runs, and is killed with this value.
pub struct Program {
    pub process: Process,
    admin: String,
}

impl Program {
    fn get(&self, path: &str) -> String {
        Self::get_at(&self.admin, path)
    }

    /// What is answered at this address of the machine, an IPv6 one in brackets.
    pub fn get_by(&self, address: &str, path: &str) -> String {
        let port = self.admin.rsplit(':').next().unwrap();
        Self::get_at(&format!("{address}:{port}"), path)
    }

    fn get_at(address: &str, path: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: operator\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Until `/metrics` or `/readyz` says so.
    pub fn until(&self, path: &str, good: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + WITHIN;
        loop {
            let answer = self.get(path);
            if good(&answer) {
                return answer;
            }
            assert!(Instant::now() < deadline, "{path}: {answer}\n{}", self.process.tail());
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }
}

pub fn control_plane(name: &str, expansion: &str) -> String {
    format!(
        "apiVersion: install.tetrate.io/v1alpha1\nkind: ControlPlane\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\nspec:\n  hub: of others\n  meshExpansion: {expansion}\n"
    )
}
