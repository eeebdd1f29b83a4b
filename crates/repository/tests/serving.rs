//! Packages as curl and sha256sum see them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test states what must be true")]
#![allow(dead_code, reason = "the support is shared by several tests")]

mod support;

use std::io::Read;
use std::process::{Command, Stdio};
use support::*;

const AGENT: &str = "/install/deb/amd64/onboarding-agent.deb";

#[test]
fn the_commands_of_the_requirement_work_for_every_uri() {
    let (first, second) = (deb(&noise(300_001, 1)), rpm(&noise(200_000, 2)));
    let mut paths = Vec::new();
    for (kind, content) in [("deb", &first), ("rpm", &second)] {
        for architecture in ["amd64", "arm64"] {
            for name in ["onboarding-agent", "istio-sidecar"] {
                paths.push((format!("{kind}/{architecture}/{name}.{kind}"), content));
            }
            paths.push((format!("istio-sidecar/1-28-2/{kind}/{architecture}/istio-sidecar.{kind}"), content));
        }
    }
    let packages: Vec<_> = paths.iter().map(|(path, content)| (path.as_str(), content.as_slice())).collect();
    let repository = Repository::start(&packages);
    for (path, content) in &packages {
        for url in [format!("/install/{path}"), format!("/install/{path}.sha256")] {
            let output = repository.curl().arg("-fLO").arg(repository.url(&url)).output().unwrap();
            assert!(output.status.success(), "{url}: {output:?}");
        }
        let file = path.rsplit_once('/').unwrap().1;
        let check = Command::new("sha256sum")
            .args(["--check", &format!("{file}.sha256")])
            .current_dir(repository.work())
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&check.stdout), format!("{file}: OK\n"), "{path}: {check:?}");
        assert_eq!(std::fs::read(repository.work().join(file)).unwrap(), *content);
        for file in [file.to_owned(), format!("{file}.sha256")] {
            std::fs::remove_file(repository.work().join(file)).unwrap();
        }
    }
    assert_eq!(repository.admin("/readyz"), "ready\n");
    let log = repository.logs("a package was asked for");
    let line = log.lines().find(|line| line.contains("a package was asked for")).expect("an access log line");
    let fields: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!((&fields["status"], &fields["complete"]), (&200.into(), &true.into()));
    let answered = "onboarding_repository_requests_total{status=\"2xx\"} 24";
    let counted = |all: &String| all.contains(answered) && all.contains("onboarding_repository_packages 12");
    repository.until("all are counted", || repository.admin("/metrics"), counted);
}

#[test]
fn heads_say_what_a_download_would_and_both_versions_of_http_do() {
    let content = deb(&noise(100_000, 3));
    let repository =
        Repository::start(&[("deb/amd64/onboarding-agent.deb", &content), ("rpm/amd64/istio-sidecar.rpm", &rpm(b"1"))]);
    let digest = sha256(&content);
    for (option, version) in [("--http1.1", "HTTP/1.1 200"), ("--http2", "HTTP/2 200")] {
        let got = repository.get(AGENT, &[option]);
        assert!(got.head.starts_with(version), "{}", got.head);
        assert_eq!(got.body, content);
        let head = repository.head(AGENT, &[option]);
        assert!(head.head.starts_with(version), "{}", head.head);
        for name in
            ["content-length", "content-type", "etag", "last-modified", "accept-ranges", "repr-digest", "cache-control"]
        {
            assert_eq!(head.header(name).unwrap_or_else(|| panic!("{name}")), got.header(name).unwrap(), "{name}");
        }
        assert_eq!(head.header("content-length"), Some(content.len().to_string().as_str()));
        assert_eq!(head.header("content-type"), Some("application/vnd.debian.binary-package"));
        assert_eq!(head.header("etag"), Some(format!("\"{digest}\"").as_str()));
        assert_eq!(head.header("accept-ranges"), Some("bytes"));
        assert_eq!(head.header("content-encoding"), None);
        // Packages aren't compressed, whatever the client would take.
        assert_eq!(repository.get(AGENT, &[option, "-H", "Accept-Encoding: gzip"]).body, content);
    }
    let rpm = repository.head("/install/rpm/amd64/istio-sidecar.rpm", &[]);
    assert_eq!(rpm.header("content-type"), Some("application/x-rpm"));
    let checksum = repository.get(&format!("{AGENT}.sha256"), &[]);
    assert_eq!(checksum.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(checksum.text(), format!("{digest}  onboarding-agent.deb\n"));
}

#[test]
fn a_download_that_was_cut_off_is_resumed() {
    let content = deb(&noise(500_000, 4));
    let repository = Repository::start(&[("deb/amd64/onboarding-agent.deb", &content)]);
    for version in ["--http1.1", "--http2"] {
        let file = repository.work().join("onboarding-agent.deb");
        std::fs::write(&file, &content[..123_457]).unwrap();
        let output = repository.curl().args([version, "-fLO", "-C", "-"]).arg(repository.url(AGENT)).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(std::fs::read(&file).unwrap(), content);
    }
    repository.logs("\"status\":206");
}

#[test]
fn ranges_and_conditions() {
    let content = deb(&noise(1000, 5));
    let repository = Repository::start(&[("deb/amd64/onboarding-agent.deb", &content)]);
    let length = content.len();
    let etag = format!("\"{}\"", sha256(&content));
    let get = |headers: &[&str]| {
        let options: Vec<&str> = headers.iter().flat_map(|header| ["-H", *header]).collect();
        repository.get(AGENT, &options)
    };
    let part = get(&["Range: bytes=10-19"]);
    assert_eq!((part.status.as_str(), &part.body[..]), ("206", &content[10..20]));
    assert_eq!(part.header("content-range"), Some(format!("bytes 10-19/{length}").as_str()));
    let suffix = get(&["Range: bytes=-7"]);
    assert_eq!((suffix.status.as_str(), &suffix.body[..]), ("206", &content[length - 7..]));
    let beyond = get(&["Range: bytes=5000-"]);
    assert_eq!(beyond.status, "416");
    assert_eq!(beyond.header("content-range"), Some(format!("bytes */{length}").as_str()));
    assert_eq!(get(&["Range: bytes=0-1,3-4"]).body, content);

    let date = get(&[]).header("last-modified").unwrap().to_owned();
    let resumed = |held: &str| get(&["Range: bytes=10-19", &format!("If-Range: {held}")]).status;
    assert_eq!(resumed(&etag), "206");
    for other in ["\"other\"", &format!("W/{etag}"), &date, "nonsense"] {
        assert_eq!(resumed(other), "200", "{other}");
    }
    for (header, status) in [
        (format!("If-None-Match: {etag}"), "304"),
        (format!("If-None-Match: \"other\", W/{etag}"), "304"),
        ("If-None-Match: *".to_owned(), "304"),
        ("If-None-Match: \"other\"".to_owned(), "200"),
        (format!("If-Match: {etag}"), "200"),
        ("If-Match: \"other\"".to_owned(), "412"),
        (format!("If-Match: W/{etag}"), "412"),
        (format!("If-Modified-Since: {date}"), "304"),
        ("If-Modified-Since: Thu, 01 Jan 1970 00:00:01 GMT".to_owned(), "200"),
        ("If-Modified-Since: nonsense".to_owned(), "200"),
        (format!("If-Unmodified-Since: {date}"), "200"),
        ("If-Unmodified-Since: Thu, 01 Jan 1970 00:00:01 GMT".to_owned(), "412"),
    ] {
        let answer = get(&[&header]);
        assert_eq!(answer.status, status, "{header}");
        assert_eq!(answer.header("etag"), Some(etag.as_str()), "{header}");
        assert_eq!(answer.body == content, status == "200", "{header}");
    }
    // The entity tag has the say, whatever the dates are (RFC 9110, section 13.2.2).
    let both = get(&["If-None-Match: \"other\"", &format!("If-Modified-Since: {date}")]);
    assert_eq!(both.status, "200");
    // Both of a pair have the tag of the package.
    assert_eq!(repository.head(&format!("{AGENT}.sha256"), &[]).header("etag"), Some(etag.as_str()));
    assert_eq!(repository.get(&format!("{AGENT}.sha256"), &["-H", "If-Match: \"other\""]).status, "412");
}

#[test]
fn the_listing_names_what_there_is() {
    let repository = Repository::start(&[
        ("deb/amd64/onboarding-agent.deb", &deb(b"1")),
        ("istio-sidecar/1-28/rpm/arm64/istio-sidecar.rpm", &rpm(b"1")),
        ("notes.txt", b"not for everybody"),
    ]);
    for (path, there, absent) in [
        ("/install/", vec!["<a href=\"deb/\">", "<a href=\"istio-sidecar/\">"], "notes"),
        ("/install/deb/", vec!["<a href=\"amd64/\">", "<a href=\"../\">"], "arm64"),
        (
            "/install/deb/amd64/",
            vec!["<a href=\"onboarding-agent.deb\">", "<a href=\"onboarding-agent.deb.sha256\">"],
            "rpm",
        ),
        ("/install/istio-sidecar/", vec!["<a href=\"1-28/\">"], "deb/"),
        ("/install/istio-sidecar/1-28/rpm/arm64/", vec!["<a href=\"istio-sidecar.rpm\">"], "deb"),
    ] {
        let listing = repository.get(path, &[]);
        assert_eq!(
            (listing.status.as_str(), listing.header("content-type")),
            ("200", Some("text/html; charset=utf-8"))
        );
        for link in there {
            assert!(listing.text().contains(link), "{path}: {}", listing.text());
        }
        assert!(!listing.text().contains(absent), "{path}: {}", listing.text());
    }
    for (path, to) in [("/", "/install/"), ("/install", "/install/"), ("/install/deb/amd64", "/install/deb/amd64/")] {
        let moved = repository.get(path, &[]);
        assert_eq!((moved.status.as_str(), moved.header("location")), ("308", Some(to)));
    }
    let gzip = repository.get("/install/", &["-H", "Accept-Encoding: gzip"]);
    assert_eq!(gzip.header("content-encoding"), Some("gzip"));
    assert_eq!(repository.get("/install/", &["--compressed"]).text(), repository.get("/install/", &[]).text());
}

#[test]
fn what_is_not_there_is_told_what_is() {
    let repository = Repository::start(&[("deb/amd64/onboarding-agent.deb", &deb(b"1"))]);
    for path in ["/install/rpm/amd64/onboarding-agent.rpm", "/install/nonsense", "/other", "/install/deb/arm64/"] {
        let answer = repository.get(path, &[]);
        assert_eq!(
            (answer.status.as_str(), answer.header("content-type")),
            ("404", Some("text/plain; charset=utf-8")),
            "{path}"
        );
        assert!(answer.text().contains("\n/install/deb/amd64/onboarding-agent.deb\n"), "{path}: {}", answer.text());
    }
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"] {
        let answer = repository.get(AGENT, &["-X", method]);
        assert_eq!((answer.status.as_str(), answer.header("allow")), ("405", Some("GET, HEAD")), "{method}");
    }
    let answered = "onboarding_repository_requests_total{status=\"4xx\"} 9";
    repository.until("all are counted", || repository.admin("/metrics"), |all| all.contains(answered));
}

#[test]
fn nothing_leaves_the_directory() {
    let repository = Repository::start(&[("deb/amd64/onboarding-agent.deb", &deb(b"1"))]);
    let outside = repository.dir.path().join("secret.deb");
    std::fs::write(&outside, deb(b"secret")).unwrap();
    let packages = repository.packages();
    // A link that leaves, absolute and relative, of a file and of a directory; and one that stays.
    std::os::unix::fs::symlink(&outside, packages.join("deb/amd64/istio-sidecar.deb")).unwrap();
    std::os::unix::fs::symlink("../../..", packages.join("deb/arm64")).unwrap();
    std::fs::write(repository.dir.path().join("onboarding-agent.deb"), deb(b"secret")).unwrap();
    std::fs::create_dir_all(packages.join("istio-sidecar")).unwrap();
    std::os::unix::fs::symlink("..", packages.join("istio-sidecar/1-28")).unwrap();
    for path in [
        "/install/deb/amd64/istio-sidecar.deb",
        "/install/deb/arm64/onboarding-agent.deb",
        "/install/../secret.deb",
        "/install/deb/../../secret.deb",
        "/install/deb/amd64/../../../secret.deb",
        "/install/%2e%2e/secret.deb",
        "/install/..%2fsecret.deb",
        "/install/%2e%2e%2fsecret.deb",
        "/install/%252e%252e%252fsecret.deb",
        "/install/..%5csecret.deb",
        "/install/..\\secret.deb",
        "/install/deb/amd64/..%00/onboarding-agent.deb",
        "/install/deb/amd64/onboarding-agent.deb%00",
        "/install/%c0%ae%c0%ae/secret.deb",
        "/install//etc/passwd",
        "//etc/passwd",
        "/install/deb/amd64/./onboarding-agent.deb",
        "/install/istio-sidecar/../deb/amd64/istio-sidecar.deb",
        "/install/istio-sidecar/../../deb/amd64/istio-sidecar.deb",
        "/install/sha256/../deb/amd64/onboarding-agent.deb",
        "/install/deb/../",
        "/install/deb/amd64/;/onboarding-agent.deb",
    ] {
        let answer = repository.get(path, &["--http1.1"]);
        assert_eq!(answer.status, "404", "{path}: {}", answer.text());
        assert!(!answer.text().contains("secret"), "{path}: {}", answer.text());
    }
    // Links inside are the administrator's: 1-28 is what has no revision.
    put(&packages, "pool/sidecar-1.deb", &deb(b"inside"));
    std::fs::remove_file(packages.join("deb/amd64/istio-sidecar.deb")).unwrap();
    std::os::unix::fs::symlink("../../pool/sidecar-1.deb", packages.join("deb/amd64/istio-sidecar.deb")).unwrap();
    for path in ["deb/amd64/istio-sidecar.deb", "istio-sidecar/1-28/deb/amd64/istio-sidecar.deb"] {
        assert_eq!(repository.get(&format!("/install/{path}"), &[]).body, deb(b"inside"), "{path}");
    }
}

#[test]
fn what_is_no_whole_package_is_not_served() {
    let whole = deb(&noise(5000, 6));
    let repository = Repository::start(&[
        ("deb/amd64/onboarding-agent.deb", &whole),
        ("deb/amd64/istio-sidecar.deb", b"#!/bin/sh\necho hello\n"),
        ("deb/arm64/istio-sidecar.deb", &whole[..4000]),
        ("rpm/amd64/istio-sidecar.rpm", &whole),
        ("rpm/arm64/istio-sidecar.rpm", b""),
    ]);
    std::fs::create_dir_all(repository.packages().join("deb/arm64/onboarding-agent.deb")).unwrap();
    nix::unistd::mkfifo(&repository.packages().join("rpm/amd64/onboarding-agent.rpm"), nix::sys::stat::Mode::S_IRWXU)
        .unwrap();
    for (path, why) in [
        ("deb/amd64/istio-sidecar.deb", "it does not begin as a deb package"),
        ("deb/arm64/istio-sidecar.deb", "it is being written, or was cut off"),
        ("rpm/amd64/istio-sidecar.rpm", "it does not begin as a rpm package"),
        ("rpm/arm64/istio-sidecar.rpm", "it does not begin as a rpm package"),
        ("deb/arm64/onboarding-agent.deb", "it is no file"),
        ("rpm/amd64/onboarding-agent.rpm", "it is no file"),
    ] {
        for end in ["", ".sha256"] {
            let answer = repository.get(&format!("/install/{path}{end}"), &[]);
            assert_eq!(answer.status, "404", "{path}");
            assert!(answer.text().contains(why), "{path}: {}", answer.text());
        }
    }
    assert_eq!(repository.get(AGENT, &[]).body, whole);
    repository.logs("a package can't be served");
    let faults = || repository.admin("/metrics");
    repository.until("faults", faults, |metrics| metrics.contains("onboarding_repository_package_faults 6"));
}

#[test]
fn a_directory_that_is_missing_is_said_and_waited_for() {
    let repository = Repository::start(&[]);
    let missing = |ready: &String| {
        ready.starts_with("packages: the directory ") && ready.contains("make it, and put packages there")
    };
    repository.until("not ready", || repository.admin("/readyz"), missing);
    assert_eq!(repository.get("/install/", &[]).status, "503");
    put_first(&repository);
    repository.until("ready", || repository.admin("/readyz"), |ready| ready == "ready\n");
    assert_eq!(repository.get(AGENT, &[]).status, "200");
}

fn put_first(repository: &Repository) {
    std::fs::create_dir(repository.packages()).unwrap();
    put(&repository.packages(), "deb/amd64/onboarding-agent.deb", &deb(b"1"));
}

#[test]
fn a_new_certificate_is_served_without_a_restart() {
    let repository = Repository::start(&[("deb/amd64/onboarding-agent.deb", &deb(b"1"))]);
    assert_eq!(repository.get(AGENT, &[]).status, "200");
    certify(repository.dir.path());
    // curl trusts the new CA only.
    let trusted = || repository.curl().arg("-f").arg(repository.url(AGENT)).output().unwrap().status.success();
    assert!(repository.until("the new certificate", trusted, |trusted| *trusted));
}

#[test]
fn it_ends_when_it_is_told_to_after_the_downloads_that_began() {
    let content = deb(&noise(30_000_000, 1));
    let mut repository = Repository::start(&[("deb/amd64/onboarding-agent.deb", &content)]);
    let mut curl = repository.curl().arg("-f").arg(repository.url(AGENT)).stdout(Stdio::piped()).spawn().unwrap();
    let mut pipe = curl.stdout.take().unwrap();
    let mut got = vec![0; 100_000];
    pipe.read_exact(&mut got).unwrap();
    let pid = nix::unistd::Pid::from_raw(repository.pid().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    // Who comes now is refused at once (curl's exit code 7), and not left waiting.
    let newcomer = || repository.curl().arg(repository.url(AGENT)).output().unwrap().status.code();
    repository.until("the address is closed", newcomer, |code| *code == Some(7));
    pipe.read_to_end(&mut got).unwrap();
    assert!(curl.wait().unwrap().success() && got == content);
    assert_eq!(repository.ended(), Some(0));
}
