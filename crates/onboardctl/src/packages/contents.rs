//! `onboardctl packages list`, `remove` and `verify`: what is in the directory.

use super::Directory;
use super::publish::Key;
use crate::outcome::{FAILED, Format, Outcome, json, printable};
use anyhow::bail;
use onboarding_packages::library::Library;
use onboarding_packages::name::Package;
use onboarding_packages::published;
use serde_json::{Value, json};

/// Say what is in the directory
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl packages list --packages packages
  onboardctl packages list --packages packages -o json

Exit codes: 0; 1 if a package can't be served, which is said on standard error.")]
pub struct List {
    #[command(flatten)]
    directory: Directory,
    /// How to say it
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

/// Take packages away, and publish what is left
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  onboardctl packages remove istio-sidecar/1-27/deb/amd64/istio-sidecar.deb --packages packages")]
pub struct Remove {
    /// As packages list says it
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<String>,
    #[command(flatten)]
    directory: Directory,
    #[command(flatten)]
    key: Key,
}

/// Check every package, index and signature
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  onboardctl packages verify --packages packages

Each problem is a line on standard output: a package that is broken or not signed, an index that is missing,
of other packages than there are, or not signed by the key in PACKAGES/onboarding.asc. Needs no signing key.

Exit codes: 0 none; 1 problems.")]
pub struct Verify {
    #[command(flatten)]
    directory: Directory,
}

impl List {
    pub fn run(&self) -> anyhow::Result<Outcome> {
        let (held, faulty) = published::read(&self.directory.packages)?;
        let rows: Vec<[String; 6]> = held
            .iter()
            .map(|held| {
                [
                    held.package.to_string(),
                    held.described.name.clone(),
                    held.described.version.clone(),
                    held.described.architecture.name().to_owned(),
                    held.length.to_string(),
                    held.digest.clone(),
                ]
            })
            .collect();
        let out = match self.output {
            Format::Json => {
                let items = rows.iter().zip(&held).map(|([path, name, version, arch, _, sha256], held)| {
                    json!({ "path": path, "name": name, "version": version, "arch": arch, "size": held.length, "sha256": sha256 })
                });
                json(&json!({ "items": items.collect::<Vec<Value>>() }))
            }
            Format::Text => table(&rows),
        };
        let notes = faulty.iter().map(|it| format!("onboardctl: {}: {}", it.package, it.fault)).collect();
        let code = if faulty.is_empty() { 0 } else { FAILED };
        Ok(Outcome { out, notes, code })
    }
}

fn table(rows: &[[String; 6]]) -> String {
    let heads = ["PATH", "NAME", "VERSION", "ARCH", "SIZE", "SHA256"].map(str::to_owned);
    let all: Vec<_> = [&heads].into_iter().chain(rows).collect();
    let width = |column: usize| all.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let line = |row: &[String; 6]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{:width$}", printable(cell)));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    all.into_iter().map(line).collect()
}

impl Remove {
    pub fn run(&self) -> anyhow::Result<Outcome> {
        let mut packages = Vec::new();
        for path in &self.paths {
            match Package::parse(path) {
                Some(package) => packages.push(package),
                None => bail!("{path} is no package's path; packages list says which there are"),
            }
        }
        let library = Library::open(&self.directory.packages)?;
        if let Some(absent) = packages.iter().find(|it| !library.directory().join(it.to_string()).exists()) {
            bail!("{absent} is not there; packages list says which are");
        }
        for package in &packages {
            library.remove(package)?;
        }
        self.key.publish(&library)
    }
}

impl Verify {
    pub fn run(&self) -> anyhow::Result<Outcome> {
        let problems = published::verify(&self.directory.packages)?;
        let code = if problems.is_empty() { 0 } else { FAILED };
        let out = problems.iter().map(|problem| format!("{}\n", printable(problem))).collect();
        Ok(Outcome { out, notes: Vec::new(), code })
    }
}
