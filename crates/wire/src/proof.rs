//! The bytes that an agent's key signs to prove itself, and what an STS request is bound to.

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use onboarding_core::identity::Thumbprint;

/// What a proof is for; a proof for one purpose is worth nothing for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose<'a> {
    /// Evidence (the bytes of the `Any`'s value) for a group `namespace/name`.
    Authorize { evidence: &'a [u8], group: &'a str },
    /// Use of a token on a connection that hasn't proven its key yet.
    UseToken { token: &'a str },
}

/// Length-prefixed, so that no two inputs give the same bytes.
pub fn signed_bytes(plane_uid: &str, challenge: &[u8], purpose: Purpose<'_>) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    let mut part = |bytes: &[u8]| {
        out.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
        out.extend_from_slice(bytes);
    };
    part(b"onboarding.v1alpha1.KeyProof");
    part(plane_uid.as_bytes());
    part(challenge);
    match purpose {
        Purpose::Authorize { evidence, group } => {
            part(b"authorize");
            part(digest(&SHA256, evidence).as_ref());
            part(group.as_bytes());
        }
        Purpose::UseToken { token } => {
            part(b"use-token");
            part(digest(&SHA256, token.as_bytes()).as_ref());
        }
    }
    out
}

/// SHA-256 over a SubjectPublicKeyInfo in DER.
pub fn thumbprint(public_key: &[u8]) -> Thumbprint {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, public_key).as_ref());
    Thumbprint(bytes)
}

/// The value of the signed header [`STS_BINDING_HEADER`]: the plane, the challenge and the key that an STS request is made for.
pub fn sts_binding(plane_uid: &str, challenge: &[u8], key: Thumbprint) -> String {
    let mut input = Vec::with_capacity(128);
    for part in [b"onboarding.v1alpha1.StsBinding".as_slice(), plane_uid.as_bytes(), challenge, &key.0] {
        input.extend_from_slice(&(part.len() as u64).to_be_bytes());
        input.extend_from_slice(part);
    }
    URL_SAFE_NO_PAD.encode(digest(&SHA256, &input))
}

pub const STS_BINDING_HEADER: &str = "x-onboarding-binding";
pub const STS_BODY: &str = "Action=GetCallerIdentity&Version=2011-06-15";
pub const STS_CONTENT_TYPE: &str = "application/x-www-form-urlencoded; charset=utf-8";

/// The STS host of a region; its partition's domain. Regions are checked by the caller.
pub fn sts_host(region: &str) -> String {
    let of_partition = [
        ("cn-", "amazonaws.com.cn"),
        ("us-iso-", "c2s.ic.gov"),
        ("us-isob-", "sc2s.sgov.gov"),
        ("us-isof-", "csp.hci.ic.gov"),
        ("eu-isoe-", "cloud.adc-e.uk"),
        ("eusc-", "amazonaws.eu"),
    ];
    let suffix = of_partition.iter().find(|(prefix, _)| region.starts_with(prefix));
    format!("sts.{region}.{}", suffix.map_or("amazonaws.com", |(_, suffix)| suffix))
}
