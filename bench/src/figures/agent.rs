//! The agent's footprint: the real agent and a real Envoy beside a real plane, on loopback; and pilot-agent's in a real mesh of Istio.

use super::Bench;
use crate::istio::Istio;
use crate::machine;
use crate::plane::{GROUP, HOST, NAMESPACE, Plane, UID, World};
use crate::table::Figure;
use anyhow::{Context, ensure};
use jiff::Timestamp;
use jsonwebtoken::Algorithm;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use onboarding_testkit::port;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const LIVE_WITHIN: Duration = Duration::from_secs(30);
const GONE_WITHIN: Duration = Duration::from_secs(30);
/// After it went live: certificate, reports and what was used once are behind it. After a change of the manifests: the mesh has it.
const SETTLES_IN: Duration = Duration::from_secs(5);
const MIB: f64 = 1024.0 * 1024.0;
/// The ingress of the one workload, on loopback.
const BIND: &str = "127.0.0.3";
const PILOT: &str = "pilot-agent";

pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let started = Instant::now();
    let agent = binary(bench)?;
    let envoy = PathBuf::from(std::env::var_os("ENVOY").context("ENVOY has to say where Envoy is: dev/bench does")?);
    let size = std::fs::metadata(&agent)?.len() as f64 / MIB;
    bench.say(started, &format!("{}: {size:.2} MiB", agent.display()));

    let world = World::start().await?;
    let plane = Plane::start(bench, &world).await?;
    let on_loopback = world.manifests().replace("ingress:\n  - {", &format!("ingress:\n  - {{bind: {BIND}, "));
    ensure!(on_loopback.contains(BIND), "the world's Sidecar isn't written as expected");
    plane.write_manifest("world.yaml", &on_loopback)?;
    // The first agent is not to wait for the world after the one that this makes.
    tokio::time::sleep(SETTLES_IN).await;
    let (mut joined, mut restarted, mut idle) = (Vec::new(), Vec::new(), Vec::new());
    let (mut alone, mut version) = (Vec::new(), Vec::new());
    for turn in 0..bench.repeat {
        let host = Host::new(bench, &world, &plane, &agent, &envoy, turn)?;
        if turn == 0 {
            // Read from the disk, which is no part of any of them.
            host.envoy_alone().await?;
        }
        alone.push(host.envoy_alone().await?);
        version.push(envoy_version(&envoy)?);
        let first = host.start().await?;
        joined.push(first.live_after);
        first.stop().await?;
        // What it holds starts the sidecar; the plane is asked meanwhile.
        let again = host.start().await?;
        restarted.push(again.live_after);
        idle.push(again.idle(bench).await?);
        again.stop().await?;
        bench.say(started, &format!("agent {}: LIVE {:.0} ms after its start", turn + 1, joined[turn]));
    }
    drop(plane);
    let peer = PilotAgent::measure(bench, started, &envoy).await?;
    let less = |live: &[f64]| live.iter().zip(&alone).map(|(live, alone)| live - alone).collect::<Vec<_>>();
    let each = |idle: &[Idle], what: fn(&Idle) -> f64| idle.iter().map(what).collect::<Vec<_>>();
    let beside = |name: &str, unit, what: fn(&Idle) -> f64| {
        Figure::new(name, unit, each(&idle, what), (PILOT, each(&peer.idle, what)))
    };
    Ok(vec![
        Figure::exact("agent: size of the binary", "MiB", size, (PILOT, peer.size)).goal("8 MB"),
        beside("agent: resident memory", "MiB", |idle| idle.resident).goal("8 MiB"),
        beside("agent: of that, not backed by its binary's file", "MiB", |idle| idle.anonymous),
        beside("agent: CPU in an idle hour", "s", |idle| idle.cpu),
        beside("agent: wakeups", "per s", |idle| idle.wakeups),
        Figure::new(
            "agent: from nothing to LIVE, less Envoy's own start",
            "ms",
            less(&joined),
            ("envoy --version, which a registration carries", version),
        )
        .against("pilot-agent, which has its token already, less the same", less(&peer.live))
        .goal("50 ms"),
        Figure::new(
            "agent: from what it holds to LIVE, less Envoy's own start",
            "ms",
            less(&restarted),
            ("Envoy's own start, with nothing to configure", alone),
        )
        .goal("50 ms"),
    ])
}

/// What stands beside the agent's.
struct PilotAgent {
    size: f64,
    live: Vec<f64>,
    idle: Vec<Idle>,
}

impl PilotAgent {
    async fn measure(bench: &Bench, started: Instant, envoy: &Path) -> anyhow::Result<Self> {
        bench.say(started, "starting an API server and istiod for pilot-agent");
        let istio = Istio::start()?;
        let size = std::fs::metadata(istio.pilot_agent())?.len() as f64 / MIB;
        let (mut live, mut idle) = (Vec::new(), Vec::new());
        for turn in 0..bench.repeat {
            // Its certificate is made anew, as the agent's is.
            let directory = tempfile::Builder::new().prefix("onboarding-bench-").tempdir_in(&bench.directory)?;
            let (command, admin) = istio.sidecar(directory.path(), envoy)?;
            let running = Running::start(command, admin, &directory.path().join("log")).await?;
            live.push(running.live_after);
            idle.push(running.idle(bench).await?);
            running.stop().await?;
            bench.say(started, &format!("pilot-agent {}: LIVE {:.0} ms after its start", turn + 1, live[turn]));
        }
        Ok(Self { size, live, idle })
    }
}

/// In milliseconds.
fn envoy_version(envoy: &Path) -> anyhow::Result<f64> {
    let began = Instant::now();
    let output =
        Command::new(envoy).arg("--version").output().with_context(|| format!("starting {}", envoy.display()))?;
    ensure!(output.status.success(), "{} --version: {}", envoy.display(), output.status);
    Ok(began.elapsed().as_secs_f64() * 1e3)
}

/// As it is shipped, where `cargo build --profile agent` has been; else as it is built in release.
fn binary(bench: &Bench) -> anyhow::Result<PathBuf> {
    let shipped = bench.binaries.parent().map(|target| target.join("agent/onboarding-agent"));
    let mut all = shipped.into_iter().chain([bench.binaries.join("onboarding-agent")]);
    all.find(|path| path.is_file())
        .with_context(|| format!("there is no onboarding-agent in {}: dev/bench builds it", bench.binaries.display()))
}

/// One VM: its files, and the ports of its Envoy.
struct Host {
    directory: tempfile::TempDir,
    agent: PathBuf,
    envoy: PathBuf,
    admin: SocketAddr,
}

struct Running {
    child: Child,
    /// From its start, in milliseconds.
    live_after: f64,
}

/// What one that runs needs while nothing happens.
struct Idle {
    /// In MiB.
    resident: f64,
    anonymous: f64,
    /// In seconds for each hour.
    cpu: f64,
    /// For each second.
    wakeups: f64,
}

impl Host {
    fn new(
        bench: &Bench,
        world: &World,
        plane: &Plane,
        agent: &Path,
        envoy: &Path,
        number: usize,
    ) -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("onboarding-bench-").tempdir_in(&bench.directory)?;
        let address = plane.target().addresses.first().copied().context("the plane has no address")?;
        let at = |name: &str| directory.path().join(name);
        std::fs::write(
            at("onboarding.config.yaml"),
            format!(
                "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: OnboardingConfiguration\nonboardingEndpoint:\n  host: {}\n  port: {}\n  transportSecurity: {{tls: {{sni: {HOST}}}}}\nworkloadGroup: {{namespace: {NAMESPACE}, name: {GROUP}}}\n",
                address.ip(),
                address.port()
            ),
        )?;
        let plugin = |name: &str, answer: &str| -> anyhow::Result<String> {
            let path = at(name);
            std::fs::write(&path, format!("#!/bin/sh\ncat >/dev/null\ncat <<'END'\n{answer}\nEND\n"))?;
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
            Ok(format!("plugin: {{name: {name}, path: {}}}", path.display()))
        };
        let now = Timestamp::now();
        let expires_at = Timestamp::from_second(now.as_second() + 3600)?;
        let claims = serde_json::json!({"sub": format!("bench-{number}"), "aud": UID, "iat": now.as_second(), "exp": expires_at.as_second(), "custom_attributes": {"region": "us-east"}});
        let token = world.issuer.mint(Algorithm::ES256, claims)?;
        let credential = serde_json::json!({"credential": {"@type": "type.googleapis.com/example.JwtCredential", "token": token}, "expiresAt": expires_at.to_string()});
        let info =
            serde_json::json!({"host": {"addresses": [{"ip": format!("10.0.9.{}", number + 1), "type": "VPC"}]}});
        let (credential, info) =
            (plugin("credential", &credential.to_string())?, plugin("hostinfo", &info.to_string())?);
        std::fs::write(
            at("agent.config.yaml"),
            format!(
                "apiVersion: config.agent.onboarding.tetrate.io/v1alpha1\nkind: AgentConfiguration\nhost:\n  custom:\n    credential:\n    - {credential}\n    hostinfo: {{{info}}}\nsidecar:\n  stdout: {{filename: {log}}}\n  stderr: {{filename: {log}}}\n",
                log = at("envoy.log").display()
            ),
        )?;
        // As on a VM: our CA is one of all those that the system trusts.
        let mut roots = std::fs::read_to_string("/etc/ssl/certs/ca-certificates.crt").unwrap_or_default();
        roots.push_str(&plane.target().ca);
        std::fs::write(at("roots.pem"), roots)?;
        // One that nobody listens on now.
        let admin = port::free_at(Ipv4Addr::LOCALHOST)?;
        Ok(Self { directory, agent: agent.to_owned(), envoy: envoy.to_owned(), admin })
    }

    /// Returns when Envoy says `LIVE`.
    async fn start(&self) -> anyhow::Result<Running> {
        let at = |name: &str| self.directory.path().join(name);
        let mut command = Command::new(&self.agent);
        command
            .arg("--onboarding-config")
            .arg(at("onboarding.config.yaml"))
            .arg("--agent-config")
            .arg(at("agent.config.yaml"))
            .arg("--state-dir")
            .arg(at("state"))
            .arg("--envoy-binary")
            .arg(&self.envoy)
            .args(["--envoy-admin", &self.admin.to_string()])
            .env("SSL_CERT_FILE", at("roots.pem"))
            .env_remove("SSL_CERT_DIR");
        Running::start(command, self.admin, &at("agent.log")).await
    }

    /// Envoy with an admin address and nothing else, in milliseconds until it says `LIVE`.
    async fn envoy_alone(&self) -> anyhow::Result<f64> {
        let file = self.directory.path().join("alone.json");
        let address =
            serde_json::json!({"socket_address": {"address": self.admin.ip(), "port_value": self.admin.port()}});
        std::fs::write(&file, serde_json::json!({"admin": {"address": address}}).to_string())?;
        let began = Instant::now();
        let mut child = Command::new(&self.envoy)
            .arg("--config-path")
            .arg(&file)
            .args(["--use-dynamic-base-id", "--log-level", "error"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {}", self.envoy.display()))?;
        let live = until_live(self.admin, began).await;
        child.kill()?;
        child.wait()?;
        live
    }
}

impl Running {
    /// Returns when the Envoy that it starts says `LIVE` at this address.
    async fn start(mut command: Command, admin: SocketAddr, log: &Path) -> anyhow::Result<Self> {
        let output = std::fs::File::options().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let began = Instant::now();
        let child = command.spawn().with_context(|| format!("starting {command:?}"))?;
        let mut running = Self { child, live_after: 0.0 };
        running.live_after = until_live(admin, began).await.inspect_err(|_| {
            println!("its log:\n{}", std::fs::read_to_string(log).unwrap_or_default());
        })?;
        Ok(running)
    }

    async fn idle(&self, bench: &Bench) -> anyhow::Result<Idle> {
        tokio::time::sleep(SETTLES_IN).await;
        let (cpu, waits, began) = (machine::cpu_time(self.pid())?, self.waits()?, Instant::now());
        tokio::time::sleep(Duration::from_secs(bench.count(2, 20) as u64)).await;
        let (spent, waited) = (machine::cpu_time(self.pid())? - cpu, self.waits()? - waits);
        let (seconds, memory) = (began.elapsed().as_secs_f64(), machine::memory(self.pid())?);
        Ok(Idle {
            resident: memory.resident as f64 / MIB,
            anonymous: memory.anonymous as f64 / MIB,
            cpu: spent.as_secs_f64() / seconds * 3600.0,
            wakeups: waited as f64 / seconds,
        })
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// How often its threads waited for something.
    fn waits(&self) -> anyhow::Result<u64> {
        let mut waits = 0;
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let status = std::fs::read_to_string(thread?.path().join("status"))?;
            let switches = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            waits += switches.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or_default();
        }
        Ok(waits)
    }

    /// As a VM that loses its power: agent and Envoy at once.
    async fn stop(mut self) -> anyhow::Result<()> {
        let envoys = self.children()?;
        kill(Pid::from_raw(self.pid()), Signal::SIGKILL)?;
        self.child.wait()?;
        for envoy in &envoys {
            // It may have ended with its parent.
            let _ = kill(Pid::from_raw(*envoy), Signal::SIGKILL);
        }
        let began = Instant::now();
        while envoys.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists()) && began.elapsed() < GONE_WITHIN {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    fn children(&self) -> anyhow::Result<Vec<i32>> {
        let mut children = Vec::new();
        for thread in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let text = std::fs::read_to_string(thread?.path().join("children"))?;
            children.extend(text.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
        }
        Ok(children)
    }
}

async fn until_live(admin: SocketAddr, began: Instant) -> anyhow::Result<f64> {
    loop {
        if live(admin).await.unwrap_or(false) {
            return Ok(began.elapsed().as_secs_f64() * 1e3);
        }
        ensure!(began.elapsed() < LIVE_WITHIN, "Envoy at {admin} isn't live after {LIVE_WITHIN:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn live(admin: SocketAddr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(admin).await?;
    stream.write_all(b"GET /ready HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    tokio::time::timeout(Duration::from_secs(2), stream.read_to_string(&mut answer)).await??;
    Ok(answer.starts_with("HTTP/1.1 200") && answer.contains("LIVE"))
}
