//! The backend of a cluster: one replica of many.

use crate::args::Kubernetes;
use crate::serve::{self, Opened};
use onboarding_kubernetes::istio::TokenOptions;

/// Until SIGTERM or SIGINT.
pub fn run(args: Kubernetes) -> anyhow::Result<()> {
    let Kubernetes { kubeconfig, namespace, replica, istio_token_renewal, serving } = args;
    serve::run(&serving, async |metrics, stop| {
        tracing::info!(namespace, replica, "a replica in a cluster");
        let istio_tokens = TokenOptions { renew_after: istio_token_renewal, ..TokenOptions::default() };
        let options = onboarding_kubernetes::Options { kubeconfig, namespace, replica: replica.clone(), istio_tokens };
        let onboarding_kubernetes::Backend { backend, tasks } =
            onboarding_kubernetes::open(options, metrics, stop.clone()).await?;
        Ok(Opened { backend, tasks, replica, admin_socket: None, audit_log: "-".into(), repository: None })
    })
}
