//! `onboardctl packages index`, and the indexing after each change of the directory.

use super::Directory;
use crate::outcome::Outcome;
use anyhow::{Context, bail};
use jiff::Timestamp;
use onboarding_packages::key::SigningKey;
use onboarding_packages::library::Library;
use onboarding_packages::name::Revision;
use onboarding_packages::published;
use std::path::PathBuf;

/// Sign the packages, and make them known to apt and dnf
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  onboardctl packages index --packages packages
  onboardctl packages index --packages packages --host onboarding-endpoint.your-company.corp

Signs the RPM packages and the indexes below PACKAGES/apt and PACKAGES/yum, and leaves the public key in
PACKAGES/onboarding.asc. import and remove do the same; it is needed after build, and after
files were put into the directory by hand. With --host it prints what a VM's administrator writes down once.

The key is made where there is none: PACKAGES.signing-key.asc, beside the directory. Keep it, and keep it
from the server: whoever has it can give VMs packages of their own making.")]
pub struct Index {
    #[command(flatten)]
    directory: Directory,
    #[command(flatten)]
    key: Key,
    /// The repository's DNS name, in what is printed
    #[arg(long, value_name = "HOST", value_parser = host)]
    host: Option<String>,
    /// Print it for the VMs of this revision of Istio
    #[arg(long, value_parser = super::revision, requires = "host")]
    revision: Option<Revision>,
}

/// What signs.
#[derive(Debug, clap::Args)]
pub(super) struct Key {
    /// An OpenPGP secret key in ASCII armor, mode 0600 [default: PACKAGES.signing-key.asc]
    #[arg(long, value_name = "FILE")]
    signing_key: Option<PathBuf>,
}

/// A DNS name or an address, with a port or without: it is printed into commands.
fn host(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
    match (1..=255).contains(&text.len()) && text.bytes().all(plain) {
        true => Ok(text.to_owned()),
        false => Err("must be a DNS name".to_owned()),
    }
}

impl Index {
    pub fn run(&self) -> anyhow::Result<Outcome> {
        let directory = &self.directory.packages;
        if !directory.is_dir() {
            bail!("{} is no directory; packages build and packages import make it", directory.display());
        }
        let library = Library::open(directory)?;
        let mut outcome = self.key.publish(&library)?;
        if let Some(host) = &self.host {
            outcome.out = published::setup(host, self.revision.as_ref());
        }
        Ok(outcome)
    }
}

impl Key {
    /// What was done is in the notes.
    pub fn publish(&self, library: &Library) -> anyhow::Result<Outcome> {
        let now = u32::try_from(Timestamp::now().as_second()).context("this machine's clock is wrong")?;
        let path = match &self.signing_key {
            Some(path) => path.clone(),
            None => published::default_key(library.directory()).context("finding a place for the signing key")?,
        };
        let (key, made) = SigningKey::load_or_make(&path, library.directory(), now)?;
        let mut notes = Vec::new();
        if made {
            notes.push(format!("made the signing key {}: keep it, and keep it from the server", path.display()));
        }
        match published::publish(library, &key, now)? {
            published::Outcome::Published { suites, signed } => {
                notes.extend(signed.iter().map(|package| format!("signed {package}")));
                notes.push(format!("published {}, signed by {}", suites.join(", "), key.fingerprint()));
            }
            published::Outcome::Unchanged => notes.push("everything is published already".to_owned()),
        }
        Ok(Outcome { notes, ..Outcome::default() })
    }
}
