//! A recipe and files to packages. The same input gives the same bytes: every time is one, entries are sorted, owners have names, and what
//! compresses has no say of its own.

mod deb;
mod rpm;

use crate::name::{Architecture, Format};
use flate2::{Compression, GzBuilder};
use onboarding_kinds::recipe::{Content, Entry, PackageFormat, Recipe};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Of one file; Envoy has 150 MB.
const LARGEST_FILE: u64 = 1 << 30;
const LARGEST_SCRIPT: u64 = 1 << 20;
/// Level of xz: what unpacks on a small VM needs 9 MiB for it, where the best would need 65. zstd is unknown to dpkg before 1.21.18
/// and to rpm before 4.14.
const XZ: u32 = 6;
/// Where nothing else is said: 2026-01-01T00:00:00Z.
pub const DEFAULT_TIME: u32 = 1_767_225_600;

/// Why a package can't be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: neither {} nor {} is a file", .tried[0].display(), .tried[1].display())]
    NoFile { path: String, tried: [PathBuf; 2] },
    #[error("reading {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("{} has more than {most} bytes", .path.display())]
    TooLarge { path: PathBuf, most: u64 },
    #[error("{}, for {name}, is no script in UTF-8 that begins with #!", .path.display())]
    NoScript { path: PathBuf, name: &'static str },
    #[error("writing the archive")]
    Write(#[from] io::Error),
    #[error("making the RPM package")]
    Rpm(#[from] ::rpm::Error),
}

/// A version: `1.2.3`, or with a packaging revision `1.2.3-2`. Digits, letters, `.`, `+` and `~`, beginning with a digit; `1.2~rc1` is before `1.2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    pub upstream: String,
    pub release: Option<String>,
}

impl Version {
    /// `None`: it is none that both formats take.
    pub fn parse(text: &str) -> Option<Self> {
        let inside = |text: &str| {
            !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".+~".contains(&byte))
        };
        let (upstream, release) = match text.split_once('-') {
            Some((upstream, release)) => (upstream, Some(release)),
            None => (text, None),
        };
        let good = text.len() <= 100
            && upstream.starts_with(|c: char| c.is_ascii_digit())
            && inside(upstream)
            && release.is_none_or(inside);
        good.then(|| Self { upstream: upstream.to_owned(), release: release.map(str::to_owned) })
    }

    /// As Debian writes it.
    pub fn deb(&self) -> String {
        self.release.as_ref().map_or_else(|| self.upstream.clone(), |release| format!("{}-{release}", self.upstream))
    }
}

/// Where a recipe's files are.
#[derive(Debug, Clone)]
pub struct Places {
    /// `--root`
    pub root: PathBuf,
    /// The recipe's own, for what isn't in the root.
    pub folder: PathBuf,
}

/// What is in one format's package, by its path.
type Files<'a> = BTreeMap<&'a str, (&'a Entry, &'a [u8])>;

/// What a package holds, read.
pub struct Source<'a> {
    recipe: &'a Recipe,
    version: &'a Version,
    architecture: Architecture,
    /// Of every entry, in seconds since 1970.
    time: u32,
    files: BTreeMap<&'a str, (&'a Entry, Vec<u8>)>,
    scripts: BTreeMap<&'static str, String>,
}

impl<'a> Source<'a> {
    /// Reads every file that the recipe names.
    ///
    /// # Errors
    /// One isn't there and isn't optional, or is too large.
    pub fn read(
        recipe: &'a Recipe,
        places: &Places,
        version: &'a Version,
        architecture: Architecture,
        time: u32,
    ) -> Result<Self, Error> {
        let mut files = BTreeMap::new();
        for (to, entry) in &recipe.files {
            let content = match &entry.content {
                Content::File { from, optional: true, .. } if places.find(from).is_none() => continue,
                Content::File { from, gzip, .. } => {
                    let content = places.read(from, LARGEST_FILE)?.1;
                    if *gzip { compressed(&content)? } else { content }
                }
                Content::Directory { .. } | Content::Link { .. } => Vec::new(),
            };
            files.insert(to.as_str(), (entry, content));
        }
        let (deb, rpm) = (&recipe.deb_scripts, &recipe.rpm_scripts);
        let named = [
            ("preinst", &deb.preinst),
            ("postinst", &deb.postinst),
            ("prerm", &deb.prerm),
            ("postrm", &deb.postrm),
            ("pre", &rpm.pre),
            ("post", &rpm.post),
            ("preun", &rpm.preun),
            ("postun", &rpm.postun),
            ("posttrans", &rpm.posttrans),
        ];
        let mut scripts = BTreeMap::new();
        for (name, from) in named {
            let Some(from) = from else { continue };
            let (path, content) = places.read(from, LARGEST_SCRIPT)?;
            let script = String::from_utf8(content).ok().filter(|script| script.starts_with("#!"));
            scripts.insert(name, script.ok_or(Error::NoScript { path, name })?);
        }
        Ok(Self { recipe, version, architecture, time, files, scripts })
    }

    /// The package's bytes; an RPM isn't signed yet.
    ///
    /// # Errors
    /// What is in the recipe doesn't fit into the format.
    pub fn pack(&self, format: Format) -> Result<Vec<u8>, Error> {
        match format {
            Format::Deb => deb::pack(self, &self.files_but_of(PackageFormat::Rpm)),
            Format::Rpm => rpm::pack(self, &self.files_but_of(PackageFormat::Deb)),
        }
    }

    fn files_but_of(&self, other: PackageFormat) -> Files<'_> {
        let ours = self.files.iter().filter(|(_, (entry, _))| entry.only != Some(other));
        ours.map(|(path, (entry, content))| (*path, (*entry, content.as_slice()))).collect()
    }
}

impl Places {
    fn tried(&self, from: &str) -> [PathBuf; 2] {
        [&self.root, &self.folder].map(|place| place.join(from))
    }

    fn find(&self, from: &str) -> Option<PathBuf> {
        self.tried(from).into_iter().find(|path| path.is_file())
    }

    fn read(&self, from: &str, most: u64) -> Result<(PathBuf, Vec<u8>), Error> {
        let Some(path) = self.find(from) else {
            return Err(Error::NoFile { path: from.to_owned(), tried: self.tried(from) });
        };
        match read_at_most(&path, most) {
            Ok(Some(content)) => Ok((path, content)),
            Ok(None) => Err(Error::TooLarge { path, most }),
            Err(error) => Err(Error::Read(path, error)),
        }
    }
}

/// `None`: it is larger.
fn read_at_most(path: &Path, most: u64) -> io::Result<Option<Vec<u8>>> {
    let mut content = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut content)?;
    Ok((content.len() as u64 <= most).then_some(content))
}

/// Without a name and a time in it.
pub(crate) fn compressed(content: &[u8]) -> io::Result<Vec<u8>> {
    let mut gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    gzip.write_all(content)?;
    gzip.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_both_formats_take() {
        for text in ["1", "1.2.3", "1.2~rc1", "1.2+git3", "0.1.0-2", "1.28.2-1.el7"] {
            assert_eq!(Version::parse(text).unwrap().deb(), text);
        }
        for text in ["", "v1", "1-", "-1", "1-2-3", "1 2", "1:2", "1/2", "1_2", "~1", "é", &"1".repeat(101)] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }
}
