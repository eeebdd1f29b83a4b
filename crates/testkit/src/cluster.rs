//! A real control plane without containers: etcd, kube-apiserver, kube-controller-manager, and Istio's istiod.
//!
//! Each is a process of its own; pods don't run (no kubelet, no scheduler), so what would be a pod is started as a process by the test.

use crate::netns::Machine;
use crate::port;
use crate::process::{self, Process};
use anyhow::{Context, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::sys::signal::Signal;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The variable that names the directory which `dev/kubernetes` prints.
pub const BINARIES: &str = "ONBOARDING_CLUSTER_BIN";
const ADMIN_TOKEN: &str = "admin-of-the-test-cluster";
/// How long a part may take until it is ready, on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(120);

/// What to start a cluster with.
pub struct Options {
    /// Where its servers listen.
    pub address: IpAddr,
    /// Garbage collection, service accounts, root certificates, endpoint slices.
    pub controllers: bool,
    /// How a program is started: in this network namespace, or in that of a machine.
    pub command: Box<dyn Fn(&Path) -> Command + Send + Sync>,
}

impl Options {
    /// On a machine of a lab, with its controllers.
    pub fn on(machine: Arc<Machine>) -> Self {
        let address = machine.address().into();
        Self { address, controllers: true, command: Box::new(move |program| machine.command(program)) }
    }
}

impl Default for Options {
    /// On loopback, with its controllers.
    fn default() -> Self {
        Self {
            address: Ipv4Addr::LOCALHOST.into(),
            controllers: true,
            command: Box::new(|program| Command::new(program)),
        }
    }
}

/// Where a running istiod is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Istiod {
    /// xDS and the CA, TLS; its certificate is for `istiod.istio-system.svc`.
    pub secure: SocketAddr,
    /// `/debug/syncz` and the like, plain HTTP; istiod answers whoever asks from its own machine.
    pub http: SocketAddr,
    /// Its webhooks, with the same certificate.
    pub https: SocketAddr,
}

/// A cluster. Dropping it ends its processes and removes what they stored.
pub struct Cluster {
    options: Options,
    binaries: PathBuf,
    directory: tempfile::TempDir,
    api: SocketAddr,
    ca: String,
    processes: Mutex<Processes>,
}

/// The namespace of Istio's control plane.
const ISTIO_SYSTEM: &str = "istio-system";

/// In the order in which they end.
#[derive(Default)]
struct Processes {
    istiod: Option<(Process, Istiod)>,
    controllers: Option<Process>,
    api: Option<Process>,
    etcd: Option<Process>,
}

impl Cluster {
    /// Starts it, and returns when the API server is ready (4 s on an idle machine).
    ///
    /// # Errors
    /// The binaries aren't there, or one of them ends; the error has its last lines.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        let binaries = PathBuf::from(std::env::var_os(BINARIES).with_context(|| {
            format!("{BINARIES} isn't set; `export {BINARIES}=$(dev/kubernetes)` builds what is needed, once")
        })?);
        let directory = tempfile::Builder::new().prefix("cluster-").tempdir()?;
        let api = port::free_at(options.address)?;
        let ca = write_certificates(directory.path(), options.address)?;
        std::fs::write(directory.path().join("tokens.csv"), format!("{ADMIN_TOKEN},admin,admin,\"system:masters\"\n"))?;
        let cluster = Self { options, binaries, directory, api, ca, processes: Mutex::default() };
        std::fs::write(cluster.kubeconfig(), cluster.kubeconfig_with_token(ADMIN_TOKEN))?;
        cluster.start_etcd()?;
        cluster.start_api()?;
        if cluster.options.controllers {
            cluster.start_controllers()?;
        }
        Ok(cluster)
    }

    /// The kubeconfig of an administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.path("admin.kubeconfig")
    }

    /// The text of a kubeconfig for the bearer of this token.
    pub fn kubeconfig_with_token(&self, token: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\n\
             contexts: [{{name: test, context: {{cluster: test, user: test}}}}]\n\
             clusters: [{{name: test, cluster: {{server: 'https://{}', certificate-authority: '{}'}}}}]\n\
             users: [{{name: test, user: {{token: '{token}'}}}}]\n",
            self.api,
            self.path("ca.crt").display(),
        )
    }

    /// PEM of the CA that signed the API server's certificate.
    pub fn ca(&self) -> &str {
        &self.ca
    }
    pub fn api_address(&self) -> SocketAddr {
        self.api
    }
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
    /// A program of the directory that `dev/kubernetes` prints.
    pub fn binary(&self, name: &str) -> PathBuf {
        self.binaries.join(name)
    }

    /// Runs kubectl as an administrator, and gives what it printed.
    pub fn kubectl<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> anyhow::Result<String> {
        self.kubectl_within(READY_WITHIN, arguments)
    }

    /// An error when it takes longer.
    pub fn kubectl_within<S: AsRef<OsStr>>(
        &self,
        within: Duration,
        arguments: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<String> {
        process::output(self.kubectl_command(arguments), within)
    }

    /// The same, however it ends: for what must be refused.
    pub fn try_kubectl<S: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<process::Ended> {
        process::run(self.kubectl_command(arguments), READY_WITHIN)
    }

    fn kubectl_command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = self.command(&self.binary("kubectl"));
        command.arg("--kubeconfig").arg(self.kubeconfig()).args(arguments);
        command
    }

    /// `kubectl apply -f` of this text.
    pub fn apply(&self, manifests: &str) -> anyhow::Result<String> {
        let file = tempfile::NamedTempFile::new_in(self.directory.path())?;
        std::fs::write(file.path(), manifests)?;
        self.kubectl([OsStr::new("apply"), OsStr::new("-f"), file.path().as_os_str()])
    }

    /// Creates CRDs and waits until they are served.
    pub fn apply_crds(&self, file: &Path) -> anyhow::Result<()> {
        // Server-side: Istio's are too large for the annotation that apply writes otherwise.
        self.kubectl([OsStr::new("apply"), OsStr::new("--server-side"), OsStr::new("-f"), file.as_os_str()])?;
        let wait = ["wait", "--for=condition=Established", "--timeout=60s", "-f"].map(OsStr::new);
        self.kubectl(wait.into_iter().chain([file.as_os_str()]))?;
        Ok(())
    }

    /// Istio's CRDs, of the version that istiod is built from.
    pub fn apply_istio_crds(&self) -> anyhow::Result<()> {
        self.apply_crds(&self.binary("istio-crds.yaml"))
    }

    fn start_etcd(&self) -> anyhow::Result<()> {
        let (client, peer) = (port::free_at(self.options.address)?, port::free_at(self.options.address)?);
        std::fs::write(self.path("etcd.address"), client.to_string())?;
        let mut command = self.command(&self.binary("etcd"));
        command
            .arg("--data-dir")
            .arg(self.path("etcd"))
            .args(["--unsafe-no-fsync", "--log-level=warn", "--name=test"])
            .arg(format!("--listen-client-urls=http://{client}"))
            .arg(format!("--advertise-client-urls=http://{client}"))
            .arg(format!("--listen-peer-urls=http://{peer}"))
            .arg(format!("--initial-advertise-peer-urls=http://{peer}"))
            .arg(format!("--initial-cluster=test=http://{peer}"));
        self.lock().etcd = Some(Process::start("etcd", command, Some(&self.path("etcd.log")))?);
        Ok(())
    }

    /// Starts the API server, again after [`Self::kill_api`], and waits until it is ready.
    pub fn start_api(&self) -> anyhow::Result<()> {
        let etcd = std::fs::read_to_string(self.path("etcd.address"))?;
        let mut command = self.command(&self.binary("kube-apiserver"));
        let path = |flag: &str, file: &str| format!("--{flag}={}", self.path(file).display());
        command.args([
            format!("--etcd-servers=http://{etcd}"),
            format!("--bind-address={}", self.api.ip()),
            format!("--advertise-address={}", self.api.ip()),
            format!("--secure-port={}", self.api.port()),
            path("cert-dir", "api"),
            path("tls-cert-file", "api.crt"),
            path("tls-private-key-file", "api.key"),
            path("token-auth-file", "tokens.csv"),
            path("service-account-key-file", "accounts.pub"),
            path("service-account-signing-key-file", "accounts.key"),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            // istiod reviews the tokens of workloads for its own audience.
            "--api-audiences=https://kubernetes.default.svc,istio-ca".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            // As OpenShift has it: who sets an owner whose deletion waits must be allowed to.
            "--enable-admission-plugins=OwnerReferencesPermissionEnforcement".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            // Nobody routes the addresses of Services here: a webhook is asked at an endpoint of its Service.
            "--enable-aggregator-routing=true".to_owned(),
            "--profiling=false".to_owned(),
        ]);
        let process = Process::start("kube-apiserver", command, Some(&self.path("kube-apiserver.log")))?;
        let ready = self.wait_until("the API server", &process, || {
            let mut kubectl = self.kubectl_command(["get", "--raw", "/readyz"]);
            kubectl.arg("--request-timeout=2s");
            process::output(kubectl, Duration::from_secs(5)).map(|_| ())
        });
        self.lock().api = Some(process);
        ready
    }

    /// As a machine that fails: SIGKILL.
    pub fn kill_api(&self) -> anyhow::Result<()> {
        let process = self.lock().api.take().context("the API server isn't running")?;
        process.kill();
        Ok(())
    }

    /// Stops the API server where it is (SIGSTOP), or lets it go on: connections stay open, and nothing answers.
    pub fn freeze_api(&self, frozen: bool) -> anyhow::Result<()> {
        let processes = self.lock();
        let process = processes.api.as_ref().context("the API server isn't running")?;
        process.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    /// etcd forgets what was before now: who asks what changed since then is told that nobody knows any more. An API server that runs may
    /// still know it.
    pub fn compact(&self) -> anyhow::Result<()> {
        let any = STANDARD.encode([0]);
        let answer = self.ask_etcd("/v3/kv/range", &json!({"key": any, "range_end": any, "count_only": true}))?;
        let revision = answer["header"]["revision"].as_str().context("etcd's answer has no revision")?;
        self.ask_etcd("/v3/kv/compaction", &json!({"revision": revision, "physical": true})).map(|_| ())
    }

    fn ask_etcd(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let etcd = std::fs::read_to_string(self.path("etcd.address"))?;
        let body = body.to_string();
        let mut stream = TcpStream::connect(&etcd)?;
        write!(
            stream,
            "POST {path} HTTP/1.0\r\nHost: {etcd}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("etcd: {answer:?}"))?;
        ensure!(head.lines().next().is_some_and(|line| line.contains(" 200 ")), "etcd, {path}: {answer}");
        Ok(serde_json::from_str(body)?)
    }

    fn start_controllers(&self) -> anyhow::Result<()> {
        let mut command = self.command(&self.binary("kube-controller-manager"));
        command.args([
            format!("--kubeconfig={}", self.kubeconfig().display()),
            format!("--service-account-private-key-file={}", self.path("accounts.key").display()),
            format!("--root-ca-file={}", self.path("ca.crt").display()),
            "--controllers=garbage-collector-controller,serviceaccount-controller,namespace-controller,\
             root-ca-certificate-publisher-controller,deployment-controller,replicaset-controller,endpointslice-controller"
                .to_owned(),
            "--leader-elect=false".to_owned(),
            "--secure-port=0".to_owned(),
            "--profiling=false".to_owned(),
        ]);
        let process = Process::start("kube-controller-manager", command, Some(&self.path("controllers.log")))?;
        let ready = self.wait_until("the controller manager", &process, || {
            self.kubectl(["get", "serviceaccount", "default", "-n", "default"]).map(|_| ())
        });
        self.lock().controllers = Some(process);
        ready
    }

    /// Starts istiod on this cluster, which needs Istio's CRDs, and waits until it is ready (3 s). `mesh`: its mesh configuration, YAML,
    /// which is also put into the ConfigMap `istio`.
    pub fn start_istiod(&self, mesh: &str) -> anyhow::Result<Istiod> {
        std::fs::write(self.path("mesh.yaml"), mesh)?;
        if !self.try_kubectl(["get", "namespace", ISTIO_SYSTEM])?.status.success() {
            self.kubectl(["create", "namespace", ISTIO_SYSTEM])?;
        }
        self.put_mesh("istio", mesh)?;
        self.run_istiod(self.istiod_addresses()?)
    }

    /// One more, of a revision; call after [`Self::start_istiod`], whose CA it shares. It is not the cluster's to end.
    pub fn start_istiod_of(&self, revision: &str, mesh: &str) -> anyhow::Result<(Process, Istiod)> {
        self.put_mesh(&format!("istio-{revision}"), mesh)?;
        let istiod = self.istiod_addresses()?;
        Ok((self.istiod_process(istiod, Some(revision))?, istiod))
    }

    fn istiod_addresses(&self) -> anyhow::Result<Istiod> {
        let address = self.options.address;
        let http = port::free_at(Ipv4Addr::LOCALHOST)?;
        Ok(Istiod { secure: port::free_at(address)?, http, https: port::free_at(address)? })
    }

    /// Into the ConfigMap of this name.
    fn put_mesh(&self, name: &str, mesh: &str) -> anyhow::Result<()> {
        let indented: String = mesh.lines().map(|line| format!("    {line}\n")).collect();
        self.apply(&format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}, namespace: {ISTIO_SYSTEM}}}\ndata:\n  mesh: |\n{indented}"
        ))
        .map(drop)
    }

    /// Kills it (SIGKILL) and starts it anew, at the same addresses, as behind its Service; `meanwhile` is called while there is none.
    pub fn restart_istiod(&self, meanwhile: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let (process, istiod) = self.lock().istiod.take().context("istiod isn't running")?;
        process.kill();
        meanwhile()?;
        self.run_istiod(istiod).map(drop)
    }

    fn run_istiod(&self, istiod: Istiod) -> anyhow::Result<Istiod> {
        let process = self.istiod_process(istiod, None)?;
        self.lock().istiod = Some((process, istiod));
        Ok(istiod)
    }

    fn istiod_process(&self, istiod: Istiod, revision: Option<&str>) -> anyhow::Result<Process> {
        let name = revision.map_or_else(|| "istiod".to_owned(), |revision| format!("istiod-{revision}"));
        let monitoring = port::free_at(self.options.address)?;
        let mut command = self.command(&self.binary("pilot-discovery"));
        command
            .arg("discovery")
            .arg(format!("--kubeconfig={}", self.kubeconfig().display()))
            .arg(format!("--meshConfig={}", self.path("mesh.yaml").display()))
            .arg(format!("--secureGRPCAddr={}", istiod.secure))
            .arg(format!("--httpAddr={}", istiod.http))
            .arg(format!("--httpsAddr={}", istiod.https))
            .arg(format!("--monitoringAddr={monitoring}"))
            .args(["--grpcAddr=", "--ctrlz_port=0", "--clusterID=Kubernetes", "--log_output_level=default:warn"])
            .current_dir(self.directory.path())
            .envs([
                ("POD_NAMESPACE", ISTIO_SYSTEM),
                ("POD_NAME", &format!("{name}-test")),
                ("REVISION", revision.unwrap_or_default()),
                ("PILOT_CERT_PROVIDER", "istiod"),
                // A stock Envoy then takes all that istiod sends.
                ("PILOT_ENABLE_ALPN_FILTER", "false"),
                ("PILOT_ENABLE_METADATA_EXCHANGE", "false"),
            ]);
        let process = Process::start(&name, command, Some(&self.path(&format!("{name}.log"))))?;
        self.wait_until(&name, &process, || {
            let mut curl = self.command(Path::new("curl"));
            curl.args(["-fsS", "--max-time", "2"]).arg(format!("http://{}/ready", istiod.http));
            process::output(curl, Duration::from_secs(5)).map(|_| ())
        })?;
        Ok(process)
    }

    pub fn kill_istiod(&self) -> anyhow::Result<()> {
        let (process, _) = self.lock().istiod.take().context("istiod isn't running")?;
        process.kill();
        Ok(())
    }

    fn wait_until(&self, what: &str, process: &Process, ready: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let Err(error) = ready() else { return Ok(()) };
            ensure!(process.status().is_none(), "{what} ended:\n{}", process.tail());
            ensure!(
                Instant::now() < deadline,
                "{what} wasn't ready in {READY_WITHIN:?}: {error:#}\n{}",
                process.tail()
            );
            std::thread::park_timeout(Duration::from_millis(100));
        }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = (self.options.command)(program);
        // Go programs that live for minutes, on machines that others test on: a fifth of the CPU of a start is collecting garbage.
        command.env("GOGC", "400");
        command
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Processes> {
        self.processes.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The CA, the API server's certificate, and the key that signs service accounts' tokens. Returns the CA's PEM.
fn write_certificates(directory: &Path, address: IpAddr) -> anyhow::Result<String> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    ca.distinguished_name.push(rcgen::DnType::CommonName, "ca of the test cluster");
    let ca_pem = ca.self_signed(&ca_key)?.pem();
    let issuer = Issuer::new(ca, ca_key);

    let key = KeyPair::generate()?;
    let names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"].map(str::to_owned).to_vec();
    let mut server = CertificateParams::new(names)?;
    server.subject_alt_names.push(SanType::IpAddress(address));
    server.distinguished_name.push(rcgen::DnType::CommonName, "kube-apiserver");
    let server = server.signed_by(&key, &issuer)?;
    let write = |name: &str, text: String| std::fs::write(directory.join(name), text);
    write("ca.crt", ca_pem.clone())?;
    write("api.crt", server.pem())?;
    write("api.key", key.serialize_pem())?;
    let accounts = KeyPair::generate()?;
    write("accounts.key", accounts.serialize_pem())?;
    write("accounts.pub", accounts.public_key_pem())?;
    Ok(ca_pem)
}
