//! Where the agent puts each resource of a boot configuration, so that Envoy finds it by the path that the plane wrote into the resources.
//!
//! Envoy's file subscriptions take *one* resource of EDS and of RDS per file (`Unexpected EDS resource length: 2`, Envoy 1.40),
//! so each ClusterLoadAssignment and each RouteConfiguration has a file of its own; all listeners share one, and all clusters.

use crate::onboarding::{Splice, XdsType};
use aws_lc_rs::digest::{SHA256, digest};
use std::fmt::Write;

/// All listeners, as a DiscoveryResponse; relative to Envoy's working directory.
pub const LISTENERS: &str = "xds/lds.json";
/// All clusters.
pub const CLUSTERS: &str = "xds/cds.json";

/// The file, relative to Envoy's working directory, that holds this resource (in a DiscoveryResponse: `{"version_info", "resources": [...]}`).
/// An ENDPOINT and a ROUTE have theirs alone: `xds/eds/<name>-<16 hex digits>.json`, `xds/rds/...`. `None` for an unspecified type.
///
/// Envoy watches these paths for renames, and refuses a cluster or a listener whose file isn't there: write ENDPOINT and ROUTE files before
/// `cds.json`, that before `lds.json`, and remove what is gone afterwards.
pub fn file(kind: XdsType, name: &str) -> Option<String> {
    match kind {
        XdsType::Listener => Some(LISTENERS.to_owned()),
        XdsType::Cluster => Some(CLUSTERS.to_owned()),
        XdsType::Endpoint => Some(format!("xds/eds/{}.json", stem(name))),
        XdsType::Route => Some(format!("xds/rds/{}.json", stem(name))),
        XdsType::Unspecified => None,
    }
}

/// The name as far as a file's name may carry it, and a digest of all of it: no two names share a file, none leaves its directory.
fn stem(name: &str) -> String {
    let mut stem: String = name
        .chars()
        .take(120)
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '_' })
        .collect::<String>()
        .trim_start_matches('.')
        .to_owned();
    stem.push('-');
    for byte in &digest(&SHA256, name.as_bytes()).as_ref()[..8] {
        let _ = write!(stem, "{byte:02x}");
    }
    stem
}

/// What the splices make of `base`. `None` where they aren't of such a base: not one after the other, or not within it.
pub fn spliced(base: &[u8], splices: &[Splice]) -> Option<Vec<u8>> {
    let inserted: usize = splices.iter().map(|splice| splice.insert.len()).sum();
    let mut made = Vec::with_capacity(base.len() + inserted);
    let mut kept_from = 0;
    for splice in splices {
        let offset = usize::try_from(splice.offset).ok()?;
        made.extend_from_slice(base.get(kept_from..offset)?);
        made.extend_from_slice(&splice.insert);
        kept_from = offset.checked_add(usize::try_from(splice.length).ok()?)?;
    }
    made.extend_from_slice(base.get(kept_from..)?);
    Some(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn splice(offset: u64, length: u64, insert: &'static str) -> Splice {
        Splice { offset, length, insert: insert.into() }
    }

    #[test]
    fn splices_replace_what_is_at_their_places() {
        let made = |splices: &[Splice]| {
            spliced(b"0123456789", splices).map(|made| String::from_utf8(made).unwrap_or_default())
        };
        assert_eq!(made(&[]).as_deref(), Some("0123456789"));
        assert_eq!(made(&[splice(0, 0, "<"), splice(3, 2, "x"), splice(10, 0, ">")]).as_deref(), Some("<012x56789>"));
        assert_eq!(made(&[splice(0, 10, "")]).as_deref(), Some(""));
        for refused in [
            &[splice(11, 0, "x")][..],
            &[splice(9, 2, "")],
            &[splice(5, 0, "x"), splice(4, 1, "")],
            &[splice(3, 2, "x"), splice(4, 1, "")],
            &[splice(u64::MAX, 1, "")],
            &[splice(1, u64::MAX, "")],
        ] {
            assert_eq!(made(refused), None, "{refused:?}");
        }
    }

    #[test]
    fn each_route_and_assignment_has_a_file_of_its_own_inside_the_directory() {
        let names = ["outbound|8080||a.b", "outbound_8080__a.b", "../../etc/passwd", "", "..", &"x".repeat(300)];
        let mut files: Vec<_> = names.iter().filter_map(|name| file(XdsType::Endpoint, name)).collect();
        for file in &files {
            let leaf = file.strip_prefix("xds/eds/").unwrap_or_default();
            assert!(!leaf.contains('/') && !leaf.starts_with('.') && leaf.len() < 200, "{file}");
        }
        files.sort();
        files.dedup();
        assert_eq!(files.len(), names.len());
        let route = file(XdsType::Route, "127.0.0.2_8080").unwrap_or_default();
        assert!(route.starts_with("xds/rds/127.0.0.2_8080-") && route.ends_with(".json"), "{route}");
        assert_eq!(file(XdsType::Listener, "a"), Some(LISTENERS.to_owned()));
        assert_eq!(file(XdsType::Unspecified, "a"), None);
    }
}
