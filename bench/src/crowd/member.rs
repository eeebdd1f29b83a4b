//! Agents that stay: their sessions, and how they come back.

use super::link::{Key, Link};
use super::{Crowd, Joined, report};
use anyhow::Context;
use onboarding_runtime::backoff::Backoff;
use onboarding_wire::onboarding as pb;
use pb::agent_message::Message as ToPlane;
use pb::plane_message::Message as FromPlane;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The agent's own (`crates/agent/src/run`).
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// What these agents do beside holding their sessions.
#[derive(Debug, Clone)]
pub struct Habits {
    /// Comes back when the session ends or breaks, with the agent's own delays.
    pub come_back: bool,
    /// Reports itself ready once a session is open: a durable write, as every real agent causes.
    pub report_health: bool,
    /// PKCS #10 in DER: asks for a certificate with it when its first session opens. One serves a whole crowd.
    pub certificate_request: Option<Vec<u8>>,
}

impl Default for Habits {
    fn default() -> Self {
        Self { come_back: true, report_health: true, certificate_request: None }
    }
}

/// How one agent is.
#[derive(Debug, Clone, Default)]
pub struct Status {
    pub registration: String,
    /// A session is open.
    pub connected: bool,
    /// How many were opened, this one included.
    pub sessions: usize,
    /// When the last of them was opened.
    pub since: Option<Instant>,
    /// Of the newest boot configuration; empty: none came.
    pub boot_version: String,
    /// Boot configurations that came, and the bytes of the last one's message.
    pub boots: usize,
    pub boot_size: usize,
    pub certificates: usize,
    /// How often its token was not accepted any more, so that it had to show its evidence again.
    pub authorized_again: usize,
    /// What the plane said when it ended a session last: `pb::session_end::Reason` and words.
    pub ended: Option<pb::SessionEnd>,
    pub last_error: Option<String>,
}

/// Agents with sessions; they go when this is dropped.
pub struct Members {
    all: Vec<(watch::Receiver<Status>, JoinHandle<()>)>,
}

impl Drop for Members {
    fn drop(&mut self) {
        self.all.iter().for_each(|(_, task)| task.abort());
    }
}

impl Members {
    pub(super) fn start(crowd: &Crowd, joined: Vec<Joined>, habits: Habits) -> Self {
        let all = joined.into_iter().map(|joined| {
            let Joined { number, key, token, link, registration } = joined;
            let (status, seen) = watch::channel(Status { registration, ..Status::default() });
            let member = Member { crowd: crowd.clone(), habits: habits.clone(), number, key, token, status };
            (seen, tokio::spawn(member.live(link)))
        });
        Self { all: all.collect() }
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// How each is now.
    pub fn statuses(&self) -> impl Iterator<Item = Status> + '_ {
        self.all.iter().map(|(status, _)| status.borrow().clone())
    }

    /// Waits for this to be true of every one of them, each at some moment.
    ///
    /// # Errors
    /// Not within that time; it says of how many not, and how one of these was last.
    pub async fn until(&self, within: Duration, wanted: impl Fn(&Status) -> bool) -> anyhow::Result<()> {
        let deadline = tokio::time::Instant::now() + within;
        for (status, _) in &self.all {
            let mut status = status.clone();
            let reached = tokio::time::timeout_at(deadline, status.wait_for(|status| wanted(status))).await;
            if !matches!(reached, Ok(Ok(_))) {
                let others: Vec<Status> = self.statuses().filter(|status| !wanted(status)).collect();
                let example = others.first();
                anyhow::bail!(
                    "{} of {} agents not within {within:?}; one of them: {example:?}",
                    others.len(),
                    self.len()
                );
            }
        }
        Ok(())
    }
}

struct Member {
    crowd: Crowd,
    habits: Habits,
    number: usize,
    key: Key,
    token: String,
    status: watch::Sender<Status>,
}

impl Member {
    async fn live(mut self, link: Link) {
        let mut link = Some(link);
        let mut backoff = Backoff::new(FIRST_RETRY, LONGEST_RETRY);
        let mut attempt = 0;
        loop {
            let connection = match link.take() {
                Some(link) => Ok(link),
                None => {
                    attempt += 1;
                    // Boxed: connecting needs more than an open session, and seldom.
                    Box::pin(self.connect(attempt)).await
                }
            };
            let outcome = match connection {
                Ok(link) => self.session(&link, &mut backoff).await,
                Err(error) => Err(error),
            };
            self.status.send_modify(|status| {
                status.connected = false;
                if let Err(error) = outcome {
                    status.last_error = Some(format!("{error:#}"));
                }
            });
            if !self.habits.come_back {
                return;
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// By its token; by its evidence where that isn't accepted any more.
    async fn connect(&mut self, attempt: usize) -> anyhow::Result<Link> {
        let mut link = self.crowd.dialler.dial(self.number, attempt).await.context("connecting again")?;
        let Err(error) = link.register(&self.token, report(self.number), Some(&self.key)).await else {
            return Ok(link);
        };
        let code = error.downcast_ref::<tonic::Status>().map(tonic::Status::code);
        use tonic::Code;
        if !matches!(code, Some(Code::Unauthenticated | Code::NotFound | Code::PermissionDenied)) {
            return Err(error);
        }
        let credential = self.crowd.evidence.credential(self.number, &self.crowd.whereto.plane_uid)?;
        self.token = link.authorize(&self.key, credential, self.crowd.whereto.reference()).await?;
        self.status.send_modify(|status| status.authorized_again += 1);
        link.register(&self.token, report(self.number), None).await?;
        Ok(link)
    }

    /// Until it ends. What the plane says at the end isn't an error.
    async fn session(&mut self, link: &Link, backoff: &mut Backoff) -> anyhow::Result<()> {
        let held = self.status.borrow().boot_version.clone();
        // Boxed: what opening needs isn't kept for as long as the session lives.
        let mut session = Box::pin(link.session(&self.token, &held)).await?;
        let first = self.status.borrow().sessions == 0;
        if self.habits.report_health {
            session.say.send(said(ToPlane::Health(pb::Health { ready: true, message: String::new() }))).await?;
        }
        if let Some(csr) = self.habits.certificate_request.clone().filter(|_| first) {
            session.say.send(said(ToPlane::CertificateRequest(pb::CertificateRequest { csr }))).await?;
        }
        self.status.send_modify(|status| {
            status.connected = true;
            status.sessions += 1;
            status.since = Some(Instant::now());
        });
        backoff.reset();
        loop {
            let message = session.hear.message().await?.context("the plane closed the session without a word")?;
            match message.message {
                Some(FromPlane::Boot(boot)) => {
                    let size = prost::Message::encoded_len(&boot);
                    let report = pb::SidecarReport {
                        boot_version: boot.version.clone(),
                        accepted: true,
                        message: String::new(),
                    };
                    self.status.send_modify(|status| {
                        status.boot_version = boot.version;
                        status.boots += 1;
                        status.boot_size = size;
                    });
                    session.say.send(said(ToPlane::SidecarReport(report))).await?;
                }
                Some(FromPlane::Certificate(_)) => self.status.send_modify(|status| status.certificates += 1),
                Some(FromPlane::CertificateRefused(refused)) => {
                    self.status.send_modify(|status| status.last_error = Some(refused.message));
                }
                Some(FromPlane::End(end)) => {
                    if end.reason() == pb::session_end::Reason::Deleted
                        || end.reason() == pb::session_end::Reason::TokenExpired
                    {
                        self.token.clear();
                    }
                    self.status.send_modify(|status| status.ended = Some(end));
                    return Ok(());
                }
                Some(other) => {
                    self.status.send_modify(|status| status.last_error = Some(format!("the plane said {other:?}")));
                }
                None => {}
            }
        }
    }
}

fn said(message: ToPlane) -> pb::AgentMessage {
    pb::AgentMessage { message: Some(message) }
}
