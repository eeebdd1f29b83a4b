//! What one agent, and all of them together, may ask for.

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use onboarding_wire::RETRY_PUSHBACK;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::time::Duration;
use tonic::{Code, Status};

/// Bounds of the endpoint. The defaults are for one plane with ten thousand agents.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections in all.
    pub connections: usize,
    /// TLS handshakes at a time; further ones wait.
    pub handshakes: usize,
    pub handshake_timeout: Duration,
    /// How long a connection may be open before a key is proven on it.
    pub time_to_prove: Duration,
    /// HTTP/2 streams of one connection: a session and a few calls.
    pub streams_per_connection: u32,
    /// Of any message of an agent, in bytes.
    pub message_size: usize,
    /// Authorizations of one address: this many at once, refilled one each `authorization_interval`.
    pub authorization_burst: NonZeroU32,
    pub authorization_interval: Duration,
    /// Authorizations under way at a time.
    pub authorizations: usize,
    /// HTTP/2 pings to find dead agents.
    pub keepalive_interval: Duration,
    pub keepalive_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 60_000,
            handshakes: 256,
            handshake_timeout: Duration::from_secs(10),
            time_to_prove: Duration::from_secs(30),
            streams_per_connection: 16,
            message_size: 64 * 1024,
            authorization_burst: const { NonZeroU32::new(60).unwrap() },
            authorization_interval: Duration::from_secs(1),
            authorizations: 1024,
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
        }
    }
}

/// How often each address may ask for authorization.
pub(crate) struct Rates {
    authorizations: DefaultKeyedRateLimiter<IpAddr>,
    interval: Duration,
}

impl Rates {
    pub(crate) fn new(limits: &Limits) -> Self {
        let quota = Quota::with_period(limits.authorization_interval)
            .unwrap_or(Quota::per_second(NonZeroU32::MIN))
            .allow_burst(limits.authorization_burst);
        Self { authorizations: RateLimiter::keyed(quota), interval: limits.authorization_interval }
    }

    pub(crate) fn authorization(&self, peer: IpAddr) -> Result<(), Status> {
        self.authorizations.check_key(&peer).map_err(|_| {
            exhausted("too many authorizations from this address", self.interval.max(Duration::from_millis(500)))
        })
    }

    /// Forgets the addresses that have their whole allowance again.
    pub(crate) fn forget_idle(&self) {
        self.authorizations.retain_recent();
        self.authorizations.shrink_to_fit();
    }
}

/// Tells the agent how long to wait at least.
pub(crate) fn exhausted(why: &str, wait: Duration) -> Status {
    let mut status = Status::new(Code::ResourceExhausted, format!("{why}; try again in {} ms", wait.as_millis()));
    if let Ok(value) = wait.as_millis().to_string().parse() {
        status.metadata_mut().insert(RETRY_PUSHBACK, value);
    }
    status
}
