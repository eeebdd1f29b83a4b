//! The program as its operator meets it: what it prints, what it serves, how it ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "all of it is tests")]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use onboarding_testkit::cms::RegionKey;
mod support;

use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use support::get;

fn command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_onboarding-plane"))
}

fn run(args: &[&str]) -> Output {
    command().args(args).output().unwrap()
}

/// A plane on free ports; killed with this value.
struct Plane {
    child: Child,
    log: BufReader<ChildStderr>,
    seen: String,
}

impl Plane {
    fn start(dir: &Path, more: &[&str]) -> Self {
        Self::start_at("127.0.0.1:0", dir, more)
    }

    fn start_at(address: &str, dir: &Path, more: &[&str]) -> Self {
        std::fs::create_dir_all(dir.join("manifests")).unwrap();
        let mut child = command()
            .arg("standalone")
            .args(["--listen", address, "--admin-listen", address, "--log-format", "json"])
            .arg("--manifests")
            .arg(dir.join("manifests"))
            .arg("--data-dir")
            .arg(dir.join("data"))
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, log, seen: String::new() }
    }

    /// Reads the log up to the line with this message; its fields.
    fn line(&mut self, message: &str) -> serde_json::Value {
        loop {
            let mut line = String::new();
            assert!(self.log.read_line(&mut line).unwrap() > 0, "no {message:?} in\n{}", self.seen);
            self.seen.push_str(&line);
            let fields: serde_json::Value = serde_json::from_str(&line).unwrap();
            if fields["message"] == message {
                return fields;
            }
        }
    }

    fn terminate(mut self) -> Option<i32> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        // Nothing to do for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn it_says_how_it_is_set_up_and_what_is_missing_and_ends_when_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let mut plane = Plane::start(dir.path(), &["--grace-period", "90s"]);
    let configuration = plane.line("starting")["configuration"].to_string();
    assert!(configuration.contains("grace_period: 90s"), "{configuration}");
    plane.line("the endpoint listens");
    let address = plane.line("metrics and readiness are served")["address"].as_str().unwrap().to_owned();
    assert!(get(&address, "/healthz").starts_with("HTTP/1.1 200"));
    let ready = get(&address, "/readyz");
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
    assert!(ready.contains("\r\ncertificate: there is no Secret") || ready.contains("\ncertificate: "), "{ready}");
    assert!(ready.contains("controlPlane: there is no valid ControlPlane"), "{ready}");
    let metrics = get(&address, "/metrics");
    assert!(metrics.contains("onboarding_sessions 0"));
    // What the documents say nothing of can't be watched.
    let documents = [
        include_str!("../../../docs/operations.md"),
        include_str!("../../../docs/standalone-mesh.md"),
        include_str!("../../../docs/repository.md"),
    ];
    for name in metrics.lines().filter_map(|line| line.strip_prefix("# HELP ")?.split(' ').next()) {
        let group = ["onboarding_registry_", "onboarding_manifests_", "onboarding_mesh_"];
        let known = documents.iter().any(|text| text.contains(name)) || group.iter().any(|it| name.starts_with(it));
        assert!(known, "{name} is in no document");
    }
    assert!(dir.path().join("data/admin.sock").exists());
    // A second one doesn't share the data directory.
    let mut second = Plane::start(dir.path(), &[]);
    let mut log = String::new();
    second.log.read_to_string(&mut log).unwrap();
    assert!(log.contains("another plane uses the data directory"), "{log}");
    assert_eq!(second.child.wait().unwrap().code(), Some(1));
    assert_eq!(plane.terminate(), Some(0));
    assert!(!dir.path().join("data/admin.sock").exists());
}

/// In a cluster it listens as here: its pods may have addresses of either family, or of both.
#[test]
fn where_it_listens_on_any_address_it_is_reached_by_ipv4_and_ipv6() {
    let dir = tempfile::tempdir().unwrap();
    let mut plane = Plane::start_at("[::]:0", dir.path(), &[]);
    let port = |line: &serde_json::Value| line["address"].as_str().unwrap().rsplit(':').next().unwrap().to_owned();
    let endpoint = port(&plane.line("the endpoint listens"));
    let admin = port(&plane.line("metrics and readiness are served"));
    for host in ["127.0.0.1", "[::1]"] {
        assert!(get(&format!("{host}:{admin}"), "/healthz").starts_with("HTTP/1.1 200"), "{host}");
        TcpStream::connect(format!("{host}:{endpoint}")).unwrap();
    }
    assert_eq!(plane.terminate(), Some(0));
}

#[test]
fn it_warns_of_whom_it_believes_besides_aws() {
    let dir = tempfile::tempdir().unwrap();
    // Of a region, and a CA as good as any.
    let file = dir.path().join("certificate.pem");
    std::fs::write(&file, RegionKey::generate("us-east-2").unwrap().pinned()).unwrap();
    let file = file.to_str().unwrap();
    let mut plane = Plane::start(
        dir.path(),
        &["--aws-sts-endpoint", "http://127.0.0.1:1", "--aws-extra-certificates", file, "--jwks-extra-roots", file],
    );
    for (message, field, value) in [
        ("STS is not asked at AWS: whoever answers there decides who has which role", "endpoint", "http://127.0.0.1:1"),
        ("identity documents that AWS did not sign are accepted: whoever has those keys is any instance", "file", file),
        ("issuers' servers may have certificates of further CAs", "file", file),
    ] {
        let warning = plane.line(message);
        assert_eq!((&warning["level"], &warning[field]), (&"WARN".into(), &value.into()), "{warning}");
    }
    // And it serves with them.
    plane.line("the endpoint listens");
}

/// Nobody is warned who asked for nothing.
#[test]
fn it_warns_of_nobody_where_it_believes_aws_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut plane = Plane::start(dir.path(), &[]);
    plane.line("the endpoint listens");
    for words in ["STS is not asked at AWS", "AWS did not sign", "further CAs"] {
        assert!(!plane.seen.contains(words), "{}", plane.seen);
    }
}

#[test]
fn it_goes_on_when_nobody_reads_its_log_any_more_and_ends_when_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let mut plane = Plane::start(dir.path(), &[]);
    plane.line("starting");
    // The pipe is broken from here on; whatever the plane says while it starts and stops goes into it.
    let mut nothing = Command::new("true").stderr(Stdio::piped()).spawn().unwrap();
    plane.log = BufReader::new(nothing.stderr.take().unwrap());
    nothing.wait().unwrap();
    let socket = dir.path().join("data/admin.sock");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !socket.exists() {
        assert!(plane.child.try_wait().unwrap().is_none(), "it ended");
        assert!(std::time::Instant::now() < deadline, "no admin socket");
        std::thread::yield_now();
    }
    assert_eq!(plane.terminate(), Some(0));
}

#[test]
fn a_registry_that_is_damaged_is_left_as_it_is_and_the_way_out_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = Plane::start(dir.path(), &[]);
    first.line("the endpoint listens");
    assert_eq!(first.terminate(), Some(0));
    let file = dir.path().join("data/registry.sqlite");
    let log_of_sqlite = dir.path().join("data/registry.sqlite-wal");
    // A plane that ends leaves SQLite's log, which would mend the file.
    let whole = (std::fs::read(&file).unwrap(), std::fs::read(&log_of_sqlite).ok());
    let damaged = vec![0xaa; whole.0.len().max(4096)];
    std::fs::write(&file, &damaged).unwrap();
    if whole.1.is_some() {
        std::fs::remove_file(&log_of_sqlite).unwrap();
    }
    let mut plane = Plane::start(dir.path(), &[]);
    let mut log = String::new();
    plane.log.read_to_string(&mut log).unwrap();
    assert_eq!(plane.child.wait().unwrap().code(), Some(1));
    for words in ["the plane ends: the registry ", "registry.sqlite is damaged; stop the plane, move ", "onboards anew"]
    {
        assert!(log.contains(words), "{log}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), damaged);
    // A backup in its place.
    std::fs::write(&file, whole.0).unwrap();
    if let Some(log) = whole.1 {
        std::fs::write(&log_of_sqlite, log).unwrap();
    }
    let mut mended = Plane::start(dir.path(), &[]);
    mended.line("the endpoint listens");
    assert_eq!(mended.terminate(), Some(0));
}

#[test]
fn an_option_that_can_not_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut plane = Plane::start(dir.path(), &["--jwks-extra-roots", "/nonexistent.pem"]);
    let mut log = String::new();
    plane.log.read_to_string(&mut log).unwrap();
    assert!(log.contains("reading /nonexistent.pem"), "{log}");
    assert_eq!(plane.child.wait().unwrap().code(), Some(1));

    let output = run(&["standalone", "--manifests", "x", "--grace-period", "5 minutes"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--grace-period"));
}

#[test]
fn completions_are_printed() {
    let output = run(&["completions", "bash"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("--data-dir"));
}
