//! The certificate and key of the endpoint, as far as a diagnosis looks at them.

use jiff::Timestamp;
use rustls::client::verify_server_name;
use rustls::crypto::aws_lc_rs;
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

/// The first certificate of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    pub der: Vec<u8>,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
    /// Its issuer is itself.
    pub self_signed: bool,
}

impl Certificate {
    pub fn read(der: &[u8]) -> Result<Self, String> {
        let (_, parsed) =
            x509_parser::parse_x509_certificate(der).map_err(|_| "it is no X.509 certificate".to_owned())?;
        let at = |time: x509_parser::time::ASN1Time| Timestamp::from_second(time.timestamp()).unwrap_or(Timestamp::MAX);
        Ok(Self {
            der: der.to_owned(),
            not_before: at(parsed.validity().not_before),
            not_after: at(parsed.validity().not_after),
            self_signed: parsed.issuer().as_raw() == parsed.subject().as_raw(),
        })
    }

    /// Host names and addresses among these that it isn't for.
    pub fn lacks<'a>(&self, hosts: impl IntoIterator<Item = &'a str>) -> Vec<String> {
        let der = CertificateDer::from(self.der.as_slice());
        let parsed = ParsedCertificate::try_from(&der);
        let is_for = |host: &str| {
            let name = ServerName::try_from(host);
            matches!((&parsed, name), (Ok(parsed), Ok(name)) if verify_server_name(parsed, &name).is_ok())
        };
        hosts.into_iter().filter(|host| !is_for(host)).map(str::to_owned).collect()
    }
}

/// The certificate of a Secret of type kubernetes.io/tls; its key must fit.
///
/// # Errors
/// What of it can't be used, in words.
pub fn of_secret(certificate: &[u8], key: &[u8]) -> Result<Certificate, String> {
    let chain = CertificateDer::pem_slice_iter(certificate).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|_| "its tls.crt is no chain of PEM certificates".to_owned())?;
    let leaf = chain.first().ok_or("its tls.crt has no certificate in PEM")?;
    let leaf = Certificate::read(leaf).map_err(|why| format!("its tls.crt: {why}"))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| "its tls.key is no PEM private key".to_owned())?;
    CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())
        .map_err(|_| "its tls.key does not belong to its tls.crt, or is of an unknown kind".to_owned())?;
    Ok(leaf)
}
