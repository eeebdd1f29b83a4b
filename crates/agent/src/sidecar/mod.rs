//! The sidecar as the agent's child: its files, its certificates by SDS, its life.

use crate::boot::HeldBoot;
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;

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
pub struct Sidecar {}

impl Sidecar {
    /// Starts the SDS server, writes the bootstrap and the first configuration, starts Envoy and supervises it.
    pub async fn start(
        options: Options,
        boot: &HeldBoot,
        identity: Identity,
        events: mpsc::Sender<Event>,
    ) -> anyhow::Result<Self> {
        let _ = (options, boot, identity, events);
        unimplemented!()
    }

    /// Hands over a new configuration; whether Envoy took it comes as an event.
    pub async fn apply(&self, boot: &HeldBoot) -> anyhow::Result<()> {
        let _ = boot;
        unimplemented!()
    }

    /// New certificate or roots, without a restart.
    pub async fn rotate(&self, identity: Identity) {
        let _ = identity;
        unimplemented!()
    }

    /// Asks Envoy to fail its health checks and drain its listeners gracefully (`/drain_listeners?graceful`), and waits until no
    /// request is in flight or the deadline passes.
    pub async fn drain(&self, deadline: Duration) {
        let _ = deadline;
        unimplemented!()
    }

    /// SIGTERM, then SIGKILL at the deadline; returns when it is gone.
    pub async fn stop(self, deadline: Duration) {
        let _ = deadline;
        unimplemented!()
    }
}
