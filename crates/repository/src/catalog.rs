//! The directory of packages: what is in it now, and what was in it until a moment ago.
//!
//! A package is one open file. Its checksum is computed of that very file, and whoever downloads it reads that file to its end,
//! whatever has its name by then. So a package is replaced by a rename, and appears together with its checksum.

use aws_lc_rs::digest::{Context, SHA256};
use cap_std::ambient_authority;
use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt};
use nix::fcntl::OFlag;
use onboarding_packages::archive;
use onboarding_packages::index::{self, Published};
use onboarding_packages::name::{Architecture, Format, Package, Product, Revision};
use rustix::io::{ReadWriteFlags, preadv2};
use std::collections::{BTreeSet, HashMap};
use std::fs::{File, Metadata};
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// How long what was replaced is held, for those who asked for it by its content.
const HELD_FOR: Duration = Duration::from_secs(3600);
/// Of one name, the newest included: each is an open file, and disk that isn't free yet.
const MOST_HELD: usize = 4;
/// Revisions of the sidecar that are looked for; further ones are served, but not listed.
const MOST_REVISIONS: usize = 64;
/// A larger file is no package of ours.
const MOST_BYTES: u64 = 4 << 30;
/// Read at a time while a checksum is computed.
const BLOCK: usize = 256 << 10;

/// A larger file is no index: they have some KiB a package.
const LARGEST_INDEX: u64 = 64 << 20;

/// Why a package can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Absent {
    #[error("it is not there")]
    Nothing,
    #[error("{0}")]
    NotWhole(#[from] archive::Fault),
    #[error("it is no file of at most 4 GiB")]
    NoFile,
    #[error("it is too large for an index")]
    NoIndex,
    #[error("it was written to while its checksum was computed: replace packages by a rename")]
    BeingWritten,
    #[error("it can't be read: {0}")]
    Unreadable(#[source] io::Error),
}

/// The content of one file, which never changes.
#[derive(Debug)]
pub struct Version {
    file: File,
    mark: Mark,
    /// SHA-256, in lower-case hexadecimal.
    pub digest: String,
}

impl Version {
    pub fn length(&self) -> u64 {
        self.mark.length
    }

    pub fn modified(&self) -> SystemTime {
        let (seconds, nanoseconds) = self.mark.modified;
        // A time before 1970, or one that this machine can't hold, says nothing.
        let since = Duration::new(seconds.try_into().unwrap_or(0), nanoseconds.try_into().unwrap_or(0));
        SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
    }

    /// Fills the block from `offset` on, without waiting for a disk; `false`: what is there isn't in memory, and [`Self::read`] gets it.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_at_once(&self, offset: u64, block: &mut [u8]) -> io::Result<bool> {
        let wanted = block.len();
        // Any failure, a file system that can't tell among them, is found again by the read that waits.
        let read = preadv2(&self.file, &mut [IoSliceMut::new(block)], offset, ReadWriteFlags::NOWAIT);
        if read != Ok(wanted) {
            return Ok(false);
        }
        self.unchanged()?;
        Ok(true)
    }

    /// Fills the block from `offset` on. Blocks.
    ///
    /// # Errors
    /// The file can't be read, or somebody wrote to it: what was sent of it is no package, and its receiver must learn that.
    pub fn read(&self, offset: u64, block: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(block, offset)?;
        self.unchanged()
    }

    fn unchanged(&self) -> io::Result<()> {
        if Mark::of(&self.file.metadata()?).content() != self.mark.content() {
            return Err(io::Error::other("the package was written to while it was downloaded"));
        }
        Ok(())
    }
}

/// Which file, and in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    /// Nobody can set this one back.
    changed: (i64, i64),
}

impl Mark {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// What changes when the content does; a rename over the file changes the rest of the mark.
    fn content(&self) -> (u64, (i64, i64)) {
        (self.length, self.modified)
    }
}

#[derive(Debug)]
struct Held {
    version: Arc<Version>,
    /// When it was no longer the newest.
    replaced: Option<Instant>,
}

/// What there is, in the order of the URIs.
#[derive(Debug, Default)]
pub struct Inventory {
    pub whole: Vec<(Package, Arc<Version>)>,
    /// Files with the name of a package that can't be served.
    pub faulty: Vec<(Package, Absent)>,
    /// What clients of the signed repository begin with: its key, and the index of each suite. Paths below the root.
    pub signed: Vec<String>,
}

/// The packages of one directory.
#[derive(Debug)]
pub struct Catalog {
    directory: PathBuf,
    /// The newest first.
    held: Mutex<HashMap<Package, Vec<Held>>>,
    /// Checksums are computed one after the other: this machine has other things to do.
    computing: tokio::sync::Mutex<()>,
}

impl Catalog {
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, held: Mutex::default(), computing: tokio::sync::Mutex::default() }
    }

    /// What has this name now.
    ///
    /// # Errors
    /// Nothing that could be served.
    pub async fn newest(&self, package: &Package) -> Result<Arc<Version>, Absent> {
        let opened = match self.open(package).await {
            Ok(opened) => opened,
            Err(absent) => {
                // Taken away, not replaced: nobody shall have it.
                self.lock().remove(package);
                return Err(absent);
            }
        };
        if let Some(version) = self.known(package, &opened.1) {
            return Ok(version);
        }
        let _turn = self.computing.lock().await;
        // Others may have waited for the same.
        if let Some(version) = self.known(package, &opened.1) {
            return Ok(version);
        }
        let format = package.format;
        let version = blocking(move || compute(opened, Some(format))).await?;
        Ok(self.take(package, version))
    }

    /// What has this content and had this file name, at most an hour ago.
    pub fn of_content(&self, digest: &str, file_name: &str) -> Option<(Package, Arc<Version>)> {
        let held = self.lock();
        let mut all = held.iter().flat_map(|(package, versions)| versions.iter().map(move |held| (package, held)));
        let (package, found) =
            all.find(|(package, held)| held.version.digest == digest && package.file_name() == file_name)?;
        Some((package.clone(), found.version.clone()))
    }

    /// A file of the signed repository, as it is now. Where its name has its digest, that is taken on trust: whoever asked for it checks it.
    ///
    /// # Errors
    /// Nothing that could be served.
    pub async fn published(&self, path: &str, published: &Published) -> Result<Arc<Version>, Absent> {
        let (directory, path, digest) = (self.directory.clone(), path.to_owned(), published.digest.clone());
        let version = blocking(move || {
            let (file, mark) = open(&directory, &path)?;
            match digest {
                Some(digest) => Ok(Version { file, mark, digest }),
                None if mark.length > LARGEST_INDEX => Err(Absent::NoIndex),
                None => compute((file, mark), None),
            }
        });
        Ok(Arc::new(version.await?))
    }

    /// Everything; looks at the directory, and forgets what is gone or was replaced too long ago.
    ///
    /// # Errors
    /// The directory can't be read.
    pub async fn inventory(&self) -> io::Result<Inventory> {
        let directory = self.directory.clone();
        let revisions = blocking(move || revisions(&directory)).await?;
        let signed = beginnings(&revisions);
        let sidecars = revisions.into_iter().map(|revision| Product::Sidecar(Some(revision)));
        let mut packages = Vec::new();
        for product in [Product::Agent, Product::Sidecar(None)].into_iter().chain(sidecars) {
            packages.extend(Package::all_of(&product));
        }
        let mut inventory = Inventory::default();
        for package in &packages {
            match self.newest(package).await {
                Ok(version) => inventory.whole.push((package.clone(), version)),
                Err(Absent::Nothing) => {}
                Err(fault) => inventory.faulty.push((package.clone(), fault)),
            }
        }
        let directory = self.directory.clone();
        let there = move || Ok(signed.into_iter().filter(|path| open(&directory, path).is_ok()).collect());
        inventory.signed = blocking::<_, io::Error>(there).await?;
        let now = Instant::now();
        self.lock().values_mut().for_each(|versions| forget(versions, now));
        Ok(inventory)
    }

    async fn open(&self, package: &Package) -> Result<(File, Mark), Absent> {
        let (directory, path) = (self.directory.clone(), package.to_string());
        blocking(move || open(&directory, &path)).await
    }

    fn known(&self, package: &Package, mark: &Mark) -> Option<Arc<Version>> {
        let held = self.lock();
        // Only the newest: whoever opened a file before it was replaced computes its checksum once more.
        let newest = held.get(package)?.first()?;
        (newest.version.mark == *mark).then(|| newest.version.clone())
    }

    fn take(&self, package: &Package, version: Version) -> Arc<Version> {
        let (version, now) = (Arc::new(version), Instant::now());
        let mut held = self.lock();
        let versions = held.entry(package.clone()).or_default();
        if let Some(newest) = versions.first_mut() {
            newest.replaced = Some(now);
        }
        versions.retain(|held| held.version.digest != version.digest);
        versions.insert(0, Held { version: version.clone(), replaced: None });
        forget(versions, now);
        version
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Package, Vec<Held>>> {
        // Each change is one statement; what a panic leaves is whole.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn forget(versions: &mut Vec<Held>, now: Instant) {
    versions.truncate(MOST_HELD);
    versions.retain(|held| held.replaced.is_none_or(|replaced| now.duration_since(replaced) < HELD_FOR));
}

/// Symbolic links are followed inside of the directory only; a FIFO doesn't make anybody wait.
fn open(directory: &Path, path: &str) -> Result<(File, Mark), Absent> {
    let nothing = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Absent::Nothing,
        _ => Absent::Unreadable(error),
    };
    let directory = Dir::open_ambient_dir(directory, ambient_authority()).map_err(nothing)?;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(OFlag::O_NONBLOCK.bits());
    let file = directory.open_with(path, &options).map_err(nothing)?.into_std();
    let metadata = file.metadata().map_err(Absent::Unreadable)?;
    if !metadata.is_file() || metadata.len() > MOST_BYTES {
        return Err(Absent::NoFile);
    }
    Ok((file, Mark::of(&metadata)))
}

/// `format`: which it must be a whole package of.
fn compute((file, mark): (File, Mark), format: Option<Format>) -> Result<Version, Absent> {
    if let Some(format) = format {
        archive::check(&file, format, mark.length)?;
    }
    let mut context = Context::new(&SHA256);
    let (mut block, mut offset) = (vec![0; BLOCK], 0);
    while offset < mark.length {
        let length = BLOCK.min(usize::try_from(mark.length - offset).unwrap_or(BLOCK));
        match file.read_exact_at(&mut block[..length], offset) {
            Ok(()) => context.update(&block[..length]),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(Absent::BeingWritten),
            Err(error) => return Err(Absent::Unreadable(error)),
        }
        offset += length as u64;
    }
    let after = Mark::of(&file.metadata().map_err(Absent::Unreadable)?);
    if after.content() != mark.content() {
        return Err(Absent::BeingWritten);
    }
    let digest = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Version { file, mark, digest })
}

fn revisions(directory: &Path) -> io::Result<BTreeSet<Revision>> {
    let directory = Dir::open_ambient_dir(directory, ambient_authority())?;
    // Reading it now says whether it may be read.
    directory.entries()?;
    let entries = match directory.read_dir("istio-sidecar") {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(error),
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter_map(|name| Revision::parse(&name)).take(MOST_REVISIONS).collect())
}

/// Of the signed repository, where everything of it is there.
fn beginnings(revisions: &BTreeSet<Revision>) -> Vec<String> {
    let mut paths = vec![index::KEY.to_owned()];
    for revision in [None].into_iter().chain(revisions.iter().map(Some)) {
        let suite = index::suite(revision);
        paths.push(format!("{}/InRelease", index::of_suite(&suite)));
        let yum = |architecture| format!("{}/repodata/repomd.xml", index::of_yum(&suite, architecture));
        paths.extend(Architecture::ALL.map(yum));
    }
    paths
}

async fn blocking<T: Send + 'static, E: From<Stopped> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    tokio::task::spawn_blocking(work).await.map_err(|_| E::from(Stopped))?
}

/// The runtime ends, or the work panicked.
struct Stopped;

impl From<Stopped> for io::Error {
    fn from(_: Stopped) -> Self {
        Self::other("the work was not done")
    }
}

impl From<Stopped> for Absent {
    fn from(stopped: Stopped) -> Self {
        Self::Unreadable(stopped.into())
    }
}
