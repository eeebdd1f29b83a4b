//! Names: of groups, of registrations. A registration's name says whose it is, so two identities never share one.

use crate::identity::Identity;
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
    #[error("the issuer {issuer} has no short name in the ControlPlane")]
    NoShortName { issuer: String },
}

/// `<workload-group-name>-<workload-identity>` (reference, section 3).
pub fn registration_name(
    group: &GroupName,
    identity: &Identity,
    issuer_short_name: Option<&str>,
) -> Result<RegistrationName, NameError> {
    let _ = (group, identity, issuer_short_name);
    unimplemented!()
}
