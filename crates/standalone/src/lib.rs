//! The backend of one machine: a directory of manifests, an SQLite file of registrations, the mesh's certificate authority,
//! and Envoy's configuration.
//!
//! What is never here: authorization (the endpoint asks the core), the agents' TLS, Kubernetes. See `docs/standalone-mesh.md`.

pub mod ca;
pub mod data_dir;
pub mod directory;
pub mod envoy;
pub mod keys;
pub mod mesh;
pub mod provisioner;
pub mod sqlite;
pub mod world;

use anyhow::Context;
use ca::MeshCa;
use data_dir::DataDir;
use directory::{ManifestDirectory, OtherFaults};
use jiff::Timestamp;
use keys::FileKeyStore;
use onboarding_endpoint::backend::{ConfigSource, KeyStore, Provisioner, Registry};
use provisioner::MeshProvisioner;
use sqlite::SqliteRegistry;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Of one plane on one machine.
#[derive(Debug, Clone)]
pub struct Options {
    /// A directory of `*.yaml`, `*.yml` and `*.json`, read again when anything in it changes.
    pub manifests: PathBuf,
    /// Made (0700) where it is missing; one plane at a time uses it.
    pub data_dir: PathBuf,
    /// `spiffe://<trust domain>/...`; fixed once the data directory is made.
    pub trust_domain: String,
    /// How long a certificate of the mesh lasts.
    pub certificate_life: Duration,
}

impl Options {
    pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
    pub const DEFAULT_CERTIFICATE_LIFE: Duration = Duration::from_secs(24 * 3600);
}

/// What the endpoint needs.
pub struct Backend {
    pub config: Arc<dyn ConfigSource>,
    pub registry: Arc<dyn Registry>,
    pub provisioner: Arc<dyn Provisioner>,
    pub keys: Arc<dyn KeyStore>,
    /// The tasks behind them. They end after `stop`; one that ends before has failed, and said why in the log.
    pub tasks: Vec<JoinHandle<()>>,
}

/// Opens the data directory, reads the manifests, and follows both until `stop`. Must be called within a tokio runtime.
///
/// # Errors
/// Only the data directory's: in use by another plane, damaged, not writable. What is wrong with the manifests is in
/// `Snapshot.faults`, and can be put right while the plane runs.
pub fn open(
    options: Options,
    metrics: &mut prometheus_client::registry::Registry,
    stop: CancellationToken,
) -> anyhow::Result<Backend> {
    let data = Arc::new(DataDir::open(&options.data_dir)?);
    let uid = plane_uid(&data)?;
    let ca = MeshCa::open(&data, &options.trust_domain, options.certificate_life, Timestamp::now())?;
    let ca = Arc::new(ca);
    let registry = SqliteRegistry::open(data.clone(), metrics)?;
    let mesh_faults = watch::Sender::new(Vec::new());
    let root = ca.clone();
    let others = OtherFaults {
        own: Box::new(move || root.fault(Timestamp::now()).into_iter().collect()),
        mesh: mesh_faults.subscribe(),
    };
    let (directory, following) = ManifestDirectory::start(&options.manifests, uid, others, metrics, stop.clone());
    let (provisioner, provisioning) =
        MeshProvisioner::start(ca, registry.clone(), directory.mesh(), mesh_faults, metrics, stop);
    Ok(Backend {
        config: directory,
        registry: Arc::new(registry),
        provisioner,
        keys: Arc::new(FileKeyStore::new(data)),
        tasks: vec![following, provisioning],
    })
}

/// The plane's UID where the ControlPlane names none: made once.
fn plane_uid(data: &DataDir) -> anyhow::Result<String> {
    let file = || data.file("uid").display().to_string();
    if let Some(bytes) = data.read("uid").with_context(|| format!("reading {}", file()))? {
        let text = String::from_utf8(bytes).unwrap_or_default();
        let uid = uuid::Uuid::parse_str(text.trim()).with_context(|| {
            format!("{} isn't a UUID; put back what it was, or move it away: then every agent's credentials need the new one", file())
        })?;
        return Ok(uid.to_string());
    }
    let uid = uuid::Uuid::new_v4().to_string();
    data.replace("uid", format!("{uid}\n").as_bytes()).with_context(|| format!("writing {}", file()))?;
    Ok(uid)
}
