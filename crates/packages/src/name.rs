//! What a package is called, and where it lies below the directory of packages: a closed set of names.

use std::fmt;

/// A kind of package, and how its files end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    Deb,
    Rpm,
}

impl Format {
    pub const ALL: [Self; 2] = [Self::Deb, Self::Rpm];

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
    pub const ALL: [Self; 2] = [Self::Amd64, Self::Arm64];

    pub fn name(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// In RPM's words.
    pub fn of_rpm(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
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

    pub fn as_str(&self) -> &str {
        &self.0
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
    pub fn name(&self) -> &'static str {
        match self {
            Self::Agent => "onboarding-agent",
            Self::Sidecar(_) => "istio-sidecar",
        }
    }

    /// `None`: it is none of ours, or has no revisions.
    pub fn parse(name: &str, revision: Option<Revision>) -> Option<Self> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_read_as_it_is_written() {
        let revision = Revision::parse("1-28");
        for product in [Product::Agent, Product::Sidecar(None), Product::Sidecar(revision)] {
            for package in Package::all_of(&product) {
                assert_eq!(Package::parse(&package.to_string()), Some(package));
            }
        }
    }

    #[test]
    fn an_agent_has_no_revision() {
        assert_eq!(Product::parse("onboarding-agent", Revision::parse("1-28")), None);
        assert_eq!(Product::parse("curl", None), None);
    }
}
