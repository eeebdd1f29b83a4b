//! Instance identity documents in the form in which AWS serves them, and in forms that it never would.
//!
//! What AWS sends: CMS SignedData whose outer values have BER's indefinite length, the content a constructed OCTET STRING,
//! no certificate inside, one signer with signed attributes (content type, signing time, algorithm protection, message digest).

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::RSA_PKCS1_SHA256;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, SerialNumber};

/// The key with which a region signs its documents, and its self-signed certificate.
pub struct RegionKey {
    region: String,
    key: KeyPair,
    certificate: Vec<u8>,
}

impl RegionKey {
    /// A new RSA-2048 key; the certificate's subject is that of AWS's.
    pub fn generate(region: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate(KeySize::Rsa2048)?;
        let pkcs8 = AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&key)?;
        let signer = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(
            &rustls_pki_types::PrivatePkcs8KeyDer::from(pkcs8.as_ref()),
            &rcgen::PKCS_RSA_SHA256,
        )?;
        let mut parameters = CertificateParams::default();
        let mut name = DistinguishedName::new();
        for (kind, value) in [
            (DnType::CountryName, "US"),
            (DnType::StateOrProvinceName, "Washington State"),
            (DnType::LocalityName, "Seattle"),
            (DnType::OrganizationName, "Amazon Web Services LLC"),
        ] {
            name.push(kind, DnValue::PrintableString(value.try_into()?));
        }
        parameters.distinguished_name = name;
        let mut serial = [0; 8];
        aws_lc_rs::rand::fill(&mut serial)?;
        // As long in DER as it is here.
        serial[0] = serial[0] & 0x7f | 0x40;
        parameters.serial_number = Some(SerialNumber::from_slice(&serial));
        let certificate = parameters.self_signed(&signer)?.der().to_vec();
        Ok(Self { region: region.to_owned(), key, certificate })
    }

    pub fn region(&self) -> &str {
        &self.region
    }

    /// DER.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// `# <region>` and the certificate in PEM: what the plane is given.
    pub fn pinned(&self) -> String {
        let certificate = pem::encode(&pem::Pem::new("CERTIFICATE", self.certificate.clone()));
        format!("# {} made by onboarding-testkit\n{certificate}", self.region)
    }

    /// PKCS#1 v1.5 with SHA-256.
    pub fn sign(&self, message: &[u8]) -> anyhow::Result<Vec<u8>> {
        let mut signature = vec![0; self.key.public_modulus_len()];
        self.key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature)?;
        Ok(signature)
    }

    /// What `/latest/dynamic/instance-identity/rsa2048` serves for this content: base64 in lines of 76, without PEM lines.
    pub fn document(&self, content: &[u8]) -> anyhow::Result<String> {
        Ok(lines(&Parts::aws(self, content)?.encode()))
    }

    fn issuer_and_serial(&self) -> anyhow::Result<Vec<u8>> {
        let certificate: rasn_pkix::Certificate =
            rasn::der::decode(&self.certificate).map_err(|error| anyhow::anyhow!("own certificate: {error}"))?;
        let encode_failed = |error| anyhow::anyhow!("own certificate: {error}");
        Ok(sequence(
            &[
                rasn::der::encode(&certificate.tbs_certificate.issuer).map_err(encode_failed)?,
                rasn::der::encode(&certificate.tbs_certificate.serial_number).map_err(encode_failed)?,
            ]
            .concat(),
        ))
    }
}

/// Base64 as the metadata service breaks it.
pub fn lines(document: &[u8]) -> String {
    let text = STANDARD.encode(document);
    text.as_bytes().chunks(76).map(String::from_utf8_lossy).collect::<Vec<_>>().join("\n")
}

/// A document in its parts, each as encoded bytes: change one, then [`encode`](Self::encode).
#[derive(Clone)]
pub struct Parts {
    /// Of the outer values; false is DER's definite length throughout.
    pub indefinite: bool,
    /// The outermost type.
    pub content_info_type: Vec<u8>,
    pub version: Vec<u8>,
    pub digest_algorithms: Vec<Vec<u8>>,
    pub content_type: Vec<u8>,
    /// The OCTET STRING with its tag; `None`: the content is detached.
    pub content: Option<Vec<u8>>,
    /// Embedded certificates in DER; empty: the field is absent.
    pub certificates: Vec<Vec<u8>>,
    pub signers: Vec<Signer>,
    /// After the whole.
    pub trailing: Vec<u8>,
}

#[derive(Clone)]
pub struct Signer {
    pub version: Vec<u8>,
    pub identifier: Vec<u8>,
    pub digest_algorithm: Vec<u8>,
    /// Each an Attribute; in this order. `None`: the field is absent.
    pub attributes: Option<Vec<Vec<u8>>>,
    pub signature_algorithm: Vec<u8>,
    pub signature: Vec<u8>,
    /// Each an Attribute; empty: the field is absent.
    pub unsigned_attributes: Vec<Vec<u8>>,
}

impl Parts {
    /// As AWS does it.
    pub fn aws(key: &RegionKey, content: &[u8]) -> anyhow::Result<Self> {
        Ok(Self {
            indefinite: true,
            content_info_type: oid(SIGNED_DATA),
            version: INTEGER_ONE.to_vec(),
            digest_algorithms: vec![sha256_algorithm()],
            content_type: oid(DATA),
            content: Some(indefinite(0x24, &octet_string(content))),
            certificates: Vec::new(),
            signers: vec![Signer::aws(key, content)?],
            trailing: Vec::new(),
        })
    }

    pub fn encode(&self) -> Vec<u8> {
        let outer = |tag: u8, content: &[u8]| {
            if self.indefinite { indefinite(tag, content) } else { tlv(tag, content) }
        };
        let content = self.content.as_ref().map(|content| outer(0xa0, content)).unwrap_or_default();
        let encapsulated = outer(0x30, &[self.content_type.clone(), content].concat());
        let certificates = match self.certificates.as_slice() {
            [] => Vec::new(),
            certificates => outer(0xa0, &certificates.concat()),
        };
        let signers = tlv(0x31, &self.signers.iter().map(Signer::encode).collect::<Vec<_>>().concat());
        let signed_data = outer(
            0x30,
            &[self.version.clone(), tlv(0x31, &self.digest_algorithms.concat()), encapsulated, certificates, signers]
                .concat(),
        );
        let mut all = outer(0x30, &[self.content_info_type.clone(), outer(0xa0, &signed_data)].concat());
        all.extend_from_slice(&self.trailing);
        all
    }
}

impl Signer {
    pub fn aws(key: &RegionKey, content: &[u8]) -> anyhow::Result<Self> {
        let attributes = vec![
            attribute(CONTENT_TYPE, &oid(DATA)),
            attribute(SIGNING_TIME, &utc_time(Timestamp::now())),
            attribute(
                ALGORITHM_PROTECTION,
                &sequence(&[sha256_algorithm(), tlv(0xa1, &algorithm_contents(SHA256_WITH_RSA))].concat()),
            ),
            attribute(MESSAGE_DIGEST, &octet_string(digest(&SHA256, content).as_ref())),
        ];
        let mut signer = Self {
            version: INTEGER_ONE.to_vec(),
            identifier: key.issuer_and_serial()?,
            digest_algorithm: sha256_algorithm(),
            attributes: Some(attributes),
            signature_algorithm: sequence(&algorithm_contents(SHA256_WITH_RSA)),
            signature: Vec::new(),
            unsigned_attributes: Vec::new(),
        };
        signer.sign(key)?;
        Ok(signer)
    }

    /// Signs the attributes as they are now (RFC 5652 section 5.4: with the tag of a SET).
    pub fn sign(&mut self, key: &RegionKey) -> anyhow::Result<()> {
        self.signature = key.sign(&tlv(0x31, &self.attributes.clone().unwrap_or_default().concat()))?;
        Ok(())
    }

    fn encode(&self) -> Vec<u8> {
        let mut parts = vec![self.version.clone(), self.identifier.clone(), self.digest_algorithm.clone()];
        if let Some(attributes) = &self.attributes {
            parts.push(tlv(0xa0, &attributes.concat()));
        }
        parts.extend([self.signature_algorithm.clone(), octet_string(&self.signature)]);
        if !self.unsigned_attributes.is_empty() {
            parts.push(tlv(0xa1, &self.unsigned_attributes.concat()));
        }
        sequence(&parts.concat())
    }
}

const INTEGER_ONE: &[u8] = &[2, 1, 1];
/// Contents octets of object identifiers.
pub const DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 7, 1];
pub const SIGNED_DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 7, 2];
pub const CONTENT_TYPE: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 3];
pub const MESSAGE_DIGEST: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 4];
pub const SIGNING_TIME: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 5];
pub const ALGORITHM_PROTECTION: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 52];
pub const SHA256_WITH_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 11];
pub const SHA1_WITH_RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 5];
pub const SHA256_OID: &[u8] = &[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1];
pub const SHA1_OID: &[u8] = &[0x2b, 14, 3, 2, 26];

/// With the NULL parameters that these algorithms have.
pub fn algorithm(oid: &[u8]) -> Vec<u8> {
    sequence(&algorithm_contents(oid))
}

fn algorithm_contents(algorithm: &[u8]) -> Vec<u8> {
    [oid(algorithm), vec![5, 0]].concat()
}

fn sha256_algorithm() -> Vec<u8> {
    algorithm(SHA256_OID)
}

pub fn attribute(kind: &[u8], value: &[u8]) -> Vec<u8> {
    attribute_with(kind, &[value])
}

pub fn attribute_with(kind: &[u8], values: &[&[u8]]) -> Vec<u8> {
    sequence(&[oid(kind), tlv(0x31, &values.concat())].concat())
}

pub fn oid(contents: &[u8]) -> Vec<u8> {
    tlv(6, contents)
}

pub fn octet_string(contents: &[u8]) -> Vec<u8> {
    tlv(4, contents)
}

pub fn sequence(contents: &[u8]) -> Vec<u8> {
    tlv(0x30, contents)
}

fn utc_time(now: Timestamp) -> Vec<u8> {
    let text = now.strftime("%y%m%d%H%M%SZ").to_string();
    tlv(23, text.as_bytes())
}

/// A value of definite length, in as few octets as it takes.
pub fn tlv(tag: u8, contents: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    let length = contents.len().to_be_bytes();
    match contents.len() {
        short @ 0..128 => out.push(short as u8),
        _ => {
            let significant = &length[length.iter().position(|octet| *octet != 0).unwrap_or(length.len() - 1)..];
            out.push(0x80 | significant.len() as u8);
            out.extend_from_slice(significant);
        }
    }
    out.extend_from_slice(contents);
    out
}

/// A value of indefinite length, ended by end-of-contents octets.
pub fn indefinite(tag: u8, contents: &[u8]) -> Vec<u8> {
    [&[tag, 0x80], contents, &[0, 0]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn openssl_reads_what_is_made_here() {
        let key = RegionKey::generate("us-east-2").unwrap();
        let content = b"{\n  \"region\" : \"us-east-2\"\n}";
        let directory = tempfile::tempdir().unwrap();
        let (document, certificate) = (directory.path().join("document"), directory.path().join("certificate"));
        let text = key.document(content).unwrap();
        assert!(text.starts_with("MIAGCSqGSIb3DQEHAqCAMIACAQExDzANBglghkgBZQMEAgEFADCABgkqhkiG9w0BBwGggCSA"));
        std::fs::write(&document, STANDARD.decode(text.replace('\n', "")).unwrap()).unwrap();
        std::fs::write(&certificate, key.pinned()).unwrap();
        let output = Command::new("openssl")
            .args(["cms", "-verify", "-inform", "DER", "-nointern", "-noverify", "-in"])
            .arg(&document)
            .arg("-certfile")
            .arg(&certificate)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout, content);
    }
}
