//! The mesh's certificate authority: one root, and short-lived SPIFFE certificates for keys that stay on their machines.
//!
//! Of a certificate request only the public key is used, once the request proves that its sender holds it.
//! Who the certificate is for comes from the WorkloadGroup, never from the request. Follows the SPIFFE X.509-SVID standard.

use crate::data_dir::DataDir;
use anyhow::{Context, anyhow, bail, ensure};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SubjectPublicKeyInfo, date_time_ymd,
};
use std::time::Duration;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256};
use x509_parser::prelude::FromDer;

const FILE: &str = "mesh-ca.pem";
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// From here on the root's end is a fault: replacing it is a matter of weeks, not of an evening.
const ROOT_WARNING: Duration = Duration::from_secs(90 * 24 * 3600);
/// How far a workload's clock may be behind.
const SKEW: Duration = Duration::from_secs(5 * 60);
/// A request for a P-256 key is about 300 bytes.
const MAX_CSR: usize = 4096;

/// A certificate of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// PEM, leaf first.
    pub chain: String,
    pub expires_at: Timestamp,
}

/// Why a request got no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error("the certificate request {0}")]
    BadRequest(&'static str),
    #[error("the mesh's root certificate ended at {0}; replace it (docs/standalone-mesh.md, \"The root\")")]
    RootEnded(Timestamp),
    #[error("signing the certificate: {0}")]
    Signing(#[source] rcgen::Error),
}

pub struct MeshCa {
    issuer: Issuer<'static, KeyPair>,
    root_pem: String,
    root_ends_at: Timestamp,
    trust_domain: String,
    leaf_life: Duration,
}

impl MeshCa {
    /// Reads the root of the data directory, or makes it there: P-256, ten years.
    pub fn open(data: &DataDir, trust_domain: &str, leaf_life: Duration, now: Timestamp) -> anyhow::Result<Self> {
        check_trust_domain(trust_domain)?;
        ensure!(
            leaf_life >= Duration::from_secs(60),
            "a certificate's life must be at least a minute, not {leaf_life:?}"
        );
        let path = data.file(FILE);
        let pem = match data.read(FILE).with_context(|| format!("reading {}", path.display()))? {
            Some(bytes) => String::from_utf8(bytes).map_err(|_| anyhow!("not PEM")),
            None => {
                let pem = make_root(trust_domain, now).context("making the mesh's root certificate")?;
                data.replace(FILE, pem.as_bytes()).with_context(|| format!("writing {}", path.display()))?;
                tracing::info!(file = %path.display(), trust_domain, "made the mesh's root certificate");
                Ok(pem)
            }
        };
        pem.and_then(|pem| Self::load(&pem, trust_domain, leaf_life)).with_context(|| {
            format!(
                "the mesh's root certificate in {} can't be used; restore it from a backup, or move it away: a new root is made, and every workload must onboard again",
                path.display()
            )
        })
    }

    fn load(pem: &str, trust_domain: &str, leaf_life: Duration) -> anyhow::Result<Self> {
        let parts = pem::parse_many(pem)?;
        let part =
            |tag: &str| parts.iter().find(|part| part.tag() == tag).ok_or_else(|| anyhow!("there is no {tag} in it"));
        let certificate = part("CERTIFICATE")?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(
            &rustls_pki_types::PrivatePkcs8KeyDer::from(part("PRIVATE KEY")?.contents()),
            &PKCS_ECDSA_P256_SHA256,
        )?;
        let (rest, parsed) = x509_parser::parse_x509_certificate(certificate.contents())?;
        ensure!(rest.is_empty(), "there are bytes after the certificate");
        ensure!(parsed.is_ca(), "it isn't a CA's certificate");
        ensure!(
            parsed.public_key().subject_public_key.data.as_ref() == key.der_bytes(),
            "certificate and key don't belong together"
        );
        let root_id = spiffe_root(trust_domain);
        let named = parsed.subject_alternative_name()?.is_some_and(|names| {
            names
                .value
                .general_names
                .iter()
                .any(|name| matches!(name, x509_parser::extensions::GeneralName::URI(uri) if *uri == root_id))
        });
        ensure!(named, "it is of another trust domain ({}), not of {trust_domain}", parsed.subject());
        let root_ends_at = Timestamp::from_second(parsed.validity().not_after.timestamp())?;
        let root_pem = pem::encode_config(certificate, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF));
        let issuer = Issuer::from_ca_cert_der(&certificate.contents().into(), key)?;
        Ok(Self { issuer, root_pem, root_ends_at, trust_domain: trust_domain.to_owned(), leaf_life })
    }

    /// PEM.
    pub fn roots(&self) -> &str {
        &self.root_pem
    }

    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// What is wrong with the root, for people.
    pub fn fault(&self, now: Timestamp) -> Option<String> {
        (now.checked_add(ROOT_WARNING).unwrap_or(Timestamp::MAX) >= self.root_ends_at).then(|| {
            format!(
                "the mesh's root certificate ends at {}; replace it (docs/standalone-mesh.md, \"The root\")",
                self.root_ends_at
            )
        })
    }

    /// A certificate for the key of this request (PKCS #10, DER), in the identity of a service account.
    pub fn issue(&self, csr: &[u8], spiffe_id: &str, now: Timestamp) -> Result<Issued, CaError> {
        let key = requested_key(csr)?;
        if now >= self.root_ends_at {
            return Err(CaError::RootEnded(self.root_ends_at));
        }
        let expires_at = now.checked_add(self.leaf_life).unwrap_or(self.root_ends_at).min(self.root_ends_at);
        let mut params = CertificateParams::default();
        // Empty, which makes the alternative name critical (RFC 5280, 4.2.1.6), as SPIFFE wants it.
        params.distinguished_name = DistinguishedName::new();
        let uri = spiffe_id.try_into().map_err(CaError::Signing)?;
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let from = now.checked_sub(SKEW).unwrap_or(now).as_second();
        params.not_before = date_time_ymd(1970, 1, 1) + seconds(from);
        params.not_after = date_time_ymd(1970, 1, 1) + seconds(expires_at.as_second());
        let leaf = params.signed_by(&key, &self.issuer).map_err(CaError::Signing)?;
        let expires_at = Timestamp::from_second(expires_at.as_second()).unwrap_or(expires_at);
        let pem = pem::Pem::new("CERTIFICATE", leaf.der().to_vec());
        let chain = pem::encode_config(&pem, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF));
        Ok(Issued { chain, expires_at })
    }
}

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
pub fn spiffe_id(trust_domain: &str, namespace: &str, service_account: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
}

fn spiffe_root(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}")
}

/// SPIFFE ID, section 2.1.
fn check_trust_domain(name: &str) -> anyhow::Result<()> {
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_');
    if name.is_empty() || name.len() > 255 || !name.chars().all(fine) {
        bail!("{name:?} is not a trust domain: 1 to 255 lower-case letters, digits, dots, dashes and underscores");
    }
    Ok(())
}

/// The public key of a request that is whole, is for a P-256 key, and is signed by it.
fn requested_key(csr: &[u8]) -> Result<SubjectPublicKeyInfo, CaError> {
    if csr.len() > MAX_CSR {
        return Err(CaError::BadRequest("is larger than any for a P-256 key"));
    }
    let (rest, request) =
        X509CertificationRequest::from_der(csr).map_err(|_| CaError::BadRequest("isn't PKCS #10 in DER"))?;
    if !rest.is_empty() {
        return Err(CaError::BadRequest("has bytes after its end"));
    }
    let key = &request.certification_request_info.subject_pki;
    let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    if key.algorithm.algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY || curve != Some(OID_EC_P256) {
        return Err(CaError::BadRequest("isn't for a P-256 key"));
    }
    if request.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 {
        return Err(CaError::BadRequest("isn't signed with ECDSA and SHA-256"));
    }
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.subject_public_key.data.as_ref())
        .verify(request.certification_request_info.raw, request.signature_value.data.as_ref())
        .map_err(|_| CaError::BadRequest("isn't signed by the key that it is for"))?;
    SubjectPublicKeyInfo::from_der(key.raw).map_err(|_| CaError::BadRequest("isn't for a P-256 key"))
}

/// Certificate and key, PEM.
fn make_root(trust_domain: &str, now: Timestamp) -> anyhow::Result<String> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Workload Onboarding");
    // RFC 5280 bounds a common name; the whole trust domain is in the alternative name.
    params.distinguished_name.push(DnType::CommonName, trust_domain.get(..64).unwrap_or(trust_domain));
    params.subject_alt_names = vec![SanType::URI(spiffe_root(trust_domain).try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let from = now.checked_sub(SKEW)?;
    params.not_before = date_time_ymd(1970, 1, 1) + seconds(from.as_second());
    params.not_after = date_time_ymd(1970, 1, 1) + seconds(from.checked_add(ROOT_LIFE)?.as_second());
    let certificate = params.self_signed(&key)?;
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    Ok(pem::encode_many_config(
        &[pem::Pem::new("CERTIFICATE", certificate.der().to_vec()), pem::Pem::new("PRIVATE KEY", key.serialize_der())],
        config,
    ))
}

fn seconds(since_1970: i64) -> Duration {
    Duration::from_secs(since_1970.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::CertificateParams;
    use x509_parser::extensions::GeneralName;

    const LIFE: Duration = Duration::from_secs(24 * 3600);
    const ID: &str = "spiffe://cluster.local/ns/bookinfo/sa/ratings-vm";

    fn now() -> Timestamp {
        "2026-11-24T11:00:00Z".parse().unwrap()
    }

    fn ca(dir: &std::path::Path) -> (DataDir, MeshCa) {
        let data = DataDir::open(dir).unwrap();
        let ca = MeshCa::open(&data, "cluster.local", LIFE, now()).unwrap();
        (data, ca)
    }

    fn csr(key: &KeyPair) -> Vec<u8> {
        let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "root of all");
        params.is_ca = IsCa::NoCa;
        params.serialize_request(key).unwrap().der().to_vec()
    }

    #[test]
    fn a_certificate_has_the_groups_identity_the_requests_key_and_nothing_else_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let (_data, ca) = ca(dir.path());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let issued = ca.issue(&csr(&key), ID, now()).unwrap();
        let leaf = pem::parse(&issued.chain).unwrap();
        let root = pem::parse(ca.roots()).unwrap();
        let (_, leaf) = x509_parser::parse_x509_certificate(leaf.contents()).unwrap();
        let (_, root) = x509_parser::parse_x509_certificate(root.contents()).unwrap();
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, root.public_key().subject_public_key.data.as_ref())
            .verify(leaf.tbs_certificate.as_ref(), leaf.signature_value.data.as_ref())
            .unwrap();
        assert_eq!(leaf.public_key().subject_public_key.data.as_ref(), key.der_bytes());
        assert_eq!(leaf.subject().iter().count(), 0);
        let names = leaf.subject_alternative_name().unwrap().unwrap();
        assert!(names.critical);
        assert!(matches!(names.value.general_names.as_slice(), [GeneralName::URI(ID)]));
        assert!(!leaf.is_ca());
        let usage = leaf.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && !usage.key_cert_sign());
        let extended = leaf.extended_key_usage().unwrap().unwrap().value;
        assert!(extended.server_auth && extended.client_auth && !extended.any);
        assert_eq!(leaf.validity().not_after.timestamp(), now().as_second() + 24 * 3600);
        assert_eq!(issued.expires_at.as_second(), leaf.validity().not_after.timestamp());
        assert_eq!(leaf.validity().not_before.timestamp(), now().as_second() - 300);
    }

    #[test]
    fn a_request_that_is_not_exactly_right_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (_data, ca) = ca(dir.path());
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let good = csr(&key);
        ca.issue(&good, ID, now()).unwrap();

        let mut resigned = good.clone();
        *resigned.last_mut().unwrap() ^= 1;
        let mut other_name = good.clone();
        let at = other_name.windows(4).position(|window| window == b"root").unwrap();
        other_name[at] = b'R';
        let mut longer = good.clone();
        longer.push(0);
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let ed25519 = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        for (request, wanted) in [
            (resigned, "isn't signed by the key"),
            (other_name, "isn't signed by the key"),
            (longer, "has bytes after its end"),
            (good[..good.len() - 1].to_vec(), "isn't PKCS #10"),
            (Vec::new(), "isn't PKCS #10"),
            (vec![0x30; MAX_CSR + 1], "is larger"),
            (csr(&p384), "isn't for a P-256 key"),
            (csr(&ed25519), "isn't for a P-256 key"),
        ] {
            let error = ca.issue(&request, ID, now()).unwrap_err();
            assert!(matches!(error, CaError::BadRequest(_)), "{error}");
            assert!(error.to_string().contains(wanted), "{error}, wanted {wanted}");
        }
    }

    #[test]
    fn the_root_is_made_once_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (data, first) = ca(dir.path());
        let again = MeshCa::open(&data, "cluster.local", LIFE, now()).unwrap();
        assert_eq!(first.roots(), again.roots());
        let text = String::from_utf8(data.read(FILE).unwrap().unwrap()).unwrap();
        assert!(text.contains("PRIVATE KEY") && !first.roots().contains("PRIVATE KEY"));

        let error = MeshCa::open(&data, "other.example", LIFE, now()).err().unwrap();
        assert!(format!("{error:#}").contains("another trust domain"), "{error:#}");
        data.replace(FILE, b"rubbish").unwrap();
        let error = MeshCa::open(&data, "cluster.local", LIFE, now()).err().unwrap();
        assert!(format!("{error:#}").contains("move it away"), "{error:#}");
        assert_eq!(data.read(FILE).unwrap().unwrap(), b"rubbish", "never silently made anew");
    }

    #[test]
    fn the_roots_end_is_said_ahead_and_bounds_the_leaves() {
        let dir = tempfile::tempdir().unwrap();
        let (_data, ca) = ca(dir.path());
        assert_eq!(ca.fault(now()), None);
        let late = ca.root_ends_at.checked_sub(Duration::from_secs(3600)).unwrap();
        assert!(ca.fault(late).unwrap().contains("replace it"));
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        assert_eq!(ca.issue(&csr(&key), ID, late).unwrap().expires_at, ca.root_ends_at);
        assert!(matches!(ca.issue(&csr(&key), ID, ca.root_ends_at), Err(CaError::RootEnded(_))));
    }

    #[test]
    fn a_trust_domain_is_what_spiffe_says_it_is() {
        for bad in ["", "Cluster.local", "a/b", "a b", &"a".repeat(256)] {
            assert!(check_trust_domain(bad).is_err(), "{bad:?}");
        }
        check_trust_domain("cluster.local").unwrap();
    }
}
