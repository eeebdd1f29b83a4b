//! A request to its answer, and what is counted and logged of it.

use crate::answer::{Body, Content, Representation, answer, full, nothing, plain};
use crate::catalog::{Absent, Catalog, Version};
use crate::metrics::Metrics;
use crate::pages;
use crate::script;
use crate::uri::{Package, Part, ROOT, Target};
use bytes::Bytes;
use headers::{ContentLength, HeaderMapExt};
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use onboarding_packages::index::{Kind, Published};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

/// Of a path in the log.
const MOST_LOGGED: usize = 200;

/// What one connection does; whoever looks at it twice sees whether it does anything.
#[derive(Debug, Default)]
pub(crate) struct Activity {
    /// Answers that are being sent.
    pub under_way: AtomicUsize,
    /// Counts requests, and pieces of answers that were taken.
    pub progress: AtomicU64,
}

/// The packages, to whoever asks.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub catalog: Arc<Catalog>,
    pub metrics: Metrics,
}

impl Service {
    pub(crate) async fn handle<B>(
        &self,
        request: Request<B>,
        peer: SocketAddr,
        activity: Arc<Activity>,
    ) -> Response<Body> {
        activity.progress.fetch_add(1, Ordering::Relaxed);
        activity.under_way.fetch_add(1, Ordering::Relaxed);
        let path = request.uri().path();
        let logged = path.get(..path.len().min(MOST_LOGGED)).unwrap_or_default().to_owned();
        let mut sent = Sent {
            // Whatever happens from here on is counted and logged when this is dropped.
            body: nothing(),
            metrics: self.metrics.clone(),
            activity,
            peer,
            method: request.method().clone(),
            path: logged,
            package: matches!(
                Target::parse(path),
                Target::Newest(_, Part::Package)
                    | Target::Content(_, _, Part::Package)
                    | Target::Published(_, Published { kind: Kind::Deb | Kind::Rpm, .. })
            ),
            status: StatusCode::INTERNAL_SERVER_ERROR,
            bytes: 0,
            expected: 0,
            since: Instant::now(),
        };
        let mut response = self.respond(&request).await;
        response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        sent.status = response.status();
        let length = match request.method() {
            &Method::HEAD => Some(0),
            _ => response.headers().typed_get::<ContentLength>().map(|length| length.0),
        };
        response.map(|body| {
            sent.expected = length.or(body.size_hint().exact()).unwrap_or_default();
            sent.body = body;
            sent.boxed_unsync()
        })
    }

    async fn respond<B>(&self, request: &Request<B>) -> Response<Body> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "packages can be read: GET and HEAD\n");
            response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        let path = request.uri().path();
        let response = match Target::parse(path) {
            Target::Start => moved(ROOT),
            Target::Listing(directory) => self.listing(&directory).await,
            Target::Newest(package, part) => match self.catalog.newest(&package).await {
                Ok(version) => {
                    answer(request.method(), request.headers(), &representation(&package, version, part, false))
                }
                Err(absent) => self.absent(Some(absent)).await,
            },
            Target::Content(digest, file, part) => match self.catalog.of_content(&digest, &file) {
                Some((package, version)) => {
                    answer(request.method(), request.headers(), &representation(&package, version, part, true))
                }
                None => self.absent(None).await,
            },
            Target::Published(path, published) => match self.catalog.published(&path, &published).await {
                Ok(version) => answer(request.method(), request.headers(), &of_index(version, &published)),
                Err(absent) => self.absent(Some(absent)).await,
            },
            Target::Script => match script::script(request) {
                Some(script) => text(StatusCode::OK, script),
                None => text(
                    StatusCode::BAD_REQUEST,
                    "the request names no host, by which a script could find this repository\n",
                ),
            },
            Target::Unknown => self.unknown(path).await,
        };
        if *request.method() == Method::HEAD { without_body(response) } else { response }
    }

    async fn listing(&self, directory: &str) -> Response<Body> {
        let inventory = match self.catalog.inventory().await {
            Ok(inventory) => inventory,
            Err(error) => return unreadable(&error),
        };
        let Some(html) = pages::listing(&inventory, directory) else {
            return text(StatusCode::NOT_FOUND, pages::not_found(&inventory, None));
        };
        let mut response = Response::new(full(html));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'none'"));
        response
    }

    async fn absent(&self, absent: Option<Absent>) -> Response<Body> {
        match self.catalog.inventory().await {
            Ok(inventory) => {
                // An operating system's words are for whoever runs the repository: they are in its log.
                let why = match absent {
                    None | Some(Absent::Nothing) => None,
                    Some(Absent::Unreadable(_)) => Some("the repository can't read it".to_owned()),
                    Some(fault) => Some(fault.to_string()),
                };
                text(StatusCode::NOT_FOUND, pages::not_found(&inventory, why.as_deref()))
            }
            Err(error) => unreadable(&error),
        }
    }

    /// A directory whose `/` was forgotten, or nothing.
    async fn unknown(&self, path: &str) -> Response<Body> {
        let inventory = match self.catalog.inventory().await {
            Ok(inventory) => inventory,
            Err(error) => return unreadable(&error),
        };
        let directory = path.strip_prefix(ROOT).map(|path| format!("{path}/"));
        match directory.filter(|directory| pages::listing(&inventory, directory).is_some()) {
            Some(directory) => moved(&format!("{ROOT}{directory}")),
            None => text(StatusCode::NOT_FOUND, pages::not_found(&inventory, None)),
        }
    }
}

fn representation(package: &Package, version: Arc<Version>, part: Part, immutable: bool) -> Representation {
    let (digest, modified) = (version.digest.clone(), version.modified());
    let (content, content_type) = match part {
        Part::Package => (Content::Package(version), package.format.content_type()),
        Part::Checksum => {
            // Two spaces: sha256sum's own form (coreutils, "md5sum invocation").
            let line = format!("{digest}  {}\n", package.file_name());
            (Content::Text(line.into()), "text/plain; charset=utf-8")
        }
    };
    Representation { content, content_type, digest, modified, immutable }
}

fn of_index(version: Arc<Version>, published: &Published) -> Representation {
    Representation {
        digest: version.digest.clone(),
        modified: version.modified(),
        content: Content::Package(version),
        content_type: published.kind.content_type(),
        immutable: published.digest.is_some(),
    }
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    plain(response.headers_mut());
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn moved(to: &str) -> Response<Body> {
    let mut response = text(StatusCode::PERMANENT_REDIRECT, format!("{to}\n"));
    if let Ok(to) = HeaderValue::from_str(to) {
        response.headers_mut().insert(header::LOCATION, to);
    }
    response
}

fn unreadable(error: &io::Error) -> Response<Body> {
    tracing::warn!(%error, "the directory of packages can't be read");
    text(StatusCode::SERVICE_UNAVAILABLE, "the repository can't read its packages now\n")
}

fn without_body(mut response: Response<Body>) -> Response<Body> {
    // A package's is said already.
    if let Some(length) = response.body().size_hint().exact().filter(|length| *length > 0) {
        response.headers_mut().typed_insert(ContentLength(length));
    }
    response.map(|_| nothing())
}

/// An answer's body on its way; its end is counted and logged.
struct Sent {
    body: Body,
    metrics: Metrics,
    activity: Arc<Activity>,
    peer: SocketAddr,
    method: Method,
    path: String,
    package: bool,
    status: StatusCode,
    bytes: u64,
    /// Bytes in all.
    expected: u64,
    since: Instant,
}

impl http_body::Body for Sent {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = frame.data_ref().map_or(0, |data| data.len() as u64);
                self.bytes += bytes;
                self.metrics.bytes.inc_by(bytes);
                self.activity.progress.fetch_add(1, Ordering::Relaxed);
            }
            Poll::Ready(Some(Err(error))) => {
                tracing::error!(%error, path = self.path, "a package can't be read any further");
            }
            Poll::Ready(None) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.bytes >= self.expected
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.expected.saturating_sub(self.bytes))
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.activity.under_way.fetch_sub(1, Ordering::Relaxed);
        self.metrics.answered(self.status);
        let Self { peer, method, path, status, bytes, expected, since, .. } = self;
        let complete = bytes == expected;
        let (status, duration) = (status.as_u16(), since.elapsed().as_secs_f64());
        if self.package && *method == Method::GET {
            tracing::info!(%peer, path, status, bytes, complete, duration, "a package was asked for");
        } else {
            tracing::debug!(%peer, %method, path, status, bytes, complete, duration, "a request was answered");
        }
    }
}
