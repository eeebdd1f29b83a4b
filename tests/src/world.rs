//! A plane, the clouds around it, and VMs: everything real but the clouds.

use crate::cloud::Clouds;
use crate::installed::Installed;
use crate::mesh::Mesh;
use crate::until::until;
use crate::vm::{Evidence, Vm};
use anyhow::{Context, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use onboarding_testkit::cluster::Cluster;
use onboarding_testkit::netns::{Lab, Machine};
use onboarding_testkit::process::{self, Process};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// The plane's name in `demo/manifests/controlplane.yaml`.
pub const ENDPOINT: &str = "onboarding-endpoint.your-company.corp";
pub const PLANE: u8 = 2;
pub const CLOUD: u8 = 3;
pub const EXTERNAL: u8 = 50;
pub const ACCOUNT: &str = "123456789012";
pub const REGION: &str = "us-east-2";
const ADMIN: &str = "127.0.0.1:15080";

/// What a world is started with.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Flags of `onboarding-plane standalone` beside those that every world needs.
    pub plane_flags: Vec<String>,
    /// The data directory is a tmpfs of this size.
    pub data_size: Option<&'static str>,
    /// The plane is one of a cluster, the mesh Istio's, and VMs come in through its gateway.
    pub istio: bool,
    /// A cluster in which nothing of onboarding is installed yet: no plane, no manifests, the way in to come from the operator.
    pub installed: bool,
}

/// Machines and processes of one lab.
pub struct World {
    lab: Lab,
    setup: Setup,
    ca: Ca,
    pub(crate) clouds: Clouds,
    /// In which `onboarding-plane` runs.
    pub plane_machine: Machine,
    /// STS, and the company's OpenID Connect issuer.
    pub cloud: Machine,
    /// `example.org`.
    pub external: Machine,
    pub plane: Option<Process>,
    services: Vec<Process>,
    pair: Option<Pair>,
    /// Where [`Setup::istio`] asks for one.
    mesh: Option<Mesh>,
    /// Where [`Setup::installed`] asks for one.
    installed: Option<Installed>,
}

/// A VM of `ratings` on EC2 and one of `productpage` on premises, joined, that reach each other.
pub struct Pair {
    pub ratings: Vm,
    pub productpage: Vm,
}

impl World {
    /// Everything up, and the plane ready.
    pub fn start(lab: &Lab, setup: Setup) -> anyhow::Result<Self> {
        let plane_machine = lab.machine("plane", PLANE)?;
        let cloud = lab.machine("cloud", CLOUD)?;
        let external = lab.machine("external", EXTERNAL)?;
        let clouds = Clouds::new(&lab.directory().join("aws-certificates.pem"))?;
        let mut world = Self {
            lab: lab.clone(),
            setup,
            clouds,
            ca: Ca::new("Your Company Root CA")?,
            plane_machine,
            cloud,
            external,
            plane: None,
            services: Vec::new(),
            pair: None,
            mesh: None,
            installed: None,
        };
        world.write("company-ca.pem", &world.ca.certificate)?;
        if world.setup.installed {
            world.services = world.start_services(&world.ca)?;
            let hosts = vec![(world.cloud.address(), "mycompany.corp".to_owned())];
            let flags = world.cloud_flags().into_iter().chain(world.setup.plane_flags.iter().cloned());
            let installed = Installed::start(lab, hosts, flags.collect())?;
            world.plane_machine.add_host(installed.node().way_in(), ENDPOINT)?;
            world.installed = Some(installed);
            return Ok(world);
        }
        if world.setup.istio {
            let mesh = Mesh::start(lab, world.plane_machine.address())?;
            mesh.cluster.apply(include_str!("../istio/accounts.yaml"))?;
            world.mesh = Some(mesh);
        }
        world.prepare_manifests()?;
        world.services = world.start_services(&world.ca)?;
        std::fs::create_dir_all(world.data_dir())?;
        if let Some(size) = world.setup.data_size {
            let data = world.data_dir();
            let data = data.to_str().context("a path that isn't text")?;
            world
                .plane_machine
                .check("mount", ["-t", "tmpfs", "-o", &format!("size={size},mode=0700"), "tmpfs", data])?;
        }
        world.start_plane()?;
        Ok(world)
    }

    /// Manifests of the demo, and the Secret with the endpoint's certificate.
    fn prepare_manifests(&self) -> anyhow::Result<()> {
        let to = self.manifests_dir();
        std::fs::create_dir_all(&to)?;
        for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../demo/manifests"))? {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_str().context("a file's name is text")?;
            self.write_manifest(name, &std::fs::read_to_string(entry.path())?)?;
        }
        self.renew_endpoint_certificate()
    }

    /// A new certificate for the endpoint, put into the Secret as cert-manager does.
    pub fn renew_endpoint_certificate(&self) -> anyhow::Result<()> {
        let (certificate, key) = self.issue_endpoint_certificate()?;
        self.write_manifest(
            "endpoint-certificate.yaml",
            &format!(
                "apiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata:\n  name: onboarding-endpoint-tls\n  namespace: istio-system\ndata:\n  tls.crt: {}\n  tls.key: {}\n",
                STANDARD.encode(certificate),
                STANDARD.encode(key)
            ),
        )
    }

    /// Certificate and key, PEM, of the company's CA.
    pub fn issue_endpoint_certificate(&self) -> anyhow::Result<(String, String)> {
        self.ca.issue(&[ENDPOINT])
    }

    pub fn manifests_dir(&self) -> PathBuf {
        self.lab.directory().join("manifests")
    }
    pub fn data_dir(&self) -> PathBuf {
        self.lab.directory().join("data")
    }
    pub fn audit_log(&self) -> PathBuf {
        self.lab.directory().join("audit.log")
    }
    /// Of the CA that signed the endpoint's certificate and the issuer's.
    pub fn ca_file(&self) -> PathBuf {
        self.lab.directory().join("company-ca.pem")
    }
    pub fn ca_certificate(&self) -> &str {
        &self.ca.certificate
    }
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    fn write(&self, name: &str, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.lab.directory().join(name);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    }

    pub fn manifest(&self, name: &str) -> anyhow::Result<String> {
        Ok(std::fs::read_to_string(self.manifests_dir().join(name))?)
    }

    /// Written beside and renamed, as an editor does.
    pub fn write_manifest(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let temporary = self.manifests_dir().join(format!(".{name}.part"));
        std::fs::write(&temporary, text)?;
        std::fs::rename(temporary, self.manifests_dir().join(name))?;
        self.kubectl_with(&["apply"], name)
    }

    pub fn remove_manifest(&self, name: &str) -> anyhow::Result<()> {
        self.kubectl_with(&["delete"], name)?;
        Ok(std::fs::remove_file(self.manifests_dir().join(name))?)
    }

    /// With a cluster, what happens to a manifest happens to its objects there.
    fn kubectl_with(&self, verb: &[&str], name: &str) -> anyhow::Result<()> {
        let Some(cluster) = self.cluster() else { return Ok(()) };
        let file = self.manifests_dir().join(name);
        let file = file.to_str().context("a path that isn't text")?;
        cluster.kubectl([verb, &["-f", file]].concat()).map(drop)
    }

    /// The mesh of Istio around this world.
    pub fn mesh(&self) -> anyhow::Result<&Mesh> {
        self.mesh.as_ref().context("this world has no Istio")
    }

    /// The cluster in which onboarding is installed by its operator.
    pub fn installed(&self) -> anyhow::Result<&Installed> {
        self.installed.as_ref().context("nothing is installed in this world")
    }

    fn cluster(&self) -> Option<&Cluster> {
        let installed = self.installed.as_ref().map(|installed| &*installed.cluster);
        installed.or(self.mesh.as_ref().map(|mesh| &mesh.cluster))
    }

    /// Where agents knock: the plane itself, or the gateway in front of it.
    pub fn way_in(&self) -> Ipv4Addr {
        if let Some(installed) = &self.installed {
            return installed.node().way_in();
        }
        self.mesh.as_ref().map_or(self.plane_machine.address(), |mesh| mesh.gateway.address())
    }

    /// A file of the demo's manifests without its documents of this kind; give the text back to [`Self::write_manifest`] to restore.
    pub fn withdraw(&self, name: &str, kind: &str) -> anyhow::Result<String> {
        let whole = self.manifest(name)?;
        let kept: Vec<_> = whole
            .split("---\n")
            .filter(|document| !document.lines().any(|line| line == format!("kind: {kind}")))
            .collect();
        ensure!(kept.len() < whole.split("---\n").count(), "{name} has no {kind}");
        self.write_manifest(name, &kept.join("---\n"))?;
        Ok(whole)
    }

    /// Starts the plane, and waits until it is ready.
    pub fn start_plane(&mut self) -> anyhow::Result<()> {
        self.launch_plane()?;
        self.wait_ready(Duration::from_secs(20))
    }

    /// Starts the plane, without waiting.
    pub fn launch_plane(&mut self) -> anyhow::Result<()> {
        let audit_log = self.audit_log();
        let command = self.plane_command(&self.plane_machine, "onboarding-plane-0", &audit_log)?;
        let log = self.lab.directory().join("plane.log");
        self.plane = Some(Process::start("plane", command, Some(&log))?);
        Ok(())
    }

    /// Starts one more replica of a cluster's plane on a machine of its own; its log is `plane.log` there.
    pub fn launch_replica(&self, machine: &Machine, replica: &str) -> anyhow::Result<Process> {
        ensure!(self.mesh.is_some(), "a plane that stands alone has no replicas");
        let command = self.plane_command(machine, replica, &machine.directory().join("audit.log"))?;
        Process::start(replica, command, Some(&machine.directory().join("plane.log")))
    }

    fn plane_command(&self, machine: &Machine, replica: &str, audit_log: &Path) -> anyhow::Result<Command> {
        let mut command = machine.command(binary("onboarding-plane")?);
        match &self.mesh {
            None => {
                command.arg("standalone");
                command.arg("--manifests").arg(self.manifests_dir());
                command.arg("--data-dir").arg(self.data_dir());
            }
            Some(mesh) => {
                command.args(["kubernetes", "--replica", replica, "--kubeconfig"]);
                command.arg(mesh.plane_kubeconfig());
            }
        }
        command.args(["--listen", "0.0.0.0:15443", "--admin-listen", ADMIN]);
        command.args(self.cloud_flags());
        command.arg("--audit-log").arg(audit_log);
        command.args(&self.setup.plane_flags);
        Ok(command)
    }

    /// The plane's, for clouds that aren't the real ones.
    pub fn cloud_flags(&self) -> Vec<String> {
        let file = |path: PathBuf| path.display().to_string();
        [
            ("--aws-sts-endpoint", format!("http://{}:8081", self.cloud.address())),
            ("--aws-extra-certificates", file(self.lab.directory().join("aws-certificates.pem"))),
            ("--jwks-extra-roots", file(self.ca_file())),
        ]
        .map(|(flag, value)| format!("{flag}={value}"))
        .to_vec()
    }

    pub fn wait_ready(&self, within: Duration) -> anyhow::Result<()> {
        until("the plane is ready", within, || {
            let plane = self.plane.as_ref().context("the plane isn't started")?;
            if let Some(status) = plane.status() {
                // It will not come back; waiting on would only hide why.
                return Ok(Err(anyhow::anyhow!("the plane ended ({status}):\n{}", plane.tail())));
            }
            self.readiness().map(Ok)
        })?
    }

    /// What `/readyz` says, an error when it isn't 200.
    pub fn readiness(&self) -> anyhow::Result<()> {
        let answer = self.admin("/readyz")?;
        ensure!(answer.0 == 200, "readyz: {} {}", answer.0, answer.1.trim());
        Ok(())
    }

    /// Status and body of a path on the plane's admin address.
    pub fn admin(&self, path: &str) -> anyhow::Result<(u16, String)> {
        self.admin_of(&self.plane_machine, path)
    }

    /// The same of the replica on this machine.
    pub fn admin_of(&self, machine: &Machine, path: &str) -> anyhow::Result<(u16, String)> {
        http_status(machine, &format!("http://{ADMIN}{path}"))
    }

    /// The value of a metric, the sum over its labels; 0 where it isn't there yet.
    pub fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let (_, text) = self.admin("/metrics")?;
        let values = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            (series.split('{').next() == Some(name)).then(|| value.parse::<f64>().ok()).flatten()
        });
        Ok(values.sum())
    }

    pub fn plane(&self) -> anyhow::Result<&Process> {
        self.plane.as_ref().context("the plane isn't started")
    }

    /// Ends the plane with SIGKILL, now.
    pub fn kill_plane(&mut self) {
        if let Some(plane) = self.plane.take() {
            plane.kill();
        }
    }

    pub fn stop_plane(&mut self) -> anyhow::Result<()> {
        let plane = self.plane.take().context("the plane isn't started")?;
        let status = plane.terminate(Duration::from_secs(20))?;
        ensure!(status.success(), "the plane ended with {status}:\n{}", plane.tail());
        Ok(())
    }

    /// `onboardctl`, with the plane's admin socket where the verb takes one.
    pub fn onboardctl(&self, arguments: &[&str]) -> anyhow::Result<process::Ended> {
        let mut command = self.plane_machine.command(binary("onboardctl")?);
        command.args(arguments).env("ONBOARDING_DATA_DIR", self.data_dir());
        process::run(command, Duration::from_secs(20))
    }

    /// Every WorkloadAutoRegistration, as `onboardctl workloads -o json` lists them.
    pub fn registrations(&self) -> anyhow::Result<Vec<serde_json::Value>> {
        let text = match self.cluster() {
            None => {
                let ended = self.onboardctl(&["workloads", "-A", "-o", "json"])?;
                ensure!(ended.status.success(), "onboardctl workloads: {ended:?}");
                ended.stdout
            }
            Some(cluster) => cluster.kubectl(["get", "war", "-A", "-o", "json"])?,
        };
        let list: serde_json::Value = serde_json::from_str(&text).context("reading the list of registrations")?;
        let items = list.get("items").unwrap_or(&list).as_array().context("the list of registrations isn't one")?;
        Ok(items.clone())
    }

    /// Its war says `AgentConnected=True`.
    pub fn connected(&self, registration: &str) -> anyhow::Result<()> {
        let wars = self.registrations()?;
        let war = wars.iter().find(|war| war["metadata"]["name"] == registration);
        let war = war.with_context(|| format!("{registration} isn't registered"))?;
        let conditions = war["status"]["conditions"].as_array().context("it has no conditions")?;
        let connected = conditions.iter().any(|is| is["type"] == "AgentConnected" && is["status"] == "True");
        ensure!(connected, "{registration}: {}", war["status"]);
        Ok(())
    }

    /// A VM of this world, its clouds and its application up, its agent not started yet.
    pub fn vm(&self, name: &str, host: u8, group: &str, evidence: Evidence) -> anyhow::Result<Vm> {
        Vm::new(self, name, host, group, evidence)
    }

    /// The pair; who takes it gives it back with [`Self::keep`] as it was, or it is made anew for the next.
    pub fn pair(&mut self) -> anyhow::Result<Pair> {
        if let Some(pair) = self.pair.take() {
            return Ok(pair);
        }
        let mut ratings = self.vm("vm1", 11, "ratings", Evidence::ec2("i-1234567890abcdef0", "ratings-role"))?;
        let mut productpage = self.vm("vm2", 12, "productpage", Evidence::jwt("us-east-datacenter1-vm007"))?;
        ratings.start_agent()?;
        productpage.start_agent()?;
        for vm in [&ratings, &productpage] {
            vm.wait_live(Duration::from_secs(20))?;
        }
        let pair = Pair { ratings, productpage };
        pair.wait_reachable()?;
        Ok(pair)
    }

    pub fn keep(&mut self, pair: Pair) {
        self.pair = Some(pair);
    }

    /// No product has panicked: a scenario that passed in spite of one would hide it.
    pub fn no_panics(&self) -> anyhow::Result<()> {
        for log in self.logs() {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            let line = text.lines().find(|line| line.contains("panicked at"));
            ensure!(line.is_none(), "{}: {}", log.display(), line.unwrap_or_default());
        }
        Ok(())
    }

    /// Of every plane and every agent that there was.
    fn logs(&self) -> Vec<PathBuf> {
        let machines = std::fs::read_dir(self.lab.directory().join("machines")).into_iter().flatten().flatten();
        let of_machines = machines.flat_map(|machine| {
            ["agent.log", "plane.log", "onboarding-plane.log", "onboarding-operator.log", "onboarding-repository.log"]
                .map(|log| machine.path().join(log))
        });
        of_machines
            .filter(|log| log.exists())
            .chain(["plane.log", "node.log"].map(|log| self.lab.directory().join(log)))
            .collect()
    }

    /// For the message of a failed scenario: what everybody said last, VMs that are gone included.
    pub fn report(&self) -> String {
        let mut report = String::new();
        for log in self.logs() {
            let Ok(text) = std::fs::read_to_string(&log) else { continue };
            let lines: Vec<_> = text.lines().collect();
            let last = &lines[lines.len().saturating_sub(40)..];
            report.push_str(&format!("  last lines of {}:\n    {}\n", log.display(), last.join("\n    ")));
        }
        report
    }
}

impl Pair {
    /// Each gets an answer of the other.
    pub fn wait_reachable(&self) -> anyhow::Result<()> {
        for (from, to) in [(&self.productpage, &self.ratings), (&self.ratings, &self.productpage)] {
            until(&format!("{} reaches {}", from.name(), to.name()), Duration::from_secs(20), || {
                from.call(&to.service()).map(drop)
            })?;
        }
        Ok(())
    }
}

/// Status and body, as a machine sees them; 3 seconds at most.
pub fn http_status(machine: &Machine, url: &str) -> anyhow::Result<(u16, String)> {
    let text = machine.check("curl", ["-sS", "-m", "3", "-w", "\n%{http_code}", url])?;
    let (body, status) = text.rsplit_once('\n').context("curl said no status")?;
    Ok((status.trim().parse()?, body.to_owned()))
}

/// A certificate authority of a company, for names of its own.
pub struct Ca {
    /// PEM.
    pub certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub fn new(name: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key)?.pem();
        Ok(Self { certificate, issuer: Issuer::new(params, key) })
    }

    /// Certificate and key for a server, PEM.
    pub fn issue(&self, names: &[&str]) -> anyhow::Result<(String, String)> {
        let key = KeyPair::generate()?;
        let names = names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let certificate = CertificateParams::new(names)?.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

/// A program of this workspace: beside the one that runs, where cargo puts them all.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().context("the program's folder")?;
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let path = folder.join(name);
    ensure!(path.exists(), "{} isn't built; run `cargo build --workspace --bins`", path.display());
    Ok(path)
}

/// The Envoy that `dev/envoy` finds or fetches.
pub fn envoy() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("ENVOY") {
        return Ok(path.into());
    }
    let script = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../dev/envoy"));
    let path = process::output(Command::new(script), Duration::from_secs(120))?;
    Ok(path.trim().into())
}
