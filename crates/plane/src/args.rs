//! The command line.

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use onboarding_endpoint::limits::Limits;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

/// The Workload Onboarding Endpoint: workloads that run outside Kubernetes join the mesh here.
#[derive(Debug, Parser)]
#[command(name = "onboarding-plane", version)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs the plane of one machine: manifests from a directory, registrations in SQLite, a mesh of Envoys.
    Standalone(Box<Standalone>),
    /// Runs one replica of the plane in a cluster: policies and registrations are objects of its API server, sidecars are Istio's.
    Kubernetes(Box<Kubernetes>),
    /// Prints completions for a shell.
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboarding-plane standalone --manifests /etc/onboarding-plane --data-dir /var/lib/onboarding-plane
  onboarding-plane standalone --manifests ./manifests --data-dir ./data --listen 127.0.0.1:15443 --log-format json

The certificate is that of the Secret which the ControlPlane names; all manifests are read again when they change.
`curl http://127.0.0.1:15021/readyz` says what is missing; `onboardctl --data-dir DIR workloads` who is there.")]
pub struct Standalone {
    /// Directory of YAML and JSON manifests: ControlPlane, Secret, WorkloadGroup, OnboardingPolicy, Sidecar, Service, ServiceEntry.
    #[arg(long, value_name = "DIR")]
    pub manifests: PathBuf,
    /// Registrations, keys, the mesh's root; made where it is missing.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/onboarding-plane")]
    pub data_dir: PathBuf,
    #[command(flatten)]
    pub serving: Serving,
    /// Trust domain of the mesh.
    #[arg(long, value_name = "DOMAIN", default_value = onboarding_standalone::Options::DEFAULT_TRUST_DOMAIN)]
    pub trust_domain: String,
    /// Life of the sidecars' certificates; they are renewed at half of it.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = duration)]
    pub certificate_life: Duration,
    /// DEB and RPM packages, served while the ControlPlane has `localRepository`; absent: `packages` in the data directory.
    #[arg(long, value_name = "DIR")]
    pub packages: Option<PathBuf>,
    /// Where packages are served, over HTTPS with the endpoint's certificate.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:443")]
    pub repository_listen: SocketAddr,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboarding-plane kubernetes --replica $HOSTNAME
  onboarding-plane kubernetes --kubeconfig ~/.kube/config --replica here --listen 127.0.0.1:15443 --audit-log audit.jsonl

The operator runs this as the Deployment onboarding-plane; docs/kubernetes.md says what its account may do.")]
pub struct Kubernetes {
    /// Of an administrator or of the plane's account; absent: the account of the pod that this runs in.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Where Istio's control plane is, the ControlPlane and the endpoint's Secret.
    #[arg(long, value_name = "NAMESPACE", default_value = "istio-system")]
    pub namespace: String,
    /// This replica's name, as `kubectl describe war` shows it; no two replicas may have the same.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    pub replica: String,
    /// How old an istio-token, which sidecars show to istiod's CA, is when it is replaced: what is left of its hour is what a host has while no
    /// plane is there. Absent, or where it is longer: half of its life.
    #[arg(long, value_name = "DURATION", value_parser = renewal)]
    pub istio_token_renewal: Option<Duration>,
    #[command(flatten)]
    pub serving: Serving,
}

/// What every plane has, wherever its configuration comes from.
#[derive(Debug, clap::Args)]
pub struct Serving {
    /// Where agents connect.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:15443")]
    pub listen: SocketAddr,
    /// /metrics, /healthz and /readyz, in plain HTTP.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15021")]
    pub admin_listen: SocketAddr,
    /// How long a workload stays in the mesh after its agent's connection was lost, as in 5m or 90s.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = duration)]
    pub grace_period: Duration,
    /// One line of JSON for each decision; `-` is standard output.
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
    /// Connections that one address may have; behind a NAT or a gateway all agents have one address.
    #[arg(long, value_name = "NUMBER", default_value_t = Limits::DEFAULT_CONNECTIONS_PER_ADDRESS)]
    pub connections_per_address: usize,
    /// Authorizations of one address in a second, after a burst; an agent beyond that is told when to come again.
    #[arg(long, value_name = "NUMBER", default_value_t = Limits::DEFAULT_AUTHORIZATIONS_PER_SECOND)]
    pub authorizations_per_second: NonZeroU32,
    /// How many of these may come at once; absent: what comes in ten seconds. Behind a gateway this is for all agents together.
    #[arg(long, value_name = "NUMBER")]
    pub authorization_burst: Option<NonZeroU32>,
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Asks STS at this URL instead of at AWS: whoever answers there decides who has which role.
    #[arg(long, value_name = "URL")]
    pub aws_sts_endpoint: Option<String>,
    /// PEM of further certificates that sign EC2 identity documents, each after a line `# REGION`: whoever has their keys is any instance.
    #[arg(long, value_name = "FILE")]
    pub aws_extra_certificates: Option<PathBuf>,
    /// PEM of CAs that JWT issuers' servers may have besides the system's: whoever has their keys can be an issuer.
    #[arg(long, value_name = "FILE")]
    pub jwks_extra_roots: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Go's grammar of durations, as in the manifests.
fn duration(text: &str) -> Result<Duration, String> {
    onboarding_kinds::duration(text)
}

/// Each renewal is a request to the API server, and a message to every agent.
fn renewal(text: &str) -> Result<Duration, String> {
    const LEAST: Duration = Duration::from_secs(5);
    duration(text).and_then(|after| if after < LEAST { Err(format!("must be {LEAST:?} or more")) } else { Ok(after) })
}

pub fn completions(shell: clap_complete::Shell) {
    let mut command = Args::command();
    clap_complete::generate(shell, &mut command, "onboarding-plane", &mut std::io::stdout());
}
