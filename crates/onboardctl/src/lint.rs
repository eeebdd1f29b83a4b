//! `onboardctl lint`: every fault of manifests and of the agent's files, one a line.

use crate::manifests;
use crate::outcome::{FAILED, Outcome};
use crate::plane::Access;
use std::path::PathBuf;

/// Check manifests and the agent's configuration files
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl lint manifests/
  onboardctl lint /etc/onboarding-agent/onboarding.config.yaml
  kubectl get onboardingpolicies -A -o yaml | onboardctl lint -
  onboardctl lint --cluster -n bookinfo

Each fault is a line on standard output:
  FILE:LINE: KIND NAMESPACE/NAME: FIELD.PATH: what is wrong
With --cluster, FILE:LINE is cluster:1, and what is checked are the OnboardingPolicies and
WorkloadGroups of the namespace, or of all, and the ControlPlane.
Warnings, and paths that can't be read, are on standard error.

Exit codes: 0 no fault; 1 faults, or a path that can't be read.")]
pub struct Lint {
    /// Files, directories (*.yaml, *.yml and *.json below them), or - for standard input
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Check what is in the cluster
    #[arg(long, conflicts_with = "paths")]
    cluster: bool,
    /// With --cluster: only this namespace, and the ControlPlane
    #[arg(short, long, conflicts_with = "paths", value_name = "NAMESPACE", value_parser = crate::cli::namespace)]
    namespace: Option<String>,
}

impl Lint {
    pub fn run(&self, access: &Access) -> anyhow::Result<Outcome> {
        let loaded = match access.is_of_cluster(self.cluster, &self.paths)? {
            true => manifests::of_cluster(&access.cluster()?, self.namespace.as_deref())?,
            false => manifests::load(&self.paths),
        };
        let out = loaded.faults.iter().map(|fault| format!("{fault}\n")).collect();
        let unread = loaded.unread.iter().map(|problem| format!("onboardctl: {problem}"));
        let empty = loaded.empty.iter().map(|path| format!("warning: {path}: no *.yaml, *.yml or *.json in it"));
        let warnings = loaded.warnings.iter().chain(&loaded.too_large).map(|warning| format!("warning: {warning}"));
        let notes = unread.chain(empty).chain(warnings).collect();
        let code = if loaded.faults.is_empty() && loaded.unread.is_empty() { 0 } else { FAILED };
        Ok(Outcome { out, notes, code })
    }
}
