//! What the indexes of apt and yum are called, below the directory of packages and below `/install/`: a closed set of names.
//!
//! A name with a digest in it never has another content. The others (`InRelease`, `repomd.xml`) are what a client begins with, and the
//! only ones that are replaced.

use crate::name::{Architecture, Revision};

/// The public key that everything is signed with.
pub const KEY: &str = "onboarding.asc";
/// The suite without a revision.
pub const STABLE: &str = "stable";
const COMPONENT: &str = "main";
/// The longest name of a package's file in a pool.
const LONGEST_NAME: usize = 200;

/// One file of the indexes, or of the pools that they refer to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    pub kind: Kind,
    /// The SHA-256 of its content, where its name has it.
    pub digest: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Key,
    Deb,
    Rpm,
    Text,
    /// A detached signature.
    Signature,
    Xml,
    Gzip,
    Xz,
    /// By its digest: in which compression, the index says.
    Opaque,
}

impl Kind {
    /// As IANA has it.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Key => "application/pgp-keys",
            Self::Deb => "application/vnd.debian.binary-package",
            Self::Rpm => "application/x-rpm",
            Self::Text => "text/plain; charset=utf-8",
            Self::Signature => "application/pgp-signature",
            Self::Xml => "application/xml",
            Self::Gzip => "application/gzip",
            Self::Xz => "application/x-xz",
            Self::Opaque => "application/octet-stream",
        }
    }
}

impl Published {
    /// Of a path below `/install/`. `None`: it is none of these names.
    pub fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').collect();
        let (kind, digest) = match parts.as_slice() {
            [name] if *name == KEY => (Kind::Key, None),
            ["apt", "pool", digest, file] => (Kind::Deb, Some(pooled(digest, file, ".deb")?)),
            ["apt", "dists", suite, "InRelease" | "Release"] if is_suite(suite) => (Kind::Text, None),
            ["apt", "dists", suite, "Release.gpg"] if is_suite(suite) => (Kind::Signature, None),
            ["apt", "dists", suite, component, binary, rest @ ..] if is_suite(suite) && *component == COMPONENT => {
                let architecture = binary.strip_prefix("binary-")?;
                Architecture::ALL.into_iter().find(|it| it.name() == architecture)?;
                match rest {
                    ["Packages"] => (Kind::Text, None),
                    ["Packages.gz"] => (Kind::Gzip, None),
                    ["Packages.xz"] => (Kind::Xz, None),
                    ["by-hash", "SHA256", digest] if is_digest(digest) => (Kind::Opaque, Some(*digest)),
                    _ => return None,
                }
            }
            ["yum", base, rest @ ..] if is_base(base) => yum(rest)?,
            ["yum", suite, base, rest @ ..] if *suite != STABLE && is_suite(suite) && is_base(base) => yum(rest)?,
            _ => return None,
        };
        Some(Self { kind, digest: digest.map(str::to_owned) })
    }
}

fn yum<'a>(rest: &[&'a str]) -> Option<(Kind, Option<&'a str>)> {
    match rest {
        ["repodata", "repomd.xml"] => Some((Kind::Xml, None)),
        ["repodata", "repomd.xml.asc"] => Some((Kind::Signature, None)),
        ["repodata", file] => {
            let (digest, name) = file.split_once('-')?;
            let known = ["primary.xml.gz", "filelists.xml.gz", "other.xml.gz"].contains(&name) && is_digest(digest);
            known.then_some((Kind::Gzip, Some(digest)))
        }
        ["pool", digest, file] => Some((Kind::Rpm, Some(pooled(digest, file, ".rpm")?))),
        _ => None,
    }
}

fn pooled<'a>(digest: &'a str, file: &str, end: &str) -> Option<&'a str> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let named = file.len() <= LONGEST_NAME
        && file.strip_suffix(end).is_some_and(|stem| !stem.is_empty() && !stem.starts_with('.'))
        && file.bytes().all(plain);
    (named && is_digest(digest)).then_some(digest)
}

fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

fn is_suite(text: &str) -> bool {
    text == STABLE || text.strip_prefix("istio-").is_some_and(|revision| Revision::parse(revision).is_some())
}

fn is_base(text: &str) -> bool {
    Architecture::ALL.into_iter().any(|it| it.of_rpm() == text)
}

/// `stable`, or `istio-<revision>`: the agent, and the sidecar of that revision in place of the one without.
pub fn suite(revision: Option<&Revision>) -> String {
    revision.map_or_else(|| STABLE.to_owned(), |revision| format!("istio-{}", revision.as_str()))
}

/// `apt/dists/<suite>`
pub fn of_suite(suite: &str) -> String {
    format!("apt/dists/{suite}")
}

/// `main/binary-<arch>`, below the suite's directory.
pub fn of_architecture(architecture: Architecture) -> String {
    format!("{COMPONENT}/binary-{}", architecture.name())
}

/// `yum/<basearch>`, or `yum/istio-<revision>/<basearch>`.
pub fn of_yum(suite: &str, architecture: Architecture) -> String {
    match suite {
        STABLE => format!("yum/{}", architecture.of_rpm()),
        suite => format!("yum/{suite}/{}", architecture.of_rpm()),
    }
}

/// `pool/<digest>/<name>_<version>_<arch>.deb`, in characters that no client writes in another way.
pub fn in_pool(digest: &str, name: &str, version: &str, end: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '_' };
    let stem: String = format!("{name}_{version}").chars().map(plain).take(LONGEST_NAME - 20).collect();
    format!("pool/{digest}/{stem}{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_what_they_are() {
        let hash = "0123456789abcdef".repeat(4);
        let of = |path: &str| Published::parse(&path.replace("/H", &format!("/{hash}")));
        for (path, kind, named) in [
            ("onboarding.asc", Kind::Key, false),
            ("apt/dists/stable/InRelease", Kind::Text, false),
            ("apt/dists/istio-1-28/Release.gpg", Kind::Signature, false),
            ("apt/dists/stable/main/binary-amd64/Packages", Kind::Text, false),
            ("apt/dists/stable/main/binary-arm64/Packages.xz", Kind::Xz, false),
            ("apt/dists/stable/main/binary-arm64/by-hash/SHA256/H", Kind::Opaque, true),
            ("apt/pool/H/onboarding-agent_1.2_x_amd64.deb", Kind::Deb, true),
            ("yum/x86_64/repodata/repomd.xml", Kind::Xml, false),
            ("yum/istio-1-28/aarch64/repodata/repomd.xml.asc", Kind::Signature, false),
            ("yum/x86_64/repodata/H-primary.xml.gz", Kind::Gzip, true),
            ("yum/x86_64/pool/H/istio-sidecar-1.rpm", Kind::Rpm, true),
        ] {
            let found = of(path).unwrap_or_else(|| panic!("{path}"));
            assert_eq!((found.kind, found.digest.is_some()), (kind, named), "{path}");
        }
        for path in [
            "",
            "apt",
            "apt/",
            "apt/dists/stable/",
            "onboarding.key",
            "apt/dists/other/InRelease",
            "apt/dists/stable/../stable/InRelease",
            "apt/dists/istio-/InRelease",
            "apt/pool/H/.deb",
            "apt/pool/H/../x.deb",
            "apt/pool/h/x.deb",
            "apt/pool/H/x.rpm",
            "apt/pool/H/x%2e.deb",
            "yum/amd64/repodata/repomd.xml",
            "yum/stable/x86_64/repodata/repomd.xml",
            "yum/x86_64/repodata/H-primary.xml",
            "yum/x86_64/repodata/x-primary.xml.gz",
            "yum/x86_64/.published.json",
            "apt/dists/stable/main/binary-i386/Packages",
        ] {
            assert_eq!(of(path), None, "{path}");
        }
    }

    #[test]
    fn what_is_put_into_a_pool_can_be_asked_for() {
        let hash = "a".repeat(64);
        for version in ["1.2.3", "1.2~rc1+git-1", "1:2", &"9".repeat(500)] {
            let path = format!("apt/{}", in_pool(&hash, "onboarding-agent", version, "_amd64.deb"));
            assert!(Published::parse(&path).is_some(), "{path}");
        }
    }
}
