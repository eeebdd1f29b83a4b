//! One agent's boot configurations, as long as its session lives.
//!
//! A sidecar that runs keeps what it was started with ([`Start`]) until the next session, unless the group's operator wants otherwise: a
//! change of a group, or of the mesh, must not restart all its sidecars at the same moment. Tokens go on whatever else is in the way.

use super::inputs::{Inputs, Part};
use super::render::{self, Start, render};
use super::reports::Followed;
use super::{Account, IstioProvisioner, Metrics, Outcome, Token, TokenStatus, Tokens};
use futures_util::stream::{self, BoxStream, StreamExt};
use onboarding_core::registration::State;
use onboarding_endpoint::backend::{ProvisionError, Registry, RegistryError, Workload};
use onboarding_runtime::backoff::Backoff;
use onboarding_wire::onboarding::BootConfiguration;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Between a change of the inputs and what is made of it: a rollout changes many objects in one go.
const GAP: Duration = Duration::from_millis(100);
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(5);

pub(super) struct Follower {
    workload: Workload,
    inputs: watch::Receiver<Arc<Inputs>>,
    registry: Arc<dyn Registry>,
    tokens: Tokens,
    metrics: Metrics,
    followed: Followed,
    /// The version that the agent came with.
    held: String,
    /// What the last look saw of the inputs.
    part: Option<Part>,
    token: Option<(Account, watch::Receiver<TokenStatus>)>,
    sent: Option<Sent>,
    /// What was said last to be in the way.
    problem: Option<String>,
    /// The last look came to a boot configuration, whether a token was there for it or not.
    has_newest: bool,
    left_out: Vec<String>,
    /// What to do first.
    woken: Option<Woken>,
    /// When to look again without being told.
    retry_at: Option<Instant>,
    backoff: Backoff,
}

struct Sent {
    version: String,
    start: Arc<Start>,
    token: Arc<Token>,
}

#[derive(Clone, Copy, PartialEq)]
enum Woken {
    /// Anything may be new.
    All,
    Token,
}

/// What stands in the way of a boot configuration.
enum Obstacle {
    /// Somebody tells when it is gone: the inputs, or the token.
    Told(ProvisionError),
    /// There is no token yet, and no reason either.
    Soon,
    Untold(ProvisionError),
}

impl Follower {
    pub(super) fn new(provisioner: &IstioProvisioner, workload: Workload, held: String) -> Self {
        Self {
            inputs: provisioner.inputs.clone(),
            registry: provisioner.registry.clone(),
            tokens: provisioner.tokens.clone(),
            metrics: provisioner.metrics.clone(),
            followed: Followed::new(provisioner.reports.clone(), workload.name.clone(), &held),
            workload,
            held,
            part: None,
            token: None,
            sent: None,
            problem: None,
            has_newest: false,
            left_out: Vec::new(),
            woken: Some(Woken::All),
            retry_at: None,
            backoff: Backoff::new(FIRST_RETRY, LONGEST_RETRY),
        }
    }

    pub(super) fn stream(self) -> BoxStream<'static, Result<BootConfiguration, ProvisionError>> {
        stream::unfold(self, |mut follower| async { follower.next().await.map(|item| (item, follower)) }).boxed()
    }

    async fn next(&mut self) -> Option<Result<BootConfiguration, ProvisionError>> {
        loop {
            let woken = match self.woken.take() {
                Some(woken) => woken,
                None => self.wait().await?,
            };
            if woken == Woken::Token && self.follows_what_was_sent() {
                let renewed = self.renewed();
                // Whatever else is in the way may have been the old token's end.
                self.woken = self.problem.as_ref().map(|_| Woken::All);
                match renewed {
                    Some(boot) => return Some(Ok(boot)),
                    None => continue,
                }
            }
            self.retry_at = None;
            let error = match self.look().await {
                Ok(boot) => {
                    let was_told = self.problem.take().is_some();
                    if was_told {
                        self.followed.no_problem();
                    }
                    self.backoff.reset();
                    match (boot, &self.sent) {
                        (Some(boot), _) => return Some(Ok(boot)),
                        // Nothing is new: an agent that was told of the problem hears that it is gone.
                        (None, Some(sent)) if was_told => {
                            self.metrics.count_boot("token");
                            return Some(Ok(render::token_alone(&sent.version, &sent.token)));
                        }
                        (None, _) => continue,
                    }
                }
                Err(Obstacle::Soon) => continue,
                Err(Obstacle::Told(error)) => error,
                Err(Obstacle::Untold(error)) => {
                    self.retry_at = Some(Instant::now() + self.backoff.next_delay());
                    error
                }
            };
            let words = error.to_string();
            if self.problem.as_ref() != Some(&words) {
                self.followed.problem(&words, self.has_newest);
                self.problem = Some(words);
                self.metrics.count_boot(match &error {
                    ProvisionError::Refused(_) => "refused",
                    ProvisionError::Unavailable(_) => "unavailable",
                });
                return Some(Err(error));
            }
        }
    }

    /// Whether the account that is followed is the one that the sidecar was started for.
    fn follows_what_was_sent(&self) -> bool {
        match (&self.sent, &self.token) {
            (Some(sent), Some((account, _))) => account.name == sent.start.service_account,
            _ => false,
        }
    }

    /// The token alone, if it is another than the one that was sent.
    fn renewed(&mut self) -> Option<BootConfiguration> {
        let (_, receiver) = self.token.as_mut()?;
        let token = receiver.borrow_and_update().token.clone().filter(|token| token.is_valid())?;
        let sent = self.sent.as_mut().filter(|sent| !Arc::ptr_eq(&sent.token, &token))?;
        self.metrics.count_boot("token");
        let boot = render::token_alone(&sent.version, &token);
        sent.token = token;
        Some(boot)
    }

    /// What is to be sent now, if anything.
    async fn look(&mut self) -> Result<Option<BootConfiguration>, Obstacle> {
        self.has_newest = false;
        let name = &self.workload.name;
        let part = Part::of(&self.inputs.borrow_and_update(), &self.workload.group);
        let part = &*self.part.insert(part);
        let unavailable = |words: String| Obstacle::Untold(ProvisionError::Unavailable(words));
        let stored = self.registry.load(name).await.map_err(|error| match error {
            RegistryError::Foreign(words) => Obstacle::Untold(ProvisionError::Refused(words)),
            error @ (RegistryError::Conflict | RegistryError::Unavailable(_)) => unavailable(error.to_string()),
        })?;
        let live = match stored.state {
            State::Live(live) if live.group == self.workload.group => live,
            State::Live(_) | State::Ended(_) | State::Absent => {
                return Err(unavailable(format!("{name} isn't registered in the group {}", self.workload.group)));
            }
        };
        let newest = render(name, &live, part).map_err(|error| {
            let words = error.to_string();
            Obstacle::Told(match error.is_refusal() {
                true => ProvisionError::Refused(words),
                false => ProvisionError::Unavailable(words),
            })
        })?;
        self.has_newest = true;
        if let Some(group) = &part.group {
            self.followed.newest(&newest.version, group);
        }
        if self.left_out != newest.left_out {
            self.left_out.clone_from(&newest.left_out);
            if !newest.left_out.is_empty() {
                tracing::warn!(
                    registration = %name,
                    what = %newest.left_out.join(", ").escape_debug(),
                    "a boot configuration leaves out what no host may be given"
                );
            }
        }
        let rendered = match &self.sent {
            Some(sent) if !newest.at_once && newest.start != sent.start => {
                tracing::debug!(registration = %name, "a change that needs a restart waits for the next session");
                newest.started_with(&sent.start)
            }
            _ => newest,
        };
        let token = self.token_of(&rendered.start.service_account)?;
        let kind = match &self.sent {
            Some(sent) if sent.version == rendered.version => {
                if Arc::ptr_eq(&sent.token, &token) {
                    return Ok(None);
                }
                "token"
            }
            None if self.held == rendered.version => "token",
            _ => "complete",
        };
        self.metrics.count_boot(kind);
        let boot = match kind {
            "token" => render::token_alone(&rendered.version, &token),
            _ => rendered.message(&token),
        };
        self.followed.sent(&rendered.version);
        self.sent = Some(Sent { version: rendered.version, start: rendered.start, token });
        Ok(Some(boot))
    }

    fn token_of(&mut self, service_account: &str) -> Result<Arc<Token>, Obstacle> {
        let namespace = self.workload.name.namespace.clone();
        let account = Account { namespace, name: service_account.to_owned() };
        let receiver = match &mut self.token {
            Some((held, receiver)) if *held == account => receiver,
            token => {
                let receiver = self.tokens.follow(&account);
                &mut token.insert((account, receiver)).1
            }
        };
        let status = receiver.borrow_and_update().clone();
        match (status.token.filter(|token| token.is_valid()), status.problem) {
            (Some(token), _) => Ok(token),
            (None, Some(problem)) => Err(Obstacle::Told(ProvisionError::Unavailable(problem.to_string()))),
            (None, None) => Err(Obstacle::Soon),
        }
    }

    /// Until something that matters to this workload may have changed; `None`: nothing will any more.
    async fn wait(&mut self) -> Option<Woken> {
        loop {
            let token = async {
                match &mut self.token {
                    Some((_, receiver)) => receiver.changed().await,
                    None => std::future::pending().await,
                }
            };
            let retry = async {
                match self.retry_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                changed = self.inputs.changed() => {
                    changed.ok()?;
                    tokio::time::sleep(GAP).await;
                    let part = Part::of(&self.inputs.borrow_and_update(), &self.workload.group);
                    if self.part.as_ref() != Some(&part) {
                        return Some(Woken::All);
                    }
                }
                changed = token => {
                    if changed.is_ok() {
                        return Some(Woken::Token);
                    }
                    // Its task is gone: at the end of the plane, or by a fault.
                    if self.tokens.is_stopping() {
                        return None;
                    }
                    self.token = None;
                    self.retry_at = Some(Instant::now() + self.backoff.next_delay());
                }
                () = retry => return Some(Woken::All),
            }
        }
    }
}

impl Metrics {
    fn count_boot(&self, outcome: &'static str) {
        self.boots.get_or_create(&Outcome { outcome }).inc();
    }
}
