//! Joins: connect, Discover, AuthorizeOnboarding, RegisterWorkload, durable. What they cost the plane beside their cryptography.

use super::Bench;
use crate::bare::Bare;
use crate::crowd::{Crowd, Evidence};
use crate::floor::Cryptography;
use crate::machine;
use crate::plane::{Plane, World};
use crate::table::{Figure, median, quantile};
use anyhow::ensure;
use std::time::{Duration, Instant};

/// Before anything is measured: what is made on first use isn't a part of every join.
const WARM_UP: usize = 50;
const CLOSED_WITHIN: Duration = Duration::from_secs(30);
const CONSTANTS: &str = "TLS and HTTP/2 with constant answers";
const PEERS: &str = "measured earlier, same kind of machine, one core, fresh P-256 key, durable; issue 7";

/// Of one number of agents at once, a sample for each repetition.
#[derive(Default)]
struct Samples {
    rate: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    cpu: Vec<f64>,
}

pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let started = Instant::now();
    let world = World::start().await?;
    bench.say(started, "a join's cryptography alone, and fsync");
    let cryptography: Vec<Cryptography> = (0..bench.repeat)
        .map(|_| Cryptography::measure(&world, bench.count(20, 1000)))
        .collect::<anyhow::Result<_>>()?;
    let fsyncs = machine::fsync(&bench.directory, bench.count(5, 200))?.into_iter().map(|it| it * 1e3).collect();

    let levels: &[usize] = if bench.one_core { &[1, 8, 32] } else { &[1, 8, 64] };
    let bare = constants(bench, started, &world, levels).await?;
    let floors = Floors { cryptography, fsyncs };
    let mut figures = vec![floors.parts()];
    for (kind, evidence) in [("JWT", world.jwt()), ("EC2 document", world.ec2_document())] {
        let measured = joins(bench, started, &world, kind, evidence, levels).await?;
        let alone = measured.first().map(|first| first.p50.clone()).unwrap_or_default();
        for ((level, samples), bare) in levels.iter().zip(measured).zip(&bare) {
            figures.extend(rows(bench, kind, *level, samples, bare, &alone, &floors));
        }
    }
    Ok(figures)
}

async fn joins(
    bench: &Bench,
    started: Instant,
    world: &World,
    kind: &str,
    evidence: Evidence,
    levels: &[usize],
) -> anyhow::Result<Vec<Samples>> {
    let plane = Plane::start(bench, world).await?;
    let crowd = Crowd::new(&plane.target(), evidence, world.whereto())?;
    crowd.join(crowd.newcomers(bench.count(5, WARM_UP))?, 4).await;
    let mut all = Vec::new();
    for &level in levels {
        bench.say(started, &format!("{kind}, {level} at once"));
        all.push(Samples::measure(bench, &crowd, level, plane.pid(), async || closed(&plane).await).await?);
    }
    Ok(all)
}

/// The libraries alone: joins that are answered with constants.
async fn constants(bench: &Bench, started: Instant, world: &World, levels: &[usize]) -> anyhow::Result<Vec<Samples>> {
    let server = Bare::start(bench, world)?;
    let crowd = Crowd::new(&server.target(), world.jwt(), world.whereto())?;
    crowd.join(crowd.newcomers(bench.count(5, WARM_UP))?, 4).await;
    let mut all = Vec::new();
    for &level in levels {
        bench.say(started, &format!("{CONSTANTS}, {level} at once"));
        all.push(Samples::measure(bench, &crowd, level, server.pid(), async || idle(&server).await).await?);
    }
    Ok(all)
}

impl Samples {
    /// Of the server with this pid. `closed`: waits until it is done with the connections that ended.
    async fn measure(
        bench: &Bench,
        crowd: &Crowd,
        level: usize,
        pid: i32,
        closed: impl AsyncFn() -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let mut samples = Self::default();
        for _ in 0..bench.repeat {
            let count = counted(bench, level);
            let newcomers = crowd.newcomers(count)?;
            let before = machine::cpu_time(pid)?;
            let joins = crowd.join_all(newcomers, level).await?;
            drop(joins.joined);
            // Ending a connection is part of what it costs.
            closed().await?;
            let cpu = machine::cpu_time(pid)? - before;
            let latencies: Vec<f64> = joins.latencies.iter().map(|it| it.as_secs_f64() * 1e3).collect();
            samples.rate.push(count as f64 / joins.elapsed.as_secs_f64());
            samples.p50.extend(median(&latencies));
            samples.p99.extend(quantile(&latencies, 0.99));
            samples.cpu.push(cpu.as_secs_f64() * 1e3 / count as f64);
        }
        Ok(samples)
    }
}

/// It has no metrics: it is done with the connections that ended when it computes no more.
async fn idle(server: &Bare) -> anyhow::Result<()> {
    let mut before = machine::cpu_time(server.pid())?;
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = machine::cpu_time(server.pid())?;
        if now - before < Duration::from_millis(1) {
            return Ok(());
        }
        before = now;
    }
}

/// Enough of them for a p99.
fn counted(bench: &Bench, level: usize) -> usize {
    bench.count(level.max(10), if level == 1 { 400 } else { 1500 })
}

async fn closed(plane: &Plane) -> anyhow::Result<()> {
    let began = Instant::now();
    while plane.metric("onboarding_connections").await? > 0.0 {
        ensure!(began.elapsed() < CLOSED_WITHIN, "connections that their agents closed stay open");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Joins a second, CPU and p99 of SPIRE and step-ca at these numbers of clients.
#[allow(clippy::type_complexity, reason = "a table's rows: who, joins a second, CPU, p99")]
fn peers(level: usize) -> Option<[(&'static str, f64, f64, Option<f64>); 2]> {
    const SPIRE: &str = "SPIRE 1.13.3 (x509pop, SQLite)";
    const STEP: &str = "step-ca 0.30.2 (AWS document, badger)";
    match level {
        1 => Some([(SPIRE, 221.0, 3.2, None), (STEP, 225.0, 2.7, None)]),
        8 => Some([(SPIRE, 318.0, 2.7, None), (STEP, 354.0, 2.0, None)]),
        32 => Some([(SPIRE, 348.0, 2.6, Some(302.0)), (STEP, 363.0, 2.0, Some(229.0))]),
        _ => None,
    }
}

/// What stands beside every number of agents at once.
struct Floors {
    cryptography: Vec<Cryptography>,
    /// In ms.
    fsyncs: Vec<f64>,
}

impl Floors {
    /// In ms.
    fn of(&self, part: fn(&Cryptography) -> f64) -> Vec<f64> {
        self.cryptography.iter().map(|it| part(it) * 1e3).collect()
    }

    /// What a join's cryptography consists of.
    fn parts(&self) -> Figure {
        let handshake = ("a TLS 1.3 handshake, server", self.of(|it| it.handshake));
        Figure::new("a join's cryptography", "ms", self.of(Cryptography::of_a_join), handshake)
            .against("a P-256 verification, of which it has two", self.of(|it| it.verify))
            .against("a P-256 signature", self.of(|it| it.sign))
            .against("an RSA-2048 verification", self.of(|it| it.rsa_verify))
    }
}

/// `bare`: the same connections and calls, with nothing behind them. `alone`: the median of one agent alone.
fn rows(
    bench: &Bench,
    kind: &str,
    level: usize,
    samples: Samples,
    bare: &Samples,
    alone: &[f64],
    floors: &Floors,
) -> Vec<Figure> {
    let name = |what: &str| format!("join, {kind}, {level} at once: {what}");
    let mut rate = Figure::new(name("rate"), "joins/s", samples.rate, (CONSTANTS, bare.rate.clone()));
    let p50 = Figure::new(name("p50"), "ms", samples.p50.clone(), (CONSTANTS, bare.p50.clone()))
        .against("one fdatasync of 4 KiB", floors.fsyncs.clone());
    let mut p99 = Figure::new(name("p99"), "ms", samples.p99, (CONSTANTS, bare.p99.clone()));
    let mut cpu =
        Figure::new(name("plane's CPU"), "ms", samples.cpu, ("its cryptography", floors.of(Cryptography::of_a_join)))
            .against(CONSTANTS, bare.cpu.clone())
            .goal("at most 2 x its cryptography");
    if level == 64 {
        p99 = p99.against("p50 at 64", samples.p50).against("p50 of one alone", alone.to_vec()).goal("at most 5 x p50");
    }
    if let Some(peers) = peers(level).filter(|_| bench.one_core) {
        for (peer, theirs, their_cpu, their_p99) in peers {
            rate = rate.beside(peer, theirs, PEERS);
            cpu = cpu.beside(peer, their_cpu, PEERS);
            p99 = match their_p99 {
                Some(theirs) => p99.beside(peer, theirs, PEERS),
                None => p99,
            };
        }
        rate = rate.beside("istiod (CSR), sustained", 80.0, PEERS).goal("5 x the best of them");
        cpu = cpu.beside("istiod and its API server", 5.0, PEERS);
    }
    vec![rate, p50, p99, cpu]
}
