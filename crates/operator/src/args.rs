//! The command line.

use crate::reconcile::Options;
use crate::render::{Packages, Settings};
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use onboarding_runtime::logs;
use std::net::SocketAddr;

/// Turns `spec.meshExpansion.onboarding` of a ControlPlane into a running Workload Onboarding Endpoint.
#[derive(Debug, Parser)]
#[command(name = "onboarding-operator", version, args_conflicts_with_subcommands = true)]
#[command(
    after_help = "It reaches the API server as a pod does, or by KUBECONFIG. What it needs to be allowed is in deploy/chart/onboarding.
`kubectl get controlplane -n istio-system -o yaml` shows in status.conditions what is missing."
)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub serve: Serve,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Prints completions for a shell.
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, clap::Args)]
pub struct Serve {
    /// Namespace of the ControlPlane, of istiod, and of what is made.
    #[arg(long, value_name = "NAMESPACE", default_value = "istio-system")]
    namespace: String,
    /// Image of `onboarding-plane`.
    #[arg(long, value_name = "IMAGE", default_value = concat!("onboarding-plane:", env!("CARGO_PKG_VERSION")))]
    plane_image: String,
    /// One more option of `onboarding-plane`, as --grace-period=10m; may be given several times.
    #[arg(long = "plane-argument", value_name = "OPTION=VALUE", allow_hyphen_values = true)]
    plane_arguments: Vec<String>,
    /// Image of the package repository.
    #[arg(long, value_name = "IMAGE", default_value = concat!("onboarding-repository:", env!("CARGO_PKG_VERSION")))]
    repository_image: String,
    /// Image of the gateway; `auto`: Istio's injection puts its own in.
    #[arg(long, value_name = "IMAGE", default_value = "auto")]
    gateway_image: String,
    /// When images are pulled; absent: as Kubernetes has it (always for the tag `latest`, else if not present).
    #[arg(long, value_name = "POLICY", value_enum)]
    image_pull_policy: Option<PullPolicy>,
    /// PersistentVolumeClaim with the packages that the repository serves, laid out as `onboardctl packages` lays them out.
    /// Mounted read-only by all replicas; absent, as is --packages-image: the packages in the repository's own image.
    #[arg(long, value_name = "CLAIM", conflicts_with = "packages_image")]
    packages_claim: Option<String>,
    /// Image that holds nothing but the packages, mounted as a volume (the cluster must have image volumes).
    #[arg(long, value_name = "IMAGE")]
    packages_image: Option<String>,
    /// Secret with which images are pulled; may be given several times.
    #[arg(long = "image-pull-secret", value_name = "NAME")]
    image_pull_secrets: Vec<String>,
    /// Replicas of each Deployment, at least.
    #[arg(long, value_name = "NUMBER", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    replicas: u32,
    /// Replicas of each Deployment, at most.
    #[arg(long, value_name = "NUMBER", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    max_replicas: u32,
    /// The cluster's DNS domain.
    #[arg(long, value_name = "DOMAIN", default_value = "cluster.local")]
    cluster_domain: String,
    /// Istio revision that the gateway belongs to; absent: the default one, or else the first there is.
    #[arg(long, value_name = "REVISION")]
    gateway_revision: Option<String>,
    /// /metrics, /healthz and /readyz, in plain HTTP.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15021")]
    pub admin_listen: SocketAddr,
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

/// As Kubernetes names them.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum PullPolicy {
    #[value(name = "Always")]
    Always,
    #[value(name = "IfNotPresent")]
    IfNotPresent,
    #[value(name = "Never")]
    Never,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

impl Serve {
    pub fn options(&self) -> Options {
        Options {
            namespace: self.namespace.clone(),
            settings: Settings {
                plane_image: self.plane_image.clone(),
                plane_arguments: self.plane_arguments.clone(),
                repository_image: self.repository_image.clone(),
                gateway_image: self.gateway_image.clone(),
                pull_policy: self.image_pull_policy.map(|policy| format!("{policy:?}")),
                packages: match (&self.packages_claim, &self.packages_image) {
                    (Some(claim), _) => Packages::Claim(claim.clone()),
                    (None, Some(image)) => Packages::Image(image.clone()),
                    (None, None) => Packages::InRepositoryImage,
                },
                pull_secrets: self.image_pull_secrets.clone(),
                replicas: (self.replicas, self.max_replicas),
                cluster_domain: self.cluster_domain.clone(),
                gateway_revision: self.gateway_revision.clone(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
            },
        }
    }

    pub fn log_format(&self) -> logs::Format {
        match self.log_format {
            LogFormat::Text => logs::Format::Text,
            LogFormat::Json => logs::Format::Json,
        }
    }
}

pub fn completions(shell: clap_complete::Shell) {
    let mut command = Args::command();
    clap_complete::generate(shell, &mut command, "onboarding-operator", &mut std::io::stdout());
}
