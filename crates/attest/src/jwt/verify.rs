//! Verifying a token: pure, given the issuers, the keys and the time.
//!
//! RFC 7519, with what RFC 8725 says about it: algorithms are those of this list and fit the key; a token names its key; nothing
//! of a token is used before its signature was verified, except `iss` and `kid`, to choose the key.

use super::{Issuer, KeySource};
use crate::{shown, strict_json};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::{SignedDuration, Timestamp};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use onboarding_core::identity::AttributeValue;
use serde_json::{Map, Value};
use serde_json_path::JsonPath;
use std::collections::BTreeMap;

/// How far clocks may be apart.
pub const LEEWAY: SignedDuration = SignedDuration::from_secs(60);
/// Of a token, in characters.
const LARGEST: usize = 16 * 1024;
const LONGEST_SUBJECT: usize = 1024;

/// A token in its parts, nothing of it verified.
#[derive(Clone)]
pub struct Token {
    /// Header and claims as they came: what the signature is over.
    signed: String,
    signature: String,
    algorithm: Algorithm,
    key_id: Option<String>,
    claims: Map<String, Value>,
}

/// What a token proves; only [`verify`] makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifiedToken {
    pub issuer: String,
    /// The ControlPlane's name for the issuer.
    pub short_name: String,
    pub subject: String,
    pub expires_at: Timestamp,
    pub attributes: BTreeMap<String, AttributeValue>,
}

/// Why a token proves nothing. Values of the token are shown as far as a person needs them; its signature never.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    #[error("the token has {0} characters, more than the {LARGEST} that are accepted")]
    TooLarge(usize),
    #[error("the token can't be read: {0}")]
    Malformed(String),
    #[error(
        "the token's algorithm {} isn't accepted: it must be RS, PS or ES with 256 or 384 bits (RS and PS also 512), or EdDSA", shown(.0)
    )]
    Algorithm(String),
    #[error(
        "the token's issuer {} isn't among the ControlPlane's issuers (compared exactly, with case and slashes)", shown(.0)
    )]
    UnknownIssuer(String),
    #[error("the token's header names no key (\"kid\"), so that none of the issuer's keys can be chosen")]
    NoKeyId,
    #[error("the token's key {} isn't among the keys of issuer {issuer:?}", shown(key_id))]
    UnknownKey { key_id: String, issuer: String },
    #[error("the token's algorithm {algorithm:?} doesn't fit the issuer's key {}", shown(key_id))]
    UnfitKey { algorithm: Algorithm, key_id: String },
    #[error("the token's signature isn't that of issuer {issuer:?}, key {}", shown(key_id))]
    Signature { issuer: String, key_id: String },
    #[error(
        "the token's audience is {found:.500} but must contain this plane's UID {uid:?}: have the issuer put the UID into \"aud\""
    )]
    Audience { found: String, uid: String },
    #[error("the token expired at {expired}, and now it is {now}")]
    Expired { expired: Timestamp, now: Timestamp },
    #[error("the token's {claim:?} says {at}, and now it is only {now}: are the clocks right?")]
    NotYet { claim: &'static str, at: Timestamp, now: Timestamp },
    #[error("the token's {0:?} is missing or isn't what RFC 7519 says it is")]
    Claim(&'static str),
}

impl Token {
    /// Whom it says that it is for; nothing of it is verified, so it decides nothing.
    pub fn stated_audience(&self) -> Vec<&str> {
        match self.claims.get("aud") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(all)) => all.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        }
    }

    /// Takes a token apart. Only its shape, its algorithm and its issuer are looked at.
    pub fn read(token: &str) -> Result<Self, JwtError> {
        let token = token.trim();
        if token.len() > LARGEST {
            return Err(JwtError::TooLarge(token.len()));
        }
        let [header, claims, signature] = token.split('.').collect::<Vec<_>>()[..] else {
            return Err(JwtError::Malformed("it hasn't three parts between dots".to_owned()));
        };
        let object = |part: &str, name: &str| {
            let bytes = URL_SAFE_NO_PAD
                .decode(part)
                .map_err(|_| JwtError::Malformed(format!("its {name} can't be decoded as base64url")))?;
            strict_json::object(&bytes).map_err(|problem| JwtError::Malformed(format!("its {name}: {problem}")))
        };
        let header = object(header, "header")?;
        if header.contains_key("crit") {
            return Err(JwtError::Malformed(
                "its header demands extensions (\"crit\") that aren't understood".to_owned(),
            ));
        }
        let algorithm = match header.get("alg") {
            Some(Value::String(name)) => algorithm(name).ok_or_else(|| JwtError::Algorithm(name.clone()))?,
            _ => return Err(JwtError::Malformed("its header names no algorithm".to_owned())),
        };
        let key_id = match header.get("kid") {
            None => None,
            Some(Value::String(key_id)) => Some(key_id.clone()),
            Some(_) => return Err(JwtError::Malformed("its \"kid\" isn't a string".to_owned())),
        };
        Ok(Self {
            signed: token[..token.len() - signature.len() - 1].to_owned(),
            signature: signature.to_owned(),
            algorithm,
            key_id,
            claims: object(claims, "claims")?,
        })
    }

    fn text(&self, claim: &'static str) -> Result<&str, JwtError> {
        match self.claims.get(claim) {
            Some(Value::String(text)) => Ok(text),
            _ => Err(JwtError::Claim(claim)),
        }
    }

    /// A NumericDate; `None`: not there.
    fn time(&self, claim: &'static str) -> Result<Option<Timestamp>, JwtError> {
        let Some(value) = self.claims.get(claim) else { return Ok(None) };
        // Not a float of seconds beyond what a Timestamp can hold, nor NaN, gets through `from_second`.
        let seconds = value.as_i64().or_else(|| value.as_f64().map(|seconds| seconds.floor() as i64));
        seconds.and_then(|seconds| Timestamp::from_second(seconds).ok()).ok_or(JwtError::Claim(claim)).map(Some)
    }
}

/// The asymmetric ones. `none` and those with a shared secret don't exist here.
fn algorithm(name: &str) -> Option<Algorithm> {
    Some(match name {
        "RS256" => Algorithm::RS256,
        "RS384" => Algorithm::RS384,
        "RS512" => Algorithm::RS512,
        "PS256" => Algorithm::PS256,
        "PS384" => Algorithm::PS384,
        "PS512" => Algorithm::PS512,
        "ES256" => Algorithm::ES256,
        "ES384" => Algorithm::ES384,
        "EdDSA" => Algorithm::EdDSA,
        _ => return None,
    })
}

/// An issuer's keys for signatures.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    by_id: BTreeMap<String, Vec<Jwk>>,
}

/// Of a JWKS.
const MOST_KEYS: usize = 200;

impl Keys {
    /// Reads a JWK Set (RFC 7517 section 5). Keys that aren't understood, aren't for signatures or have no `kid` are left out.
    pub fn read(jwks: &[u8]) -> Result<Self, String> {
        let set = strict_json::object(jwks)?;
        let Some(Value::Array(keys)) = set.get("keys") else {
            return Err("it has no \"keys\"".to_owned());
        };
        if keys.len() > MOST_KEYS {
            return Err(format!("it has {} keys, more than {MOST_KEYS}", keys.len()));
        }
        let mut all = Self::default();
        for key in keys {
            let Ok(key) = serde_json::from_value::<Jwk>(key.clone()) else { continue };
            let (Some(id), true) = (key.common.key_id.clone(), is_for_signatures(&key)) else { continue };
            all.by_id.entry(id).or_default().push(key);
        }
        Ok(all)
    }

    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Of an inline source; `None`: the keys must be fetched.
    pub fn inline(source: &KeySource) -> Option<Result<Self, String>> {
        match source {
            KeySource::Inline(jwks) => Some(Self::read(jwks.as_bytes())),
            KeySource::Uri(_) | KeySource::Discovery => None,
        }
    }
}

fn is_for_signatures(key: &Jwk) -> bool {
    let usage = key.common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature);
    let operations = key.common.key_operations.as_ref().is_none_or(|all| all.contains(&KeyOperations::Verify));
    let asymmetric = matches!(
        key.algorithm,
        AlgorithmParameters::RSA(_) | AlgorithmParameters::EllipticCurve(_) | AlgorithmParameters::OctetKeyPair(_)
    );
    usage && operations && asymmetric
}

fn fits(algorithm: Algorithm, key: &Jwk) -> bool {
    let kind = match &key.algorithm {
        AlgorithmParameters::RSA(_) => matches!(
            algorithm,
            Algorithm::RS256
                | Algorithm::RS384
                | Algorithm::RS512
                | Algorithm::PS256
                | Algorithm::PS384
                | Algorithm::PS512
        ),
        AlgorithmParameters::EllipticCurve(key) => match key.curve {
            EllipticCurve::P256 => algorithm == Algorithm::ES256,
            EllipticCurve::P384 => algorithm == Algorithm::ES384,
            _ => false,
        },
        AlgorithmParameters::OctetKeyPair(key) => algorithm == Algorithm::EdDSA && key.curve == EllipticCurve::Ed25519,
        _ => false,
    };
    kind && key.common.key_algorithm.as_ref().is_none_or(|only| *only == KeyAlgorithm::from(algorithm))
}

/// The issuer that a token says it is from, if the ControlPlane lists it.
pub fn issuer_of<'a>(token: &Token, issuers: &'a [Issuer]) -> Result<&'a Issuer, JwtError> {
    let stated = token.text("iss")?;
    issuers.iter().find(|issuer| issuer.issuer == stated).ok_or_else(|| JwtError::UnknownIssuer(stated.to_owned()))
}

/// Verifies a token. `keys` are those of `issuer`, `audience` is the plane's UID.
pub fn verify(
    token: &Token,
    issuer: &Issuer,
    keys: &Keys,
    audience: &str,
    now: Timestamp,
) -> Result<VerifiedToken, JwtError> {
    verify_signature(token, issuer, keys)?;
    if token.text("iss")? != issuer.issuer {
        return Err(JwtError::UnknownIssuer(token.text("iss")?.to_owned()));
    }
    verify_audience(token, audience)?;
    let expires_at = token.time("exp")?.ok_or(JwtError::Claim("exp"))?;
    if now.duration_since(expires_at) >= LEEWAY {
        return Err(JwtError::Expired { expired: expires_at, now });
    }
    for claim in ["nbf", "iat"] {
        match token.time(claim)? {
            Some(at) if at.duration_since(now) > LEEWAY => return Err(JwtError::NotYet { claim, at, now }),
            _ => {}
        }
    }
    let subject = token.text("sub")?;
    if subject.is_empty() || subject.len() > LONGEST_SUBJECT || subject.chars().any(char::is_control) {
        return Err(JwtError::Claim("sub"));
    }
    Ok(VerifiedToken {
        issuer: issuer.issuer.clone(),
        short_name: issuer.short_name.clone(),
        subject: subject.to_owned(),
        expires_at,
        attributes: attributes(token, issuer)?,
    })
}

fn verify_signature(token: &Token, issuer: &Issuer, keys: &Keys) -> Result<(), JwtError> {
    let key_id = token.key_id.as_ref().ok_or(JwtError::NoKeyId)?;
    let issuer = issuer.issuer.clone();
    let Some(named) = keys.by_id.get(key_id) else {
        return Err(JwtError::UnknownKey { key_id: key_id.clone(), issuer });
    };
    let mut fitting = named.iter().filter(|key| fits(token.algorithm, key)).peekable();
    if fitting.peek().is_none() {
        return Err(JwtError::UnfitKey { algorithm: token.algorithm, key_id: key_id.clone() });
    }
    // Keys of different kinds may share a name (RFC 7517 section 4.5).
    let is_signed_by = |key: &Jwk| {
        DecodingKey::from_jwk(key).is_ok_and(|key| {
            jsonwebtoken::crypto::verify(&token.signature, token.signed.as_bytes(), &key, token.algorithm)
                .unwrap_or(false)
        })
    };
    if fitting.any(is_signed_by) { Ok(()) } else { Err(JwtError::Signature { issuer, key_id: key_id.clone() }) }
}

/// One string, or several, of which one is the plane's UID.
fn verify_audience(token: &Token, uid: &str) -> Result<(), JwtError> {
    let value = token.claims.get("aud");
    let is_for_us = match value {
        Some(Value::String(one)) => one == uid,
        Some(Value::Array(all)) if all.iter().all(Value::is_string) => all.iter().any(|one| one == uid),
        None => false,
        Some(_) => return Err(JwtError::Claim("aud")),
    };
    if is_for_us {
        return Ok(());
    }
    let found = value.map_or_else(|| "missing".to_owned(), Value::to_string);
    let found = found.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect();
    Err(JwtError::Audience { found, uid: uid.to_owned() })
}

/// An object at the issuer's path: its members that are scalars or arrays of scalars. No such object: no attributes.
fn attributes(token: &Token, issuer: &Issuer) -> Result<BTreeMap<String, AttributeValue>, JwtError> {
    let Some(path) = &issuer.attributes else { return Ok(BTreeMap::new()) };
    let path = JsonPath::parse(path).map_err(|_| {
        JwtError::Malformed(format!("the ControlPlane's path to the attributes of {:?} isn't RFC 9535", issuer.issuer))
    })?;
    let claims = Value::Object(token.claims.clone());
    let Ok(Some(Value::Object(members))) = path.query(&claims).at_most_one() else { return Ok(BTreeMap::new()) };
    let scalar = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
        _ => None,
    };
    Ok(members
        .iter()
        .filter_map(|(name, value)| {
            let value = match value {
                Value::Array(all) => AttributeValue::array(all.iter().map(scalar))?,
                value => AttributeValue::One(scalar(value)?),
            };
            Some((name.clone(), value))
        })
        .collect())
}
