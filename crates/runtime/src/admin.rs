//! The admin address: `/metrics`, `/healthz`, `/readyz`. Plain HTTP, for a probe and a scraper; nothing can be changed through it.

use crate::listen::listen;
use crate::readiness::Readiness;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Of an answer that is under way at the end.
const LONGEST_ANSWER: Duration = Duration::from_secs(2);

/// Serves until `stop`; answers with the bound address.
pub async fn serve(
    address: SocketAddr,
    registry: Arc<Registry>,
    readiness: Readiness,
    stop: CancellationToken,
) -> std::io::Result<(SocketAddr, tokio::task::JoinHandle<std::io::Result<()>>)> {
    let listener = listen(address)?;
    let bound = listener.local_addr()?;
    let app = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(move || async move { readyz(&readiness) }))
        .route("/metrics", get(move || async move { metrics(&registry) }));
    let task = tokio::spawn(async move {
        let serving = axum::serve(listener, app).with_graceful_shutdown(stop.clone().cancelled_owned());
        // Whoever asks and doesn't finish keeps nobody from stopping.
        let too_long = async {
            stop.cancelled().await;
            tokio::time::sleep(LONGEST_ANSWER).await;
        };
        tokio::select! {
            served = serving.into_future() => served,
            () = too_long => Ok(()),
        }
    });
    Ok((bound, task))
}

fn readyz(readiness: &Readiness) -> (StatusCode, String) {
    let reasons = readiness.reasons();
    if reasons.is_empty() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n")
    }
}

fn metrics(registry: &Registry) -> axum::response::Response {
    let mut text = String::new();
    match encode(&mut text, registry) {
        Ok(()) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpStream;

    /// Bytes that the server's end of this connection holds, as proc_net_tcp(5) has it.
    fn unread(server: SocketAddr, client: SocketAddr) -> Option<u64> {
        let ends = [server, client].map(|end| format!("0100007F:{:04X}", end.port()));
        let all = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        all.lines().find_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let queues = (fields[1..3] == ends).then(|| fields[4].split_once(':').unwrap())?;
            Some(u64::from_str_radix(queues.1, 16).unwrap())
        })
    }

    #[tokio::test]
    async fn a_request_that_is_never_finished_does_not_keep_it_from_stopping() {
        let stop = CancellationToken::new();
        let address = (Ipv4Addr::LOCALHOST, 0).into();
        let (address, serving) = serve(address, Arc::default(), Readiness::default(), stop.clone()).await.unwrap();
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"GET /healthz HTT").await.unwrap();
        let taken = async {
            while unread(address, slow.local_addr().unwrap()) != Some(0) {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), taken).await.unwrap();
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(20), serving).await.unwrap().unwrap().unwrap();
    }
}
