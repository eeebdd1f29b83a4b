//! The life of one registration: a lease, as a pure function of what happened and when.
//!
//! A driver loads the [`State`], calls [`step`], stores the new state on the condition that nobody else did meanwhile,
//! and only then carries out the effects and answers. Nothing here awaits, and nothing here knows the time by itself.

use crate::identity::{Attested, Replay, Thumbprint};
use crate::label::Labels;
use crate::name::GroupName;
use jiff::Timestamp;
use std::net::IpAddr;
use std::time::Duration;

/// `settings.connectedOver`: which kind of address the mesh uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ConnectedOver {
    #[default]
    Vpc,
    Internet,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostAddress {
    pub ip: IpAddr,
    pub kind: ConnectedOver,
}

/// What an agent says of itself (`spec.registration` of a war). Nothing in it is proven.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostReport {
    pub agent_version: String,
    pub sidecar: SidecarReport,
    pub addresses: Vec<HostAddress>,
    pub labels: Labels,
    pub connected_over: ConnectedOver,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SidecarReport {
    Istio { version: String, revision: Option<String> },
    Envoy { version: String },
}

impl Default for SidecarReport {
    fn default() -> Self {
        Self::Envoy { version: String::new() }
    }
}

/// What is known, durably, under one registration's name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum State {
    /// Never seen, or forgotten.
    #[default]
    Absent,
    /// No registration now; what must be remembered of the last one.
    Ended(Ended),
    Live(Box<Live>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// The key that may come back; `None` after an operator deleted the registration: any key may.
    pub key: Option<KeyMemory>,
    /// Tokens issued at this second or before it are refused.
    pub at: Timestamp,
}

/// The key for which an identity was first registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyMemory {
    pub thumbprint: Thumbprint,
    /// How long the evidence that this key came with could be replayed by another.
    pub replay: Replay,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    pub group: GroupName,
    pub attested: Attested,
    pub key: KeyMemory,
    pub report: HostReport,
    pub created_at: Timestamp,
    /// When the newest token of this registration ends.
    pub token_expires_at: Timestamp,
    pub connection: Connection,
    pub health: Health,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Connection {
    Connected {
        /// The replica that holds the connection: `status.activeAgentConnection.connectedTo`.
        replica: String,
        /// Tells this connection from an earlier one of the same agent.
        session: String,
        since: Timestamp,
    },
    Disconnected {
        since: Timestamp,
        reason: DisconnectReason,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DisconnectReason {
    /// Registered; no connection yet.
    NotYetConnected,
    ConnectionLost,
    TokenExpired,
    /// A policy of the namespace can't be read, so nobody can say that it still admits this workload.
    PolicyUnreadable,
    /// The replica that held the connection stopped or started anew.
    PlaneRestarted,
}

/// What the application's probe says; without a probe it is ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    pub ready: bool,
    /// For people; empty when ready.
    pub message: String,
}

impl Live {
    /// After this moment no entry of this registration may exist.
    pub fn lease_ends_at(&self, grace: Duration) -> Timestamp {
        let from = match &self.connection {
            Connection::Connected { .. } => self.token_expires_at,
            Connection::Disconnected { since, .. } => *since,
        };
        from.checked_add(grace).unwrap_or(Timestamp::MAX)
    }
}

/// Everything that can happen to a registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// An admitted agent registers, or registers again with what is new about it.
    Register(Box<Register>),
    /// Its session opened.
    Connect {
        replica: String,
        session: String,
        key: Thumbprint,
    },
    /// Its session ended; ignored unless it is the one on record.
    Disconnect {
        session: String,
        reason: DisconnectReason,
    },
    /// It re-attested and got a new token.
    Renew {
        key: Thumbprint,
        attested: Box<Attested>,
        token_expires_at: Timestamp,
    },
    Health(Health),
    /// The agent says goodbye.
    Unregister {
        key: Thumbprint,
    },
    /// No policy admits it any more, or its group is gone.
    Withdraw,
    /// An operator deleted it.
    Delete,
    /// Time passed: ends what is past its lease, forgets what need not be remembered.
    Tick,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Register {
    pub group: GroupName,
    pub attested: Attested,
    pub key: Thumbprint,
    pub report: HostReport,
    pub token_issued_at: Timestamp,
    pub token_expires_at: Timestamp,
}

/// What the driver does once the new state is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// The mesh learns of this entry, or of what changed in it.
    PublishEntry,
    /// The mesh forgets the entry.
    RetractEntry,
    /// The session of this name is told why, and ends.
    EndSession { session: String, reason: EndReason },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// A newer session of the same agent took over.
    Replaced,
    Withdrawn,
    PolicyUnreadable,
    Deleted,
    Unregistered,
    TokenExpired,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub state: State,
    /// Empty, and `state` equal to the old one: nothing to store.
    pub effects: Vec<Effect>,
}

/// Why an event can't happen to this registration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "this identity is registered with another key ({known}, this one is {presented}); if the host was rebuilt, delete the registration (`kubectl delete war` or `onboardctl workloads delete`), then it may come with its new key"
    )]
    AnotherKey { known: Thumbprint, presented: Thumbprint },
    #[error("the registration is gone; onboard again")]
    Gone,
    #[error("the token was issued before the registration ended; onboard again")]
    TokenFromBefore,
}

/// Whether this key may come for the registration in this state; asked before a token is issued, and again by [`step`].
pub fn admits_key(state: &State, key: Thumbprint, replay: Replay, now: Timestamp) -> Result<(), Refusal> {
    let _ = (state, key, replay, now);
    unimplemented!()
}

/// What an event makes of a state. `grace`: how long an entry outlives its agent's connection.
pub fn step(state: &State, event: Event, now: Timestamp, grace: Duration) -> Result<Step, Refusal> {
    let _ = (state, event, now, grace);
    unimplemented!()
}
