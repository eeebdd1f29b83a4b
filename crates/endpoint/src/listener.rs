//! The way in: TCP, TLS 1.2 or later, HTTP/2; each step bounded in number and time. Never plain text.

use crate::accept::{Place, Room, accept};
use crate::authority::Authority;
use crate::connection::Connection;
use crate::limits::Limits;
use crate::metrics::Why;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use onboarding_runtime::shutdown::Drain;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tower::ServiceExt;

/// Accepts connections until `stop`.
pub(crate) struct Listener {
    pub(crate) tls: TlsAcceptor,
    pub(crate) routes: Routes,
    pub(crate) authority: Arc<Authority>,
    pub(crate) limits: Limits,
    pub(crate) drain: Drain,
}

impl Listener {
    /// The address is closed when this returns, whatever connections go on.
    pub(crate) async fn run(self, tcp: TcpListener, stop: CancellationToken) {
        let handshakes = Arc::new(Semaphore::new(self.limits.handshakes));
        let room = Room { connections: self.limits.connections, per_address: self.limits.connections_per_address };
        let this = Arc::new(self);
        let enter = |stream, peer, place| {
            tokio::spawn(this.clone().connection(stream, peer, place, handshakes.clone(), stop.clone()));
        };
        accept(&tcp, room, &stop, enter, || this.failed("too_many_of_address")).await;
    }

    fn failed(&self, reason: &'static str) {
        self.authority.metrics.connections_failed.get_or_create(&Why { reason }).inc();
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        place: Place,
        handshakes: Arc<Semaphore>,
        stop: CancellationToken,
    ) {
        let _drain = self.drain.guard();
        let _place = place;
        // Small messages that somebody waits for; an option that can't be set changes only the speed.
        let _ = stream.set_nodelay(true);
        // Boxed: what a handshake needs isn't kept for as long as the connection lives.
        let handshake = Box::pin(async {
            let Ok(_turn) = handshakes.acquire().await else { return None };
            self.tls.accept(stream).await.ok()
        });
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            handshake = tokio::time::timeout(self.limits.handshake_timeout, handshake) => match handshake {
                Ok(Some(stream)) => stream,
                Ok(None) => return self.failed("handshake"),
                Err(_) => return self.failed("handshake_timeout"),
            },
        };
        self.authority.metrics.connections.inc();
        self.serve(stream, Arc::new(Connection::new(peer)), &stop).await;
        self.authority.metrics.connections.dec();
    }

    async fn serve(&self, stream: TlsStream<TcpStream>, connection: Arc<Connection>, stop: &CancellationToken) {
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
        let serving = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
        tokio::pin!(serving);
        let unproven = tokio::time::sleep(self.limits.time_to_prove);
        tokio::pin!(unproven);
        let (mut stopping, mut judged) = (false, false);
        loop {
            tokio::select! {
                _ = serving.as_mut() => return,
                () = stop.cancelled(), if !stopping => {
                    stopping = true;
                    serving.as_mut().graceful_shutdown();
                }
                () = unproven.as_mut(), if !judged => {
                    judged = true;
                    if !connection.admitted() {
                        return self.failed("nothing_proven");
                    }
                }
            }
        }
    }
}
