//! JSON Web Tokens of issuers that the ControlPlane names. `verify` is pure; `jwks` fetches and keeps the issuers' keys.

pub mod jwks;
pub mod verify;

use crate::{AttestError, Context};
use jwks::KeyStore;
use onboarding_core::identity::{Attested, AttributeValue, Fact, Identity, JwtIdentity, Proven, Replay};
use verify::{JwtError, Token, VerifiedToken};

/// One issuer of `workloads.authentication.jwt.issuers`.
#[derive(Debug, Clone, PartialEq)]
pub struct Issuer {
    /// Equals the token's `iss` exactly.
    pub issuer: String,
    pub short_name: String,
    pub keys: KeySource,
    /// `tokenFields.attributes.jsonPath`, in RFC 9535 form (`$...`).
    pub attributes: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum KeySource {
    /// A JWKS document.
    Inline(String),
    Uri(String),
    /// OpenID Connect Discovery at the issuer.
    Discovery,
}

pub(crate) async fn attest(store: &KeyStore, token: &str, context: Context<'_>) -> Result<Attested, AttestError> {
    let refused = |error: JwtError| AttestError::Refused(error.to_string());
    let token = Token::read(token).map_err(refused)?;
    let issuer = verify::issuer_of(&token, context.issuers).map_err(refused)?;
    let known = store.keys(issuer, context.issuers, context.now).await?;
    let verified = match verify::verify(&token, issuer, &known, context.plane_uid, context.now) {
        // The issuer may have a new key since.
        Err(JwtError::UnknownKey { .. }) => {
            let fresh = store.refresh(issuer, context.issuers, &known, context.now).await?;
            verify::verify(&token, issuer, &fresh, context.plane_uid, context.now).map_err(refused)?
        }
        outcome => outcome.map_err(refused)?,
    };
    Ok(attested(verified))
}

/// What a token proves, in the terms of policies.
pub fn attested(token: VerifiedToken) -> Attested {
    let proven = |value: String| Fact::from(Proven::by_attestor(value));
    let attribute = |(name, value): (String, AttributeValue)| (name, Fact::from(Proven::by_attestor(value)));
    Attested {
        replay: Replay::Until(token.expires_at.checked_add(verify::LEEWAY).unwrap_or(jiff::Timestamp::MAX)),
        issuer_short_name: Some(token.short_name),
        identity: Identity::Jwt(JwtIdentity {
            issuer: proven(token.issuer),
            subject: proven(token.subject),
            attributes: token.attributes.into_iter().map(attribute).collect(),
        }),
    }
}
