//! The standalone backend: a directory of manifests and a data directory.

use crate::args::Standalone;
use crate::serve::{self, Opened};
use onboarding_endpoint::backend::{Alone, Backend, LogOnly};
use std::sync::Arc;

/// The only one on its data directory: what is on record as connected to it is so by an earlier run, whatever the host was called then.
const REPLICA: &str = "onboarding-plane";

/// Until SIGTERM or SIGINT.
pub fn run(args: Standalone) -> anyhow::Result<()> {
    let Standalone { manifests, data_dir, serving, trust_domain, certificate_life, packages, repository_listen } = args;
    let packages = packages.unwrap_or_else(|| data_dir.join("packages"));
    serve::run(&serving, async |metrics, stop| {
        tracing::info!(
            manifests = %manifests.display(),
            data_dir = %data_dir.display(),
            trust_domain,
            ?certificate_life,
            packages = %packages.display(),
            %repository_listen,
            "a plane of its own"
        );
        let admin_socket = Some(data_dir.join("admin.sock"));
        let audit_log = data_dir.join("audit.jsonl");
        let limits = onboarding_repository::Limits::default();
        let repository = onboarding_repository::Options { packages, listen: repository_listen, limits };
        let options = onboarding_standalone::Options { manifests, data_dir, trust_domain, certificate_life };
        let onboarding_standalone::Backend { config, registry, provisioner, keys, tasks } =
            onboarding_standalone::open(options, metrics, stop)?;
        let backend = Backend {
            config,
            registry,
            provisioner,
            keys,
            fleet: Arc::new(Alone { replica: REPLICA.to_owned() }),
            notices: Arc::new(LogOnly),
        };
        let tasks = tasks.into_iter().map(|task| tokio::spawn(async { Ok(task.await?) })).collect();
        Ok(Opened {
            backend,
            tasks,
            replica: REPLICA.to_owned(),
            admin_socket,
            audit_log,
            repository: Some(repository),
        })
    })
}
