//! What the agent keeps on disk, so that a reboot while the plane is away still starts the sidecar.
//!
//! Every file is written whole or not at all. One that can't be understood counts as absent (the plane gives it again), except the
//! agent's key, which nobody can give again.

use crate::boot::HeldBoot;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The state directory (`/var/lib/onboarding-agent`).
#[derive(Debug, Clone)]
pub struct Store {
    directory: PathBuf,
}

/// A Workload Onboarding Token and what came with it. The token is the bearer of every call: never logged.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredToken {
    pub token: String,
    pub issued_at: Timestamp,
    pub expires_at: Timestamp,
    /// `namespace/name` of the registration.
    pub registration: String,
}

/// The certificate in the mesh, and the key that was made for it on this host.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredIdentity {
    /// PEM, leaf first.
    pub certificate_chain: String,
    /// PEM, PKCS #8.
    pub private_key: String,
    /// PEM bundle.
    pub roots: String,
    pub spiffe_id: String,
    pub obtained_at: Timestamp,
    pub expires_at: Timestamp,
}

/// A file of the agent's that can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("can't read {path}; the agent's user needs access to it", path = path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("can't write {path}; is the disk full or read-only, or does the directory belong to another user?", path = path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} is larger than {limit} bytes; it is not a file that the agent wrote", path = path.display())]
    TooLarge { path: PathBuf, limit: u64 },
}

impl StoreError {
    pub(crate) fn read(path: &Path, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }
    fn write(path: &Path, source: io::Error) -> Self {
        Self::Write { path: path.to_owned(), source }
    }
}

const BOOT: &str = "boot";
const ISTIOD_IDENTITY: &str = "istiod-identity.json";
const ADDRESS: &str = "address.json";
const TOKEN: &str = "token.json";
const IDENTITY: &str = "mesh-identity.json";
/// A boot configuration of 100,000 resources is some tens of MiB.
const LARGEST: u64 = 128 * 1024 * 1024;

impl Store {
    /// Makes the directory where it is missing.
    pub fn open(directory: &Path) -> Result<Self, StoreError> {
        fs::create_dir_all(directory).map_err(|source| StoreError::write(directory, source))?;
        Ok(Self { directory: directory.to_owned() })
    }

    /// For commands that only look.
    pub fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    pub fn key_path(&self) -> PathBuf {
        self.directory.join("agent.key")
    }
    pub fn status_path(&self) -> PathBuf {
        self.directory.join("status.json")
    }
    /// Where the sidecar's own files go.
    pub fn sidecar_directory(&self) -> PathBuf {
        self.directory.join("sidecar")
    }

    /// The certificate of istiod's, with its key: the sidecar's keeper writes it.
    pub fn istiod_identity_path(&self) -> PathBuf {
        self.directory.join(ISTIOD_IDENTITY)
    }
    pub fn istiod_identity(&self) -> Option<StoredIdentity> {
        self.json(ISTIOD_IDENTITY)
    }

    /// Of this host, as it was registered last.
    pub fn address(&self) -> Option<std::net::IpAddr> {
        self.json(ADDRESS)
    }
    pub fn keep_address(&self, address: std::net::IpAddr) -> Result<(), StoreError> {
        self.keep_json(ADDRESS, &address)
    }

    pub fn boot(&self) -> Option<HeldBoot> {
        let path = self.directory.join(BOOT);
        let bytes = self.tolerant(&path)?;
        let boot = HeldBoot::from_bytes(&bytes);
        if boot.is_none() {
            tracing::warn!(file = %path.display(), "the kept boot configuration is damaged and counts as absent");
        }
        boot
    }
    pub fn keep_boot(&self, boot: &HeldBoot) -> Result<(), StoreError> {
        write_atomically(&self.directory.join(BOOT), &boot.to_bytes(), 0o600)
    }
    /// After the workload was sent out of the mesh: neither the configuration nor the certificate must start a sidecar again.
    pub fn forget_boot(&self) -> Result<(), StoreError> {
        remove(&self.directory.join(BOOT))?;
        remove(&self.directory.join(IDENTITY))?;
        remove(&self.directory.join(ISTIOD_IDENTITY))
    }

    pub fn token(&self) -> Option<StoredToken> {
        self.json(TOKEN)
    }
    pub fn keep_token(&self, token: &StoredToken) -> Result<(), StoreError> {
        self.keep_json(TOKEN, token)
    }
    pub fn forget_token(&self) -> Result<(), StoreError> {
        remove(&self.directory.join(TOKEN))
    }

    pub fn identity(&self) -> Option<StoredIdentity> {
        self.json(IDENTITY)
    }
    pub fn keep_identity(&self, identity: &StoredIdentity) -> Result<(), StoreError> {
        self.keep_json(IDENTITY, identity)
    }

    fn json<T: for<'de> Deserialize<'de>>(&self, name: &str) -> Option<T> {
        let path = self.directory.join(name);
        let bytes = self.tolerant(&path)?;
        serde_json::from_slice(&bytes)
            .inspect_err(|_| tracing::warn!(file = %path.display(), "a kept file is damaged and counts as absent"))
            .ok()
    }
    fn keep_json(&self, name: &str, value: &impl Serialize) -> Result<(), StoreError> {
        let path = self.directory.join(name);
        let bytes = serde_json::to_vec(value).map_err(|error| StoreError::write(&path, error.into()))?;
        write_atomically(&path, &bytes, 0o600)
    }
    fn tolerant(&self, path: &Path) -> Option<Vec<u8>> {
        read_bounded(path, LARGEST).unwrap_or_else(|error| {
            tracing::warn!(error = %with_source(&error), "a kept file can't be read and counts as absent");
            None
        })
    }
}

/// An error with its source, for one line of a log.
pub fn with_source(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// The whole file, `None` where there is none; refuses more than `limit` bytes.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::read(path, error)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|source| StoreError::read(path, source))?;
    if bytes.len() as u64 > limit {
        return Err(StoreError::TooLarge { path: path.to_owned(), limit });
    }
    Ok(Some(bytes))
}

/// A temporary file beside it, fsync, rename: whoever reads `path` sees the old content or the new, also after a power cut.
pub fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StoreError> {
    replace(path, bytes, mode, true).map_err(|source| StoreError::write(path, source))
}

/// The same without fsync, for what is said anew after a power cut: nobody waits for the disk.
pub fn write_for_now(path: &Path, bytes: &[u8], mode: u32) -> Result<(), StoreError> {
    replace(path, bytes, mode, false).map_err(|source| StoreError::write(path, source))
}

fn replace(path: &Path, bytes: &[u8], mode: u32, durable: bool) -> io::Result<()> {
    let directory = path.parent().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{:016x}", rand::random::<u64>()));
    let temporary = directory.join(temporary);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written?;
    if durable { File::open(directory)?.sync_all() } else { Ok(()) }
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(StoreError::write(path, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn token() -> StoredToken {
        StoredToken {
            token: "secret".to_owned(),
            issued_at: Timestamp::UNIX_EPOCH,
            expires_at: Timestamp::MAX,
            registration: "bookinfo/ratings-x".to_owned(),
        }
    }

    #[test]
    fn keeps_and_forgets_privately() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("state")).unwrap();
        assert!(store.token().is_none());
        store.keep_token(&token()).unwrap();
        assert_eq!(store.token().unwrap().registration, "bookinfo/ratings-x");
        assert_eq!(fs::metadata(directory.path().join("state").join(TOKEN)).unwrap().mode() & 0o777, 0o600);
        store.forget_token().unwrap();
        store.forget_token().unwrap();
        assert!(store.token().is_none());
    }

    #[test]
    fn a_damaged_file_counts_as_absent() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let boot = HeldBoot { version: "1".to_owned(), ..HeldBoot::default() };
        store.keep_boot(&boot).unwrap();
        assert_eq!(store.boot(), Some(boot));
        let path = directory.path().join(BOOT);
        let whole = fs::read(&path).unwrap();
        for damaged in [&whole[..whole.len() - 1], b"", b"garbage"] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(store.boot(), None);
        }
        fs::write(directory.path().join(TOKEN), "{").unwrap();
        assert!(store.token().is_none());
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_temporary() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("no-such-directory").join("file");
        let error = write_atomically(&path, b"x", 0o600).unwrap_err();
        assert!(error.to_string().contains("can't write"), "{error}");
        let target = directory.path().join("target");
        fs::create_dir(&target).unwrap();
        write_atomically(&target, b"x", 0o600).unwrap_err();
        write_for_now(&target, b"x", 0o600).unwrap_err();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
