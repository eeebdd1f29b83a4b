//! HTTP to somebody else's server: bounded in time and size, verified TLS, and no redirect is ever followed.

use reqwest::redirect::Policy;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

/// A client with the system's roots, and perhaps more.
#[derive(Debug, Clone)]
pub(crate) struct Fetcher {
    client: reqwest::Client,
}

/// What came back, whatever its status.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub status: u16,
    pub body: Vec<u8>,
}

/// Why nothing usable came back. Says nothing of the request but its time and size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("did not answer within {} s", .0.as_secs())]
    Slow(Duration),
    #[error("answered with more than {0} bytes")]
    TooLarge(usize),
    #[error("answered with a redirect ({0}), which isn't followed")]
    Redirect(u16),
    #[error("can't be asked: {0}")]
    Failed(String),
}

/// Where a client may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scheme {
    HttpsOnly,
    /// An address that the operator named, plain or not; no proxy is between.
    AsNamed,
}

impl Fetcher {
    pub fn new(scheme: Scheme, extra_roots: Option<&str>) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        // A system without roots trusts nobody: asking then fails and says so.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(pem) = extra_roots {
            let mut count = 0;
            for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
                let certificate = certificate.map_err(|error| format!("the extra roots aren't PEM: {error}"))?;
                roots.add(certificate).map_err(|error| format!("one of the extra roots can't be used: {error}"))?;
                count += 1;
            }
            if count == 0 {
                return Err("the extra roots have no certificate in PEM".to_owned());
            }
        }
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS can't be set up: {error}"))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(Policy::none())
            .referer(false)
            .http1_only()
            .pool_max_idle_per_host(4);
        let builder = match scheme {
            Scheme::HttpsOnly => builder.https_only(true),
            Scheme::AsNamed => builder.no_proxy(),
        };
        let client = builder.build().map_err(|error| format!("no HTTP client: {}", innermost(&error)))?;
        Ok(Self { client })
    }

    pub fn get(&self, url: &str) -> reqwest::RequestBuilder {
        self.client.get(url)
    }

    pub fn post(&self, url: &str) -> reqwest::RequestBuilder {
        self.client.post(url)
    }

    /// Sends it. `within` bounds all of it, from resolving the name to the last byte.
    pub async fn send(
        &self,
        request: reqwest::RequestBuilder,
        within: Duration,
        largest: usize,
    ) -> Result<Answer, FetchError> {
        let exchange = async {
            let mut response = request.send().await.map_err(failed)?;
            let status = response.status();
            if status.is_redirection() {
                return Err(FetchError::Redirect(status.as_u16()));
            }
            let mut body = Vec::new();
            while let Some(chunk) = response.chunk().await.map_err(failed)? {
                if body.len() + chunk.len() > largest {
                    return Err(FetchError::TooLarge(largest));
                }
                body.extend_from_slice(&chunk);
            }
            Ok(Answer { status: status.as_u16(), body })
        };
        tokio::time::timeout(within, exchange).await.unwrap_or(Err(FetchError::Slow(within)))
    }
}

fn failed(error: reqwest::Error) -> FetchError {
    FetchError::Failed(innermost(&error))
}

/// The cause: what is around it repeats the address.
fn innermost(error: &dyn Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
