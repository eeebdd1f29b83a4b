//! The sidecar of an Istio mesh: Envoy with this agent in the place of pilot-agent, or pilot-agent with the Envoy that it starts.
//!
//! istiod configures it. What is left to do here is its bootstrap or its files, its certificate (`istiod`, or pilot-agent's own affair),
//! and its life. A boot configuration that changes nothing that the process was started with restarts nothing.

mod bootstrap;
mod layout;
#[cfg(test)]
mod tests;

use super::admin::Admin;
use super::istiod::{Credentials, Renewal, Standing, union};
use super::process::{Launch, Process};
use super::supervisor::{Command, drain, ended, queue};
use super::{Event, Identity, Options, files, sds};
use crate::boot::{self, HeldBoot, Istio};
use crate::store::StoredIdentity;
use anyhow::Context;
use jiff::Timestamp;
use onboarding_runtime::backoff::Backoff;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// How the sidecar of an Istio mesh is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IstioWay {
    /// Envoy alone; this agent gets its certificate.
    Envoy,
    PilotAgent(PilotAgent),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PilotAgent {
    /// `/usr/local/bin/pilot-agent`.
    pub binary: PathBuf,
    /// `/var/lib/istio/envoy/envoy_bootstrap_tmpl.json`.
    pub template: PathBuf,
}

/// Where the package of a revision of Istio may have it.
pub fn pilot_agent_of(revision: &str) -> PathBuf {
    PathBuf::from(format!("/usr/local/bin/pilot-agent-{revision}"))
}

pub(super) struct Supervisor {
    options: Options,
    care: Care,
    instance: String,
    admin: Admin,
    commands: mpsc::Receiver<Command>,
    leaving: CancellationToken,
    events: mpsc::Sender<Event>,
    process: Option<Process>,
    started: Instant,
    /// When the next process is due, where none runs.
    start_at: Instant,
    restarts: Backoff,
    look_at: Instant,
    version: String,
    /// Placed.
    istio: Istio,
    live: bool,
    said: Said,
    draining: bool,
}

/// Who cares for the certificate.
enum Care {
    Ours {
        renewal: Renewal,
        standing: watch::Receiver<Standing>,
        /// Once there is something to serve.
        sds: Option<sds::Server>,
    },
    PilotAgents {
        pilot_agent: PilotAgent,
        /// When the certificate that was reported was written.
        written: Option<SystemTime>,
    },
}

/// What was reported, so that only changes are.
#[derive(Default)]
struct Said {
    condition: Option<Result<(), String>>,
    accepted: Option<String>,
    /// Failures of `/ready` in a row.
    misses: u32,
}

enum Happened {
    Command(Option<Command>),
    Ended(std::io::Result<ExitStatus>),
    Certificate,
    Start,
    Look,
}

/// A start is looked at so often,
const LOOK_FIRST: Duration = Duration::from_millis(20);
/// for so long, before it is said not to be live: istiod has to answer first.
const LIVE_WITHIN: Duration = Duration::from_secs(15);
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A process that ran for so long was a good start.
const RAN_WELL: Duration = Duration::from_secs(60);
/// Of a restart for another bootstrap.
const DRAIN_WITHIN: Duration = Duration::from_secs(5);
const STOP_WITHIN: Duration = Duration::from_secs(3);
const NEVER: Duration = Duration::from_secs(24 * 3600);

impl Supervisor {
    /// Starts what can be started: pilot-agent, or Envoy where its certificate is there already.
    pub(super) fn start(
        options: Options,
        boot: &HeldBoot,
        commands: mpsc::Receiver<Command>,
        leaving: CancellationToken,
        events: mpsc::Sender<Event>,
    ) -> anyhow::Result<Self> {
        let boot::Sidecar::Istio(istio) = &boot.sidecar else { anyhow::bail!("not a sidecar of an Istio mesh") };
        let care = match &options.istio {
            IstioWay::PilotAgent(pilot_agent) => Care::PilotAgents { pilot_agent: pilot_agent.clone(), written: None },
            IstioWay::Envoy => {
                let renewal = Renewal::start(Credentials::of(istio, &boot.spiffe_id)?, options.identity.clone());
                let standing = renewal.standing.clone();
                Care::Ours { renewal, standing, sds: None }
            }
        };
        let now = Instant::now();
        let mut supervisor = Self {
            instance: format!("{:032x}", rand::random::<u128>()),
            admin: Admin::new(options.admin),
            options,
            care,
            commands,
            leaving,
            events: queue(events),
            process: None,
            started: now,
            start_at: now,
            restarts: Backoff::new(Duration::from_millis(100), Duration::from_secs(30)),
            look_at: now + NEVER,
            version: boot.version.clone(),
            istio: (**istio).clone(),
            live: false,
            said: Said::default(),
            draining: false,
        };
        if supervisor.has_certificate() {
            supervisor.spawn()?;
        }
        Ok(supervisor)
    }

    /// Until it is told to stop, or the handle is gone.
    pub(super) async fn run(mut self) {
        loop {
            let idle = self.process.is_none() && !self.draining && self.has_certificate();
            let happened = tokio::select! {
                biased;
                command = self.commands.recv() => Happened::Command(command),
                ended = ended(&mut self.process) => Happened::Ended(ended),
                () = self.care.changed() => Happened::Certificate,
                () = sleep_until(self.start_at), if idle => Happened::Start,
                () = sleep_until(self.look_at) => Happened::Look,
            };
            match happened {
                Happened::Command(None) => return,
                Happened::Command(Some(Command::Stop { deadline })) => {
                    if let Some(process) = self.process.take() {
                        process.stop(deadline).await;
                    }
                    return;
                }
                Happened::Command(Some(Command::Drain { deadline, done })) => {
                    self.draining = true;
                    if self.process.is_some() {
                        drain(&self.admin, &mut self.process, deadline).await;
                    }
                    let _ = done.send(());
                }
                Happened::Command(Some(Command::Apply { boot, written })) => {
                    let applied = self.apply(*boot);
                    let restart = *applied.as_ref().unwrap_or(&false);
                    let _ = written.send(applied.map(|_| ()));
                    if restart && !self.draining {
                        self.restart().await;
                    }
                }
                Happened::Ended(ended) => self.ended(ended).await,
                Happened::Certificate => self.certificate_changed(),
                Happened::Start => self.start_again(),
                Happened::Look => self.look().await,
            }
        }
    }

    /// pilot-agent gets its own.
    fn has_certificate(&self) -> bool {
        match &self.care {
            Care::Ours { sds, .. } => sds.is_some(),
            Care::PilotAgents { .. } => true,
        }
    }

    fn certificate_changed(&mut self) {
        let Care::Ours { standing, sds, .. } = &mut self.care else { return };
        let Standing { identity, problem } = standing.borrow_and_update().clone();
        let usable = identity.filter(|identity| identity.expires_at > Timestamp::now());
        if let Some(identity) = usable {
            self.events_certificate(&identity.spiffe_id, identity.obtained_at, identity.expires_at);
            let identity = self.identity(&identity);
            let Care::Ours { sds, .. } = &mut self.care else { return };
            match sds {
                Some(sds) => sds.rotate(identity),
                None => match serve(&self.options.directory, identity) {
                    Ok(server) => *sds = Some(server),
                    Err(error) => self.condition(Err(format!("{error:#}"))),
                },
            }
        } else if let (Some(problem), None) = (&problem, &sds) {
            let why = problem.clone();
            self.condition(Err(why));
        } else {
            // It is live as long as its connections are; `look` says the rest.
            self.look_at = Instant::now();
        }
    }

    /// With the mesh's roots of now, and those that came with the certificate.
    fn identity(&self, identity: &StoredIdentity) -> Identity {
        Identity {
            certificate_chain: identity.certificate_chain.clone(),
            private_key: identity.private_key.clone(),
            roots: union(&self.istio.root_certificates, &identity.roots),
        }
    }

    /// True: it has to be restarted.
    fn apply(&mut self, boot: HeldBoot) -> anyhow::Result<bool> {
        let boot::Sidecar::Istio(next) = boot.sidecar else { anyhow::bail!("not a sidecar of an Istio mesh") };
        let credentials = Credentials::of(&next, &boot.spiffe_id)?;
        let restart = match &self.care {
            Care::Ours { .. } => {
                self.istio.drain_duration != next.drain_duration
                    || bootstrap::json(self.options.admin, &self.istio, "")?
                        != bootstrap::json(self.options.admin, &next, "")?
            }
            Care::PilotAgents { .. } => {
                layout::write_credentials(&self.options.directory, &next)?;
                self.istio.files != next.files
                    || self.istio.environment != next.environment
                    || self.istio.discovery_address != next.discovery_address
                    || self.istio.istiod_san != next.istiod_san
            }
        };
        let rotate = self.istio.root_certificates != next.root_certificates;
        (self.istio, self.version) = (*next, boot.version);
        if let Care::Ours { renewal, standing, .. } = &self.care {
            renewal.with(credentials);
            let identity = standing.borrow().identity.clone().filter(|_| rotate).map(|kept| self.identity(&kept));
            if let (Some(identity), Care::Ours { sds: Some(sds), .. }) = (identity, &self.care) {
                sds.rotate(identity);
            }
        }
        if !restart {
            self.accepted();
        }
        Ok(restart)
    }

    /// Gracefully; the same process would go on with what it was started with.
    async fn restart(&mut self) {
        if self.process.is_none() {
            self.start_at = Instant::now();
            return;
        }
        tracing::info!(version = self.version, "the sidecar is restarted, for it is started with something else now");
        tokio::select! {
            () = drain(&self.admin, &mut self.process, DRAIN_WITHIN) => {}
            // The goodbye drains what is there.
            () = self.leaving.cancelled() => return,
        }
        if let Some(process) = self.process.take() {
            process.stop(STOP_WITHIN).await;
        }
        self.live = false;
        self.said.condition = None;
        self.start_again();
    }

    fn spawn(&mut self) -> anyhow::Result<()> {
        let launch = self.prepare()?;
        self.process = Some(Process::start(&self.options, launch)?);
        self.started = Instant::now();
        self.look_at = self.started + LOOK_FIRST;
        Ok(())
    }

    fn prepare(&self) -> anyhow::Result<Launch> {
        let (options, istio) = (&self.options, &self.istio);
        match &self.care {
            Care::PilotAgents { pilot_agent, .. } => {
                let binary = &pilot_agent.binary;
                anyhow::ensure!(
                    binary.is_file(),
                    "{} is missing; install the istio-sidecar package, or let the agent run Envoy by itself (`sidecar: {{envoy: {{}}}}` in agent.config.yaml)",
                    binary.display()
                );
                layout::lay_out(&options.directory, istio, pilot_agent)?;
                Ok(layout::launch(options, pilot_agent, istio, &self.instance))
            }
            Care::Ours { .. } => {
                let bootstrap = bootstrap::json(options.admin, istio, &self.instance)?;
                files::write(&options.directory, super::bootstrap::FILE, bootstrap.to_string().as_bytes())?;
                let drain =
                    istio.drain_duration.map_or(super::bootstrap::DRAIN_SECONDS, |drain| drain.as_secs().max(1));
                Ok(super::bootstrap::launch(options, drain))
            }
        }
    }

    fn start_again(&mut self) {
        if let Err(error) = self.spawn() {
            self.will_start(format!("{error:#}"));
        }
    }

    async fn ended(&mut self, ended: std::io::Result<ExitStatus>) {
        let Some(mut process) = self.process.take() else { return };
        let status = match ended {
            Ok(status) => process.epitaph(status).await,
            Err(error) => error.to_string(),
        };
        if self.draining {
            tracing::warn!(status, "the sidecar ended while it was drained");
            return;
        }
        self.will_start(status);
    }

    fn will_start(&mut self, status: String) {
        if self.started.elapsed() > RAN_WELL {
            self.restarts.reset();
        }
        self.live = false;
        self.said.condition = None;
        self.said.misses = 0;
        let restart_in = self.restarts.next_delay();
        self.start_at = Instant::now() + restart_in;
        self.look_at = self.start_at + NEVER;
        self.say(Event::Exited { status, restart_in });
    }

    /// Reports whether it is live.
    async fn look(&mut self) {
        self.look_at = Instant::now() + LOOK_EVERY;
        if self.process.is_none() || self.draining {
            return;
        }
        match self.is_live().await {
            Ok(()) => {
                self.said.misses = 0;
                self.live = true;
                self.condition(self.secrets());
                self.accepted();
                self.look_at_certificate();
            }
            Err(_) if !self.live && self.started.elapsed() < LIVE_WITHIN => {
                self.look_at = Instant::now() + LOOK_FIRST;
            }
            Err(why) => {
                self.said.misses += 1;
                // One slow answer of a busy machine is not news.
                if self.said.misses > 1 || !self.live {
                    self.live = false;
                    self.condition(Err(why));
                }
            }
        }
    }

    async fn is_live(&self) -> Result<(), String> {
        self.admin.ready().await.map_err(|why| {
            match (&self.istio.discovery_address, why.contains("INITIALIZING")) {
                (Some(istiod), true) => {
                    format!("{why}: istiod at {istiod} has not configured it; the sidecar's log says why")
                }
                _ => why,
            }
        })?;
        // It was this one, and it runs: nobody else can have its address.
        if self.live {
            return Ok(());
        }
        match self.admin.is_instance(&self.instance).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!("another Envoy has the admin address {}", self.options.admin)),
            Err(error) => Err(format!("{error:#}")),
        }
    }

    /// What Envoy has said of its secrets, and whether its certificate is still one.
    fn secrets(&self) -> Result<(), String> {
        let Care::Ours { standing, sds: Some(sds), .. } = &self.care else { return Ok(()) };
        if let Some((secret, reason)) = sds.refused().borrow().first_key_value() {
            return Err(format!("Envoy refused the secret {secret} and goes on with its last one: {reason}"));
        }
        let Standing { identity, problem } = &*standing.borrow();
        if identity.as_ref().is_some_and(|identity| identity.expires_at > Timestamp::now()) {
            return Ok(());
        }
        let why = problem.as_deref().unwrap_or("it is being renewed");
        Err(format!("the certificate has expired: {why}"))
    }

    /// pilot-agent doesn't say that it has a new one.
    fn look_at_certificate(&mut self) {
        let Care::PilotAgents { written, .. } = &mut self.care else { return };
        let path = self.options.directory.join(layout::CERTIFICATE);
        let now = std::fs::metadata(&path).and_then(|metadata| metadata.modified()).ok();
        if now.is_none() || now == *written {
            return;
        }
        *written = now;
        if let Some(certificate) = pilot_agents_certificate(&self.options.directory) {
            self.events_certificate(&certificate.spiffe_id, certificate.obtained_at, certificate.expires_at);
        }
    }

    fn accepted(&mut self) {
        if self.live && self.said.accepted.as_ref() != Some(&self.version) {
            self.said.accepted = Some(self.version.clone());
            self.say(Event::Accepted { version: self.version.clone() });
        }
    }

    fn condition(&mut self, condition: Result<(), String>) {
        if self.said.condition.as_ref() == Some(&condition) {
            return;
        }
        self.said.condition = Some(condition.clone());
        self.say(match condition {
            Ok(()) => Event::Ready,
            Err(why) => Event::NotReady { why },
        });
    }

    fn events_certificate(&self, spiffe_id: &str, obtained_at: Timestamp, expires_at: Timestamp) {
        self.say(Event::Certificate { spiffe_id: spiffe_id.to_owned(), obtained_at, expires_at });
    }

    fn say(&self, event: Event) {
        if let Err(error) = self.events.try_send(event) {
            tracing::warn!(%error, "nobody takes the sidecar's events");
        }
    }
}

impl Care {
    /// Never, where it is pilot-agent's.
    async fn changed(&mut self) {
        if let Self::Ours { standing, .. } = self
            && standing.changed().await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }
}

/// What pilot-agent left, to start from after a reboot.
pub(crate) fn pilot_agents_certificate(directory: &Path) -> Option<crate::machine::Certificate> {
    let chain = crate::store::read_bounded(&directory.join(layout::CERTIFICATE), 1 << 20).ok().flatten()?;
    let leaf = crate::mesh::leaf(std::str::from_utf8(&chain).ok()?).ok()?;
    Some(crate::machine::Certificate {
        spiffe_id: leaf.spiffe_id,
        obtained_at: leaf.issued_at,
        expires_at: leaf.expires_at,
    })
}

fn serve(directory: &Path, identity: Identity) -> anyhow::Result<sds::Server> {
    let socket = Path::new(bootstrap::SDS_SOCKET);
    if let Some(parent) = socket.parent() {
        let parent = directory.join(parent);
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&parent).with_context(|| format!("making the directory {}", parent.display()))?;
    }
    sds::Server::start(directory, bootstrap::SDS_SOCKET, identity)
}
