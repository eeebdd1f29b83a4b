//! The real plane, standalone, as a process of its own; and what it is configured with.

use crate::crowd::{Evidence, Target, Whereto};
use crate::figures::Bench;
use crate::machine::{self, Killed, Memory};
use anyhow::{Context, ensure};
use jsonwebtoken::Algorithm;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use onboarding_testkit::cms::RegionKey;
use onboarding_testkit::oidc::{self, MadeTls, Oidc};
use onboarding_testkit::port;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub const HOST: &str = "onboarding-endpoint.your-company.corp";
pub const UID: &str = "https://onboarding-endpoint.your-company.corp";
pub const NAMESPACE: &str = "bookinfo";
pub const GROUP: &str = "ratings";
const REGION: &str = "us-east-2";
/// In a directory of their own: the plane watches the parent of its manifests as well, and would be woken by its own log.
pub const MANIFESTS: &str = "config/manifests";
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Who vouches for the hosts: an issuer and a region of AWS, which the plane's manifests name.
pub struct World {
    pub issuer: Arc<Oidc>,
    pub region: Arc<RegionKey>,
    tls: MadeTls,
}

impl World {
    /// # Errors
    /// The issuer can't listen on loopback.
    pub async fn start() -> anyhow::Result<Self> {
        Ok(Self {
            issuer: Arc::new(oidc::start().await?),
            region: Arc::new(RegionKey::generate(REGION)?),
            tls: oidc::make_tls(&[HOST])?,
        })
    }

    pub fn jwt(&self) -> Evidence {
        Evidence::jwt(self.issuer.clone())
    }

    /// Cheap to make, for crowds that aren't measured while they join.
    pub fn cheap(&self) -> Evidence {
        Evidence::Jwt { issuer: self.issuer.clone(), algorithm: Algorithm::ES256 }
    }

    pub fn ec2_document(&self) -> Evidence {
        Evidence::Ec2Document(self.region.clone())
    }

    /// The endpoint's own certificate.
    pub fn tls(&self) -> &MadeTls {
        &self.tls
    }

    /// ControlPlane and Secret, WorkloadGroup and policies for both kinds of hosts; a Sidecar and a Service, so that there is a
    /// configuration to give.
    pub fn manifests(&self) -> String {
        let indented = |text: &str| text.lines().map(|line| format!("    {line}\n")).collect::<String>();
        let base64 = |text: &str| base64::Engine::encode(&base64::engine::general_purpose::STANDARD, text);
        let jwks = indented(&self.issuer.jwks().to_string()).replace("    {", "                {");
        format!(
            r"apiVersion: install.tetrate.io/v1alpha1
kind: ControlPlane
metadata: {{name: controlplane, namespace: istio-system}}
spec:
  meshExpansion:
    onboarding:
      endpoint: {{hosts: [{HOST}], secretName: onboarding-endpoint-tls}}
      uid: {UID}
      workloads:
        authentication:
          jwt:
            issuers:
            - issuer: {issuer}
              shortName: my-corp
              tokenFields: {{attributes: {{jsonPath: .custom_attributes}}}}
              jwks: |
{jwks}
---
apiVersion: v1
kind: Secret
type: kubernetes.io/tls
metadata: {{name: onboarding-endpoint-tls, namespace: istio-system}}
data:
  tls.crt: {chain}
  tls.key: {key}
---
apiVersion: networking.istio.io/v1alpha3
kind: WorkloadGroup
metadata: {{name: {GROUP}, namespace: {NAMESPACE}, labels: {{app: {GROUP}}}}}
spec:
  template:
    labels: {{app: {GROUP}, class: vm}}
    serviceAccount: ratings-vm
    network: virtual-machines
---
apiVersion: networking.istio.io/v1beta1
kind: Sidecar
metadata: {{name: bookinfo-ratings-no-iptables, namespace: {NAMESPACE}}}
spec:
  workloadSelector: {{labels: {{app: {GROUP}, class: vm}}}}
  ingress:
  - {{defaultEndpoint: '127.0.0.1:8080', port: {{name: http, number: 8080, protocol: HTTP}}}}
  egress:
  - {{bind: 127.0.0.2, port: {{number: 8080, name: http, protocol: HTTP}}, hosts: ['./*']}}
",
            issuer = self.issuer.issuer,
            chain = base64(&self.tls.certificate_chain),
            key = base64(&self.tls.private_key),
        )
    }

    /// Who may join: everybody that this world vouches for.
    pub fn policy(&self) -> String {
        format!("{}---\n{}", self.policy_for_jwts(), self.policy_for_instances())
    }

    pub fn policy_for_jwts(&self) -> String {
        policy("allow-our-hosts", &format!("jwt: {{issuer: '{}'}}", self.issuer.issuer))
    }

    pub fn policy_for_instances(&self) -> String {
        policy("allow-our-instances", &format!("aws: {{accounts: ['{}'], ec2: {{}}}}", crate::crowd::ACCOUNT))
    }

    pub fn whereto(&self) -> Whereto {
        Whereto { plane_uid: UID.to_owned(), namespace: NAMESPACE.to_owned(), group: GROUP.to_owned() }
    }
}

fn policy(name: &str, matcher: &str) -> String {
    format!(
        r"apiVersion: authorization.onboarding.tetrate.io/v1alpha1
kind: OnboardingPolicy
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  allow:
  - workloads:
    - {matcher}
    onboardTo:
    - workloadGroupSelector: {{matchLabels: {{app: {GROUP}}}}}
"
    )
}

/// A plane that runs; killed with this value, and its data with it.
pub struct Plane {
    process: Killed,
    directory: TempDir,
    binary: PathBuf,
    one_core: bool,
    listen: SocketAddr,
    admin: SocketAddr,
    ca: String,
}

impl Plane {
    /// Ready when this returns.
    ///
    /// # Errors
    /// It can't be started, or isn't ready in time; with the end of its log.
    pub async fn start(bench: &Bench, world: &World) -> anyhow::Result<Self> {
        let binary = bench.binaries.join("onboarding-plane");
        ensure!(binary.exists(), "there is no {}; dev/bench builds it", binary.display());
        let directory = tempfile::Builder::new().prefix("onboarding-bench-").tempdir_in(&bench.directory)?;
        std::fs::create_dir_all(directory.path().join(MANIFESTS))?;
        std::fs::write(directory.path().join("aws.pem"), world.region.pinned())?;
        // A plane that is started again needs the same.
        let (listen, admin) = (port::free_at(Ipv4Addr::LOCALHOST)?, port::free_at(Ipv4Addr::LOCALHOST)?);
        let process = start(&binary, directory.path(), bench.one_core, listen, admin)?;
        let one_core = bench.one_core;
        let mut plane = Self { process, directory, binary, one_core, listen, admin, ca: world.tls.ca.clone() };
        plane.write_manifest("world.yaml", &world.manifests())?;
        plane.write_manifest("policy.yaml", &world.policy())?;
        plane.wait_until_ready().await?;
        Ok(plane)
    }

    pub fn target(&self) -> Target {
        Target { addresses: vec![self.listen], server_name: HOST.to_owned(), ca: self.ca.clone() }
    }
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }
    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        machine::cpu_time(self.pid())
    }
    pub fn memory(&self) -> anyhow::Result<Memory> {
        machine::memory(self.pid())
    }
    pub fn peak_memory(&self) -> anyhow::Result<u64> {
        machine::peak_memory(self.pid())
    }
    /// Of its manifests, its data and its log.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Written beside and renamed, as an editor or a deployment does it.
    pub fn write_manifest(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let manifests = self.directory.path().join(MANIFESTS);
        let draft = self.directory.path().join(format!("{name}.draft"));
        std::fs::write(&draft, text)?;
        std::fs::rename(&draft, manifests.join(name)).with_context(|| format!("writing the manifest {name}"))
    }

    /// SIGKILL, and a new one on the same address and the same data. Returns when it has been started, not when it is ready.
    ///
    /// # Errors
    /// It can't be started.
    pub fn kill_and_start(&mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.pid()), Signal::SIGKILL)?;
        self.process.0.wait()?;
        self.process = start(&self.binary, self.directory.path(), self.one_core, self.listen, self.admin)?;
        Ok(())
    }

    /// # Errors
    /// Not within a minute, or it has ended; with the end of its log.
    pub async fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let started = Instant::now();
        loop {
            let answer = self.get("/readyz").await;
            if answer.as_ref().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")) {
                return Ok(());
            }
            let ended = self.process.0.try_wait()?;
            if ended.is_some() || started.elapsed() > READY_WITHIN {
                anyhow::bail!("the plane isn't ready ({ended:?}, {answer:?}); the end of its log:\n{}", self.log_end());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The sum of what it counts under this name, whatever the labels; 0 where it counts nothing yet.
    ///
    /// # Errors
    /// It doesn't answer.
    pub async fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let answer = self.get("/metrics").await?;
        let values = answer.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let value = if rest.starts_with('{') { rest.rsplit_once("} ")?.1 } else { rest.strip_prefix(' ')? };
            value.split(' ').next()?.parse::<f64>().ok()
        });
        Ok(values.sum())
    }

    async fn get(&self, path: &str) -> anyhow::Result<String> {
        let mut stream = TcpStream::connect(self.admin).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: plane\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut answer)).await??;
        Ok(answer)
    }

    fn log_end(&self) -> String {
        let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

fn start(
    binary: &Path,
    directory: &Path,
    one_core: bool,
    listen: SocketAddr,
    admin: SocketAddr,
) -> anyhow::Result<Killed> {
    let mut command = machine::on_planes_core(binary, one_core);
    let log = File::options().create(true).append(true).open(directory.join("log"))?;
    command
        .arg("standalone")
        .arg("--manifests")
        .arg(directory.join(MANIFESTS))
        .arg("--data-dir")
        .arg(directory.join("data"))
        .arg("--aws-extra-certificates")
        .arg(directory.join("aws.pem"))
        .args(["--listen", &listen.to_string(), "--admin-listen", &admin.to_string()])
        .args(["--repository-listen", "127.0.0.1:0", "--log-format", "json"])
        // All agents come from a few addresses here.
        .args(["--authorizations-per-second", "1000000", "--connections-per-address", "60000"])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    Ok(Killed(command.spawn().with_context(|| format!("starting {}", binary.display()))?))
}
