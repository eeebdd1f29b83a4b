//! What can be asked for: a closed set of URIs, read exactly as they are written. Nothing is decoded, so nothing can be smuggled in.

use std::fmt;

/// A kind of package, and how its files end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    Deb,
    Rpm,
}

impl Format {
    const ALL: [Self; 2] = [Self::Deb, Self::Rpm];

    /// The directory, and the end of a file's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deb => "deb",
            Self::Rpm => "rpm",
        }
    }

    /// As IANA and the distributions name it.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Deb => "application/vnd.debian.binary-package",
            Self::Rpm => "application/x-rpm",
        }
    }
}

/// In Debian's words, for both formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Architecture {
    Amd64,
    Arm64,
}

impl Architecture {
    const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

/// A revision of Istio, as `sidecar.istio.revision` of the agent has it: a DNS label of at most 56 characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Revision(String);

impl Revision {
    /// `None`: it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let inside = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let label = (1..=56).contains(&text.len())
            && text.bytes().all(inside)
            && !text.starts_with('-')
            && !text.ends_with('-');
        label.then(|| Self(text.to_owned()))
    }
}

/// What is packed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Product {
    Agent,
    /// Without a revision: the one of the mesh.
    Sidecar(Option<Revision>),
}

impl Product {
    fn name(&self) -> &'static str {
        match self {
            Self::Agent => "onboarding-agent",
            Self::Sidecar(_) => "istio-sidecar",
        }
    }

    fn parse(name: &str, revision: Option<Revision>) -> Option<Self> {
        match (name, revision) {
            ("onboarding-agent", None) => Some(Self::Agent),
            ("istio-sidecar", revision) => Some(Self::Sidecar(revision)),
            _ => None,
        }
    }
}

/// One file of the repository; `Display` is its path below `/install/` and below the directory of packages.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Package {
    pub product: Product,
    pub format: Format,
    pub architecture: Architecture,
}

impl Package {
    /// `onboarding-agent.deb`
    pub fn file_name(&self) -> String {
        format!("{}.{}", self.product.name(), self.format.name())
    }

    /// Those of one product.
    pub fn all_of(product: &Product) -> impl Iterator<Item = Self> {
        Format::ALL.into_iter().flat_map(move |format| {
            Architecture::ALL.map(|architecture| Self { product: product.clone(), format, architecture })
        })
    }

    /// Of a path below `/install/`.
    pub fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.splitn(6, '/').collect();
        let (revision, [format, architecture, file]) = match parts.as_slice() {
            [format, architecture, file] => (None, [*format, *architecture, *file]),
            ["istio-sidecar", revision, format, architecture, file] => {
                (Some(Revision::parse(revision)?), [*format, *architecture, *file])
            }
            _ => return None,
        };
        let format = Format::ALL.into_iter().find(|it| it.name() == format)?;
        let architecture = Architecture::ALL.into_iter().find(|it| it.name() == architecture)?;
        let product = Product::parse(file.strip_suffix(format.name())?.strip_suffix('.')?, revision)?;
        Some(Self { product, format, architecture })
    }
}

impl fmt::Display for Package {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Product::Sidecar(Some(Revision(revision))) = &self.product {
            write!(f, "istio-sidecar/{revision}/")?;
        }
        write!(f, "{}/{}/{}", self.format.name(), self.architecture.name(), self.file_name())
    }
}

/// Everything is below it.
pub const ROOT: &str = "/install/";
/// What a checksum's URI ends in.
pub const CHECKSUM: &str = ".sha256";
/// Below the root: packages by their content.
const BY_CONTENT: &str = "sha256/";

/// The package itself, or what `sha256sum --check` reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Package,
    Checksum,
}

/// What a URI's path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Elsewhere: `/` and `/install`.
    Start,
    /// The directory of this path below the root: empty, or with a `/` at its end.
    Listing(String),
    /// The newest of its name.
    Newest(Package, Part),
    /// That of this content, for as long as it is held: its digest in hexadecimal, and its file's name.
    Content(String, String, Part),
    /// `onboard.sh`
    Script,
    Unknown,
}

impl Target {
    /// Of the path as it was sent.
    pub fn parse(path: &str) -> Self {
        if matches!(path, "/" | "/install") {
            return Self::Start;
        }
        let Some(path) = path.strip_prefix(ROOT) else { return Self::Unknown };
        if path.is_empty() || path.ends_with('/') {
            return Self::Listing(path.to_owned());
        }
        if path == crate::script::NAME {
            return Self::Script;
        }
        let (file, part) = match path.strip_suffix(CHECKSUM) {
            Some(file) => (file, Part::Checksum),
            None => (path, Part::Package),
        };
        if let Some((digest, name)) = file.strip_prefix(BY_CONTENT).and_then(|rest| rest.split_once('/')) {
            return Self::Content(digest.to_owned(), name.to_owned(), part);
        }
        Package::parse(file).map_or(Self::Unknown, |package| Self::Newest(package, part))
    }
}

/// Where that content stays while it is held, even if its name has a newer one.
pub fn by_content(digest: &str, package: &Package) -> String {
    format!("{ROOT}{BY_CONTENT}{digest}/{}", package.file_name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uris_of_the_requirement_are_read_and_written_alike() {
        let revision = Some(Revision::parse("1-28").unwrap());
        let mut all = Vec::new();
        for product in [Product::Agent, Product::Sidecar(None), Product::Sidecar(revision)] {
            all.extend(Package::all_of(&product).map(|package| package.to_string()));
        }
        assert_eq!(
            all,
            [
                "deb/amd64/onboarding-agent.deb",
                "deb/arm64/onboarding-agent.deb",
                "rpm/amd64/onboarding-agent.rpm",
                "rpm/arm64/onboarding-agent.rpm",
                "deb/amd64/istio-sidecar.deb",
                "deb/arm64/istio-sidecar.deb",
                "rpm/amd64/istio-sidecar.rpm",
                "rpm/arm64/istio-sidecar.rpm",
                "istio-sidecar/1-28/deb/amd64/istio-sidecar.deb",
                "istio-sidecar/1-28/deb/arm64/istio-sidecar.deb",
                "istio-sidecar/1-28/rpm/amd64/istio-sidecar.rpm",
                "istio-sidecar/1-28/rpm/arm64/istio-sidecar.rpm",
            ]
        );
        for path in all {
            let package = Package::parse(&path).unwrap();
            assert_eq!(package.to_string(), path);
            assert_eq!(Target::parse(&format!("/install/{path}")), Target::Newest(package.clone(), Part::Package));
            assert_eq!(Target::parse(&format!("/install/{path}.sha256")), Target::Newest(package, Part::Checksum));
        }
    }

    #[test]
    fn anything_else_is_no_package() {
        for path in [
            "deb/amd64/onboarding-agent.rpm",
            "deb/amd64/onboarding-agentdeb",
            "deb/amd64/onboarding-agent",
            "deb/amd64/onboarding-agent.deb/",
            "deb/amd64/onboarding-agent.deb.sha256.sha256",
            "deb//amd64/onboarding-agent.deb",
            "deb/x86_64/onboarding-agent.deb",
            "deb/AMD64/onboarding-agent.deb",
            "deb/amd64/../amd64/onboarding-agent.deb",
            "deb/amd64/%6fnboarding-agent.deb",
            "deb\\amd64\\onboarding-agent.deb",
            "/deb/amd64/onboarding-agent.deb",
            "istio-sidecar/../deb/amd64/istio-sidecar.deb",
            "istio-sidecar/./deb/amd64/istio-sidecar.deb",
            "istio-sidecar//deb/amd64/istio-sidecar.deb",
            "istio-sidecar/-1/deb/amd64/istio-sidecar.deb",
            "istio-sidecar/1.28/deb/amd64/istio-sidecar.deb",
            "istio-sidecar/1-28/deb/amd64/onboarding-agent.deb",
            "istio-sidecar/1-28/deb/amd64/istio-sidecar.deb/x",
            "other/1-28/deb/amd64/istio-sidecar.deb",
        ] {
            assert_eq!(Package::parse(path), None, "{path}");
        }
    }
}
