//! The way in: TCP, TLS 1.2 or later, HTTP/2; each step bounded in number and time. Never plain text.

use crate::authority::Authority;
use crate::backend::{ConfigSource, Snapshot, TlsMaterial};
use crate::connection::Connection;
use crate::limits::Limits;
use crate::metrics::Why;
use anyhow::Context;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use onboarding_runtime::readiness::Readiness;
use onboarding_runtime::shutdown::Drain;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tower::ServiceExt;

const CERTIFICATE: &str = "certificate";

/// The certificate of the newest Secret that could be used.
#[derive(Debug, Default)]
pub(crate) struct Certificates {
    current: arc_swap::ArcSwapOption<CertifiedKey>,
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }
}

impl Certificates {
    /// Follows the configuration until `stop`. A certificate that can't be used changes nothing but the readiness.
    pub(crate) async fn follow(&self, config: &dyn ConfigSource, readiness: &Readiness, stop: &CancellationToken) {
        let mut snapshots = config.watch();
        let mut last = None;
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            if snapshot.tls != last {
                self.take(&snapshot, readiness);
                last = snapshot.tls.clone();
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = snapshots.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Also called once before the listener opens, so that the first connection finds a certificate.
    pub(crate) fn take(&self, snapshot: &Snapshot, readiness: &Readiness) {
        match snapshot.tls.as_deref().map(certified_key) {
            Some(Ok(key)) => {
                self.current.store(Some(Arc::new(key)));
                readiness.ready(CERTIFICATE);
                tracing::info!("the endpoint's certificate was taken from its Secret");
            }
            Some(Err(error)) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "the endpoint's certificate can't be used; the one before stays"
                );
                if self.current.load().is_none() {
                    readiness.missing(CERTIFICATE, format!("{error:#}"));
                }
            }
            None if self.current.load().is_none() => {
                readiness.missing(
                    CERTIFICATE,
                    "there is no Secret of type kubernetes.io/tls with the name in spec.meshExpansion.onboarding.endpoint.secretName",
                );
            }
            None => tracing::error!("the Secret with the endpoint's certificate is gone; the last one stays in use"),
        }
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

/// Accepts connections until `stop`.
pub(crate) struct Listener {
    pub(crate) tcp: TcpListener,
    pub(crate) tls: TlsAcceptor,
    pub(crate) routes: Routes,
    pub(crate) authority: Arc<Authority>,
    pub(crate) limits: Limits,
    pub(crate) drain: Drain,
}

pub(crate) fn acceptor(certificates: Arc<Certificates>) -> anyhow::Result<TlsAcceptor> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .context("TLS can't be set up")?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

impl Listener {
    pub(crate) async fn run(self, stop: CancellationToken) {
        let connections = Arc::new(Semaphore::new(self.limits.connections));
        let handshakes = Arc::new(Semaphore::new(self.limits.handshakes));
        let this = Arc::new(self);
        loop {
            let permit = tokio::select! {
                () = stop.cancelled() => return,
                // Never closed.
                permit = connections.clone().acquire_owned() => match permit { Ok(permit) => permit, Err(_) => return },
            };
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = this.tcp.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    tokio::spawn(this.clone().connection(stream, peer, permit, handshakes.clone(), stop.clone()));
                }
                Err(error) => {
                    // Out of file descriptors, mostly: those who have a connection go on.
                    tracing::error!(%error, "a connection can't be accepted");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        permit: OwnedSemaphorePermit,
        handshakes: Arc<Semaphore>,
        stop: CancellationToken,
    ) {
        let failed = |reason| self.authority.metrics.handshakes_failed.get_or_create(&Why { reason }).inc();
        let _guard = self.drain.guard();
        let _permit = permit;
        let _ = stream.set_nodelay(true);
        let handshake = async {
            let Ok(_turn) = handshakes.acquire().await else { return None };
            self.tls.accept(stream).await.ok()
        };
        let stream = match tokio::time::timeout(self.limits.handshake_timeout, handshake).await {
            Ok(Some(stream)) => stream,
            Ok(None) => {
                failed("handshake");
                return;
            }
            Err(_) => {
                failed("handshake_timeout");
                return;
            }
        };
        self.authority.metrics.connections.inc();
        self.serve(TokioIo::new(stream), Arc::new(Connection::new(peer)), &stop).await;
        self.authority.metrics.connections.dec();
    }

    async fn serve(
        &self,
        io: TokioIo<tokio_rustls::server::TlsStream<TcpStream>>,
        connection: Arc<Connection>,
        stop: &CancellationToken,
    ) {
        let extension = connection.clone();
        let service = self.routes.clone().map_request(move |mut request: http::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(extension.clone());
            request
        });
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(self.limits.streams_per_connection)
            .initial_stream_window_size(64 * 1024)
            .initial_connection_window_size(64 * 1024)
            .max_frame_size(16 * 1024)
            .max_send_buf_size(16 * 1024)
            .max_header_list_size(16 * 1024)
            .max_pending_accept_reset_streams(16)
            .keep_alive_interval(self.limits.keepalive_interval)
            .keep_alive_timeout(self.limits.keepalive_timeout);
        let serving = builder.serve_connection(io, TowerToHyperService::new(service));
        tokio::pin!(serving);
        let unproven = tokio::time::sleep(self.limits.time_to_prove);
        tokio::pin!(unproven);
        let mut stopping = false;
        loop {
            tokio::select! {
                _ = serving.as_mut() => return,
                () = stop.cancelled(), if !stopping => {
                    stopping = true;
                    serving.as_mut().graceful_shutdown();
                }
                () = unproven.as_mut(), if connection.proven().is_none() => {
                    self.authority.metrics.handshakes_failed.get_or_create(&Why { reason: "nothing_proven" }).inc();
                    return;
                }
            }
        }
    }
}

/// Keeps the readiness in step with the ControlPlane.
pub(crate) async fn follow_readiness(
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    readiness: Readiness,
    stop: CancellationToken,
) {
    const CONTROL_PLANE: &str = "controlPlane";
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        if snapshot.plane.is_some() {
            readiness.ready(CONTROL_PLANE);
        } else {
            readiness.missing(CONTROL_PLANE, "there is no valid ControlPlane with spec.meshExpansion.onboarding");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = snapshots.changed() => if changed.is_err() { return },
        }
    }
}
