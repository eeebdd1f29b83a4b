//! Many at once, and clients that take their time.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use std::process::{Child, Stdio};
use support::*;

const AGENT: &str = "/install/deb/amd64/onboarding-agent.deb";
const DOWNLOADS: u64 = 200;
const LENGTH: usize = 50 << 20;
/// Of the whole process, in KiB; 200 packages of 50 MiB are 10 GiB.
const MOST_MEMORY: u64 = 96 << 10;

#[test]
fn two_hundred_downloads_at_once_need_little_memory() {
    let content = deb(&noise(LENGTH, 1));
    let repository = Repository::start(&[("deb/amd64/onboarding-agent.deb", &content)]);
    repository.until(
        "known",
        || repository.admin("/metrics"),
        |metrics| metrics.contains("onboarding_repository_packages 1"),
    );
    let idle = repository.status("VmRSS");
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
    println!("{DOWNLOADS} downloads of {LENGTH} bytes in {took:?}; resident {idle} KiB before, {most} KiB at most");
    assert!(most < MOST_MEMORY, "{most} KiB");
}
