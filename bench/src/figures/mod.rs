//! One file a figure, or a few that are measured together. Each is `async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>>`.
//!
//! A new one: its file, its variant in [`Name`], its arm in [`Name::run`].

pub mod agent;
pub mod decision;
pub mod join;
pub mod memory;
pub mod mesh;
pub mod repository;
pub mod restart;

use crate::table::Figure;
use std::path::PathBuf;
use std::time::Instant;

/// How everything is measured in this run.
#[derive(Debug, Clone)]
pub struct Bench {
    /// Small counts: whether it works, rather than how well.
    pub quick: bool,
    /// The plane on the first core, the load on the others; this process was put there before its threads were made.
    pub one_core: bool,
    /// How often each measurement is made.
    pub repeat: usize,
    /// Binaries of this workspace, built in release: `onboarding-plane`, `onboarding-agent`, ...
    pub binaries: PathBuf,
    /// How many files a process may have open.
    pub descriptors: usize,
    /// Where planes keep their data: what an fsync costs is this file system's.
    pub directory: PathBuf,
}

impl Bench {
    /// `small` with `--quick`.
    pub fn count(&self, small: usize, usual: usize) -> usize {
        if self.quick { small } else { usual }
    }

    /// A line of what is being done, with the time since `started`.
    pub fn say(&self, started: Instant, what: &str) {
        println!("[{:6.1} s] {what}", started.elapsed().as_secs_f64());
    }
}

/// What can be asked for by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Name {
    /// Joins a second, latency and CPU, with a JWT and with an EC2 document.
    Join,
    /// A decision among many policies, compiling them, going through live sessions after a change.
    Decision,
    /// Resident memory per idle connected agent.
    Memory,
    /// The plane killed and started again under its agents.
    Restart,
    /// A snapshot of the standalone mesh on its way to the agents.
    Mesh,
    /// The agent's footprint.
    Agent,
    /// The package repository.
    Repository,
}

impl Name {
    pub const ALL: [Self; 7] =
        [Self::Join, Self::Decision, Self::Memory, Self::Restart, Self::Mesh, Self::Agent, Self::Repository];

    /// # Errors
    /// It could not be measured: something that must work didn't, or it was measured less often than asked for.
    pub async fn run(self, bench: &Bench) -> anyhow::Result<Vec<Figure>> {
        let figures = match self {
            Self::Join => join::run(bench).await?,
            Self::Decision => decision::run(bench).await?,
            Self::Memory => memory::run(bench).await?,
            Self::Restart => restart::run(bench).await?,
            Self::Mesh => mesh::run(bench).await?,
            Self::Agent => agent::run(bench).await?,
            Self::Repository => repository::run(bench).await?,
        };
        figures.iter().try_for_each(|figure| figure.has_samples(bench.repeat))?;
        Ok(figures)
    }
}
