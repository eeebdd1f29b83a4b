//! The backend in a cluster: configuration from an API server, registrations as objects in it, sidecars of an Istio mesh.
//!
//! What is never here: authorization (the endpoint asks the core), the agents' TLS, files of manifests, what the operator renders.
//! See `docs/kubernetes.md`.

pub mod fleet;
pub mod istio;
pub mod keys;
pub mod names;
pub mod notices;
pub mod policies;
pub mod registry;
pub mod source;

use anyhow::Context;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use onboarding_endpoint::backend::{self, Registry};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Of one replica in one cluster.
#[derive(Debug, Clone)]
pub struct Options {
    /// Absent: the account of the pod that this runs in, or else the user's own kubeconfig.
    pub kubeconfig: Option<PathBuf>,
    /// Of the ControlPlane, the endpoint's Secret and istiod: `istio-system`.
    pub namespace: String,
    /// This replica's name.
    pub replica: String,
    /// How sidecars' istio-tokens are asked for.
    pub istio_tokens: istio::TokenOptions,
}

/// What the endpoint needs.
pub struct Backend {
    pub backend: backend::Backend,
    /// The tasks behind it. They end after `stop`; one that ends before has failed, and its error says why.
    pub tasks: Vec<JoinHandle<anyhow::Result<()>>>,
}

/// How long the first lists may take until the start has failed.
const LISTED_WITHIN: Duration = Duration::from_secs(60);

/// Connects to the API server, starts everything that reads and writes it, and returns once the registrations are known.
///
/// # Errors
/// There is no cluster to ask, or it doesn't answer, or may not be asked by this account.
pub async fn open(
    options: Options,
    metrics: &mut prometheus_client::registry::Registry,
    stop: CancellationToken,
) -> anyhow::Result<Backend> {
    let Options { kubeconfig, namespace, replica, istio_tokens } = options;
    let client = connect(kubeconfig).await?;
    let (source, reading) = source::start(client.clone(), source::Options::new(&namespace), metrics, stop.clone());
    let (registry, storing) = registry::start(
        client.clone(),
        registry::Options { namespace: namespace.clone() },
        source.groups(),
        backend::ConfigSource::watch(source.as_ref()),
        metrics,
        stop.clone(),
    );
    let fleet_options = fleet::Options { namespace: namespace.clone(), replica: replica.clone() };
    let (fleet, keeping) = fleet::start(client.clone(), fleet_options, metrics, stop.clone());
    let (notices, telling) = notices::start(client.clone(), source.cluster(), replica, metrics, stop.clone());
    let judging =
        policies::start(client.clone(), &source, registry.clone(), backend::Fleet::leads(fleet.as_ref()), stop.clone());
    let tokens = istio::Tokens::new(client.clone(), istio_tokens, metrics, stop);
    let known: Arc<dyn Registry> = registry.clone();
    let provisioner = istio::IstioProvisioner::new(source.inputs(), known, registry.clone(), tokens, metrics);
    registry.listed(LISTED_WITHIN).await.context("reading the registrations of the cluster")?;
    let backend = backend::Backend {
        config: source,
        registry,
        provisioner: Arc::new(provisioner),
        keys: Arc::new(keys::SecretKeyStore::new(client, &namespace)),
        fleet,
        notices,
    };
    Ok(Backend { backend, tasks: vec![reading, storing, keeping, telling, judging] })
}

async fn connect(kubeconfig: Option<PathBuf>) -> anyhow::Result<Client> {
    let mut config = match &kubeconfig {
        Some(file) => {
            let read = Kubeconfig::read_from(file).with_context(|| format!("reading {}", file.display()))?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                .await
                .with_context(|| format!("the cluster of {}", file.display()))?
        }
        None => Config::infer().await.context("no cluster is known: run in a pod, or name one with --kubeconfig")?,
    };
    // Each room retries what it asks for, within its own bounds.
    config.default_retry = false;
    Client::try_from(config).context("connecting to the API server")
}
