//! What the agent does next: a pure function of what it knows, what happened, and when.
//!
//! The driver (`run`) turns the world into [`Event`]s, calls [`step()`], and carries out the [`Effect`]s in order. Nothing here awaits,
//! reads a clock, or rolls dice: the time to wait comes from [`Delays`].
//!
//! The sidecar's life and the session's are independent on purpose: a plane that stops, a connection that breaks and a token that
//! can't be renewed leave the sidecar alone. Only a withdrawn admission and the agent's own end take it down.

mod step;

pub use step::step;

use jiff::{SignedDuration, Timestamp};
use std::time::Duration;

/// Everything the agent knows that decisions are made of. Secrets and large values stay in the driver.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    pub phase: Phase,
    /// Since when `phase` is what it is.
    pub since: Timestamp,
    /// Why the last attempt at anything failed; cleared once a session is open.
    pub last_error: Option<String>,
    pub token: Option<Token>,
    pub certificate: Option<Certificate>,
    pub boot: Option<Boot>,
    pub sidecar: Sidecar,
    /// What the group's probe last said of the application.
    pub health: Option<Health>,
    /// What this session has told the plane.
    reported: Option<Health>,
    /// How far this host's clock is ahead of the plane's, where that is worth a warning.
    pub clock_skew: Option<SignedDuration>,
    renewal: Errand,
    signing: Errand,
    /// Since when every attempt ended with "no policy admits this workload".
    not_admitted_since: Option<Timestamp>,
    /// The plane ended the last session because its registration was deleted: it has no entry that a sidecar could outlive.
    deleted: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Phase {
    /// Connecting, and asking the plane for its UID and a challenge.
    Starting,
    /// Gathering what the host can show.
    Attesting,
    Authorizing,
    /// Registering, then opening the session.
    Registering {
        /// The token is from before this connection, so a refusal means: attest again.
        kept_token: bool,
    },
    Connected,
    WaitingToRetry {
        until: Timestamp,
        why: String,
    },
    Draining(Leaving),
    Stopped,
}

/// The steps of a goodbye, each with the moment at which the next begins at the latest.
#[derive(Debug, Clone, PartialEq)]
pub enum Leaving {
    Unregistering {
        until: Timestamp,
    },
    /// The mesh is being told; the sidecar serves on.
    Propagating {
        until: Timestamp,
    },
    Sidecar {
        until: Timestamp,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    pub registration: String,
    pub issued_at: Timestamp,
    pub expires_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Certificate {
    pub spiffe_id: String,
    pub obtained_at: Timestamp,
    pub expires_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Boot {
    pub version: String,
    pub spiffe_id: String,
    /// The group has a probe.
    pub probed: bool,
    pub signer: Signer,
}

/// Who signs the certificate that the sidecar has in the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signer {
    /// The plane, over the session; this machine asks for it.
    Plane,
    /// istiod. The sidecar's keeper asks for it by itself, as long as it has a token that is good for it.
    Istiod { token_expires_at: Timestamp },
}

#[derive(Debug, Clone, PartialEq)]
pub enum Sidecar {
    Absent,
    Starting,
    Live,
    NotLive { why: String },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    pub ready: bool,
    pub message: String,
}

/// Something that is asked for now and then beside the session.
#[derive(Debug, Clone, PartialEq)]
enum Errand {
    Idle,
    Asked { since: Timestamp },
    Again { at: Timestamp },
}

/// Which call was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Discover,
    Authorize,
    Register,
    Session,
    /// Re-attestation beside a session.
    Renew,
}

/// What matters of a gRPC status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// Unauthenticated or NotFound: the token, or what it stood for, is no good any more.
    Unauthenticated,
    PermissionDenied,
    Other,
}

/// How a session ended; `proto` SessionEnd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionEnd {
    Replaced,
    Withdrawn,
    PolicyUnreadable,
    Deleted,
    Unregistered,
    TokenExpired,
    PlaneStopping,
    Unspecified,
}

/// Everything that can happen to an agent.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The process started, with what the disk held.
    Begin,
    /// Connected, and the plane said who it is.
    Discovered {
        clock_skew: SignedDuration,
    },
    EvidenceReady,
    EvidenceFailed {
        why: String,
    },
    Authorized(Token),
    Refused {
        call: Call,
        code: Code,
        why: String,
        /// How long the plane asked to wait at least.
        pushback: Option<Duration>,
    },
    Registered,
    SessionOpened,
    /// A boot configuration came and is held now.
    BootReceived(Boot),
    /// One came that can't be used. `complete`: a complete one would do.
    BootUnusable {
        why: String,
        complete: bool,
    },
    CertificateIssued(Certificate),
    CertificateRefused {
        why: String,
    },
    /// The sidecar has one of istiod's.
    CertificateHeld(Certificate),
    SessionEnded {
        reason: SessionEnd,
        message: String,
    },
    /// Connecting failed, or what was connected isn't any more, or an answer didn't come in time.
    ConnectionLost {
        why: String,
    },
    SidecarLive,
    SidecarNotLive {
        why: String,
    },
    /// It was asked to go, and is gone.
    SidecarGone,
    ProbeResult(Health),
    StopRequested,
    /// The goodbye was answered, or (`None`) can't be said.
    Unregistered {
        propagation_delay: Option<Duration>,
    },
    /// [`State::wakes_at`] has come.
    Tick,
}

/// What the driver does, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// A new connection, and Discover on it.
    Connect,
    /// Discover on the connection there is: a fresh challenge.
    Discover,
    GatherEvidence,
    Authorize,
    Register {
        /// With a proof of the key: the first use of a kept token on a connection.
        prove: bool,
    },
    /// `complete`: say that nothing is held, so that the plane sends all of it.
    OpenSession {
        complete: bool,
    },
    Disconnect,
    /// Discover, gather and authorize once more, beside the session.
    RenewToken,
    AnnounceToken,
    RequestCertificate,
    StartSidecar,
    ApplyBoot,
    RotateCertificate,
    /// Drain, then stop; [`Event::SidecarGone`] follows.
    StopSidecar,
    /// Probe the application as the boot configuration says.
    WatchApplication,
    /// Whether this workload can serve, so that the mesh sends it requests, or none.
    ReportHealth(Health),
    ForgetToken,
    /// And the certificate with it.
    ForgetBoot,
    Unregister,
}

/// Which time to wait is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The next of the exponential series.
    Next,
    /// The series starts anew: what failed had worked for a while.
    First,
    /// At least this long: the plane asked for it.
    Pushback(Duration),
    /// Only so long that not everybody comes at the same moment.
    AtOnce,
}

/// The dice and the series of delays: not pure, so not the machine's.
pub trait Delays {
    fn delay(&mut self, wait: Wait) -> Duration;
}

/// A clock that is further off than this is worth a warning: credentials live by minutes.
pub const CLOCK_SKEW: SignedDuration = SignedDuration::from_secs(60);
/// A token with less life than this left isn't worth starting with.
const TOKEN_MARGIN: SignedDuration = SignedDuration::from_secs(10);
/// A session that lived this long counts as success, so that the next wait is the first of the series.
const LIVED: SignedDuration = SignedDuration::from_secs(30);
/// The driver's calls are all bounded below this; past it something is lost, and the connection is given up.
const NO_ANSWER: SignedDuration = SignedDuration::from_secs(300);
const SIGNING_ANSWER: SignedDuration = SignedDuration::from_secs(30);
/// How long a sidecar outlives "no policy admits this workload" at onboarding. A policy that can't be read counts as absent, so
/// a typing error looks just like this; the entries live for the same grace period. Where the registration was deleted before (its group went,
/// or an operator sends it away) there is none.
pub const NOT_ADMITTED_GRACE: SignedDuration = SignedDuration::from_secs(300);

// A goodbye takes at most the sum of these: 29 s, within the 30 s that the unit and ECS give.
const UNREGISTER_WITHIN: SignedDuration = SignedDuration::from_secs(5);
const LONGEST_PROPAGATION: SignedDuration = SignedDuration::from_secs(15);
const SIDECAR_WITHIN: SignedDuration = SignedDuration::from_secs(9);

impl State {
    /// With what the disk held.
    pub fn new(now: Timestamp, token: Option<Token>, certificate: Option<Certificate>, boot: Option<Boot>) -> Self {
        Self {
            phase: Phase::Starting,
            since: now,
            last_error: None,
            token,
            certificate,
            boot,
            sidecar: Sidecar::Absent,
            health: None,
            reported: None,
            clock_skew: None,
            renewal: Errand::Idle,
            signing: Errand::Idle,
            not_admitted_since: None,
            deleted: false,
        }
    }

    /// When [`Event::Tick`] is due; `None` once it has stopped.
    pub fn wakes_at(&self) -> Option<Timestamp> {
        let phase = match &self.phase {
            Phase::Stopped => return None,
            Phase::WaitingToRetry { until, .. } => *until,
            Phase::Draining(
                Leaving::Unregistering { until } | Leaving::Propagating { until } | Leaving::Sidecar { until },
            ) => return Some(*until),
            Phase::Connected => return [self.token_due(), self.certificate_due()].into_iter().flatten().min(),
            Phase::Starting | Phase::Attesting | Phase::Authorizing | Phase::Registering { .. } => {
                after(self.since, NO_ANSWER)
            }
        };
        Some(self.leaves_mesh_at().map_or(phase, |leaves| leaves.min(phase)))
    }

    /// Whether the certificate would be accepted by a peer now, and is the one that the boot configuration is for.
    pub fn certificate_usable(&self, now: Timestamp) -> bool {
        match (&self.certificate, &self.boot) {
            (Some(certificate), Some(boot)) => certificate.expires_at > now && certificate.spiffe_id == boot.spiffe_id,
            _ => false,
        }
    }

    /// Whether a sidecar that is started now can take part in the mesh.
    pub fn sidecar_can_start(&self, now: Timestamp) -> bool {
        let by_token = match self.boot.as_ref().map(|boot| &boot.signer) {
            Some(Signer::Istiod { token_expires_at }) => *token_expires_at > now,
            Some(Signer::Plane) | None => false,
        };
        by_token || self.certificate_usable(now)
    }

    /// Not known before the first boot configuration: then the plane is asked, and refuses where it signs none.
    fn plane_signs(&self) -> bool {
        !matches!(&self.boot, Some(Boot { signer: Signer::Istiod { .. }, .. }))
    }

    /// Whether this workload can serve: its sidecar listens, and its application says that it is ready, where it is asked.
    pub fn workload_health(&self) -> Health {
        let unready = |message: &str| Health { ready: false, message: message.to_owned() };
        match (&self.sidecar, &self.boot, &self.health) {
            (Sidecar::Absent | Sidecar::Starting, ..) => unready("the sidecar has not come up yet"),
            (Sidecar::NotLive { why }, ..) => unready(&format!("the sidecar is not live: {why}")),
            (Sidecar::Live, Some(Boot { probed: true, .. }), None) => unready("the application was not probed yet"),
            (Sidecar::Live, Some(Boot { probed: true, .. }), Some(health)) => health.clone(),
            (Sidecar::Live, ..) => Health { ready: true, message: String::new() },
        }
    }

    fn token_usable(&self, now: Timestamp) -> bool {
        self.token.as_ref().is_some_and(|token| token.expires_at > after(now, TOKEN_MARGIN))
    }

    /// When to renew the token: at two thirds of its life, or when the last failure says.
    fn token_due(&self) -> Option<Timestamp> {
        match &self.renewal {
            Errand::Asked { since } => Some(after(*since, NO_ANSWER)),
            Errand::Again { at } => Some(*at),
            Errand::Idle => self.token.as_ref().map(|token| part(token.issued_at, token.expires_at, 2, 3)),
        }
    }

    /// When to have a new certificate: at half of its life.
    fn certificate_due(&self) -> Option<Timestamp> {
        if !self.plane_signs() {
            return None;
        }
        match &self.signing {
            Errand::Asked { since } => Some(after(*since, SIGNING_ANSWER)),
            Errand::Again { at } => Some(*at),
            Errand::Idle => {
                self.certificate.as_ref().map(|certificate| part(certificate.obtained_at, certificate.expires_at, 1, 2))
            }
        }
    }

    /// When a sidecar that no policy admits any more has to go.
    fn leaves_mesh_at(&self) -> Option<Timestamp> {
        if self.sidecar == Sidecar::Absent {
            return None;
        }
        self.not_admitted_since.map(|since| after(since, NOT_ADMITTED_GRACE))
    }
}

fn after(moment: Timestamp, duration: SignedDuration) -> Timestamp {
    moment.checked_add(duration).unwrap_or(Timestamp::MAX)
}

fn plus(moment: Timestamp, duration: Duration) -> Timestamp {
    moment.checked_add(duration).unwrap_or(Timestamp::MAX)
}

/// `from` plus that part of the way to `to`.
fn part(from: Timestamp, to: Timestamp, numerator: i64, denominator: i64) -> Timestamp {
    let life = to.as_second().saturating_sub(from.as_second()).max(0);
    after(from, SignedDuration::from_secs(life.saturating_mul(numerator) / denominator))
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
