//! Thousands of agents in one process, speaking the real protocol: what a plane can't tell from as many VMs.
//!
//! Each has a key, evidence and a TLS connection of its own, and does what the agent does: `Discover`, `AuthorizeOnboarding`,
//! `RegisterWorkload`, then a session in which it reports health, takes boot configurations and says so, and after which it comes back
//! as the agent comes back, by its token while that is good. There is no sidecar behind it.
//!
//! ```no_run
//! # use onboarding_bench::crowd::*;
//! # async fn example(addresses: Vec<std::net::SocketAddr>, ca: String) -> anyhow::Result<()> {
//! let issuer = std::sync::Arc::new(onboarding_testkit::oidc::start().await?);
//! let crowd = Crowd::new(
//!     &Target { addresses, server_name: "onboarding-endpoint.your-company.corp".to_owned(), ca },
//!     Evidence::jwt(issuer),
//!     Whereto { plane_uid: "the plane's UID".to_owned(), namespace: "bookinfo".to_owned(), group: "ratings".to_owned() },
//! )?;
//! let joins = crowd.join(crowd.newcomers(200)?, 64).await;
//! anyhow::ensure!(joins.failures.is_empty(), "{:?}", joins.failures);
//! let members = crowd.stay(joins.joined, Habits::default());
//! members.until(std::time::Duration::from_secs(30), |status| status.connected).await?;
//! // Kill a plane; those that it held find another of `addresses`:
//! members.until(std::time::Duration::from_secs(30), |status| status.connected && status.sessions >= 2).await?;
//! # Ok(()) }
//! ```

mod evidence;
mod link;
mod member;

pub use evidence::{ACCOUNT, Evidence};
pub use link::{Link, Target};
pub use member::{Habits, Members, Status};

use anyhow::Context;
use link::Dialler;
use onboarding_wire::onboarding as pb;
use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Whom the agents ask to be let in by, and where.
#[derive(Debug, Clone)]
pub struct Whereto {
    /// The audience of their credentials.
    pub plane_uid: String,
    pub namespace: String,
    pub group: String,
}

impl Whereto {
    fn reference(&self) -> pb::WorkloadGroupRef {
        pb::WorkloadGroupRef { namespace: self.namespace.clone(), name: self.group.clone() }
    }
}

/// Agents of one plane and one group.
#[derive(Clone)]
pub struct Crowd {
    dialler: Arc<Dialler>,
    evidence: Evidence,
    whereto: Arc<Whereto>,
    /// The next agent's number; no two of this crowd share one.
    next: Arc<AtomicUsize>,
}

/// A host that has all it needs to join, so that making it isn't part of what is measured.
pub struct Newcomer {
    pub(crate) number: usize,
    pub(crate) key: link::Key,
    pub(crate) credential: prost_types::Any,
}

/// One that registered, on the connection on which it did.
pub struct Joined {
    pub(crate) number: usize,
    pub(crate) key: link::Key,
    pub(crate) token: String,
    pub(crate) link: Link,
    /// `namespace/name` of its registration.
    pub registration: String,
}

/// What became of many newcomers.
pub struct Joins {
    pub joined: Vec<Joined>,
    /// In the words of the plane, or of what failed before it.
    pub failures: Vec<String>,
    /// From the first SYN to the answer of RegisterWorkload, of each that joined.
    pub latencies: Vec<Duration>,
    pub elapsed: Duration,
}

impl Crowd {
    /// # Errors
    /// The target's CA can't be read, or its name is none.
    pub fn new(target: &Target, evidence: Evidence, whereto: Whereto) -> anyhow::Result<Self> {
        Ok(Self {
            dialler: Arc::new(Dialler::new(target)?),
            evidence,
            whereto: Arc::new(whereto),
            next: Arc::new(AtomicUsize::new(0)),
        })
    }

    /// Hosts with fresh P-256 keys and evidence of their own. Takes a while for thousands: it signs a credential for each.
    ///
    /// # Errors
    /// The evidence can't be made.
    pub fn newcomers(&self, count: usize) -> anyhow::Result<Vec<Newcomer>> {
        let first = self.next.fetch_add(count, Ordering::Relaxed);
        let one = |number| {
            let credential = self.evidence.credential(number, &self.whereto.plane_uid)?;
            Ok(Newcomer { number, key: link::Key::generate()?, credential })
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let numbers: Vec<usize> = (first..first + count).collect();
        let made: anyhow::Result<Vec<Vec<Newcomer>>> = std::thread::scope(|scope| {
            let parts = numbers.chunks(count.div_ceil(threads).max(1));
            let parts: Vec<_> =
                parts.map(|part| scope.spawn(move || part.iter().copied().map(one).collect())).collect();
            parts.into_iter().map(|part| part.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked"))).collect()
        });
        Ok(made?.into_iter().flatten().collect())
    }

    /// One after the other on each of `at_once` lines, all lines together.
    pub async fn join(&self, newcomers: Vec<Newcomer>, at_once: usize) -> Joins {
        let waiting = Arc::new(Mutex::new(VecDeque::from(newcomers)));
        let started = Instant::now();
        let lines: Vec<_> = (0..at_once)
            .map(|_| {
                let (crowd, waiting) = (self.clone(), waiting.clone());
                tokio::spawn(async move {
                    let mut done = Vec::new();
                    loop {
                        let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                        let Some(newcomer) = next else { return done };
                        let began = Instant::now();
                        let outcome = crowd.join_one(newcomer).await;
                        done.push((outcome, began.elapsed()));
                    }
                })
            })
            .collect();
        let mut joins =
            Joins { joined: Vec::new(), failures: Vec::new(), latencies: Vec::new(), elapsed: Duration::ZERO };
        for line in lines {
            match line.await {
                Ok(done) => done.into_iter().for_each(|(outcome, latency)| match outcome {
                    Ok(joined) => {
                        joins.joined.push(joined);
                        joins.latencies.push(latency);
                    }
                    Err(error) => joins.failures.push(format!("{error:#}")),
                }),
                Err(error) => joins.failures.push(format!("a line of agents broke: {error}")),
            }
        }
        joins.elapsed = started.elapsed();
        joins
    }

    /// The same, where nobody may fail.
    ///
    /// # Errors
    /// Somebody did; with how many, and what the first was told.
    pub async fn join_all(&self, newcomers: Vec<Newcomer>, at_once: usize) -> anyhow::Result<Joins> {
        let joins = self.join(newcomers, at_once).await;
        let failures = &joins.failures;
        anyhow::ensure!(failures.is_empty(), "{} joins failed: {:?}", failures.len(), failures.first());
        Ok(joins)
    }

    /// What a join is: connect, Discover, AuthorizeOnboarding, RegisterWorkload.
    async fn join_one(&self, newcomer: Newcomer) -> anyhow::Result<Joined> {
        let Newcomer { number, key, credential } = newcomer;
        let mut link = self.dialler.dial(number, 0).await.context("connecting")?;
        let token = link.authorize(&key, credential, self.whereto.reference()).await.context("authorizing")?;
        let registration = link.register(&token, report(number), None).await.context("registering")?;
        Ok(Joined { number, key, token, link, registration })
    }

    /// Opens their sessions, and keeps them for as long as the answer lives.
    pub fn stay(&self, joined: Vec<Joined>, habits: Habits) -> Members {
        Members::start(self, joined, habits)
    }
}

/// What an agent says of itself. Addresses of a network of sixteen million hosts, a different one for each.
fn report(number: usize) -> pb::Registration {
    let [_, a, b, c] = u32::try_from(number % 0x00ff_fffe + 1).unwrap_or(1).to_be_bytes();
    pb::Registration {
        agent_version: "0.1.0".to_owned(),
        sidecar: Some(pb::registration::Sidecar::Envoy(pb::EnvoySidecar { version: "1.40.0".to_owned() })),
        addresses: vec![pb::HostAddress {
            ip: Ipv4Addr::new(10, a, b, c).to_string(),
            kind: pb::AddressKind::Vpc.into(),
        }],
        labels: [("version".to_owned(), "v3".to_owned())].into(),
        connected_over: pb::AddressKind::Vpc.into(),
    }
}
