//! istiod's certificate authority: one call, and the task that keeps a certificate fresh by it (`renewal`).

mod renewal;
#[cfg(test)]
mod tests;

pub(super) use renewal::{Renewal, Standing};

use crate::boot::{Address, Istio, Secret};
use crate::mesh::{CertificateError, Pending};
use crate::store::StoredIdentity;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use onboarding_wire::istio_ca::IstioCertificateRequest;
use onboarding_wire::istio_ca::istio_certificate_service_client::IstioCertificateServiceClient;
use onboarding_wire::onboarding as pb;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::transport::{Channel, Uri};

/// What a certificate is asked for with.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Credentials {
    pub address: Address,
    /// The name of istiod's certificate, and the SNI.
    pub name: String,
    /// PEM bundle.
    pub roots: String,
    pub token: Secret,
    pub token_expires_at: Timestamp,
    /// The identity that this workload has.
    pub spiffe_id: String,
    /// The cluster that made the token, for an istiod that serves several.
    pub cluster: String,
    /// The life that is asked for.
    pub validity: Duration,
}

/// Why there is no certificate. What istiod says of a token is no more than that it isn't good.
#[derive(Debug, thiserror::Error)]
pub(super) enum IstiodError {
    #[error("can't connect to istiod at {address}; does the network let this host through to that port?")]
    Connect {
        address: Address,
        #[source]
        source: io::Error,
    },
    #[error("no secure connection to istiod at {address}: its certificate has to be for {name}, by the mesh's root")]
    Tls {
        address: Address,
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("{address} answers, but not as istiod's certificate authority")]
    NotGrpc {
        address: Address,
        #[source]
        source: tonic::transport::Error,
    },
    #[error("istiod at {address} did not answer within {seconds} s")]
    TooSlow { address: Address, seconds: u64 },
    #[error("istiod's certificate authority refuses: {code:?}: {message}")]
    Refused { code: tonic::Code, message: String },
    #[error(
        "the token for istiod's certificate authority expired at {0}, and no certificate is valid instead; the plane sends a new one over the session"
    )]
    TokenExpired(Timestamp),
    #[error("the credentials for istiod can't be used: {0}")]
    Unusable(&'static str),
    #[error("the certificate of istiod can't be used")]
    Certificate(#[from] CertificateError),
}

const WITHIN: Duration = Duration::from_secs(15);
/// What Istio's own agents ask for, where this variable of theirs says nothing else: an istiod that allows less refuses what is longer.
const VALIDITY: Duration = Duration::from_secs(24 * 3600);
const VALIDITY_VARIABLE: &str = "SECRET_TTL";
const LARGEST_ANSWER: usize = 1 << 20;

impl Credentials {
    /// `istio` is placed.
    pub(super) fn of(istio: &Istio, spiffe_id: &str) -> anyhow::Result<Self> {
        #[derive(serde::Deserialize)]
        struct Node {
            #[serde(default)]
            metadata: Metadata,
        }
        #[derive(Default, serde::Deserialize)]
        struct Metadata {
            #[serde(rename = "CLUSTER_ID")]
            cluster: Option<String>,
        }
        let address = istio.discovery_address.clone();
        let node: Node = serde_json::from_slice(&istio.node)?;
        let validity = istio.environment.get(VALIDITY_VARIABLE).and_then(|text| onboarding_kinds::duration(text).ok());
        Ok(Self {
            address: address.ok_or_else(|| anyhow::anyhow!("the address of istiod isn't known"))?,
            name: istio.istiod_san.clone(),
            roots: istio.root_certificates.clone(),
            token: istio.token.clone(),
            token_expires_at: istio.token_expires_at,
            spiffe_id: spiffe_id.to_owned(),
            cluster: node.metadata.cluster.unwrap_or_default(),
            // Less than a second would be none to istiod, and so the longest.
            validity: validity.filter(|validity| validity.as_secs() > 0).unwrap_or(VALIDITY),
        })
    }
}

/// Makes a key on this host and has its certificate signed, by what the token says, or where that has expired by `current`.
///
/// The roots of the result are those of `credentials`, and the one that istiod signs by now.
pub(super) async fn certificate(
    credentials: &Credentials,
    current: Option<&StoredIdentity>,
) -> Result<StoredIdentity, IstiodError> {
    let now = Timestamp::now();
    let bearer = credentials.token_expires_at > now;
    let client = current.filter(|identity| !bearer && identity.expires_at > now);
    if !bearer && client.is_none() {
        return Err(IstiodError::TokenExpired(credentials.token_expires_at));
    }
    let pending = Pending::for_identity(&credentials.spiffe_id)?;
    let mut request = tonic::Request::new(IstioCertificateRequest {
        csr: pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", pending.csr.as_slice())),
        validity_duration: i64::try_from(credentials.validity.as_secs()).unwrap_or(i64::MAX),
        metadata: None,
    });
    if bearer {
        let mut value: tonic::metadata::AsciiMetadataValue = format!("Bearer {}", credentials.token.0)
            .parse()
            .map_err(|_| IstiodError::Unusable("the token does not fit a header"))?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
    }
    if let Ok(cluster) = credentials.cluster.parse() {
        request.metadata_mut().insert("clusterid", cluster);
    }
    let call = async {
        let channel = connect(credentials, client).await?;
        let mut client = IstioCertificateServiceClient::new(channel).max_decoding_message_size(LARGEST_ANSWER);
        client.create_certificate(request).await.map_err(|status| IstiodError::Refused {
            code: status.code(),
            message: status.message().chars().take(512).collect(),
        })
    };
    let slow = || IstiodError::TooSlow { address: credentials.address.clone(), seconds: WITHIN.as_secs() };
    let mut answer = timeout(WITHIN, call).await.map_err(|_| slow())??.into_inner().cert_chain;
    // "The leaf cert is the first element, and the root cert is the last element."
    let root = if answer.len() > 1 { answer.pop().unwrap_or_default() } else { String::new() };
    let answer = pb::Certificate {
        chain: answer.iter().map(|part| format!("{}\n", part.trim_end())).collect(),
        roots: union(&credentials.roots, &root),
        expires_at: None,
    };
    let identity = pending.accept(answer, now)?;
    if identity.spiffe_id != credentials.spiffe_id {
        let (came, wanted) = (identity.spiffe_id, credentials.spiffe_id.clone());
        return Err(CertificateError::AnotherIdentity { came, wanted }.into());
    }
    Ok(identity)
}

/// Both bundles, each certificate once.
pub(super) fn union(one: &str, other: &str) -> String {
    let mut certificates: Vec<pem::Pem> = Vec::new();
    for bundle in [one, other] {
        for certificate in pem::parse_many(bundle.as_bytes()).unwrap_or_default() {
            if !certificates.iter().any(|known| known.contents() == certificate.contents()) {
                certificates.push(certificate);
            }
        }
    }
    pem::encode_many(&certificates)
}

async fn connect(credentials: &Credentials, client: Option<&StoredIdentity>) -> Result<Channel, IstiodError> {
    let address = &credentials.address;
    let config = tls(credentials, client)?;
    let server_name = ServerName::try_from(credentials.name.clone())
        .map_err(|_| IstiodError::Unusable("the name of istiod is no DNS name"))?;
    let stream = TcpStream::connect((address.host.as_str(), address.port))
        .await
        .map_err(|source| IstiodError::Connect { address: address.clone(), source })?;
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(server_name, stream)
        .await
        .map_err(|source| IstiodError::Tls { address: address.clone(), name: credentials.name.clone(), source })?;
    let mut once = Some(stream);
    let connector = tower::service_fn(move |_: Uri| {
        let stream = once.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        std::future::ready(stream.map(TokioIo::new))
    });
    let not_grpc = |source| IstiodError::NotGrpc { address: address.clone(), source };
    let mut endpoint = tonic::transport::Endpoint::from_shared(format!("http://{address}")).map_err(not_grpc)?;
    if let Ok(origin) = format!("https://{}", credentials.name).parse() {
        endpoint = endpoint.origin(origin);
    }
    endpoint.connect_with_connector(connector).await.map_err(not_grpc)
}

fn tls(credentials: &Credentials, client: Option<&StoredIdentity>) -> Result<rustls::ClientConfig, IstiodError> {
    let unusable = IstiodError::Unusable;
    let mut roots = rustls::RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(credentials.roots.as_bytes()).flatten());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|_| unusable("no version of TLS can be used"))?
        .with_root_certificates(roots);
    let mut config = match client {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let chain = CertificateDer::pem_slice_iter(identity.certificate_chain.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| unusable("the kept certificate is not PEM"))?;
            let key = PrivateKeyDer::from_pem_slice(identity.private_key.as_bytes())
                .map_err(|_| unusable("the kept key is not PEM"))?;
            builder.with_client_auth_cert(chain, key).map_err(|_| unusable("the kept certificate and key don't fit"))?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
