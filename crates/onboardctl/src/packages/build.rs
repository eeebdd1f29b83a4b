//! `onboardctl packages build`: a recipe and files to a DEB and an RPM package.

use crate::manifests;
use crate::outcome::{FAILED, Outcome};
use anyhow::{Context, bail};
use onboarding_kinds::recipe::{self, Recipe};
use onboarding_packages::build::{DEFAULT_TIME, Places, Source, Version};
use onboarding_packages::library::Library;
use onboarding_packages::name::{Architecture, Format, Package, Product, Revision};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};

/// Build a DEB and an RPM package from a recipe
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl packages build packaging/onboarding-agent.yaml --root out --arch amd64 --version 1.2.3 -o packages
  onboardctl packages build sidecar.yaml --root istio --arch arm64 --version 1.28.2 --revision 1-28 -o packages

Writes PACKAGES/deb/<arch>/<name>.deb and PACKAGES/rpm/<arch>/<name>.rpm, with --revision below
PACKAGES/istio-sidecar/<revision>/. Each appears whole, also while a repository serves the directory.
The same input gives the same bytes: every time in a package is SOURCE_DATE_EPOCH, or 2026-01-01.
onboardctl packages index signs what was built and makes it known to apt and dnf.

Exit codes: 0 built; 1 faults of the recipe, each a line on standard output, or what can't be read.")]
pub struct Build {
    /// What the packages are made of
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Where the recipe's files are; what isn't there is looked for beside the recipe
    #[arg(long, value_name = "DIR")]
    root: PathBuf,
    /// amd64 or arm64
    #[arg(long, value_parser = super::architecture)]
    arch: Architecture,
    /// As in 1.2.3, or 1.2.3-2 with a revision of the packaging; 1.3~rc1 is before 1.3
    #[arg(long, value_parser = version)]
    version: Version,
    /// The directory of packages
    #[arg(short, long, value_name = "PACKAGES")]
    output: PathBuf,
    /// deb or rpm [default: both]
    #[arg(long, value_parser = super::format)]
    format: Vec<Format>,
    /// The revision of Istio that a sidecar is of
    #[arg(long, value_parser = super::revision)]
    revision: Option<Revision>,
    /// The time of everything in the packages, in seconds since 1970
    #[arg(long, value_name = "SECONDS", env = "SOURCE_DATE_EPOCH", default_value_t = DEFAULT_TIME)]
    time: u32,
}

fn version(text: &str) -> Result<Version, String> {
    let found = Version::parse(text);
    found.ok_or_else(|| {
        "must be digits, letters, '.', '+' and '~', beginning with a digit, with at most one '-' as in 1.2.3-2"
            .to_owned()
    })
}

impl Build {
    pub fn run(&self) -> anyhow::Result<Outcome> {
        let text = manifests::read_file(&self.recipe)?;
        let recipe = match recipe::read(&self.recipe.display().to_string(), &text) {
            Ok(recipe) => recipe,
            Err(faults) => {
                let out = faults.iter().map(|fault| format!("{fault}\n")).collect();
                return Ok(Outcome { out, notes: Vec::new(), code: FAILED });
            }
        };
        let product = self.product(&recipe)?;
        let folder = self.recipe.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
        let places = Places { root: self.root.clone(), folder: folder.to_owned() };
        let source = Source::read(&recipe, &places, &self.version, self.arch, self.time)
            .with_context(|| format!("building from {}", self.recipe.display()))?;
        let formats = if self.format.is_empty() { Format::ALL.to_vec() } else { self.format.clone() };
        let pack = |format| -> anyhow::Result<_> {
            let package = Package { product: product.clone(), format, architecture: self.arch };
            let bytes = source.pack(format).with_context(|| format!("building {package}"))?;
            Ok((package, bytes))
        };
        // At the same time: what takes long is compressing, a processor each.
        let packages = std::thread::scope(|scope| {
            let packing: Vec<_> = formats.into_iter().map(|format| scope.spawn(move || pack(format))).collect();
            let packed = packing.into_iter().map(|one| one.join().unwrap_or_else(|panic| resume_unwind(panic)));
            packed.collect::<anyhow::Result<Vec<_>>>()
        })?;
        Library::open(&self.output)?.put(&packages)?;
        let out = packages.iter().map(|(package, _)| format!("{}\n", self.output.join(package.to_string()).display()));
        Ok(Outcome::text(out.collect()))
    }

    fn product(&self, recipe: &Recipe) -> anyhow::Result<Product> {
        match Product::parse(&recipe.name, self.revision.clone()) {
            Some(product) => Ok(product),
            None if self.revision.is_some() => {
                bail!(
                    "{}: --revision is for istio-sidecar; this recipe's name is {}",
                    self.recipe.display(),
                    recipe.name
                )
            }
            None => bail!(
                "{}: the repository has onboarding-agent and istio-sidecar; this recipe's name is {}",
                self.recipe.display(),
                recipe.name
            ),
        }
    }
}
