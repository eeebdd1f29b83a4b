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

impl ConnectedOver {
    /// As files and resources have it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Vpc => "VPC",
            Self::Internet => "INTERNET",
        }
    }
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
    /// Since when `health.ready` is what it is.
    pub health_since: Timestamp,
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

/// Whether the workload can serve: its sidecar is up and its application ready, as its agent says. Until then it gets no requests.
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
///
/// A live registration belongs to its key. One that ended is remembered for as long as the evidence that its key came with
/// could be replayed by another; evidence that itself names the newcomer's key is no replay.
pub fn admits_key(state: &State, key: Thumbprint, replay: Replay, now: Timestamp) -> Result<(), Refusal> {
    let (known, binds) = match state {
        State::Absent => return Ok(()),
        State::Live(live) => (live.key.thumbprint, true),
        State::Ended(Ended { key: None, .. }) => return Ok(()),
        State::Ended(Ended { key: Some(memory), .. }) => {
            (memory.thumbprint, memory.holds_at(now) && replay != Replay::BoundToKey)
        }
    };
    if known == key || !binds { Ok(()) } else { Err(Refusal::AnotherKey { known, presented: key }) }
}

impl KeyMemory {
    /// Whether the evidence that this key came with could still be replayed by another.
    fn holds_at(&self, now: Timestamp) -> bool {
        match self.replay {
            Replay::BoundToKey => false,
            Replay::Until(end) => now < end,
            Replay::Forever => true,
        }
    }
}

/// How long the end of a registration is remembered when no key has to be: no token of before it lives longer, as
/// [`crate::token::lifetime`] gives none a longer life, whatever is configured.
pub const LONGEST_TOKEN_LIFE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// What an event makes of a state. `grace`: how long an entry outlives its agent's connection.
pub fn step(state: &State, event: Event, now: Timestamp, grace: Duration) -> Result<Step, Refusal> {
    match (state, event) {
        (state, Event::Register(register)) => on_register(state, *register, now),
        (State::Live(live), event) => on_live(live, event, now, grace),
        // What nobody is waiting for any more.
        (_, Event::Disconnect { .. } | Event::Health(_) | Event::Withdraw) => Ok(Step::unchanged(state)),
        (_, Event::Connect { .. } | Event::Renew { .. } | Event::Unregister { .. }) => Err(Refusal::Gone),
        (State::Ended(_), Event::Delete) => Ok(Step::silent(State::Ended(Ended { key: None, at: now }))),
        (State::Ended(ended), Event::Tick) => {
            Ok(if ended.forgettable_at(now) { Step::silent(State::Absent) } else { Step::unchanged(state) })
        }
        (State::Absent, Event::Delete | Event::Tick) => Ok(Step::unchanged(state)),
    }
}

impl Step {
    fn unchanged(state: &State) -> Self {
        Self::silent(state.clone())
    }
    fn silent(state: State) -> Self {
        Self { state, effects: Vec::new() }
    }
    fn live(live: Live, effects: Vec<Effect>) -> Self {
        Self { state: State::Live(Box::new(live)), effects }
    }
}

impl Ended {
    fn forgettable_at(&self, now: Timestamp) -> bool {
        let key_holds = self.key.as_ref().is_some_and(|key| key.holds_at(now));
        !key_holds && self.at.checked_add(LONGEST_TOKEN_LIFE).is_ok_and(|end| end <= now)
    }
}

/// The health of what has never reported any.
pub const NOT_UP: &str = "the sidecar has not come up yet";

fn on_register(state: &State, register: Register, now: Timestamp) -> Result<Step, Refusal> {
    let Register { group, attested, key, report, token_issued_at, token_expires_at } = register;
    admits_key(state, key, attested.replay, now)?;
    if let State::Ended(ended) = state
        && token_issued_at.as_second() <= ended.at.as_second()
    {
        return Err(Refusal::TokenFromBefore);
    }
    let key = KeyMemory { thumbprint: key, replay: attested.replay };
    let before = match state {
        State::Live(live) => live,
        State::Absent | State::Ended(_) => {
            let live = Live {
                group,
                attested,
                key,
                report,
                created_at: now,
                token_expires_at,
                connection: Connection::Disconnected { since: now, reason: DisconnectReason::NotYetConnected },
                health: Health { ready: false, message: NOT_UP.to_owned() },
                health_since: now,
            };
            return Ok(Step::live(live, vec![Effect::PublishEntry]));
        }
    };
    let live = Live {
        group,
        attested,
        key: before.key.renewed(&key),
        report,
        token_expires_at: token_expires_at.max(before.token_expires_at),
        ..(**before).clone()
    };
    // The lease of an agent that is between two connections starts again: it has just been seen.
    let live = match live.connection {
        Connection::Disconnected { reason, .. } if live != **before => {
            Live { connection: Connection::Disconnected { since: now, reason }, ..live }
        }
        _ => live,
    };
    let effects = if live == **before { Vec::new() } else { vec![Effect::PublishEntry] };
    Ok(Step::live(live, effects))
}

impl KeyMemory {
    /// The same key with newer evidence: remembered for as long as any of its evidence could be replayed.
    fn renewed(&self, newer: &KeyMemory) -> KeyMemory {
        let longest = match (self.replay, newer.replay) {
            (Replay::Forever, _) | (_, Replay::Forever) => Replay::Forever,
            (Replay::Until(a), Replay::Until(b)) => Replay::Until(a.max(b)),
            (Replay::Until(end), Replay::BoundToKey) | (Replay::BoundToKey, Replay::Until(end)) => Replay::Until(end),
            (Replay::BoundToKey, Replay::BoundToKey) => Replay::BoundToKey,
        };
        KeyMemory { thumbprint: newer.thumbprint, replay: longest }
    }
}

fn on_live(live: &Live, event: Event, now: Timestamp, grace: Duration) -> Result<Step, Refusal> {
    match event {
        Event::Connect { replica, session, key } => {
            live.requires(key)?;
            let effects = live.end_session(EndReason::Replaced);
            let connection = Connection::Connected { replica, session, since: now };
            Ok(Step::live(Live { connection, ..live.clone() }, effects))
        }
        Event::Disconnect { session, reason } => Ok(match &live.connection {
            Connection::Connected { session: current, .. } if *current == session => {
                Step::live(live.disconnected(now, reason), Vec::new())
            }
            _ => Step::live(live.clone(), Vec::new()),
        }),
        Event::Renew { key, attested, token_expires_at } => {
            live.requires(key)?;
            let newer = KeyMemory { thumbprint: key, replay: attested.replay };
            Ok(Step::live(
                Live {
                    key: live.key.renewed(&newer),
                    attested: *attested,
                    token_expires_at: token_expires_at.max(live.token_expires_at),
                    ..live.clone()
                },
                Vec::new(),
            ))
        }
        Event::Health(health) => {
            let effects = if health == live.health { Vec::new() } else { vec![Effect::PublishEntry] };
            let health_since = if health.ready == live.health.ready { live.health_since } else { now };
            Ok(Step::live(Live { health, health_since, ..live.clone() }, effects))
        }
        Event::Unregister { key } => {
            live.requires(key)?;
            Ok(live.end(EndReason::Unregistered, Some(live.key.clone()), now))
        }
        Event::Withdraw => Ok(live.end(EndReason::Withdrawn, Some(live.key.clone()), now)),
        Event::Delete => Ok(live.end(EndReason::Deleted, None, now)),
        Event::Tick => Ok(live.tick(now, grace)),
        // `step` has taken it.
        Event::Register(register) => on_register(&State::Live(Box::new(live.clone())), *register, now),
    }
}

impl Live {
    fn requires(&self, key: Thumbprint) -> Result<(), Refusal> {
        if self.key.thumbprint == key {
            Ok(())
        } else {
            Err(Refusal::AnotherKey { known: self.key.thumbprint, presented: key })
        }
    }

    fn end_session(&self, reason: EndReason) -> Vec<Effect> {
        match &self.connection {
            Connection::Connected { session, .. } => vec![Effect::EndSession { session: session.clone(), reason }],
            Connection::Disconnected { .. } => Vec::new(),
        }
    }

    fn end(&self, reason: EndReason, key: Option<KeyMemory>, now: Timestamp) -> Step {
        let mut effects = vec![Effect::RetractEntry];
        effects.extend(self.end_session(reason));
        Step { state: State::Ended(Ended { key, at: now }), effects }
    }

    fn disconnected(&self, since: Timestamp, reason: DisconnectReason) -> Live {
        Live { connection: Connection::Disconnected { since, reason }, ..self.clone() }
    }

    fn tick(&self, now: Timestamp, grace: Duration) -> Step {
        if self.lease_ends_at(grace) <= now {
            return self.end(EndReason::TokenExpired, Some(self.key.clone()), now);
        }
        match &self.connection {
            Connection::Connected { .. } if self.token_expires_at <= now => Step::live(
                self.disconnected(self.token_expires_at, DisconnectReason::TokenExpired),
                self.end_session(EndReason::TokenExpired),
            ),
            _ => Step::live(self.clone(), Vec::new()),
        }
    }
}

#[cfg(test)]
#[path = "registration_tests.rs"]
mod tests;
