//! What happened: values are kept here, facts go to the machine.

use super::Driver;
use crate::boot::{self, BootError, HeldBoot};
use crate::host::{Evidence, Host};
use crate::keeper;
use crate::machine::{self, Boot, Call, Event, SessionEnd, Signer, Token};
use crate::probe;
use crate::session::{Discovery, Link};
use crate::sidecar;
use crate::store::{StoredToken, with_source};
use jiff::Timestamp;
use onboarding_wire::onboarding as pb;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Of what the plane says is in the way, in characters.
const LONGEST_PROBLEM: usize = 2000;

/// Everything that can happen.
pub(super) enum News {
    Linked(Link, Discovery),
    Rediscovered(Discovery),
    Evidence(Evidence),
    Token(StoredToken),
    Session(mpsc::Sender<pb::AgentMessage>),
    Plane(Box<pb::PlaneMessage>),
    Host(Arc<dyn Host>),
    Keeper(keeper::News),
    Probe(probe::Event),
    /// With the address of this host that the mesh uses.
    Registered(Option<std::net::IpAddr>),
    /// What needs no value beside it.
    Plain(Event),
}

/// News with the connection that it is of; what comes of an earlier one is dropped.
pub(super) struct Envelope {
    pub(super) connection: Option<u64>,
    pub(super) news: News,
}

pub(super) async fn forward<T>(mut from: mpsc::Receiver<T>, to: mpsc::Sender<Envelope>, wrap: fn(T) -> News) {
    while let Some(item) = from.recv().await {
        if to.send(Envelope { connection: None, news: wrap(item) }).await.is_err() {
            return;
        }
    }
}

impl Driver {
    /// Keeps the values, tells the machine the facts.
    pub(super) fn receive(&mut self, envelope: Envelope) {
        if envelope.connection.is_some_and(|connection| connection != self.connection) {
            return;
        }
        // Finished ones; the set would grow.
        while self.tasks.try_join_next().is_some() {}
        match envelope.news {
            News::Linked(link, discovery) => {
                tracing::info!(peer = %link.peer, plane_uid = discovery.plane_uid, "connected to the endpoint");
                self.link = Some(link);
                self.discovered(discovery);
            }
            News::Rediscovered(discovery) => self.discovered(discovery),
            News::Host(host) => {
                tracing::info!(host = host.describe(), "this host's platform is known");
                self.host = Some(host);
            }
            News::Evidence(evidence) => {
                tracing::info!(origin = evidence.origin, "gathered evidence of this host");
                self.evidence = Some(evidence);
                self.happened(Event::EvidenceReady);
            }
            News::Token(token) => {
                tracing::info!(
                    registration = token.registration,
                    expires_at = %token.expires_at,
                    evidence = self.evidence.as_ref().map(|evidence| evidence.origin.as_str()),
                    "authorized: got a Workload Onboarding Token"
                );
                let facts = token_facts(&token);
                self.token = Some(token);
                self.kept("token", |driver| match &driver.token {
                    Some(token) => driver.store.keep_token(token),
                    None => Ok(()),
                });
                self.happened(Event::Authorized(facts));
            }
            News::Session(outgoing) => {
                tracing::info!("the session is open");
                self.session = Some(outgoing);
                self.about.boot_problem = None;
                self.happened(Event::SessionOpened);
                self.repeat_report();
            }
            News::Plane(message) => self.plane_says(*message),
            News::Keeper(news) => self.keeper_says(news),
            News::Probe(event) => {
                let probe::Event { ready, message } = event;
                tracing::info!(ready, why = message, "the application's readiness changed");
                self.happened(Event::ProbeResult(machine::Health { ready, message }));
            }
            News::Registered(address) => self.registered(address),
            News::Plain(event) => {
                if let Event::Refused { call: Call::Authorize | Call::Renew, .. } = &event
                    && let Some(host) = &self.host
                {
                    host.refused();
                }
                self.happened(event);
            }
        }
    }

    fn discovered(&mut self, discovery: Discovery) {
        let clock_skew = discovery.clock_skew;
        if clock_skew.abs() > machine::CLOCK_SKEW {
            tracing::warn!(
                seconds_ahead = clock_skew.as_secs(),
                "this host's clock differs from the plane's; credentials may be refused: run a time service (chrony, systemd-timesyncd)"
            );
        }
        self.discovery = Some(discovery);
        self.happened(Event::Discovered { clock_skew });
    }

    fn plane_says(&mut self, message: pb::PlaneMessage) {
        match message.message {
            Some(pb::plane_message::Message::Boot(boot)) => self.boot_received(boot),
            Some(pb::plane_message::Message::Certificate(answer)) => {
                let Some(pending) = self.pending.take() else { return };
                match pending.accept(answer, Timestamp::now()) {
                    Ok(identity) => {
                        tracing::info!(
                            spiffe_id = identity.spiffe_id,
                            expires_at = %identity.expires_at,
                            "got a certificate of the mesh"
                        );
                        let facts = identity.facts();
                        self.identity = Some(identity);
                        self.kept("certificate", |driver| match &driver.identity {
                            Some(identity) => driver.store.keep_identity(identity),
                            None => Ok(()),
                        });
                        self.happened(Event::CertificateIssued(facts));
                    }
                    Err(error) => self.certificate_refused(with_source(&error)),
                }
            }
            Some(pb::plane_message::Message::CertificateRefused(refused)) => {
                self.pending = None;
                self.certificate_refused(refused.message);
            }
            Some(pb::plane_message::Message::BootRefused(refused)) => {
                let why: String = refused.message.chars().filter(|c| !c.is_control()).take(LONGEST_PROBLEM).collect();
                tracing::error!(
                    why,
                    "the plane has no boot configuration for this workload; it comes as soon as it can be made"
                );
                self.about.boot_problem = Some(why);
                self.show();
            }
            Some(pb::plane_message::Message::End(end)) => {
                let reason = session_end(end.reason());
                tracing::warn!(reason = ?reason, why = end.message, "the plane ended the session");
                self.happened(Event::SessionEnded { reason, message: end.message });
            }
            // Of a newer plane; parts come joined.
            Some(pb::plane_message::Message::Part(_)) | None => {
                tracing::debug!("the plane sent a message that this version does not know")
            }
        }
    }

    fn certificate_refused(&mut self, why: String) {
        match self.held.as_deref().map(|held| &held.sidecar) {
            Some(boot::Sidecar::Standalone(_)) => tracing::warn!(why, "no certificate of the mesh"),
            // In an Istio mesh the plane signs none; before the first boot configuration nobody knows.
            Some(boot::Sidecar::Istio(_)) | None => tracing::info!(why, "the plane signs no certificate"),
        }
        self.happened(Event::CertificateRefused { why });
    }

    fn boot_received(&mut self, message: pb::BootConfiguration) {
        self.about.boot_problem = None;
        let version = message.version.clone();
        match HeldBoot::apply(self.held.as_deref(), message) {
            Ok(boot) => {
                match &boot.sidecar {
                    boot::Sidecar::Standalone(standalone) => tracing::info!(
                        version = boot.version,
                        spiffe_id = boot.spiffe_id,
                        resources = standalone.resources.len(),
                        "got a boot configuration"
                    ),
                    boot::Sidecar::Istio(istio) => tracing::info!(
                        version = boot.version,
                        spiffe_id = boot.spiffe_id,
                        istiod = istio.istiod_san,
                        token_expires_at = %istio.token_expires_at,
                        "got a boot configuration of an Istio mesh"
                    ),
                }
                let facts = boot_facts(&boot);
                if facts.signer != Signer::Plane {
                    // Whatever the plane makes of it, it isn't of this mesh.
                    self.pending = None;
                }
                self.held = Some(Arc::new(boot));
                self.kept("boot configuration", |driver| match &driver.held {
                    Some(held) => driver.store.keep_boot(held),
                    None => Ok(()),
                });
                self.happened(Event::BootReceived(facts));
            }
            Err(error) => {
                let why = error.to_string();
                let complete = matches!(error, BootError::AnotherBase { .. } | BootError::AnotherResource { .. });
                tracing::warn!(why, ask_for_all_of_it = complete, "a boot configuration can't be used");
                if !complete {
                    self.report_sidecar(version, false, why.clone());
                }
                self.happened(Event::BootUnusable { why, complete });
            }
        }
    }

    fn keeper_says(&mut self, news: keeper::News) {
        match news {
            keeper::News::Gone => {
                tracing::info!("the sidecar is stopped");
                self.happened(Event::SidecarGone);
            }
            keeper::News::Failed { why, retry_in } => {
                tracing::error!(why, ?retry_in, "the sidecar can't be started or configured");
                self.happened(Event::SidecarNotLive { why });
            }
            keeper::News::Sidecar(sidecar::Event::Ready) => {
                tracing::info!("the sidecar is live");
                self.happened(Event::SidecarLive);
            }
            keeper::News::Sidecar(sidecar::Event::NotReady { why }) => {
                tracing::warn!(why, "the sidecar is not live");
                self.happened(Event::SidecarNotLive { why });
            }
            keeper::News::Sidecar(sidecar::Event::Exited { status, restart_in }) => {
                tracing::error!(status, ?restart_in, "the sidecar ended by itself");
                let why = format!("ended by itself ({status}); it is started again");
                self.happened(Event::SidecarNotLive { why });
            }
            keeper::News::Sidecar(sidecar::Event::Certificate { spiffe_id, obtained_at, expires_at }) => {
                let certificate = machine::Certificate { spiffe_id, obtained_at, expires_at };
                self.happened(Event::CertificateHeld(certificate));
            }
            keeper::News::Sidecar(sidecar::Event::Accepted { version }) => {
                tracing::info!(version, "the sidecar accepted a configuration");
                self.about.configuration_problem = None;
                self.report_sidecar(version, true, String::new());
            }
            keeper::News::Sidecar(sidecar::Event::Rejected { version, message }) => {
                tracing::error!(version, why = message, "the sidecar refused a configuration; the last good one stays");
                self.about.configuration_problem = Some(message.clone());
                self.report_sidecar(version, false, message);
            }
        }
    }
}

pub(super) fn token_facts(token: &StoredToken) -> Token {
    Token { registration: token.registration.clone(), issued_at: token.issued_at, expires_at: token.expires_at }
}

pub(super) fn boot_facts(boot: &HeldBoot) -> Boot {
    Boot {
        version: boot.version.clone(),
        spiffe_id: boot.spiffe_id.clone(),
        probed: boot.probe.is_some(),
        signer: match &boot.sidecar {
            boot::Sidecar::Standalone(_) => Signer::Plane,
            boot::Sidecar::Istio(istio) => Signer::Istiod { token_expires_at: istio.token_expires_at },
        },
    }
}

fn session_end(reason: pb::session_end::Reason) -> SessionEnd {
    use pb::session_end::Reason;
    match reason {
        Reason::Replaced => SessionEnd::Replaced,
        Reason::Withdrawn => SessionEnd::Withdrawn,
        Reason::PolicyUnreadable => SessionEnd::PolicyUnreadable,
        Reason::Deleted => SessionEnd::Deleted,
        Reason::Unregistered => SessionEnd::Unregistered,
        Reason::TokenExpired => SessionEnd::TokenExpired,
        Reason::PlaneStopping => SessionEnd::PlaneStopping,
        Reason::Unspecified => SessionEnd::Unspecified,
    }
}
