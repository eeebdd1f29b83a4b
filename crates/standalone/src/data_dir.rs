//! The data directory: whose it is, and files in it that nobody else may read and that are never half written.

use anyhow::{Context, bail};
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file of the plane's own is never larger; one that is wasn't written by it.
const MAX_FILE: u64 = 1 << 20;

/// A directory that this process alone uses, for as long as this value lives.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    /// Locked; the kernel lets go of it however the process ends.
    _lock: File,
}

impl DataDir {
    /// Makes the directory (0700) where it is missing, and locks it.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(writable)
            .with_context(|| format!("making the data directory {}", path.display()))?;
        let lock_path = path.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(writable)
            .with_context(|| {
                format!("the data directory {} can't be written: opening {}", path.display(), lock_path.display())
            })?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => bail!(
                "another plane uses the data directory {}; stop it, or give this one a directory of its own",
                path.display()
            ),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("locking {}", lock_path.display())),
        }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// `None` where there is no such file.
    pub fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match File::open(self.file(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than any file that the plane writes"));
        }
        Ok(Some(bytes))
    }

    /// Replaces the file, readable by nobody else (0600). When this returns, it is durable; when it fails, the old one is still there.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let part = self.file(&format!(".{name}.part"));
        let written = (|| {
            // Made anew, so that it has our mode and isn't somebody's link.
            match fs::remove_file(&part) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&part, self.file(name))?;
            File::open(&self.path)?.sync_all()
        })();
        if written.is_err() {
            let _ = fs::remove_file(&part);
        }
        written
    }
}

/// With the way out, where the disk is read-only: the kernel's three words are easily overread.
fn writable(error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => anyhow::anyhow!(
            "{error}; mount its disk for writing (after a disk error: repair it first), or name another directory with --data-dir"
        ),
        _ => error.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn two_planes_never_share_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDir::open(dir.path()).unwrap();
        let error = DataDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("another plane uses the data directory"), "{error}");
        drop(first);
        DataDir::open(dir.path()).unwrap();
    }

    #[test]
    fn a_file_is_replaced_whole_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(&dir.path().join("made/here")).unwrap();
        assert_eq!(data.read("keys").unwrap(), None);
        data.replace("keys", b"one").unwrap();
        data.replace("keys", b"two").unwrap();
        assert_eq!(data.read("keys").unwrap().as_deref(), Some(b"two".as_slice()));
        assert_eq!(fs::metadata(data.file("keys")).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!data.file(".keys.part").exists());
        // What can't be replaced stays as it was.
        fs::create_dir(data.file("taken")).unwrap();
        data.replace("taken", b"x").unwrap_err();
        assert!(!data.file(".taken.part").exists());
    }

    #[test]
    fn a_file_too_large_to_be_ours_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        fs::write(data.file("keys"), vec![0; MAX_FILE as usize + 1]).unwrap();
        assert_eq!(data.read("keys").unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
