//! Resident memory of the plane per idle connected agent.

use super::Bench;
use crate::bare::Bare;
use crate::crowd::{Crowd, Habits};
use crate::floor::Tls;
use crate::machine;
use crate::plane::{Plane, World};
use crate::table::Figure;
use anyhow::ensure;
use std::time::{Duration, Instant};

const LINES: usize = 32;
const CONNECTED_WITHIN: Duration = Duration::from_secs(300);
const STILL_WITHIN: Duration = Duration::from_secs(30);
/// Of the plane and of this process, that are no agent's connection.
const OTHER_FILES: usize = 1000;
const PEERS: &str = "measured earlier, same kind of machine; issue 7";

pub async fn run(bench: &Bench) -> anyhow::Result<Vec<Figure>> {
    let started = Instant::now();
    let world = World::start().await?;
    let tls = Tls::new(world.tls())?;
    // What the allocator keeps from the first time would be missing in the second.
    bench.say(started, "the TLS library's own state of a connection");
    let floor = vec![tls.bytes_per_connection(bench.count(1000, 10_000))? / 1024.0];
    bench.say(started, "TLS and HTTP/2 with a session, nothing behind them");
    let bare = vec![bare(bench, &world).await?];
    let mut sizes = if bench.quick { vec![1000] } else { vec![1000, 10_000, 50_000] };
    // Each agent is an open file here and one in the plane, whose limit is the same.
    let most = bench.descriptors.saturating_sub(OTHER_FILES);
    if let Some(size) = sizes.last_mut().filter(|size| **size > most) {
        bench.say(
            started,
            &format!("{size} agents need a higher hard limit of open files (ulimit -Hn): {most} instead"),
        );
        *size = most;
    }
    let mut samples = vec![Vec::new(); sizes.len()];
    let (mut cpu, mut largest) = (Vec::new(), 0);
    for turn in 0..bench.repeat {
        let plane = Plane::start(bench, &world).await?;
        let crowd = Crowd::new(&plane.target(), world.cheap(), world.whereto())?;
        // The pools, the metrics, the first pages of everything.
        crowd.join(crowd.newcomers(20)?, 4).await;
        let empty = still(plane.pid()).await?;
        let mut crowds = Vec::new();
        let mut there = 0;
        // The largest once: it takes as long as all others together.
        for (size, samples) in sizes.iter().zip(&mut samples).take(if turn == 0 { 3 } else { 2 }) {
            bench.say(started, &format!("{size} agents"));
            let joins = crowd.join_all(crowd.newcomers(size - there)?, LINES).await?;
            let members = crowd.stay(joins.joined, Habits::default());
            members.until(CONNECTED_WITHIN, |status| status.connected && status.boots > 0).await?;
            crowds.push(members);
            there = *size;
            let full = still(plane.pid()).await?;
            samples.push(full.saturating_sub(empty) as f64 / 1024.0 / *size as f64);
            if *size >= 10_000 || bench.quick {
                let (before, idle) = (plane.cpu_time()?, Instant::now());
                tokio::time::sleep(Duration::from_secs(5)).await;
                let share = (plane.cpu_time()? - before).as_secs_f64() / idle.elapsed().as_secs_f64();
                largest = there;
                cpu.push(share * 100.0);
            }
        }
        let lost = crowds.iter().flat_map(|members| members.statuses()).filter(|status| status.sessions != 1).count();
        ensure!(lost == 0, "{lost} of {there} agents lost their session");
    }
    let mut figures: Vec<Figure> = sizes
        .iter()
        .zip(samples)
        .map(|(size, samples)| {
            Figure::new(format!("plane's memory per idle agent, {size} of them"), "KiB", samples)
                .against("the TLS library's state alone", floor.clone())
                .against("TLS and HTTP/2 with a session, nothing behind them", bare.clone())
                .beside("SPIRE 1.13.3", 128.0, PEERS)
                .goal("32 KiB")
        })
        .collect();
    figures.push(Figure::new(format!("plane's CPU while up to {largest} agents are idle"), "%", cpu));
    Ok(figures)
}

/// KiB of the libraries for each connection with an open session.
async fn bare(bench: &Bench, world: &World) -> anyhow::Result<f64> {
    let server = Bare::start(bench, world)?;
    let crowd = Crowd::new(&server.target(), world.cheap(), world.whereto())?;
    crowd.join(crowd.newcomers(20)?, 4).await;
    let empty = still(server.pid()).await?;
    let size = 1000;
    let joins = crowd.join_all(crowd.newcomers(size)?, LINES).await?;
    let members = crowd.stay(joins.joined, Habits::default());
    members.until(CONNECTED_WITHIN, |status| status.connected && status.boots > 0).await?;
    Ok(still(server.pid()).await?.saturating_sub(empty) as f64 / 1024.0 / size as f64)
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
