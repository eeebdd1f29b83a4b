//! The command line of a repository that runs by itself.

use clap::{Parser, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Serves DEB and RPM packages of the Workload Onboarding Agent and the Istio sidecar over HTTPS.
#[derive(Debug, Parser)]
#[command(
    name = "onboarding-repository",
    version,
    after_help = "Example:
  onboarding-repository --packages ./packages --certificate-directory ./tls --listen 127.0.0.1:8443

The directory of packages is laid out as the URIs are: deb/amd64/onboarding-agent.deb is /install/deb/amd64/onboarding-agent.deb.
Replace a package by a rename. `curl http://127.0.0.1:15021/readyz` says what is missing."
)]
pub struct Args {
    /// Where packages are served.
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:443")]
    pub listen: SocketAddr,
    /// /metrics, /healthz and /readyz, in plain HTTP.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:15021")]
    pub admin_listen: SocketAddr,
    /// The packages.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/onboarding-repository/packages")]
    pub packages: PathBuf,
    /// tls.crt and tls.key, in PEM; read again when they change.
    #[arg(long, value_name = "DIR", default_value = "/etc/onboarding-repository/tls")]
    pub certificate_directory: PathBuf,
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}
