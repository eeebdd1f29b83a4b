//! What people and the service manager are told: `status.json`, `sd_notify`.

use super::Driver;
use crate::machine::{self, Phase};
use crate::status::Status;
use crate::store::{StoreError, with_source};
use onboarding_wire::onboarding as pb;
use sd_notify::NotifyState;
use std::time::Duration;

/// A sidecar that joined and isn't live by then (its application keeps its port, Envoy refuses its configuration) is said by `status`.
const LONGEST_START: Duration = Duration::from_secs(30);

impl Driver {
    pub(super) fn report_sidecar(&mut self, boot_version: String, accepted: bool, message: String) {
        let report = pb::SidecarReport { boot_version, accepted, message };
        self.say(pb::agent_message::Message::SidecarReport(report.clone()));
        self.last_report = Some(report);
        self.show();
    }

    /// In a new session: whoever holds it may not have been told.
    pub(super) fn repeat_report(&self) {
        if let (Some(report), Some(held)) = (&self.last_report, &self.held)
            && report.boot_version == held.version
        {
            self.say(pb::agent_message::Message::SidecarReport(report.clone()));
        }
    }

    /// A failure to write is said, and does not end what works: the disk may be full for a while.
    pub(super) fn kept(&self, what: &str, write: impl Fn(&Self) -> Result<(), StoreError>) {
        if let Err(error) = write(self) {
            tracing::error!(
                what,
                error = %with_source(&error),
                "can't keep this on disk; after a reboot the plane must be reachable"
            );
        }
    }

    /// `status.json`, and the service manager's line.
    pub(super) fn show(&mut self) {
        let status = Status::of(&self.state, self.held.as_deref(), &self.about);
        if self.shown.as_ref() != Some(&status) {
            self.kept("status", |driver| status.write(&driver.store));
            let line = status.line();
            if line != self.said {
                notify(&[NotifyState::Status(&line)]);
                self.said = line;
            }
            if status.phase == "Draining" && self.shown.as_ref().is_none_or(|shown| shown.phase != "Draining") {
                notify(&[NotifyState::Stopping]);
            }
            self.shown = Some(status);
        }
        if !self.said_ready && self.has_started() {
            self.said_ready = true;
            notify(&[NotifyState::Ready]);
        }
    }

    /// Whether `systemctl start` may return: the sidecar is live, or the first attempt failed and is tried again for as long as it
    /// takes. Whoever waited for the mesh to admit this host would wait for ever, and so would a boot.
    fn has_started(&self) -> bool {
        self.state.sidecar == machine::Sidecar::Live
            || matches!(self.state.phase, Phase::WaitingToRetry { .. })
            || self.began.elapsed() >= LONGEST_START
    }
}

/// For `systemctl status`.
pub(crate) fn tell_service_manager(line: &str) {
    notify(&[NotifyState::Status(line)]);
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "the service manager can't be told");
    }
}
