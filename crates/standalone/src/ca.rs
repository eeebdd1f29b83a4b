//! The mesh's certificate authority: its root, and short-lived SPIFFE certificates for keys that stay on their machines.
//!
//! Of a certificate request only the public key is used, once the request proves that its sender holds it.
//! Who the certificate is for comes from the WorkloadGroup, never from the request. Follows the SPIFFE X.509-SVID standard.

mod root;
mod roots;

use crate::data_dir::DataDir;
use anyhow::{Context, anyhow, bail, ensure};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use jiff::Timestamp;
use onboarding_endpoint::backend::RootStatus;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType,
    SubjectPublicKeyInfo, date_time_ymd,
};
use roots::Roots;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_SIG_ECDSA_WITH_SHA256};
use x509_parser::prelude::FromDer;

const FILE: &str = "mesh-ca.pem";
/// From here on the root's end is a fault: it should have been replaced long ago.
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
    /// PEM of all roots that are trusted now.
    pub roots: String,
    pub expires_at: Timestamp,
}

fn status(roots: &Roots) -> RootStatus {
    let (stage, words) = roots.describe();
    RootStatus { stage, roots: words, ends_at: roots.signing.ends_at, next_step_at: roots.next_at() }
}

/// Why a root isn't replaced.
#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    #[error("the mesh's root is being replaced already ({roots}); the next step is taken at {next}")]
    UnderWay { roots: String, next: Timestamp },
    #[error("the mesh's root can't be replaced: {0:#}; what there is goes on")]
    Failed(anyhow::Error),
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
    data: Arc<DataDir>,
    roots: Mutex<Arc<Roots>>,
    trust_domain: String,
    leaf_life: Duration,
}

impl MeshCa {
    /// Reads the roots of the data directory, or makes one there: P-256, ten years. Takes the step that is due, if one is.
    pub fn open(data: &Arc<DataDir>, trust_domain: &str, leaf_life: Duration, now: Timestamp) -> anyhow::Result<Self> {
        check_trust_domain(trust_domain)?;
        ensure!(
            leaf_life >= Duration::from_secs(60),
            "a certificate's life must be at least a minute, not {leaf_life:?}"
        );
        let path = data.file(FILE);
        let writing = || format!("writing {}", path.display());
        let roots = match data.read(FILE).with_context(|| format!("reading {}", path.display()))? {
            Some(bytes) => {
                let read = String::from_utf8(bytes).map_err(|_| anyhow!("not PEM"));
                let read = read.and_then(|text| Roots::read(&text, trust_domain)).with_context(|| {
                    format!(
                        "the mesh's root certificate in {} can't be used; restore it from a backup, or move it away: a new root is made, and every workload must onboard again",
                        path.display()
                    )
                })?;
                match read.with_life(leaf_life, trust_domain)? {
                    Some(next) => {
                        data.replace(FILE, next.text().as_bytes()).with_context(writing)?;
                        next
                    }
                    None => read,
                }
            }
            None => {
                let made = Roots::make(trust_domain, leaf_life, now).context("making the mesh's root certificate")?;
                data.replace(FILE, made.text().as_bytes()).with_context(writing)?;
                tracing::info!(file = %path.display(), trust_domain, "made the mesh's root certificate");
                made
            }
        };
        let roots = Mutex::new(Arc::new(roots));
        let ca = Self { data: data.clone(), roots, trust_domain: trust_domain.to_owned(), leaf_life };
        ca.now(now);
        Ok(ca)
    }

    /// The roots as they are at this moment. A step that is due and can't be written isn't taken; it is tried again the next time.
    fn now(&self, now: Timestamp) -> Arc<Roots> {
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        match roots.due(&self.trust_domain, now).and_then(|due| due.map(|next| self.put(&mut roots, next)).transpose())
        {
            Ok(_) => {}
            Err(error) => tracing::error!(
                error = %format!("{error:#}"),
                "the mesh's root can't be replaced now; what there is goes on, and it is tried again"
            ),
        }
        roots.clone()
    }

    fn put(&self, held: &mut Arc<Roots>, next: Roots) -> anyhow::Result<()> {
        let file = || format!("writing {}", self.data.file(FILE).display());
        self.data.replace(FILE, next.text().as_bytes()).with_context(file)?;
        let (stage, roots) = next.describe();
        tracing::info!(
            stage,
            roots,
            next_step_at = next.next_at().map(|at| at.to_string()),
            "the mesh's roots changed"
        );
        *held = Arc::new(next);
        Ok(())
    }

    /// Begins to replace the root by a new one, without a request failing: see `roots`.
    ///
    /// # Errors
    /// It is under way already, or can't be written; in words.
    pub fn rotate(&self, now: Timestamp) -> Result<RootStatus, RotateError> {
        self.now(now);
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(next) = roots.next_at() {
            return Err(RotateError::UnderWay { roots: roots.describe().1, next });
        }
        let begun = roots.begin(&self.trust_domain, now).and_then(|next| self.put(&mut roots, next));
        begun.map_err(RotateError::Failed)?;
        Ok(status(&roots))
    }

    pub fn root_status(&self, now: Timestamp) -> RootStatus {
        status(&self.now(now))
    }

    /// PEM of all that are trusted now.
    pub fn roots(&self, now: Timestamp) -> String {
        self.now(now).bundle()
    }

    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// What is wrong with the root, for people.
    pub fn fault(&self, now: Timestamp) -> Option<String> {
        let ends_at = self.now(now).signing.ends_at;
        (now.checked_add(ROOT_WARNING).unwrap_or(Timestamp::MAX) >= ends_at).then(|| {
            format!("the mesh's root certificate ends at {ends_at}; replace it (docs/standalone-mesh.md, \"The root\")")
        })
    }

    /// A certificate for the key of this request (PKCS #10, DER), in the identity of a service account.
    pub fn issue(&self, csr: &[u8], spiffe_id: &str, now: Timestamp) -> Result<Issued, CaError> {
        let key = requested_key(csr)?;
        let roots = self.now(now);
        let root_ends_at = roots.signing.ends_at;
        if now >= root_ends_at {
            return Err(CaError::RootEnded(root_ends_at));
        }
        let expires_at = now.checked_add(self.leaf_life).unwrap_or(root_ends_at).min(root_ends_at);
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
        let issuer = roots.signing.issuer().map_err(|_| CaError::RootEnded(root_ends_at))?;
        let leaf = params.signed_by(&key, issuer).map_err(CaError::Signing)?;
        let expires_at = Timestamp::from_second(expires_at.as_second()).unwrap_or(expires_at);
        let pem = pem::Pem::new("CERTIFICATE", leaf.der().to_vec());
        let chain = pem::encode_config(&pem, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF));
        Ok(Issued { chain, roots: roots.bundle(), expires_at })
    }
}

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
pub fn spiffe_id(trust_domain: &str, namespace: &str, service_account: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}")
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

fn seconds(since_1970: i64) -> Duration {
    Duration::from_secs(since_1970.unsigned_abs())
}

#[cfg(test)]
#[path = "ca/tests.rs"]
mod tests;
