//! What can be asked for: a closed set of URIs, read exactly as they are written. Nothing is decoded, so nothing can be smuggled in.

use onboarding_packages::index::Published;
pub use onboarding_packages::name::Package;

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
    /// A file of the signed repository, at this path below the root.
    Published(String, Published),
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
        if let Some(published) = Published::parse(path) {
            return Self::Published(path.to_owned(), published);
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
    use onboarding_packages::index::Kind;
    use onboarding_packages::name::{Product, Revision};

    #[test]
    fn the_signed_repository_has_uris_of_its_own() {
        for (path, kind) in [("onboarding.asc", Kind::Key), ("apt/dists/stable/InRelease", Kind::Text)] {
            let published = Published { kind, digest: None };
            assert_eq!(Target::parse(&format!("/install/{path}")), Target::Published(path.to_owned(), published));
        }
        assert_eq!(Target::parse("/install/apt/dists/stable/InRelease.sha256"), Target::Unknown);
        assert_eq!(Target::parse("/install/.published.json"), Target::Unknown);
    }

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
