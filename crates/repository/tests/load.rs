//! Many at once, and clients that take their time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use support::*;

const AGENT: &str = "/install/deb/amd64/onboarding-agent.deb";
const DOWNLOADS: u64 = 200;
const LENGTH: usize = 50 << 20;
/// Of the whole process, in KiB; 200 packages of 50 MiB are 10 GiB.
const MOST_MEMORY: u64 = 96 << 10;

/// Downloads of the floor, one after the other.
const FLOOR: u64 = 20;
/// What a byte may cost in time of the processor, of what it costs the floor. HTTP/2, 200 connections at once and the reading of a file
/// are in it, and what is measured is a debug build: it was 7.6 on two processors that others kept busy. Far more is a fault, not noise.
const MOST_OF_FLOOR: f64 = 25.0;

/// In ticks of the clock, of which nobody needs the length: of the process or thread at this path.
fn processor_time(stat: &str) -> u64 {
    let stat = std::fs::read_to_string(stat).unwrap();
    // The name in parentheses may hold anything (proc(5)); utime and stime are fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// The least that could do it: the same TLS library on a blocking socket, the same bytes from memory, nothing else.
/// Ticks for all of it.
fn floor(directory: &Path, content: &Arc<Vec<u8>>) -> u64 {
    let chain = CertificateDer::pem_file_iter(directory.join("tls/tls.crt")).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(directory.join("tls/tls.key")).unwrap();
    let config = Arc::new(ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://127.0.0.1:{}/", listener.local_addr().unwrap().port());
    let sent = content.clone();
    let server = std::thread::spawn(move || {
        for _ in 0..FLOOR {
            let connection = ServerConnection::new(config.clone()).unwrap();
            let mut stream = StreamOwned::new(connection, listener.accept().unwrap().0);
            let (mut asked, mut block) = (Vec::new(), [0; 4096]);
            while !asked.ends_with(b"\r\n\r\n") {
                let read = stream.read(&mut block).unwrap();
                asked.extend_from_slice(&block[..read]);
            }
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", sent.len()).unwrap();
            sent.chunks(256 << 10).for_each(|chunk| stream.write_all(chunk).unwrap());
            stream.conn.send_close_notify();
            stream.flush().unwrap();
        }
        processor_time("/proc/thread-self/stat")
    });
    for _ in 0..FLOOR {
        let mut curl = std::process::Command::new("curl");
        curl.args(["-fsS", "--http1.1", "--max-time", "120", "-o", "/dev/null", "-w", "%{size_download}", "--cacert"]);
        let output = curl.arg(directory.join("ca.pem")).arg(&url).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), content.len().to_string(), "{output:?}");
    }
    server.join().unwrap()
}

#[test]
fn two_hundred_downloads_at_once_need_little_memory() {
    let content = Arc::new(deb(&noise(LENGTH, 1)));
    let repository = Repository::start(&[("deb/amd64/onboarding-agent.deb", content.as_slice())]);
    repository.until(
        "known",
        || repository.admin("/metrics"),
        |metrics| metrics.contains("onboarding_repository_packages 1"),
    );
    let idle = repository.status("VmRSS");
    let stat = format!("/proc/{}/stat", repository.pid());
    let before = processor_time(&stat);
    let start = std::time::Instant::now();
    let mut downloads: Vec<Child> = (0..DOWNLOADS)
        .map(|index| {
            let version = if index % 2 == 0 { "--http1.1" } else { "--http2" };
            let mut curl = repository.curl();
            curl.args([version, "--max-time", "500", "-f", "--output", "/dev/null", "--write-out", "%{size_download}"]);
            curl.arg(repository.url(AGENT)).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let sent = |metrics: &String| -> u64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix("onboarding_repository_bytes_total ")).unwrap();
        line.parse().unwrap()
    };
    let connections = |metrics: &String| metrics.contains(&format!("onboarding_repository_connections {DOWNLOADS}\n"));
    repository.until("all at once", || repository.admin("/metrics"), connections);
    let under_way = sent(&repository.admin("/metrics"));
    assert!(under_way < DOWNLOADS * content.len() as u64 / 2, "too fast to have been at once");
    for download in downloads.drain(..) {
        let output = download.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), content.len().to_string());
    }
    let (most, took) = (repository.status("VmHWM"), start.elapsed());
    let ticks = processor_time(&stat) - before;
    println!("{DOWNLOADS} downloads of {LENGTH} bytes in {took:?}; resident {idle} KiB before, {most} KiB at most");
    assert!(most < MOST_MEMORY, "{most} KiB");
    assert!(sent(&repository.admin("/metrics")) >= DOWNLOADS * content.len() as u64, "bytes that nobody counted");
    let bare = floor(repository.dir.path(), &content);
    #[allow(clippy::cast_precision_loss, reason = "ticks of a few minutes")]
    let ratio = (ticks as f64 / DOWNLOADS as f64) / (bare.max(1) as f64 / FLOOR as f64);
    println!(
        "{ticks} ticks for {DOWNLOADS} downloads, {bare} for {FLOOR} of bare TLS: {ratio:.2} times the floor a download"
    );
    assert!(ratio < MOST_OF_FLOOR, "{ratio}");
}
