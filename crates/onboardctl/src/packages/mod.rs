//! `onboardctl packages`: the directory that a repository serves. The key that signs stays here, and never goes to the server.

mod build;
mod contents;
mod import;
mod publish;

use crate::outcome::Outcome;
use onboarding_packages::name::{Architecture, Format, Revision};
use std::path::PathBuf;

/// Build, import, list, remove and verify the packages of a repository
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl packages build onboarding-agent.yaml --root out --arch amd64 --version 1.2.3 -o packages
  onboardctl packages import istio-sidecar.deb istio-sidecar.rpm --revision 1-28 --packages packages
  onboardctl packages index --packages packages --host onboarding-endpoint.your-company.corp
  onboardctl packages verify --packages packages")]
pub struct Packages {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    Build(build::Build),
    Import(import::Import),
    List(contents::List),
    Remove(contents::Remove),
    Verify(contents::Verify),
    Index(publish::Index),
}

/// Where the packages are.
#[derive(Debug, clap::Args)]
struct Directory {
    /// The directory of packages
    #[arg(long, value_name = "DIR")]
    packages: PathBuf,
}

impl Packages {
    pub fn run(&self) -> anyhow::Result<Outcome> {
        match &self.verb {
            Verb::Build(verb) => verb.run(),
            Verb::Import(verb) => verb.run(),
            Verb::List(verb) => verb.run(),
            Verb::Remove(verb) => verb.run(),
            Verb::Verify(verb) => verb.run(),
            Verb::Index(verb) => verb.run(),
        }
    }
}

/// `--arch`, in Debian's words for both formats.
fn architecture(text: &str) -> Result<Architecture, String> {
    let found = Architecture::ALL.into_iter().find(|architecture| architecture.name() == text);
    found.ok_or_else(|| "must be amd64 or arm64".to_owned())
}

/// `--format`
fn format(text: &str) -> Result<Format, String> {
    Format::ALL.into_iter().find(|format| format.name() == text).ok_or_else(|| "must be deb or rpm".to_owned())
}

/// `--revision`
fn revision(text: &str) -> Result<Revision, String> {
    let found = Revision::parse(text);
    found.ok_or_else(|| "must be a revision of Istio: at most 56 lower-case letters, digits and '-'".to_owned())
}
