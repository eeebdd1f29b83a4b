//! The indexes of apt: `Packages` and `Release` (Debian's wiki, "DebianRepository/Format").
//!
//! Clients get the indexes by their digests (`Acquire-By-Hash`), so that everything hangs on one file that is replaced whole: `InRelease`.
//! There is no `Valid-Until`: whoever signs is a person at a terminal, not a job that renews, and a machine that was off for months, or a
//! repository that nobody had to change for a year, must go on working. TLS says that the answer is of today.

use crate::build::compressed;
use crate::described::{Described, Details};
use crate::index::{in_pool, of_architecture, of_suite};
use crate::name::Architecture;
use jiff::Timestamp;
use liblzma::write::XzEncoder;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};

/// Fields that the index has, whatever a package says.
const OURS: [&str; 6] = ["filename", "size", "md5sum", "sha1", "sha256", "sha512"];

/// One suite, without a date.
pub(crate) struct Suite {
    pub name: String,
    /// By their paths below the suite's directory: the indexes under their usual names.
    pub indexes: BTreeMap<String, Vec<u8>>,
    /// Of each of them.
    pub digests: BTreeMap<String, String>,
}

impl Suite {
    /// Of these packages, by their digests and lengths.
    pub fn new(name: &str, packages: &[(&Described, &str, u64)]) -> io::Result<Self> {
        let mut indexes = BTreeMap::new();
        for architecture in Architecture::ALL {
            let mut text = String::new();
            for (described, digest, length) in packages {
                if described.architecture == architecture {
                    stanza(&mut text, described, digest, *length);
                }
            }
            let path = format!("{}/Packages", of_architecture(architecture));
            let mut xz = XzEncoder::new(Vec::new(), 6);
            xz.write_all(text.as_bytes())?;
            indexes.insert(format!("{path}.gz"), compressed(text.as_bytes())?);
            indexes.insert(format!("{path}.xz"), xz.finish()?);
            indexes.insert(path, text.into_bytes());
        }
        let digests = indexes.iter().map(|(path, content)| (path.clone(), crate::sha256(content))).collect();
        Ok(Self { name: name.to_owned(), indexes, digests })
    }

    /// The path of one index by its digest, below the directory of packages.
    pub fn by_hash(&self, path: &str) -> Option<String> {
        let (directory, _) = path.rsplit_once('/')?;
        Some(format!("{}/{directory}/by-hash/SHA256/{}", of_suite(&self.name), self.digests.get(path)?))
    }

    /// `Release`, of this date in seconds since 1970.
    pub fn release(&self, date: u32) -> String {
        let name = &self.name;
        let architectures = Architecture::ALL.map(Architecture::name).join(" ");
        let mut text = format!(
            "Origin: Workload Onboarding\nLabel: Workload Onboarding\nSuite: {name}\nCodename: {name}\nDate: {}\n\
             Architectures: {architectures}\nComponents: main\nAcquire-By-Hash: yes\n\
             Description: Workload Onboarding Agent and Istio sidecar\nSHA256:\n",
            rfc2822(date)
        );
        for (path, content) in &self.indexes {
            let digest = self.digests.get(path).map(String::as_str).unwrap_or_default();
            let _ = writeln!(text, " {digest} {:>8} {path}", content.len());
        }
        text
    }
}

/// In English and UTC, whatever this machine has.
fn rfc2822(date: u32) -> String {
    let time = Timestamp::from_second(date.into()).unwrap_or(Timestamp::UNIX_EPOCH);
    time.strftime("%a, %d %b %Y %H:%M:%S UTC").to_string()
}

/// What `Date` of a `Release` says.
pub(crate) fn date_of(release: &str) -> Option<u32> {
    let date = release.lines().find_map(|line| line.strip_prefix("Date: "))?.strip_suffix(" UTC")?;
    let time = Timestamp::strptime("%a, %d %b %Y %H:%M:%S %z", format!("{date} +0000")).ok()?;
    u32::try_from(time.as_second()).ok()
}

fn stanza(text: &mut String, described: &Described, digest: &str, length: u64) {
    let Details::Deb(fields) = &described.details else { return };
    for (name, value) in fields {
        if !OURS.contains(&name.to_lowercase().as_str()) {
            let _ = writeln!(text, "{name}: {value}");
        }
    }
    let end = format!("_{}.deb", described.architecture.name());
    let _ = writeln!(text, "Filename: {}", in_pool(digest, &described.name, &described.version, &end));
    let _ = writeln!(text, "Size: {length}\nSHA256: {digest}\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_read_as_it_was_written() {
        assert_eq!(rfc2822(1_767_225_600), "Thu, 01 Jan 2026 00:00:00 UTC");
        for date in [0, 1, 1_767_225_600, u32::MAX] {
            assert_eq!(date_of(&format!("Suite: x\nDate: {}\nSHA256:\n", rfc2822(date))), Some(date));
        }
        assert_eq!(date_of("Date: yesterday UTC\n"), None);
    }
}
