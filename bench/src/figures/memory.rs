//! Resident memory of the plane per idle connected agent, and what it computes for them.

use super::Bench;
use crate::bare::Bare;
use crate::crowd::{Crowd, Habits, Target};
use crate::plane::{Plane, World};
use crate::table::Figure;
use crate::{floor, machine};
use anyhow::ensure;
use std::time::{Duration, Instant};

const LINES: usize = 32;
const CONNECTED_WITHIN: Duration = Duration::from_secs(300);
const STILL_WITHIN: Duration = Duration::from_secs(30);
/// Of the plane and of this process, that are no agent's connection.
const OTHER_FILES: usize = 1000;
/// Either side pings once in this time.
const KEEPALIVE: usize = 20;
const PEERS: &str = "measured earlier, same kind of machine; issue 7";

pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let started = Instant::now();
    let world = World::start().await?;
    let sizes = sizes(bench, started);
    let (mut ours, mut bare, mut state) = (Samples::of(&sizes), Samples::of(&sizes), Vec::new());
    for _ in 0..bench.repeat {
        bench.say(started, "the TLS library's own state of a connection");
        state.push(floor::tls_state(bench, bench.count(1000, 10_000))? / 1024.0);
        bench.say(started, "TLS and HTTP/2 with a session, nothing behind them");
        let server = Bare::start(bench, &world)?;
        bare.measure(bench, started, &world, &server.target(), server.pid()).await?;
        drop(server);
        bench.say(started, "the plane");
        let plane = Plane::start(bench, &world).await?;
        ours.measure(bench, started, &world, &plane.target(), plane.pid()).await?;
    }
    let mut figures: Vec<Figure> = (sizes.iter().zip(ours.memory).zip(bare.memory))
        .map(|((size, ours), bare)| {
            let what = "TLS and HTTP/2 with a session, nothing behind them";
            Figure::new(format!("plane's memory per idle agent, {size} of them"), "KiB", ours, (what, bare))
                .against("the TLS library's state alone", state.clone())
                .beside("SPIRE 1.13.3", 128.0, PEERS)
                .goal("32 KiB")
        })
        .collect();
    let most = sizes.last().copied().unwrap_or_default();
    figures.push(Figure::new(
        format!("plane's CPU while {most} agents are idle"),
        "%",
        ours.cpu,
        ("TLS and HTTP/2, nothing behind them", bare.cpu),
    ));
    Ok(figures)
}

/// How many agents are measured, ascending.
fn sizes(bench: &Bench, started: Instant) -> Vec<usize> {
    if bench.quick {
        return vec![1000];
    }
    // Each agent is an open file here and one in the plane, whose limit is the same.
    let most = bench.descriptors.saturating_sub(OTHER_FILES);
    let wanted = 50_000;
    if wanted > most {
        bench.say(started, &format!("{wanted} agents need a higher limit of open files (ulimit -Hn): {most} instead"));
    }
    vec![1000, 10_000, wanted.min(most)]
}

/// Of one kind of server.
struct Samples {
    sizes: Vec<usize>,
    /// KiB for each agent, at each of the sizes.
    memory: Vec<Vec<f64>>,
    /// Percent of a core, at the last of the sizes.
    cpu: Vec<f64>,
}

impl Samples {
    fn of(sizes: &[usize]) -> Self {
        Self { sizes: sizes.to_vec(), memory: vec![Vec::new(); sizes.len()], cpu: Vec::new() }
    }

    /// One sample more, of a server that has just been started.
    async fn measure(
        &mut self,
        bench: &Bench,
        started: Instant,
        world: &World,
        server: &Target,
        pid: i32,
    ) -> anyhow::Result<()> {
        let crowd = Crowd::new(server, world.cheap(), world.whereto())?;
        // The pools, the metrics, the first pages of everything.
        crowd.join(crowd.newcomers(20)?, 4).await;
        let empty = still(pid).await?;
        let mut crowds = Vec::new();
        let mut there = 0;
        for (size, samples) in self.sizes.iter().zip(&mut self.memory) {
            bench.say(started, &format!("{size} agents"));
            let joins = crowd.join_all(crowd.newcomers(size - there)?, LINES).await?;
            let members = crowd.stay(joins.joined, Habits::default());
            members.until(CONNECTED_WITHIN, |status| status.connected && status.boots > 0).await?;
            crowds.push(members);
            there = *size;
            let full = still(pid).await?;
            samples.push(full.saturating_sub(empty) as f64 / 1024.0 / there as f64);
        }
        let (before, idle) = (machine::cpu_time(pid)?, Instant::now());
        tokio::time::sleep(Duration::from_secs(bench.count(2, KEEPALIVE) as u64)).await;
        let spent = machine::cpu_time(pid)? - before;
        self.cpu.push(spent.as_secs_f64() / idle.elapsed().as_secs_f64() * 100.0);
        let lost = crowds.iter().flat_map(|members| members.statuses()).filter(|status| status.sessions != 1).count();
        ensure!(lost == 0, "{lost} of {there} agents lost their session");
        Ok(())
    }
}

/// Resident bytes once they have stopped changing: what joining needed has been given back.
async fn still(pid: i32) -> anyhow::Result<u64> {
    let began = Instant::now();
    let mut last = machine::memory(pid)?.resident;
    loop {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let now = machine::memory(pid)?.resident;
        if now.abs_diff(last) <= now / 500 || began.elapsed() > STILL_WITHIN {
            return Ok(now);
        }
        last = now;
    }
}
