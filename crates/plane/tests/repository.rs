//! The local repository of a standalone plane: there while the ControlPlane says so, with the endpoint's certificate.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "all of it is tests")]

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use onboarding_testkit::oidc::make_tls;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const HOST: &str = "onboarding-endpoint.your-company.corp";
const DEB: &[u8] = b"!<arch>\ndebian-binary   0           0     0     100644  4         `\n2.0\n";

struct Plane {
    child: Child,
    lines: mpsc::Receiver<serde_json::Value>,
}

impl Plane {
    fn start(dir: &Path, listen: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_onboarding-plane"))
            .args(["standalone", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--log-format", "json"])
            .args(["--repository-listen", listen])
            .arg("--manifests")
            .arg(dir.join("manifests"))
            .arg("--data-dir")
            .arg(dir.join("data"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                let _ = sender.send(serde_json::from_str(&line).unwrap());
            }
        });
        Self { child, lines }
    }

    /// Waits for the line with this message; its fields.
    fn line(&self, message: &str) -> serde_json::Value {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("no {message:?}"));
            if line["message"] == message {
                return line;
            }
        }
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        // Nothing to do for one that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn control_plane(dir: &Path, repository: &str) {
    let manifest = format!(
        "apiVersion: install.tetrate.io/v1alpha1\nkind: ControlPlane\nmetadata: {{name: controlplane, namespace: istio-system}}\n\
         spec: {{meshExpansion: {{onboarding: {{uid: 'https://{HOST}', endpoint: {{hosts: [{HOST}], secretName: tls}}{repository}}}}}}}\n"
    );
    let new = dir.join("control-plane.new");
    std::fs::write(&new, manifest).unwrap();
    std::fs::rename(new, dir.join("manifests/control-plane.yaml")).unwrap();
}

fn setup(repository: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("manifests")).unwrap();
    let made = make_tls(&[HOST]).unwrap();
    let secret = format!(
        "apiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata: {{name: tls, namespace: istio-system}}\n\
         data: {{tls.crt: {}, tls.key: {}}}\n",
        STANDARD.encode(made.certificate_chain),
        STANDARD.encode(made.private_key)
    );
    std::fs::write(dir.path().join("manifests/secret.yaml"), secret).unwrap();
    std::fs::write(dir.path().join("ca.pem"), made.ca).unwrap();
    control_plane(dir.path(), repository);
    dir
}

fn curl(dir: &Path, port: &str) -> std::process::Output {
    Command::new("curl")
        .args(["--silent", "--show-error", "--fail", "--max-time", "20", "--resolve"])
        .arg(format!("{HOST}:{port}:127.0.0.1"))
        .arg("--cacert")
        .arg(dir.join("ca.pem"))
        .arg(format!("https://{HOST}:{port}/install/deb/amd64/onboarding-agent.deb"))
        .output()
        .unwrap()
}

#[test]
fn packages_are_served_while_the_control_plane_says_so() {
    let dir = setup("");
    let package = dir.path().join("data/packages/deb/amd64/onboarding-agent.deb");
    std::fs::create_dir_all(package.parent().unwrap()).unwrap();
    std::fs::write(&package, DEB).unwrap();
    let plane = Plane::start(dir.path(), "127.0.0.1:0");
    plane.line("metrics and readiness are served");
    for _ in 0..2 {
        control_plane(dir.path(), ", localRepository: {}");
        let address = plane.line("the repository listens")["address"].as_str().unwrap().to_owned();
        let port = address.rsplit_once(':').unwrap().1;
        let got = curl(dir.path(), port);
        assert!(got.status.success(), "{got:?}");
        assert_eq!(got.stdout, DEB);
        control_plane(dir.path(), "");
        plane.line("the repository ended with localRepository");
        let refused = curl(dir.path(), port);
        assert_eq!(refused.status.code(), Some(7), "{refused:?}");
    }
}

#[test]
fn an_address_that_can_not_be_opened_is_said_and_the_endpoint_goes_on() {
    let dir = setup(", localRepository: {}");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let plane = Plane::start(dir.path(), &address);
    let fault = plane.line("the repository can't be served")["fault"].as_str().unwrap().to_owned();
    assert!(fault.starts_with(&format!("listening on {address}: ")), "{fault}");
    assert!(fault.ends_with("--repository-listen says where the repository listens"), "{fault}");
    drop(taken);
    plane.line("the repository listens");
}
