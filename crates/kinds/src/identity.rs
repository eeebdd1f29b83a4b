//! Identities as resources (camelCase), as token claims (snake_case), and as the files that `onboardctl explain` reads.

use crate::fault::Fault;
use onboarding_core::identity::Identity;
use serde_json::Value;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    Camel,
    Snake,
}

/// Only what was proven: `spec.identity` of a war, `claims.workload` of a token.
pub fn to_json(identity: &Identity, case: Case) -> Value {
    let _ = (identity, case);
    unimplemented!()
}

/// An identity in a resource, claim or file: either case. Every fact in it counts as proven, except those that
/// `claimed_only` names (`aws.ec2.iamRole`); an unknown name in it is an error.
///
/// Only for what was attested before: our own tokens (after their signature was verified), our own registry, and `explain`.
pub fn from_json(value: &Value, claimed_only: &[String]) -> Result<Identity, String> {
    let _ = (value, claimed_only);
    unimplemented!()
}

/// The identity file of `onboardctl explain`: section 3 of the reference, with the optional key `claimedOnly`. YAML or JSON.
pub fn read_identity_file(file: &str, text: &str) -> Result<Identity, Vec<Fault>> {
    let _ = (file, text);
    unimplemented!()
}
