//! `onboarding-repository`: the local repository as a program of its own, for a cluster.

mod args;

use anyhow::Context;
use args::{Args, LogFormat};
use clap::Parser;
use onboarding_repository::certificate::Mounted;
use onboarding_repository::{Limits, Metrics, Options};
use onboarding_runtime::{admin, descriptors, logs, readiness::Readiness, shutdown};
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::time::Duration;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    logs::init(
        if matches!(args.log_format, LogFormat::Json) { logs::Format::Json } else { logs::Format::Text },
        "info",
    );
    tracing::info!(version = env!("CARGO_PKG_VERSION"), configuration = ?args, "starting");
    let stop = shutdown::on_signal().context("listening for signals")?;
    if let Err(error) = descriptors::raise_limit() {
        tracing::warn!(%error, "the limit of open files can't be raised");
    }
    let (mut registry, readiness) = (Registry::default(), Readiness::default());
    let metrics = Metrics::register(&mut registry);
    let limits = Limits { drain: Duration::from_secs(30), ..Limits::default() };
    let options = Options { packages: args.packages, listen: args.listen, limits };
    let mounted = Arc::new(Mounted::new(args.certificate_directory));
    let running =
        onboarding_repository::start(options, mounted.clone(), metrics, readiness.clone(), stop.clone()).await?;
    let (address, admin) = admin::serve(args.admin_listen, Arc::new(registry), readiness, stop.clone())
        .await
        .with_context(|| format!("opening the admin address {}", args.admin_listen))?;
    tracing::info!(%address, "metrics and readiness are served");
    let (ended, ()) = tokio::join!(running.wait(), mounted.follow(&stop));
    ended?;
    admin.await.context("the admin server failed")?.context("the admin server failed")
}
