//! The endpoint's certificate: from the Secret that the ControlPlane names, replaced while connections go on.

use crate::backend::{ConfigSource, Snapshot, TlsMaterial};
use anyhow::Context;
use arc_swap::ArcSwapOption;
use jiff::Timestamp;
use onboarding_runtime::readiness::Readiness;
use prometheus_client::metrics::gauge::Gauge;
use rustls::CipherSuite;
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

const CERTIFICATE: &str = "certificate";

/// The certificate of the newest Secret that could be used.
#[derive(Debug)]
pub struct Certificates {
    current: ArcSwapOption<CertifiedKey>,
    /// What is wrong with a newer one.
    fault: ArcSwapOption<String>,
    expiry: Gauge,
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }
}

impl Certificates {
    /// `expiry`: where the end of the one in use is shown, in seconds since 1970.
    pub fn new(expiry: Gauge) -> Self {
        Self { current: ArcSwapOption::empty(), fault: ArcSwapOption::empty(), expiry }
    }

    /// Why the certificate in use is not the configured one.
    pub fn fault(&self) -> Option<String> {
        self.fault.load().as_deref().cloned()
    }

    /// Follows the configuration until `stop`. A certificate that can't be used changes nothing but the readiness.
    pub async fn follow(&self, config: &dyn ConfigSource, readiness: &Readiness, stop: &CancellationToken) {
        let mut snapshots = config.watch();
        let mut last = None;
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            let newest = Some((snapshot.tls.clone(), snapshot.plane.as_ref().map(|plane| plane.hosts.clone())));
            if newest != last {
                self.take(&snapshot, readiness);
                last = newest;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = snapshots.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Also called once before the listener opens, so that the first connection finds a certificate.
    pub fn take(&self, snapshot: &Snapshot, readiness: &Readiness) {
        let hosts = snapshot.plane.as_ref().map(|plane| plane.hosts.as_slice()).unwrap_or_default();
        let fault = match snapshot.tls.as_deref().map(|material| Certificate::read(material, hosts)) {
            Some(Ok(certificate)) => {
                let changed = self.current.load().as_deref().is_none_or(|held| held.cert != certificate.key.cert);
                if changed {
                    tracing::info!(not_after = %certificate.not_after, "the endpoint's certificate was taken from its Secret");
                }
                self.current.store(Some(Arc::new(certificate.key)));
                self.expiry.set(certificate.not_after.as_second());
                readiness.ready(CERTIFICATE);
                certificate.advice.map(|advice| format!("agents will not accept the endpoint's certificate: {advice}"))
            }
            Some(Err(error)) => {
                let fault = format!("the certificate of the Secret can't be used: {error:#}");
                self.keep(&fault, readiness);
                Some(fault)
            }
            None => {
                // The configuration says itself that the Secret is missing.
                let named = "spec.meshExpansion.onboarding.endpoint.secretName";
                self.keep(&format!("there is no Secret of type kubernetes.io/tls with the name in {named}"), readiness);
                None
            }
        };
        let before = self.fault.swap(fault.clone().map(Arc::new));
        if let Some(fault) = fault.filter(|fault| before.as_deref() != Some(fault)) {
            tracing::error!(fault, "the endpoint's certificate has a fault; one that could be used stays in use");
        }
    }

    /// A certificate that is in use stays so.
    fn keep(&self, fault: &str, readiness: &Readiness) {
        if self.current.load().is_none() {
            readiness.missing(CERTIFICATE, fault);
        }
    }
}

/// A certificate that can be served.
struct Certificate {
    key: CertifiedKey,
    not_after: Timestamp,
    /// Why agents will not accept it all the same.
    advice: Option<String>,
}

impl Certificate {
    fn read(material: &TlsMaterial, hosts: &[String]) -> anyhow::Result<Self> {
        let key = certified_key(material)?;
        let leaf = key.end_entity_cert().context("tls.crt has no certificate")?;
        let not_after = {
            let (_, parsed) = x509_parser::parse_x509_certificate(leaf).context("tls.crt is no X.509 certificate")?;
            Timestamp::from_second(parsed.validity().not_after.timestamp()).unwrap_or(Timestamp::MAX)
        };
        let parsed = ParsedCertificate::try_from(leaf).context("tls.crt is no certificate of a server")?;
        let lacks = |host: &&String| {
            ServerName::try_from(host.as_str()).map_or(true, |name| verify_server_name(&parsed, &name).is_err())
        };
        let advice = match hosts.iter().find(lacks) {
            _ if not_after <= Timestamp::now() => Some(format!("it expired at {not_after}; renew the Secret")),
            Some(host) => Some(format!(
                "it is not for {host}, which is among spec.meshExpansion.onboarding.endpoint.hosts; renew the Secret with that name in it"
            )),
            None => None,
        };
        Ok(Self { not_after, advice, key })
    }
}

fn certified_key(material: &TlsMaterial) -> anyhow::Result<CertifiedKey> {
    let chain = CertificateDer::pem_slice_iter(material.certificate_chain.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .context("tls.crt is no chain of PEM certificates")?;
    let key =
        PrivateKeyDer::from_pem_slice(material.private_key.as_bytes()).context("tls.key is no PEM private key")?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    CertifiedKey::from_der(chain, key, &provider)
        .context("tls.key does not belong to tls.crt, or is of an unknown kind")
}

/// TLS 1.2 or later. Nothing is resumed: each connection begins with the certificate of its time.
/// `protocols`: of ALPN, the preferred one first.
///
/// # Errors
/// The crypto library knows no such TLS.
pub fn acceptor(certificates: Arc<Certificates>, protocols: &[&str]) -> anyhow::Result<TlsAcceptor> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // What RFC 8446 has everybody know. Its hash is one that processors have instructions for, SHA-384 isn't, and a handshake is hashes beside
    // its signature.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .context("TLS can't be set up")?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    config.ignore_client_order = true;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use onboarding_testkit::oidc::make_tls;

    fn material(names: &[&str]) -> TlsMaterial {
        let made = make_tls(names).unwrap();
        TlsMaterial { certificate_chain: made.certificate_chain, private_key: made.private_key }
    }

    fn snapshot(tls: Option<TlsMaterial>) -> Snapshot {
        Snapshot { tls: tls.map(Arc::new), ..Snapshot::default() }
    }

    #[test]
    fn a_certificate_for_another_name_is_served_and_said() {
        let hosts = ["a.corp.example".to_owned(), "192.0.2.1".to_owned()];
        let advice = |names: &[&str]| Certificate::read(&material(names), &hosts).unwrap().advice;
        assert_eq!(advice(&["*.corp.example", "192.0.2.1"]), None);
        let said = advice(&["a.corp.example"]).unwrap();
        assert!(said.contains("192.0.2.1") && said.contains("renew the Secret"), "{said}");
        let said = advice(&["b.corp.example", "192.0.2.1"]).unwrap();
        assert!(said.contains("a.corp.example"), "{said}");
    }

    #[test]
    fn what_can_not_be_used_leaves_what_could() {
        let certificates = Certificates::new(Gauge::default());
        let readiness = Readiness::default();
        certificates.take(&snapshot(None), &readiness);
        assert!(readiness.reasons()[0].starts_with("certificate: there is no Secret"), "{:?}", readiness.reasons());
        let good = material(&["a.example"]);
        let broken = [
            (TlsMaterial { certificate_chain: String::new(), ..good.clone() }, "tls.crt"),
            (TlsMaterial { private_key: "nonsense".to_owned(), ..good.clone() }, "tls.key is no PEM"),
            (TlsMaterial { private_key: material(&["a.example"]).private_key, ..good.clone() }, "does not belong"),
        ];
        for (material, words) in broken {
            certificates.take(&snapshot(Some(material)), &readiness);
            let fault = certificates.fault().unwrap();
            assert!(fault.contains(words), "{fault} instead of {words}");
            assert!(certificates.current.load().is_none());
        }
        certificates.take(&snapshot(Some(good.clone())), &readiness);
        assert_eq!((readiness.reasons(), certificates.fault()), (Vec::new(), None));
        let held = certificates.current.load_full();
        certificates.take(&snapshot(Some(TlsMaterial { private_key: String::new(), ..good })), &readiness);
        assert!(certificates.fault().is_some());
        assert!(readiness.reasons().is_empty());
        assert!(Arc::ptr_eq(&held.unwrap(), &certificates.current.load_full().unwrap()));
        certificates.take(&snapshot(None), &readiness);
        assert!(certificates.current.load().is_some());
    }
}
