//! A VM: a machine with an application, an agent with its files, and what proves the host's identity.

use crate::until::until;
use crate::world::{ACCOUNT, ENDPOINT, REGION, World, binary, envoy, http_status};
use anyhow::{Context, ensure};
use onboarding_testkit::application::{Answer, Outcome};
use onboarding_testkit::ecs;
use onboarding_testkit::netns::Machine;
use onboarding_testkit::process::{self, Process};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Where a metadata server of AWS listens.
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// Where ECS has the metadata of a task and its role's credentials.
const TASK_METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 170, 2);

/// What proves who a host is.
#[derive(Debug, Clone)]
pub enum Evidence {
    /// An EC2 instance of account 123456789012 in us-east-2.
    Ec2 { instance: String, zone: String, role: String },
    /// A task of ECS of the same account; its agent finds that out by its environment.
    Ecs { task: String, cluster: String, role: String },
    /// A host on premises, with a token of the company's issuer.
    Jwt { subject: String, region: String, role: String },
}

impl Evidence {
    /// In the zone that the demo's policy admits.
    pub fn ec2(instance: &str, role: &str) -> Self {
        Self::Ec2 { instance: instance.to_owned(), zone: format!("{REGION}b"), role: role.to_owned() }
    }
    /// In cluster `bookinfo`, in the same zone.
    pub fn ecs(task: &str, role: &str) -> Self {
        Self::Ecs { task: task.to_owned(), cluster: "bookinfo".to_owned(), role: role.to_owned() }
    }
    /// A frontend of us-east, which the demo's policy admits.
    pub fn jwt(subject: &str) -> Self {
        Self::Jwt { subject: subject.to_owned(), region: "us-east".to_owned(), role: "app-productpage".to_owned() }
    }
    /// The registration's name in group `group`.
    pub fn registration(&self, group: &str) -> String {
        match self {
            Self::Ec2 { instance, zone, .. } => format!("{group}-aws-aws-{ACCOUNT}-{zone}-ec2-{instance}"),
            Self::Ecs { task, cluster, .. } => format!("{group}-aws-aws-{ACCOUNT}-{REGION}b-ecs-{cluster}-{task}"),
            Self::Jwt { subject, .. } => format!("{group}-jwt-my-corp--{subject}"),
        }
    }
}

/// A VM of a [`World`].
pub struct Vm {
    pub machine: Machine,
    pub group: String,
    pub evidence: Evidence,
    pub agent: Option<Process>,
    pub application: Option<Process>,
    services: Vec<Process>,
    root_certificates: String,
    /// With its template of Envoy's bootstrap.
    pilot_agent: Option<(PathBuf, PathBuf)>,
}

impl Vm {
    pub(crate) fn new(world: &World, name: &str, host: u8, group: &str, evidence: Evidence) -> anyhow::Result<Self> {
        let machine = world.lab().machine(name, host)?;
        machine.add_host(world.way_in(), ENDPOINT)?;
        machine.add_host(world.cloud.address(), "mycompany.corp")?;
        let mut vm = Self {
            machine,
            group: group.to_owned(),
            evidence,
            agent: None,
            application: None,
            services: Vec::new(),
            root_certificates: world.ca_certificate().to_owned(),
            pilot_agent: None,
        };
        vm.start_application()?;
        let host = match vm.evidence.clone() {
            Evidence::Ec2 { instance, zone, role } => {
                vm.machine.add_loopback_address(METADATA)?;
                let server = world.metadata_server(&vm.machine, &instance, &zone, &role)?;
                vm.services.push(server);
                "host:\n  aws:\n    ec2: {}\n".to_owned()
            }
            Evidence::Ecs { task, cluster, role } => {
                vm.machine.add_loopback_address(TASK_METADATA)?;
                vm.services.push(world.task_server(&vm.machine, &task, &cluster, &role)?);
                "host:\n  auto: {}\n".to_owned()
            }
            Evidence::Jwt { subject, region, role } => {
                let plugin = world.credential_plugin(&vm.machine, &subject, &region, &role)?;
                format!(
                    "host:\n  custom:\n    credential:\n    - plugin:\n        name: my-jwt\n        path: {}\n    hostinfo:\n      basic: {{}}\n",
                    plugin.display()
                )
            }
        };
        vm.write_onboarding_configuration("")?;
        vm.write_file(
            "agent.config.yaml",
            &format!(
                "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: AgentConfiguration\n{host}sidecar:\n  envoy: {{}}\n"
            ),
        )?;
        Ok(vm)
    }

    /// As where Istio's package is installed: pilot-agent runs Envoy. `settings` are those of `sidecar.istio`: `{revision: canary}`.
    pub fn use_pilot_agent(&mut self, world: &World, settings: &str) -> anyhow::Result<()> {
        let cluster = &world.mesh()?.cluster;
        self.pilot_agent = Some((cluster.binary("pilot-agent"), cluster.binary("envoy_bootstrap_tmpl.json")));
        let with_envoy = std::fs::read_to_string(self.file("agent.config.yaml"))?;
        let with_istio = with_envoy.replace("  envoy: {}\n", &format!("  istio: {settings}\n"));
        ensure!(with_istio != with_envoy, "{with_envoy}");
        self.write_file("agent.config.yaml", &with_istio)
    }

    /// `onboarding.config.yaml`, with lines added (`workload: ...`, `settings: ...`).
    pub fn write_onboarding_configuration(&self, added: &str) -> anyhow::Result<()> {
        let group = &self.group;
        self.write_file(
            "onboarding.config.yaml",
            &format!(
                "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: OnboardingConfiguration\nonboardingEndpoint:\n  host: {ENDPOINT}\nworkloadGroup:\n  namespace: bookinfo\n  name: {group}\n{added}"
            ),
        )
    }

    fn write_file(&self, name: &str, text: &str) -> anyhow::Result<()> {
        Ok(std::fs::write(self.file(name), text)?)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.machine.directory().join(name)
    }
    pub fn state_dir(&self) -> PathBuf {
        self.file("state")
    }
    pub fn name(&self) -> &str {
        self.machine.name()
    }
    /// How others call what runs here: `ratings.bookinfo:8080`.
    pub fn service(&self) -> String {
        format!("{}.bookinfo:8080", self.group)
    }
    /// Of its war.
    pub fn registration(&self) -> String {
        self.evidence.registration(&self.group)
    }

    pub fn start_application(&mut self) -> anyhow::Result<()> {
        let name = format!("{} on {}", self.group, self.name());
        let mut command = self.machine.command(binary("onboarding-testkit")?);
        command.args(["application", "--name", &name]);
        let application = Process::start(&name, command, None)?;
        application.wait_for_line(Duration::from_secs(10), |line| line.starts_with("listening on"))?;
        self.application = Some(application);
        Ok(())
    }

    /// What the application says to its readiness probe from now on.
    pub fn set_application_ready(&self, ready: bool) -> anyhow::Result<()> {
        self.curl(&["-f", "-d", if ready { "true" } else { "false" }, "http://127.0.0.1:8080/ready"]).map(drop)
    }

    /// The agent's command line, for a verb of it; none is the daemon.
    pub fn agent_command(&self, verb: &[&str]) -> anyhow::Result<std::process::Command> {
        let mut command = self.machine.command(binary("onboarding-agent")?);
        command.args(verb);
        command.arg("--onboarding-config").arg(self.file("onboarding.config.yaml"));
        command.arg("--agent-config").arg(self.file("agent.config.yaml"));
        command.arg("--state-dir").arg(self.state_dir());
        command.arg("--envoy-binary").arg(envoy()?);
        if let Some((binary, template)) = &self.pilot_agent {
            command.arg("--pilot-agent-binary").arg(binary).arg("--bootstrap-template").arg(template);
        }
        command.envs(self.environment());
        Ok(command)
    }

    /// What the agent is told by its environment: the CA, and by ECS where its endpoints are.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let mut all = vec![("ONBOARDING_AGENT_ROOT_CERTS", self.root_certificates.clone())];
        if matches!(self.evidence, Evidence::Ecs { .. }) {
            let metadata = format!("http://{TASK_METADATA}{}", ecs::METADATA_PATH);
            all.push(("ECS_CONTAINER_METADATA_URI_V4", metadata));
            all.push(("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", ecs::CREDENTIALS_PATH.to_owned()));
        }
        all
    }

    pub fn start_agent(&mut self) -> anyhow::Result<()> {
        ensure!(self.agent.is_none(), "{}: the agent is running", self.name());
        let log = self.file("agent.log");
        self.agent = Some(Process::start(&format!("{}: agent", self.name()), self.agent_command(&[])?, Some(&log))?);
        Ok(())
    }

    pub fn agent(&self) -> anyhow::Result<&Process> {
        self.agent.as_ref().with_context(|| format!("{}: no agent is running", self.name()))
    }

    /// Starts the agent and waits until the sidecar is up; gives how long that took.
    pub fn join(&mut self) -> anyhow::Result<Duration> {
        let started = Instant::now();
        self.start_agent()?;
        self.wait_live(Duration::from_secs(20))?;
        Ok(started.elapsed())
    }

    /// Waits until the sidecar answers `LIVE`, as the documentation tells people to check.
    pub fn wait_live(&self, within: Duration) -> anyhow::Result<()> {
        until(&format!("the sidecar of {} is live", self.name()), within, || {
            if let Some(status) = self.agent.as_ref().and_then(Process::status) {
                return Ok(Err(anyhow::anyhow!("the agent ended ({status})")));
            }
            let (status, body) = http_status(&self.machine, "http://localhost:15000/ready")?;
            ensure!(status == 200 && body.trim() == "LIVE", "{status} {body}");
            Ok(Ok(()))
        })
        .and_then(|live| live)
    }

    /// SIGTERM, and waits for the end.
    pub fn stop_agent(&mut self) -> anyhow::Result<Duration> {
        let started = Instant::now();
        let agent = self.agent.take().context("no agent is running")?;
        let status = agent.terminate(Duration::from_secs(60))?;
        ensure!(status.success(), "{}: the agent ended with {status}:\n{}", self.name(), agent.tail());
        Ok(started.elapsed())
    }

    /// Pulls the network cable, or puts it back.
    pub fn set_link(&self, up: bool) -> anyhow::Result<()> {
        self.machine.set_link(up)
    }

    /// Everything in the VM but what belongs to the world around it ends at once; then application and metadata are there again.
    pub fn power_cycle(&mut self, world: &World) -> anyhow::Result<()> {
        self.machine.power_off()?;
        (self.agent, self.application) = (None, None);
        self.services.clear();
        match &self.evidence {
            Evidence::Ec2 { instance, zone, role } => {
                self.services.push(world.metadata_server(&self.machine, instance, zone, role)?);
            }
            Evidence::Ecs { task, cluster, role } => {
                self.services.push(world.task_server(&self.machine, task, cluster, role)?);
            }
            Evidence::Jwt { .. } => {}
        }
        self.start_application()
    }

    /// `curl` in this VM, with a bound; fails when curl does.
    pub fn curl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.machine.check("curl", [&["-sS", "-m", "5"], arguments].concat())
    }

    /// What an application answers to `url`; an error when the answer isn't a 200 or not an application's.
    pub fn get(&self, url: &str) -> anyhow::Result<Answer> {
        self.get_with(url, &[])
    }

    /// The same with more arguments for curl.
    pub fn get_with(&self, url: &str, arguments: &[&str]) -> anyhow::Result<Answer> {
        let text = self.curl(&[&["-w", "\n%{http_code}"], arguments, &[url]].concat())?;
        let (body, status) = text.rsplit_once('\n').context("curl said no status")?;
        ensure!(status == "200", "{url} from {}: {status} {body}", self.name());
        serde_json::from_str(body).with_context(|| format!("{url} from {}: {body}", self.name()))
    }

    /// Calls through the egress listener, by `host` header.
    pub fn call(&self, host: &str) -> anyhow::Result<Answer> {
        self.get_with("http://127.0.0.2:8080/", &["-H", &format!("Host: {host}")])
    }

    /// Such a call is refused by the sidecar, with 503, because it knows nobody to send it to.
    pub fn call_unanswered(&self, host: &str) -> anyhow::Result<()> {
        let text = self.curl(&["-w", "\n%{http_code}", "-H", &format!("Host: {host}"), "http://127.0.0.2:8080/"])?;
        ensure!(text.ends_with("\n503"), "{host} from {}: {text}", self.name());
        Ok(())
    }

    /// Process ids of this VM's programs whose command line begins with a path that ends in `name`.
    pub fn pids(&self, name: &str) -> anyhow::Result<Vec<i32>> {
        let namespace = std::fs::read_link(format!("/proc/{}/ns/net", self.machine.holder_pid()))?;
        let of_here = std::fs::read_dir("/proc")?.flatten().filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            (std::fs::read_link(entry.path().join("ns/net")).ok()? == namespace).then_some(())?;
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let program = line.split(|byte| *byte == 0).next()?;
            String::from_utf8_lossy(program).ends_with(name).then_some(pid)
        });
        Ok(of_here.collect())
    }

    /// Somebody in this VM who goes on calling `host` through the egress listener.
    pub fn load(&self, host: &str, path: &str, per_second: u32) -> anyhow::Result<Load> {
        until(&format!("{} reaches {host}", self.name()), Duration::from_secs(40), || self.call(host))?;
        let mut command = self.machine.command(binary("onboarding-testkit")?);
        command.args(["client", "--host", host, "--path", path, "--per-second", &per_second.to_string()]);
        command.stdin(std::process::Stdio::piped());
        Ok(Load(Process::start(&format!("{}: client", self.name()), command, None)?))
    }

    /// `onboarding-agent VERB` to its end.
    pub fn agent_verb(&self, verb: &[&str]) -> anyhow::Result<process::Ended> {
        process::run(self.agent_command(verb)?, Duration::from_secs(20))
    }

    pub fn report(&self) -> String {
        match &self.agent {
            Some(agent) => format!("last lines of {}:\n{}", agent.name(), agent.tail()),
            None => {
                let log = std::fs::read_to_string(self.file("agent.log")).unwrap_or_default();
                let lines: Vec<_> = log.lines().collect();
                format!(
                    "last lines of {}'s agent:\n{}",
                    self.name(),
                    lines[lines.len().saturating_sub(40)..].join("\n")
                )
            }
        }
    }
}

/// A client that calls until it is told to stop.
pub struct Load(Process);

impl Load {
    pub fn stop(self) -> anyhow::Result<Outcome> {
        drop(self.0.take_stdin());
        let line = self.0.wait_for_line(Duration::from_secs(15), |line| line.starts_with('{'))?;
        Ok(serde_json::from_str(&line)?)
    }
}
