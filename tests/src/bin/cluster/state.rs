//! What of a cluster is seen from outside: a directory with a lock that its process holds, its kubeconfig, and a socket.
//!
//! Whoever holds the lock is up: it can't outlive its process, so what a killed one left is told from what runs.

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The variable that names the directory.
pub const VARIABLE: &str = "ONBOARDING_CLUSTER_STATE";
const DOWN_WITHIN: Duration = Duration::from_secs(20);

/// The directory of a cluster, up or not.
pub struct State(PathBuf);

impl State {
    pub fn find() -> Self {
        let default = || PathBuf::from(format!("/tmp/onboarding-cluster-{}", geteuid()));
        Self(std::env::var_os(VARIABLE).map_or_else(default, PathBuf::from))
    }

    pub fn directory(&self) -> &Path {
        &self.0
    }
    pub fn kubeconfig(&self) -> PathBuf {
        self.0.join("kubeconfig")
    }
    pub fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }
    fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// Makes the directory, for this user alone, and takes the lock; what another run left is gone then.
    pub fn claim(&self) -> anyhow::Result<File> {
        let made = DirBuilder::new().mode(0o700).create(&self.0);
        match made {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("creating {}", self.0.display()));
            }
            _ => {}
        }
        let found = std::fs::symlink_metadata(&self.0)?;
        ensure!(
            found.is_dir() && found.uid() == geteuid().as_raw() && found.mode() & 0o077 == 0,
            "{} isn't a directory that is this user's alone; remove it, or name another by {VARIABLE}",
            self.0.display()
        );
        let mut lock =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(self.lock())?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let pid = pid_in(&lock).map_or_else(|_| "starting".to_owned(), |pid| format!("process {pid}"));
                bail!("it is up already ({pid}): `dev/cluster status` shows it, `dev/cluster down` ends it");
            }
            Err(TryLockError::Error(error)) => return Err(error).context("locking the cluster's directory"),
        }
        for left in [self.socket(), self.kubeconfig()] {
            if left.exists() {
                std::fs::remove_file(left)?;
            }
        }
        lock.set_len(0)?;
        lock.rewind()?;
        write!(lock, "{}", std::process::id())?;
        Ok(lock)
    }

    /// `None`: nobody is up.
    pub fn up(&self) -> anyhow::Result<Option<i32>> {
        let lock = match File::open(self.lock()) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            opened => opened.with_context(|| format!("opening {}", self.lock().display()))?,
        };
        match lock.try_lock_shared() {
            Ok(()) => Ok(None),
            Err(TryLockError::WouldBlock) => pid_in(&lock).map(Some),
            Err(TryLockError::Error(error)) => Err(error).context("asking who is up"),
        }
    }

    /// The process that is up, or an error with the way to one.
    pub fn require(&self) -> anyhow::Result<i32> {
        self.up()?.context("it isn't up: start it with `dev/cluster up`, which stays in its terminal")
    }

    /// Removes what is in the directory, and the directory.
    pub fn clear(&self) -> anyhow::Result<()> {
        // By name: nothing of anybody else's goes, whatever directory was named.
        for file in [self.socket(), self.kubeconfig(), self.lock()] {
            match std::fs::remove_file(&file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("removing {}", file.display()));
                }
                _ => {}
            }
        }
        match std::fs::remove_dir(&self.0) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", self.0.display()))
            }
            _ => Ok(()),
        }
    }
}

/// Of the process that holds this lock, as far as it is seen from outside.
fn pid_in(lock: &File) -> anyhow::Result<i32> {
    let mut text = String::new();
    lock.take(32).read_to_string(&mut text)?;
    text.trim().parse().context("reading who is up")
}

/// Ends what is up; clears what is left of what was.
pub fn down() -> anyhow::Result<ExitCode> {
    let state = State::find();
    let Some(pid) = state.up()? else {
        let left = state.directory().exists();
        state.clear()?;
        println!("It wasn't up{}.", if left { "; what a killed one had left is cleared" } else { "" });
        return Ok(ExitCode::SUCCESS);
    };
    kill(Pid::from_raw(pid), Signal::SIGTERM).with_context(|| format!("asking process {pid} to end"))?;
    let started = Instant::now();
    while state.up()?.is_some() {
        if started.elapsed() > DOWN_WITHIN {
            // Its children die with it.
            kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("killing process {pid}"))?;
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
    state.clear()?;
    println!("It is down, {} ms after: nothing of it is left.", started.elapsed().as_millis());
    Ok(ExitCode::SUCCESS)
}
