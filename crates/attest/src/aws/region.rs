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
    use onboarding_wire::proof::sts_host;

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

    /// The hosts as AWS documents them, and one of each partition.
    #[test]
    fn sts_is_asked_at_its_partitions_host() {
        let hosts = [
            ("aws", "us-east-2", "sts.us-east-2.amazonaws.com"),
            ("aws", "eu-central-1", "sts.eu-central-1.amazonaws.com"),
            ("aws", "us-west-1", "sts.us-west-1.amazonaws.com"),
            ("aws-cn", "cn-north-1", "sts.cn-north-1.amazonaws.com.cn"),
            ("aws-cn", "cn-northwest-1", "sts.cn-northwest-1.amazonaws.com.cn"),
            ("aws-us-gov", "us-gov-west-1", "sts.us-gov-west-1.amazonaws.com"),
            ("aws-us-gov", "us-gov-east-1", "sts.us-gov-east-1.amazonaws.com"),
            ("aws-iso", "us-iso-east-1", "sts.us-iso-east-1.c2s.ic.gov"),
            ("aws-iso-b", "us-isob-east-1", "sts.us-isob-east-1.sc2s.sgov.gov"),
            ("aws-iso-e", "eu-isoe-west-1", "sts.eu-isoe-west-1.cloud.adc-e.uk"),
            ("aws-iso-f", "us-isof-south-1", "sts.us-isof-south-1.csp.hci.ic.gov"),
            ("aws-eusc", "eusc-de-east-1", "sts.eusc-de-east-1.amazonaws.eu"),
        ];
        for (name, region, host) in hosts {
            assert_eq!((partition(region), sts_host(region).as_str()), (Some(name), host));
        }
        for (name, _) in PARTITIONS {
            assert!(hosts.iter().any(|(known, ..)| known == name), "no host of {name} is known here");
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
