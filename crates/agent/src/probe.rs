//! `spec.probe` of the group, performed on the application as Kubernetes and Istio perform theirs.

use crate::trust::AnyCertificate;
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use onboarding_core::group::{Probe, ProbeAction};
use onboarding_wire::onboarding as pb;
use rustls_pki_types::ServerName;
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
    let mut connection = Box::pin(connection);
    tokio::pin!(response);
    tokio::select! {
        response = &mut response => return Ok(response?.status().as_u16()),
        ended = &mut connection => ended?,
    }
    // The answer may have come with the connection's end.
    drop(connection);
    Ok(response.await?.status().as_u16())
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
    let mut words = Vec::new();
    let status = {
        let stderr = child.stderr.take();
        // To its end, so that a talkative command isn't stopped by a pipe that nobody empties.
        let read = async {
            if let Some(mut stderr) = stderr {
                let _ = (&mut stderr).take(LONGEST_WORDS).read_to_end(&mut words).await;
                let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
            }
        };
        tokio::pin!(read);
        let done = async {
            let mut open = true;
            loop {
                tokio::select! {
                    () = &mut read, if open => open = false,
                    status = child.wait() => {
                        // Its exit counts, even where something that it started holds the pipe.
                        if open {
                            let _ = timeout(Duration::from_millis(100), &mut read).await;
                        }
                        return status;
                    }
                }
            }
        };
        timeout(within, done).await
    };
    match status {
        Ok(Ok(status)) => {
            group.0 = None;
            if status.success() {
                return Ok(());
            }
            let words = String::from_utf8_lossy(&words);
            Err(format!("{program}: {status}: {}", words.trim()).trim_end_matches([':', ' ']).to_owned())
        }
        Ok(Err(error)) => Err(format!("waiting for {program}: {error}")),
        Err(_) => Err(format!("{program}: not done within {within:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use onboarding_testkit::application;
    use std::net::SocketAddr;
    use tokio::net::TcpListener;

    const WITHIN: Duration = Duration::from_secs(20);

    fn probe(action: ProbeAction) -> Probe {
        Probe {
            initial_delay: Duration::ZERO,
            timeout: Duration::from_secs(5),
            period: Duration::from_millis(10),
            success_threshold: 1,
            failure_threshold: 3,
            action,
        }
    }

    fn http(address: SocketAddr, path: &str) -> ProbeAction {
        ProbeAction::HttpGet { path: path.into(), port: address.port(), host: None, https: false, headers: Vec::new() }
    }

    fn exec(script: &str) -> ProbeAction {
        ProbeAction::Exec { command: vec!["/bin/sh".into(), "-c".into(), script.into()] }
    }

    async fn serve() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(application::serve(listener, "one".into()));
        address
    }

    async fn next(events: &mut mpsc::Receiver<Event>) -> Event {
        tokio::time::timeout(WITHIN, events.recv()).await.expect("an event in time").expect("it probes")
    }

    async fn set_ready(address: SocketAddr, ready: bool) {
        use tokio::io::AsyncWriteExt;
        let mut stream = TcpStream::connect(address).await.unwrap();
        let body = ready.to_string();
        let text = format!(
            "POST /ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(text.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    }

    #[tokio::test]
    async fn only_changes_are_reported() {
        let address = serve().await;
        let (sender, mut events) = mpsc::channel(8);
        let task = tokio::spawn(run((&probe(http(address, "/ready"))).into(), sender));
        assert_eq!(next(&mut events).await, Event { ready: true, message: String::new() });
        set_ready(address, false).await;
        let event = next(&mut events).await;
        assert!(
            !event.ready && event.message.contains(&format!("GET http://{address}/ready: status 503")),
            "{event:?}"
        );
        set_ready(address, true).await;
        assert!(next(&mut events).await.ready);
        drop(events);
        tokio::time::timeout(WITHIN, task).await.expect("it ends with the receiver").unwrap();
    }

    #[test]
    fn thresholds_count_in_a_row() {
        let probe = Probe { success_threshold: 2, failure_threshold: 3, ..probe(exec("")) };
        let mut streak = Streak::default();
        let mut add =
            |ok: bool| streak.add(&probe, if ok { Ok(()) } else { Err("no".into()) }).map(|event| event.ready);
        let outcomes = [true, false, true, true, true, false, false, true, false, false, false, false, true, true];
        let reported: Vec<_> = outcomes.map(&mut add).into();
        let (yes, no) = (Some(true), Some(false));
        let nothing = None;
        assert_eq!(
            reported,
            [
                nothing, nothing, nothing, yes, nothing, nothing, nothing, nothing, nothing, nothing, no, nothing,
                nothing, yes
            ]
        );
    }

    #[tokio::test]
    async fn http_succeeds_from_200_to_399_and_sends_the_headers_of_the_group() {
        let router = statuses().await;
        for (path, ok) in
            [("/200", true), ("/302", true), ("/399", true), ("/400", false), ("/199x", false), ("/503", false)]
        {
            let outcome = attempt(&probe(http(router, path))).await;
            assert_eq!(outcome.is_ok(), ok, "{path}: {outcome:?}");
        }
        let mut with_headers = http(router, "host");
        if let ProbeAction::HttpGet { headers, .. } = &mut with_headers {
            *headers = vec![("host".into(), "wanted.example".into())];
        }
        assert_eq!(attempt(&probe(with_headers)).await, Ok(()));
        assert!(attempt(&probe(http(router, "/host"))).await.is_err());
    }

    /// Answers `/NNN` with that status, `/host` with 200 only for the host `wanted.example`, `/hang` never.
    async fn statuses() -> SocketAddr {
        use tokio::io::AsyncWriteExt;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut bytes = vec![0; 4096];
                    let length = stream.read(&mut bytes).await.unwrap();
                    let request = String::from_utf8_lossy(&bytes[..length]).to_lowercase();
                    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                    let status = match path.as_str() {
                        "/hang" => std::future::pending().await,
                        "/host"
                            if request.contains("host: wanted.example\r\n")
                                && request.matches("host:").count() == 1 =>
                        {
                            "200"
                        }
                        "/host" => "404",
                        other => &other[1..],
                    };
                    let _ =
                        stream.write_all(format!("HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n").as_bytes()).await;
                });
            }
        });
        address
    }

    #[tokio::test]
    async fn https_is_not_verified() {
        use rustls_pki_types::CertificateDer;
        use rustls_pki_types::pem::PemObject;
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec!["elsewhere".into()]).unwrap();
        let of_nobody = params.self_signed(&key).unwrap().der().clone();
        // Of X.509 v1, as `openssl x509 -req -signkey` makes it; and the server's key isn't the certificate's.
        let old = CertificateDer::from_pem_slice(include_bytes!("../tests/data/x509-v1.pem")).unwrap();
        for certificate in [of_nobody, old] {
            let provider = rustls::crypto::aws_lc_rs::default_provider();
            let der = rustls_pki_types::PrivatePkcs8KeyDer::from(key.serialize_der());
            let signer = provider.key_provider.load_private_key(der.into()).unwrap();
            let certified = rustls::sign::CertifiedKey::new(vec![certificate], signer);
            let config = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(certified)));
            let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            tokio::spawn(async move {
                use tokio::io::AsyncWriteExt;
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = acceptor.accept(stream).await.unwrap();
                let mut bytes = [0; 1024];
                let _ = stream.read(&mut bytes).await.unwrap();
                stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
            });
            let action = ProbeAction::HttpGet { path: "/".into(), port, host: None, https: true, headers: Vec::new() };
            assert_eq!(attempt(&probe(action)).await, Ok(()));
        }
    }

    #[tokio::test]
    async fn what_does_not_answer_is_a_failure_that_says_so() {
        let hang = statuses().await;
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let tcp = |address: SocketAddr| ProbeAction::TcpSocket { host: None, port: address.port() };
        let short = |action| Probe { timeout: Duration::from_millis(100), ..probe(action) };
        assert!(attempt(&short(http(hang, "/hang"))).await.unwrap_err().contains("no answer within 100ms"));
        assert!(attempt(&probe(http(closed, "/"))).await.unwrap_err().contains("refused"));
        assert!(attempt(&probe(tcp(closed))).await.unwrap_err().contains("refused"));
        assert_eq!(attempt(&probe(tcp(hang))).await, Ok(()));
        assert!(attempt(&probe(http(hang, "/a b"))).await.is_err());
    }

    #[tokio::test]
    async fn a_command_counts_by_its_exit_and_is_killed_with_its_children() {
        assert_eq!(attempt(&probe(exec("exit 0"))).await, Ok(()));
        let error = attempt(&probe(exec("echo not yet >&2; exit 3"))).await.unwrap_err();
        assert_eq!(error, "/bin/sh: exit status: 3: not yet");
        // More than anybody keeps, and a child that holds the pipe.
        assert_eq!(attempt(&probe(exec("head -c 1000000 /dev/zero >&2"))).await, Ok(()));
        assert_eq!(attempt(&probe(exec("sleep 2 & exit 0"))).await, Ok(()));
        let missing = ProbeAction::Exec { command: vec!["/nowhere/probe".into()] };
        assert!(attempt(&probe(missing)).await.unwrap_err().contains("/nowhere/probe"));
        assert!(attempt(&probe(ProbeAction::Exec { command: Vec::new() })).await.is_err());

        let directory = tempfile::tempdir().unwrap();
        let pid = directory.path().join("pid");
        let hang = exec(&format!("sleep 1000 & echo $! > {0}.part; mv {0}.part {0}; wait", pid.display()));
        let error = attempt(&Probe { timeout: Duration::from_secs(5), ..probe(hang) }).await.unwrap_err();
        assert!(error.contains("not done within 5s"), "{error}");
        let child = std::fs::read_to_string(pid).unwrap();
        let gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.trim()));
            stat.map_or(true, |stat| stat.contains(") Z "))
        };
        for _ in 0..1000 {
            if gone() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("the command's child still runs");
    }

    #[tokio::test]
    async fn a_probe_that_means_nothing_is_reported() {
        let (sender, mut events) = mpsc::channel(1);
        run(pb::Probe::default(), sender).await;
        let event = next(&mut events).await;
        assert!(!event.ready && event.message.contains("probe.action: is missing"), "{event:?}");
    }
}
