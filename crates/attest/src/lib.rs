//! Evidence in, proven identity out.
//!
//! Verifying is pure; what fetches keys or asks STS stands apart, behind a trait that the verification doesn't know.
//! Nothing here decides about policies, and nothing here logs a credential.

pub mod aws;
mod fetch;
pub mod jwt;
mod strict_json;

use aws::certificates::Certificates;
use aws::sts::{Callers, Sts};
use jiff::Timestamp;
use jwt::jwks::KeyStore;
use onboarding_core::identity::{Attested, Thumbprint};
use onboarding_wire::onboarding::{AwsEc2Credential, AwsEcsCredential, JwtCredential};

/// What an agent presents.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "one lives for the time of a call; a box would be in every caller's way")]
pub enum Evidence {
    AwsEc2(AwsEc2Credential),
    AwsEcs(AwsEcsCredential),
    Jwt(JwtCredential),
}

/// For whom and when it is presented. The key's possession was proven over `challenge` before.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    pub plane_uid: &'a str,
    pub challenge: &'a [u8],
    pub key: Thumbprint,
    pub now: Timestamp,
    pub issuers: &'a [jwt::Issuer],
}

/// How the attestors are set up; the default is AWS as it is, and the system's roots.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// PEM of further regions' certificates, each after a line `# <region>`; the plane warns when this is used.
    pub extra_aws_certificates: Option<String>,
    /// Where STS is asked instead of at AWS (`http://127.0.0.1:8443`); the `Host` stays AWS's. The plane warns when this is used.
    pub sts_endpoint: Option<String>,
    /// PEM of CAs that issuers' servers of keys may have besides those of the system's trust store.
    pub extra_roots_pem: Option<String>,
}

/// All attestors, with their caches.
pub struct Attestors {
    certificates: Certificates,
    callers: Callers,
    keys: KeyStore,
}

impl Attestors {
    /// Errors name the option that can't be used.
    pub fn new(options: Options) -> Result<Self, AttestError> {
        let unusable = AttestError::Refused;
        let mut certificates = Certificates::published().map_err(|error| unusable(error.to_string()))?;
        if let Some(extra) = &options.extra_aws_certificates {
            certificates.add(extra).map_err(|error| unusable(error.to_string()))?;
        }
        let sts = Sts::new(options.sts_endpoint).map_err(unusable)?;
        let keys = KeyStore::new(options.extra_roots_pem.as_deref()).map_err(unusable)?;
        Ok(Self { certificates, callers: Callers::new(Box::new(sts)), keys })
    }

    /// Who presents this evidence, as far as it is proven.
    pub async fn attest(&self, evidence: &Evidence, context: Context<'_>) -> Result<Attested, AttestError> {
        match evidence {
            Evidence::AwsEc2(credential) => aws::attest(&self.certificates, &self.callers, credential, context).await,
            Evidence::AwsEcs(credential) => aws::ecs::attest(&self.callers, credential, context).await,
            Evidence::Jwt(credential) => jwt::attest(&self.keys, &credential.token, context).await,
        }
    }
}

/// Somebody else's text in a message: quoted, its control characters escaped, and no longer than a line.
pub(crate) fn shown(text: &str) -> String {
    const LONGEST: usize = 120;
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{:?}... ({} characters)", &text[..end], text.chars().count()),
        None => format!("{text:?}"),
    }
}

/// A refusal says what was presented, what was wrong, and the way out; it never has a credential in it.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// The evidence is wrong, and will be the next time.
    #[error("{0}")]
    Refused(String),
    /// It could not be checked now.
    #[error("{0}")]
    Unavailable(String),
}
