//! What one agent, and all of them together, may ask for.

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use onboarding_wire::RETRY_PUSHBACK;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tonic::{Code, Status};

/// Bounds of the endpoint. The defaults are for one plane with ten thousand agents, which may all come from one address (a NAT, a gateway).
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections in all.
    pub connections: usize,
    /// Connections of one address (of one /64 in IPv6); further ones are closed.
    pub connections_per_address: usize,
    /// TLS handshakes at a time; further ones wait.
    pub handshakes: usize,
    /// From the connection to the end of its TLS handshake, the wait for its turn included.
    pub handshake_timeout: Duration,
    /// How long a connection may be open before a token is issued or accepted on it.
    pub time_to_prove: Duration,
    /// HTTP/2 streams of one connection: a session and a few calls.
    pub streams_per_connection: u32,
    /// Of any message of an agent, in bytes.
    pub message_size: usize,
    /// Authorizations of one address: this many at once, and so many each second after that.
    pub authorization_burst: NonZeroU32,
    pub authorizations_per_second: NonZeroU32,
    /// Authorizations on one connection within a minute. Behind a gateway that passes TLS through, this is what tells agents apart: they
    /// have its address, and each a connection of its own.
    pub authorizations_per_connection: u32,
    /// Authorizations under way at a time.
    pub authorizations: usize,
    /// Of large configurations on their way to all agents at a time, in bytes; further ones wait.
    pub configurations: usize,
    /// HTTP/2 pings to find dead agents.
    pub keepalive_interval: Duration,
    pub keepalive_timeout: Duration,
}

impl Limits {
    pub const DEFAULT_CONNECTIONS_PER_ADDRESS: usize = 20_000;
    pub const DEFAULT_AUTHORIZATIONS_PER_CONNECTION: u32 = 30;
    pub const DEFAULT_AUTHORIZATIONS_PER_SECOND: NonZeroU32 = const { NonZeroU32::new(20).unwrap() };
}

impl Limits {
    /// Where nobody says another: what comes in ten seconds may come at once, as when all agents of an address come back together.
    pub fn burst(per_second: NonZeroU32) -> NonZeroU32 {
        per_second.saturating_mul(const { NonZeroU32::new(10).unwrap() })
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 60_000,
            connections_per_address: Self::DEFAULT_CONNECTIONS_PER_ADDRESS,
            handshakes: 1024,
            handshake_timeout: Duration::from_secs(10),
            time_to_prove: Duration::from_secs(30),
            streams_per_connection: 16,
            message_size: 64 * 1024,
            authorization_burst: Self::burst(Self::DEFAULT_AUTHORIZATIONS_PER_SECOND),
            authorizations_per_second: Self::DEFAULT_AUTHORIZATIONS_PER_SECOND,
            authorizations_per_connection: Self::DEFAULT_AUTHORIZATIONS_PER_CONNECTION,
            authorizations: 1024,
            configurations: 256 * 1024 * 1024,
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(10),
        }
    }
}

/// What is counted together: whoever has one address of a /64 has all of it.
fn counted_as(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 => v4,
    }
}

/// Addresses whose rate is kept; a new one is refused beyond that.
const MOST_ADDRESSES: usize = 100_000;
const BUSY: Duration = Duration::from_secs(1);

/// How often each address may ask for authorization.
pub(crate) struct Rates {
    authorizations: DefaultKeyedRateLimiter<IpAddr>,
    clock: DefaultClock,
}

impl Rates {
    pub(crate) fn new(limits: &Limits) -> Self {
        let quota = Quota::per_second(limits.authorizations_per_second).allow_burst(limits.authorization_burst);
        Self { authorizations: RateLimiter::keyed(quota), clock: DefaultClock::default() }
    }

    pub(crate) fn authorization(&self, peer: IpAddr) -> Result<(), Status> {
        if self.authorizations.len() >= MOST_ADDRESSES {
            self.authorizations.retain_recent();
            if self.authorizations.len() >= MOST_ADDRESSES {
                return Err(exhausted("the plane is busy with agents of other addresses", BUSY));
            }
        }
        self.authorizations.check_key(&counted_as(peer)).map_err(|until| {
            exhausted("too many authorizations from this address", until.wait_time_from(self.clock.now()))
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
    let wait = wait.as_millis().max(100);
    let mut status = Status::new(Code::ResourceExhausted, format!("{why}; try again in {wait} ms"));
    if let Ok(value) = wait.to_string().parse() {
        status.metadata_mut().insert(RETRY_PUSHBACK, value);
    }
    status
}

/// How many connections each address has.
#[derive(Debug, Clone)]
pub(crate) struct Addresses {
    most: usize,
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Addresses {
    pub(crate) fn new(most: usize) -> Self {
        Self { most, counts: Arc::default() }
    }

    /// `None`: this address has as many as it may.
    pub(crate) fn enter(&self, peer: IpAddr) -> Option<AddressGuard> {
        let address = counted_as(peer);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(AddressGuard { address, counts: self.counts.clone() })
    }
}

/// One connection, counted for as long as this lives.
#[derive(Debug)]
pub(crate) struct AddressGuard {
    address: IpAddr,
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

impl Drop for AddressGuard {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}

/// So many of something within each window of time.
#[derive(Debug)]
pub(crate) struct Budget {
    most: u32,
    window: Duration,
    since: tokio::time::Instant,
    used: u32,
}

impl Budget {
    pub(crate) fn new(most: u32, window: Duration) -> Self {
        Self { most, window, since: tokio::time::Instant::now(), used: 0 }
    }

    /// How long until there is all of it again.
    pub(crate) fn wait(&self) -> Duration {
        self.window.saturating_sub(self.since.elapsed())
    }

    /// False: there is none left.
    pub(crate) fn spend(&mut self) -> bool {
        if self.since.elapsed() > self.window {
            (self.since, self.used) = (tokio::time::Instant::now(), 0);
        }
        self.used = self.used.saturating_add(1);
        self.used <= self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_so_many_connections_and_gets_them_back() {
        let addresses = Addresses::new(2);
        let v4: IpAddr = "192.0.2.1".parse().unwrap();
        let first = addresses.enter(v4).unwrap();
        let _second = addresses.enter("::ffff:192.0.2.1".parse().unwrap()).unwrap();
        assert!(addresses.enter(v4).is_none());
        assert!(addresses.enter("192.0.2.2".parse().unwrap()).is_some());
        drop(first);
        assert!(addresses.enter(v4).is_some());
        assert_eq!(addresses.counts.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_whole_64_counts_as_one_address() {
        let one = NonZeroU32::MIN;
        let limits = Limits { authorization_burst: one, authorizations_per_second: one, ..Limits::default() };
        let rates = Rates::new(&limits);
        rates.authorization("2001:db8::1".parse().unwrap()).unwrap();
        let refused = rates.authorization("2001:db8::2".parse().unwrap()).unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        let wait: u64 = refused.metadata().get(RETRY_PUSHBACK).unwrap().to_str().unwrap().parse().unwrap();
        assert!((100..=1000).contains(&wait), "{wait}");
        rates.authorization("2001:db8:0:1::1".parse().unwrap()).unwrap();
    }
}
