//! The EC2 instance identity document: CMS SignedData (RFC 5652) in BER, verified with the region's pinned certificate.
//!
//! Pure: no clock, no network. Nothing of a document is given out that wasn't verified; the content's region, read before,
//! only chooses the certificate. What others were forged through is refused or ignored: more than one signer, embedded
//! certificates, a signature over other bytes than those that are read, content without signed attributes.

use super::certificates::{Certificates, Pinned};
use super::region;
use crate::{shown, strict_json};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use rasn::prelude::*;
use rasn_cms::{Attribute, EncapsulatedContentInfo, SignerIdentifier};
use rasn_pkix::AlgorithmIdentifier;
use serde_json::Value;

/// What a document proves of an instance; only [`verify`] makes it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InstanceIdentity {
    /// That of the region.
    pub partition: &'static str,
    /// 12 digits.
    pub account: String,
    pub region: String,
    pub zone: String,
    /// `i-` and hexadecimal digits.
    pub instance_id: String,
    /// When the instance was launched or started.
    pub pending_time: Option<Timestamp>,
    pub image_id: Option<String>,
    pub instance_type: Option<String>,
    pub architecture: Option<String>,
    pub private_ip: Option<String>,
}

/// Why a document proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    #[error(
        "the identity document is empty: the agent must present what /latest/dynamic/instance-identity/rsa2048 serves"
    )]
    Empty,
    #[error("the identity document has {0} characters, more than the {LARGEST} that are accepted")]
    TooLarge(usize),
    #[error(
        "the identity document isn't base64 as /latest/dynamic/instance-identity/rsa2048 serves it (without PEM lines)"
    )]
    NotBase64,
    #[error("the identity document isn't CMS SignedData that AWS would make: {0}")]
    Malformed(String),
    #[error("the identity document's content can't be read: {0}")]
    Content(String),
    #[error(
        "no certificate is pinned for region {0:?}; a region newer than this version needs its certificate from the EC2 User Guide"
    )]
    UnknownRegion(String),
    #[error(
        "the identity document of region {region} names as its signer the certificate with serial number {serial}, which isn't the one pinned for that region"
    )]
    OtherSigner { region: String, serial: String },
    #[error("the identity document's digest isn't that of its content: the content was changed")]
    OtherContent,
    #[error("the identity document's signature isn't that of region {0}")]
    Signature(String),
}

/// A document of AWS has about 1,500 characters.
const LARGEST: usize = 16 * 1024;

/// Verifies `document`, base64 as the metadata service serves it (line breaks are ignored).
pub fn verify(document: &str, certificates: &Certificates) -> Result<InstanceIdentity, DocumentError> {
    let bytes = decode(document)?;
    let signed = read(&bytes)?;
    // Unverified until the end of this function.
    let content = Content::read(&signed.content)?;
    let pinned = signed.pinned(&content.region, certificates)?;
    if signed.message_digest != digest(&SHA256, &signed.content).as_ref() {
        return Err(DocumentError::OtherContent);
    }
    UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, &pinned.public_key)
        .verify(&signed.attributes, &signed.signature)
        .map_err(|_| DocumentError::Signature(content.region.clone()))?;
    content.into_identity()
}

fn decode(document: &str) -> Result<Vec<u8>, DocumentError> {
    if document.len() > LARGEST {
        return Err(DocumentError::TooLarge(document.len()));
    }
    let text: String = document.split_ascii_whitespace().collect();
    if text.is_empty() {
        return Err(DocumentError::Empty);
    }
    STANDARD.decode(text).map_err(|_| DocumentError::NotBase64)
}

/// Section 3 of RFC 5652, for the one content type that is expected.
#[derive(AsnType, Decode, Debug)]
struct ContentInfo {
    content_type: ObjectIdentifier,
    #[rasn(tag(explicit(0)))]
    content: SignedData,
}

/// Section 5.1. The certificates are never looked into.
#[derive(AsnType, Decode, Debug)]
struct SignedData {
    version: Integer,
    digest_algorithms: SetOf<AlgorithmIdentifier>,
    encap_content_info: EncapsulatedContentInfo,
    #[rasn(tag(0))]
    #[allow(dead_code, reason = "embedded certificates are ignored; only their place is known")]
    certificates: Option<SetOf<Any>>,
    #[rasn(tag(1))]
    #[allow(dead_code, reason = "as are revocations")]
    crls: Option<SetOf<Any>>,
    signer_infos: SetOf<SignerInfo>,
}

/// Section 5.3. The attributes stay as they came, because their bytes are what is signed.
#[derive(AsnType, Decode, Debug, PartialEq, Eq, Hash)]
struct SignerInfo {
    version: Integer,
    sid: SignerIdentifier,
    digest_algorithm: AlgorithmIdentifier,
    #[rasn(tag(0))]
    signed_attrs: Option<SetOf<Any>>,
    signature_algorithm: AlgorithmIdentifier,
    signature: OctetString,
    #[rasn(tag(1))]
    unsigned_attrs: Option<SetOf<Any>>,
}

/// A well-formed document, nothing of it verified.
struct Signed {
    content: Vec<u8>,
    issuer: Vec<u8>,
    /// Contents octets of the INTEGER.
    serial: Vec<u8>,
    /// DER of the SET OF: what the signature is over (section 5.4).
    attributes: Vec<u8>,
    message_digest: Vec<u8>,
    signature: Vec<u8>,
}

impl Signed {
    fn pinned<'a>(&self, region: &str, certificates: &'a Certificates) -> Result<&'a Pinned, DocumentError> {
        let of_region = certificates.of(region);
        if of_region.is_empty() {
            return Err(DocumentError::UnknownRegion(region.to_owned()));
        }
        of_region.iter().find(|pinned| pinned.issuer == self.issuer && pinned.serial == self.serial).ok_or_else(|| {
            DocumentError::OtherSigner {
                region: region.to_owned(),
                serial: self.serial.iter().take(20).map(|byte| format!("{byte:02x}")).collect(),
            }
        })
    }
}

fn malformed(problem: impl Into<String>) -> DocumentError {
    DocumentError::Malformed(problem.into())
}

fn read(bytes: &[u8]) -> Result<Signed, DocumentError> {
    let (info, rest) = rasn::ber::decode_with_remainder::<ContentInfo>(bytes)
        .map_err(|_| malformed("it isn't ASN.1 of that shape, or is cut short"))?;
    if !rest.is_empty() {
        return Err(malformed(format!("{} bytes follow its end", rest.len())));
    }
    if *info.content_type != *rasn_cms::CONTENT_SIGNED_DATA {
        return Err(malformed("its content type is another"));
    }
    let data = info.content;
    if data.version != Integer::from(1) {
        return Err(malformed("its version isn't 1"));
    }
    let algorithms = data.digest_algorithms.to_vec();
    if algorithms.len() != 1 || !is_sha256(algorithms[0]) {
        return Err(malformed("its digest algorithm isn't SHA-256 alone"));
    }
    if *data.encap_content_info.content_type != *rasn_cms::CONTENT_DATA {
        return Err(malformed("what it encloses isn't plain data"));
    }
    let content = data.encap_content_info.content.ok_or_else(|| malformed("it encloses no content"))?;
    let signers = data.signer_infos.into_vec();
    let count = signers.len();
    let [signer] = <[SignerInfo; 1]>::try_from(signers)
        .map_err(|_| malformed(format!("it has {count} signers instead of one")))?;

    if signer.version != Integer::from(1) {
        return Err(malformed("its signer's version isn't 1"));
    }
    let SignerIdentifier::IssuerAndSerialNumber(identifier) = &signer.sid else {
        return Err(malformed("its signer isn't named by issuer and serial number"));
    };
    if !is_sha256(&signer.digest_algorithm) {
        return Err(malformed("its signer's digest algorithm isn't SHA-256"));
    }
    if !is_rsa(&signer.signature_algorithm) {
        return Err(malformed("its signature algorithm isn't RSA with SHA-256"));
    }
    if signer.unsigned_attrs.is_some() {
        return Err(malformed("it has attributes that aren't signed"));
    }
    let attributes = signer.signed_attrs.ok_or_else(|| malformed("it has no signed attributes"))?;
    let unencodable = |_| malformed("its signer's name can't be encoded");
    let serial = rasn::der::encode(&identifier.serial_number).map_err(unencodable)?;
    let (attributes, message_digest) = read_attributes(&attributes)?;
    Ok(Signed {
        content: content.to_vec(),
        issuer: rasn::der::encode(&identifier.issuer).map_err(unencodable)?,
        // A certificate's serial number has at most 20 octets (RFC 5280 section 4.1.2.2): the length is one octet.
        serial: serial.get(2..).unwrap_or_default().to_vec(),
        attributes,
        message_digest,
        signature: signer.signature.to_vec(),
    })
}

/// The attributes in DER, and the message digest among them.
///
/// They must have come in DER (RFC 5652 section 5.3), so that there is one reading of what was signed.
fn read_attributes(raw: &SetOf<Any>) -> Result<(Vec<u8>, Vec<u8>), DocumentError> {
    let not_der = || malformed("its signed attributes aren't in DER");
    let der = rasn::der::encode(raw).map_err(|_| not_der())?;
    let as_received: Vec<u8> = raw.iter().flat_map(|any| any.as_bytes().to_vec()).collect();
    if !der.ends_with(&as_received) {
        return Err(not_der());
    }
    let mut attributes: Vec<Attribute> = Vec::new();
    for any in raw.iter() {
        let attribute: Attribute = rasn::der::decode(any.as_bytes()).map_err(|_| not_der())?;
        if attributes.iter().any(|other| other.r#type == attribute.r#type) {
            return Err(malformed("a signed attribute occurs twice"));
        }
        attributes.push(attribute);
    }
    let single = |kind: &Oid, name: &str| {
        let attribute = attributes
            .iter()
            .find(|attribute| *attribute.r#type == *kind)
            .ok_or_else(|| malformed(format!("its signed attributes lack the {name}")))?;
        match attribute.values.to_vec()[..] {
            [value] => Ok(value.as_bytes().to_vec()),
            _ => Err(malformed(format!("its {name} hasn't one value"))),
        }
    };
    let content_type: ObjectIdentifier = rasn::der::decode(&single(rasn_cms::CONTENT_TYPE, "content type")?)
        .map_err(|_| malformed("its signed content type isn't one"))?;
    if *content_type != *rasn_cms::CONTENT_DATA {
        return Err(malformed("its signed content type isn't that of the content"));
    }
    let message_digest: OctetString = rasn::der::decode(&single(rasn_cms::MESSAGE_DIGEST, "message digest")?)
        .map_err(|_| malformed("its message digest isn't one"))?;
    Ok((der, message_digest.to_vec()))
}

/// With NULL parameters or none (RFC 5754 section 2).
fn is_sha256(algorithm: &AlgorithmIdentifier) -> bool {
    *algorithm.algorithm == [2, 16, 840, 1, 101, 3, 4, 2, 1][..] && has_no_parameters(algorithm)
}

/// `rsaEncryption` or `sha256WithRSAEncryption` (RFC 5754 section 3.2).
fn is_rsa(algorithm: &AlgorithmIdentifier) -> bool {
    (*algorithm.algorithm == [1, 2, 840, 113_549, 1, 1, 1][..]
        || *algorithm.algorithm == [1, 2, 840, 113_549, 1, 1, 11][..])
        && has_no_parameters(algorithm)
}

fn has_no_parameters(algorithm: &AlgorithmIdentifier) -> bool {
    algorithm.parameters.as_ref().is_none_or(|parameters| parameters.as_bytes() == [5, 0])
}

/// The JSON inside, not verified: what it says may be used to choose a certificate, and for nothing else.
struct Content {
    region: String,
    members: serde_json::Map<String, Value>,
}

impl Content {
    fn read(content: &[u8]) -> Result<Self, DocumentError> {
        let members = strict_json::object(content).map_err(DocumentError::Content)?;
        match members.get("region") {
            Some(Value::String(region)) if region::partition(region).is_some() => {
                Ok(Self { region: region.clone(), members })
            }
            Some(Value::String(region)) => {
                Err(DocumentError::Content(format!("{} isn't a region of AWS", shown(region))))
            }
            _ => Err(DocumentError::Content("it names no region".to_owned())),
        }
    }

    /// To be called when the signature was verified.
    fn into_identity(self) -> Result<InstanceIdentity, DocumentError> {
        let Self { region, members } = self;
        let wrong = |problem: &str| DocumentError::Content(problem.to_owned());
        let text = |name: &str| match members.get(name) {
            Some(Value::String(text)) => Some(text.clone()),
            _ => None,
        };
        let account = text("accountId")
            .filter(|account| is_account(account))
            .ok_or_else(|| wrong("its accountId isn't 12 digits"))?;
        let instance_id = text("instanceId")
            .filter(|id| is_instance_id(id))
            .ok_or_else(|| wrong("its instanceId isn't that of an EC2 instance"))?;
        let zone = text("availabilityZone")
            .filter(|zone| is_zone_of(zone, &region))
            .ok_or_else(|| wrong("its availabilityZone isn't one of its region"))?;
        Ok(InstanceIdentity {
            partition: region::partition(&region).ok_or_else(|| wrong("its region is unknown"))?,
            account,
            zone,
            instance_id,
            pending_time: text("pendingTime").and_then(|time| time.parse().ok()),
            image_id: text("imageId"),
            instance_type: text("instanceType"),
            architecture: text("architecture"),
            private_ip: text("privateIp"),
            region,
        })
    }
}

pub(crate) fn is_account(account: &str) -> bool {
    account.len() == 12 && account.bytes().all(|byte| byte.is_ascii_digit())
}

pub(crate) fn is_instance_id(id: &str) -> bool {
    id.strip_prefix("i-").is_some_and(|digits| {
        (8..=32).contains(&digits.len()) && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// `us-east-2b`, and the local zones `us-west-2-lax-1a`.
pub(crate) fn is_zone_of(zone: &str, region: &str) -> bool {
    zone.strip_prefix(region).is_some_and(|rest| {
        (1..=24).contains(&rest.len())
            && rest.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    })
}
