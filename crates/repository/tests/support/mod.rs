//! The program as it is run, packages for it, and curl as its clients have it.

use onboarding_testkit::oidc::make_tls;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub const HOST: &str = "onboarding-endpoint.your-company.corp";

/// A .deb: an `ar` archive as deb(5) has it, with `data` in it.
pub fn deb(data: &[u8]) -> Vec<u8> {
    let mut all = b"!<arch>\n".to_vec();
    for (name, content) in [("debian-binary", b"2.0\n".as_slice()), ("control.tar", b"cc"), ("data.tar", data)] {
        let mut header = String::new();
        writeln!(header, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 100_644, content.len()).unwrap();
        all.extend(header.as_bytes());
        all.extend(content);
        if content.len() % 2 == 1 {
            all.push(b'\n');
        }
    }
    all
}

/// An RPM's lead and its signature header with `RPMSIGTAG_SIZE`, then that many bytes.
pub fn rpm(data: &[u8]) -> Vec<u8> {
    let mut all = vec![0xed, 0xab, 0xee, 0xdb];
    all.resize(96, 0);
    all.extend([0x8e, 0xad, 0xe8, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 4]);
    for number in [1000_u32, 4, 0, 1, u32::try_from(data.len()).unwrap()] {
        all.extend(number.to_be_bytes());
    }
    all.resize(all.len().next_multiple_of(8), 0);
    all.extend(data);
    all
}

/// Bytes that no two offsets have alike.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut all = Vec::with_capacity(length + 8);
    while all.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        all.extend(state.to_le_bytes());
    }
    all.truncate(length);
    all
}

/// A repository on free ports; killed with this value.
pub struct Repository {
    pub dir: tempfile::TempDir,
    pub port: u16,
    admin: String,
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Repository {
    /// With these packages, by their paths.
    pub fn start(packages: &[(&str, &[u8])]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        std::fs::create_dir(dir.path().join("tls")).unwrap();
        certify(dir.path());
        for (path, content) in packages {
            put(&dir.path().join("packages"), path, content);
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_onboarding-repository"))
            .args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--log-format", "json"])
            .arg("--packages")
            .arg(dir.path().join("packages"))
            .arg("--certificate-directory")
            .arg(dir.path().join("tls"))
            .env("RUST_LOG", "debug")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let mut seen = String::new();
        let address = |lines: &mut BufReader<ChildStderr>, seen: &mut String, message: &str| loop {
            let mut line = String::new();
            assert!(lines.read_line(&mut line).unwrap() > 0, "no {message:?} in\n{seen}");
            seen.push_str(&line);
            let fields: serde_json::Value = serde_json::from_str(&line).unwrap();
            if fields["message"] == message {
                return fields["address"].as_str().unwrap().to_owned();
            }
        };
        let listens = address(&mut lines, &mut seen, "the repository listens");
        let admin = address(&mut lines, &mut seen, "metrics and readiness are served");
        let port = listens.rsplit_once(':').unwrap().1.parse().unwrap();
        let log = Arc::new(Mutex::new(seen));
        let sink = log.clone();
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let mut sink = sink.lock().unwrap();
                sink.push_str(&line);
                sink.push('\n');
            }
        });
        Self { dir, port, admin, child, log }
    }

    pub fn packages(&self) -> PathBuf {
        self.dir.path().join("packages")
    }

    /// Where curl writes.
    pub fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    pub fn url(&self, path: &str) -> String {
        format!("https://{HOST}:{}{path}", self.port)
    }

    /// By its address, which is in its certificate too.
    pub fn local(&self, path: &str) -> String {
        format!("https://127.0.0.1:{}{path}", self.port)
    }

    /// curl that knows the host and its CA; it runs in [`Repository::work`].
    pub fn curl(&self) -> Command {
        let mut curl = Command::new("curl");
        curl.arg("--resolve").arg(format!("{HOST}:{}:127.0.0.1", self.port));
        curl.arg("--cacert").arg(self.dir.path().join("ca.pem"));
        curl.args(["--silent", "--show-error", "--max-time", "120"]).current_dir(self.work());
        curl
    }

    /// The answer with its head, as curl prints it.
    pub fn get(&self, path: &str, options: &[&str]) -> Answer {
        let output =
            self.curl().args(["--include", "--path-as-is"]).args(options).arg(self.url(path)).output().unwrap();
        Answer::of(&output)
    }

    pub fn head(&self, path: &str, options: &[&str]) -> Answer {
        self.get(path, &[&["--head"], options].concat())
    }

    /// Of the admin address.
    pub fn admin(&self, path: &str) -> String {
        let url = format!("http://{}{path}", self.admin);
        let output = Command::new("curl").args(["--silent", "--show-error", &url]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits for a value; what it was last is said if it never comes.
    #[track_caller]
    pub fn until<T: std::fmt::Debug>(&self, what: &str, value: impl Fn() -> T, wanted: impl Fn(&T) -> bool) -> T {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let last = value();
            if wanted(&last) {
                return last;
            }
            assert!(Instant::now() < deadline, "{what}: {last:?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until this is in the log, and returns all of it: who got an answer may have it before it is logged and counted.
    #[track_caller]
    pub fn logs(&self, part: &str) -> String {
        self.until(&format!("{part:?} is logged"), || self.log(), |log| log.contains(part))
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// A field of `/proc/<pid>/status`, in KiB.
    pub fn status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn ended(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Repository {
    fn drop(&mut self) {
        // Nothing to do for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A new certificate; `ca.pem` is whom to trust for it.
pub fn certify(dir: &Path) {
    let made = make_tls(&[HOST, "127.0.0.1"]).unwrap();
    std::fs::write(dir.join("ca.pem"), made.ca).unwrap();
    std::fs::write(dir.join("tls/tls.key"), made.private_key).unwrap();
    std::fs::write(dir.join("tls/tls.crt"), made.certificate_chain).unwrap();
}

/// Replaces a package as it should be: written elsewhere, then renamed.
pub fn put(packages: &Path, path: &str, content: &[u8]) {
    let file = packages.join(path);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    let mut new = tempfile::NamedTempFile::new_in(packages).unwrap();
    new.write_all(content).unwrap();
    new.persist(file).unwrap();
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: String,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    fn of(output: &Output) -> Self {
        assert!(output.status.success(), "{output:?}");
        let all = &output.stdout;
        let end = all.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        let head = String::from_utf8(all[..end].to_vec()).unwrap();
        let status = head.split(' ').nth(1).unwrap().to_owned();
        Self { status, head, body: all[end + 4..].to_vec() }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().skip(1).filter_map(|line| line.split_once(':'));
        lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// SHA-256 as coreutils compute it.
pub fn sha256(content: &[u8]) -> String {
    let mut sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    sum.stdin.take().unwrap().write_all(content).unwrap();
    let mut text = String::new();
    sum.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(sum.wait().unwrap().success());
    text[..64].to_owned()
}

/// `sha256sum --check` of this file in `dir`.
pub fn checks(dir: &Path, file: &str) -> bool {
    let check = Command::new("sha256sum").args(["--check", "--quiet", file]).current_dir(dir).output().unwrap();
    check.status.success()
}
