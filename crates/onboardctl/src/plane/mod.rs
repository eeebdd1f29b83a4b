//! Where the plane is: the admin socket of a standalone one, or a cluster, asked with the user's own rights.

pub mod cluster;
pub mod objects;
pub mod socket;

use anyhow::bail;
use cluster::Cluster;
use socket::Socket;
use std::path::PathBuf;

/// Which plane the command line names.
#[derive(Debug, clap::Args)]
pub struct Access {
    #[command(flatten)]
    socket: Socket,
    /// Ask the cluster of this kubeconfig [default: $KUBECONFIG, ~/.kube/config, the pod's own account]
    #[arg(long, global = true, value_name = "FILE", help_heading = "In a cluster")]
    kubeconfig: Option<PathBuf>,
    /// Ask the cluster of this context of the kubeconfig
    #[arg(long, global = true, value_name = "NAME", help_heading = "In a cluster")]
    context: Option<String>,
    /// As a plugin of kubectl.
    #[arg(skip)]
    pub always_cluster: bool,
}

pub enum Plane {
    Socket(Socket),
    Cluster(Box<Cluster>),
}

impl Access {
    /// Flags, then the environment; then the default socket where there is one, else the cluster of the user's kubeconfig.
    pub fn plane(&self) -> anyhow::Result<Plane> {
        if self.names_a_cluster() {
            return Ok(Plane::Cluster(Box::new(self.cluster()?)));
        }
        if self.socket.is_named() || self.socket.is_there() {
            return Ok(Plane::Socket(self.socket.clone()));
        }
        if !cluster::may_be_configured() {
            bail!(
                "there is no plane to ask: no admin socket of a standalone one at {} (name it with --socket, or its data directory with --data-dir), and no kubeconfig of a cluster in $KUBECONFIG or ~/.kube/config (name one with --kubeconfig)",
                self.socket.path().display()
            );
        }
        Ok(Plane::Cluster(Box::new(self.cluster()?)))
    }

    /// For what only a cluster can be asked.
    pub fn cluster(&self) -> anyhow::Result<Cluster> {
        if self.socket.is_given() {
            bail!(
                "--socket and --data-dir are of a standalone plane, and this asks a cluster; leave one of the two out"
            );
        }
        Cluster::connect(self.kubeconfig.as_deref(), self.context.as_deref())
    }

    /// Whether what is there is meant (`--cluster`), or what these paths hold. A plugin of kubectl needs no flag for it.
    pub fn is_of_cluster(&self, flag: bool, paths: &[PathBuf]) -> anyhow::Result<bool> {
        match (flag || self.always_cluster, paths) {
            (false, []) => bail!(
                "name files or directories of manifests, - for standard input, or --cluster for what is in the cluster"
            ),
            (is_cluster, paths) => Ok(is_cluster && paths.is_empty()),
        }
    }

    /// Only a cluster can be meant.
    pub fn names_a_cluster(&self) -> bool {
        self.always_cluster || self.kubeconfig.is_some() || self.context.is_some()
    }
}
