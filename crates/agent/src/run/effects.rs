//! What the machine wants done: at once here, or by a task of `calls`.

use super::Driver;
use super::news::{Envelope, News, forward};
use crate::boot::{self, Address, HeldBoot};
use crate::keeper;
use crate::machine::{self, Effect};
use crate::mesh::Pending;
use crate::probe;
use crate::store::{StoredIdentity, with_source};
use onboarding_wire::onboarding as pb;
use std::sync::Arc;
use tokio::sync::mpsc;

impl Driver {
    pub(super) fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Connect => self.connect(),
            Effect::Discover => self.discover(),
            Effect::GatherEvidence => self.gather(),
            Effect::Authorize => self.authorize(),
            Effect::Register { prove } => self.register(prove),
            Effect::OpenSession { complete } => self.open_session(complete),
            Effect::Disconnect => self.disconnect(),
            Effect::RenewToken => self.renew(),
            Effect::AnnounceToken => {
                if let Some(token) = &self.token {
                    let renewed = pb::TokenRenewed { token: token.token.clone() };
                    self.say(pb::agent_message::Message::TokenRenewed(renewed));
                }
            }
            Effect::RequestCertificate => match Pending::new() {
                Ok(pending) => {
                    let request = pb::CertificateRequest { csr: pending.csr.clone() };
                    self.pending = Some(pending);
                    self.say(pb::agent_message::Message::CertificateRequest(request));
                }
                Err(error) => tracing::error!(error = %with_source(&error), "no request for a certificate"),
            },
            Effect::StartSidecar => {
                if let Some(boot) = self.placed() {
                    tracing::info!(version = boot.version, spiffe_id = boot.spiffe_id, "starting the sidecar");
                    let standalone = matches!(boot.sidecar, boot::Sidecar::Standalone(_));
                    let identity = self.identity.as_ref().filter(|_| standalone).map(StoredIdentity::for_sidecar);
                    self.ask_keeper(keeper::Command::Start { boot, identity });
                }
            }
            Effect::ApplyBoot => {
                if let Some(boot) = self.placed() {
                    self.ask_keeper(keeper::Command::Apply(boot));
                }
            }
            Effect::RotateCertificate => {
                if let Some(identity) = &self.identity {
                    self.ask_keeper(keeper::Command::Rotate(identity.for_sidecar()));
                }
            }
            Effect::StopSidecar => {
                tracing::info!("draining and stopping the sidecar");
                self.ask_keeper(keeper::Command::Stop);
            }
            Effect::WatchApplication => self.watch_application(),
            Effect::ReportHealth(machine::Health { ready, message }) => {
                self.say(pb::agent_message::Message::Health(pb::Health { ready, message }));
            }
            Effect::ForgetToken => {
                self.token = None;
                self.kept("that the token is gone", |driver| driver.store.forget_token());
            }
            Effect::ForgetBoot => {
                self.held = None;
                self.identity = None;
                self.about.configuration_problem = None;
                self.about.boot_problem = None;
                self.last_report = None;
                self.stop_probe();
                self.kept("that the boot configuration is gone", |driver| driver.store.forget_boot());
            }
            Effect::Unregister => self.unregister(),
        }
    }

    /// What is held, for this host. Without an address it waits for the registration, which brings one: see [`Driver::registered`].
    fn placed(&self) -> Option<Arc<HeldBoot>> {
        let held = self.held.as_ref()?;
        if let boot::Sidecar::Standalone(_) = held.sidecar {
            return Some(held.clone());
        }
        let endpoint = Address { host: self.endpoint.host.clone(), port: self.endpoint.port };
        match held.placed(self.address, &endpoint) {
            Ok(boot) => Some(Arc::new(boot)),
            Err(error) => {
                tracing::warn!(why = %error, "the sidecar waits");
                None
            }
        }
    }

    /// The sidecar of an Istio mesh is configured with this address.
    pub(super) fn registered(&mut self, address: Option<std::net::IpAddr>) {
        if let Some(address) = address
            && self.address != Some(address)
        {
            self.address = Some(address);
            self.kept("this host's address", |driver| driver.store.keep_address(address));
            if let Some(boot) = self.placed()
                && self.state.sidecar != machine::Sidecar::Absent
                && matches!(boot.sidecar, boot::Sidecar::Istio(_))
            {
                self.ask_keeper(keeper::Command::Start { boot, identity: None });
            }
        }
        self.happened(machine::Event::Registered);
    }

    fn ask_keeper(&self, command: keeper::Command) {
        // Its end ends the loop, which says so.
        let _ = self.keeper.send(command);
    }

    /// Over the session, if there is one. A session that takes nothing any more is about to be reported as lost.
    pub(super) fn say(&self, message: pb::agent_message::Message) {
        if let Some(session) = &self.session
            && session.try_send(pb::AgentMessage { message: Some(message) }).is_err()
        {
            tracing::warn!("a message to the plane could not be sent");
        }
    }

    /// Runs beside the loop, with the connection; what it gives is dropped when the connection is another by then.
    pub(super) fn spawn(&mut self, future: impl Future<Output = News> + Send + 'static) {
        let (news, connection) = (self.news.clone(), self.connection);
        self.tasks.spawn(async move {
            let found = future.await;
            // The loop has ended.
            let _ = news.send(Envelope { connection: Some(connection), news: found }).await;
        });
    }

    pub(super) fn disconnect(&mut self) {
        self.tasks.abort_all();
        self.connection += 1;
        self.link = None;
        self.discovery = None;
        self.session = None;
        self.pending = None;
    }

    fn stop_probe(&mut self) {
        if let Some((_, task)) = self.probe.take() {
            task.abort();
        }
    }

    fn watch_application(&mut self) {
        let wanted = self.held.as_ref().and_then(|held| held.probe.clone());
        if self.probe.as_ref().map(|(probe, _)| probe) == wanted.as_ref() {
            return;
        }
        self.stop_probe();
        while self.probes.try_join_next().is_some() {}
        self.state.health = None;
        if let Some(probe) = wanted {
            let (events, incoming) = mpsc::channel(8);
            let news = self.news.clone();
            let of = probe.clone();
            let task = self.probes.spawn(async move {
                tokio::join!(probe::run(of, events), forward(incoming, news, News::Probe));
            });
            self.probe = Some((probe, task));
        }
    }
}
