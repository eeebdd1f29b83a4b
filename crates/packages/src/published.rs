//! The signed repository of a directory: made of what is in it, replaced so that a client sees the old one or the new one, and checked.
//!
//! Packages and indexes whose names have their digest are written first and stay for a day after they were replaced. Then come the
//! few files that clients begin with, the signed one last. A writer that is killed anywhere leaves a repository that works: the old one.

use crate::apt::{self, Suite};
use crate::described::{self, Described};
use crate::index::{KEY, Published, STABLE, in_pool, of_suite, suite};
use crate::key::{PublicKey, SigningKey};
use crate::library::{self, LARGEST, Library, at};
use crate::name::{Architecture, Format, Package, Product};
use crate::yum::{self, Base, Listed};
use crate::{archive, key, sha256};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// How long what was replaced stays for clients that have an index of before.
const KEPT_FOR: u32 = 24 * 3600;
/// What was published, and when.
const HISTORY: &str = ".published.json";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Library(#[from] library::Error),
    #[error(transparent)]
    Key(#[from] key::Error),
    #[error("{package} can't be published: {fault}")]
    Package { package: Package, fault: String },
    #[error("making an index of apt")]
    Apt(#[from] io::Error),
    #[error("making an index of yum")]
    Yum(#[from] yum::Error),
}

/// One package of the directory.
pub struct Held {
    pub package: Package,
    pub described: Described,
    /// SHA-256, in lower-case hexadecimal.
    pub digest: String,
    pub length: u64,
}

/// What is wrong with one of the directory.
pub struct Faulty {
    pub package: Package,
    pub fault: String,
}

/// Everything that has a package's name.
///
/// # Errors
/// The directory can't be read.
pub fn read(directory: &Path) -> Result<(Vec<Held>, Vec<Faulty>), library::Error> {
    let (mut held, mut faulty) = (Vec::new(), Vec::new());
    for (package, file) in library::packages(directory)? {
        match file.and_then(|file| Ok(bytes_of(file)?)) {
            Ok(bytes) => match described_as(&package, &bytes) {
                Ok(described) => {
                    held.push(Held { package, described, digest: sha256(&bytes), length: bytes.len() as u64 });
                }
                Err(fault) => faulty.push(Faulty { package, fault }),
            },
            Err(fault) => faulty.push(Faulty { package, fault: archive::Fault::to_string(&fault) }),
        }
    }
    Ok((held, faulty))
}

fn bytes_of(file: File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(LARGEST).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What a package says of itself, if it is what its place says.
fn described_as(package: &Package, bytes: &[u8]) -> Result<Described, String> {
    let described = Described::read(bytes).map_err(|fault| fault.to_string())?;
    let same = described.name == package.product.name()
        && described.architecture == package.architecture
        && described.format() == package.format;
    match same {
        true => Ok(described),
        false => Err(format!(
            "it is {} {} for {}, a {}",
            described.name,
            described.version,
            described.architecture.name(),
            described.format().name()
        )),
    }
}

/// What publishing came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Published {
        suites: Vec<String>,
        signed: Vec<String>,
    },
    /// It was published already, all of it.
    Unchanged,
}

/// Signs the RPM packages that this key hasn't signed, and publishes all packages.
///
/// # Errors
/// A package can't be published, or something can't be written; then clients have what they had.
pub fn publish(library: &Library, key: &SigningKey, now: u32) -> Result<Outcome, Error> {
    let public = key.public()?;
    let signed = sign_packages(library, key, &public)?;
    let (held, faulty) = read(library.directory())?;
    if let Some(Faulty { package, fault }) = faulty.into_iter().next() {
        return Err(Error::Package { package, fault });
    }
    let plan = Plan::new(&held)?;
    let history = History::read(library.directory());
    // A suite or a package that is to go has indexes that verify, too.
    if history.is_at(&plan) && verify_indexes(library.directory(), &plan, Some(&public)).is_empty() {
        return Ok(Outcome::Unchanged);
    }
    // Clients take no index that is older than the one they have.
    let date = now.max(history.newest().map_or(0, |newest| newest.saturating_add(1)));
    for (path, content) in &plan.immutable {
        match content {
            Content::Bytes(bytes) => write_once(library, path, bytes)?,
            Content::Package(package) => link(library, package, path)?,
        }
    }
    library.write_of(KEY, public.as_bytes(), date)?;
    for suite in &plan.suites {
        let directory = of_suite(&suite.name);
        for (path, content) in &suite.indexes {
            library.write_of(&format!("{directory}/{path}"), content, date)?;
        }
        let release = suite.release(date);
        library.write_of(&format!("{directory}/Release"), release.as_bytes(), date)?;
        library.write_of(
            &format!("{directory}/Release.gpg"),
            key.detached(release.as_bytes(), date)?.as_bytes(),
            date,
        )?;
        library.write_of(&format!("{directory}/InRelease"), key.clear(&release, date)?.as_bytes(), date)?;
    }
    for base in &plan.bases {
        let repomd = base.repomd(date);
        let signature = key.detached(repomd.as_bytes(), date)?;
        // Two files, and no client asks for both at once: whoever falls between them is refused, and asks again.
        library.write_of(&format!("{}/repodata/repomd.xml.asc", base.path), signature.as_bytes(), date)?;
        library.write_of(&format!("{}/repodata/repomd.xml", base.path), repomd.as_bytes(), date)?;
    }
    history.follow(library, date, &plan)?;
    Ok(Outcome::Published { suites: plan.suites.iter().map(|suite| suite.name.clone()).collect(), signed })
}

/// Which have been.
fn sign_packages(library: &Library, key: &SigningKey, public: &str) -> Result<Vec<String>, Error> {
    let public = PublicKey::parse(public);
    let mut signed = Vec::new();
    for (package, file) in library::packages(library.directory())? {
        if package.format != Format::Rpm {
            continue;
        }
        let of_package = |fault: String| Error::Package { package: package.clone(), fault };
        let bytes = file.and_then(|file| Ok(bytes_of(file)?)).map_err(|fault| of_package(fault.to_string()))?;
        let metadata = rpm::PackageMetadata::parse(&mut &bytes[..]).map_err(|error| of_package(error.to_string()))?;
        if public.as_ref().is_some_and(|public| public.is_of_rpm(&metadata)) {
            continue;
        }
        let new = key.sign_rpm(&bytes)?;
        // What was signed is what was there: only the signature's header is another.
        let payload = |bytes: &[u8]| {
            let metadata = rpm::PackageMetadata::parse(&mut &bytes[..]).ok()?;
            let start = usize::try_from(metadata.get_package_segment_offsets().header).ok()?;
            bytes.get(start..).map(<[u8]>::to_vec)
        };
        if payload(&new).is_none() || payload(&new) != payload(&bytes) {
            return Err(of_package("signing it would change more than its signature".to_owned()));
        }
        signed.push(package.to_string());
        library.put(&[(package, new)])?;
    }
    Ok(signed)
}

/// What a directory's packages are published as, without dates and signatures.
struct Plan {
    /// Files that are never replaced, by their paths.
    immutable: BTreeMap<String, Content>,
    suites: Vec<Suite>,
    bases: Vec<Base>,
}

enum Content {
    Bytes(Vec<u8>),
    /// The same file as this package's.
    Package(Package),
}

impl Plan {
    fn new(held: &[Held]) -> Result<Self, Error> {
        let revisions: BTreeSet<_> = held
            .iter()
            .filter_map(|held| match &held.package.product {
                Product::Sidecar(revision) => revision.as_ref(),
                Product::Agent => None,
            })
            .collect();
        let (mut immutable, mut suites, mut bases) = (BTreeMap::new(), Vec::new(), Vec::new());
        for revision in [None].into_iter().chain(revisions.into_iter().map(Some)) {
            let name = suite(revision);
            let of_format = |format| {
                held.iter().filter(move |held| {
                    let belongs = match &held.package.product {
                        Product::Agent => true,
                        Product::Sidecar(of) => of.as_ref() == revision,
                    };
                    belongs && held.package.format == format
                })
            };
            let debs: Vec<_> =
                of_format(Format::Deb).map(|held| (&held.described, held.digest.as_str(), held.length)).collect();
            for held in of_format(Format::Deb) {
                let end = format!("_{}.deb", held.described.architecture.name());
                let path = in_pool(&held.digest, &held.described.name, &held.described.version, &end);
                immutable.insert(format!("apt/{path}"), Content::Package(held.package.clone()));
            }
            let suite = Suite::new(&name, &debs)?;
            for (path, content) in &suite.indexes {
                if let Some(by_hash) = suite.by_hash(path) {
                    immutable.insert(by_hash, Content::Bytes(content.clone()));
                }
            }
            suites.push(suite);
            for architecture in Architecture::ALL {
                let mut listed = Vec::new();
                let here = of_format(Format::Rpm).filter(|held| held.described.architecture == architecture);
                let base_path = crate::index::of_yum(&name, architecture);
                for held in here {
                    listed.push(Listed { described: &held.described, digest: &held.digest, length: held.length });
                    let path = yum::location(&held.described, &held.digest);
                    immutable.insert(format!("{base_path}/{path}"), Content::Package(held.package.clone()));
                }
                let base = Base::new(&name, architecture, &listed)?;
                for data in &base.data {
                    let content = Content::Bytes(data.compressed.clone());
                    immutable.insert(format!("{}/{}", base.path, data.path), content);
                }
                bases.push(base);
            }
        }
        Ok(Self { immutable, suites, bases })
    }

    /// Paths of files that are replaced.
    fn replaced(&self) -> BTreeSet<String> {
        let mut paths = BTreeSet::from([KEY.to_owned()]);
        for suite in &self.suites {
            let names = suite.indexes.keys().map(String::as_str).chain(["Release", "Release.gpg", "InRelease"]);
            paths.extend(names.map(|name| format!("{}/{name}", of_suite(&suite.name))));
        }
        for base in &self.bases {
            paths.extend(["repomd.xml", "repomd.xml.asc"].map(|name| format!("{}/repodata/{name}", base.path)));
        }
        paths
    }
}

fn write_once(library: &Library, path: &str, bytes: &[u8]) -> Result<(), library::Error> {
    match fs::read(library.directory().join(path)) {
        Ok(there) if there == bytes => Ok(()),
        _ => library.write(path, bytes),
    }
}

/// The same file under a second name, so that it stays when the first is another's.
fn link(library: &Library, package: &Package, path: &str) -> Result<(), library::Error> {
    let (from, to) = (library.directory().join(package.to_string()), library.directory().join(path));
    library.make_directory_of(&to)?;
    match fs::hard_link(&from, &to) {
        Ok(()) => Ok(()),
        // From before, or by a file system without links: what is there must be this package.
        Err(_) => {
            let bytes = fs::read(&from).map_err(at("reading", &from))?;
            write_once(library, path, &bytes)
        }
    }
}

/// What was published when; what is too old is taken away.
struct History(Vec<(u32, BTreeSet<String>)>);

impl History {
    /// One that can't be read knows of nothing: then everything that isn't published now goes.
    fn read(directory: &Path) -> Self {
        let value = fs::read(directory.join(HISTORY)).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
        let generation = |value: &Value| {
            let date = u32::try_from(value["date"].as_u64()?).ok()?;
            let files = value["files"].as_array()?.iter().filter_map(|path| path.as_str().map(str::to_owned)).collect();
            Some((date, files))
        };
        let all = value.as_ref().and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        Self(all.iter().filter_map(generation).collect())
    }

    fn newest(&self) -> Option<u32> {
        self.0.iter().map(|(date, _)| *date).max()
    }

    /// What was published last is all that is planned, and nothing else.
    fn is_at(&self, plan: &Plan) -> bool {
        let last = self.0.iter().max_by_key(|(date, _)| *date);
        last.is_some_and(|(_, files)| files.iter().eq(plan.immutable.keys()))
    }

    fn follow(mut self, library: &Library, date: u32, plan: &Plan) -> Result<(), library::Error> {
        let immutable: BTreeSet<String> = plan.immutable.keys().cloned().collect();
        self.0.sort_unstable_by_key(|(date, _)| *date);
        // One is kept for a day after the next took its place.
        let replaced: Vec<u32> = self.0.iter().skip(1).map(|(date, _)| *date).chain([date]).collect();
        let mut kept: Vec<_> = self
            .0
            .into_iter()
            .zip(replaced)
            .filter(|(_, replaced)| date.saturating_sub(*replaced) < KEPT_FOR)
            .map(|(it, _)| it)
            .collect();
        kept.push((date, immutable));
        let value: Vec<Value> = kept.iter().map(|(date, files)| json!({ "date": date, "files": files })).collect();
        library.write(HISTORY, Value::from(value).to_string().as_bytes())?;
        let wanted: BTreeSet<String> = kept.into_iter().flat_map(|(_, files)| files).chain(plan.replaced()).collect();
        for path in ["apt", "yum"] {
            take_away(library.directory(), path, &wanted)?;
        }
        Ok(())
    }
}

/// Below `apt` and `yum` nothing is anybody else's. Says whether the directory is empty by then.
fn take_away(directory: &Path, below: &str, wanted: &BTreeSet<String>) -> Result<bool, library::Error> {
    let path = directory.join(below);
    let mut empty = true;
    for entry in fs::read_dir(&path).map_err(at("reading", &path))?.filter_map(Result::ok) {
        let Some(name) = entry.file_name().to_str().map(|name| format!("{below}/{name}")) else { continue };
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_directory && !take_away(directory, &name, wanted)? || wanted.contains(&name) {
            empty = false;
            continue;
        }
        let path = entry.path();
        let removed = if is_directory { fs::remove_dir(&path) } else { fs::remove_file(&path) };
        removed.map_err(at("removing", &path))?;
    }
    Ok(empty)
}

/// Everything that is wrong with a directory: packages that are broken or not signed, and indexes that are missing, old, or signed by
/// nobody. Reads all of it.
///
/// # Errors
/// The directory can't be read.
pub fn verify(directory: &Path) -> Result<Vec<String>, Error> {
    let (held, faulty) = read(directory)?;
    let mut problems: Vec<String> = faulty.iter().map(|it| format!("{}: {}", it.package, it.fault)).collect();
    let public = fs::read_to_string(directory.join(KEY)).ok();
    let key = public.as_deref().and_then(PublicKey::parse);
    if key.is_none() {
        problems
            .push(format!("{KEY}: there is no public key, so nothing is signed; onboardctl packages index makes one"));
    }
    for held in &held {
        let path = directory.join(held.package.to_string());
        let checked = fs::read(&path).map_err(|error| error.to_string());
        if let Err(fault) =
            checked.and_then(|bytes| described::check_content(&bytes).map_err(|fault| fault.to_string()))
        {
            problems.push(format!("{}: {fault}", held.package));
        }
        if let (described::Details::Rpm(metadata), Some(key)) = (&held.described.details, &key)
            && !key.is_of_rpm(metadata)
        {
            problems.push(format!("{}: it isn't signed by {KEY}", held.package));
        }
    }
    if public.is_some() {
        problems.extend(verify_indexes(directory, &Plan::new(&held)?, None));
    }
    Ok(problems)
}

/// `wanted`: the public key that must have signed them.
fn verify_indexes(directory: &Path, plan: &Plan, wanted: Option<&str>) -> Vec<String> {
    let text = |path: &str| fs::read_to_string(directory.join(path)).ok();
    let mut problems = Vec::new();
    let public = text(KEY).filter(|public| wanted.is_none_or(|wanted| wanted == public));
    let Some(key) = public.as_deref().and_then(PublicKey::parse) else {
        return vec![format!("{KEY}: it isn't the key that signs")];
    };
    for (path, content) in &plan.immutable {
        let good = match content {
            Content::Bytes(bytes) => fs::read(directory.join(path)).is_ok_and(|there| there == *bytes),
            Content::Package(_) => {
                let digest = Published::parse(path).and_then(|published| published.digest);
                fs::read(directory.join(path)).is_ok_and(|there| Some(sha256(&there)) == digest)
            }
        };
        if !good {
            problems.push(format!("{path}: it isn't there, or isn't what its name says"));
        }
    }
    for suite in &plan.suites {
        let directory_of = of_suite(&suite.name);
        let release = text(&format!("{directory_of}/InRelease")).and_then(|signed| key.clear(&signed));
        match release.as_deref().map(|release| (release, apt::date_of(release))) {
            None => problems.push(format!("{directory_of}/InRelease: it isn't there, or its signature isn't good")),
            Some((release, date)) if date.is_none_or(|date| suite.release(date) != release) => {
                problems.push(format!("{directory_of}/InRelease: it isn't of the packages that are there now"));
            }
            Some((release, _)) => {
                let detached = text(&format!("{directory_of}/Release.gpg")).unwrap_or_default();
                let same = text(&format!("{directory_of}/Release")).as_deref() == Some(release);
                if !same || !key.detached(release.as_bytes(), &detached) {
                    problems.push(format!("{directory_of}/Release: it, or its signature, isn't that of InRelease"));
                }
            }
        }
        for (path, content) in &suite.indexes {
            let path = format!("{directory_of}/{path}");
            if !fs::read(directory.join(&path)).is_ok_and(|there| there == *content) {
                problems.push(format!("{path}: it isn't of the packages that are there now"));
            }
        }
    }
    for base in &plan.bases {
        let path = format!("{}/repodata/repomd.xml", base.path);
        let (repomd, signature) = (text(&path).unwrap_or_default(), text(&format!("{path}.asc")).unwrap_or_default());
        if !key.detached(repomd.as_bytes(), &signature) {
            problems.push(format!("{path}: it isn't there, or its signature isn't good"));
        } else if yum::date_of(&repomd).is_none_or(|date| base.repomd(date) != repomd) {
            problems.push(format!("{path}: it isn't of the packages that are there now"));
        }
    }
    problems
}

/// What a machine's administrator writes down once, for the suite of this revision, or the stable one.
pub fn setup(host: &str, revision: Option<&crate::name::Revision>) -> String {
    let suite = suite(revision);
    let base = if suite == STABLE { String::new() } else { format!("{suite}/") };
    format!(
        "# Debian and Ubuntu\n\
         curl -fsSL https://{host}/install/{KEY} | sudo install -D -m 644 /dev/stdin /etc/apt/keyrings/{KEY}\n\
         echo 'deb [signed-by=/etc/apt/keyrings/{KEY}] https://{host}/install/apt {suite} main' |\n    \
         sudo tee /etc/apt/sources.list.d/onboarding.list\n\n\
         # Red Hat and its relatives: /etc/yum.repos.d/onboarding.repo\n\
         [onboarding]\nname=Workload Onboarding\nbaseurl=https://{host}/install/yum/{base}$basearch\nenabled=1\n\
         gpgcheck=1\nrepo_gpgcheck=1\ngpgkey=https://{host}/install/{KEY}\n"
    )
}

/// Beside the directory of packages, never below it.
pub fn default_key(directory: &Path) -> io::Result<PathBuf> {
    let directory = fs::canonicalize(directory)?;
    let name = directory.file_name().and_then(|name| name.to_str());
    match (directory.parent(), name) {
        (Some(parent), Some(name)) => Ok(parent.join(format!("{name}.signing-key.asc"))),
        _ => Err(io::Error::other("nothing is beside it: say where with --signing-key")),
    }
}
