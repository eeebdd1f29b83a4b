//! `install.tetrate.io/v1alpha1` ControlPlane: the part that is ours. The rest is preserved by never being looked at.

use std::time::Duration;

#[derive(Debug, Clone, PartialEq)]
pub struct ControlPlane {
    pub namespace: String,
    pub name: String,
    /// `spec.meshExpansion.onboarding`; absent: not enabled.
    pub onboarding: Option<Onboarding>,
    pub custom_gateway: Option<CustomGateway>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct CustomGateway {
    pub host: String,
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Onboarding {
    pub hosts: Vec<String>,
    pub secret_name: String,
    pub uid: Option<String>,
    pub token_expiration: Duration,
    pub local_repository: bool,
    pub issuers: Vec<JwtIssuer>,
    pub propagation_delay: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub struct JwtIssuer {
    pub issuer: String,
    pub short_name: String,
    /// At most one of the two.
    pub jwks_uri: Option<String>,
    pub jwks: Option<String>,
    /// As RFC 9535 reads it: the short form `.a` has become `$.a`.
    pub attributes_json_path: Option<String>,
}
