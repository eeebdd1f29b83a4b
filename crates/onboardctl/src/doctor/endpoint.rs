//! Asks the endpoint itself, as an agent would: TLS on 15443, then `Discover`.

use super::facts::{Answer, Served};
use super::material::Certificate;
use hyper_util::rt::TokioIo;
use onboarding_wire::onboarding::DiscoverRequest;
use onboarding_wire::onboarding::discovery_service_client::DiscoveryServiceClient;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub const PORT: u16 = 15443;
const RESOLVE_WITHIN: Duration = Duration::from_secs(5);
const DIAL_WITHIN: Duration = Duration::from_secs(5);
const CALL_WITHIN: Duration = Duration::from_secs(5);
/// Of a name with many addresses the first few are tried.
const MOST_ADDRESSES: usize = 4;

/// The addresses of a host name as this machine resolves it, or of an address itself.
pub async fn resolve(host: &str) -> Result<Vec<IpAddr>, String> {
    match timeout(RESOLVE_WITHIN, tokio::net::lookup_host((host, PORT))).await {
        Ok(Ok(found)) => {
            let mut addresses: Vec<IpAddr> = found.map(|address| address.ip()).collect();
            addresses.sort_unstable();
            addresses.dedup();
            Ok(addresses)
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", RESOLVE_WITHIN.as_secs())),
    }
}

/// The first of the addresses that answers; where none does, the first one's words.
pub async fn ask(host: &str, addresses: &[IpAddr]) -> Option<Answer> {
    let mut first = None;
    for address in addresses.iter().take(MOST_ADDRESSES) {
        let address = SocketAddr::new(*address, PORT);
        match connect(host, address).await {
            Ok((stream, certificate)) => {
                let uid = discover(host, stream).await;
                let certificate = Certificate::read(&certificate);
                return Some(Answer { address, outcome: Ok(Served { certificate, uid }) });
            }
            Err(why) => first = first.or(Some(Answer { address, outcome: Err(why) })),
        }
    }
    first
}

/// The first address of a gateway that answers to the name of an istiod, and the certificate that comes.
pub async fn ask_gateway(host: &str, port: u16, istiod: &str) -> Result<(SocketAddr, Certificate), String> {
    let addresses = resolve(host).await.map_err(|why| format!("doesn't resolve on this machine: {why}"))?;
    let mut first = None;
    for address in addresses.into_iter().take(MOST_ADDRESSES) {
        let address = SocketAddr::new(address, port);
        match connect(istiod, address).await {
            Ok((_, certificate)) => {
                let certificate = Certificate::read(&certificate);
                return certificate.map(|it| (address, it)).map_err(|why| format!("answers at {address}, but {why}"));
            }
            Err(why) => first = first.or(Some(format!("doesn't answer at {address}: {why}"))),
        }
    }
    Err(first.unwrap_or_else(|| "has no address".to_owned()))
}

async fn connect(host: &str, address: SocketAddr) -> Result<(TlsStream<TcpStream>, CertificateDer<'static>), String> {
    let name = ServerName::try_from(host.to_owned()).map_err(|_| "the host is no name that TLS knows".to_owned())?;
    let config = client_config().map_err(|error| error.to_string())?;
    let dial = async {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        stream.map_err(|error| format!("TLS: {error}"))
    };
    let stream = match timeout(DIAL_WITHIN, dial).await {
        Ok(stream) => stream?,
        Err(_) => return Err(format!("no answer within {} s", DIAL_WITHIN.as_secs())),
    };
    let presented = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let presented = presented.ok_or_else(|| "TLS: it presented no certificate".to_owned())?.clone().into_owned();
    Ok((stream, presented))
}

async fn discover(host: &str, stream: TlsStream<TcpStream>) -> Result<String, String> {
    let mut once = Some(stream);
    let connector = tower::service_fn(move |_: http::Uri| {
        let stream = once.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected));
        std::future::ready(stream.map(TokioIo::new))
    });
    let authority = match host.parse::<std::net::Ipv6Addr>() {
        Ok(ip) => format!("[{ip}]:{PORT}"),
        Err(_) => format!("{host}:{PORT}"),
    };
    let builder =
        tonic::transport::Endpoint::from_shared(format!("http://{authority}")).map_err(|it| it.to_string())?;
    let origin = format!("https://{authority}").parse().map_err(|_| "the host is no authority of a URL".to_owned())?;
    let call = async {
        let channel = builder.origin(origin).connect_with_connector(connector).await;
        let channel = channel.map_err(|_| "it doesn't speak HTTP/2".to_owned())?;
        let answer = DiscoveryServiceClient::new(channel).discover(DiscoverRequest {}).await;
        answer
            .map(|answer| answer.into_inner().plane_uid)
            .map_err(|status| format!("{:?}: {}", status.code(), status.message()))
    };
    timeout(CALL_WITHIN, call).await.unwrap_or_else(|_| Err(format!("no answer within {} s", CALL_WITHIN.as_secs())))
}

fn client_config() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Arc::new(Presented(provider.clone()));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Takes any certificate whose key the server has: it is what is looked at, and nothing secret is sent.
#[derive(Debug)]
struct Presented(Arc<CryptoProvider>);

impl ServerCertVerifier for Presented {
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
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
