//! The Workload Onboarding Endpoint: connections, limits, authorization, sessions, tokens, audit.
//!
//! What it needs of the world are the traits of [`backend`]; Kubernetes, Istio, SQLite and manifests' files never come in here.

pub mod accept;
mod admin;
pub mod audit;
mod authority;
mod authorization;
pub mod backend;
pub mod certificate;
mod connection;
mod delivery;
mod lease;
mod lifecycle;
pub mod limits;
mod listener;
mod metrics;
mod refusal;
mod registration;
mod session;
mod token;

use anyhow::Context;
use audit::Audit;
use authority::{Authority, Calls};
use backend::{Backend, Snapshot};
use certificate::Certificates;
use delivery::Room;
use jiff::Timestamp;
use lease::Lease;
use lifecycle::Lifecycle;
use limits::{Limits, Rates};
use listener::Listener;
use metrics::Metrics;
use onboarding_attest::Attestors;
use onboarding_runtime::listen::listen as bind;
use onboarding_runtime::readiness::Readiness;
use onboarding_runtime::shutdown::Drain;
use onboarding_wire::onboarding as pb;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

/// How one replica runs.
pub struct Options {
    /// Port 0: any.
    pub listen: SocketAddr,
    /// Where the admin socket is made; absent: none.
    pub admin_socket: Option<PathBuf>,
    /// This replica's name: `status.activeAgentConnection.connectedTo`.
    pub replica: String,
    /// How long an entry outlives its agent's connection.
    pub grace: Duration,
    pub limits: Limits,
    pub audit: Audit,
}

/// How long a stopping endpoint waits for its connections to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// An endpoint that serves.
pub struct Running {
    pub address: SocketAddr,
    tasks: JoinSet<()>,
    drain: Drain,
    stop: CancellationToken,
}

impl Running {
    /// Until the stop that was given to [`start`], and then until the connections have ended. A part that ends before
    /// has failed: it ends the rest.
    pub async fn wait(mut self) -> anyhow::Result<()> {
        let ended = self.tasks.join_next().await;
        let asked = self.stop.is_cancelled();
        self.stop.cancel();
        if !self.drain.wait(DRAIN_DEADLINE).await {
            tracing::warn!("some connections did not end in time");
        }
        // Each part clears away what it made (the admin socket), if it is given the time.
        let parts = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(DRAIN_DEADLINE, parts).await;
        match ended {
            Some(Err(error)) => Err(error).context("a part of the endpoint failed"),
            _ if !asked => anyhow::bail!("a part of the endpoint ended by itself"),
            _ => Ok(()),
        }
    }
}

/// Starts to serve; the answer has the bound address.
///
/// # Errors
/// The address or the socket can't be opened, or the keys of tokens can't be loaded or made.
pub async fn start(
    options: Options,
    backend: Backend,
    attestors: Arc<Attestors>,
    registry: &mut prometheus_client::registry::Registry,
    readiness: Readiness,
    stop: CancellationToken,
) -> anyhow::Result<Running> {
    let Options { listen, admin_socket, replica, grace, limits, audit } = options;
    let metrics = Metrics::register(registry);
    let tokens = token::Tokens::open(backend.keys.clone(), Timestamp::now()).await.context("opening the token keys")?;
    let audit = Arc::new(audit);
    let lifecycle = Lifecycle::new(backend.registry.clone(), grace, audit.clone(), metrics.clone(), readiness.clone());
    Lease { lifecycle: &lifecycle, metrics: &metrics, replica: &replica, fleet: backend.fleet.as_ref() }
        .disconnect_all()
        .await
        .context("reading the registry")?;

    let certificates = Arc::new(Certificates::new(metrics.certificate_expiry.clone()));
    certificates.take(&backend.config.watch().borrow().clone(), &readiness);
    let tls = certificate::acceptor(certificates.clone(), &["h2"])?;
    let tcp = bind(listen).with_context(|| format!("listening on {listen}"))?;
    let address = tcp.local_addr().context("the listener's address")?;

    let config = backend.config.clone();
    let authority = Arc::new(Authority {
        backend,
        attestors,
        tokens,
        lifecycle,
        audit,
        metrics,
        rates: Rates::new(&limits),
        authorizations: Semaphore::new(limits.authorizations),
        authorizations_per_connection: limits.authorizations_per_connection,
        room: Room::new(limits.configurations),
        replica,
        readiness: readiness.clone(),
        stop: stop.clone(),
    });
    let drain = Drain::default();
    let mut tasks = JoinSet::new();
    if let Some(path) = admin_socket {
        let admin = admin::serve(path, authority.clone(), certificates.clone(), stop.clone())?;
        tasks.spawn(async move {
            let _ = admin.await;
        });
    }
    tasks.spawn({
        let (config, readiness, stop) = (config.clone(), readiness.clone(), stop.clone());
        async move { certificates.follow(config.as_ref(), &readiness, &stop).await }
    });
    let mut snapshots = config.watch();
    look_for_control_plane(&snapshots.borrow_and_update(), &readiness);
    tasks.spawn(follow_control_plane(snapshots, readiness.clone(), stop.clone()));
    tasks.spawn({
        let (authority, stop) = (authority.clone(), stop.clone());
        async move {
            let lease = Lease {
                lifecycle: &authority.lifecycle,
                metrics: &authority.metrics,
                replica: &authority.replica,
                fleet: authority.backend.fleet.as_ref(),
            };
            lease.run(&authority.backend, &stop).await;
        }
    });
    tasks.spawn({
        let (authority, stop) = (authority.clone(), stop.clone());
        async move { authority.tokens.keep_rotating(&readiness, &stop).await }
    });
    tasks.spawn(forget_idle_peers(authority.clone(), stop.clone()));
    let routes = routes(&authority, limits.message_size);
    let listener = Listener { tls, routes, authority, limits, drain: drain.clone() };
    tasks.spawn(listener.run(tcp, stop.clone()));
    tracing::info!(%address, "the endpoint listens");
    Ok(Running { address, tasks, drain, stop })
}

fn routes(authority: &Arc<Authority>, message_size: usize) -> Routes {
    use pb::discovery_service_server::DiscoveryServiceServer;
    use pb::onboarding_authorization_service_server::OnboardingAuthorizationServiceServer;
    use pb::session_service_server::SessionServiceServer;
    use pb::workload_registration_service_server::WorkloadRegistrationServiceServer;
    let calls = Calls(authority.clone());
    Routes::new(DiscoveryServiceServer::new(calls.clone()).max_decoding_message_size(message_size))
        .add_service(OnboardingAuthorizationServiceServer::new(calls.clone()).max_decoding_message_size(message_size))
        .add_service(WorkloadRegistrationServiceServer::new(calls.clone()).max_decoding_message_size(message_size))
        .add_service(SessionServiceServer::new(calls).max_decoding_message_size(message_size))
        .prepare()
}

async fn forget_idle_peers(authority: Arc<Authority>, stop: CancellationToken) {
    let mut minutes = tokio::time::interval(Duration::from_secs(60));
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = minutes.tick() => authority.rates.forget_idle(),
        }
    }
}

/// Keeps the readiness in step with the ControlPlane.
async fn follow_control_plane(
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    readiness: Readiness,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = snapshots.changed() => if changed.is_err() { return },
        }
        look_for_control_plane(&snapshots.borrow_and_update(), &readiness);
    }
}

fn look_for_control_plane(snapshot: &Snapshot, readiness: &Readiness) {
    const CONTROL_PLANE: &str = "controlPlane";
    if snapshot.plane.is_some() {
        readiness.ready(CONTROL_PLANE);
    } else {
        readiness.missing(CONTROL_PLANE, "there is no valid ControlPlane with spec.meshExpansion.onboarding");
    }
}
