//! One root certificate with its key.

use super::{SKEW, seconds};
use anyhow::{anyhow, ensure};
use jiff::Timestamp;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, date_time_ymd,
};
use std::time::Duration;

const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A certificate, and the key where it is still of use.
pub(super) struct Root {
    pub certificate: pem::Pem,
    pub ends_at: Timestamp,
    pub signs: Option<Signs>,
}

pub(super) struct Signs {
    pub issuer: Issuer<'static, KeyPair>,
    key: pem::Pem,
}

impl Root {
    /// P-256, ten years.
    pub fn make(trust_domain: &str, now: Timestamp) -> anyhow::Result<Self> {
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
        Self::read(
            pem::Pem::new("CERTIFICATE", certificate.der().to_vec()),
            Some(pem::Pem::new("PRIVATE KEY", key.serialize_der())),
            trust_domain,
        )
    }

    /// # Errors
    /// It is no root of this trust domain, or not of this key; in words.
    pub fn read(certificate: pem::Pem, key: Option<pem::Pem>, trust_domain: &str) -> anyhow::Result<Self> {
        let (rest, parsed) = x509_parser::parse_x509_certificate(certificate.contents())?;
        ensure!(rest.is_empty(), "there are bytes after the certificate");
        ensure!(parsed.is_ca(), "it isn't a CA's certificate");
        let root_id = spiffe_root(trust_domain);
        let named = parsed.subject_alternative_name()?.is_some_and(|names| {
            names
                .value
                .general_names
                .iter()
                .any(|name| matches!(name, x509_parser::extensions::GeneralName::URI(uri) if *uri == root_id))
        });
        ensure!(named, "it is of another trust domain ({}), not of {trust_domain}", parsed.subject());
        let ends_at = Timestamp::from_second(parsed.validity().not_after.timestamp())?;
        let public_key = parsed.public_key().subject_public_key.data.to_vec();
        let signs = key
            .map(|key| {
                let pair = KeyPair::from_pkcs8_der_and_sign_algo(
                    &rustls_pki_types::PrivatePkcs8KeyDer::from(key.contents()),
                    &PKCS_ECDSA_P256_SHA256,
                )?;
                ensure!(public_key == pair.der_bytes(), "certificate and key don't belong together");
                Ok(Signs { issuer: Issuer::from_ca_cert_der(&certificate.contents().into(), pair)?, key })
            })
            .transpose()?;
        Ok(Self { certificate, ends_at, signs })
    }

    /// For the mesh.
    pub fn pem(&self) -> String {
        let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        pem::encode_config(&self.certificate, config)
    }

    /// For the plane's own file.
    pub fn blocks(&self) -> impl Iterator<Item = pem::Pem> + '_ {
        std::iter::once(self.certificate.clone()).chain(self.signs.as_ref().map(|signs| signs.key.clone()))
    }

    pub fn issuer(&self) -> anyhow::Result<&Issuer<'static, KeyPair>> {
        self.signs.as_ref().map(|signs| &signs.issuer).ok_or_else(|| anyhow!("there is no PRIVATE KEY in it"))
    }

    /// SHA-256 of the certificate, the first 16 hexadecimal digits: which one it is, for people.
    pub fn fingerprint(&self) -> String {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, self.certificate.contents());
        digest.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    /// For a file that is made of what this one was read from.
    pub fn without_key(&self) -> Self {
        Self { certificate: self.certificate.clone(), ends_at: self.ends_at, signs: None }
    }
}

fn spiffe_root(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}")
}
