//! Regions by their names: the partition that each belongs to.

/// A partition's name and what its regions begin with, the longer before the shorter (AWS's `partitions.json`).
const PARTITIONS: &[(&str, &[&str])] = &[
    ("aws-cn", &["cn-"]),
    ("aws-us-gov", &["us-gov-"]),
    ("aws-iso", &["us-iso-"]),
    ("aws-iso-b", &["us-isob-"]),
    ("aws-iso-e", &["eu-isoe-"]),
    ("aws-iso-f", &["us-isof-"]),
    ("aws-eusc", &["eusc-"]),
    ("aws", &["af-", "ap-", "ca-", "eu-", "il-", "me-", "mx-", "sa-", "us-"]),
];

/// The partition of a region, by the region's name: a well-formed one of a known partition (`us-east-2`, `us-gov-west-1`), else `None`.
///
/// Whether AWS has this region isn't asked: new ones appear. What a name can't do is name another host than one of AWS's.
pub fn partition(region: &str) -> Option<&'static str> {
    is_well_formed(region).then_some(())?;
    let belongs = |(_, prefixes): &&(&str, &[&str])| prefixes.iter().any(|prefix| region.starts_with(prefix));
    PARTITIONS.iter().find(belongs).map(|(name, _)| *name)
}

/// Lower-case words of at most 12 letters and a number at the end, between hyphens; three parts or more.
fn is_well_formed(region: &str) -> bool {
    let parts: Vec<&str> = region.split('-').collect();
    let Some((number, words)) = parts.split_last() else { return false };
    (2..=4).contains(&words.len())
        && words.iter().all(|word| (1..=12).contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_lowercase()))
        && (1..=2).contains(&number.len())
        && number.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_belongs_to_one_partition() {
        for (region, name) in [
            ("us-east-2", Some("aws")),
            ("ap-southeast-7", Some("aws")),
            ("cn-northwest-1", Some("aws-cn")),
            ("us-gov-west-1", Some("aws-us-gov")),
            ("us-iso-east-1", Some("aws-iso")),
            ("us-isob-east-1", Some("aws-iso-b")),
            ("us-isof-south-1", Some("aws-iso-f")),
            ("eu-isoe-west-1", Some("aws-iso-e")),
            ("eusc-de-east-1", Some("aws-eusc")),
        ] {
            assert_eq!(partition(region), name, "{region}");
        }
    }

    #[test]
    fn what_could_name_another_host_is_no_region() {
        for region in [
            "",
            "us-east",
            "us-east-2.evil.example/",
            "us-east-2@evil",
            "US-EAST-2",
            "xx-east-2",
            "us-east-222",
            "us--east-2",
            "us-east-2\n",
        ] {
            assert_eq!(partition(region), None, "{region:?}");
        }
    }
}
