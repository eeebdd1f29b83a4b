//! Names: of groups, of registrations. A registration's name says whose it is, so two identities never share one.

use crate::identity::{AwsCompute, Fact, Identity};
use sha2::{Digest, Sha256};
use std::fmt;

/// A WorkloadGroup's namespace and name. Ordered by namespace, then name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupName {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for GroupName {
    /// `namespace/name`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Namespace and name of a WorkloadAutoRegistration and of its WorkloadEntry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegistrationName {
    pub namespace: String,
    /// At most 253 characters, a valid name of a Kubernetes resource.
    pub name: String,
}

impl fmt::Display for RegistrationName {
    /// `namespace/name`: the `sub` of a token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Why an identity can't be named.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("{fact} is only claimed, not proven, and the registration's name is made of it")]
    NotProven { fact: &'static str },
    #[error("{fact} is unknown, and the registration's name is made of it")]
    NotStated { fact: &'static str },
    #[error("the issuer {issuer} has no short name in the ControlPlane")]
    NoShortName { issuer: String },
}

/// `<workload-group-name>-<workload-identity>` (reference, section 3).
///
/// Two pairs of group and identity never share a name: where the plain form isn't a valid name, is too long, or could be
/// read in another way, it is slugged and ends in `-x` and 32 hexadecimal digits of a digest over all its parts (128 bits: whoever chooses both of two
/// subjects still can't make them share a name).
pub fn registration_name(
    group: &GroupName,
    identity: &Identity,
    issuer_short_name: Option<&str>,
) -> Result<RegistrationName, NameError> {
    let parts = identity_parts(identity, issuer_short_name)?;
    let plain = format!("{}-{}", group.name, parts.join());
    let name = if is_resource_name(&plain) && !ambiguous(group, &plain, &parts) {
        plain
    } else {
        slugged(&plain, &digest(group, &parts))
    };
    Ok(RegistrationName { namespace: group.namespace.clone(), name })
}

const LONGEST_NAME: usize = 253;
const DIGEST_DIGITS: usize = 32;

/// The identity's part of the name, in pieces: how they are put together is the platform's business.
enum Parts<'a> {
    Ec2 { partition: &'a str, account: &'a str, zone: &'a str, instance: &'a str },
    Ecs { partition: &'a str, account: &'a str, zone: &'a str, cluster: &'a str, task: &'a str },
    Gcp { project: &'a str, zone: &'a str, instance: &'a str },
    Azure { subscription: &'a str, resource_group: &'a str, instance: &'a str },
    Jwt { issuer: &'a str, subject: &'a str },
}

impl Parts<'_> {
    fn join(&self) -> String {
        match self {
            Self::Ec2 { partition, account, zone, instance } => {
                format!("aws-{partition}-{account}-{zone}-ec2-{instance}")
            }
            Self::Ecs { partition, account, zone, cluster, task } => {
                format!("aws-{partition}-{account}-{zone}-ecs-{cluster}-{task}")
            }
            Self::Gcp { project, zone, instance } => format!("gcp-{project}-{zone}-gce-{instance}"),
            Self::Azure { subscription, resource_group, instance } => {
                format!("azure-{subscription}-{resource_group}-compute-{instance}")
            }
            Self::Jwt { issuer, subject } => format!("jwt-{issuer}--{subject}"),
        }
    }

    fn pieces(&self) -> Vec<&str> {
        match self {
            Self::Ec2 { partition, account, zone, instance } => vec!["ec2", partition, account, zone, instance],
            Self::Ecs { partition, account, zone, cluster, task } => {
                vec!["ecs", partition, account, zone, cluster, task]
            }
            Self::Gcp { project, zone, instance } => vec!["gcp", project, zone, instance],
            Self::Azure { subscription, resource_group, instance } => {
                vec!["azure", subscription, resource_group, instance]
            }
            Self::Jwt { issuer, subject } => vec!["jwt", issuer, subject],
        }
    }

    /// Whether each piece can be found again in what [`Parts::join`] makes of them. An issuer's short name has no `--`, so
    /// the subject may be anything.
    fn separable(&self) -> bool {
        // Also not at an edge of the piece, where it would make one together with its neighbour.
        let without = |piece: &str, separators: &[&str]| {
            let piece = format!("-{piece}-");
            separators.iter().all(|separator| !piece.contains(separator))
        };
        let is_zone = |zone: &str| without(zone, &["-ec2-", "-ecs-"]);
        match self {
            Self::Ec2 { partition, account, zone, .. } => {
                is_account(account) && is_partition(partition) && is_zone(zone)
            }
            Self::Ecs { partition, account, zone, task, .. } => {
                is_account(account) && is_partition(partition) && is_zone(zone) && !task.contains('-')
            }
            Self::Gcp { project, zone, .. } => project.bytes().all(|b| b.is_ascii_digit()) && without(zone, &["-gce-"]),
            // A resource group may contain anything that could also be a separator.
            Self::Azure { .. } => false,
            Self::Jwt { issuer, .. } => without(issuer, &["--"]),
        }
    }
}

fn is_account(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit())
}

fn is_partition(text: &str) -> bool {
    text.starts_with("aws") && !text.bytes().any(|b| b.is_ascii_digit())
}

fn identity_parts<'a>(identity: &'a Identity, issuer_short_name: Option<&'a str>) -> Result<Parts<'a>, NameError> {
    fn proven<'a>(fact: &'a Fact<String>, name: &'static str) -> Result<&'a str, NameError> {
        fact.proven().map(String::as_str).ok_or(NameError::NotProven { fact: name })
    }
    /// Nothing that AWS gives a task proves which one it is. Its name is made of what it says of itself, within what is
    /// proven of it (the account); whoever says the same must hold the same key, or is refused while the registration lives.
    fn stated<'a>(fact: &'a Fact<String>, name: &'static str) -> Result<&'a str, NameError> {
        Some(fact.stated().as_str()).filter(|text| !text.is_empty()).ok_or(NameError::NotStated { fact: name })
    }
    Ok(match identity {
        Identity::Aws(aws) => {
            let partition = proven(&aws.partition, "aws.partition")?;
            let account = proven(&aws.account, "aws.account")?;
            match &aws.compute {
                AwsCompute::Ec2 { instance_id, .. } => Parts::Ec2 {
                    partition,
                    account,
                    zone: proven(&aws.zone, "aws.zone")?,
                    instance: proven(instance_id, "aws.ec2.instanceId")?,
                },
                AwsCompute::Ecs { task_id, cluster, .. } => Parts::Ecs {
                    partition,
                    account,
                    zone: stated(&aws.zone, "aws.zone")?,
                    cluster: stated(cluster, "aws.ecs.cluster")?,
                    task: stated(task_id, "aws.ecs.taskId")?,
                },
            }
        }
        Identity::Gcp(gcp) => Parts::Gcp {
            project: proven(&gcp.project_number, "gcp.projectNumber")?,
            zone: proven(&gcp.zone, "gcp.zone")?,
            instance: proven(&gcp.instance_id, "gcp.gce.instanceId")?,
        },
        Identity::Azure(azure) => Parts::Azure {
            subscription: proven(&azure.subscription, "azure.subscription")?,
            resource_group: proven(&azure.resource_group, "azure.resourceGroup")?,
            instance: proven(&azure.instance_id, "azure.compute.instanceId")?,
        },
        Identity::Jwt(jwt) => {
            let issuer = proven(&jwt.issuer, "jwt.issuer")?;
            Parts::Jwt {
                issuer: issuer_short_name.ok_or_else(|| NameError::NoShortName { issuer: issuer.to_owned() })?,
                subject: proven(&jwt.subject, "jwt.subject")?,
            }
        }
    })
}

/// Whether the plain name could also be that of another group, of other pieces, or one that ends in a digest.
fn ambiguous(group: &GroupName, plain: &str, parts: &Parts<'_>) -> bool {
    let group_part = format!("-{}-", group.name);
    let has_platform = ["-aws-", "-gcp-", "-azure-", "-jwt-"].iter().any(|platform| group_part.contains(platform));
    has_platform || !parts.separable() || ends_in_digest(plain)
}

fn ends_in_digest(name: &str) -> bool {
    name.len() > DIGEST_DIGITS + 2
        && name.is_char_boundary(name.len() - DIGEST_DIGITS - 2)
        && name[name.len() - DIGEST_DIGITS - 2..]
            .strip_prefix("-x")
            .is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)))
}

/// An RFC 1123 subdomain: what Kubernetes takes as a resource's name.
pub fn is_resource_name(name: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_digit() || b.is_ascii_lowercase();
    name.len() <= LONGEST_NAME
        && name.split('.').all(|label| {
            label.bytes().next().is_some_and(alphanumeric)
                && label.bytes().next_back().is_some_and(alphanumeric)
                && label.bytes().all(|b| alphanumeric(b) || b == b'-')
        })
}

fn digest(group: &GroupName, parts: &Parts<'_>) -> String {
    let mut hash = Sha256::new();
    for piece in std::iter::once(group.name.as_str()).chain(parts.pieces()) {
        hash.update((piece.len() as u64).to_be_bytes());
        hash.update(piece.as_bytes());
    }
    hash.finalize().iter().take(DIGEST_DIGITS / 2).map(|byte| format!("{byte:02x}")).collect()
}

/// Readable as far as a name may be, then the digest.
fn slugged(plain: &str, digest: &str) -> String {
    let mut slug = String::with_capacity(LONGEST_NAME);
    for c in plain.chars().map(|c| c.to_ascii_lowercase()) {
        if slug.len() + digest.len() + 2 >= LONGEST_NAME {
            break;
        }
        match c {
            'a'..='z' | '0'..='9' => slug.push(c),
            _ if slug.is_empty() || slug.ends_with("--") => {}
            _ => slug.push('-'),
        }
    }
    format!("{}-x{digest}", slug.trim_end_matches('-'))
}

#[cfg(test)]
#[path = "name_tests.rs"]
mod tests;
