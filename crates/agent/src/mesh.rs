//! The workload's certificate in the mesh: a key made on this host for each one, and what the plane, or istiod, makes of its request.

use crate::machine::Certificate;
use crate::store::StoredIdentity;
use jiff::Timestamp;
use onboarding_wire::onboarding as pb;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A request that was sent; its key leaves this host in no form.
pub struct Pending {
    key: KeyPair,
    /// PKCS #10, DER.
    pub csr: Vec<u8>,
}

/// Why a certificate can't be used.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("making a key or a request for it failed: {0}")]
    Request(#[from] rcgen::Error),
    #[error("a certificate came that can't be read: {0}")]
    Unreadable(&'static str),
    #[error("a certificate came for another key")]
    AnotherKey,
    #[error("a certificate came without a SPIFFE ID")]
    NoSpiffeId,
    #[error("a certificate came for {came}, and this workload is {wanted}")]
    AnotherIdentity { came: String, wanted: String },
    #[error("a certificate came that has expired already, or this host's clock is wrong")]
    Expired,
}

impl Pending {
    /// A new P-256 key, and the request for it. The plane decides the name.
    pub fn new() -> Result<Self, CertificateError> {
        Self::with_names(Vec::new())
    }

    /// The request names the SPIFFE ID, as istiod wants it.
    pub fn for_identity(spiffe_id: &str) -> Result<Self, CertificateError> {
        Self::with_names(vec![SanType::URI(spiffe_id.try_into()?)])
    }

    fn with_names(names: Vec<SanType>) -> Result<Self, CertificateError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        parameters.subject_alt_names = names;
        let csr = parameters.serialize_request(&key)?.der().to_vec();
        Ok(Self { key, csr })
    }

    /// The certificate with its key, if it is for this key and of use.
    pub fn accept(&self, answer: pb::Certificate, now: Timestamp) -> Result<StoredIdentity, CertificateError> {
        let unreadable = CertificateError::Unreadable;
        let leaf = leaf(&answer.chain)?;
        if leaf.public_key != self.key.subject_public_key_info() {
            return Err(CertificateError::AnotherKey);
        }
        if pem::parse_many(answer.roots.as_bytes()).map_or(0, |roots| roots.len()) == 0 {
            return Err(unreadable("the roots are not PEM"));
        }
        let Leaf { spiffe_id, expires_at, .. } = leaf;
        if expires_at <= now {
            return Err(CertificateError::Expired);
        }
        Ok(StoredIdentity {
            certificate_chain: answer.chain,
            private_key: self.key.serialize_pem(),
            roots: answer.roots,
            spiffe_id,
            obtained_at: now,
            expires_at,
        })
    }
}

/// What of a certificate decides.
pub(crate) struct Leaf {
    public_key: Vec<u8>,
    pub spiffe_id: String,
    pub issued_at: Timestamp,
    pub expires_at: Timestamp,
}

/// Of a chain in PEM, leaf first.
pub(crate) fn leaf(chain: &str) -> Result<Leaf, CertificateError> {
    let unreadable = CertificateError::Unreadable;
    let block = pem::parse(chain.as_bytes()).map_err(|_| unreadable("the chain is not PEM"))?;
    let (_, leaf) = X509Certificate::from_der(block.contents()).map_err(|_| unreadable("not X.509"))?;
    let spiffe_id = leaf
        .subject_alternative_name()
        .ok()
        .flatten()
        .and_then(|names| {
            names.value.general_names.iter().find_map(|name| match name {
                GeneralName::URI(uri) if uri.starts_with("spiffe://") => Some((*uri).to_owned()),
                _ => None,
            })
        })
        .ok_or(CertificateError::NoSpiffeId)?;
    let time = |time: x509_parser::time::ASN1Time| {
        Timestamp::from_second(time.timestamp()).map_err(|_| unreadable("its validity is out of range"))
    };
    let (issued_at, expires_at) = (time(leaf.validity().not_before)?, time(leaf.validity().not_after)?);
    Ok(Leaf { public_key: leaf.public_key().raw.to_vec(), spiffe_id, issued_at, expires_at })
}

impl StoredIdentity {
    /// What the machine decides by.
    pub fn facts(&self) -> Certificate {
        Certificate { spiffe_id: self.spiffe_id.clone(), obtained_at: self.obtained_at, expires_at: self.expires_at }
    }

    /// What the sidecar is given.
    pub fn for_sidecar(&self) -> crate::sidecar::Identity {
        crate::sidecar::Identity {
            certificate_chain: self.certificate_chain.clone(),
            private_key: self.private_key.clone(),
            roots: self.roots.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateSigningRequestParams, Issuer};
    use std::time::Duration;

    struct Ca {
        issuer: Issuer<'static, KeyPair>,
        root: String,
    }

    fn ca() -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let root = parameters.self_signed(&key).unwrap().pem();
        Ca { issuer: Issuer::new(parameters, key), root }
    }

    fn sign(ca: &Ca, csr: &[u8], uri: Option<&str>, ends_in: i64) -> pb::Certificate {
        let mut request = CertificateSigningRequestParams::from_der(&csr.to_vec().into()).unwrap();
        let now = std::time::SystemTime::now();
        request.params.not_before = (now - Duration::from_secs(7200)).into();
        request.params.not_after = if ends_in < 0 {
            (now - Duration::from_secs(ends_in.unsigned_abs())).into()
        } else {
            (now + Duration::from_secs(ends_in.unsigned_abs())).into()
        };
        request.params.subject_alt_names = uri.map(|uri| SanType::URI(uri.try_into().unwrap())).into_iter().collect();
        let chain = request.signed_by(&ca.issuer).unwrap().pem();
        pb::Certificate { chain, roots: ca.root.clone(), expires_at: None }
    }

    const ID: &str = "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm";

    #[test]
    fn a_certificate_for_the_key_is_accepted() {
        let (ca, pending) = (ca(), Pending::new().unwrap());
        let identity = pending.accept(sign(&ca, &pending.csr, Some(ID), 3600), Timestamp::now()).unwrap();
        assert_eq!(identity.spiffe_id, ID);
        assert!(identity.private_key.contains("PRIVATE KEY"));
        let left = identity.expires_at.duration_since(Timestamp::now()).as_secs();
        assert!((3500..=3600).contains(&left), "{left}");
    }

    #[test]
    fn others_are_refused() {
        let (ca, pending, other) = (ca(), Pending::new().unwrap(), Pending::new().unwrap());
        let now = Timestamp::now();
        let refuse = |answer| pending.accept(answer, now).err().unwrap();
        assert!(matches!(refuse(sign(&ca, &other.csr, Some(ID), 3600)), CertificateError::AnotherKey));
        assert!(matches!(refuse(sign(&ca, &pending.csr, None, 3600)), CertificateError::NoSpiffeId));
        assert!(matches!(refuse(sign(&ca, &pending.csr, Some("https://x"), 3600)), CertificateError::NoSpiffeId));
        assert!(matches!(refuse(sign(&ca, &pending.csr, Some(ID), -60)), CertificateError::Expired));
        let good = sign(&ca, &pending.csr, Some(ID), 3600);
        let chain = pb::Certificate { chain: "garbage".to_owned(), ..good.clone() };
        assert!(matches!(refuse(chain), CertificateError::Unreadable(_)));
        let roots = pb::Certificate { roots: String::new(), ..good };
        assert!(matches!(refuse(roots), CertificateError::Unreadable(_)));
    }
}
