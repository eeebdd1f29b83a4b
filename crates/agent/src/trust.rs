//! Which CAs the endpoint's certificate may come from.

use crate::store::{self, StoreError};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::aws_lc_rs;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::path::Path;
use std::sync::Arc;

/// CAs in a container: PEM text, used instead of the system's trust store.
pub const ROOT_CERTS_VARIABLE: &str = "ONBOARDING_AGENT_ROOT_CERTS";
/// CAs on a VM: added to the system's trust store where the file is there.
pub const ROOT_CERTS_FILE: &str = "/etc/onboarding-agent/root-certs.pem";

/// The CAs, and where they were found.
#[derive(Debug, Clone)]
pub struct Trust {
    roots: RootCertStore,
    /// `system trust store (142), /etc/onboarding-agent/root-certs.pem (1)`
    pub described: String,
}

/// Why no CA can be trusted.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error("{what} has no certificate in PEM (-----BEGIN CERTIFICATE-----) that can be read")]
    NotPem { what: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("no version of TLS can be used")]
    Tls(#[from] rustls::Error),
}

impl Trust {
    /// The text of [`ROOT_CERTS_VARIABLE`] alone where it is given, else the system's trust store and [`ROOT_CERTS_FILE`].
    pub fn load(variable: Option<&str>, file: &Path) -> Result<Self, TrustError> {
        let mut roots = RootCertStore::empty();
        if let Some(text) = variable {
            let count = add_pem(&mut roots, ROOT_CERTS_VARIABLE, text.as_bytes())?;
            return Ok(Self { roots, described: format!("{ROOT_CERTS_VARIABLE} ({count})") });
        }
        let (added, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let mut described = format!("system trust store ({added})");
        if let Some(text) = store::read_bounded(file, 4 * 1024 * 1024)? {
            let name = file.display().to_string();
            let count = add_pem(&mut roots, &name, &text)?;
            described.push_str(&format!(", {name} ({count})"));
        }
        Ok(Self { roots, described })
    }

    /// A client that speaks HTTP/2. `insecure`: verifies nothing.
    pub fn client_config(&self, insecure: bool) -> Result<ClientConfig, TrustError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let mut config = if insecure {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate)).with_no_client_auth()
        } else {
            builder.with_root_certificates(self.roots.clone()).with_no_client_auth()
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

fn add_pem(roots: &mut RootCertStore, what: &str, text: &[u8]) -> Result<usize, TrustError> {
    let not_pem = || TrustError::NotPem { what: what.to_owned() };
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(text).collect::<Result<_, _>>().map_err(|_| not_pem())?;
    let (added, ignored) = roots.add_parsable_certificates(certificates);
    if added == 0 || ignored > 0 {
        return Err(not_pem());
    }
    Ok(added)
}

/// Takes whoever answers: for `insecureSkipVerify`, and for probes of the application, which is asked whether it is ready and not who it is.
///
/// The handshake's signature isn't checked either. It would prove that the server has the key of a certificate that nobody verified, that
/// is, nothing; and to check it the certificate has to be of X.509 v3, which what `openssl x509 -req` makes for an application isn't.
#[derive(Debug)]
pub(crate) struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
