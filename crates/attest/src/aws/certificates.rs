//! The certificates that AWS signs instance identity documents with: self-signed, one or more per region, pinned.
//!
//! They come from the EC2 User Guide, "AWS public certificates for instance identity document signatures" (RSA-2048).
//! There is no chain to build and no validity to check: which key AWS uses in a region is known, or the document is refused.

use super::region;
use aws_lc_rs::digest::{SHA256, digest};
use std::collections::BTreeMap;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The certificates by region.
#[derive(Debug, Clone, Default)]
pub struct Certificates {
    by_region: BTreeMap<String, Vec<Pinned>>,
}

/// What is needed of one certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// The issuer's name in DER.
    pub(crate) issuer: Vec<u8>,
    /// The serial number: contents octets of its INTEGER.
    pub(crate) serial: Vec<u8>,
    /// RSAPublicKey in DER (RFC 8017 appendix A.1.1).
    pub(crate) public_key: Vec<u8>,
    /// SHA-256 of the certificate.
    pub fingerprint: [u8; 32],
}

/// A file of certificates that can't be used; `line` is where the certificate begins.
#[derive(Debug, thiserror::Error)]
#[error("AWS certificates, line {line}: {problem}")]
pub struct CertificatesError {
    pub line: usize,
    pub problem: String,
}

/// Regions of AWS, as its documentation lists them.
const PUBLISHED: &str = include_str!("../../data/aws-instance-identity-rsa2048.pem");

impl Certificates {
    /// Those that AWS publishes.
    pub fn published() -> Result<Self, CertificatesError> {
        let mut all = Self::default();
        all.add(PUBLISHED)?;
        Ok(all)
    }

    /// Adds PEM, each certificate after a line `# <region>` (what follows the region's name on that line is ignored).
    /// A region may have several: documents of any of them are accepted.
    pub fn add(&mut self, text: &str) -> Result<(), CertificatesError> {
        for block in blocks(text)? {
            let failed = |problem: String| CertificatesError { line: block.line, problem };
            if region::partition(block.region).is_none() {
                return Err(failed(format!(
                    "no region's name before it but {:?}; put a line like \"# us-east-2\" there",
                    block.region
                )));
            }
            let pinned = Pinned::read(&block.pem).map_err(failed)?;
            self.by_region.entry(block.region.to_owned()).or_default().push(pinned);
        }
        Ok(())
    }

    /// Of this region; empty: none is known.
    pub fn of(&self, region: &str) -> &[Pinned] {
        self.by_region.get(region).map_or(&[], Vec::as_slice)
    }

    pub fn regions(&self) -> impl Iterator<Item = &str> {
        self.by_region.keys().map(String::as_str)
    }
}

impl Pinned {
    fn read(pem: &str) -> Result<Self, String> {
        let block = pem::parse(pem).map_err(|error| format!("not PEM: {error}"))?;
        let (rest, certificate) =
            X509Certificate::from_der(block.contents()).map_err(|error| format!("not a certificate: {error}"))?;
        let key = certificate.public_key();
        let size = match key.parsed() {
            Ok(x509_parser::public_key::PublicKey::RSA(key)) => key.key_size(),
            _ => 0,
        };
        if size != 2048 || !rest.is_empty() {
            return Err("not one certificate with an RSA key of 2048 bits".to_owned());
        }
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest(&SHA256, block.contents()).as_ref());
        Ok(Self {
            issuer: certificate.issuer().as_raw().to_vec(),
            serial: certificate.raw_serial().to_vec(),
            public_key: key.subject_public_key.data.to_vec(),
            fingerprint,
        })
    }
}

struct Block<'a> {
    line: usize,
    region: &'a str,
    /// The last comment line before it.
    #[cfg_attr(not(test), expect(dead_code, reason = "the test compares it with the fingerprint"))]
    comment: &'a str,
    pem: String,
}

fn blocks(text: &str) -> Result<Vec<Block<'_>>, CertificatesError> {
    let mut all = Vec::new();
    let mut comment = "";
    let mut open: Option<(usize, String)> = None;
    for (number, line) in (1..).zip(text.lines()) {
        let trimmed = line.trim();
        match &mut open {
            Some((begin, pem)) => {
                pem.push_str(trimmed);
                pem.push('\n');
                if trimmed == "-----END CERTIFICATE-----" {
                    let region = comment.split_whitespace().next().unwrap_or_default();
                    all.push(Block { line: *begin, region, comment, pem: std::mem::take(pem) });
                    (open, comment) = (None, "");
                }
            }
            None if trimmed == "-----BEGIN CERTIFICATE-----" => open = Some((number, format!("{trimmed}\n"))),
            None => match trimmed.strip_prefix('#') {
                Some(text) => comment = text,
                None if trimmed.is_empty() => {}
                None => {
                    return Err(CertificatesError {
                        line: number,
                        problem: "neither a comment nor a certificate in PEM".to_owned(),
                    });
                }
            },
        }
    }
    match open {
        Some((line, _)) => Err(CertificatesError { line, problem: "the certificate has no end".to_owned() }),
        None => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onboarding_core::identity::Thumbprint;

    #[test]
    fn each_published_certificate_is_the_one_that_its_comment_names() {
        let published = Certificates::published().unwrap();
        let blocks = blocks(PUBLISHED).unwrap();
        assert!(blocks.len() >= 38, "{}", blocks.len());
        for block in &blocks {
            let fingerprint = block.comment.rsplit_once("sha256:").unwrap().1;
            let [pinned] = published.of(block.region) else { panic!("{}: not one certificate", block.region) };
            assert_eq!(Thumbprint(pinned.fingerprint).to_string(), fingerprint, "{}", block.region);
        }
        let mut regions: Vec<_> = published.regions().collect();
        regions.dedup();
        assert_eq!(regions.len(), blocks.len());
        // Each region has a key of its own: a document of one is none of another.
        let mut keys: Vec<_> = regions.iter().map(|region| &published.of(region)[0].public_key).collect();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), regions.len());
    }

    #[test]
    fn a_file_of_further_certificates_is_refused_with_its_line() {
        let one = {
            let begin = PUBLISHED.find("-----BEGIN").unwrap();
            let end = begin + PUBLISHED[begin..].find("-----END CERTIFICATE-----").unwrap() + 26;
            PUBLISHED[begin..end].to_owned()
        };
        let mut certificates = Certificates::published().unwrap();
        certificates.add(&format!("# us-east-2 emulated\n{one}")).unwrap();
        assert_eq!(certificates.of("us-east-2").len(), 2);
        let ec = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap().cert.pem();
        for (text, problem) in [
            (one.clone(), "line 1: no region's name before it but \"\""),
            (format!("\n# moon-1\n{one}"), "line 3: no region's name before it but \"moon-1\""),
            (format!("# us-east-2\n{one}{one}"), "no region's name before it"),
            (format!("# us-east-2\n{}", &one[..400]), "line 2: the certificate has no end"),
            (format!("# us-east-2\n{}", one.replace("MIID", "MIIE")), "line 2: not a certificate"),
            (format!("# us-east-2\n{ec}"), "RSA key of 2048 bits"),
            ("us-east-2\n".to_owned(), "line 1: neither a comment"),
        ] {
            let error = certificates.add(&text).unwrap_err().to_string();
            assert!(error.contains(problem), "{problem}: {error}");
        }
    }
}
