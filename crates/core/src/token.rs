//! The Workload Onboarding Token: its claims, and the rules by which one is accepted. Signing and parsing are the endpoint's.

use crate::identity::{Identity, Thumbprint};
use crate::name::{GroupName, RegistrationName};
use jiff::Timestamp;

/// Reference, section 7, plus `cnf` (RFC 7800), which binds the token to the agent's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// `iss`, `azp` and `aud`: the plane's UID.
    pub plane_uid: String,
    /// `sub`: `<namespace>/<war name>`.
    pub subject: RegistrationName,
    pub issued_at: Timestamp,
    pub expires_at: Timestamp,
    /// `jti`.
    pub id: String,
    /// `claims.workload`: only what was proven.
    pub workload: Identity,
    /// `claims.workload_group`.
    pub group: GroupName,
    /// `cnf.x5t#S256`-like member `cnf.kid`: the thumbprint of the agent's key, in hex.
    pub key: Thumbprint,
}
