//! The local repository: DEB and RPM packages over HTTPS, with the endpoint's certificate.
//!
//! Nothing of it needs a workload, a policy or a registration, and nothing can be changed through it: it reads one directory.
//! Never in here: Kubernetes, authentication (packages are no secret; their checksums and TLS say whose they are).

mod answer;
pub mod catalog;
pub mod certificate;
mod metrics;
mod pages;
mod script;
mod server;
mod service;
pub mod uri;

pub use metrics::Metrics;
pub use server::Limits;

use anyhow::Context;
use catalog::Catalog;
use onboarding_endpoint::backend::ConfigSource;
use onboarding_endpoint::certificate::{Certificates, acceptor};
use onboarding_runtime::backoff::Backoff;
use onboarding_runtime::listen::listen as bind;
use onboarding_runtime::readiness::Readiness;
use onboarding_runtime::shutdown::Drain;
use server::Server;
use service::Service;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// How one repository runs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Laid out as the URIs are: `deb/amd64/onboarding-agent.deb`.
    pub packages: PathBuf,
    /// Port 0: any.
    pub listen: SocketAddr,
    pub limits: Limits,
}

/// How often the directory is looked at, so that the checksum of a new package is there before somebody asks.
const LOOK_EVERY: Duration = Duration::from_secs(5);
const DIRECTORY: &str = "packages";
const LISTENER: &str = "repository";

/// A repository that serves.
pub struct Running {
    pub address: SocketAddr,
    tasks: JoinSet<()>,
    drain: Drain,
    longest_drain: Duration,
    stop: CancellationToken,
}

impl Running {
    /// Until the stop that was given to [`start`], and then until downloads have ended.
    ///
    /// # Errors
    /// A part ended by itself.
    pub async fn wait(mut self) -> anyhow::Result<()> {
        let ended = self.tasks.join_next().await;
        let asked = self.stop.is_cancelled();
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        if !self.drain.wait(self.longest_drain).await {
            tracing::warn!("some downloads did not end in time");
        }
        match ended {
            Some(Err(error)) => Err(error).context("a part of the repository failed"),
            _ if !asked => anyhow::bail!("a part of the repository ended by itself"),
            _ => Ok(()),
        }
    }
}

/// Starts to serve; the answer has the bound address. A directory that isn't there yet is waited for, and makes it not ready.
///
/// # Errors
/// The address can't be opened.
pub async fn start(
    options: Options,
    config: Arc<dyn ConfigSource>,
    metrics: Metrics,
    readiness: Readiness,
    stop: CancellationToken,
) -> anyhow::Result<Running> {
    let Options { packages, listen, limits } = options;
    let certificates = Arc::new(Certificates::new(metrics.certificate_expiry.clone()));
    let first = config.watch().borrow().clone();
    certificates.take(&first, &readiness);
    let tls = acceptor(certificates.clone(), &["h2", "http/1.1"])?;
    let tcp = bind(listen).with_context(|| format!("listening on {listen}"))?;
    let address = tcp.local_addr().context("the listener's address")?;
    let catalog = Arc::new(Catalog::new(packages.clone()));
    let drain = Drain::default();
    let longest_drain = limits.drain;
    let mut tasks = JoinSet::new();
    tasks.spawn({
        let (readiness, stop) = (readiness.clone(), stop.clone());
        async move { certificates.follow(config.as_ref(), &readiness, &stop).await }
    });
    tasks.spawn(keep_looking(catalog.clone(), packages, metrics.clone(), readiness, stop.clone()));
    let server = Server { tls, service: Service { catalog, metrics }, limits, drain: drain.clone() };
    tasks.spawn(server.run(tcp, stop.clone()));
    tracing::info!(%address, "the repository listens");
    Ok(Running { address, tasks, drain, longest_drain, stop })
}

/// Serves for as long as the ControlPlane has `localRepository`, until `stop`. Where the address can't be opened,
/// agents go on joining: the readiness says what is wrong, and it is tried again.
pub async fn serve_while_enabled(
    options: Options,
    config: Arc<dyn ConfigSource>,
    metrics: Metrics,
    readiness: Readiness,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut snapshots = config.watch();
    let enabled = |snapshot: &Arc<onboarding_endpoint::backend::Snapshot>| {
        snapshot.plane.as_ref().is_some_and(|plane| plane.local_repository)
    };
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            changed = snapshots.wait_for(enabled) => if changed.is_err() { return Ok(()) },
        }
        let this = stop.child_token();
        let started = start(options.clone(), config.clone(), metrics.clone(), readiness.clone(), this.clone()).await;
        let disabled = async { drop(snapshots.wait_for(|snapshot| !enabled(snapshot)).await) };
        match started {
            Ok(running) => {
                readiness.ready(LISTENER);
                backoff.reset();
                let ended = running.wait();
                tokio::pin!(ended);
                let until_disabled = tokio::select! {
                    ended = &mut ended => Some(ended),
                    () = disabled => None,
                };
                match until_disabled {
                    Some(ended) => ended?,
                    None => {
                        this.cancel();
                        ended.await?;
                        tracing::info!("the repository ended with localRepository");
                    }
                }
            }
            Err(error) => {
                let fault = format!("{error:#}; --repository-listen says where the repository listens");
                tracing::error!(fault, "the repository can't be served");
                readiness.missing(LISTENER, fault);
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = tokio::time::sleep(backoff.next_delay()) => {}
                    () = disabled => {}
                }
            }
        }
        // Of what doesn't run nothing is missing.
        if !enabled(&config.watch().borrow()) {
            readiness.ready(LISTENER);
        }
        readiness.ready(DIRECTORY);
    }
}

/// Computes checksums ahead, and says what is missing or can't be served, each once.
async fn keep_looking(
    catalog: Arc<Catalog>,
    directory: PathBuf,
    metrics: Metrics,
    readiness: Readiness,
    stop: CancellationToken,
) {
    let mut said = BTreeSet::new();
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = looks.tick() => {}
        }
        let inventory = tokio::select! {
            () = stop.cancelled() => return,
            inventory = catalog.inventory() => inventory,
        };
        let mut faults = BTreeSet::new();
        match inventory {
            Ok(inventory) => {
                readiness.ready(DIRECTORY);
                metrics.packages.set(i64::try_from(inventory.whole.len()).unwrap_or(i64::MAX));
                metrics.faults.set(i64::try_from(inventory.faulty.len()).unwrap_or(i64::MAX));
                for (package, version) in &inventory.whole {
                    let found = (package.to_string(), version.digest.clone());
                    if !said.contains(&found) {
                        tracing::info!(package = found.0, sha256 = found.1, "a package can be downloaded");
                    }
                    faults.insert(found);
                }
                for (package, fault) in &inventory.faulty {
                    let found = (package.to_string(), fault.to_string());
                    if !said.contains(&found) {
                        tracing::warn!(package = found.0, fault = found.1, "a package can't be served");
                    }
                    faults.insert(found);
                }
            }
            Err(error) => {
                metrics.packages.set(0);
                let fault = format!(
                    "the directory {} can't be read: {error}; make it, and put packages there as deb/amd64/onboarding-agent.deb",
                    directory.display()
                );
                let found = (String::new(), fault);
                if !said.contains(&found) {
                    tracing::error!(fault = found.1, "there are no packages");
                }
                readiness.missing(DIRECTORY, found.1.clone());
                faults.insert(found);
            }
        }
        said = faults;
    }
}
