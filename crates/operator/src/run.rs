//! The operator as a process: watches that wake it, passes, and how it ends.

use crate::reconcile::{Done, Options, Reconciler};
use crate::watch;
use anyhow::Context;
use kube::Client;
use onboarding_runtime::backoff::Backoff;
use onboarding_runtime::readiness::Readiness;
use onboarding_runtime::{admin, shutdown};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Changes come in bursts.
const QUIET: Duration = Duration::from_millis(300);
/// A certificate expires without a change of anything.
const AT_LEAST_EVERY: Duration = Duration::from_secs(120);
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LONGEST_RETRY: Duration = Duration::from_secs(30);
const API_SERVER: &str = "apiServer";

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// There is no cluster to talk to, an address can't be listened on, or a part failed.
pub async fn run(options: Options, admin_listen: SocketAddr) -> anyhow::Result<()> {
    tracing::info!(version = env!("CARGO_PKG_VERSION"), configuration = ?options, "starting");
    let stop = shutdown::on_signal().context("listening for signals")?;
    let client =
        Client::try_default().await.context("reading how the API server is reached (in a pod, or by KUBECONFIG)")?;
    let readiness = Readiness::default();
    readiness.missing(API_SERVER, "the cluster hasn't been read yet");
    let mut registry = Registry::default();
    let metrics = Metrics::register(registry.sub_registry_with_prefix("onboarding_operator"));
    let (address, admin) = admin::serve(admin_listen, Arc::new(registry), readiness.clone(), stop.clone())
        .await
        .with_context(|| format!("opening the admin address {admin_listen}"))?;
    tracing::info!(%address, "metrics and readiness are served");

    let wake = Arc::new(Notify::new());
    let mut watches = watch::start(&client, &options.namespace, &wake);
    tokio::select! {
        () = passes(Reconciler::new(client, options), &wake, &readiness, &metrics, &stop) => {}
        Some(ended) = watches.join_next() => {
            ended.context("a watch on the cluster failed")?;
            anyhow::bail!("a watch on the cluster ended");
        }
    }
    admin.await.context("the admin server failed")?.context("the admin server failed")
}

async fn passes(
    mut reconciler: Reconciler,
    wake: &Notify,
    readiness: &Readiness,
    metrics: &Metrics,
    stop: &CancellationToken,
) {
    let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
    loop {
        let again = match reconciler.pass().await {
            Ok(Done { applied, removed, incomplete }) => {
                readiness.ready(API_SERVER);
                metrics.writes.inc_by((applied + removed) as u64);
                metrics.count(if incomplete { "incomplete" } else { "done" });
                if incomplete {
                    backoff.next_delay()
                } else {
                    backoff.reset();
                    AT_LEAST_EVERY
                }
            }
            Err(problem) => {
                metrics.count("failed");
                tracing::warn!(
                    problem,
                    "the cluster can't be brought to what the ControlPlane asks for; it is tried again"
                );
                readiness.missing(API_SERVER, problem);
                backoff.next_delay()
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = wake.notified() => {}
            () = tokio::time::sleep(again) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(QUIET) => {}
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

struct Metrics {
    passes: Family<Outcome, Counter>,
    writes: Counter,
}

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        let metrics = Self { passes: Family::default(), writes: Counter::default() };
        registry.register(
            "passes",
            "Looks at the cluster: done, incomplete (an object couldn't be written), failed (it can't be read)",
            metrics.passes.clone(),
        );
        registry.register("writes", "Objects that were applied or removed", metrics.writes.clone());
        metrics
    }

    fn count(&self, outcome: &'static str) {
        self.passes.get_or_create(&Outcome { outcome }).inc();
    }
}
