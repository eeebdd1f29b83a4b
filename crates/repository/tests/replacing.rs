//! A package that is replaced while it is downloaded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::*;

const FILE: &str = "deb/amd64/onboarding-agent.deb";
const AGENT: &str = "/install/deb/amd64/onboarding-agent.deb";

#[test]
fn no_client_gets_a_mixture_and_none_by_content_gets_another() {
    let versions: Vec<Vec<u8>> =
        (0..6).map(|seed| deb(&noise(400_000 + 1000 * usize::try_from(seed).unwrap(), seed))).collect();
    let digests: Vec<String> = versions.iter().map(|version| sha256(version)).collect();
    let repository = Repository::start(&[(FILE, &versions[0])]);
    let (stop, packages) = (AtomicBool::new(false), repository.packages());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for version in versions.iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                put(&packages, FILE, version);
                // Until somebody has seen it: each version has its moment, and no more.
                let etag = format!("\"{}\"", sha256(version));
                repository.until(
                    "the new version",
                    || repository.head(AGENT, &[]).header("etag").map(str::to_owned),
                    |seen| seen.as_deref() == Some(&etag),
                );
            }
        });
        let clients: Vec<_> = (0..4)
            .map(|client| {
                let (repository, digests) = (&repository, &digests);
                scope.spawn(move || {
                    let mut seen = std::collections::BTreeSet::new();
                    let until = Instant::now() + Duration::from_secs(6);
                    while Instant::now() < until {
                        // A package by its name is one of them, and the one that its head says.
                        let got = repository.get(AGENT, &[if client % 2 == 0 { "--http1.1" } else { "--http2" }]);
                        let digest = sha256(&got.body);
                        assert!(digests.contains(&digest), "a package that never was");
                        assert_eq!(got.header("etag"), Some(format!("\"{digest}\"").as_str()));
                        seen.insert(digest.clone());
                        // The checksum of that one, or the refusal.
                        let tag = format!("If-Match: \"{digest}\"");
                        let sum = repository.get(&format!("{AGENT}.sha256"), &["-H", &tag]);
                        match sum.status.as_str() {
                            "200" => assert_eq!(sum.text(), format!("{digest}  onboarding-agent.deb\n")),
                            status => assert_eq!(status, "412"),
                        }
                        // By content: the checksum first, then what it is of.
                        let sum = repository.get(&format!("{AGENT}.sha256"), &[]).text()[..64].to_owned();
                        let by_content = repository.get(&format!("/install/sha256/{sum}/onboarding-agent.deb"), &[]);
                        match by_content.status.as_str() {
                            "200" => assert_eq!(sha256(&by_content.body), sum),
                            // More than three newer ones since, which only a test does.
                            status => assert_eq!(status, "404"),
                        }
                    }
                    seen.len()
                })
            })
            .collect();
        let seen: Vec<usize> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        stop.store(true, Ordering::Relaxed);
        assert!(seen.iter().any(|seen| *seen > 1), "nothing was replaced under a client: {seen:?}");
    });
}

#[test]
fn what_was_replaced_stays_by_its_content_and_what_was_taken_away_does_not() {
    let versions: Vec<Vec<u8>> = (0..5).map(|seed| deb(&noise(10_000, seed))).collect();
    let repository = Repository::start(&[(FILE, &versions[0])]);
    let by_content = |version: &[u8], end: &str| {
        repository.get(&format!("/install/sha256/{}/onboarding-agent.deb{end}", sha256(version)), &[])
    };
    let newest = || repository.get(AGENT, &[]).body;
    for version in &versions {
        put(&repository.packages(), FILE, version);
        assert_eq!(&newest(), version);
    }
    for version in &versions[1..] {
        let held = by_content(version, "");
        assert_eq!((held.status.as_str(), &held.body), ("200", version));
        assert_eq!(held.header("cache-control"), Some("public, max-age=31536000, immutable"));
        assert_eq!(by_content(version, ".sha256").text(), format!("{}  onboarding-agent.deb\n", sha256(version)));
    }
    assert_eq!(by_content(&versions[0], "").status, "404", "the oldest was one too many");
    let other = repository.get(&format!("/install/sha256/{}/istio-sidecar.deb", sha256(&versions[4])), &[]);
    assert_eq!(other.status, "404", "under another name");
    std::fs::remove_file(repository.packages().join(FILE)).unwrap();
    assert_eq!(repository.get(AGENT, &[]).status, "404");
    for version in &versions {
        assert_eq!(by_content(version, "").status, "404");
    }
}

#[test]
fn a_download_that_began_ends_with_what_it_began_with() {
    let old = deb(&noise(30_000_000, 1));
    let repository = Repository::start(&[(FILE, &old)]);
    let mut curl = repository.curl().arg("-f").arg(repository.url(AGENT)).stdout(Stdio::piped()).spawn().unwrap();
    let mut pipe = curl.stdout.take().unwrap();
    let mut got = vec![0; 100_000];
    pipe.read_exact(&mut got).unwrap();
    put(&repository.packages(), FILE, &deb(b"new"));
    assert_eq!(repository.get(AGENT, &[]).body, deb(b"new"));
    pipe.read_to_end(&mut got).unwrap();
    assert!(curl.wait().unwrap().success());
    assert!(got == old, "another content");
}

#[test]
fn a_package_that_is_written_to_in_place_breaks_the_download_off() {
    let old = deb(&noise(30_000_000, 1));
    let repository = Repository::start(&[(FILE, &old)]);
    for version in ["--http1.1", "--http2"] {
        let mut curl = repository.curl();
        let mut curl = curl
            .args([version, "-f"])
            .arg(repository.url(AGENT))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut pipe = curl.stdout.take().unwrap();
        let mut got = vec![0; 100_000];
        pipe.read_exact(&mut got).unwrap();
        let file = std::fs::File::options().write(true).open(repository.packages().join(FILE)).unwrap();
        file.write_all_at(b"changed", 29_000_000).unwrap();
        pipe.read_to_end(&mut got).unwrap();
        assert!(!curl.wait().unwrap().success(), "{version}: a mixture");
        assert!(got.len() < old.len());
    }
    repository.logs("a package can't be read any further");
    // What is there now has a checksum that is its own.
    let now = repository.get(AGENT, &[]);
    assert_eq!(now.header("etag"), Some(format!("\"{}\"", sha256(&now.body)).as_str()));
}

#[test]
fn a_package_that_arrives_in_pieces_appears_when_it_is_whole() {
    let whole = deb(&noise(50_000, 2));
    let repository = Repository::start(&[("rpm/amd64/onboarding-agent.rpm", &rpm(b"1"))]);
    let file = repository.packages().join(FILE);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    let mut writer = std::fs::File::create(&file).unwrap();
    for piece in whole.chunks(9001) {
        for end in ["", ".sha256"] {
            let answer = repository.get(&format!("{AGENT}{end}"), &[]);
            assert_eq!(answer.status, "404", "{}", answer.text());
        }
        writer.write_all(piece).unwrap();
    }
    assert_eq!(repository.get(AGENT, &[]).body, whole);
}
