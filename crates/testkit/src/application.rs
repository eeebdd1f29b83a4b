//! The application of a workload, and somebody who calls it.

use anyhow::Context;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};

/// What the application answers to every path that means nothing else.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// The application's own name.
    pub application: String,
    pub host: String,
    pub path: String,
    /// The SPIFFE ID of the caller's certificate, as the sidecar verified it; absent on plain text.
    pub caller: Option<String>,
    /// The SPIFFE ID of the certificate that the sidecar showed to the caller.
    pub server: Option<String>,
    /// Requests since the start, this one included.
    pub requests: u64,
}

struct Application {
    name: String,
    ready: AtomicBool,
    requests: AtomicU64,
}

/// Serves HTTP: `/ready` (200 or 503; `POST` with body `true` or `false` sets which), `/slow?ms=N` answers late, `/count` says how
/// many requests there were without counting itself, anything else is an [`Answer`].
pub async fn serve(listener: TcpListener, name: String) -> anyhow::Result<()> {
    let application = Arc::new(Application { name, ready: AtomicBool::new(true), requests: AtomicU64::new(0) });
    let router = Router::new()
        .route("/ready", get(ready).post(set_ready))
        .route(
            "/count",
            get(|State(own): State<Arc<Application>>| async move { own.requests.load(Ordering::Relaxed).to_string() }),
        )
        .route("/slow", get(slow).merge(post(slow)))
        .fallback(answer)
        .with_state(application);
    axum::serve(listener, router).await.context("serving the application")
}

async fn ready(State(own): State<Arc<Application>>) -> StatusCode {
    if own.ready.load(Ordering::Relaxed) { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn set_ready(State(own): State<Arc<Application>>, body: String) -> StatusCode {
    match body.trim().parse() {
        Ok(ready) => {
            own.ready.store(ready, Ordering::Relaxed);
            StatusCode::NO_CONTENT
        }
        Err(_) => StatusCode::BAD_REQUEST,
    }
}

#[derive(Deserialize)]
struct Slow {
    /// At most a minute.
    ms: u64,
}

async fn slow(state: State<Arc<Application>>, Query(slow): Query<Slow>, uri: Uri, headers: HeaderMap) -> Json<Answer> {
    tokio::time::sleep(Duration::from_millis(slow.ms.min(60_000))).await;
    answer(state, uri, headers).await
}

async fn answer(State(own): State<Arc<Application>>, uri: Uri, headers: HeaderMap) -> Json<Answer> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let certificate = header("x-forwarded-client-cert");
    Json(Answer {
        application: own.name.clone(),
        host: header("host").to_owned(),
        path: uri.path().to_owned(),
        caller: forwarded(certificate, "URI"),
        server: forwarded(certificate, "By"),
        requests: own.requests.fetch_add(1, Ordering::Relaxed) + 1,
    })
}

/// A part of `x-forwarded-client-cert`, whose elements are `;`-separated `Key=value` pairs (Envoy's documentation).
/// Of several elements the last is the caller that this sidecar saw itself.
fn forwarded(header: &str, key: &str) -> Option<String> {
    let last = header.rsplit(',').next()?;
    last.split(';').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        name.trim().eq_ignore_ascii_case(key).then(|| value.trim().trim_matches('"').to_owned())
    })
}

/// Sends back what comes, for protocols that aren't HTTP.
pub async fn serve_echo(listener: TcpListener) -> anyhow::Result<()> {
    loop {
        let (mut stream, _) = listener.accept().await.context("accepting a connection")?;
        tokio::spawn(async move {
            let mut buffer = vec![0; 16 * 1024];
            while let Ok(length @ 1..) = stream.read(&mut buffer).await {
                if stream.write_all(&buffer[..length]).await.is_err() {
                    break;
                }
            }
        });
    }
}

/// What a caller does.
#[derive(Debug, Clone)]
pub struct Load {
    /// Where connections go: the egress listener.
    pub connect_to: SocketAddr,
    /// The `host` header.
    pub host: String,
    /// With its query.
    pub path: String,
    /// Requests in a second, evenly spread, whether or not earlier ones were answered.
    pub per_second: u32,
    /// A request that takes longer has failed.
    pub timeout: Duration,
}

/// What became of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    pub sent: u64,
    pub failed: u64,
    /// By the application that answered.
    pub answered_by: std::collections::BTreeMap<String, u64>,
    /// The first few failures, in words.
    pub failures: Vec<String>,
    pub slowest_ms: u64,
}

/// Calls until `stop` is set or its sender is gone, then waits for the answers that are due. Every second request has a
/// connection of its own, the others share kept ones: a drain must be right for both.
pub async fn call(load: Load, mut stop: watch::Receiver<bool>) -> Outcome {
    const AT_ONCE: usize = 256;
    let kept: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
    let load = Arc::new(load);
    let (done, mut results) = mpsc::channel::<Result<(String, Duration), String>>(AT_ONCE);
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let sender = tokio::spawn(async move {
        let mut interval = tokio::time::interval(Duration::from_secs(1) / load.per_second.max(1));
        let mut count = 0_u64;
        loop {
            tokio::select! {
                _ = interval.tick() => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { break };
            count += 1;
            let client = if count.is_multiple_of(2) {
                kept.clone()
            } else {
                Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(HttpConnector::new())
            };
            let (load, done) = (Arc::clone(&load), done.clone());
            tokio::spawn(async move {
                let started = Instant::now();
                let result = match tokio::time::timeout(load.timeout, request(&client, &load)).await {
                    Ok(Ok(name)) => Ok((name, started.elapsed())),
                    Ok(Err(error)) => Err(format!("{error:#}")),
                    Err(_) => Err(format!("no answer within {:?}", load.timeout)),
                };
                let _ = done.send(result).await;
                drop(permit);
            });
        }
    });
    let mut outcome = Outcome::default();
    while let Some(result) = results.recv().await {
        outcome.sent += 1;
        match result {
            Ok((name, took)) => {
                *outcome.answered_by.entry(name).or_default() += 1;
                outcome.slowest_ms = outcome.slowest_ms.max(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
            }
            Err(failure) => {
                outcome.failed += 1;
                if outcome.failures.len() < 5 {
                    outcome.failures.push(failure);
                }
            }
        }
    }
    let _ = sender.await;
    outcome
}

async fn request(client: &Client<HttpConnector, Empty<Bytes>>, load: &Load) -> anyhow::Result<String> {
    let request = hyper::Request::get(format!("http://{}{}", load.connect_to, load.path))
        .header("host", &load.host)
        .body(Empty::new())?;
    let response = client.request(request).await.context("sending a request")?;
    let status = response.status();
    let body = response.into_body().collect().await.context("reading an answer")?.to_bytes();
    anyhow::ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
    let answer: Answer = serde_json::from_slice(&body).context("reading the application's answer")?;
    Ok(answer.application)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventually::eventually;

    #[test]
    fn the_last_element_of_the_header_is_the_caller() {
        let header = "By=spiffe://a/1;Hash=00;URI=spiffe://a/2,By=spiffe://b/1;Hash=11;Subject=\"\";URI=spiffe://b/2";
        assert_eq!(forwarded(header, "URI").as_deref(), Some("spiffe://b/2"));
        assert_eq!(forwarded(header, "By").as_deref(), Some("spiffe://b/1"));
        assert_eq!(forwarded("", "URI"), None);
    }

    #[tokio::test]
    async fn a_caller_counts_answers_and_failures() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connect_to = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, "one".to_owned()));
        let load = Load {
            connect_to,
            host: "one.example:8080".to_owned(),
            path: "/".to_owned(),
            per_second: 500,
            timeout: Duration::from_secs(5),
        };
        let (stop, stopped) = watch::channel(false);
        let caller = tokio::spawn(call(load.clone(), stopped));
        let client: Client<_, Empty<Bytes>> = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
        eventually("answers", Duration::from_secs(20), async || {
            let count = client.get(format!("http://{connect_to}/count").parse().unwrap()).await.unwrap();
            let count = count.into_body().collect().await.unwrap().to_bytes();
            if std::str::from_utf8(&count).unwrap().parse::<u64>().unwrap() > 10 { Ok(()) } else { Err(count) }
        })
        .await;
        stop.send(true).unwrap();
        let outcome = caller.await.unwrap();
        assert!(outcome.sent > 10 && outcome.failed == 0, "{outcome:?}");
        assert_eq!(outcome.answered_by.get("one"), Some(&outcome.sent));

        let closing = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let load = Load { connect_to: closing.local_addr().unwrap(), ..load };
        let (stop, stopped) = watch::channel(false);
        let caller = tokio::spawn(call(load, stopped));
        for _ in 0..5 {
            drop(closing.accept().await.unwrap());
        }
        drop(closing);
        stop.send(true).unwrap();
        let outcome = caller.await.unwrap();
        assert!(outcome.sent >= 5 && outcome.failed == outcome.sent, "{outcome:?}");
    }

    #[tokio::test]
    async fn readiness_can_be_set() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, "one".to_owned()));
        let client: Client<_, String> = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
        let ask = async |method: &str, body: &str| {
            let request = hyper::Request::builder().method(method).uri(format!("http://{address}/ready"));
            client.request(request.body(body.to_owned()).unwrap()).await.unwrap().status().as_u16()
        };
        assert_eq!(ask("GET", "").await, 200);
        assert_eq!(ask("POST", "maybe").await, 400);
        assert_eq!(ask("POST", "false").await, 204);
        assert_eq!(ask("GET", "").await, 503);
        assert_eq!(ask("POST", "true").await, 204);
        assert_eq!(ask("GET", "").await, 200);
    }
}
