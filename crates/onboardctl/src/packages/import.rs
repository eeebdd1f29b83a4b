//! `onboardctl packages import`: packages that somebody else built.

use super::Directory;
use super::publish::Key;
use crate::outcome::Outcome;
use anyhow::{Context, bail};
use onboarding_packages::described::{self, Described};
use onboarding_packages::library::{LARGEST, Library};
use onboarding_packages::name::{Package, Product, Revision};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Put packages into the directory, and publish them
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl packages import out/onboarding-agent.deb out/onboarding-agent.rpm --packages packages
  onboardctl packages import istio-sidecar.deb --revision 1-28 --packages packages

Name, version and architecture are those of the package itself, whatever its file is called: ours, or
Istio's own istio-sidecar.deb and istio-sidecar.rpm. One that is broken, or another's, is refused, and then none
is imported. An RPM package is signed with the repository's key in place of whoever's it has.

Exit codes: 0 imported; 1 nothing was.")]
pub struct Import {
    /// DEB and RPM packages
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    #[command(flatten)]
    directory: Directory,
    /// The revision of Istio that the sidecars are of
    #[arg(long, value_parser = super::revision)]
    revision: Option<Revision>,
    #[command(flatten)]
    key: Key,
}

impl Import {
    pub fn run(&self) -> anyhow::Result<Outcome> {
        let mut packages: Vec<(Package, Vec<u8>)> = Vec::new();
        let mut out = String::new();
        for path in &self.files {
            let bytes = read(path)?;
            let described = Described::read(&bytes).with_context(|| path.display().to_string())?;
            described::check_content(&bytes).with_context(|| path.display().to_string())?;
            let revision = if described.name == "istio-sidecar" { self.revision.clone() } else { None };
            let Some(product) = Product::parse(&described.name, revision) else {
                bail!("{}: this repository has no {}", path.display(), described.name);
            };
            let package = Package { product, format: described.format(), architecture: described.architecture };
            if packages.iter().any(|(there, _)| *there == package) {
                bail!("{}: another of these files is {package} too", path.display());
            }
            out += &format!("{package} {}\n", described.version);
            packages.push((package, bytes));
        }
        let unused = packages.iter().all(|(package, _)| package.product == Product::Agent);
        if let Some(revision) = self.revision.as_ref().filter(|_| unused) {
            bail!("--revision {} is for istio-sidecar, and none of these files is one", revision.as_str());
        }
        let library = Library::open(&self.directory.packages)?;
        library.put(&packages)?;
        let published = self.key.publish(&library)?;
        Ok(Outcome { out, ..published })
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let reading = || format!("reading {}", path.display());
    let mut bytes = Vec::new();
    File::open(path).with_context(reading)?.take(LARGEST + 1).read_to_end(&mut bytes).with_context(reading)?;
    if bytes.len() as u64 > LARGEST {
        bail!("{}: it has more than 4 GiB", path.display());
    }
    Ok(bytes)
}
