//! A data directory that can't be written: from the start, and from some moment on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "all of it is tests")]
#![allow(dead_code, reason = "the agent is shared with other tests")]

#[path = "../../endpoint/tests/support/agent.rs"]
mod agent;
mod support;

use agent::{Agent, Key, assert_refused, connect};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use onboarding_testkit::oidc::{self, Oidc};
use onboarding_testkit::process::{self, Process};
use onboarding_wire::onboarding as pb;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::get;
use tonic::Code;

const HOST: &str = "onboarding-endpoint.your-company.corp";
const WITHIN: Duration = Duration::from_secs(20);

/// A mount namespace, for as long as this value lives: with it go its mounts.
struct Mounts(Process);

impl Mounts {
    /// What it looks like is up to `script`, a shell's.
    fn new(script: &str) -> Self {
        let mut command = Command::new("unshare");
        if !nix::unistd::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.args(["--mount", "--propagation", "private", "sh", "-ec"]);
        command.arg(format!("{script}\necho holding; exec cat")).stdin(Stdio::piped());
        let holder = Process::start("mounts", command, None).unwrap();
        holder.wait_for_line(WITHIN, |line| line == "holding").unwrap();
        Self(holder)
    }

    /// A command that sees these mounts.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.0.pid().to_string(), "--mount"]);
        if !nix::unistd::geteuid().is_root() {
            command.args(["--user", "--preserve-credentials"]);
        }
        command.arg("--").arg(program).stdin(Stdio::null());
        command
    }

    fn check(&self, program: &str, args: &[&str]) {
        let mut command = self.command(program);
        command.args(args);
        process::output(command, WITHIN).unwrap();
    }
}

struct Plane {
    process: Process,
    address: SocketAddr,
    admin: String,
}

fn start(mounts: &Mounts, manifests: &Path, data: &Path) -> Process {
    let mut command = mounts.command(env!("CARGO_BIN_EXE_onboarding-plane"));
    command
        .arg("standalone")
        .args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--log-format", "json"])
        .arg("--manifests")
        .arg(manifests)
        .arg("--data-dir")
        .arg(data);
    Process::start("plane", command, None).unwrap()
}

impl Plane {
    fn start(mounts: &Mounts, manifests: &Path, data: &Path) -> Self {
        let process = start(mounts, manifests, data);
        let address = |message: &str| -> String {
            let line = process.wait_for_line(WITHIN, |line| line.contains(message)).unwrap();
            let fields: serde_json::Value = serde_json::from_str(&line).unwrap();
            fields["address"].as_str().unwrap().to_owned()
        };
        let admin = address("metrics and readiness are served");
        Self { address: address("the endpoint listens").parse().unwrap(), admin, process }
    }

    fn get(&self, path: &str) -> String {
        get(&self.admin, path)
    }

    fn terminate(&self) -> Option<i32> {
        self.process.signal(nix::sys::signal::Signal::SIGTERM).unwrap();
        self.process.wait(WITHIN).unwrap().code()
    }
}

/// What an agent needs to join: the manifests, and who signs for it.
struct Company {
    issuer: Oidc,
    ca: String,
}

impl Company {
    async fn new(manifests: &Path) -> Self {
        let (issuer, tls) = (oidc::start().await.unwrap(), oidc::make_tls(&[HOST]).unwrap());
        let text = format!(
            r#"
apiVersion: install.tetrate.io/v1alpha1
kind: ControlPlane
metadata: {{name: controlplane, namespace: istio-system}}
spec:
  meshExpansion:
    onboarding:
      uid: the-plane
      endpoint: {{hosts: [{HOST}], secretName: onboarding-endpoint-tls}}
      workloads:
        authentication:
          jwt:
            issuers:
            - issuer: {issuer}
              shortName: my-corp
              jwks: '{jwks}'
---
apiVersion: v1
kind: Secret
type: kubernetes.io/tls
metadata: {{name: onboarding-endpoint-tls, namespace: istio-system}}
data: {{tls.crt: {certificate}, tls.key: {key}}}
---
apiVersion: networking.istio.io/v1alpha3
kind: WorkloadGroup
metadata: {{name: ratings, namespace: bookinfo, labels: {{app: ratings}}}}
spec:
  template: {{serviceAccount: ratings-vm}}
---
apiVersion: authorization.onboarding.tetrate.io/v1alpha1
kind: OnboardingPolicy
metadata: {{name: allow-our-vms, namespace: bookinfo}}
spec:
  allow:
  - workloads: [{{jwt: {{issuer: {issuer}}}}}]
    onboardTo: [{{workloadGroupSelector: {{}}}}]
"#,
            issuer = issuer.issuer,
            jwks = issuer.jwks(),
            certificate = STANDARD.encode(tls.certificate_chain),
            key = STANDARD.encode(tls.private_key),
        );
        std::fs::create_dir_all(manifests).unwrap();
        std::fs::write(manifests.join("all.yaml"), text).unwrap();
        Self { issuer, ca: tls.ca }
    }

    fn jwt(&self, subject: &str) -> String {
        let now = jiff::Timestamp::now().as_second();
        let claims = serde_json::json!({ "sub": subject, "aud": "the-plane", "iat": now, "exp": now + 600 });
        self.issuer.mint(jsonwebtoken::Algorithm::ES256, claims).unwrap()
    }

    async fn agent(&self, plane: &Plane, key: Key) -> Agent {
        connect(plane.address, HOST, agent::client_config(&self.ca, rustls::ALL_VERSIONS), key).await
    }
}

#[test]
fn a_plane_does_not_start_on_what_it_can_not_write_and_says_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, manifests) = (dir.path().join("disk"), dir.path().join("manifests"));
    for made in [&disk, &manifests] {
        std::fs::create_dir_all(made).unwrap();
    }
    let quoted = disk.display();
    let writable = Mounts::new(&format!("mount --bind '{quoted}' '{quoted}'"));
    let read_only = Mounts::new(&format!("mount --bind '{quoted}' '{quoted}'; mount -o remount,bind,ro '{quoted}'"));
    let refused = |data: &Path, attempted: &str| {
        let process = start(&read_only, &manifests, data);
        assert_eq!(process.wait(WITHIN).unwrap().code(), Some(1), "{}", process.tail());
        let last = process.wait_for_line(WITHIN, |line| line.contains("the plane ends: ")).unwrap();
        for words in [attempted, "Read-only file system", "mount its disk for writing", "--data-dir"] {
            assert!(last.contains(words), "{last} doesn't say {words:?}");
        }
    };
    let data = disk.join("data");
    // The first start there ever, then one on what an earlier plane left.
    refused(&data, &format!("making the data directory {}", data.display()));
    assert!(!data.exists());
    assert_eq!(Plane::start(&writable, &manifests, &data).terminate(), Some(0));
    refused(&data, &format!("the data directory {} can't be written", data.display()));
    assert_eq!(Plane::start(&writable, &manifests, &data).terminate(), Some(0));
}

/// A file system of its own can't be made: why. In CI that is a failure.
fn no_disk() -> bool {
    if nix::unistd::geteuid().is_root() && Path::new("/dev/loop-control").exists() {
        return false;
    }
    assert!(std::env::var_os("CI").is_none(), "no file system of its own: not root, or no loop device");
    eprintln!("skipped: a file system that turns read-only takes root and a loop device");
    true
}

// Processes are waited for in it, while connections end.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_turns_read_only_admits_nobody_and_loses_nobody() {
    if no_disk() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (manifests, disk, image) = (dir.path().join("manifests"), dir.path().join("disk"), dir.path().join("image"));
    std::fs::create_dir(&disk).unwrap();
    let (disk, image) = (disk.to_str().unwrap(), image.to_str().unwrap());
    let company = Company::new(&manifests).await;
    let mounts =
        Mounts::new(&format!("truncate -s 32M '{image}'; mkfs.ext4 -q '{image}'; mount -o loop '{image}' '{disk}'"));
    let data = Path::new(disk).join("data");
    let plane = Plane::start(&mounts, &manifests, &data);
    let mut member = company.agent(&plane, Key::new()).await;
    let mut session = member.join(&company.jwt("member")).await.unwrap();
    session.boot().await;
    let mut late = company.agent(&plane, Key::new()).await;
    late.authorize(&company.jwt("late")).await.unwrap();
    assert!(plane.get("/readyz").starts_with("HTTP/1.1 200"), "{}", plane.get("/readyz"));

    // As the kernel does it after an error of the disk, with everything before written out.
    mounts.check("sync", &["-f", disk]);
    mounts.check("mount", &["-o", "remount,abort", disk]);

    assert_refused(late.register().await, Code::Unavailable, "the registry is unavailable: writing its file");
    let refused = company.agent(&plane, Key::new()).await.authorize(&company.jwt("later")).await;
    assert_refused(refused, Code::Unavailable, "the plane can't write its audit log, so it allows nothing");
    let ready = plane.get("/readyz");
    assert!(ready.starts_with("HTTP/1.1 503"), "{ready}");
    assert!(ready.contains("registry: the registry is unavailable") && ready.contains("auditLog: "), "{ready}");
    assert!(plane.process.status().is_none(), "the plane ended:\n{}", plane.process.tail());
    // The session is there, and is answered.
    let request = pb::CertificateRequest { csr: b"nonsense".to_vec() };
    session.say(pb::agent_message::Message::CertificateRequest(request)).await;
    let answer = tokio::time::timeout(WITHIN, session.hear.message()).await.unwrap().unwrap().unwrap();
    assert!(matches!(answer.message, Some(pb::plane_message::Message::CertificateRefused(_))), "{answer:?}");
    assert!(plane.get("/metrics").contains("\nonboarding_sessions 1\n"));
    // Those who know them by key and token come back on other connections.
    let ((member_key, member_token), (late_key, late_token)) =
        ((member.key.clone(), member.token.clone()), (late.key.clone(), late.token.clone()));
    drop((session, member, late));
    assert_eq!(plane.terminate(), Some(0), "{}", plane.process.tail());

    // What an operator does about it.
    mounts.check("umount", &[disk]);
    let mut repair = mounts.command("e2fsck");
    assert!(repair.args(["-p", image]).stdout(Stdio::null()).status().unwrap().code().is_some_and(|code| code <= 1));
    mounts.check("mount", &["-o", "loop", image, disk]);

    let plane = Plane::start(&mounts, &manifests, &data);
    // Who was a member is one: neither authorized nor registered anew.
    let mut again = company.agent(&plane, member_key).await;
    again.token = member_token;
    let proof = again.token_proof().await;
    again.session_with(Some(proof)).await.unwrap().boot().await;
    // Who was refused is not, and can be.
    let mut after = company.agent(&plane, late_key).await;
    after.token = late_token;
    let proof = after.token_proof().await;
    assert_refused(after.session_with(Some(proof)).await.map(drop), Code::NotFound, "the registration is gone");
    after.register().await.unwrap();
    company.agent(&plane, Key::new()).await.join(&company.jwt("later")).await.unwrap().boot().await;
    assert!(plane.get("/readyz").starts_with("HTTP/1.1 200"), "{}", plane.get("/readyz"));
    drop((again, after));
    assert_eq!(plane.terminate(), Some(0), "{}", plane.process.tail());
}
