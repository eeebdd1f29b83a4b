//! One step: what an event makes of the state, and what has to be done about it.

use super::*;

/// What `event` makes of `state`, and what has to be done about it.
pub fn step(state: &mut State, event: Event, now: Timestamp, delays: &mut dyn Delays) -> Vec<Effect> {
    let mut step = Step { state, now, delays, effects: Vec::new() };
    match step.state.phase {
        Phase::Stopped => {}
        Phase::Draining(_) => step.draining(event),
        _ => step.living(event),
    }
    step.report_health();
    step.effects
}

struct Step<'a> {
    state: &'a mut State,
    now: Timestamp,
    delays: &'a mut dyn Delays,
    effects: Vec<Effect>,
}

impl Step<'_> {
    fn living(&mut self, event: Event) {
        match event {
            Event::Begin => {
                if self.state.sidecar_can_start(self.now) {
                    self.start_sidecar();
                    self.effects.push(Effect::WatchApplication);
                }
                self.connect();
            }
            Event::Discovered { clock_skew } => self.discovered(clock_skew),
            Event::EvidenceReady => {
                if self.state.phase == Phase::Attesting {
                    self.enter(Phase::Authorizing);
                    self.effects.push(Effect::Authorize);
                }
            }
            Event::EvidenceFailed { why } => match self.state.phase {
                Phase::Attesting => self.retry(Wait::Next, why),
                Phase::Connected => self.renewal_failed(Wait::Next, why),
                _ => {}
            },
            Event::Authorized(token) => self.authorized(token),
            Event::Refused { call, code, why, pushback } => self.refused(call, code, why, pushback),
            Event::Registered => {
                if matches!(self.state.phase, Phase::Registering { .. }) {
                    self.effects.push(Effect::OpenSession { complete: self.state.boot.is_none() });
                }
            }
            Event::SessionOpened => self.session_opened(),
            Event::BootReceived(boot) => self.boot_received(boot),
            Event::BootUnusable { why, complete } => {
                if self.state.phase == Phase::Connected {
                    self.state.last_error = Some(why.clone());
                    if complete {
                        self.enter(Phase::Registering { kept_token: true });
                        self.effects.push(Effect::OpenSession { complete: true });
                    }
                }
            }
            Event::CertificateIssued(certificate) => self.certificate_issued(certificate),
            Event::CertificateRefused { why } => {
                if matches!(self.state.signing, Errand::Asked { .. }) {
                    self.state.last_error = Some(why);
                    let delay = self.delays.delay(Wait::Next);
                    self.state.signing = Errand::Again { at: plus(self.now, delay) };
                }
            }
            Event::CertificateHeld(certificate) => {
                if !self.state.plane_signs() {
                    self.state.certificate = Some(certificate);
                }
            }
            Event::SessionEnded { reason, message } => self.session_ended(reason, message),
            Event::ConnectionLost { why } => {
                if !matches!(self.state.phase, Phase::WaitingToRetry { .. }) {
                    let wait = self.wait_after_loss();
                    self.retry(wait, why);
                }
            }
            Event::SidecarLive => {
                if self.state.sidecar != Sidecar::Absent {
                    self.state.sidecar = Sidecar::Live;
                }
            }
            Event::SidecarNotLive { why } => {
                if self.state.sidecar != Sidecar::Absent {
                    self.state.sidecar = Sidecar::NotLive { why };
                }
            }
            // Of one that was asked to go when the admission was withdrawn.
            Event::SidecarGone => {}
            Event::ProbeResult(health) => {
                self.state.health = Some(health);
            }
            Event::StopRequested => self.leave(),
            Event::Unregistered { .. } => {}
            Event::Tick => self.tick(),
        }
    }

    /// Tells the plane when it changes, and once each session.
    fn report_health(&mut self) {
        if self.state.phase != Phase::Connected {
            self.state.reported = None;
            return;
        }
        let health = self.state.workload_health();
        if self.state.reported.as_ref() != Some(&health) {
            self.state.reported = Some(health.clone());
            self.effects.push(Effect::ReportHealth(health));
        }
    }

    fn enter(&mut self, phase: Phase) {
        self.state.phase = phase;
        self.state.since = self.now;
    }

    fn connect(&mut self) {
        self.enter(Phase::Starting);
        self.effects.push(Effect::Connect);
    }

    /// Gives the connection up and waits.
    fn retry(&mut self, wait: Wait, why: String) {
        let delay = self.delays.delay(wait);
        self.state.last_error = Some(why.clone());
        self.state.renewal = Errand::Idle;
        self.state.signing = Errand::Idle;
        self.enter(Phase::WaitingToRetry { until: plus(self.now, delay), why });
        self.effects.push(Effect::Disconnect);
    }

    fn wait_after_loss(&self) -> Wait {
        let lived = self.state.phase == Phase::Connected && self.now.duration_since(self.state.since) >= LIVED;
        if lived { Wait::First } else { Wait::Next }
    }

    fn discovered(&mut self, clock_skew: SignedDuration) {
        if self.state.phase != Phase::Starting {
            return;
        }
        self.state.clock_skew = Some(clock_skew).filter(|skew| skew.abs() > CLOCK_SKEW);
        if self.state.token_usable(self.now) {
            self.enter(Phase::Registering { kept_token: true });
            self.effects.push(Effect::Register { prove: true });
        } else {
            self.forget_token();
            self.enter(Phase::Attesting);
            self.effects.push(Effect::GatherEvidence);
        }
    }

    fn forget_token(&mut self) {
        if self.state.token.take().is_some() {
            self.effects.push(Effect::ForgetToken);
        }
    }

    fn authorized(&mut self, token: Token) {
        match self.state.phase {
            Phase::Authorizing => {
                self.state.token = Some(token);
                self.note_admission();
                self.enter(Phase::Registering { kept_token: false });
                self.effects.push(Effect::Register { prove: false });
            }
            Phase::Connected if matches!(self.state.renewal, Errand::Asked { .. }) => {
                self.state.token = Some(token);
                self.state.renewal = Errand::Idle;
                self.effects.push(Effect::AnnounceToken);
            }
            _ => {}
        }
    }

    fn refused(&mut self, call: Call, code: Code, why: String, pushback: Option<Duration>) {
        let wait = pushback.map_or(Wait::Next, Wait::Pushback);
        match (&self.state.phase, call) {
            (Phase::Connected, Call::Renew) => self.renewal_failed(wait, why),
            (Phase::Registering { kept_token: true }, Call::Register | Call::Session) if code != Code::Other => {
                // The challenge is used up: ask for another on the same connection, and attest.
                self.state.last_error = Some(why);
                self.forget_token();
                self.enter(Phase::Starting);
                self.effects.push(Effect::Discover);
            }
            (Phase::Starting, Call::Discover)
            | (Phase::Authorizing, Call::Authorize)
            | (Phase::Registering { .. }, Call::Register | Call::Session) => {
                // Only an admission ends this: a plane that is away meanwhile says nothing in favour.
                if code == Code::PermissionDenied {
                    self.state.not_admitted_since.get_or_insert(self.now);
                    if self.state.deleted {
                        self.leave_mesh();
                    }
                }
                if matches!(self.state.phase, Phase::Registering { .. }) && code != Code::Other {
                    self.forget_token();
                }
                self.retry(wait, why);
            }
            _ => {}
        }
    }

    /// What is valid stays in use; renewing is tried again.
    fn renewal_failed(&mut self, wait: Wait, why: String) {
        if matches!(self.state.renewal, Errand::Asked { .. }) {
            let delay = self.delays.delay(wait);
            self.state.last_error = Some(why);
            self.state.renewal = Errand::Again { at: plus(self.now, delay) };
        }
    }

    /// Somebody lets this host in: what was said against it is past.
    fn note_admission(&mut self) {
        self.state.not_admitted_since = None;
        self.state.deleted = false;
    }

    fn session_opened(&mut self) {
        if !matches!(self.state.phase, Phase::Registering { .. }) {
            return;
        }
        self.enter(Phase::Connected);
        self.state.last_error = None;
        self.note_admission();
        self.state.renewal = Errand::Idle;
        self.state.signing = Errand::Idle;
        // Asked for before the boot configuration comes: the plane decides the identity, and a round trip is saved.
        if self.state.plane_signs() && (self.state.certificate.is_none() || self.certificate_is_due()) {
            self.request_certificate();
        }
    }

    fn certificate_is_due(&self) -> bool {
        self.state.certificate_due().is_some_and(|due| due <= self.now)
    }

    fn request_certificate(&mut self) {
        self.state.signing = Errand::Asked { since: self.now };
        self.effects.push(Effect::RequestCertificate);
    }

    fn boot_received(&mut self, boot: Boot) {
        if self.state.phase != Phase::Connected {
            return;
        }
        let plane_signed = self.state.boot.is_none() || self.state.plane_signs();
        self.state.boot = Some(boot);
        if self.state.plane_signs() != plane_signed {
            // Of the other mesh.
            self.state.certificate = None;
        }
        if !self.state.plane_signs() {
            // Asked for when nobody knew; the plane refuses, or has refused.
            if matches!(self.state.signing, Errand::Again { .. }) {
                self.state.last_error = None;
            }
            self.state.signing = Errand::Idle;
        }
        if self.state.sidecar != Sidecar::Absent {
            self.effects.push(Effect::ApplyBoot);
        } else if self.state.sidecar_can_start(self.now) {
            self.start_sidecar();
        }
        if self.state.plane_signs() && !self.state.certificate_usable(self.now) && self.state.signing == Errand::Idle {
            self.request_certificate();
        }
        self.effects.push(Effect::WatchApplication);
    }

    fn start_sidecar(&mut self) {
        self.state.sidecar = Sidecar::Starting;
        self.effects.push(Effect::StartSidecar);
    }

    fn certificate_issued(&mut self, certificate: Certificate) {
        if !matches!(self.state.signing, Errand::Asked { .. }) {
            return;
        }
        self.state.signing = Errand::Idle;
        self.state.certificate = Some(certificate);
        if self.state.sidecar != Sidecar::Absent {
            self.effects.push(Effect::RotateCertificate);
        } else if self.state.certificate_usable(self.now) {
            self.start_sidecar();
        }
    }

    fn session_ended(&mut self, reason: SessionEnd, message: String) {
        if self.state.phase != Phase::Connected {
            if matches!(self.state.phase, Phase::Registering { .. }) {
                self.retry(Wait::Next, message);
            }
            return;
        }
        let wait = match reason {
            SessionEnd::Withdrawn => {
                self.leave_mesh();
                Wait::First
            }
            SessionEnd::Deleted | SessionEnd::TokenExpired => {
                self.state.deleted = reason == SessionEnd::Deleted;
                self.forget_token();
                self.at_once()
            }
            SessionEnd::Unregistered => {
                self.forget_token();
                self.wait_after_loss()
            }
            SessionEnd::PlaneStopping => self.at_once(),
            // Another process with this key: whoever waits longer lets the other live.
            SessionEnd::Replaced | SessionEnd::PolicyUnreadable | SessionEnd::Unspecified => self.wait_after_loss(),
        };
        self.retry(wait, message);
    }

    /// At once, unless the session hardly lived: then this would be a hot loop.
    fn at_once(&self) -> Wait {
        match self.wait_after_loss() {
            Wait::First => Wait::AtOnce,
            other => other,
        }
    }

    /// Nothing that this host holds admits it to the mesh any more.
    fn leave_mesh(&mut self) {
        if self.state.sidecar != Sidecar::Absent {
            self.state.sidecar = Sidecar::Absent;
            self.effects.push(Effect::StopSidecar);
        }
        self.forget_token();
        self.state.boot = None;
        self.state.certificate = None;
        self.state.health = None;
        self.state.deleted = false;
        self.effects.push(Effect::ForgetBoot);
    }

    fn tick(&mut self) {
        if self.state.phase != Phase::Connected && self.state.leaves_mesh_at().is_some_and(|at| at <= self.now) {
            self.leave_mesh();
        }
        match &self.state.phase {
            Phase::WaitingToRetry { until, .. } if *until <= self.now => self.connect(),
            Phase::Connected => {
                if self.state.token_due().is_some_and(|due| due <= self.now) {
                    self.state.renewal = Errand::Asked { since: self.now };
                    self.effects.push(Effect::RenewToken);
                }
                if self.certificate_is_due() {
                    self.request_certificate();
                }
            }
            Phase::Starting | Phase::Attesting | Phase::Authorizing | Phase::Registering { .. }
                if after(self.state.since, NO_ANSWER) <= self.now =>
            {
                self.retry(Wait::Next, "no answer for five minutes".to_owned());
            }
            _ => {}
        }
    }

    fn leave(&mut self) {
        if self.state.token.is_some() {
            self.enter(Phase::Draining(Leaving::Unregistering { until: after(self.now, UNREGISTER_WITHIN) }));
            self.effects.push(Effect::Unregister);
        } else {
            self.stop_sidecar_and_end();
        }
    }

    fn stop_sidecar_and_end(&mut self) {
        self.effects.push(Effect::Disconnect);
        if self.state.sidecar == Sidecar::Absent {
            self.enter(Phase::Stopped);
        } else {
            self.enter(Phase::Draining(Leaving::Sidecar { until: after(self.now, SIDECAR_WITHIN) }));
            self.effects.push(Effect::StopSidecar);
        }
    }

    fn draining(&mut self, event: Event) {
        let Phase::Draining(leaving) = self.state.phase.clone() else { return };
        match (leaving, event) {
            (Leaving::Unregistering { .. }, Event::Unregistered { propagation_delay: Some(delay) }) => {
                self.forget_token();
                if self.state.sidecar == Sidecar::Absent {
                    self.stop_sidecar_and_end();
                    return;
                }
                let until = plus(self.now, delay).min(after(self.now, LONGEST_PROPAGATION));
                self.enter(Phase::Draining(Leaving::Propagating { until }));
            }
            (Leaving::Unregistering { .. }, Event::Unregistered { propagation_delay: None }) => {
                self.stop_sidecar_and_end();
            }
            (Leaving::Unregistering { until } | Leaving::Propagating { until }, Event::Tick) if until <= self.now => {
                self.stop_sidecar_and_end();
            }
            (Leaving::Sidecar { .. }, Event::SidecarGone) => {
                self.state.sidecar = Sidecar::Absent;
                self.enter(Phase::Stopped);
            }
            (Leaving::Sidecar { until }, Event::Tick) if until <= self.now => self.enter(Phase::Stopped),
            _ => {}
        }
    }
}
