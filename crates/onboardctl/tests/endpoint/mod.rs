//! A server on 15443 of a loopback address of its own, with TLS, that answers `Discover`.

use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use onboarding_testkit::oidc::{MadeTls, make_tls};
use onboarding_wire::onboarding::discovery_service_server::{DiscoveryService, DiscoveryServiceServer};
use onboarding_wire::onboarding::{DiscoverRequest, DiscoverResponse};
use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

const PORT: u16 = 15443;
/// So that it can be a gateway that leads there, too.
const ISTIOD: &str = "istiod.istio-system.svc";

/// It ends with this value.
pub struct Endpoint {
    pub address: SocketAddr,
    pub tls: Arc<MadeTls>,
    _runtime: Runtime,
}

struct Fixed(String);

#[tonic::async_trait]
impl DiscoveryService for Fixed {
    async fn discover(
        &self,
        _: tonic::Request<DiscoverRequest>,
    ) -> Result<tonic::Response<DiscoverResponse>, tonic::Status> {
        Ok(tonic::Response::new(DiscoverResponse { plane_uid: self.0.clone(), ..DiscoverResponse::default() }))
    }
}

impl Endpoint {
    pub fn start(uid: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(listen());
        let address = listener.local_addr().unwrap();
        let tls = Arc::new(make_tls(&[&address.ip().to_string(), ISTIOD]).unwrap());
        let acceptor = acceptor(&tls);
        let service = DiscoveryServiceServer::new(Fixed(uid.to_owned()));
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, service) = (acceptor.clone(), service.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = TowerToHyperService::new(service);
                    let _ =
                        http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, tls, _runtime: runtime }
    }
}

/// The whole of 127.0.0.0/8 is this machine; others take an address of their own too.
async fn listen() -> TcpListener {
    let own = u16::try_from(std::process::id() % 65_000).unwrap();
    let [high, low] = own.to_be_bytes();
    for third in 1..250 {
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::new(127, high.max(1), low, third), PORT)).await {
            return listener;
        }
    }
    panic!("there is no loopback address with a free port {PORT}");
}

fn acceptor(tls: &MadeTls) -> TlsAcceptor {
    let chain =
        CertificateDer::pem_slice_iter(tls.certificate_chain.as_bytes()).collect::<Result<Vec<_>, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_slice(tls.private_key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_no_client_auth().with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}
