//! The way in: TCP, TLS 1.2 or later, HTTP/1.1 and HTTP/2; each connection bounded in time, all of them in number.

use crate::metrics::Metrics;
use crate::service::{Activity, Service};
use http::{Request, header};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use onboarding_endpoint::accept::{Place, Room, accept};
use onboarding_runtime::shutdown::Drain;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, service_fn};
use tower_http::compression::CompressionLayer;

/// Bounds of the repository. The defaults are for VMs that may all come from one address (a NAT, a gateway).
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections in all; further ones wait.
    pub connections: usize,
    /// Connections of one address (of one /64 in IPv6); further ones are closed.
    pub connections_per_address: usize,
    /// From the connection to the end of its TLS handshake.
    pub handshake_timeout: Duration,
    /// For the head of a request in HTTP/1.1.
    pub head_timeout: Duration,
    /// A connection on which nothing is asked, and no piece of an answer (64 KiB) taken, for this long, and twice as long at most, is ended.
    pub patience: Duration,
    /// Of a connection; a download that takes longer is resumed on another.
    pub longest: Duration,
    /// How long a stopping repository waits for downloads.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 2048,
            connections_per_address: 1024,
            handshake_timeout: Duration::from_secs(10),
            head_timeout: Duration::from_secs(10),
            patience: Duration::from_secs(60),
            longest: Duration::from_secs(3600),
            drain: Duration::from_secs(5),
        }
    }
}

/// Bytes of one answer that are ready to be sent before more are read: one piece, so that its memory is free for the next.
const BUFFER: usize = 64 << 10;
/// What the kernel takes of that ahead of the network.
const UNSENT: u32 = 128 << 10;
const STREAMS: u32 = 16;
/// Names, values, and the path.
const HEAD: usize = 16 << 10;

/// Accepts connections until `stop`.
pub(crate) struct Server {
    pub tls: TlsAcceptor,
    pub service: Service,
    pub limits: Limits,
    pub drain: Drain,
}

impl Server {
    /// The address is closed when this returns, whatever connections go on.
    pub(crate) async fn run(self, tcp: TcpListener, stop: CancellationToken) {
        let room = Room { connections: self.limits.connections, per_address: self.limits.connections_per_address };
        let this = Arc::new(self);
        let enter = |stream, peer, place| {
            tokio::spawn(this.clone().connection(stream, peer, place, stop.clone()));
        };
        accept(&tcp, room, &stop, enter, || this.metrics().failed("too_many_of_address")).await;
    }

    fn metrics(&self) -> &Metrics {
        &self.service.metrics
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, peer: SocketAddr, _place: Place, stop: CancellationToken) {
        let _drain = self.drain.guard();
        // Options that can't be set change only the speed.
        let _ = stream.set_nodelay(true);
        let _ = socket2::SockRef::from(&stream).set_tcp_notsent_lowat(UNSENT);
        let stream = tokio::select! {
            () = stop.cancelled() => return,
            handshake = tokio::time::timeout(self.limits.handshake_timeout, self.tls.accept(stream)) => match handshake {
                Ok(Ok(stream)) => stream,
                Ok(Err(_)) => return self.metrics().failed("handshake"),
                Err(_) => return self.metrics().failed("handshake_timeout"),
            },
        };
        self.metrics().connections.inc();
        self.serve(stream, peer, &stop).await;
        self.metrics().connections.dec();
    }

    async fn serve(&self, stream: TlsStream<TcpStream>, peer: SocketAddr, stop: &CancellationToken) {
        let activity = Arc::new(Activity::default());
        let handled = {
            let (service, activity) = (self.service.clone(), activity.clone());
            service_fn(move |request: Request<Incoming>| {
                let (service, activity) = (service.clone(), activity.clone());
                async move { Ok::<_, Infallible>(service.handle(request, peer, activity).await) }
            })
        };
        // Packages are compressed already.
        let is_html = |_: http::StatusCode, _: http::Version, headers: &http::HeaderMap, _: &http::Extensions| {
            headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"text/html"))
        };
        let compression = CompressionLayer::new().gzip(true).compress_when(is_html);
        let service = TowerToHyperService::new(ServiceBuilder::new().layer(compression).service(handled));
        let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let stream = TokioIo::new(stream);
        // Both have `graceful_shutdown`, and no trait for it.
        if http2 {
            let mut builder = http2::Builder::new(TokioExecutor::new());
            builder
                .timer(TokioTimer::new())
                .max_concurrent_streams(STREAMS)
                .max_send_buf_size(BUFFER)
                .max_header_list_size(HEAD as u32)
                .max_pending_accept_reset_streams(STREAMS as usize)
                .keep_alive_interval(self.limits.patience)
                .keep_alive_timeout(self.limits.head_timeout);
            let serving = std::pin::pin!(builder.serve_connection(stream, service));
            self.drive(serving, |serving| serving.graceful_shutdown(), &activity, stop).await;
        } else {
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(self.limits.head_timeout).max_buf_size(BUFFER);
            let serving = std::pin::pin!(builder.serve_connection(stream, service));
            self.drive(serving, |serving| serving.graceful_shutdown(), &activity, stop).await;
        }
    }

    /// To the end of the connection: by itself, by the stop, or because its time is over.
    async fn drive<S: Future>(
        &self,
        mut serving: std::pin::Pin<&mut S>,
        finish: impl Fn(std::pin::Pin<&mut S>),
        activity: &Activity,
        stop: &CancellationToken,
    ) {
        let mut looks = tokio::time::interval(self.limits.patience);
        let longest = tokio::time::sleep(self.limits.longest);
        tokio::pin!(longest);
        let (mut finishing, mut seen) = (false, None);
        loop {
            tokio::select! {
                _ = serving.as_mut() => return,
                () = stop.cancelled(), if !finishing => {
                    finishing = true;
                    finish(serving.as_mut());
                }
                () = longest.as_mut() => return self.metrics().failed("too_long"),
                _ = looks.tick() => {
                    let progress = Some(activity.progress.load(Ordering::Relaxed));
                    if std::mem::replace(&mut seen, progress) == progress {
                        if activity.under_way.load(Ordering::Relaxed) > 0 || finishing {
                            return self.metrics().failed("stalled");
                        }
                        finishing = true;
                        finish(serving.as_mut());
                    }
                }
            }
        }
    }
}
