//! A cluster with Istio and onboarding to play with. `dev/cluster` builds it and runs it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it tells people what it does")]

mod ask;
mod state;
mod up;

use clap::{Parser, Subcommand};
use onboarding_testkit::netns::is_outside;
use std::process::ExitCode;

/// A real cluster with Istio and onboarding in it, to play with: everything runs here, nothing is left behind.
///
/// etcd, kube-apiserver, kube-controller-manager and istiod are the real ones; onboarding is installed by the real helm. There is no
/// kubelet: what the controllers make pods of (onboarding-operator, onboarding-plane, vmgateway, onboarding-repository) runs as
/// processes, each in a network namespace that has the pod's address, with the token of the pod's ServiceAccount.
#[derive(Parser)]
#[command(
    name = "dev/cluster",
    bin_name = "dev/cluster",
    after_help = "Examples:
  dev/cluster up                                    # stays in the foreground; Ctrl-C ends it all
  dev/cluster kubectl get pods -A                   # in another terminal
  dev/cluster kubectl apply -f demo/manifests/ratings.yaml
  dev/cluster vm vm1                                # an EC2 instance that joins the group ratings
  dev/cluster vm vm2 --group productpage            # a host on premises, with a JWT
  dev/cluster vm vm3 --role details-role            # one that is refused; the Event on the WorkloadGroup says why
  dev/cluster enter vm2 curl -sH 'Host: ratings.bookinfo:8080' http://127.0.0.2:8080/
  dev/cluster logs vm1
  dev/cluster onboardctl doctor
  dev/cluster down

ONBOARDING_CLUSTER_STATE names another directory than /tmp/onboarding-cluster-<uid>, so that there can be several."
)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Starts it, says when it is ready, and stays; Ctrl-C or `dev/cluster down` ends it
    Up,
    /// Ends everything that `up` started, and clears what a killed one left
    Down,
    /// What runs: pods, VMs, where the logs are. Exit code 3: it isn't up
    Status,
    /// Starts a VM whose agent joins a WorkloadGroup
    Vm(ask::Vm),
    /// Ends a VM: its agent leaves the mesh first
    Rm {
        name: String,
        /// As a power failure: nobody says goodbye
        #[arg(long)]
        now: bool,
    },
    /// Runs kubectl as the cluster's administrator
    #[command(disable_help_flag = true)]
    Kubectl(Rest),
    /// Runs onboardctl on a machine that resolves the endpoint's name, as the cluster's administrator
    #[command(disable_help_flag = true)]
    Onboardctl(Rest),
    /// A shell with KUBECONFIG set, and kubectl, helm and onboardctl on PATH; or one command in it
    #[command(disable_help_flag = true)]
    Shell(Rest),
    /// A shell on a machine (a VM, a pod, `control`, `terminal`), or one command there
    Enter {
        machine: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Prints a log: of a VM's agent, a pod, `kube-apiserver`, `istiod`; without a name lists them
    Logs {
        name: Option<String>,
        /// Goes on as it is written
        #[arg(short, long)]
        follow: bool,
    },
}

#[derive(clap::Args)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

fn main() -> ExitCode {
    // What runs inside has the same command line, or a machine's name as its only argument.
    if !is_outside() {
        return up::inside();
    }
    let ended = match Arguments::parse().verb {
        Verb::Up => up::outside(),
        Verb::Down => state::down(),
        Verb::Status => ask::status(),
        Verb::Vm(vm) => ask::vm(vm),
        Verb::Rm { name, now } => ask::remove(name, now),
        Verb::Kubectl(rest) => ask::kubectl(&rest.arguments),
        Verb::Onboardctl(rest) => ask::onboardctl(&rest.arguments),
        Verb::Shell(rest) => ask::shell(&rest.arguments),
        Verb::Enter { machine, command } => ask::enter(&machine, &command),
        Verb::Logs { name, follow } => ask::logs(name.as_deref(), follow),
    };
    ended.unwrap_or_else(|error| {
        eprintln!("dev/cluster: {error:#}");
        ExitCode::FAILURE
    })
}
