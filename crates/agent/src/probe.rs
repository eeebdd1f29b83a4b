//! `spec.probe` of the group, performed on the application as Kubernetes and Istio perform theirs.

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use onboarding_core::group::{Probe, ProbeAction};
use onboarding_wire::onboarding as pb;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, timeout};

/// The application's readiness changed (or is known for the first time).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub ready: bool,
    /// For people; empty when ready.
    pub message: String,
}

/// More often makes no workload readier.
const SHORTEST_PERIOD: Duration = Duration::from_millis(10);
/// Of what a command says when it fails.
const LONGEST_WORDS: u64 = 1024;

/// Probes until the receiver is gone; aborted to end it.
///
/// An HTTP GET succeeds with a status of 200 to 399; redirects aren't followed, and a certificate isn't verified: the application is
/// asked whether it is ready, not who it is. A TCP probe succeeds when the connection is made, a command when it exits with 0. Without
/// a `host` the application is on 127.0.0.1, behind the sidecar.
pub async fn run(probe: pb::Probe, events: mpsc::Sender<Event>) {
    let probe = match Probe::try_from(probe) {
        Ok(probe) => probe,
        Err(error) => {
            let message = format!("the group's probe can't be performed: {error}");
            let _ = events.send(Event { ready: false, message }).await;
            return;
        }
    };
    tokio::time::sleep(probe.initial_delay).await;
    let mut ticks = tokio::time::interval(probe.period.max(SHORTEST_PERIOD));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut streak = Streak::default();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = events.closed() => return,
        }
        let outcome = attempt(&probe).await;
        if let Some(event) = streak.add(&probe, outcome)
            && events.send(event).await.is_err()
        {
            return;
        }
    }
}

/// Successes or failures in a row.
#[derive(Default)]
struct Streak {
    reported: Option<bool>,
    succeeding: bool,
    length: u32,
}

impl Streak {
    fn add(&mut self, probe: &Probe, outcome: Result<(), String>) -> Option<Event> {
        let ready = outcome.is_ok();
        self.length = if self.succeeding == ready { self.length.saturating_add(1) } else { 1 };
        self.succeeding = ready;
        let threshold = if ready { probe.success_threshold } else { probe.failure_threshold };
        if self.length < threshold || self.reported == Some(ready) {
            return None;
        }
        self.reported = Some(ready);
        Some(Event { ready, message: outcome.err().unwrap_or_default() })
    }
}

async fn attempt(probe: &Probe) -> Result<(), String> {
    let within = probe.timeout;
    match &probe.action {
        ProbeAction::HttpGet { path, port, host, https, headers } => {
            let (host, path) = (host.as_deref().unwrap_or("127.0.0.1"), path.as_str());
            let scheme = if *https { "https" } else { "http" };
            let slash = if path.starts_with('/') { "" } else { "/" };
            let path = format!("{slash}{path}");
            let what = || format!("GET {scheme}://{}{path}", authority(host, *port));
            match timeout(within, get(host, *port, &path, *https, headers)).await {
                Ok(Ok(status)) if (200..400).contains(&status) => Ok(()),
                Ok(Ok(status)) => Err(format!("{}: status {status}", what())),
                Ok(Err(error)) => Err(format!("{}: {error:#}", what())),
                Err(_) => Err(format!("{}: no answer within {within:?}", what())),
            }
        }
        ProbeAction::TcpSocket { host, port } => {
            let host = host.as_deref().unwrap_or("127.0.0.1");
            let what = || format!("connecting to {}", authority(host, *port));
            match timeout(within, TcpStream::connect((host, *port))).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(format!("{}: {error}", what())),
                Err(_) => Err(format!("{}: not within {within:?}", what())),
            }
        }
        ProbeAction::Exec { command } => exec(command, within).await,
    }
}

fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

async fn get(host: &str, port: u16, path: &str, https: bool, headers: &[(String, String)]) -> anyhow::Result<u16> {
    let mut request = hyper::Request::get(path).body(Empty::<Bytes>::new())?;
    let default = [
        (http::header::HOST, authority(host, port)),
        (http::header::USER_AGENT, concat!("onboarding-agent/", env!("CARGO_PKG_VERSION")).to_owned()),
        (http::header::CONNECTION, "close".to_owned()),
    ];
    for (name, value) in default {
        request.headers_mut().insert(name, value.parse()?);
    }
    // The group's headers replace ours, `Host` included; a name that comes twice is sent twice.
    for (name, _) in headers {
        request.headers_mut().remove(name.as_str());
    }
    for (name, value) in headers {
        request.headers_mut().append(http::HeaderName::from_bytes(name.as_bytes())?, value.parse()?);
    }
    let tcp = TcpStream::connect((host, port)).await?;
    if https {
        let name = ServerName::try_from(host.to_owned())?;
        let config =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()?
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AnyCertificate))
                .with_no_client_auth();
        send(tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await?, request).await
    } else {
        send(tcp, request).await
    }
}

/// The status; the body isn't read.
async fn send(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: hyper::Request<Empty<Bytes>>,
) -> anyhow::Result<u16> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let response = sender.send_request(request);
    tokio::pin!(connection);
    tokio::select! {
        response = response => Ok(response?.status().as_u16()),
        ended = &mut connection => {
            ended?;
            anyhow::bail!("the connection ended without an answer")
        }
    }
}

/// A child that takes its whole process group with it.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

async fn exec(command: &[String], within: Duration) -> Result<(), String> {
    let Some((program, arguments)) = command.split_first() else {
        return Err("the probe's command is empty".to_owned());
    };
    let spawned = Command::new(program)
        .args(arguments)
        .process_group(0)
        .kill_on_drop(true)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|error| format!("starting {program}: {error}"))?;
    // Dropped before the child, that is, before anybody has waited for it: its id belongs to no other group.
    let mut group = Group(child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw));
    let stderr = child.stderr.take();
    let done = async {
        let mut words = Vec::new();
        if let Some(stderr) = stderr {
            let _ = stderr.take(LONGEST_WORDS).read_to_end(&mut words).await;
        }
        (child.wait().await, words)
    };
    match timeout(within, done).await {
        Ok((Ok(status), _)) if status.success() => {
            group.0 = None;
            Ok(())
        }
        Ok((Ok(status), words)) => {
            group.0 = None;
            let words = String::from_utf8_lossy(&words);
            Err(format!("{program}: {status}: {}", words.trim()).trim_end_matches([':', ' ']).to_owned())
        }
        Ok((Err(error), _)) => Err(format!("waiting for {program}: {error}")),
        Err(_) => Err(format!("{program}: not done within {within:?}")),
    }
}

/// Takes any certificate.
#[derive(Debug)]
pub(crate) struct AnyCertificate;

impl ServerCertVerifier for AnyCertificate {
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
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
