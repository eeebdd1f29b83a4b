//! The directory of packages: what is put into it appears whole, by a rename, while a repository reads it.
//!
//! One writer at a time, by a lock on the directory. A writer that was killed leaves a file that no server serves, and the next takes away.

use crate::archive;
use crate::name::{Package, Product, Revision};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tempfile::{Builder, NamedTempFile};

/// How the name of a file begins that isn't in its place yet.
const UNFINISHED: &str = ".onboardctl-";
const LOCK: &str = ".lock";
/// A larger file is no package of ours; what a repository serves has the same bound.
pub const LARGEST: u64 = 4 << 30;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{doing} {}", .path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("{} is being written to by another onboardctl", .0.display())]
    Busy(PathBuf),
}

/// Of what was done on which path.
pub(crate) fn at<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { doing, path: path.to_owned(), source }
}

/// A directory that nobody else writes to.
#[derive(Debug)]
pub struct Library {
    directory: PathBuf,
    _lock: Flock<File>,
}

impl Library {
    /// Makes the directory where it isn't there.
    ///
    /// # Errors
    /// It can't be made or written to, or another writes to it.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        fs::create_dir_all(directory).map_err(at("making", directory))?;
        let path = directory.join(LOCK);
        let file =
            File::options().create(true).truncate(false).write(true).open(&path).map_err(at("opening", &path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            nix::errno::Errno::EWOULDBLOCK => Error::Busy(directory.to_owned()),
            error => at("locking", &path)(error.into()),
        })?;
        let library = Self { directory: directory.to_owned(), _lock: lock };
        library.take_away_unfinished()?;
        Ok(library)
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn take_away_unfinished(&self) -> Result<(), Error> {
        let entries = fs::read_dir(&self.directory).map_err(at("reading", &self.directory))?;
        for entry in entries.filter_map(Result::ok) {
            if entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes()) {
                let path = entry.path();
                fs::remove_file(&path).map_err(at("removing", &path))?;
            }
        }
        Ok(())
    }

    /// All of them are on the disk before the first one appears.
    ///
    /// # Errors
    /// One can't be written; those that were in their places stay.
    pub fn put(&self, packages: &[(Package, Vec<u8>)]) -> Result<(), Error> {
        let mut staged = Vec::new();
        for (package, bytes) in packages {
            staged.push((self.directory.join(package.to_string()), self.stage(bytes)?));
        }
        for (path, file) in staged {
            self.put_in_place(file, &path)?;
        }
        Ok(())
    }

    /// One file, at a path below the directory.
    pub(crate) fn write(&self, path: &str, bytes: &[u8]) -> Result<(), Error> {
        let file = self.stage(bytes)?;
        self.put_in_place(file, &self.directory.join(path))
    }

    /// The same, with a time in seconds since 1970 by which a client sees that it is another (`If-Modified-Since`).
    pub(crate) fn write_of(&self, path: &str, bytes: &[u8], time: u32) -> Result<(), Error> {
        let file = self.stage(bytes)?;
        let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(time.into());
        file.as_file().set_modified(modified).map_err(at("writing into", &self.directory))?;
        self.put_in_place(file, &self.directory.join(path))
    }

    fn stage(&self, bytes: &[u8]) -> Result<NamedTempFile, Error> {
        let doing = at("writing into", &self.directory);
        let staged = || {
            let mut file = Builder::new().prefix(UNFINISHED).tempfile_in(&self.directory)?;
            file.write_all(bytes)?;
            // Whoever serves it may be another user.
            file.as_file().set_permissions(Permissions::from_mode(0o644))?;
            file.as_file().sync_all()?;
            Ok(file)
        };
        staged().map_err(doing)
    }

    fn put_in_place(&self, file: NamedTempFile, path: &Path) -> Result<(), Error> {
        self.make_directory_of(path)?;
        file.persist(path).map_err(|error| at("renaming to", path)(error.error))?;
        synced(path)
    }

    pub(crate) fn make_directory_of(&self, path: &Path) -> Result<(), Error> {
        let directory = path.parent().unwrap_or(&self.directory);
        if directory.is_dir() {
            return Ok(());
        }
        fs::create_dir_all(directory).map_err(at("making", directory))?;
        // Each new directory is an entry of the one above.
        for above in directory.ancestors().take_while(|above| above.starts_with(&self.directory)) {
            synced(above)?;
        }
        Ok(())
    }

    /// Whether it was there.
    ///
    /// # Errors
    /// It can't be removed.
    pub fn remove(&self, package: &Package) -> Result<bool, Error> {
        let path = self.directory.join(package.to_string());
        match fs::remove_file(&path) {
            Ok(()) => synced(&path).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(at("removing", &path)(error)),
        }
    }
}

/// The directory of this path is on the disk as it is now.
fn synced(path: &Path) -> Result<(), Error> {
    let directory = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(at("syncing", directory))
}

/// A package, and its file if that is a whole one.
pub type Found = (Package, Result<File, archive::Fault>);

/// Every package that there could be and is, in the order of the URIs; and whether it is a whole one.
///
/// # Errors
/// The directory can't be read.
pub fn packages(directory: &Path) -> Result<Vec<Found>, Error> {
    let mut products = vec![Product::Agent, Product::Sidecar(None)];
    products.extend(revisions(directory)?.into_iter().map(|revision| Product::Sidecar(Some(revision))));
    let mut found = Vec::new();
    for package in products.iter().flat_map(Package::all_of) {
        let path = directory.join(package.to_string());
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
            Err(error) => return Err(at("opening", &path)(error)),
        };
        let metadata = file.metadata().map_err(at("reading", &path))?;
        let format = package.format;
        let judged = match metadata.is_file() && metadata.len() <= LARGEST {
            true => archive::check(&file, format, metadata.len()).map(|()| file),
            false => Err(archive::Fault::Other(format)),
        };
        found.push((package, judged));
    }
    Ok(found)
}

/// Those that have a directory.
pub(crate) fn revisions(directory: &Path) -> Result<Vec<Revision>, Error> {
    fs::read_dir(directory).map_err(at("reading", directory))?;
    let path = directory.join("istio-sidecar");
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at("reading", &path)(error)),
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut revisions: Vec<_> = names.filter_map(|name| Revision::parse(&name)).collect();
    revisions.sort_unstable();
    Ok(revisions)
}
