//! The sidecar as the agent's child: its files, its certificates by SDS, its life.
//!
//! One task owns the process and its files: `supervisor` in the standalone mesh, where this agent hands Envoy its configuration, and
//! `istio` where istiod does. [`Sidecar`] is the handle to it. Nothing here knows the plane.

mod admin;
mod bootstrap;
mod files;
mod istio;
mod istiod;
mod process;
mod sds;
mod supervisor;
#[cfg(test)]
mod tests;

pub(crate) use istio::pilot_agents_certificate;
pub use istio::{IstioWay, PilotAgent, pilot_agent_of};

use crate::boot::{self, HeldBoot};
use anyhow::Context;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use supervisor::{Command, Supervisor};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Whether the sidecar whose admin address this is answers `LIVE`; else why not.
pub async fn ready(admin: std::net::SocketAddr) -> Result<(), String> {
    admin::Admin::new(admin).ready().await
}

/// How a sidecar is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// `/usr/local/bin/envoy`.
    pub binary: PathBuf,
    /// A directory of the agent's own, for Envoy's files and the SDS socket.
    pub directory: PathBuf,
    /// `sidecar.stdout` and `sidecar.stderr` of the AgentConfiguration; `/dev/stdout` and `/dev/stderr` are the agent's own.
    pub stdout: PathBuf,
    pub stderr: PathBuf,
    /// `127.0.0.1:15000`.
    pub admin: std::net::SocketAddr,
    /// How a sidecar of an Istio mesh is run; which mesh it is the boot configuration says.
    pub istio: IstioWay,
    /// Where the certificate that istiod gave is kept; it has its private key.
    pub identity: PathBuf,
}

impl Options {
    /// All that may have been started.
    fn binaries(&self) -> impl Iterator<Item = &Path> {
        let pilot_agent = match &self.istio {
            IstioWay::Envoy => None,
            IstioWay::PilotAgent(pilot_agent) => Some(pilot_agent.binary.as_path()),
        };
        std::iter::once(self.binary.as_path()).chain(pilot_agent)
    }
}

/// What the agent learns of its sidecar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// `/ready` answers `LIVE`.
    Ready,
    NotReady {
        why: String,
    },
    Accepted {
        version: String,
    },
    /// The sidecar refused a configuration, in its own words; the last good one stays.
    Rejected {
        version: String,
        message: String,
    },
    /// One that the plane didn't give: it is istiod's.
    Certificate {
        spiffe_id: String,
        obtained_at: jiff::Timestamp,
        expires_at: jiff::Timestamp,
    },
    /// It ended by itself and is started again after `restart_in`.
    Exited {
        status: String,
        restart_in: Duration,
    },
}

/// What a certificate is made of; the key was made on this host and never leaves it.
#[derive(Clone)]
pub struct Identity {
    /// PEM, leaf first.
    pub certificate_chain: String,
    /// PEM, PKCS #8.
    pub private_key: String,
    /// PEM bundle.
    pub roots: String,
}

/// A running sidecar. Dropping it kills the child.
pub struct Sidecar {
    commands: mpsc::Sender<Command>,
    /// Cancelled when the sidecar shall leave: whatever the supervisor waits for is not worth waiting for any more.
    leaving: CancellationToken,
    kind: Kind,
    task: AbortOnDropHandle<()>,
}

enum Kind {
    Standalone(sds::Server),
    Istio,
}

impl Sidecar {
    /// Starts the SDS server, writes the bootstrap and the first configuration, starts Envoy and supervises it; or what stands for that
    /// in an Istio mesh. `identity` is of the standalone mesh only.
    ///
    /// Returns when Envoy's process is there (in an Istio mesh perhaps later: istiod is asked for its certificate first); that it is
    /// live comes as an event. Fails where a file can't be written or opened, or the binary can't be started.
    pub async fn start(
        options: Options,
        boot: &HeldBoot,
        identity: Option<Identity>,
        events: mpsc::Sender<Event>,
    ) -> anyhow::Result<Self> {
        make_private(&options.directory)?;
        let leaving = CancellationToken::new();
        let (commands, receiver) = mpsc::channel(16);
        let (kind, task) = match &boot.sidecar {
            boot::Sidecar::Standalone(_) => {
                let identity = identity.context("the plane has not signed the sidecar's certificate yet")?;
                let sds = sds::Server::start(&options.directory, bootstrap::SDS_SOCKET, identity)?;
                let supervisor =
                    Supervisor::start(options, boot.clone(), receiver, leaving.clone(), sds.refused(), events)?;
                (Kind::Standalone(sds), tokio::spawn(supervisor.run()))
            }
            boot::Sidecar::Istio(_) => {
                let supervisor = istio::Supervisor::start(options, boot, receiver, leaving.clone(), events)?;
                (Kind::Istio, tokio::spawn(supervisor.run()))
            }
        };
        Ok(Self { commands, leaving, kind, task: AbortOnDropHandle::new(task) })
    }

    /// Whether `boot` is for the mesh that this sidecar was started for; another one needs another sidecar.
    pub fn suits(&self, boot: &HeldBoot) -> bool {
        matches!(
            (&self.kind, &boot.sidecar),
            (Kind::Standalone(_), boot::Sidecar::Standalone(_)) | (Kind::Istio, boot::Sidecar::Istio(_))
        )
    }

    /// Hands over a new configuration; whether Envoy took it comes as an event. Fails where a file can't be written: then the last
    /// configuration stays.
    pub async fn apply(&self, boot: &HeldBoot) -> anyhow::Result<()> {
        let (written, answer) = oneshot::channel();
        let command = Command::Apply { boot: Box::new(boot.clone()), written };
        self.commands.send(command).await.ok().context("handing a configuration to a sidecar that has ended")?;
        answer.await.context("handing a configuration to a sidecar that ends")?
    }

    /// New certificate or roots, without a restart. In an Istio mesh they are istiod's.
    pub async fn rotate(&self, identity: Identity) {
        if let Kind::Standalone(sds) = &self.kind {
            sds.rotate(identity);
        }
    }

    /// Asks Envoy to fail its health checks and drain its listeners gracefully (`/drain_listeners?graceful`), and waits until no
    /// request is in flight or the deadline passes.
    pub async fn drain(&self, deadline: Duration) {
        self.leaving.cancel();
        let (done, answer) = oneshot::channel();
        if self.commands.send(Command::Drain { deadline, done }).await.is_ok() {
            let _ = answer.await;
        }
    }

    /// SIGTERM, then SIGKILL at the deadline; returns when it is gone.
    pub async fn stop(self, deadline: Duration) {
        self.leaving.cancel();
        let _ = self.commands.send(Command::Stop { deadline }).await;
        let _ = self.task.await;
    }
}

/// The socket in it serves a private key.
fn make_private(directory: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .and_then(|()| std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700)))
        .with_context(|| format!("making the sidecar's directory {}", directory.display()))
}
