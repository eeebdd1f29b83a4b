//! The backend of a cluster: one replica of many.

use crate::args::Kubernetes;
use crate::serve::{self, Opened};

/// Until SIGTERM or SIGINT.
pub fn run(args: Kubernetes) -> anyhow::Result<()> {
    let Kubernetes { kubeconfig, namespace, replica, serving } = args;
    serve::run(&serving, async |metrics, stop| {
        tracing::info!(namespace, replica, "a replica in a cluster");
        let options = onboarding_kubernetes::Options { kubeconfig, namespace, replica: replica.clone() };
        let onboarding_kubernetes::Backend { backend, tasks } =
            onboarding_kubernetes::open(options, metrics, stop.clone()).await?;
        Ok(Opened { backend, tasks, replica, admin_socket: None, audit_log: "-".into(), repository: None })
    })
}
