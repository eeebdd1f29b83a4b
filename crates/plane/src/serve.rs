//! An endpoint on a backend, with its metrics and readiness, until it is told to stop.

use crate::args::{LogFormat, Serving};
use anyhow::Context;
use onboarding_attest::Attestors;
use onboarding_endpoint::audit::Audit;
use onboarding_endpoint::backend::Backend;
use onboarding_endpoint::limits::Limits;
use onboarding_runtime::{admin, descriptors, logs, readiness::Readiness, shutdown};
use prometheus_client::registry::Registry;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Open files that aren't agents' connections.
const OTHER_FILES: u64 = 128;

/// A backend that runs, and what of the endpoint's options follows from it.
pub struct Opened {
    pub backend: Backend,
    /// The tasks behind it; they end after the stop, and one that ends before has failed.
    pub tasks: Vec<JoinHandle<anyhow::Result<()>>>,
    pub replica: String,
    /// Where `onboardctl` asks.
    pub admin_socket: Option<PathBuf>,
    /// Where decisions are written if nothing else is said.
    pub audit_log: PathBuf,
    /// Packages that are served here while the ControlPlane says so; absent: another program does that.
    pub repository: Option<onboarding_repository::Options>,
}

/// Runs until SIGTERM or SIGINT. `open`: the backend.
pub fn run(
    serving: &Serving,
    open: impl AsyncFnOnce(&mut Registry, CancellationToken) -> anyhow::Result<Opened>,
) -> anyhow::Result<()> {
    let format = match serving.log_format {
        LogFormat::Text => logs::Format::Text,
        LogFormat::Json => logs::Format::Json,
    };
    logs::init(format, "info");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(serve(serving, open))
}

async fn serve(
    serving: &Serving,
    open: impl AsyncFnOnce(&mut Registry, CancellationToken) -> anyhow::Result<Opened>,
) -> anyhow::Result<()> {
    tracing::info!(version = env!("CARGO_PKG_VERSION"), configuration = ?serving, "starting");
    let stop = shutdown::on_signal().context("listening for signals")?;
    let attestors = Arc::new(Attestors::new(attestor_options(serving)?)?);
    let readiness = Readiness::default();
    let mut metrics = Registry::default();
    let Opened { backend, mut tasks, replica, admin_socket, audit_log, repository } =
        open(&mut metrics, stop.clone()).await?;
    let config = backend.config.clone();
    let options = onboarding_endpoint::Options {
        listen: serving.listen,
        admin_socket,
        replica,
        grace: serving.grace_period,
        limits: limits(serving),
        audit: audit(serving.audit_log.as_deref().unwrap_or(&audit_log))?,
    };
    let endpoint =
        onboarding_endpoint::start(options, backend, attestors, &mut metrics, readiness.clone(), stop.clone()).await?;
    tasks.extend(repository.map(|options| {
        let metrics = onboarding_repository::Metrics::register(&mut metrics);
        // Of its own: agents join whether packages can be had or not.
        let (readiness, stop) = (Readiness::default(), stop.clone());
        tokio::spawn(async move {
            let ended =
                onboarding_repository::serve_while_enabled(options, config, metrics, readiness, stop.clone()).await;
            stop.cancel();
            ended
        })
    }));
    let (address, admin) = admin::serve(serving.admin_listen, Arc::new(metrics), readiness, stop.clone())
        .await
        .with_context(|| format!("opening the admin address {}", serving.admin_listen))?;
    tracing::info!(%address, "metrics and readiness are served");

    endpoint.wait().await?;
    for task in tasks {
        task.await.context("a part of the backend failed")?.context("a part of the backend failed")?;
    }
    admin.await.context("the admin server failed")?.context("the admin server failed")
}

fn attestor_options(args: &Serving) -> anyhow::Result<onboarding_attest::Options> {
    let read = |file: &Option<PathBuf>| {
        file.as_ref()
            .map(|file| std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display())))
            .transpose()
    };
    if let Some(endpoint) = &args.aws_sts_endpoint {
        tracing::warn!(%endpoint, "STS is not asked at AWS: whoever answers there decides who has which role");
    }
    if let Some(file) = &args.aws_extra_certificates {
        tracing::warn!(file = %file.display(), "identity documents that AWS did not sign are accepted: whoever has those keys is any instance");
    }
    if let Some(file) = &args.jwks_extra_roots {
        tracing::warn!(file = %file.display(), "issuers' servers may have certificates of further CAs");
    }
    Ok(onboarding_attest::Options {
        extra_aws_certificates: read(&args.aws_extra_certificates)?,
        sts_endpoint: args.aws_sts_endpoint.clone(),
        extra_roots_pem: read(&args.jwks_extra_roots)?,
    })
}

/// Appended to, and readable by the plane's user alone: it names every host.
fn audit(file: &Path) -> anyhow::Result<Audit> {
    let sink: Box<dyn Write + Send> = if file == Path::new("-") {
        Box::new(std::io::stdout())
    } else {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(file)
            .with_context(|| format!("opening the audit log {}", file.display()))?;
        Box::new(file)
    };
    Audit::new(sink).context("starting the audit log")
}

/// As many connections as the process may have files.
fn limits(args: &Serving) -> Limits {
    let mut limits = Limits {
        connections_per_address: args.connections_per_address,
        authorization_burst: args.authorization_burst.unwrap_or(Limits::burst(args.authorizations_per_second)),
        authorizations_per_second: args.authorizations_per_second,
        ..Limits::default()
    };
    match descriptors::raise_limit() {
        Ok(files) => {
            let most = usize::try_from(files.saturating_sub(OTHER_FILES)).unwrap_or(usize::MAX);
            limits.connections = limits.connections.min(most.max(1));
        }
        Err(error) => tracing::warn!(%error, "the limit of open files can't be raised"),
    }
    tracing::info!(connections = limits.connections, "agents that can be connected at a time");
    limits
}
