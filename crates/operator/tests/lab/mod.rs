//! A cluster in a network namespace, where a Service may have endpoints (none may be on loopback), and the operator beside it.

use libtest_mimic::{Arguments, Failed, Trial};
use onboarding_testkit::cluster::{Cluster, Options};
use onboarding_testkit::netns::{Lab, Machine, test_inside};
use onboarding_testkit::process::Process;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

pub const MESH: &str =
    "trustDomain: cluster.local\ndefaultConfig:\n  discoveryAddress: istiod.istio-system.svc:15012\n";
const CONTROL_PLANE: &str = "\
apiVersion: install.tetrate.io/v1alpha1
kind: ControlPlane
metadata: {name: controlplane, namespace: istio-system}
spec: {meshExpansion: {onboarding: {endpoint: {hosts: [onboarding.corp], secretName: endpoint-tls}, localRepository: {}}}}
";

/// What `main` of a program with this one test is.
pub fn run(name: &'static str, test: fn(&Lab) -> anyhow::Result<()>) -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list {
        return libtest_mimic::run(&arguments, vec![Trial::test(name, || Ok(()))]).exit_code();
    }
    test_inside(|lab| {
        let lab = lab.clone();
        let trial = Trial::test(name, move || test(&lab).map_err(|error| Failed::from(format!("{error:#}"))));
        libtest_mimic::run(&arguments, vec![trial]).exit_code()
    })
}

/// With Istio's kinds and ours; all of it on one machine.
pub fn cluster(lab: &Lab) -> anyhow::Result<(Arc<Machine>, Cluster)> {
    let control = Arc::new(lab.machine("control", 5)?);
    let cluster = Cluster::start(Options::on(control.clone()))?;
    cluster.apply_istio_crds()?;
    cluster.apply_crds(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/crds")))?;
    Ok((control, cluster))
}

/// A ControlPlane that enables onboarding, and the operator that sees to it.
pub fn enable(cluster: &Cluster, control: &Machine) -> anyhow::Result<Process> {
    cluster.apply(CONTROL_PLANE)?;
    let mut command = control.command(env!("CARGO_BIN_EXE_onboarding-operator"));
    command.args(["--admin-listen", "127.0.0.1:0"]).env("KUBECONFIG", cluster.kubeconfig());
    Process::start("onboarding-operator", command, None)
}

/// As if pods of this Service ran on the machine.
pub fn endpoints(service: &str, port_name: &str, machine: &Machine, port: u16) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {service}-test, namespace: istio-system, labels: {{kubernetes.io/service-name: {service}}}}}\n\
         addressType: IPv4\nendpoints: [{{addresses: [{}], conditions: {{ready: true}}}}]\n\
         ports: [{{name: {port_name}, port: {port}, protocol: TCP}}]\n",
        machine.address()
    )
}
