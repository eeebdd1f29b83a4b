//! The task that owns Envoy: hands it configurations, finds out what it made of them, starts it again when it ends.

use super::admin::{Admin, Stats};
use super::files::{self, Step, Subscription};
use super::process::Process;
use super::sds::Refused;
use super::{Event, Options, bootstrap};
use crate::boot::{self, HeldBoot};
use onboarding_runtime::backoff::Backoff;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

/// How long Envoy may take to say what it made of a file; it reads one within milliseconds.
const VERDICT_WITHIN: Duration = Duration::from_secs(10);
/// How long new clusters may take to be usable before listeners refer to them. A name that doesn't resolve must not hold up the rest.
const WARM_WITHIN: Duration = Duration::from_secs(2);
/// How long a start is watched closely.
const LIVE_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A process that ran for so long was a good start.
const RAN_WELL: Duration = Duration::from_secs(60);
/// While draining: callers that keep connections open and send nothing for so long are idle.
const QUIET: Duration = Duration::from_millis(500);
/// The last configuration that Envoy accepted, for when the next one is refused after a restart of the agent.
const ACCEPTED: &str = "accepted";

pub(super) enum Command {
    Apply { boot: Box<HeldBoot>, written: oneshot::Sender<anyhow::Result<()>> },
    Drain { deadline: Duration, done: oneshot::Sender<()> },
    Stop { deadline: Duration },
}

pub(super) struct Supervisor {
    options: Options,
    instance: String,
    admin: Admin,
    commands: mpsc::Receiver<Command>,
    leaving: CancellationToken,
    secret_refused: watch::Receiver<Refused>,
    events: mpsc::Sender<Event>,
    process: Option<Process>,
    started: Instant,
    start_at: Instant,
    restarts: Backoff,
    /// What the files say.
    current: Arc<HeldBoot>,
    /// What Envoy made of `current`.
    standing: Standing,
    /// Its statistics before it was given `current`, where that is unknown.
    before: Stats,
    live: bool,
    /// The last configuration that was accepted.
    good: Option<Arc<HeldBoot>>,
    /// Processes that ended before they said what they make of `current`.
    deaths: u32,
    retries: Backoff,
    retry: Option<(Instant, Arc<HeldBoot>)>,
    said: Said,
    draining: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Unknown,
    Accepted,
    /// And there is nothing better to put back.
    Refused,
}

/// What was reported, so that only changes are.
#[derive(Default)]
struct Said {
    condition: Option<Result<(), String>>,
    accepted: Option<String>,
    rejected: Option<(String, String)>,
    /// Failures of `/ready` in a row.
    misses: u32,
}

enum Verdict {
    Taken,
    Refused(String),
    /// The process ended, or the sidecar shall leave: nobody is left to ask.
    Nobody,
}

enum Happened {
    Command(Option<Command>),
    Ended(std::io::Result<ExitStatus>),
    SecretRefused,
    Start,
    Retry(Arc<HeldBoot>),
    Look,
}

impl Supervisor {
    /// Writes everything and starts the process.
    pub(super) fn start(
        options: Options,
        boot: HeldBoot,
        commands: mpsc::Receiver<Command>,
        leaving: CancellationToken,
        secret_refused: watch::Receiver<Refused>,
        events: mpsc::Sender<Event>,
    ) -> anyhow::Result<Self> {
        let instance = format!("{:032x}", rand::random::<u128>());
        let good = std::fs::read(options.directory.join(ACCEPTED)).ok().and_then(|bytes| HeldBoot::from_bytes(&bytes));
        files::prepare(&options.directory)?;
        if let boot::Sidecar::Standalone(standalone) = &boot.sidecar {
            files::write(&options.directory, bootstrap::FILE, &bootstrap::json(&options, standalone, &instance))?;
        }
        write_all(&options, &files::whole(&boot))?;
        let process = Process::start(&options, bootstrap::launch(&options, bootstrap::DRAIN_SECONDS))?;
        Ok(Self {
            instance,
            admin: Admin::new(options.admin),
            options,
            commands,
            leaving,
            secret_refused,
            events: queue(events),
            process: Some(process),
            started: Instant::now(),
            start_at: Instant::now(),
            restarts: Backoff::new(Duration::from_millis(100), Duration::from_secs(30)),
            current: Arc::new(boot),
            standing: Standing::Unknown,
            before: Stats::default(),
            live: false,
            good: good.map(Arc::new),
            deaths: 0,
            retries: Backoff::new(Duration::from_secs(1), Duration::from_secs(60)),
            retry: None,
            said: Said::default(),
            draining: false,
        })
    }

    /// Until it is told to stop, or the handle is gone.
    pub(super) async fn run(mut self) {
        self.come_up().await;
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let idle = self.process.is_none() && !self.draining;
            let happened = tokio::select! {
                biased;
                command = self.commands.recv() => Happened::Command(command),
                ended = ended(&mut self.process) => Happened::Ended(ended),
                Ok(()) = self.secret_refused.changed() => Happened::SecretRefused,
                () = sleep_until(self.start_at), if idle => Happened::Start,
                boot = due(&mut self.retry) => Happened::Retry(boot),
                _ = look.tick() => Happened::Look,
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
                    self.drain(deadline).await;
                    let _ = done.send(());
                }
                Happened::Command(Some(Command::Apply { boot, written })) => {
                    self.hand_over(Arc::new(*boot), Some(written)).await;
                }
                Happened::Ended(ended) => self.ended(ended).await,
                Happened::Start => self.start_again().await,
                Happened::Retry(boot) => self.hand_over(boot, None).await,
                Happened::SecretRefused | Happened::Look => self.look().await,
            }
        }
    }

    /// Watches a start until Envoy is live, then asks what it makes of its configuration.
    async fn come_up(&mut self) {
        let deadline = Instant::now() + LIVE_WITHIN;
        let mut pause = Duration::from_millis(2);
        loop {
            let Some(process) = &mut self.process else { return };
            if process.ended().is_some() || self.leaving.is_cancelled() {
                return;
            }
            match self.live().await {
                Ok(()) => break,
                Err(why) if Instant::now() >= deadline => return self.condition(Err(why)),
                Err(_) => {}
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = self.leaving.cancelled() => return,
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        }
        self.look().await;
    }

    async fn live(&self) -> Result<(), String> {
        self.admin.ready().await?;
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

    /// Reports whether it is live; asks what became of a configuration that was handed over while it wasn't.
    async fn look(&mut self) {
        if self.process.is_none() || self.draining {
            return;
        }
        match self.live().await {
            Ok(()) => {
                self.said.misses = 0;
                self.live = true;
                let secret_refused =
                    self.secret_refused.borrow_and_update().first_key_value().map(|(secret, reason)| {
                        format!("Envoy refused the secret {secret} and goes on with its last one: {reason}")
                    });
                self.condition(secret_refused.map_or(Ok(()), Err));
                if self.standing == Standing::Unknown {
                    self.examine().await;
                }
            }
            Err(why) => {
                self.said.misses += 1;
                // One slow answer of a busy machine is not news.
                if self.said.misses > 1 {
                    self.live = false;
                    self.condition(Err(why));
                }
            }
        }
    }

    /// What the running Envoy makes of files that it read at its start.
    async fn examine(&mut self) {
        let expected = files::whole(&self.current).expected;
        let before = std::mem::take(&mut self.before);
        match self.verdict(&expected, &before).await {
            Verdict::Taken => self.accepted(),
            Verdict::Refused(message) => self.refused(Arc::clone(&self.current), message).await,
            Verdict::Nobody => {}
        }
    }

    /// Brings the files, step by step, to what `boot` says. `written` is told when the first are there.
    async fn hand_over(&mut self, boot: Arc<HeldBoot>, mut written: Option<oneshot::Sender<anyhow::Result<()>>>) {
        if self.draining {
            return;
        }
        self.retry = None;
        let result = self.write_steps(Arc::clone(&boot), &mut written).await;
        match (result, written) {
            (result, Some(written)) => {
                let _ = written.send(result);
            }
            (Err(error), None) => {
                // Whoever asked is told already that it was written.
                self.rejected(&boot.version, format!("{error:#}"));
                self.try_again(boot);
            }
            (Ok(()), None) => {}
        }
    }

    async fn write_steps(
        &mut self,
        boot: Arc<HeldBoot>,
        written: &mut Option<oneshot::Sender<anyhow::Result<()>>>,
    ) -> anyhow::Result<()> {
        let steps = match self.standing {
            Standing::Accepted if self.live => files::steps(&self.current, &boot),
            _ => vec![files::rewrite(&self.current, &boot)],
        };
        if !self.live {
            // Nobody to ask yet; `look` will.
            self.before = self.admin.subscriptions().await.unwrap_or_default();
            for step in &steps {
                write_all(&self.options, step)?;
                files::remove(&self.options.directory, &step.removes);
            }
            (self.current, self.standing, self.deaths) = (boot, Standing::Unknown, 0);
            return Ok(());
        }
        for step in steps {
            let before = self.admin.subscriptions().await?;
            if let Some(process) = &self.process {
                process.words().clear();
            }
            if let Err(error) = write_all(&self.options, &step) {
                self.put_back().await;
                return Err(error);
            }
            if let Some(written) = written.take() {
                let _ = written.send(Ok(()));
            }
            match self.verdict(&step.expected, &before).await {
                Verdict::Taken => files::remove(&self.options.directory, &step.removes),
                Verdict::Refused(message) => {
                    self.refused(boot, message).await;
                    return Ok(());
                }
                Verdict::Nobody => {
                    (self.current, self.standing, self.deaths) = (boot, Standing::Unknown, 0);
                    return Ok(());
                }
            }
        }
        self.current = boot;
        self.accepted();
        Ok(())
    }

    /// Asks Envoy until each of these subscriptions has its version, or one was refused once more than `before`.
    async fn verdict(&mut self, expected: &[(Subscription, String)], before: &Stats) -> Verdict {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(2);
        let mut missing = String::new();
        loop {
            let Some(process) = &mut self.process else { return Verdict::Nobody };
            if process.ended().is_some() || self.leaving.is_cancelled() {
                return Verdict::Nobody;
            }
            match self.admin.subscriptions().await {
                Ok(stats) => {
                    if expected.iter().any(|(of, _)| stats.refusals(of) > before.refusals(of)) {
                        return Verdict::Refused(self.words().await);
                    }
                    let waiting = expected.iter().find(|(of, version)| !stats.has_version(of, version));
                    let warm = stats.warming() == 0 || begun.elapsed() > WARM_WITHIN;
                    match waiting {
                        None if warm => return Verdict::Taken,
                        None => {}
                        Some((of, _)) => missing = format!("{of:?}"),
                    }
                }
                Err(error) => missing = format!("{error:#}"),
            }
            if begun.elapsed() > VERDICT_WITHIN {
                return Verdict::Refused(format!("Envoy took no notice of it within {VERDICT_WITHIN:?}: {missing}"));
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = self.leaving.cancelled() => return Verdict::Nobody,
            }
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// Why Envoy refused, in its words. It says so on standard error, which may take a moment longer than the statistics.
    async fn words(&self) -> String {
        let Some(process) = &self.process else { return String::new() };
        for _ in 0..100 {
            if let Some(words) = process.words().refusals() {
                return words;
            }
            sleep(Duration::from_millis(5)).await;
        }
        "Envoy refused it and didn't say why".to_owned()
    }

    fn accepted(&mut self) {
        self.standing = Standing::Accepted;
        self.retries.reset();
        self.deaths = 0;
        self.said.rejected = None;
        let version = self.current.version.clone();
        if self.good.as_ref().is_none_or(|good| good.version != version || good.resources() != self.current.resources())
            && let Err(error) = files::write(&self.options.directory, ACCEPTED, &self.current.to_bytes())
        {
            tracing::warn!(error = %format!("{error:#}"), "can't keep the accepted configuration on disk");
        }
        self.good = Some(Arc::clone(&self.current));
        if self.said.accepted.as_ref() != Some(&version) {
            self.said.accepted = Some(version.clone());
            self.say(Event::Accepted { version });
        }
    }

    async fn refused(&mut self, boot: Arc<HeldBoot>, message: String) {
        let better = self.good.as_ref().is_some_and(|good| good.resources() != boot.resources());
        let version = boot.version.clone();
        self.current = boot;
        if better {
            self.put_back().await;
        } else {
            // What hinders it may go away, as an application that has a listener's port does.
            self.standing = Standing::Refused;
            self.try_again(Arc::clone(&self.current));
        }
        self.rejected(&version, message);
    }

    fn rejected(&mut self, version: &str, message: String) {
        let rejected = (version.to_owned(), message);
        if self.said.rejected.as_ref() != Some(&rejected) {
            self.said.rejected = Some(rejected.clone());
            self.said.accepted = None;
            self.say(Event::Rejected { version: rejected.0, message: rejected.1 });
        }
    }

    /// The last good files again, so that Envoy, now and after a restart, has them.
    async fn put_back(&mut self) {
        let Some(good) = self.good.clone() else { return };
        let step = files::rewrite(&self.current, &good);
        let before = self.admin.subscriptions().await.unwrap_or_default();
        if let Err(error) = write_all(&self.options, &step) {
            tracing::error!(error = %format!("{error:#}"), "can't put the last good configuration back");
            return;
        }
        self.current = good;
        match self.verdict(&step.expected, &before).await {
            Verdict::Taken => self.standing = Standing::Accepted,
            Verdict::Nobody => self.standing = Standing::Unknown,
            Verdict::Refused(message) => {
                tracing::error!(why = message, "the sidecar refuses its last good configuration");
                self.standing = Standing::Refused;
                self.try_again(Arc::clone(&self.current));
            }
        }
        files::remove(&self.options.directory, &step.removes);
    }

    fn try_again(&mut self, boot: Arc<HeldBoot>) {
        self.retry = Some((Instant::now() + self.retries.next_delay(), boot));
    }

    async fn ended(&mut self, ended: std::io::Result<ExitStatus>) {
        let Some(mut process) = self.process.take() else { return };
        let (crashed, status) = match ended {
            Ok(status) => (status.signal().is_some(), process.epitaph(status).await),
            Err(error) => (false, error.to_string()),
        };
        if self.draining {
            tracing::warn!(status, "the sidecar ended while it was drained");
            return;
        }
        // An exit with a code has another cause, as an admin address that somebody has.
        if crashed && self.standing == Standing::Unknown {
            self.deaths += 1;
            let good = self.good.clone().filter(|good| good.resources() != self.current.resources());
            // Once may be a coincidence.
            if self.deaths > 1
                && let Some(good) = good
            {
                let version = std::mem::replace(&mut self.current, good).version.clone();
                self.deaths = 0;
                self.rejected(&version, format!("Envoy ended on it: {status}"));
            }
        }
        self.will_start(status);
    }

    fn will_start(&mut self, status: String) {
        if self.started.elapsed() > RAN_WELL {
            self.restarts.reset();
        }
        self.standing = Standing::Unknown;
        self.before = Stats::default();
        self.live = false;
        self.retry = None;
        self.said.condition = None;
        self.said.misses = 0;
        let restart_in = self.restarts.next_delay();
        self.start_at = Instant::now() + restart_in;
        self.say(Event::Exited { status, restart_in });
    }

    async fn start_again(&mut self) {
        // The files may be from the midst of a change.
        let written = files::prepare(&self.options.directory)
            .and_then(|()| write_all(&self.options, &files::whole(&self.current)))
            .and_then(|()| Process::start(&self.options, bootstrap::launch(&self.options, bootstrap::DRAIN_SECONDS)));
        self.started = Instant::now();
        match written {
            Ok(process) => {
                self.process = Some(process);
                self.come_up().await;
            }
            Err(error) => self.will_start(format!("{error:#}")),
        }
    }

    async fn drain(&mut self, deadline: Duration) {
        self.draining = true;
        drain(&self.admin, &mut self.process, deadline).await;
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

    fn say(&self, event: Event) {
        if let Err(error) = self.events.try_send(event) {
            tracing::warn!(%error, "nobody takes the sidecar's events");
        }
    }
}

/// Waits until nobody is being served: no request in flight, and no connection or only idle ones.
pub(super) async fn drain(admin: &Admin, process: &mut Option<Process>, deadline: Duration) {
    let deadline = Instant::now() + deadline;
    if let Err(error) = admin.drain().await {
        tracing::warn!(error = %format!("{error:#}"), "can't drain the sidecar");
        return;
    }
    let mut last = None;
    let mut quiet_since = Instant::now();
    loop {
        if process.as_mut().is_none_or(|process| process.ended().is_some()) {
            return;
        }
        match admin.in_flight().await {
            Ok(flight) if flight.active == 0 && flight.connections == 0 => return,
            Ok(flight) => {
                if flight.active > 0 || last != Some(flight.total) {
                    quiet_since = Instant::now();
                }
                if quiet_since.elapsed() >= QUIET {
                    return;
                }
                last = Some(flight.total);
                if Instant::now() >= deadline {
                    tracing::warn!(active = flight.active, "requests are still in flight at the drain's deadline");
                    return;
                }
            }
            Err(error) => {
                if Instant::now() >= deadline {
                    tracing::warn!(error = %format!("{error:#}"), "the sidecar doesn't say what is in flight");
                    return;
                }
            }
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// A place to leave events without waiting: who takes them may be waiting for this task.
pub(super) fn queue(events: mpsc::Sender<Event>) -> mpsc::Sender<Event> {
    let (sender, mut queued) = mpsc::channel(256);
    tokio::spawn(async move {
        while let Some(event) = queued.recv().await {
            if events.send(event).await.is_err() {
                return;
            }
        }
    });
    sender
}

fn write_all(options: &Options, step: &Step) -> anyhow::Result<()> {
    step.writes.iter().try_for_each(|(name, bytes)| files::write(&options.directory, name, bytes))
}

/// Never, where nothing runs.
pub(super) async fn ended(process: &mut Option<Process>) -> std::io::Result<ExitStatus> {
    match process {
        Some(process) => process.wait().await,
        None => std::future::pending().await,
    }
}

/// Takes what is to be tried again when its time has come; never, where there is nothing.
async fn due(retry: &mut Option<(Instant, Arc<HeldBoot>)>) -> Arc<HeldBoot> {
    if let Some((at, _)) = retry {
        sleep_until(*at).await;
    }
    match retry.take() {
        Some((_, boot)) => boot,
        None => std::future::pending().await,
    }
}
